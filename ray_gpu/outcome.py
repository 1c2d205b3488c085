"""What a sandbox answered, opened and checked inside the zone. Pure.

The answer is hostile input: nothing in it is executed, and a value is accepted only if it is plain data
(``zones.values``). An error of the user's function travels as ``RemoteFunctionError``; the client rebuilds
the built-in exception of the same name from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ray_gpu.answers import MAX_MEMBERS, MAX_TEXT_BYTES, read_outcome
from zones import values
from zones.errors import AnswerRefusedError, RemoteFunctionError, RowCountError, ValueRefusedError, from_wire


@dataclass(frozen=True, slots=True)
class RowsExpected:
    """A ``map`` shard's result must have this many rows."""

    rows: int


@dataclass(slots=True, kw_only=True)
class Outcome:
    """A checked answer."""

    value: Any
    #: The value as it came, for handing on without encoding it again.
    encoded: memoryview
    printed: str
    #: Whether the sandbox has the shard open still.
    kept: bool = False
    #: Whether it was asked for a shard that it has not: there is no value.
    absent: bool = False


def open_outcome(payload: memoryview, *, expected: RowsExpected | None = None) -> Outcome:
    """Check an answer.

    Raises:
        RemoteFunctionError: The user's function raised.
        ValueRefusedError: The sandbox says that the value is not plain data, or is larger than allowed.
        AnswerRefusedError: The answer is none that a sandbox of ours gives.
        RowCountError: A ``map`` result has another number of rows than its shard.
    """
    try:
        meta, encoded = read_outcome(payload)
    except ValueRefusedError as malformed:
        raise AnswerRefusedError(malformed.message) from None
    printed = _cut(meta.get("printed", ""))
    status = meta.get("status")
    if status == "error":
        raise _raised(meta, printed)
    if status == "refused":
        text = _cut(meta.get("message"), 2000)
        error = from_wire({"error": meta.get("error"), "message": text, "fields": meta.get("fields")})
        raise error if isinstance(error, ValueRefusedError) else ValueRefusedError(text)
    if status == "absent":
        return Outcome(value=None, encoded=encoded[:0], printed=printed, absent=True)
    if status != "ok":
        raise AnswerRefusedError("the sandbox answered with something that is no result; run the call again")
    try:
        value = values.decode(encoded, zero_copy=True)
    except ValueRefusedError as malformed:
        raise AnswerRefusedError(malformed.message) from None
    if expected is not None:
        _check_rows(value, expected.rows)
    return Outcome(value=value, encoded=encoded, printed=printed, kept=meta.get("kept") is True)


def _cut(text: Any, most: int = MAX_TEXT_BYTES + 100) -> str:
    return str(text)[:most]


def _raised(meta: dict[str, Any], printed: str) -> RemoteFunctionError:
    one = _described(meta, itertools.count())
    return RemoteFunctionError(
        f"{one['type']}: {one['message'][:2000]}",
        type_name=one["type"],
        builtin=one["builtin"],
        text=one["message"],
        plain_args=one["args"],
        members=one["members"],
        traceback=_cut(meta.get("traceback")),
        printed=printed,
    )


def _described(meta: dict[str, Any], counted: Iterator[int]) -> dict[str, Any]:
    """Return the description of an exception with what a sandbox of ours says, and nothing else."""
    members = meta.get("members")
    if not isinstance(members, list) or next(counted) >= MAX_MEMBERS:
        members = []
    return {
        "type": _cut(meta.get("type"), 200),
        "builtin": meta.get("builtin") is True,
        "message": _cut(meta.get("message")),
        "args": _plain(meta.get("args")),
        "members": [_described(one, counted) for one in members[:MAX_MEMBERS] if isinstance(one, dict)],
    }


def _plain(args: Any) -> list[Any]:
    """Return the arguments of an exception as its sandbox sent them, if they are what a sandbox of ours sends."""
    if not isinstance(args, list) or not all(isinstance(arg, (str, bytes, int, float, type(None))) for arg in args):
        return []
    return args if sum(len(arg) for arg in args if isinstance(arg, (str, bytes))) <= MAX_TEXT_BYTES else []


def _check_rows(value: Any, rows: int) -> None:
    shape = getattr(value, "shape", None)
    if shape is None or len(shape) == 0:
        raise ValueRefusedError(
            f"f.map needs one row per row, as a table or an array, and got a {type(value).__name__}; "
            "use f.map_reduce for one value per shard"
        )
    if shape[0] != rows:
        raise RowCountError(
            f"f.map was given {rows} rows and its function returned {shape[0]}; return one row per row, "
            "or use f.map_reduce",
            expected=rows,
            got=int(shape[0]),
        )
