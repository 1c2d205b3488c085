"""What a notebook may ask of a gateway, checked field by field. Pure.

Everything here comes from a process that the zone does not trust. A request names its data
(a catalog handle, or a sealed memory file), and carries the function and arguments as bytes
that the gateway never unpickles.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgpack

from zones.errors import FunctionRefusedError

#: Largest function with its closure, globals and defaults, bytes.
MAX_FUNCTION_BYTES = 64 << 10
#: Largest encoded arguments that fit a message; larger values belong into a data set.
MAX_ARGUMENT_BYTES = 768 << 10
#: Shard sizes that make sense: below, calls cost more than bytes; above, nothing is won.
MIN_SHARD_BYTES, DEFAULT_SHARD_BYTES, MAX_SHARD_BYTES = 64 << 10, 4 << 20, 32 << 20


#: Modules that a notebook may say a function imports.
MAX_IMPORTS = 256
#: GPU actors that one call may use at once.
MAX_CONCURRENCY = 64
#: Most times that a call is made again.
MAX_RETRIES = 100
#: Longest that a caller may ask to wait, seconds: a week.
MAX_WAIT_S = 604_800


def payload_bytes(shard_bytes: int) -> int:
    """Return how much data makes a shard of *shard_bytes*: with Arrow's framing it just fits its padding bucket."""
    return shard_bytes - shard_bytes // 64 - (8 << 10)


class Mode(StrEnum):
    """What a call means."""

    #: Row-aligned: N rows in, N rows out.
    MAP = "map"
    #: One value per shard, for a reduction in the notebook.
    SHARDS = "shards"
    #: The same, each value as soon as it is there.
    STREAM = "stream"
    #: One call on arguments alone.
    CALL = "call"
    #: The same in every sandbox of an instance.
    EVERY = "every"
    #: Make an instance of a class, which stays where it is made.
    MAKE = "make"


_MODES = {mode.value: mode for mode in Mode}
#: Those without data.
_ALONE = frozenset({Mode.CALL, Mode.EVERY, Mode.MAKE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a call, as ``@gpu_remote`` and ``.options`` take them."""

    pool: str = ""
    #: Thousandths of a GPU for each actor.
    gpu_milli: int = 1000
    #: GPU actors that work at once.
    concurrency: int = 2
    #: Columns that leave; ``None`` means all of the data's.
    columns: tuple[str, ...] | None = None
    #: Column whose equal values mark rows that stay in one shard; it does not leave unless *columns* names it.
    keep_together: str | None = None
    #: Columns whose category values leave too.
    categories: tuple[str, ...] | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    #: Seconds until the call is given up; ``None`` means never.
    timeout_s: float | None = None
    #: Seconds to wait for a GPU node with room.
    placement_timeout_s: float = 30.0
    #: How often a call on arguments alone is made again after its lease was lost.
    max_retries: int = 0
    #: Send all rows as one shard, whatever their size.
    whole: bool = False
    #: Keep shards open in the sandboxes after the call.
    resident: bool = False
    #: Id of an instance, where the function runs; "": wherever there is room.
    instance: str = ""
    #: Environment that the function runs in, by its name in the zone or its digest; "": whichever fits.
    environment: str = ""
    #: Top-level modules that the function certainly imports, each with its version in the notebook, "" if not known.
    imports: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to run and how: the same for many calls."""

    function: bytes
    #: SHA-256 of the function's bytes, hexadecimal.
    digest: str
    #: Qualified name, for the screen only; the ledger has the digest.
    name: str
    options: Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call."""

    mode: Mode
    work: Work
    arguments: bytes
    #: A catalog handle's document, ``{"memory": true}`` for a memory file, or ``None`` without data.
    data: dict[str, Any] | None
    #: Digests of the values that arguments name.
    broadcasts: tuple[str, ...] = ()
    #: Of a stream: whether what the function raises for a shard stands in for its value, and the call goes on.
    return_exceptions: bool = False


def parse(message: dict[str, Any]) -> Request:
    """Build a request from a notebook's message.

    Raises:
        FunctionRefusedError: Function or arguments are over their caps.
        ValueError: A field is missing or of another type.
    """
    work, arguments = message.get("work"), message.get("arguments")
    if not isinstance(work, bytes) or not isinstance(arguments, bytes):
        raise ValueError("work and arguments must be bytes")
    if len(arguments) > MAX_ARGUMENT_BYTES:
        raise FunctionRefusedError(
            f"the arguments have {len(arguments)} bytes, over the cap of {MAX_ARGUMENT_BYTES}; "
            "pass tables and large arrays as data",
            variable=None,
        )
    data = None if message.get("data") is None else _map(message["data"])
    mode = _MODES.get(str(message.get("mode")))
    if mode is None:
        raise ValueError("mode must be map, shards, stream or call")
    if (data is None) != (mode in _ALONE):
        raise ValueError("map, shards and stream need data; call, every and make take none")
    broadcasts = message.get("broadcasts") or []
    if not isinstance(broadcasts, list) or not all(isinstance(one, str) for one in broadcasts):
        raise ValueError("broadcasts must be a list of digests")
    return_exceptions = message.get("return_exceptions", False)
    if not isinstance(return_exceptions, bool) or (return_exceptions and mode is not Mode.STREAM):
        raise ValueError("return_exceptions is true or false, and streams alone have it")
    request = Request(
        mode=mode,
        work=_work(work),
        arguments=arguments,
        data=data,
        broadcasts=tuple(dict.fromkeys(broadcasts)),
        return_exceptions=return_exceptions,
    )
    if (mode is Mode.EVERY and not request.work.options.instance) or (
        mode is Mode.MAKE and request.work.options.instance
    ):
        raise ValueError("every needs an instance, and make none")
    return request


def pack_work(function: bytes, name: str, options: dict[str, Any]) -> bytes:
    """Return what :func:`parse` finds in a message's ``work``."""
    packed: bytes = msgpack.packb({"function": function, "name": name, "options": options})
    return packed


@functools.lru_cache(maxsize=64)
def _work(packed: bytes) -> Work:
    """Parse what stays the same from call to call, once."""
    try:
        given = _map(msgpack.unpackb(packed))
    except (ValueError, msgpack.UnpackException, RecursionError):
        raise ValueError("work is no msgpack map") from None
    function = given.get("function")
    if not isinstance(function, bytes):
        raise ValueError("function must be bytes")
    if len(function) > MAX_FUNCTION_BYTES:
        raise FunctionRefusedError(
            f"the function with everything it captures has {len(function)} bytes, over the cap of "
            f"{MAX_FUNCTION_BYTES}; pass large values as arguments or read them from a data set",
            variable=None,
        )
    return Work(
        function=function,
        digest=hashlib.sha256(function).hexdigest(),
        name=str(given.get("name", "function"))[:120],
        options=_options(_map(given.get("options", {}))),
    )


def _map(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("data and options must be maps")
    return dict(value)


def _options(given: dict[str, Any]) -> Options:
    unknown = set(given) - set(Options.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"the gateway knows no option {sorted(map(str, unknown))[0][:40]!r}; use one version of ray_gpu"
        )
    columns = {name: _columns(name, given.get(name)) for name in ("columns", "categories")}
    options = Options(**{**given, **columns, "imports": _imports(given.get("imports", []))})
    if not isinstance(options.keep_together, (str, type(None))):
        raise ValueError("keep_together must be the name of a column")
    if not type(options.pool) is type(options.instance) is type(options.environment) is str:
        raise ValueError("pool and environment must be names, and instance an id")
    if not type(options.whole) is type(options.resident) is bool:
        raise ValueError("whole and resident must be booleans")
    if not _whole(options.gpu_milli, 1, 64_000):
        raise ValueError("num_gpus must be from 0.001 to 64")
    if not _whole(options.concurrency, 1, MAX_CONCURRENCY):
        raise ValueError(f"concurrency must be from 1 to {MAX_CONCURRENCY}")
    if not _whole(options.max_retries, 0, MAX_RETRIES):
        raise ValueError(f"max_retries must be from 0 to {MAX_RETRIES}")
    if not _whole(options.shard_bytes, MIN_SHARD_BYTES, MAX_SHARD_BYTES):
        raise ValueError(f"shard_bytes must be from {MIN_SHARD_BYTES} to {MAX_SHARD_BYTES}")
    if not (options.timeout_s is None or _seconds(options.timeout_s)) or not _seconds(options.placement_timeout_s):
        raise ValueError(f"timeouts must be seconds above 0 and at most {MAX_WAIT_S}")
    return options


def _columns(option: str, given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"{option} must be a list of names")
    if not given or len(set(given)) < len(given):
        raise ValueError(f"{option} must name at least one column, and each of them once")
    return tuple(given)


def _imports(given: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list) or len(given) > MAX_IMPORTS:
        raise ValueError(f"imports must be a list of {MAX_IMPORTS} at most")
    if not all(isinstance(one, list) and [type(text) for text in one] == [str] * 2 for one in given):
        raise ValueError("an import is a module and a version")
    return tuple((module[:100], version[:100]) for module, version in given)


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_WAIT_S
