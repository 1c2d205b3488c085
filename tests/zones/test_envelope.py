"""The envelope against docs/envelope.md: round trips, tampering, slots, replay, published vectors."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import pickle
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.cobblestone import Cobblestone256Decryptor, Cobblestone256Encryptor
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from zones import replay
from zones.envelope import (
    HEADER_BYTES,
    LENGTH_BYTES,
    MAX_PADDED_BYTES,
    MIN_PADDED_BYTES,
    OPEN_SLACK_BYTES,
    PIECE_BYTES,
    SEAL_SLACK_BYTES,
    Header,
    LeaseKey,
    Opener,
    ReplayGuard,
    Sealer,
    header_for,
    length_prefix,
    open_,
    padded_size,
    seal,
    sealed_size,
    split_payload,
)
from zones.errors import EnvelopeError
from zones.model import Direction, Kind, Slot

RAW = bytes(range(32))
KEY = LeaseKey.from_bytes(RAW)
GRANT = hashlib.sha256(b"grant").hexdigest()
OTHER_GRANT = hashlib.sha256(b"another grant").hexdigest()
SLOT = Slot(lease="lease-1", direction=Direction.OUT, kind=Kind.SHARD, call=3, shard=5, attempt=0)

slots = st.builds(
    Slot,
    lease=st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True),
    direction=st.sampled_from(Direction),
    kind=st.sampled_from(Kind),
    call=st.integers(0, 2**64 - 1),
    shard=st.integers(0, 2**64 - 1),
    attempt=st.integers(0, 2**32 - 1),
)


def open_message(message: bytes, slot: Slot = SLOT) -> bytes:
    """Open with the key and grant that every message here is sealed with, unless a test says otherwise."""
    return bytes(open_(message, key=KEY, grant_digest=GRANT, slot=slot))


def pieces(total: int, first: int) -> list[tuple[int, int]]:
    """Cut *total* bytes into one piece of *first* and others of ``PIECE_BYTES``."""
    edges = [0, *range(first, total, PIECE_BYTES), total]
    return list(pairwise(edges))


@pytest.fixture(scope="module")
def message() -> bytes:
    """One small sealed message."""
    return seal(b"rows", key=KEY, grant_digest=GRANT, slot=SLOT)


# --- round trips -----------------------------------------------------------------------------------


@given(payload=st.binary(max_size=70_000), slot=slots)
@settings(max_examples=60, deadline=None)
def test_round_trip(payload: bytes, slot: Slot) -> None:
    """What was sealed for a slot opens for that slot."""
    sealed = seal(payload, key=KEY, grant_digest=GRANT, slot=slot)

    assert len(sealed) == HEADER_BYTES + sealed_size(padded_size(len(payload)))
    assert open_(sealed, key=KEY, grant_digest=GRANT, slot=slot) == payload


@given(size=st.integers(0, 200_000), seal_piece=st.integers(1, 70_000), open_piece=st.integers(1, 70_000))
@settings(max_examples=40, deadline=None)
def test_streamed_round_trip_into_exact_buffers(size: int, seal_piece: int, open_piece: int) -> None:
    """Pieces of any size work, into buffers with no slack beyond the body and the plaintext."""
    padded = padded_size(size)
    plain = (length_prefix(size) + b"x" * size).ljust(padded, b"\0")
    sealer = Sealer(KEY, GRANT, SLOT, padded)
    body = memoryview(bytearray(sealed_size(padded)))
    done = 0
    for start in range(0, padded, seal_piece):
        done += sealer.update_into(plain[start : start + seal_piece], body[done:])
    tail = sealer.finalize()
    body[done:] = tail  # fails unless the body has exactly its promised length

    opener = Opener(KEY, GRANT, SLOT, padded)
    opened = memoryview(bytearray(padded))
    done = 0
    for start in range(0, len(body), open_piece):
        done += opener.update_into(body[start : start + open_piece], opened[done:])
    done += opener.finalize_into(opened[done:])

    assert done == padded
    assert split_payload(opened) == b"x" * size


@pytest.mark.parametrize("first", [1, 16383, 16384, 16385, PIECE_BYTES])
def test_documented_slack_is_enough(first: int) -> None:
    """A reused buffer with the documented slack takes every piece, whatever the library holds back from the first."""
    padded = padded_size(3 * PIECE_BYTES)
    sealer, body = Sealer(KEY, GRANT, SLOT, padded), bytearray()
    out = bytearray(PIECE_BYTES + SEAL_SLACK_BYTES)
    for start, end in pieces(padded, first):
        body += out[: sealer.update_into(bytes(end - start), out)]
    body += sealer.finalize()
    opener, opened = Opener(KEY, GRANT, SLOT, padded), 0
    out = bytearray(PIECE_BYTES + OPEN_SLACK_BYTES)
    for start, end in pieces(len(body), first):
        opened += opener.update_into(body[start:end], out)

    assert opened + len(opener.finalize()) == padded


@given(slot=slots, size=st.integers(0, MAX_PADDED_BYTES - LENGTH_BYTES))
def test_header_round_trip(slot: Slot, size: int) -> None:
    """A header decodes to what was encoded, and names the slot it was made for."""
    header = header_for(slot, padded_size(size))

    raw = header.encode()

    assert len(raw) == HEADER_BYTES
    assert Header.decode(raw) == header
    assert header.slot(lease=slot.lease, direction=slot.direction) == slot


def test_header_bytes() -> None:
    """The header's layout is the one in the specification, byte by byte."""
    slot = replace(SLOT, direction=Direction.BACK, kind=Kind.RESULT, call=0x0102, shard=0x0304, attempt=0x0506)

    assert header_for(slot, 4096).encode() == b"".join(
        [
            b"RGE1\x02\x06\x00\x00",
            bytes.fromhex("0000000000000102"),
            bytes.fromhex("0000000000000304"),
            bytes.fromhex("0000050600000000"),
            bytes.fromhex("0000000000001000"),
            hashlib.sha256(b"lease-1").digest()[:16],
            bytes(8),
        ]
    )


# --- a second implementation, from the specification -------------------------------------------------


def open_by_the_book(message: bytes, slot: Slot) -> bytes:
    """Open *message* with nothing but HMAC, SHA and one-shot AES-256-GCM."""
    header, body = message[:64], message[64:]
    direction, kind = header[4], header[5]
    lease = slot.lease.encode()
    numbers = struct.pack(">BBQQIB", direction, kind, slot.call, slot.shard, slot.attempt, len(lease))
    shard_key = expand(RAW, b"ray-gpu envelope v1 key\0" + numbers + lease, 32, "sha256")
    context = b"ray-gpu envelope v1 context\0" + hashlib.sha512(header).digest() + bytes.fromhex(GRANT)
    salt, commitment, chunks = body[:24], body[24:56], body[56:]
    okm = expand(shard_key, b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context, 76, "sha512")
    assert okm[44:] == commitment
    base, plain = int.from_bytes(okm[32:44], "big"), b""
    for number, start in enumerate(range(0, len(chunks), 16400)):
        nonce = (base ^ number).to_bytes(12, "big")
        plain += AESGCM(okm[:32]).decrypt(nonce, chunks[start : start + 16400], None)
    size = int.from_bytes(plain[:8], "big")
    assert not any(plain[8 + size :])
    return plain[8 : 8 + size]


@pytest.mark.parametrize("size", [0, 4, 1024, 16376, 16377, 65528, 65529, 100_000])
def test_specification_alone_opens_a_message(size: int) -> None:
    """A reader who has only docs/envelope.md opens what this code sealed."""
    payload = bytes(i % 251 for i in range(size))

    assert open_by_the_book(seal(payload, key=KEY, grant_digest=GRANT, slot=SLOT), SLOT) == payload


def test_body_is_cobblestone_256() -> None:
    """Sealing and opening use the library's Cobblestone-256, the class that the published vectors run through."""
    padded = padded_size(0)

    assert type(Sealer(KEY, GRANT, SLOT, padded)._body) is Cobblestone256Encryptor
    assert type(Opener(KEY, GRANT, SLOT, padded)._body) is Cobblestone256Decryptor


def wycheproof() -> list[Any]:
    """Read the published cases."""
    path = Path(__file__).parents[1] / "vectors" / "c2sp_chunked_encryption_aes_256_gcm_test.json"
    document = json.loads(path.read_text("utf-8"))
    return [case for group in document["testGroups"] for case in group["tests"]]


def test_all_wycheproof_cases_are_here() -> None:
    """The vectors' file is whole: 10 valid and 25 invalid cases."""
    assert [case["result"] for case in wycheproof()].count("valid") == 10
    assert len(wycheproof()) == 35


@pytest.mark.parametrize("case", wycheproof(), ids=lambda case: f"{case['tcId']}: {case['comment']}")
@pytest.mark.parametrize("piece", [1 << 20, 1000], ids=["whole", "pieces"])
def test_wycheproof(case: dict[str, Any], piece: int) -> None:
    """The Cobblestone-256 in use opens every valid published message and refuses every invalid one."""
    # The publisher compresses: two cases are over 4 MiB, nearly all zeros.
    sealed = zlib.decompress(bytes.fromhex(case["ct"]))
    out, plain = bytearray(len(sealed) + OPEN_SLACK_BYTES), bytearray()
    result = "valid"
    try:
        opener = Cobblestone256Decryptor(bytes.fromhex(case["key"]), bytes.fromhex(case["ctx"]))
        for start in range(0, len(sealed), piece):
            plain += out[: opener.update_into(sealed[start : start + piece], out)]
        plain += opener.finalize()
    except (InvalidTag, ValueError):
        result = "invalid"

    assert result == case["result"]
    # Of an invalid message at most the authentic beginning was handed out, and nothing else.
    assert len(plain) <= case.get("msgLength", 0)
    if result == "valid":
        assert len(plain) == case["msgLength"]
        assert hashlib.sha512(plain).hexdigest() == case["msgSha512"]


# --- tampering; the fixture's message opens, which is the control ------------------------------------


def test_untouched_message_opens(message: bytes) -> None:
    """Control for every tampering test below: the same message opens untouched."""
    assert open_message(message) == b"rows"


def test_every_header_bit(message: bytes) -> None:
    """A message with any one bit of its header flipped does not open."""
    for bit in range(8 * HEADER_BYTES):
        bad = bytearray(message)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EnvelopeError):
            open_message(bytes(bad))


def test_every_header_bit_is_in_the_context(message: bytes) -> None:
    """The body itself is bound to the header: other header bytes give another context, whatever the checks before."""
    header = Header.decode(message[:HEADER_BYTES])
    for changed in (
        replace(header, call=4),
        replace(header, shard=6),
        replace(header, attempt=1),
        replace(header, kind=Kind.RESULT),
        replace(header, direction=Direction.BACK),
    ):
        slot = changed.slot(lease=SLOT.lease, direction=changed.direction)
        with pytest.raises(EnvelopeError):
            open_message(changed.encode() + message[HEADER_BYTES:], slot)


def test_every_byte(message: bytes) -> None:
    """A message with any one byte changed does not open."""
    for position in range(len(message)):
        bad = bytearray(message)
        bad[position] ^= 0x5A
        with pytest.raises(EnvelopeError):
            open_message(bytes(bad))


def test_control_without_authentication() -> None:
    """The same cipher without tags opens a changed message, and the change is where the attacker wanted it."""
    keystream = Cipher(algorithms.AES256(RAW), modes.CTR(bytes(16)))
    sealed = bytearray(keystream.encryptor().update(b"pay 100"))
    sealed[4] ^= ord("1") ^ ord("9")

    assert keystream.decryptor().update(bytes(sealed)) == b"pay 900"


def test_truncation_at_every_length(message: bytes) -> None:
    """A message cut short at any length does not open, nor one with a byte more."""
    for size in range(len(message)):
        with pytest.raises(EnvelopeError):
            open_message(message[:size])
    with pytest.raises(EnvelopeError):
        open_message(message + b"\0")


def test_streamed_truncation_at_every_length(message: bytes) -> None:
    """A streamed body cut short at any length does not finalize, and stays refused when the rest comes late."""
    body = message[HEADER_BYTES:]
    for size in range(len(body)):
        opener = Opener(KEY, GRANT, SLOT, MIN_PADDED_BYTES)
        opener.update_into(body[:size], bytearray(MIN_PADDED_BYTES))
        with pytest.raises(EnvelopeError):
            opener.finalize()
        with pytest.raises(EnvelopeError):
            opener.update_into(body[size:], bytearray(MIN_PADDED_BYTES))


def test_chunks_cannot_be_cut_swapped_or_repeated() -> None:
    """Whole chunks moved within a long message do not open, though each is authentic."""
    sealed = seal(bytes(60_000), key=KEY, grant_digest=GRANT, slot=SLOT)
    assert open_message(sealed) == bytes(60_000)
    start, size = HEADER_BYTES + 56, 16400
    head, one, two = sealed[:start], sealed[start : start + size], sealed[start + size : start + 2 * size]
    rest = sealed[start + 2 * size :]
    for body in (two + one + rest, one + one + rest, one + rest, one + two + two + rest):
        with pytest.raises(EnvelopeError):
            open_message(head + body)


def test_dead_after_failure(message: bytes) -> None:
    """An opener that failed once fails for good, even if the right bytes follow."""
    body = bytearray(message[HEADER_BYTES:])
    body[0] ^= 1
    opener = Opener(KEY, GRANT, SLOT, MIN_PADDED_BYTES)
    out = bytearray(MIN_PADDED_BYTES)
    for attempt in (bytes(body), message[HEADER_BYTES:], b""):
        with pytest.raises(EnvelopeError):
            opener.update_into(attempt, out)
    with pytest.raises(EnvelopeError):
        opener.finalize()


def test_bytes_beyond_the_body_are_refused(message: bytes) -> None:
    """A body longer than its header says is refused at once, and the opener with it."""
    opener = Opener(KEY, GRANT, SLOT, MIN_PADDED_BYTES)
    with pytest.raises(EnvelopeError):
        opener.update_into(message[HEADER_BYTES:] + b"\0", bytearray(1024))
    with pytest.raises(EnvelopeError):
        opener.finalize()


# --- the right place, key and grant ------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        replace(SLOT, lease="lease-2"),
        replace(SLOT, direction=Direction.BACK),
        replace(SLOT, kind=Kind.ARGUMENTS),
        replace(SLOT, call=4),
        replace(SLOT, shard=6),
        replace(SLOT, attempt=1),
        replace(SLOT, call=5, shard=3),
    ],
    ids=["other lease", "reflected", "other kind", "other call", "other shard", "retried", "numbers swapped"],
)
def test_wrong_slot(message: bytes, other: Slot) -> None:
    """A message moved to another slot does not open, with its own header or with the slot's."""
    for header in (message[:HEADER_BYTES], header_for(other, MIN_PADDED_BYTES).encode()):
        with pytest.raises(EnvelopeError):
            open_message(header + message[HEADER_BYTES:], other)


def test_lease_ids_with_one_tag_have_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole lease id is in the key: two ids whose header tags collide do not open each other's messages."""
    monkeypatch.setattr("zones.header._lease_tag", lambda lease: bytes(16))
    sealed = seal(b"rows", key=KEY, grant_digest=GRANT, slot=SLOT)
    assert open_message(sealed) == b"rows"
    with pytest.raises(EnvelopeError):
        open_message(sealed, replace(SLOT, lease="lease-2"))


def test_wrong_key(message: bytes) -> None:
    """Another lease's key does not open a message."""
    with pytest.raises(EnvelopeError):
        open_(message, key=LeaseKey(bytes(32)), grant_digest=GRANT, slot=SLOT)


def test_wrong_grant(message: bytes) -> None:
    """A message does not open under other terms than those it was sealed under."""
    with pytest.raises(EnvelopeError):
        open_(message, key=KEY, grant_digest=OTHER_GRANT, slot=SLOT)


def test_failures_look_alike(message: bytes) -> None:
    """Wrong key, grant, slot, bit and length give the same text and no cause."""
    attempts: list[Callable[[], object]] = [
        lambda: open_(message, key=LeaseKey(bytes(32)), grant_digest=GRANT, slot=SLOT),
        lambda: open_(message, key=KEY, grant_digest=OTHER_GRANT, slot=SLOT),
        lambda: open_message(message, replace(SLOT, call=9)),
        lambda: open_message(message[:-1] + b"\0"),
        lambda: open_message(message[:-1]),
    ]
    seen = set()
    for attempt in attempts:
        with pytest.raises(EnvelopeError) as caught:
            attempt()
        shown = caught.value.__context__ is not None and not caught.value.__suppress_context__
        seen.add((str(caught.value), caught.value.__cause__, shown))
    assert len(seen) == 1


def test_header_claims_only_its_own_lease_and_direction(message: bytes) -> None:
    """A header of another lease, or read from the wrong direction, names no slot."""
    header = Header.decode(message[:HEADER_BYTES])
    assert header.slot(lease="lease-1", direction=Direction.OUT) == SLOT
    with pytest.raises(EnvelopeError):
        header.slot(lease="lease-2", direction=Direction.OUT)
    with pytest.raises(EnvelopeError):
        header.slot(lease="lease-1", direction=Direction.BACK)


def test_salts_differ(message: bytes) -> None:
    """Sealing the same payload for the same slot twice gives another salt and another ciphertext."""
    again = seal(b"rows", key=KEY, grant_digest=GRANT, slot=SLOT)

    assert again[:HEADER_BYTES] == message[:HEADER_BYTES]
    assert again[64:88] != message[64:88]
    assert again[120:] != message[120:]


# --- sizes and padding -------------------------------------------------------------------------------


@given(n=st.integers(0, MAX_PADDED_BYTES - LENGTH_BYTES))
def test_padded_size(n: int) -> None:
    """Buckets hold the payload, are their own bucket, and cost at most 12.5 % above 64 KiB."""
    padded = padded_size(n)

    assert padded >= max(n + LENGTH_BYTES, MIN_PADDED_BYTES)
    assert padded_size(padded - LENGTH_BYTES) == padded
    if n + LENGTH_BYTES > 64 << 10:
        assert 8 * (padded - n - LENGTH_BYTES) <= n + LENGTH_BYTES


def test_padded_size_table() -> None:
    """Buckets at their edges, as the specification describes them, and 105 in all."""
    edges = {
        0: 256,
        248: 256,
        249: 512,
        1024: 2048,
        65528: 65536,
        65529: 73728,
        (1 << 20) - 8: 1 << 20,
        1 << 20: 9 << 17,
    }
    assert {n: padded_size(n) for n in edges} == edges
    buckets, padded = 0, 0
    while padded < MAX_PADDED_BYTES:
        padded, buckets = padded_size(max(0, padded - LENGTH_BYTES + 1)), buckets + 1
    assert buckets == 105


@pytest.mark.parametrize("n", [-1, MAX_PADDED_BYTES - LENGTH_BYTES + 1])
def test_payload_too_large(n: int) -> None:
    """A payload that no message holds is the caller's bug."""
    with pytest.raises(ValueError, match="smaller shards"):
        padded_size(n)


@pytest.mark.parametrize("claimed", [0, 255, 257, MAX_PADDED_BYTES + (MAX_PADDED_BYTES >> 3), 2**64 - 1])
def test_oversize_or_odd_length_declared(claimed: int) -> None:
    """A header that claims a length that is no bucket is refused, and nothing is allocated for it."""
    raw = bytearray(header_for(SLOT, 256).encode())
    assert Header.decode(raw).padded_bytes == 256
    raw[32:40] = claimed.to_bytes(8, "big")
    with pytest.raises(EnvelopeError):
        Header.decode(raw)
    with pytest.raises(EnvelopeError):
        Opener(KEY, GRANT, SLOT, claimed)
    with pytest.raises(ValueError, match="padded_size"):
        Sealer(KEY, GRANT, SLOT, claimed)


def test_large_claim_alone_allocates_nothing() -> None:
    """A small message whose header claims 256 MiB is refused before memory is taken for it."""
    lie = header_for(SLOT, MAX_PADDED_BYTES).encode() + bytes(1000)
    tracemalloc.start()
    try:
        with pytest.raises(EnvelopeError):
            open_message(lie)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def sealed_plaintext(plain: bytes) -> bytes:
    """Seal a padded plaintext that need not be well formed."""
    sealer = Sealer(KEY, GRANT, SLOT, len(plain))
    body = bytearray(sealer.body_bytes)
    written = sealer.update_into(plain, body)
    return sealer.header + body[:written] + sealer.finalize()


@pytest.mark.parametrize(
    "plain",
    [
        (length_prefix(4) + b"rows").ljust(255, b"\0") + b"\1",
        (length_prefix(4) + b"rows\1").ljust(256, b"\0"),
        length_prefix(249).ljust(256, b"\0"),
        length_prefix(2**64 - 1).ljust(256, b"\0"),
        (length_prefix(4) + b"rows").ljust(131_071, b"\0") + b"\1",
    ],
    ids=["last byte", "first byte of padding", "one too long", "longest", "beyond one block"],
)
def test_authentic_but_malformed_plaintext(plain: bytes) -> None:
    """A holder of the key who lies about the length or fills the padding is refused all the same."""
    control = (length_prefix(4) + b"rows").ljust(len(plain), b"\0")
    assert open_message(sealed_plaintext(control)) == b"rows"

    with pytest.raises(EnvelopeError):
        open_message(sealed_plaintext(plain))


def test_plaintext_shorter_than_its_length_field() -> None:
    """A plaintext with no room for the length is refused."""
    with pytest.raises(EnvelopeError):
        split_payload(memoryview(b"short"))


# --- a sender's own mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        replace(SLOT, call=-1),
        replace(SLOT, call=2**64),
        replace(SLOT, shard=2**64),
        replace(SLOT, attempt=2**32),
        replace(SLOT, lease="no.dots"),
        replace(SLOT, lease="x" * 41),
    ],
)
def test_slot_out_of_range(bad: Slot) -> None:
    """A slot that the header cannot carry is the caller's bug."""
    with pytest.raises(ValueError, match=r"below 2\*\*64|1 to 40 characters"):
        seal(b"rows", key=KEY, grant_digest=GRANT, slot=bad)


@pytest.mark.parametrize("grant", ["", "ab", "zz" * 32, "ab" * 33])
def test_grant_digest_malformed(grant: str) -> None:
    """A grant digest that is not 64 hexadecimal digits is the caller's bug."""
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        seal(b"rows", key=KEY, grant_digest=grant, slot=SLOT)


def test_lease_tag_of_another_length() -> None:
    """A header never cuts or fills a tag in silence."""
    with pytest.raises(ValueError, match="lease tag"):
        replace(header_for(SLOT, 256), lease_tag=b"short").encode()


def test_sealer_takes_exactly_the_declared_length() -> None:
    """A message never closes short of its declared length, nor takes a byte more."""
    sealer = Sealer(KEY, GRANT, SLOT, 256)
    out = bytearray(1024)
    sealer.update_into(bytes(255), out)
    with pytest.raises(ValueError, match="missing"):
        sealer.finalize()
    with pytest.raises(ValueError, match="beyond"):
        sealer.update_into(bytes(2), out)
    sealer.update_into(bytes(1), out)
    assert len(sealer.finalize()) == 256 + 16


def test_short_buffer_changes_nothing() -> None:
    """A buffer that is too short is the caller's bug, and the call can be repeated with a longer one."""
    padded = padded_size(20_000)
    plain = (length_prefix(4) + b"rows").ljust(padded, b"\0")
    sealer = Sealer(KEY, GRANT, SLOT, padded)
    body = bytearray(sealer.body_bytes)
    with pytest.raises(ValueError, match="buffer"):
        sealer.update_into(plain, bytearray(100))
    written = sealer.update_into(plain, body)
    sealed = bytes(body[:written]) + sealer.finalize()
    opener = Opener(KEY, GRANT, SLOT, padded)
    with pytest.raises(ValueError, match="buffer"):
        opener.update_into(sealed, bytearray(100))
    out = bytearray(padded)
    assert out[: opener.update_into(sealed, out)] + opener.finalize() == plain


# --- the lease key -----------------------------------------------------------------------------------


def test_lease_key_is_redacted() -> None:
    """No way of printing a key shows its bytes."""
    key = LeaseKey(b"K" * 32)

    for text in (repr(key), str(key), f"{key}", f"{[key]}", f"{key!a}"):
        assert text.count("K") == text.count("Key")
        assert "redacted" in text


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_lease_key_refuses_pickling(protocol: int) -> None:
    """A key cannot be pickled, alone or inside something else."""
    with pytest.raises(TypeError, match="never copied or pickled"):
        pickle.dumps({"key": KEY}, protocol)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_lease_key_refuses_copying(copier: Callable[[LeaseKey], LeaseKey]) -> None:
    """A key has one owner: it cannot be copied."""
    with pytest.raises(TypeError, match="never copied or pickled"):
        copier(KEY)


def test_sealer_and_opener_refuse_pickling() -> None:
    """The objects that hold a shard key cannot be pickled either."""
    for holder in (Sealer(KEY, GRANT, SLOT, 256), Opener(KEY, GRANT, SLOT, 256)):
        with pytest.raises(TypeError):
            pickle.dumps(holder)


def test_lease_key_is_wiped() -> None:
    """Leaving the context overwrites the key, and a wiped key seals nothing: all zeros would be anybody's key."""
    source = bytearray(RAW)
    with LeaseKey(source) as key:
        assert key.bytes == RAW
        seal(b"rows", key=key, grant_digest=GRANT, slot=SLOT)
    assert key._raw == bytes(32)
    assert source == RAW
    with pytest.raises(ValueError, match="wiped"):
        seal(b"rows", key=key, grant_digest=GRANT, slot=SLOT)
    with pytest.raises(ValueError, match="wiped"):
        _ = key.bytes


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_lease_key_length(size: int) -> None:
    """A key of another length than 32 bytes is refused, and the message does not show it."""
    with pytest.raises(ValueError, match="32 bytes") as caught:
        LeaseKey(b"K" * size)
    assert "KK" not in str(caught.value)


# --- what whoever has a key cannot do either ---------------------------------------------------------


def expand(key: bytes, info: bytes, size: int, hash_name: str) -> bytes:
    """Return *size* bytes of HKDF-Expand (RFC 5869, 2.3)."""
    block, okm, counter = b"", b"", 1
    while len(okm) < size:
        block = hmac.digest(key, block + info + bytes([counter]), hash_name)
        okm, counter = okm + block, counter + 1
    return okm[:size]


def body_key(raw: bytes, header: bytes, salt: bytes, version: bytes = b"v1") -> tuple[bytes, bytes, bytes]:
    """Return AES key, nonce and commitment of a body of one chunk, by the specification, for the slot ``SLOT``."""
    lease = SLOT.lease.encode()
    numbers = struct.pack(">BBQQIB", header[4], header[5], SLOT.call, SLOT.shard, SLOT.attempt, len(lease))
    shard_key = expand(raw, b"ray-gpu envelope " + version + b" key\0" + numbers + lease, 32, "sha256")
    context = b"ray-gpu envelope " + version + b" context\0" + hashlib.sha512(header).digest() + bytes.fromhex(GRANT)
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
    okm = expand(shard_key, info, 76, "sha512")
    return okm[:32], okm[32:44], okm[44:]


@pytest.mark.parametrize(("version", "magic"), [(b"v1", b"RGE1"), (b"v0", b"RGE0"), (b"v0", b"RGE1"), (b"v1", b"RGE0")])
def test_downgrade(version: bytes, magic: bytes) -> None:
    """A peer that has the key and seals for an older version, in the header or in the labels, is not understood.

    Control: the same hand-made message of this version opens.
    """
    header = magic + header_for(SLOT, MIN_PADDED_BYTES).encode()[4:]
    salt = bytes(24)
    aes, nonce, commitment = body_key(RAW, header, salt, version)
    chunk = AESGCM(aes).encrypt(nonce, bytes(MIN_PADDED_BYTES), None)
    made = header + salt + commitment + chunk

    if (version, magic) == (b"v1", b"RGE1"):
        assert open_message(made) == b""
    else:
        with pytest.raises(EnvelopeError):
            open_message(made)


#: AES-GCM's field (NIST SP 800-38D, 6.3): bit 0 is the leftmost one.
_R = 0xE1 << 120


def multiply(x: int, y: int) -> int:
    """Return the product of two blocks."""
    product = 0
    for bit in range(127, -1, -1):
        product ^= y if x >> bit & 1 else 0
        y = y >> 1 ^ (_R if y & 1 else 0)
    return product


def power(x: int, exponent: int) -> int:
    """Return a block to the power of *exponent*; with 2**128 - 2, its inverse."""
    result = 1 << 127
    for bit in bin(exponent)[2:]:
        result = multiply(result, result)
        result = multiply(result, x) if bit == "1" else result
    return result


def two_key_chunk(keys: list[tuple[bytes, bytes]], size: int) -> bytes:
    """Return one ciphertext and tag that AES-GCM opens under both of two (key, nonce)s.

    The tag is linear in each block, so one block is chosen such that both tags are the same (Dodis, Grubbs,
    Ristenpart, Woodage: Fast Message Franking, 2018).
    """
    blocks = size // 16
    lengths = size * 8
    encrypt = [Cipher(algorithms.AES256(key), modes.ECB()).encryptor() for key, _ in keys]
    hashes = [int.from_bytes(block.update(bytes(16)), "big") for block in encrypt]
    masks = [
        int.from_bytes(block.update(nonce + b"\0\0\0\1"), "big")
        for block, (_, nonce) in zip(encrypt, keys, strict=True)
    ]
    # All blocks are zero but the first, whose weight is the highest power.
    weights = [power(h, blocks + 1) for h in hashes]
    rest = [multiply(lengths, h) ^ mask for h, mask in zip(hashes, masks, strict=True)]
    first = multiply(rest[0] ^ rest[1], power(weights[0] ^ weights[1], 2**128 - 2))
    tag = multiply(first, weights[0]) ^ rest[0]
    return first.to_bytes(16, "big") + bytes(size - 16) + tag.to_bytes(16, "big")


def test_key_commitment() -> None:
    """One body that AES-GCM opens under two keys is opened by the key that it commits to, and by no other.

    Control: without the commitment both keys open the same bytes.
    """
    raws = [RAW, bytes(range(32, 64))]
    header, salt = header_for(SLOT, MIN_PADDED_BYTES).encode(), bytes(24)
    made = [body_key(raw, header, salt) for raw in raws]
    chunk = two_key_chunk([(aes, nonce) for aes, nonce, _ in made], MIN_PADDED_BYTES)

    plain = [AESGCM(aes).decrypt(nonce, chunk, None) for aes, nonce, _ in made]
    assert len({*plain}) == 2
    for committed, (_, _, commitment) in enumerate(made):
        body = salt + commitment + chunk
        for opened, raw in enumerate(raws):
            if committed == opened:
                assert open_body(raw, body) == plain[opened]
            else:
                with pytest.raises(EnvelopeError):
                    open_body(raw, body)


def open_body(raw: bytes, body: bytes) -> bytes:
    """Return the padded plaintext of the smallest body."""
    opener = Opener(LeaseKey.from_bytes(raw), GRANT, SLOT, MIN_PADDED_BYTES)
    target = bytearray(MIN_PADDED_BYTES + OPEN_SLACK_BYTES)
    written = opener.update_into(body, target)
    return bytes(target[:written]) + opener.finalize()


# --- replay ------------------------------------------------------------------------------------------


def refused(guard: ReplayGuard, slot: Slot) -> bool:
    """Offer *slot* and say whether the guard refused it."""
    try:
        guard.accept(slot)
    except EnvelopeError:
        return True
    return False


def test_without_a_guard_a_message_opens_twice(message: bytes) -> None:
    """Control: it is the guard that refuses a message the second time, not the envelope."""
    assert open_message(message) == open_message(message)


@given(order=st.permutations(range(6)), again=st.integers(0, 5))
def test_replay_is_refused_in_any_order(order: list[int], again: int) -> None:
    """Shards may come in any order, each once."""
    guard = ReplayGuard()
    for shard in order:
        guard.accept(replace(SLOT, shard=shard))

    assert refused(guard, replace(SLOT, shard=again))


def test_control_replay_opens(message: bytes) -> None:
    """Whoever does not ask the guard is given the same message twice: nothing else about it is refused."""
    assert open_message(message) == open_message(message)


def test_attempts_only_grow() -> None:
    """A later attempt of a shard is accepted once; an older one never after it."""
    guard = ReplayGuard()
    guard.accept(SLOT)
    guard.accept(replace(SLOT, attempt=2))

    assert [refused(guard, replace(SLOT, attempt=n)) for n in (0, 1, 2, 3)] == [True, True, True, False]


def test_kinds_directions_and_calls_are_apart() -> None:
    """The same shard number in another call, kind or direction is another slot."""
    guard = ReplayGuard()
    for slot in (
        SLOT,
        replace(SLOT, call=4),
        replace(SLOT, kind=Kind.ARGUMENTS),
        replace(SLOT, direction=Direction.BACK),
    ):
        guard.accept(slot)
        assert refused(guard, slot)


def test_finished_calls_are_refused() -> None:
    """After a call is finished nothing of it or of an older one is accepted; newer ones and control are."""
    guard = ReplayGuard()
    guard.accept(SLOT)
    guard.accept(replace(SLOT, call=4))
    guard.finish(3)
    guard.finish(1)

    assert refused(guard, replace(SLOT, shard=99))
    assert refused(guard, replace(SLOT, call=2))
    assert refused(guard, replace(SLOT, call=4))
    guard.accept(replace(SLOT, call=4, shard=6))
    guard.accept(replace(SLOT, kind=Kind.CONTROL, call=0, shard=0))


@pytest.mark.parametrize("kind", [Kind.HELLO, Kind.CONTROL])
def test_lease_messages_only_go_upwards(kind: Kind) -> None:
    """Hello and control are numbered upwards; a number that is not above the last is refused."""
    guard = ReplayGuard()
    first = replace(SLOT, kind=kind, call=0)
    guard.accept(first)
    guard.accept(replace(first, shard=9))

    assert [refused(guard, replace(first, shard=n)) for n in (5, 8, 9, 10)] == [True, True, True, False]
    guard.accept(replace(first, direction=Direction.BACK))


def test_guard_serves_one_lease() -> None:
    """A guard refuses slots of another lease than its first."""
    guard = ReplayGuard()
    guard.accept(SLOT)

    assert refused(guard, replace(SLOT, lease="lease-2", shard=6))


def test_guard_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that is full refuses new shards, and finishing a call makes room again."""
    monkeypatch.setattr(replay, "MAX_TRACKED_SLOTS", 3)
    guard = ReplayGuard()
    for shard in range(3):
        guard.accept(replace(SLOT, shard=shard))
    assert refused(guard, replace(SLOT, shard=3))
    guard.accept(replace(SLOT, shard=2, attempt=1))
    for number in range(100):
        guard.accept(replace(SLOT, kind=Kind.CONTROL, shard=number))
    guard.finish(SLOT.call)
    guard.accept(replace(SLOT, call=4))
