"""zones.commitments: an entry's digest binds every field, and an opened field tells of no other."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from zones.commitments import commit, commitments, digest_of, entry_digest, field_salt
from zones.model import canonical

SALT = bytes(range(32))
ENTRY: dict[str, Any] = {"seq": 3, "kind": "decision", "columns": ["a", "b"], "receipt": None, "rows": 0}


def test_written_out() -> None:
    """The digest of an entry, by the words of docs/ledger.md alone."""
    salts = {name: hashlib.sha256(f'ray-gpu ledger v2 salt\n"{name}"'.encode() + SALT).digest() for name in ENTRY}
    texts = {
        "seq": '["seq",3]', "kind": '["kind","decision"]', "columns": '["columns",["a","b"]]',
        "receipt": '["receipt",null]', "rows": '["rows",0]',
    }  # fmt: skip
    found = sorted(
        hashlib.sha256(b"ray-gpu ledger v2 field\n" + salts[name] + text.encode()).digest()
        for name, text in texts.items()
    )

    assert commitments(SALT, ENTRY) == found
    assert entry_digest(SALT, ENTRY) == hashlib.sha256(b"ray-gpu ledger v2 entry\n" + b"".join(found)).digest()


@pytest.mark.parametrize(
    "changed",
    [
        {**ENTRY, "seq": 4},
        {**ENTRY, "rows": False},
        {**ENTRY, "columns": ["b", "a"]},
        {**ENTRY, "more": None},
        {key: value for key, value in ENTRY.items() if key != "receipt"},
        {"kid" if key == "kind" else key: value for key, value in ENTRY.items()},
    ],
)
def test_every_field_is_bound(changed: dict[str, Any]) -> None:
    """Another value, type, order, name or number of fields is another digest; another order of fields is not."""
    assert entry_digest(SALT, changed) != entry_digest(SALT, ENTRY)
    assert entry_digest(SALT, dict(reversed(ENTRY.items()))) == entry_digest(SALT, ENTRY)


@pytest.mark.parametrize(
    "value", ["", 'a "quote" \n', "\u00e9\u20ac\U0001f600", 0, -1, 1 << 70, True, None, [], ["a", 1], {"b": {"a": []}}]
)
def test_any_value(value: Any) -> None:
    """A commitment is to the canonical bytes, whatever the value's type."""
    own = field_salt(SALT, "name")
    text = b"ray-gpu ledger v2 field\n" + own + canonical(["name", value])

    assert commit(own, "name", value) == hashlib.sha256(text).digest()


def test_salts() -> None:
    """Each field has its own salt; with another entry's salt the same value has another commitment."""
    assert len({field_salt(SALT, name) for name in ENTRY}) == len(ENTRY)
    assert len({field_salt(salt, "rows") for salt in (SALT, bytes(32))}) == 2
    own = field_salt(SALT, "rows")
    assert commit(own, "rows", 0) in commitments(SALT, ENTRY)
    assert commitments(SALT, ENTRY) == sorted(
        commit(field_salt(SALT, name), name, value) for name, value in ENTRY.items()
    )
    assert commit(field_salt(SALT, "seq"), "rows", 0) not in commitments(SALT, ENTRY)
    assert digest_of(commitments(SALT, ENTRY)) == entry_digest(SALT, ENTRY)
