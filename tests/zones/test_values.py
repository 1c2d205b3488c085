"""Values survive the way there and back; everything that is not data is refused."""

from __future__ import annotations

import datetime as dt
import pickle
import struct
from collections import Counter, namedtuple
from decimal import Decimal
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zones.decoding import HEADER, MAGIC
from zones.errors import ResultTooLargeError, ValueRefusedError
from zones.ipc import read_ipc
from zones.values import decode, encode, encode_into

_KEYS = st.none() | st.booleans() | st.text(max_size=5) | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=5)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.datetimes().map(lambda moment: moment.replace(fold=0))
    | st.dates()
    | st.times().map(lambda moment: moment.replace(fold=0))
    | st.timedeltas()
    | st.decimals(allow_nan=False, allow_infinity=False, places=3)
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)
_DTYPES: Any = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.floating_dtypes(sizes=(16, 32, 64), endianness="?")
    | hnp.complex_number_dtypes(sizes=(64, 128))
    | hnp.datetime64_dtypes()
    | hnp.timedelta64_dtypes()
    | hnp.unicode_string_dtypes(min_len=1)
    | hnp.byte_string_dtypes(min_len=1)
)


def raw(skeleton: bytes, buffers: bytes = b"") -> bytes:
    """Frame a skeleton by hand, as a hostile sender would."""
    head = HEADER.size + len(skeleton)
    pad = -head % 64 if buffers else 0
    return HEADER.pack(MAGIC, len(skeleton), head + pad + len(buffers)) + skeleton + bytes(pad) + buffers


def framed(node: Any, buffers: bytes = b"") -> bytes:
    """Frame a node by hand."""
    return raw(msgpack.packb(node), buffers)


def stream(table: pa.Table, **options: Any) -> bytes:
    """Write an Arrow stream as any sender may."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def framed_table(table: pa.Table, **options: Any) -> bytes:
    """Frame an Arrow stream by hand."""
    body = stream(table, **options)
    return framed(["T", len(body)], body)


@given(_VALUES)
@settings(deadline=None)
def test_python_values_round_trip(value: Any) -> None:
    """Plain Python values come back equal and of the same types."""
    back = decode(encode(value))

    assert back == value
    assert repr(back) == repr(value)


@given(hnp.arrays(_DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)), st.booleans())
@settings(deadline=None)
def test_arrays_round_trip(array: Any, zero_copy: bool) -> None:
    """Arrays come back with dtype, shape and every bit."""
    back = decode(encode([array, array.T]), zero_copy=zero_copy)

    for got, sent in zip(back, [array, array.T], strict=True):
        assert got.dtype == sent.dtype
        assert got.shape == sent.shape
        assert got.tobytes() == sent.tobytes()


@pytest.mark.parametrize(
    "value",
    [
        pa.table({"a": [1, None], "s": ["x", None], "l": [[1], None], "d": pa.array(["u", "v"]).dictionary_encode()}),
        pa.table({"a": pa.array([], pa.int64())}),
        pa.record_batch({"a": [1, 2]}),
        pa.record_batch({"a": pa.array([], pa.string())}),
        pa.array([1.5, None]),
        pa.array([], pa.date32()),
        pa.chunked_array([[1], [2, 3]]),
        pa.scalar(Decimal("1.25")),
        pa.scalar(None, pa.timestamp("us", tz="Europe/Rome")),
        pa.array([{"x": 1, "y": "t"}]),
        pa.array([True, False, None]).slice(1),
        pa.nulls(3),
    ],
    ids=lambda value: str(type(value).__name__),
)
@pytest.mark.parametrize("zero_copy", [True, False])
def test_arrow_round_trips(value: Any, zero_copy: bool) -> None:
    """Arrow data comes back equal."""
    back = decode(encode(value), zero_copy=zero_copy)

    assert type(back) is type(value)
    assert back.equals(value)


def test_numpy_scalars_keep_their_dtype() -> None:
    """A NumPy scalar comes back as one of the same dtype."""
    sent = [np.float32(0.1), np.int8(-3), np.bool_(True), np.datetime64("2020-01-01", "D"), np.complex64(1j)]

    back = decode(encode(sent))

    assert back == sent
    assert [type(item) for item in back] == [type(item) for item in sent]


def test_subclasses_become_their_base() -> None:
    """Named tuples and counters arrive as tuples and dicts."""
    point: Any = namedtuple("point", "x y")

    assert decode(encode([point(1, 2), Counter("aab")])) == [(1, 2), {"a": 2, "b": 1}]


def test_zero_copy_shares_memory() -> None:
    """Zero-copy arrays and tables lie in the caller's buffer, aligned to 64 bytes; by default they do not."""
    array: Any = np.arange(1000.0)
    room = np.zeros(20_000, np.uint8)
    out = room[-room.ctypes.data % 64 :]
    size = encode_into({"a": array, "t": pa.table({"c": array})}, out.data)

    shared, own = (decode(out[:size].data, zero_copy=zero_copy) for zero_copy in (True, False))

    assert np.shares_memory(shared["a"], room)
    assert shared["a"].ctypes.data % 64 == 0
    assert np.shares_memory(shared["t"]["c"].chunk(0).to_numpy(), room)
    assert not np.shares_memory(own["a"], room)
    assert own["a"].flags.writeable


def test_metadata_is_dropped() -> None:
    """What pandas or the user wrote into a schema does not travel."""
    inner = pa.struct([pa.field("x", pa.int64(), metadata={"k": "SECRET"})])
    schema = pa.schema([pa.field("a", inner, metadata={"k": "SECRET"})], metadata={"pandas": "SECRET"})

    assert b"SECRET" not in encode(pa.table({"a": pa.array([{"x": 1}], inner)}, schema=schema))


class Model:
    """Something that is not data."""


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"model": [0, 1, Model()]}, ["result['model'][2]", "Model"]),
        ([np.array([Model()])], ["result[0]", "object"]),
        (np.zeros(2, [("a", "i4")]), ["result", "dtype"]),
        (np.ma.masked_array([1, 2], [True, False]), ["MaskedArray"]),
        ({(1, 2): 3}, ["tuple", "result"]),
        ({2**70: 3}, ["key"]),
        (lambda: 1, ["function"]),
        ({1, 2}, ["set"]),
        (Decimal("1e99999"), ["Decimal"]),
        ("\ud800", ["Unicode"]),
        (pa.array([b"x" * 16], pa.uuid()), ["UuidType"]),
        ([[pa.table({"m": pa.array([b"x" * 16], pa.uuid())})]], ["result[0][0]", "'m'"]),
        (pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]), ["union"]),
    ],
)
def test_not_data(value: Any, names: list[str]) -> None:
    """What is not data is refused on sending, with its place and type."""
    with pytest.raises(ValueRefusedError) as caught:
        encode(value)

    assert all(name in caught.value.message for name in names)


def test_cycle() -> None:
    """A list that holds itself is refused."""
    value: list[Any] = []
    value.append(value)

    with pytest.raises(ValueRefusedError, match="nested"):
        encode(value)


def test_too_large() -> None:
    """A value that does not fit says its size and the limit, and writes nothing."""
    out = bytearray(100)

    with pytest.raises(ResultTooLargeError) as caught:
        encode_into(np.zeros(100), memoryview(out))

    assert caught.value.limit_bytes == 100
    assert caught.value.size_bytes == len(encode(np.zeros(100)))
    assert not any(out)
    with pytest.raises(ResultTooLargeError):
        encode(np.zeros(100), limit_bytes=100)


def test_skeleton_limit() -> None:
    """A huge list of numbers is refused with the advice to use an array."""
    with pytest.raises(ValueRefusedError, match="NumPy"):
        encode(["x" * (1 << 24)])


class Bomb:
    """Runs code when it is unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Bomb, "ran", True))


def test_a_pickle_does_not_run() -> None:
    """A pickle is refused, whole or as an object array's buffer, and not run; unpickled, it runs."""
    bomb = pickle.dumps(Bomb())

    for hostile in (bomb, framed(["n", "|O", [len(bomb) // 8], False], bomb), framed(["n", "O8", [1], False], bomb)):
        with pytest.raises(ValueRefusedError):
            decode(hostile)
    assert not Bomb.ran
    pickle.loads(bomb)
    assert Bomb.ran


def _extension(nested: bool) -> pa.Table:
    ids = pa.array([b"x" * 16], pa.uuid())
    return pa.table({"a": pa.StructArray.from_arrays([ids], ["i"]) if nested else ids})


def _dictionary_bomb() -> pa.Table:
    codes: Any = pa.array(np.zeros(100_000, np.int8))
    return pa.table({"a": pa.DictionaryArray.from_arrays(codes, pa.array(["x" * 100_000]))})


def _deltas() -> bytes:
    kind = pa.dictionary(pa.int8(), pa.string())
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pa.ipc.new_stream(sink, pa.schema([("a", kind)]), options=options) as writer:
        for values in (["x"], ["x", "y"]):
            column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), pa.array(values))
            writer.write_table(pa.table({"a": column}))
    return sink.getvalue().to_pybytes()


def _bad_offsets() -> pa.Table:
    offsets = pa.py_buffer(np.array([0, 1 << 30, 3], np.int32).tobytes())
    return pa.table({"a": pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abc"))})


_TABLE = pa.table({"a": [1, 2, 3]})


@pytest.mark.parametrize(
    "hostile",
    [
        framed_table(_extension(nested=False)),
        framed_table(_extension(nested=True)),
        framed_table(_dictionary_bomb()),
        framed(["T", len(_deltas())], _deltas()),
        framed_table(_bad_offsets()),
        framed_table(_TABLE, compression="zstd"),
        framed_table(_TABLE, compression="lz4"),
        framed_table(_TABLE.replace_schema_metadata({"pandas": "{}"})),
        framed_table(pa.table({"a": [1]}, schema=pa.schema([pa.field("a", pa.int64(), metadata={"k": "v"})]))),
        framed_table(pa.table({"a": pa.array([1], pa.timestamp("s", tz="../../etc/passwd"))})),
        framed_table(pa.table({"a": pa.nulls(2_000_000_000)})),
        framed_table(pa.table({"a": pa.array([[None] * 5], pa.list_(pa.null()))})),
        framed(["T", len(stream(_TABLE)) + 8], stream(_TABLE) + bytes(8)),
        framed(["T", len(stream(_TABLE)) - 8], stream(_TABLE)[:-8]),
        framed(["T", len(stream(_TABLE) * 2)], stream(_TABLE) * 2),
        framed(["A", len(stream(pa.table({"a": [1], "b": [1]})))], stream(pa.table({"a": [1], "b": [1]}))),
    ],
    ids=[
        "extension", "nested extension", "dictionary bomb", "deltas", "offsets", "zstd", "lz4", "metadata",
        "field metadata", "time zone", "rows", "nested null", "trailing", "no end", "two streams", "two columns",
    ],
)  # fmt: skip
def test_hostile_arrow(hostile: bytes) -> None:
    """Arrow that is more than a plain table is refused; the plain table it was made from is not."""
    with pytest.raises(ValueRefusedError):
        decode(hostile, max_rows=1_000_000, max_bytes=100_000_000)
    assert decode(framed_table(_TABLE)).equals(_TABLE)


@pytest.mark.parametrize(
    "hostile",
    [
        framed([]),
        framed(["x", 1]),
        framed(["l", {"a": 1}]),
        framed(["d", "a"]),
        framed(["d", "a", 1, "a", 2]),
        framed(["d", ["l"], 1]),
        framed(["n", "<f8", [1 << 62], False]),
        framed(["n", "<f8", [1 << 31, 1 << 31, 1 << 31], False]),
        framed(["n", "<f8", [2], False], bytes(8)),
        framed(["n", "<f8", [1], False], bytes(16)),
        framed(["n", "<f8", [-1], False]),
        framed(["n", "<f8", [0, 1 << 60], False]),
        framed(["n", "<f8", [1] * 33, False], bytes(8)),
        framed(["n", "<f8", [True], False], bytes(8)),
        framed(["n", "<f8,<f8", [1], False], bytes(16)),
        framed(["n", "|V8", [1], False], bytes(8)),
        framed(["n", "<U1", [1], False], struct.pack("<I", 0x110000)),
        framed(["n", "|b1", [1], False], b"\x02"),
        framed(["s", "<f8", b"1234"]),
        framed(["s", "|O", bytes(8)]),
        framed(["D", "1e999999999"]),
        framed(["D", "not a number"]),
        framed(["td", 1 << 60, 0, 0]),
        framed(["dt", "yesterday"]),
        framed(["c", 1, 2]),
        framed(["T", -1]),
        framed(["T", 1 << 40]),
        framed(msgpack.ExtType(5, b"x")),
        framed(msgpack.Timestamp(0)),
        raw(b""),
        raw(msgpack.packb(1) + b"\x01"),
        raw(b"\xdd\xff\xff\xff\xff"),
        raw(b"\x91" * 900 + b"\x01"),
        raw(b"\x91" * 100_000 + b"\x01"),
        raw(b"\xdb\xff\xff\xff\xff"),
        raw(b"\xa1\xff"),
        framed(1) + b"\x00",
        framed(1)[:-1],
        b"",
        b"RGV1",
    ],
)
def test_hostile_skeleton(hostile: bytes) -> None:
    """Malformed, lying, nested or oversized skeletons are refused."""
    with pytest.raises(ValueRefusedError):
        decode(hostile)


def test_depth() -> None:
    """The caller's depth is the limit, exactly."""
    assert decode(encode([[1]]), max_depth=2) == [[1]]
    with pytest.raises(ValueRefusedError, match="nested"):
        decode(encode([[1]]), max_depth=1)


def test_lying_lists_allocate_nothing() -> None:
    """Nested lists that all claim to be as long as the message are refused before they are built."""
    length = 8_000_000
    claims = (b"\xdd" + struct.pack(">I", length)) * 900

    with pytest.raises(ValueRefusedError):
        decode(raw(claims + bytes(length)))


def test_padding_carries_nothing() -> None:
    """Bytes between buffers must be zero."""
    good = encode([np.arange(3), np.arange(3)])
    assert decode(good)[1].tolist() == [0, 1, 2]
    good[-25] = 1

    with pytest.raises(ValueRefusedError):
        decode(good)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes(data: bytes) -> None:
    """Any bytes are a value or a refusal."""
    for hostile in (data, raw(data)):
        try:
            decode(hostile)
        except ValueRefusedError:
            pass


_SAMPLE = bytes(
    encode(
        {
            "a": np.arange(4.0),
            "u": np.array(["x", "yz"]),
            "t": pa.table({"s": ["p", None], "d": pa.array(["u", "v"]).dictionary_encode(), "l": [[1], []]}),
            "n": [1, 2**80, Decimal("1.5"), dt.date(2020, 1, 1), (None, True, 1j)],
        }
    )
)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    """A valid encoding with some bytes changed is a value or a refusal, and a value can be used."""
    hostile = bytearray(_SAMPLE)
    for position, byte in changes:
        hostile[position] = byte
    try:
        value = decode(hostile)
    except ValueRefusedError:
        return
    repr(value)


def test_every_truncation() -> None:
    """No prefix of an encoding is accepted."""
    for length in range(len(_SAMPLE)):
        with pytest.raises(ValueRefusedError):
            decode(_SAMPLE[:length])


def test_errors_quote_no_values() -> None:
    """A refusal does not repeat what Arrow's parser quotes."""
    column = pa.StringArray.from_buffers(1, pa.py_buffer(struct.pack("<ii", 0, 7)), pa.py_buffer(b"SECRET\xff"))

    with pytest.raises(ValueRefusedError) as caught:
        read_ipc(stream(pa.table({"a": column})), trusted=False)

    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None
