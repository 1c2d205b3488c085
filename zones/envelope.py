"""Seals and opens the messages between a zone's gateway and a lease's keeper.

The byte format, its limits and its reasons are docs/envelope.md; section numbers below
are that document's. This module does no I/O and is the only one that touches
``cryptography.cobblestone``. Its rules:

1. The body's context is computed from the slot that the receiver expects and the
   grant that it holds, never from what the peer sent (2.3).
2. Nothing opened is released before the whole body was opened (2.3).
3. No AEAD reads from, or seals into, memory that another trust domain can write.
   That is the caller's duty for every buffer it passes in (6).
4. Whatever a peer can cause is one :class:`EnvelopeError` with one text (8).
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import hmac
import re
import struct
from types import TracebackType
from typing import Final, NoReturn, Self, final

from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import AlreadyFinalized, InvalidTag

from zones.errors import EnvelopeError
from zones.header import (
    DIRECTION_CODES,
    HEADER_BYTES,
    KIND_CODES,
    LENGTH_BYTES,
    MAX_PADDED_BYTES,
    MIN_PADDED_BYTES,
    Buffer,
    Header,
    encode_header,
    header_for,
    is_bucket,
    length_prefix,
    padded_size,
    read_length,
    sealed_size,
)
from zones.model import Slot
from zones.replay import MAX_TRACKED_SLOTS, ReplayGuard

__all__ = [
    "HEADER_BYTES",
    "LENGTH_BYTES",
    "MAX_PADDED_BYTES",
    "MAX_TRACKED_SLOTS",
    "MIN_PADDED_BYTES",
    "OPEN_SLACK_BYTES",
    "PIECE_BYTES",
    "SEAL_SLACK_BYTES",
    "Buffer",
    "Header",
    "LeaseKey",
    "Opener",
    "ReplayGuard",
    "Sealer",
    "header_for",
    "length_prefix",
    "open_",
    "padded_size",
    "seal",
    "sealed_size",
    "split_payload",
]

#: Largest piece in which a body is sealed, sent, received and opened.
PIECE_BYTES: Final = 1 << 20
#: Room beyond the input that :meth:`Sealer.update_into` may need for a piece of at most ``PIECE_BYTES``.
SEAL_SLACK_BYTES: Final = PIECE_BYTES // 1024 + 16456
#: Room beyond the input that :meth:`Opener.update_into` may need.
OPEN_SLACK_BYTES: Final = 16400

_KEY_BYTES: Final = 32
_KEY_LABEL: Final = b"ray-gpu envelope v1 key\x00"
_KEY_INFO: Final = struct.Struct(">BBQQIB")
_CONTEXT_LABEL: Final = b"ray-gpu envelope v1 context\x00"
_GRANT_DIGEST: Final = re.compile("[0-9a-f]{64}")
_ZEROS: Final = bytes(64 << 10)


@final
class LeaseKey:
    """The 32 bytes that one gateway and one keeper share for one lease.

    Wiping is best effort: copies that Python or a library made stay until the process ends.
    """

    __slots__ = ("_raw", "_wiped")

    def __init__(self, raw: Buffer) -> None:
        """Copy *raw*, which must be 32 uniformly random bytes (the output of a KDF).

        Raises:
            ValueError: *raw* has another length.
        """
        if memoryview(raw).nbytes != _KEY_BYTES:
            raise ValueError(f"a lease key has {_KEY_BYTES} bytes; derive it with zones.keys")
        self._raw = bytearray(raw)
        self._wiped = False

    @classmethod
    def from_bytes(cls, raw: Buffer) -> Self:
        """Return a key over a copy of *raw*; see :meth:`__init__`."""
        return cls(raw)

    def derive(self, info: Buffer) -> builtins.bytes:
        """Return 32 bytes, HKDF-Expand-SHA-256 of this key and *info* (RFC 5869, 2.3).

        Args:
            info: Starts with a label of its own use that ends in a zero byte (4).

        Raises:
            ValueError: The key was wiped.
        """
        # 32 bytes are the first block of HKDF-Expand, T(1) = HMAC(key, info | 0x01). One call of the standard
        # library costs a third of the general construction, and there are four for each small call.
        derived = hmac.digest(self._raw, builtins.bytes(info) + b"\x01", "sha256")
        self._check_live()
        return derived

    def wipe(self) -> None:
        """Overwrite the key with zeros and refuse every later use."""
        self._wiped = True
        self._raw[:] = builtins.bytes(_KEY_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return "LeaseKey(<redacted>)"

    # copy, deepcopy and pickle of every protocol come through here.
    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a lease key is never copied or pickled; pass the object, or send .bytes over a private pipe")

    def _check_live(self) -> None:
        # A wiped key is all zeros, and what is derived from it anybody knows. Asked after every use, because
        # another thread may wipe during it; wipe() sets the flag before it writes the first zero.
        if self._wiped:
            raise ValueError("this lease key was wiped because its lease ended; open another lease")

    @property
    def bytes(self) -> builtins.bytes:
        """A copy that cannot be wiped, for the one module that hands the key to its keeper.

        Raises:
            ValueError: The key was wiped.
        """
        raw = builtins.bytes(self._raw)
        self._check_live()
        return raw


def _shard_key(key: LeaseKey, slot: Slot) -> bytes:
    # The header was encoded before this, so every number fits.
    lease = slot.lease.encode("ascii")
    numbers = (slot.call, slot.shard, slot.attempt, len(lease))
    info = _KEY_INFO.pack(DIRECTION_CODES[slot.direction], KIND_CODES[slot.kind], *numbers)
    return key.derive(_KEY_LABEL + info + lease)


def _context(header: bytes, grant_digest: str) -> bytes:
    return _CONTEXT_LABEL + hashlib.sha512(header).digest() + _grant_bytes(grant_digest)


@functools.lru_cache(maxsize=64)
def _grant_bytes(grant_digest: str) -> bytes:
    if not _GRANT_DIGEST.fullmatch(grant_digest):
        raise ValueError("grant_digest must be 64 hexadecimal digits, as Grant.digest() returns")
    return bytes.fromhex(grant_digest)


class Sealer:
    """Seals one message, piece by piece. Use each object for one message and each slot once.

    Attributes:
        header: The 64 bytes to send before the body.
        body_bytes: Length of the whole body.
    """

    def __init__(self, key: LeaseKey, grant_digest: str, slot: Slot, padded_bytes: int) -> None:
        """Derive the shard key and draw a fresh salt.

        Args:
            key: The lease's key.
            grant_digest: 64 hexadecimal digits, ``Grant.digest()``.
            slot: Where the message is valid.
            padded_bytes: Length of the whole plaintext, a value of :func:`padded_size`.

        Raises:
            ValueError: An argument is malformed, or the key was wiped.
        """
        self.header = encode_header(slot, padded_bytes)
        self.body_bytes = sealed_size(padded_bytes)
        self._missing = padded_bytes
        self._body = Cobblestone256Encryptor(_shard_key(key, slot), _context(self.header, grant_digest))

    def update_into(self, plain: Buffer, out: bytearray | memoryview) -> int:
        """Seal the next bytes of ``length_prefix(n) + payload + zeros`` into *out*. Releases the global lock.

        Args:
            plain: Memory that no other trust domain can write.
            out: Private too, and not overlapping; at least ``len(plain) + SEAL_SLACK_BYTES`` long for pieces of
                at most ``PIECE_BYTES``, or the unwritten rest of a buffer of ``body_bytes``.

        Returns:
            Bytes written, whole chunks only; the rest follows with a later piece.

        Raises:
            ValueError: *out* is too short, or *plain* goes beyond ``padded_bytes``.
        """
        size = memoryview(plain).nbytes
        if size > self._missing:
            raise ValueError(f"{size} bytes go beyond padded_bytes; only {self._missing} are missing")
        written = self._body.update_into(plain, out)
        self._missing -= size
        return written

    def finalize(self) -> bytes:
        """Return the last bytes of the body, 16 to 16,399 of them.

        Raises:
            ValueError: Fewer than ``padded_bytes`` were given.
        """
        if self._missing:
            raise ValueError(f"{self._missing} bytes are missing up to padded_bytes; pad with zeros")
        return self._body.finalize()


class Opener:
    """Opens one message, piece by piece. Nothing it wrote may be used before :meth:`finalize` returned.

    After any :class:`EnvelopeError` the object is dead and every further call raises it again.

    Attributes:
        body_bytes: Length of the whole body.
    """

    def __init__(self, key: LeaseKey, grant_digest: str, slot: Slot, padded_bytes: int) -> None:
        """Prepare to open the body that follows a header for *slot*.

        Args:
            key: The lease's key.
            grant_digest: 64 hexadecimal digits, of the grant that the receiver itself holds.
            slot: The slot that the receiver expects.
            padded_bytes: As the header claims.

        Raises:
            EnvelopeError: *padded_bytes* is no bucket.
            ValueError: Another argument is malformed, or the key was wiped.
        """
        if not is_bucket(padded_bytes):
            raise EnvelopeError
        header = encode_header(slot, padded_bytes)
        self.body_bytes = sealed_size(padded_bytes)
        self._missing = self.body_bytes
        self._body = Cobblestone256Decryptor(_shard_key(key, slot), _context(header, grant_digest))

    def update_into(self, sealed: Buffer, out: bytearray | memoryview) -> int:
        """Open the next bytes of the body into *out*. Releases the global lock.

        Args:
            sealed: Memory that no other trust domain can write.
            out: Private too, and not overlapping; at least ``len(sealed) + OPEN_SLACK_BYTES`` long, or the
                unwritten rest of a buffer of ``padded_bytes``.

        Returns:
            Bytes written, whole chunks only.

        Raises:
            EnvelopeError: The message does not open. *out* may hold unauthenticated bytes.
            ValueError: *out* is too short; nothing was read or written.
        """
        size = memoryview(sealed).nbytes
        if size > self._missing:
            # Kept negative: finalize() must not succeed after this.
            self._missing = -1
            raise EnvelopeError
        try:
            written = self._body.update_into(sealed, out)
        except (InvalidTag, AlreadyFinalized):
            self._missing = -1
            raise EnvelopeError from None
        self._missing -= size
        return written

    def finalize(self) -> bytes:
        """Return the last bytes of the plaintext, 0 to 16,383; everything opened may be used from here on.

        Raises:
            EnvelopeError: The message does not open, or is not complete.
        """
        if self._missing:
            self._missing = -1
            raise EnvelopeError
        try:
            return self._body.finalize()
        except (InvalidTag, AlreadyFinalized):
            raise EnvelopeError from None

    def finalize_into(self, out: bytearray | memoryview) -> int:
        """Write what :meth:`finalize` returns to the start of *out* and return its length.

        Raises:
            EnvelopeError: As :meth:`finalize`.
            ValueError: *out* is too short.
        """
        tail = self.finalize()
        memoryview(out)[: len(tail)] = tail
        return len(tail)


def seal(payload: Buffer, *, key: LeaseKey, grant_digest: str, slot: Slot) -> bytes:
    """Return a whole message, header and body. For payloads of up to a few pieces: it copies.

    Raises:
        ValueError: *payload* is too large, an argument is malformed, or the key was wiped.
    """
    view = memoryview(payload).cast("B")
    plaintext = bytearray(padded_size(view.nbytes))
    plaintext[:LENGTH_BYTES] = length_prefix(view.nbytes)
    plaintext[LENGTH_BYTES : LENGTH_BYTES + view.nbytes] = view
    sealer = Sealer(key, grant_digest, slot, len(plaintext))
    body = memoryview(bytearray(sealer.body_bytes))
    written = sealer.update_into(plaintext, body)
    return b"".join((sealer.header, body[:written], sealer.finalize()))


def open_(message: Buffer, *, key: LeaseKey, grant_digest: str, slot: Slot) -> memoryview:
    """Return the payload of a whole message, a view of private memory.

    Raises:
        EnvelopeError: It does not open for exactly this key, grant and slot.
        ValueError: An argument is malformed, or the key was wiped.
    """
    view = memoryview(message).cast("B")
    header = Header.decode(view[:HEADER_BYTES])
    body = view[HEADER_BYTES:]
    # The length is checked first, so that a claim alone allocates nothing.
    if header != header_for(slot, header.padded_bytes) or body.nbytes != sealed_size(header.padded_bytes):
        raise EnvelopeError
    opener = Opener(key, grant_digest, slot, header.padded_bytes)
    plaintext = memoryview(bytearray(header.padded_bytes))
    written = opener.update_into(body, plaintext)
    opener.finalize_into(plaintext[written:])
    return split_payload(plaintext)


def split_payload(plaintext: memoryview) -> memoryview:
    """Return the payload of a whole opened plaintext, as a view of the same memory (2.2).

    Raises:
        EnvelopeError: The length goes beyond the plaintext, or the padding is not zero.
    """
    if plaintext.nbytes < LENGTH_BYTES:
        raise EnvelopeError
    end = LENGTH_BYTES + read_length(plaintext)
    if end > plaintext.nbytes:
        raise EnvelopeError
    for start in range(end, plaintext.nbytes, len(_ZEROS)):
        # bytes against bytes compares whole blocks; a memoryview would compare byte by byte.
        block = bytes(plaintext[start : start + len(_ZEROS)])
        if block != _ZEROS[: len(block)]:
            raise EnvelopeError
    return plaintext[LENGTH_BYTES:end]
