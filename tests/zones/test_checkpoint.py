"""zones.checkpoint: notes as C2SP describes them, and nothing else is accepted."""

from __future__ import annotations

import base64
import contextlib
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from zones.checkpoint import Checkpoint, VerifierKey, opened, origin

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = VerifierKey(origin("clinic"), PRIVATE.public_key().public_bytes_raw())
CHECKPOINT = Checkpoint(origin=origin("clinic"), size=142, root=hashlib.sha256(b"root").digest())
NOTE = CHECKPOINT.note(KEY, PRIVATE.sign(CHECKPOINT.text().encode()))


def test_as_signed_note_says() -> None:
    """Text, empty line, em dash, name, and id and signature in base64; the id is of name, algorithm and key."""
    body, _, signature = NOTE.partition("\n\n")
    mark, name, encoded = signature.rstrip("\n").split(" ")
    data = base64.b64decode(encoded)

    assert body.split("\n") == ["ray-gpu.ledger/clinic", "142", base64.b64encode(CHECKPOINT.root).decode()]
    assert (mark, name, NOTE[-1]) == ("—", "ray-gpu.ledger/clinic", "\n")
    assert data[:4] == hashlib.sha256(b"ray-gpu.ledger/clinic\n\x01" + KEY.public).digest()[:4]
    PRIVATE.public_key().verify(data[4:], (body + "\n").encode())


def test_key_in_words() -> None:
    """A key is written as the note format has it, and read again."""
    name, number, encoded = str(KEY).split("+", 2)

    assert (name, number) == (KEY.name, KEY.id.hex())
    assert base64.b64decode(encoded) == b"\x01" + KEY.public
    assert VerifierKey.parse(f" {KEY}\n") == KEY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "clinic",
        str(KEY).replace("ledger", "ledgre"),
        str(KEY)[:-4],
        str(KEY).replace("+A", "+B", 1),
        "a+00000000+AQ==",
    ],
)
def test_key_that_is_none(text: str) -> None:
    """A key that is cut off, renamed or changed is refused."""
    with pytest.raises(ValueError, match="key"):
        VerifierKey.parse(text)


def test_opened() -> None:
    """A note opens with its key, also beside signatures of others, of any length and algorithm."""
    other = "— witness.example/1 " + base64.b64encode(b"\x00\x01\x02\x03" + bytes(80)).decode()
    body, _, signature = NOTE.partition("\n\n")

    assert opened(NOTE, KEY) == CHECKPOINT
    assert opened(f"{body}\n\n{other}\n{signature}", KEY) == CHECKPOINT
    extended = f"{body}\nan extension\n"
    signed = base64.b64encode(KEY.id + PRIVATE.sign(extended.encode())).decode()
    assert opened(f"{extended}\n— {KEY.name} {signed}\n", KEY) == CHECKPOINT


OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
WRONG: dict[str, tuple[str, str]] = {
    "empty": ("", "no checkpoint"),
    "without signature": (CHECKPOINT.text(), "no checkpoint"),
    "with an empty one": (CHECKPOINT.text() + "\n", "no signature"),
    "another key's": (CHECKPOINT.note(KEY, OTHER.sign(CHECKPOINT.text().encode())), "no signature"),
    "another size": (NOTE.replace("\n142\n", "\n143\n"), "no signature"),
    "size with a zero before": (NOTE.replace("\n142\n", "\n0142\n"), "no checkpoint"),
    "another zone": (NOTE.replace("clinic\n", "trading\n", 1), "checkpoint is of"),
    "another name beside the signature": (
        NOTE.replace("— ray-gpu.ledger/clinic", "— ray-gpu.ledger/trading"),
        "no sig",
    ),
    "short root": (NOTE.replace(base64.b64encode(CHECKPOINT.root).decode(), "AAAA"), "32 bytes"),
    "hyphen for the dash": (NOTE.replace("—", "-"), "no signature"),
}


@pytest.mark.parametrize(("note", "message"), WRONG.values(), ids=WRONG)
def test_note_that_is_none(note: str, message: str) -> None:
    """A note that is cut off, changed, of another zone or by another key is refused."""
    with pytest.raises(ValueError, match=message):
        opened(note, KEY)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, len(NOTE) - 1), other=st.characters(codec="utf-8"))
def test_any_other_character(place: int, other: str) -> None:
    """Whatever one character is changed to, the note is refused, or says the same."""
    # Not always refused: the last digit of base64 may have bits that are nobody's.
    with contextlib.suppress(ValueError):
        assert opened(NOTE[:place] + other + NOTE[place + 1 :], KEY) == CHECKPOINT
