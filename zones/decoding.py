"""Bytes back to values. The input is hostile; :mod:`zones.values` describes the format and writes it.

Lengths are checked against the bytes that are there before anything
is allocated, dtypes and Arrow types come from a list, depth and rows are capped, every byte is accounted for, and
whatever goes wrong is a ``ValueRefusedError``.
"""

from __future__ import annotations

import datetime as dt
import functools
import math
import re
import struct
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa

from zones.errors import ValueRefusedError
from zones.ipc import MAX_BYTES, MAX_ROWS, Buffer, read_ipc

#: Nesting of containers.
MAX_DEPTH = 32
MAGIC = b"RGV1"
HEADER = struct.Struct("<4sIQ")
ALIGN = 64
DTYPE = re.compile(
    r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]|[<>]c(8|16)|\|S[1-9]\d{0,6}|[<>]U[1-9]\d{0,6}"
    r"|[<>][mM]8(\[[1-9]?\d{0,5}(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
)
#: Bytes of a skeleton. Parsing msgpack may take 70 times its size in memory; large data belongs in arrays.
MAX_SKELETON_BYTES = 1 << 24
_SHORT_SKELETON_BYTES = 2048
MAX_DIMENSIONS = 32
#: Exponents of decimals: beyond them one short string turns into gigabytes of digits.
MAX_EXPONENT = 6144


def aligned(position: int) -> int:
    """Return the next multiple of 64, where a buffer starts."""
    return -(-position // ALIGN) * ALIGN


def decode(
    data: Buffer,
    *,
    max_depth: int = MAX_DEPTH,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    zero_copy: bool = False,
) -> Any:
    """Decode what :func:`encode` wrote. *data* may be hostile.

    Args:
        data: The whole encoding and nothing after it.
        max_depth: Deepest nesting of containers.
        max_rows: Largest number of rows of a table, and largest extent of an array.
        max_bytes: Largest *data*, and largest size of a table whose dictionaries are decoded.
        zero_copy: ``False`` copies *data* once, first. ``True`` returns arrays and tables that share its memory and
            its writability: only for memory that nobody else can write, or checks could be undone after they passed.

    Raises:
        ValueRefusedError: *data* is not a valid encoding or is above a limit.
    """
    try:
        view = memoryview(data).cast("B")
        if len(view) > max_bytes:
            raise ValueRefusedError(f"an encoded value of {len(view)} bytes is above the limit of {max_bytes}")
        # The copy lies where malloc() puts it, aligned to 16 bytes as NumPy's own arrays are.
        reader = _Reader(view if zero_copy else memoryview(bytearray(view)), max_depth, max_rows, max_bytes)
        return reader.read()
    except ValueRefusedError:
        raise
    except Exception:  # noqa: BLE001 - whatever hostile bytes do to a parser is one refusal
        # The parser's text may quote values, so it is dropped.
        raise _refused("it is malformed") from None


def _refused(why: str) -> ValueRefusedError:
    return ValueRefusedError(f"an encoded value was refused because {why}; run the call again")


class _Reader:
    """Rebuilds a value, spending the bytes of *view* one after the other."""

    def __init__(self, view: memoryview, max_depth: int, max_rows: int, max_bytes: int) -> None:
        self.view = view
        self.at = 0
        self.max_depth = max_depth
        self.max_rows = max_rows
        self.max_bytes = max_bytes

    def read(self) -> Any:
        magic, skeleton, total = HEADER.unpack_from(self.view)
        if magic != MAGIC or total != len(self.view) or skeleton > min(MAX_SKELETON_BYTES, total - HEADER.size):
            raise _refused("its header does not fit its length")
        self.at = HEADER.size + skeleton
        value = self.node(_unpack(bytes(self.view[HEADER.size : self.at])), 0)
        if self.at != total:
            raise _refused("bytes follow its end")
        return value

    def take(self, length: Any) -> memoryview:
        start = aligned(self.at)
        if type(length) is not int or not 0 <= length <= len(self.view) - start or any(self.view[self.at : start]):
            raise _refused("a length does not fit the bytes that are there")
        self.at = start + length
        return self.view[start : self.at]

    def node(self, node: Any, depth: int) -> Any:
        if depth > self.max_depth:
            raise _refused(f"it is nested more than {self.max_depth} deep")
        if type(node) in _PLAIN:
            return node
        if type(node) is not list:
            raise _refused("its skeleton holds an unknown type")
        tag, *rest = node
        if tag in ("l", "t"):
            items = [self.node(item, depth + 1) for item in rest]
            return items if tag == "l" else tuple(items)
        if tag == "d":
            return self._dict(rest, depth)
        if tag == "n":
            return self._array(*rest)
        if tag in _ARROW:
            return self._arrow(tag, *rest)
        return _SCALARS[tag](*rest)

    def _dict(self, rest: list[Any], depth: int) -> dict[Any, Any]:
        keys, items = rest[::2], rest[1::2]
        if len(keys) != len(items) or any(type(key) not in _PLAIN for key in keys):
            raise _refused("a dict is malformed")
        value = {key: self.node(item, depth + 1) for key, item in zip(keys, items, strict=True)}
        if len(value) != len(keys):
            raise _refused("a dict has a key twice")
        return value

    def _array(self, name: Any, shape: Any, by_column: Any) -> Any:
        dtype = _dtype(name)
        if type(by_column) is not bool or type(shape) is not list or len(shape) > MAX_DIMENSIONS:
            raise _refused("an array is malformed")
        if any(type(extent) is not int or not 0 <= extent <= self.max_rows for extent in shape):
            raise _refused("an array is larger than allowed")
        memory = self.take(math.prod(shape) * dtype.itemsize)
        stored = shape[::-1] if by_column else shape
        array: Any = np.ndarray(stored, dtype, memory) if len(memory) else np.empty(stored, dtype)
        _check_cells(array)
        return array.T if by_column else array

    def _arrow(self, tag: str, length: Any) -> Any:
        memory = pa.py_buffer(self.take(length))
        table = read_ipc(memory, trusted=False, max_rows=self.max_rows, max_bytes=self.max_bytes)
        if tag == "T":
            return table
        if tag == "B":
            return _one(table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)])
        column = _one(table.columns)
        if tag == "C":
            return column
        array = _one(column.chunks or [pa.array([], column.type)])
        return array if tag == "A" else _one(list(array))


def _unpack(skeleton: bytes) -> Any:
    if len(skeleton) > _SHORT_SKELETON_BYTES:
        # A first pass that builds nothing: afterwards every length in the skeleton is known to be true, and
        # unpacking allocates no list that its bytes do not fill. What a short one can claim is little: nested lists
        # of its own length each, 11 MB.
        scan = msgpack.Unpacker(max_buffer_size=len(skeleton))
        scan.feed(skeleton)
        scan.skip()
        if scan.tell() != len(skeleton):
            raise _refused("its skeleton is malformed")
    return msgpack.unpackb(skeleton, raw=False, strict_map_key=True, ext_hook=_no_extension)


def _no_extension(code: int, data: bytes) -> Any:
    raise _refused("its skeleton holds an extension")


def _dtype(name: Any) -> np.dtype[Any]:
    dtype = _plain_dtype(name) if type(name) is str else None
    if dtype is None:
        raise _refused("it holds an array of a dtype that is not plain data")
    return dtype


@functools.lru_cache(maxsize=64)
def _plain_dtype(name: str) -> np.dtype[Any] | None:
    # fullmatch first: NumPy evaluates some texts as Python literals.
    return None if DTYPE.fullmatch(name) is None else np.dtype(name)


def _check_cells(array: Any) -> None:
    """Refuse cells that no computation writes and that crash or mislead later readers."""
    if array.dtype.kind == "b" and array.size and int(array.view(np.uint8).max()) > 1:
        raise _refused("a boolean is neither true nor false")
    if array.dtype.kind == "U" and array.size:
        points = array.reshape(-1).view(array.dtype.str[0] + "u4")
        if int(points.max()) > 0x10FFFF:
            raise _refused("text is not Unicode")


def _numpy_scalar(name: Any, data: Any) -> Any:
    dtype = _dtype(name)
    if type(data) is not bytes or len(data) != dtype.itemsize:
        raise _refused("a number has the wrong length")
    array: Any = np.frombuffer(data, dtype)
    _check_cells(array)
    return array[0]


def _typed(kind: type, build: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
    def read(*parts: Any) -> Any:
        if len(parts) != count or any(type(part) is not kind for part in parts):
            raise _refused("a scalar is malformed")
        return build(*parts)

    return read


def _decimal(text: str) -> Decimal:
    value = Decimal(text)
    if value.is_finite() and abs(value.adjusted()) > MAX_EXPONENT:
        raise _refused("a decimal has too large an exponent")
    return value


def _one(items: Any) -> Any:
    if len(items) != 1:
        raise _refused("a column is malformed")
    return items[0]


_PLAIN = frozenset({type(None), bool, int, float, str, bytes})
_ARROW = ("T", "B", "C", "A", "S")
_SCALARS: dict[str, Callable[..., Any]] = {
    "s": _numpy_scalar,
    "i": _typed(bytes, lambda data: int.from_bytes(data, "little", signed=True)),
    "c": _typed(float, complex, 2),
    "D": _typed(str, _decimal),
    "td": _typed(int, dt.timedelta, 3),
    "dt": _typed(str, dt.datetime.fromisoformat),
    "da": _typed(str, dt.date.fromisoformat),
    "ti": _typed(str, dt.time.fromisoformat),
}
