"""C2SP signed-note with Ed25519: text, and signatures of named keys under it. Pure.

Format: https://c2sp.org/signed-note. Checkpoints of ledgers are notes, and so are approvals of functions.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_ED25519 = b"\x01"
_KEY_BYTES, _ID_BYTES = 32, 4
#: Names of keys have neither spaces nor plus signs.
_NAME = r"[^\s+]{1,200}"
_KEY = re.compile(rf"({_NAME})\+([0-9a-f]{{8}})\+([A-Za-z0-9+/]+=*)")
_PRIVATE = re.compile(rf"PRIVATE\+KEY\+{_KEY.pattern}")
_SIGNATURE = re.compile(r"— (\S{1,200}) ([A-Za-z0-9+/]+=*)")


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
        data = _key_bytes(match)
        if match is None or data is None:
            raise ValueError("a key is written as name+id+base64, as the command that made it printed it")
        key = cls(match[1], data)
        if key.id.hex() != match[2]:
            raise ValueError("the key does not belong to its id; copy it again")
        return key


class SigningKey:
    """A private key with the name that it signs under.

    Raises:
        ValueError: The name has spaces or plus signs.
    """

    def __init__(self, name: str, private: Ed25519PrivateKey) -> None:
        if not re.fullmatch(_NAME, name):
            raise ValueError(f"a key's name has neither spaces nor plus signs, unlike {name!r}")
        self._private = private
        self.verifier = VerifierKey(name, private.public_key().public_bytes_raw())

    @classmethod
    def generate(cls, name: str) -> SigningKey:
        """Return a new key. Raises as the class does."""
        return cls(name, Ed25519PrivateKey.generate())

    @classmethod
    def parse(cls, text: str) -> SigningKey:
        """Read what :attr:`text` is.

        Raises:
            ValueError: It is no private Ed25519 key in that form.
        """
        match = _PRIVATE.fullmatch(text.strip())
        data = _key_bytes(match)
        if match is None or data is None:
            raise ValueError("this is no private key of a note's signer; make one with `ray-gpu policy officer`")
        return cls(match[1], Ed25519PrivateKey.from_private_bytes(data))

    @property
    def text(self) -> str:
        """The private key with its name, as ``PRIVATE+KEY+name+id+base64``."""
        data = base64.b64encode(_ED25519 + self._private.private_bytes_raw()).decode()
        return f"PRIVATE+KEY+{self.verifier.name}+{self.verifier.id.hex()}+{data}"

    def sign(self, text: str) -> str:
        """Return *text*, which ends with a newline, as a signed note."""
        return signed(text, self.verifier, self._private.sign(text.encode()))

    def __repr__(self) -> str:
        return f"SigningKey({self.verifier.name!r})"


def _key_bytes(match: re.Match[str] | None) -> bytes | None:
    """Return the 32 bytes of the key that was read; ``None`` where it is no Ed25519 key."""
    data = decoded(match[3]) if match else b""
    return data[1:] if data[:1] == _ED25519 and len(data) == 1 + _KEY_BYTES else None


def signed(text: str, key: VerifierKey, signature: bytes) -> str:
    """Return the note of *text*, which ends with a newline, given its signature by *key*."""
    return f"{text}\n— {key.name} {base64.b64encode(key.id + signature).decode()}\n"


def split(note: str) -> tuple[str, list[str]]:
    """Return a note's text, and the lines of its signatures, whoever made them.

    Raises:
        ValueError: It is no note.
    """
    text, separator, signatures = note.rpartition("\n\n")
    if not separator:
        raise ValueError("this is no signed note: a text, an empty line and signatures")
    return f"{text}\n", signatures.removesuffix("\n").split("\n")


def signed_by(note: str, key: VerifierKey) -> bool:
    """Say whether *key* signed a note. Signatures of other keys are ignored. Raises as :func:`split`."""
    text, signatures = split(note)
    return any(_holds(line, text.encode(), key) for line in signatures)


def _holds(line: str, text: bytes, key: VerifierKey) -> bool:
    match = _SIGNATURE.fullmatch(line)
    data = decoded(match[2]) if match else b""
    if match is None or match[1] != key.name or data[:_ID_BYTES] != key.id:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(key.public).verify(data[_ID_BYTES:], text)
    except InvalidSignature:
        return False
    return True


def decoded(text: str) -> bytes:
    """Return what base64 stands for; ``b""`` where it is none."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        return b""
