"""Canaries: one text for each channel, in every form in which a process may hold it, and back. Pure but for randomness.

All canaries of a run begin with its mark, eight characters; the channel's name follows: ``kQ3x9LmZ-closure``. So one
search for the mark finds them all, and what follows says which channel leaked. The mark's eight bytes are also a
number, as Arrow lays a little-endian int64 or float64: that is the canary of numeric columns.
"""

from __future__ import annotations

import base64
import re
import secrets
import string
import struct
from collections.abc import Callable
from dataclasses import dataclass

#: The channels through which a call could leak: what goes in, what its code captures, and what comes out.
CHANNELS = (
    "value",
    "name",
    "category",
    "closure",
    "global",
    "default",
    "print",
    "logging",
    "exception",
    "result",
)
#: A call's arguments are an eleventh; they also bring the text that the function makes its own canaries of.
ARGUMENT = "argument"
MARK_BYTES = 8
#: What controls plant in the places that are searched, each in one.
PLACE_WORDS = ("memory", "environ", "cmdline", "mapped", "opened", "session", "tmp", "shm")
#: Longest byte string that is looked for, or read behind one to tell its channel.
LONGEST_BYTES = 256
_LETTERS, _DIGITS = string.ascii_letters, string.digits
_WORD = re.compile("-({})".format("|".join((*CHANNELS, ARGUMENT, *PLACE_WORDS))).encode())
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]*")
_HEX = re.compile(rb"[0-9A-Fa-f]*")


@dataclass(frozen=True, slots=True)
class Needle:
    """One byte string to look for."""

    #: ``raw``, ``utf-16`` of either byte order, ``base64``, ``hex``, ``big-endian`` or ``decimal``.
    form: str
    #: Returns the bytes that the text's are followed by, from what follows the needle, in the form's own spelling.
    follows: Callable[[bytes], bytes]


def new_mark() -> str:
    """Return a new mark. It begins with a letter, and all its spellings in base64 are the same for URLs."""
    while True:
        mark = secrets.choice(_LETTERS) + "".join(secrets.choice(_LETTERS + _DIGITS) for _ in range(MARK_BYTES - 1))
        if not any(character in needle for needle in _base64(mark.encode()) for character in b"+/"):
            return mark


def canaries(mark: str) -> dict[str, str]:
    """Return each channel's canary."""
    return {channel: f"{mark}-{channel}" for channel in (*CHANNELS, ARGUMENT)}


def as_int64(mark: str) -> int:
    """Return the number whose little-endian bytes are the mark's; positive, since these are ASCII."""
    return int.from_bytes(mark.encode("ascii"), "little")


def as_float64(mark: str) -> float:
    """Return the number whose IEEE 754 bytes, little-endian, are the mark's; finite, since these are ASCII."""
    number: float = struct.unpack("<d", mark.encode("ascii"))[0]
    return number


def needles(text: str) -> dict[bytes, Needle]:
    """Return the byte strings that show *text*, a mark or any other ASCII text."""
    raw = text.encode("ascii")
    found = {raw: Needle("raw", bytes), text.encode("utf-16-le"): Needle("utf-16", _from_utf_16("utf-16-le"))}
    found[text.encode("utf-16-be")] = Needle("utf-16", _from_utf_16("utf-16-be"))
    found |= {spelled: Needle("hex", _from_hex) for spelled in (raw.hex().encode(), raw.hex().upper().encode())}
    for shift, spelled in enumerate(_base64(raw)):
        found[spelled] = Needle("base64", _from_base64(shift, len(raw), spelled))
    if len(raw) == MARK_BYTES:
        found[raw[::-1]] = Needle("big-endian", bytes)  # msgpack's
        for number in (as_int64(text), as_float64(text)):
            found[str(number).encode()] = Needle("decimal", bytes)
    return found


def told(mark: str, needle: Needle, after: bytes) -> tuple[str, str]:
    """Return a hit's form and channel, by what follows the needle; channel ``""`` when that does not say.

    A mark that is followed by itself is a numeric column as Arrow lays it: form ``arrow`` where it is not spelled.
    """
    follows = needle.follows(after)
    if needle.form in ("big-endian", "decimal"):
        return needle.form, "value"
    if follows.startswith(mark.encode("ascii")):
        return ("arrow" if needle.form == "raw" else needle.form), "value"
    word = _WORD.match(follows)
    return needle.form, word[1].decode() if word else ""


def _base64(raw: bytes) -> list[bytes]:
    """Return how *raw* is spelled where 0, 1 and 2 bytes of a group of three stand before it."""
    found = []
    for shift in range(3):
        # Only the characters that do not depend on what stands before and after.
        start, end = -(-shift * 8 // 6), (shift + len(raw)) * 8 // 6
        found.append(base64.b64encode(bytes(shift) + raw + bytes(3))[start:end])
    return found


def _from_base64(shift: int, size: int, spelled: bytes) -> Callable[[bytes], bytes]:
    lead = b"A" * -(-shift * 8 // 6)

    def follows(after: bytes) -> bytes:
        match = _BASE64.match(after)
        assert match
        text = (lead + spelled + match[0]).translate(bytes.maketrans(b"-_", b"+/"))
        text = text[: -1 if len(text) % 4 == 1 else None]  # one character alone has less than a byte
        return base64.b64decode(text + b"=" * (-len(text) % 4))[shift + size :]

    return follows


def _from_hex(after: bytes) -> bytes:
    match = _HEX.match(after)
    assert match
    return bytes.fromhex(match[0][: len(match[0]) // 2 * 2].decode())


def _from_utf_16(encoding: str) -> Callable[[bytes], bytes]:
    return lambda after: after[: len(after) // 2 * 2].decode(encoding, "replace").encode("utf-8", "replace")
