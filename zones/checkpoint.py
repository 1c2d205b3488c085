"""Signed checkpoints of a ledger's tree: C2SP tlog-checkpoint in C2SP signed-note, with Ed25519. Pure.

Formats: https://c2sp.org/tlog-checkpoint and https://c2sp.org/signed-note. A checkpoint says how many entries a
ledger has and which tree they make; its signature says that the zone's gateway said so. The key is Vault's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from zones.merkle import HASH_BYTES

_ED25519 = b"\x01"
_KEY_BYTES, _SIGNATURE_BYTES, _ID_BYTES = 32, 64, 4
_KEY = re.compile(r"([^\s+]{1,200})\+([0-9a-f]{8})\+([A-Za-z0-9+/]+=*)")
_SIGNATURE = re.compile(r"— (\S{1,200}) ([A-Za-z0-9+/]+=*)")
_SIZE = re.compile(r"[1-9][0-9]{0,18}|0")


def origin(zone: str) -> str:
    """Return the name of a zone's ledger in checkpoints, which is also its key's."""
    return f"ray-gpu.ledger/{zone}"


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key with the name that it signs under. ``str(key)`` and :meth:`parse` are the form of signed-note."""

    name: str
    #: Ed25519, 32 bytes.
    public: bytes

    @property
    def id(self) -> bytes:
        """What signatures name the key by, 4 bytes."""
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:_ID_BYTES]

    def __str__(self) -> str:
        return f"{self.name}+{self.id.hex()}+{base64.b64encode(_ED25519 + self.public).decode()}"

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """Read what ``str(key)`` wrote.

        Raises:
            ValueError: It is no Ed25519 key in that form, or does not belong to its own id.
        """
        match = _KEY.fullmatch(text.strip())
        data = _decoded(match[3]) if match else b""
        if match is None or data[:1] != _ED25519 or len(data) != 1 + _KEY_BYTES:
            raise ValueError("a key is written as name+id+base64, as `ray-gpu vault ledger-key` prints it")
        key = cls(match[1], data[1:])
        if key.id.hex() != match[2]:
            raise ValueError("the key does not belong to its id; copy it again")
        return key


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state of a ledger: how many entries, and the root of their tree."""

    origin: str
    size: int
    #: 32 bytes.
    root: bytes

    def text(self) -> str:
        """Return the body of the note, which is what is signed."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    def note(self, key: VerifierKey, signature: bytes) -> str:
        """Return the signed note, given the signature by *key* of :meth:`text`."""
        return f"{self.text()}\n— {key.name} {base64.b64encode(key.id + signature).decode()}\n"


def unsigned(note: str) -> Checkpoint:
    """Return what a note says, whoever signed it.

    Raises:
        ValueError: It is no checkpoint.
    """
    text, separator, _ = note.rpartition("\n\n")
    lines = text.split("\n")
    if not separator or len(lines) < 3 or not _SIZE.fullmatch(lines[1]):
        raise ValueError("this is no checkpoint: it has an origin, a size, a root and signatures")
    root = _decoded(lines[2])
    if len(root) != HASH_BYTES:
        raise ValueError("this is no checkpoint: its root is not 32 bytes in base64")
    return Checkpoint(origin=lines[0], size=int(lines[1]), root=root)


def opened(note: str, key: VerifierKey) -> Checkpoint:
    """Return the checkpoint in a note that *key* signed. Signatures of other keys are ignored.

    Raises:
        ValueError: It is no such note, of another origin than the key's name, or not signed by *key*.
    """
    found = unsigned(note)
    text, _, signatures = note.rpartition("\n\n")
    if found.origin != key.name:
        raise ValueError(f"the checkpoint is of {found.origin!r}, the key of {key.name!r}")
    if not any(_holds(line, f"{text}\n".encode(), key) for line in signatures.removesuffix("\n").split("\n")):
        raise ValueError(f"no signature of it is by the key {key.name}+{key.id.hex()}")
    return found


def _holds(line: str, signed: bytes, key: VerifierKey) -> bool:
    match = _SIGNATURE.fullmatch(line)
    data = _decoded(match[2]) if match else b""
    if match is None or match[1] != key.name or data[:_ID_BYTES] != key.id:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(data[_ID_BYTES:], signed)
    except InvalidSignature:
        return False
    return True


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""
