"""Python values to bytes and back. Nothing that could execute comes out: no pickle, no objects, no type names.

An encoded value is::

    b"RGV1" | u32 skeleton length | u64 total length | skeleton | padding | buffer | padding | buffer | ...

Integers are little endian. The skeleton is msgpack: ``None``, booleans, 64-bit integers, floats, strings and
bytes stand for themselves, and everything else is an array ``[tag, ...]``. Buffers (array memory, Arrow IPC
streams) follow in the order in which the skeleton names them, each at the next multiple of 64 bytes. Only their
lengths are written, so that they can neither overlap nor leave gaps; padding is zero.

``decode`` is :func:`zones.decoding.decode`, which says what it checks.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from zones.decoding import DTYPE, HEADER, MAGIC, MAX_DEPTH, MAX_EXPONENT, MAX_SKELETON_BYTES, aligned
from zones.decoding import decode as decode
from zones.errors import ResultTooLargeError, ValueRefusedError
from zones.ipc import ipc_size, plain_table, write_ipc_into
from zones.packing import pack

_AS_THEY_ARE = frozenset({type(None), bool, float, str, bytes})
_KEYS = (str, bytes, bool, int, float, type(None))


@dataclass(slots=True, kw_only=True)
class Encoded:
    """A value that is ready to be written. Keeps the value's memory alive; nothing large was copied yet."""

    #: Exact length of the encoding in bytes.
    size_bytes: int
    _skeleton: bytes
    _buffers: tuple[tuple[int, Callable[[memoryview], object]], ...]

    def write_into(self, out: memoryview) -> int:
        """Write into *out*, whose start should be a multiple of 64; each buffer is copied once.

        Returns:
            Bytes written, ``size_bytes``.

        Raises:
            ResultTooLargeError: *out* is too short. Nothing was written.
        """
        _check_size(self.size_bytes, len(out))
        HEADER.pack_into(out, 0, MAGIC, len(self._skeleton), self.size_bytes)
        at = HEADER.size + len(self._skeleton)
        out[HEADER.size : at] = self._skeleton
        for length, write in self._buffers:
            start = aligned(at)
            out[at:start] = bytes(start - at)
            at = start + length
            if length:
                write(out[start:at])
        return at


def prepare(value: Any, *, what: str = "result") -> Encoded:
    """Check *value* and lay out its encoding.

    Subclasses of the built-in containers, strings and numbers arrive as their base class; Arrow metadata is dropped;
    a date and time with a zone arrives with the zone's offset, and without ``fold``. ``CuPy`` arrays are
    the caller's to convert.

    Args:
        value: Any value.
        what: What messages call it.

    Raises:
        ValueRefusedError: A part is not plain data. The message names its type and place, as in
            ``result['model'][2]``.
    """
    writer = _Writer()
    try:
        skeleton = pack(writer.node(value, what, 0))
    except (UnicodeEncodeError, OverflowError, ValueError):
        raise ValueRefusedError(f"{what} holds text that is not valid Unicode, or is too long; encode it") from None
    if len(skeleton) > MAX_SKELETON_BYTES:
        raise ValueRefusedError(
            f"{what} takes {len(skeleton)} bytes outside of arrays, above {MAX_SKELETON_BYTES}; return NumPy arrays"
        )
    size = HEADER.size + len(skeleton)
    for length, _ in writer.buffers:
        size = aligned(size) + length
    return Encoded(size_bytes=size, _skeleton=skeleton, _buffers=tuple(writer.buffers))


def encode_into(value: Any, out: memoryview) -> int:
    """Encode *value* into *out*. See :func:`prepare` and :meth:`Encoded.write_into` for errors and copies.

    Returns:
        Bytes written.
    """
    return prepare(value).write_into(out)


def encode(value: Any, *, limit_bytes: int | None = None) -> bytearray:
    """Encode *value* into a new buffer. Raises as :func:`prepare`, and ``ResultTooLargeError`` above *limit_bytes*."""
    ready = prepare(value)
    if limit_bytes is not None:
        _check_size(ready.size_bytes, limit_bytes)
    out = bytearray(ready.size_bytes)
    ready.write_into(memoryview(out))
    return out


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise ResultTooLargeError(
            f"the encoded value has {size} bytes, above the limit of {limit}; return less, or use map_reduce",
            size_bytes=size,
            limit_bytes=limit,
        )


class _Writer:
    """Turns a value into skeleton nodes and collects the buffers in the order of their mention."""

    def __init__(self) -> None:
        self.buffers: list[tuple[int, Callable[[memoryview], object]]] = []

    def node(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueRefusedError(f"{path[:200]} is nested more than {MAX_DEPTH} deep; return a flatter value")
        if type(value) in _AS_THEY_ARE:
            return value
        if isinstance(value, (list, tuple)):
            tag = "t" if isinstance(value, tuple) else "l"
            return [tag, *[self.node(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]]
        if isinstance(value, dict):
            return ["d", *self._pairs(value, path, depth)]
        if isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, (str, bytes)):
            return self._numpy(value, path)
        if isinstance(value, (int, float, str, bytes, bytearray, complex, Decimal, dt.date, dt.time, dt.timedelta)):
            return _scalar(value, path)
        if isinstance(value, (pa.Table, pa.RecordBatch, pa.ChunkedArray, pa.Array, pa.Scalar)):
            return self._arrow(value, path)
        kind = type(value)
        raise ValueRefusedError(
            f"{path} is a {kind.__module__}.{kind.__qualname__}, which is not data: arrays, tables, numbers, text, and "
            "lists and dicts of them are; of a model keep its arrays, such as coef_"
        )

    def _pairs(self, value: dict[Any, Any], path: str, depth: int) -> Iterator[Any]:
        for key, item in value.items():
            key = key.item() if isinstance(key, np.generic) else key
            small = not isinstance(key, int) or -(1 << 63) <= key < 1 << 63
            if not isinstance(key, _KEYS) or not small:
                raise ValueRefusedError(f"{path} has a key of type {type(key).__name__}; use text or 64-bit integers")
            yield self.node(key, path, depth + 1)
            yield self.node(item, f"{path}[{repr(key)[:40]}]", depth + 1)

    def _numpy(self, value: Any, path: str) -> list[Any]:
        array = np.asarray(value)
        name = array.dtype.str
        if isinstance(value, np.ma.MaskedArray) or array.dtype.names or DTYPE.fullmatch(name) is None:
            raise ValueRefusedError(
                f"{path} is a NumPy {type(value).__name__} of dtype {str(array.dtype)[:40]}, which is not plain data; "
                "convert it with astype to numbers, dates or fixed-length text"
            )
        if isinstance(value, np.generic):
            return ["s", name, array.tobytes()]
        by_column = array.flags.f_contiguous and not array.flags.c_contiguous
        stored = array.T if by_column else array

        def write(out: memoryview) -> None:
            np.ndarray(stored.shape, stored.dtype, out)[...] = stored

        self.buffers.append((array.nbytes, write))
        return ["n", name, list(array.shape), by_column]

    def _arrow(self, value: Any, path: str) -> list[Any]:
        tag, table = _as_table(value)
        plain = plain_table(table, path)
        self.buffers.append((ipc_size(plain), lambda out: write_ipc_into(plain, out)))
        return [tag, self.buffers[-1][0]]


def _scalar(value: Any, path: str) -> Any:
    match value:
        case int():
            if -(1 << 63) <= value < 1 << 64:
                return int(value)
            return ["i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)]
        case float() | str() | bytes():
            return value
        case bytearray():
            return bytes(value)
        case complex():
            return ["c", value.real, value.imag]
        case Decimal():
            if value.is_finite() and abs(value.adjusted()) > MAX_EXPONENT:
                raise ValueRefusedError(f"{path} is a Decimal with an exponent above {MAX_EXPONENT}; convert it")
            return ["D", str(value)]
        case dt.timedelta():
            return ["td", value.days, value.seconds, value.microseconds]
        case dt.datetime():
            return ["dt", dt.datetime.isoformat(value)]
        case dt.date():
            return ["da", dt.date.isoformat(value)]
    return ["ti", dt.time.isoformat(value)]


def _as_table(value: Any) -> tuple[str, pa.Table]:
    match value:
        case pa.Table():
            return "T", value
        case pa.RecordBatch():
            return "B", pa.Table.from_batches([value])
        case pa.ChunkedArray():
            return "C", pa.table([value], [""])
        case pa.Scalar():
            return "S", pa.table([_repeat(value)], [""])
    return "A", pa.table([value], [""])


def _repeat(value: Any) -> Any:
    return pa.repeat(value, 1)
