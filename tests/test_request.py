"""What a gateway accepts as a call. Everything here comes from a process that the zone does not trust."""

from __future__ import annotations

import hashlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_gpu.options import FunctionOptions
from ray_gpu.request import (
    MAX_ARGUMENT_BYTES,
    MAX_FUNCTION_BYTES,
    MAX_SHARD_BYTES,
    MIN_SHARD_BYTES,
    Mode,
    Options,
    parse,
)
from zones.errors import FunctionRefusedError


def _message(**changes: Any) -> dict[str, Any]:
    work: dict[str, Any] = {"name": "score", "function": b"f", "options": FunctionOptions().document()}
    work |= {name: changes.pop(name) for name in work if name in changes}
    base = {"op": "call", "mode": "map", "arguments": b"a", "data": {"dataset": "randhie"}}
    return {**base, "work": msgpack.packb(work), **changes}


def test_whole_request() -> None:
    """A client's message becomes a request with the digest of the function's bytes."""
    request = parse(_message(options={**FunctionOptions(columns=("a", "b"), timeout_s=2).document(), "whole": True}))

    assert (request.mode, request.work.name, request.arguments) == (Mode.MAP, "score", b"a")
    assert request.work.digest == hashlib.sha256(b"f").hexdigest()
    assert request.work.options == Options(columns=("a", "b"), timeout_s=2, whole=True)


def test_no_options_are_the_defaults() -> None:
    """Options may be left out, each by itself or all."""
    message = _message(work=msgpack.packb({"name": "score", "function": b"f"}))

    assert parse(message).work.options == parse(_message(options={})).work.options == Options()


def test_defaults_of_client_and_gateway_agree() -> None:
    """A call without options asks for what the gateway would assume."""
    assert parse(_message()).work.options == Options()


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "fit"},
        {"mode": None},
        {"mode": 1},
        {"mode": ["map"]},
        {"function": "text"},
        {"function": None},
        {"work": None},
        {"work": {"function": b"f"}},
        {"work": b""},
        {"work": msgpack.packb([b"f"])},
        {"work": msgpack.packb({"function": b"f"}) + b"\0"},
        {"work": b"\x91" * 5000},
        {"arguments": "text"},
        {"arguments": 5},
        {"data": None},
        {"data": "randhie"},
        {"data": [1]},
        {"mode": "call"},
        {"options": None},
        {"options": [1]},
        {"options": "x"},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_malformed_request(changes: dict[str, Any]) -> None:
    """A field of another kind, or data where none belongs, is refused."""
    with pytest.raises(ValueError, match=r"must be|need data|no msgpack map"):
        parse(_message(**changes))


@pytest.mark.parametrize(
    "options",
    [
        {"pool": 3},
        {"pool": None},
        {"whole": 1},
        {"whole": "yes"},
        {"resident": 1},
        {"resident": None},
        {"gpu_milli": 0},
        {"gpu_milli": -1},
        {"gpu_milli": True},
        {"gpu_milli": 500.0},
        {"gpu_milli": "1000"},
        {"gpu_milli": 64_001},
        {"concurrency": 0},
        {"concurrency": 65},
        {"concurrency": True},
        {"concurrency": 1.5},
        {"shard_bytes": MIN_SHARD_BYTES - 1},
        {"shard_bytes": MAX_SHARD_BYTES + 1},
        {"shard_bytes": "4 MiB"},
        {"timeout_s": 0},
        {"timeout_s": -1},
        {"timeout_s": "soon"},
        {"timeout_s": float("nan")},
        {"timeout_s": float("inf")},
        {"timeout_s": True},
        {"placement_timeout_s": None},
        {"placement_timeout_s": 0},
        {"columns": "age"},
        {"columns": []},
        {"columns": ["age", "age"]},
        {"columns": [1]},
        {"columns": {"age": 1}},
        {"categories": "kind"},
        {"categories": []},
        {"categories": ["kind", "kind"]},
    ],
    ids=str,
)
def test_malformed_option(options: dict[str, Any]) -> None:
    """Each option has a type and a range, checked before anything is done with it."""
    with pytest.raises(ValueError, match="must"):
        parse(_message(options=options))


def test_unknown_option() -> None:
    """An option that the gateway does not know is refused, not ignored: it may have been meant to protect."""
    with pytest.raises(ValueError, match="no option 'gpus'"):
        parse(_message(options={"gpus": 1}))


@pytest.mark.parametrize(("field", "cap"), [("function", MAX_FUNCTION_BYTES), ("arguments", MAX_ARGUMENT_BYTES)])
def test_caps(field: str, cap: int) -> None:
    """Function and arguments have caps; the last byte that fits is accepted."""
    request = parse(_message(**{field: bytes(cap)}))
    assert len(request.work.function if field == "function" else request.arguments) == cap
    with pytest.raises(FunctionRefusedError, match=f"{cap + 1} bytes, over the cap of {cap}"):
        parse(_message(**{field: bytes(cap + 1)}))


def test_long_name_is_cut() -> None:
    """The name is for the screen and no place to put data."""
    assert len(parse(_message(name="x" * 1000)).work.name) == 120


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(field=st.sampled_from(["mode", "work", "function", "arguments", "data", "options", "name"]), value=_json)
def test_any_value_in_any_field(field: str, value: Any) -> None:
    """Whatever a message holds, it is a request or an error that the gateway answers with."""
    try:
        request = parse(_message(**{field: value}))
    except (ValueError, FunctionRefusedError):
        return
    assert isinstance(request.work.options, Options)


@given(options=st.dictionaries(st.sampled_from(sorted(Options.__dataclass_fields__)), _json))
def test_any_value_in_any_option(options: dict[str, Any]) -> None:
    """The same for options."""
    try:
        parsed = parse(_message(options=options)).work.options
    except ValueError:
        return
    assert type(parsed.gpu_milli) is int
    assert parsed.gpu_milli > 0
