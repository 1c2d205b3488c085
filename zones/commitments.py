"""Commitments to the fields of a ledger entry, one each: any of them can be opened without the others. Pure.

docs/ledger.md is the specification. An entry has a random salt of 32 bytes, and each field a salt of its own from it,
so that an opened field says nothing about another one, not even about one whose value can be guessed.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

from zones.model import canonical

#: Bytes of a salt.
SALT_BYTES = 32

_SALT_LABEL = b"ray-gpu ledger v2 salt\n"
_FIELD_LABEL = b"ray-gpu ledger v2 field\n"
_ENTRY_LABEL = b"ray-gpu ledger v2 entry\n"


def field_salt(salt: bytes, name: str) -> bytes:
    """Return the salt of the field *name* in an entry with this salt, 32 bytes."""
    return hashlib.sha256(_SALT_LABEL + _text(name) + salt).digest()


def commit(salt: bytes, name: str, value: Any) -> bytes:
    """Return the commitment to one field, 32 bytes, from the field's own salt.

    Raises:
        TypeError: *value* has no canonical bytes.
    """
    return hashlib.sha256(_FIELD_LABEL + salt + b"[%b,%b]" % (_text(name), _fragment(value))).digest()


def commitments(salt: bytes, entry: Mapping[str, Any]) -> list[bytes]:
    """Return the commitments to all fields of an entry in ascending order, which tells no name."""
    return _of_fragments(salt, {name: _fragment(value) for name, value in entry.items()})


def _of_fragments(salt: bytes, fragments: Mapping[str, bytes]) -> list[bytes]:
    # The same as `commit(field_salt(salt, name), name, value)`, of which verifying a ledger makes millions.
    sha256, around, label = hashlib.sha256, _around, _FIELD_LABEL
    found = []
    for name, value in fragments.items():
        before_salt, before_value = around(name)
        own = sha256(before_salt + salt).digest()
        found.append(sha256(label + own + before_value + value + b"]").digest())
    found.sort()
    return found


def digest_of_body(salt: bytes, entry: Mapping[str, Any], body: bytes) -> bytes | None:
    """Return :func:`entry_digest`, or ``None`` where *body* is not the entry's canonical bytes."""
    fragments = {name: _fragment(value) for name, value in entry.items()}
    whole = b"{" + b",".join([_text(name) + b":" + value for name, value in fragments.items()]) + b"}"
    if whole != body or list(fragments) != sorted(fragments):
        return None
    return digest_of(_of_fragments(salt, fragments))


def digest_of(commitments: Iterable[bytes]) -> bytes:
    """Return what stands for an entry in chain and tree, 32 bytes, from its commitments in ascending order."""
    return hashlib.sha256(_ENTRY_LABEL + b"".join(commitments)).digest()


def entry_digest(salt: bytes, entry: Mapping[str, Any]) -> bytes:
    """Return what stands for an entry in chain and tree, 32 bytes."""
    return digest_of(commitments(salt, entry))


@functools.lru_cache(maxsize=256)
def _text(name: str) -> bytes:
    return canonical(name)


@functools.lru_cache(maxsize=256)
def _around(name: str) -> tuple[bytes, bytes]:
    """Return what is hashed before an entry's salt, and what before a field's value."""
    return _SALT_LABEL + _text(name), b"[%b," % _text(name)


def _fragment(value: Any) -> bytes:
    """Return canonical bytes; most values are text or numbers, for which there is a shorter way."""
    kind = type(value)
    if kind is str:
        return encode_basestring_ascii(value).encode("ascii")
    if kind is int:
        return b"%d" % value
    if kind is list:
        try:
            return f"[{','.join(map(encode_basestring_ascii, value))}]".encode("ascii")
        except TypeError:
            # Not all are texts.
            return canonical(value)
    return b"{}" if value == {} else canonical(value)
