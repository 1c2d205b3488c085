"""The bytes that a sandbox answers with: an outcome, then an encoded value. Pure.

::

    u32 length, big endian | msgpack map | zeros up to a multiple of 64 | value (``zones.values``)
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack

from zones.errors import ValueRefusedError
from zones.packing import pack

#: A traceback or print longer than this is cut, with a line that says so. Bytes.
MAX_TEXT_BYTES = 64 << 10
#: An exception group with more exceptions than this, itself and those in inner groups counted, comes back as text.
MAX_MEMBERS = 64
_META = struct.Struct("!I")


def write_outcome(
    view: memoryview, outcome: dict[str, Any], value: Any, encode_into: Callable[[Any, memoryview], int]
) -> int:
    """Write ``u32 length | msgpack outcome | padding to 64 | encoded value`` and return its length in bytes.

    *encode_into* is ``zones.values.encode_into``: the sandbox imports this module before it hardens itself, and that
    one afterwards.
    """
    meta = pack(outcome)
    start = value_offset(len(meta))
    view[: _META.size] = _META.pack(len(meta))
    view[_META.size : _META.size + len(meta)] = meta
    return start + encode_into(value, view[start:])


def value_offset(meta_bytes: int) -> int:
    """Return where the encoded value starts: the next multiple of 64 after the outcome map."""
    return -(-(_META.size + meta_bytes) // 64) * 64


def read_outcome(payload: memoryview) -> tuple[dict[str, Any], memoryview]:
    """Split what :func:`write_outcome` wrote. Input is untrusted; the value is not decoded here.

    Raises:
        ValueRefusedError: It is no outcome.
    """
    try:
        (length,) = _META.unpack_from(payload)
        outcome = msgpack.unpackb(payload[_META.size : _META.size + length], raw=False)
        if not isinstance(outcome, dict):
            raise TypeError("not a map")
    except (struct.error, ValueError, TypeError, msgpack.UnpackException, RecursionError):
        raise ValueRefusedError("the sandbox answered with something that is no result; run the call again") from None
    return outcome, payload[value_offset(length) :]
