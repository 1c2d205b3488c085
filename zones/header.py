"""The clear part of a sealed message: its 64 bytes, its sizes and their limits.

The format and its reasons are docs/envelope.md; section numbers below are that
document's. Pure: no key and no cryptography but a hash of the lease id.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from dataclasses import dataclass
from typing import Final, Self, TypeAlias

from zones.errors import EnvelopeError
from zones.model import Direction, Kind, Padding, Slot, check_id

Buffer: TypeAlias = bytes | bytearray | memoryview

#: Length of a header, which is read before any length is known.
HEADER_BYTES: Final = 64
#: Smallest padded plaintext: a sealed message costs 136 bytes besides.
MIN_PADDED_BYTES: Final = 256
#: Largest padded plaintext: what a receiver holds before it knows who sent it.
MAX_PADDED_BYTES: Final = 256 << 20
#: Length of the payload's length, in front of the payload.
LENGTH_BYTES: Final = 8

_MAGIC: Final = b"RGE1"
_HEADER: Final = struct.Struct(">4sBBHQQIIQ16s8s")
_LENGTH: Final = struct.Struct(">Q")
_ZEROS: Final = bytes(8)
_LEASE_TAG_BYTES: Final = 16
#: Up to here the buckets are powers of two, above it steps of an eighth.
_COARSE_UP_TO_BYTES: Final = 64 << 10

# Cobblestone's own sizes (C2SP chunked-encryption).
_BODY_PREFIX_BYTES: Final = 24 + 32
_CHUNK_BYTES: Final = 16 << 10
_TAG_BYTES: Final = 16

# Zero stands for nothing, so that a zeroed header never parses.
DIRECTION_CODES: Final = {Direction.OUT: 1, Direction.BACK: 2}
KIND_CODES: Final = {
    Kind.HELLO: 1,
    Kind.FUNCTION: 2,
    Kind.ARGUMENTS: 3,
    Kind.CALL: 4,
    Kind.SHARD: 5,
    Kind.RESULT: 6,
    Kind.CONTROL: 7,
    Kind.RECALL: 8,
}
_DIRECTIONS: Final = {code: direction for direction, code in DIRECTION_CODES.items()}
_KINDS: Final = {code: kind for kind, code in KIND_CODES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The 64 bytes in clear before a body (2.1). A claim until the body has opened."""

    direction: Direction
    kind: Kind
    call: int
    shard: int
    attempt: int
    #: Length of the padded plaintext in bytes.
    padded_bytes: int
    #: SHA-256 of the lease id, first 16 bytes.
    lease_tag: bytes

    def encode(self) -> bytes:
        """Return the header's 64 bytes.

        Raises:
            ValueError: A value does not fit its field.
        """
        # struct would cut or fill a tag of another length in silence.
        if len(self.lease_tag) != _LEASE_TAG_BYTES:
            raise ValueError(f"a lease tag has {_LEASE_TAG_BYTES} bytes; build headers with header_for()")
        return _pack(self, self.padded_bytes, self.lease_tag)

    @classmethod
    def decode(cls, raw: Buffer) -> Self:
        """Parse exactly 64 bytes.

        Raises:
            EnvelopeError: *raw* is not a header that this version could have sent.
        """
        if len(raw) != HEADER_BYTES:
            raise EnvelopeError
        (
            magic,
            direction,
            kind,
            zero,
            call,
            shard,
            attempt,
            zero2,
            padded_bytes,
            tag,
            zeros,
        ) = _HEADER.unpack(raw)
        known = magic == _MAGIC and direction in _DIRECTIONS and kind in _KINDS
        if not known or zero or zero2 or zeros != _ZEROS or not is_bucket(padded_bytes):
            raise EnvelopeError
        return cls(
            direction=_DIRECTIONS[direction],
            kind=_KINDS[kind],
            call=call,
            shard=shard,
            attempt=attempt,
            padded_bytes=padded_bytes,
            lease_tag=tag,
        )

    def slot(self, *, lease: str, direction: Direction) -> Slot:
        """Return the slot that this header claims, on a connection of *lease* that carries *direction*.

        Raises:
            EnvelopeError: It claims another lease or direction.
        """
        if self.lease_tag != _lease_tag(lease) or self.direction is not direction:
            raise EnvelopeError
        return Slot(
            lease=lease,
            direction=direction,
            kind=self.kind,
            call=self.call,
            shard=self.shard,
            attempt=self.attempt,
        )


def encode_header(slot: Slot, padded_bytes: int) -> bytes:
    """Return ``header_for(slot, padded_bytes).encode()`` at a third of its cost: there are four for each small call.

    Raises:
        ValueError: As :func:`header_for` and :meth:`Header.encode`.
    """
    if not is_bucket(padded_bytes):
        raise ValueError(f"padded_bytes {padded_bytes} must be a result of padded_size()")
    return _pack(slot, padded_bytes, _lease_tag(slot.lease))


def _pack(place: Header | Slot, padded_bytes: int, lease_tag: bytes) -> bytes:
    try:
        return _HEADER.pack(
            _MAGIC,
            DIRECTION_CODES[place.direction],
            KIND_CODES[place.kind],
            0,
            place.call,
            place.shard,
            place.attempt,
            0,
            padded_bytes,
            lease_tag,
            _ZEROS,
        )
    except struct.error:
        raise ValueError("call and shard are below 2**64, attempt below 2**32, and none is negative") from None


def header_for(slot: Slot, padded_bytes: int) -> Header:
    """Return the header of a message for *slot*.

    Args:
        slot: Where the message is valid.
        padded_bytes: A value of :func:`padded_size`.

    Raises:
        ValueError: *padded_bytes* is no bucket, or the lease id is malformed.
    """
    if not is_bucket(padded_bytes):
        raise ValueError(f"padded_bytes {padded_bytes} must be a result of padded_size()")
    return Header(
        direction=slot.direction,
        kind=slot.kind,
        call=slot.call,
        shard=slot.shard,
        attempt=slot.attempt,
        padded_bytes=padded_bytes,
        lease_tag=_lease_tag(slot.lease),
    )


@functools.lru_cache(maxsize=256)
def padded_size(n: int, padding: Padding = Padding.FINE) -> int:
    """Return the padded plaintext's length for a payload of *n* bytes (3).

    Coarse buckets are fine ones too, so whoever opens a message need not know which its sender used.

    Raises:
        ValueError: *n* is negative, or more than ``MAX_PADDED_BYTES - LENGTH_BYTES``.
    """
    if not 0 <= n <= MAX_PADDED_BYTES - LENGTH_BYTES:
        limit = MAX_PADDED_BYTES - LENGTH_BYTES
        raise ValueError(f"a payload of {n} bytes does not fit one message of 0 to {limit} bytes; cut smaller shards")
    size = n + LENGTH_BYTES
    return _power_of_two(size) if padding is Padding.COARSE else _bucket(size)


def _power_of_two(size: int) -> int:
    # The bit length of size - 1 is the exponent of the next power of two.
    return max(MIN_PADDED_BYTES, 1 << (size - 1).bit_length())


def _bucket(size: int) -> int:
    if size <= _COARSE_UP_TO_BYTES:
        return _power_of_two(size)
    step = 1 << (size.bit_length() - 4)
    return -(-size // step) * step


@functools.lru_cache(maxsize=256)
def is_bucket(size: int) -> bool:
    """Say whether *size* is a length that :func:`padded_size` can return."""
    return MIN_PADDED_BYTES <= size <= MAX_PADDED_BYTES and _bucket(size) == size


def sealed_size(padded: int) -> int:
    """Return the body's length in bytes for a padded plaintext of *padded* bytes (2.3)."""
    return _BODY_PREFIX_BYTES + padded + _TAG_BYTES * (padded // _CHUNK_BYTES + 1)


def length_prefix(n: int) -> bytes:
    """Return the 8 bytes that stand before a payload of *n* bytes (2.2)."""
    return _LENGTH.pack(n)


def read_length(plaintext: Buffer) -> int:
    """Return the length that an opened plaintext of at least 8 bytes claims for its payload (2.2)."""
    return int(_LENGTH.unpack_from(plaintext)[0])


@functools.lru_cache(maxsize=256)
def _lease_tag(lease: str) -> bytes:
    return hashlib.sha256(check_id(lease, what="lease").encode("ascii")).digest()[:_LEASE_TAG_BYTES]
