"""Signed checkpoints of a ledger's tree: C2SP tlog-checkpoint in C2SP signed-note, with Ed25519. Pure.

Format: https://c2sp.org/tlog-checkpoint. A checkpoint says how many entries a ledger has and which tree they make; its
signature says that the zone's gateway said so. The key is Vault's.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from zones import note as notes
from zones.merkle import HASH_BYTES
from zones.note import VerifierKey as VerifierKey

_SIZE = re.compile(r"[1-9][0-9]{0,18}|0")


def origin(zone: str) -> str:
    """Return the name of a zone's ledger in checkpoints, which is also its key's."""
    return f"ray-gpu.ledger/{zone}"


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
        return notes.signed(self.text(), key, signature)


def unsigned(note: str) -> Checkpoint:
    """Return what a note says, whoever signed it.

    Raises:
        ValueError: It is no checkpoint.
    """
    try:
        lines = notes.split(note)[0].split("\n")
    except ValueError:
        lines = []
    if len(lines) < 4 or not _SIZE.fullmatch(lines[1]):
        raise ValueError("this is no checkpoint: it has an origin, a size, a root and signatures")
    root = notes.decoded(lines[2])
    if len(root) != HASH_BYTES:
        raise ValueError("this is no checkpoint: its root is not 32 bytes in base64")
    return Checkpoint(origin=lines[0], size=int(lines[1]), root=root)


def opened(note: str, key: VerifierKey) -> Checkpoint:
    """Return the checkpoint in a note that *key* signed. Signatures of other keys are ignored.

    Raises:
        ValueError: It is no such note, of another origin than the key's name, or not signed by *key*.
    """
    found = unsigned(note)
    if found.origin != key.name:
        raise ValueError(f"the checkpoint is of {found.origin!r}, the key of {key.name!r}")
    if not notes.signed_by(note, key):
        raise ValueError(f"no signature of it is by the key {key.name}+{key.id.hex()}")
    return found
