"""A value sealed for a zone's own disk: a header in clear, which is authenticated, and AES-256-GCM. Pure.

::

    "RGS1" | u32 length of the header, big endian | header, JSON | nonce, 12 bytes | ciphertext and tag

Each file has a key of its own, so a nonce is used once whatever it is.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from zones.errors import EnvelopeError

_MAGIC = b"RGS1"
_LENGTH = struct.Struct(">I")
_NONCE_BYTES = 12
_MAX_HEADER_BYTES = 1 << 16


def seal(header: Mapping[str, Any], plain: memoryview, key: bytes) -> tuple[bytes, bytes]:
    """Return what stands before the ciphertext, and that."""
    said = json.dumps(dict(header), sort_keys=True).encode()
    nonce = secrets.token_bytes(_NONCE_BYTES)
    before = b"".join((_MAGIC, _LENGTH.pack(len(said)), said, nonce))
    return before, AESGCM(key).encrypt(nonce, plain, before)


def header_of(sealed: memoryview) -> dict[str, Any]:
    """Return a file's header, unchecked.

    Raises:
        EnvelopeError: It is no such file.
    """
    return _split(sealed)[0]


def unseal(sealed: memoryview, key: bytes) -> bytes:
    """Return what was sealed.

    Raises:
        EnvelopeError: It does not open with this key, or header or ciphertext were changed.
    """
    _, start = _split(sealed)
    before = sealed[: start + _NONCE_BYTES]
    try:
        return AESGCM(key).decrypt(before[start:], sealed[len(before) :], before)
    except (InvalidTag, ValueError):
        raise EnvelopeError from None


def _split(sealed: memoryview) -> tuple[dict[str, Any], int]:
    """Return the header, and where the nonce is."""
    try:
        (length,) = _LENGTH.unpack_from(sealed, len(_MAGIC))
        start = len(_MAGIC) + _LENGTH.size
        if bytes(sealed[: len(_MAGIC)]) != _MAGIC or length > _MAX_HEADER_BYTES:
            raise ValueError
        header = json.loads(bytes(sealed[start : start + length]))
        if not isinstance(header, dict):
            raise TypeError
    except (struct.error, ValueError, TypeError, RecursionError):
        raise EnvelopeError from None
    return header, start + length
