"""Proofs from a ledger: that an entry is in it, with chosen fields opened, and that it only grew. docs/ledger.md.

:func:`prove` and :func:`prove_growth` read a ledger file; checking is pure, and docs/verify_proof.py is the same for a
stranger who has nothing of this project. A proof is JSON: it holds the values of the fields that were chosen, and of
the others nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zones import merkle
from zones.audit import Verified, read_verified
from zones.checkpoint import Checkpoint, VerifierKey, opened, unsigned
from zones.commitments import commit, commitments, digest_of, field_salt
from zones.errors import LedgerError, ProofError, did_you_mean
from zones.merkle import leaf_hash

INCLUSION, GROWTH = "ray-gpu ledger inclusion v1", "ray-gpu ledger growth v1"


def newest_note(path: Path) -> str:
    """Return the newest signed checkpoint in the ledger at *path*.

    Raises:
        LedgerError: It has none.
        LedgerCorruptError: As :func:`zones.audit.read`.
        LedgerUnavailableError: As :func:`zones.audit.read`.
    """
    return _newest(path, list(read_verified(path)))


def prove(path: Path, seq: int, fields: Sequence[str]) -> dict[str, Any]:
    """Return the proof that entry *seq* is in the ledger at *path*, with these fields opened.

    Raises:
        LedgerError: There is no such entry, it has no such field, or no checkpoint covers it yet.
        LedgerCorruptError: As :func:`zones.audit.read`.
        LedgerUnavailableError: As :func:`zones.audit.read`.
    """
    rows = list(read_verified(path))
    if not 0 < seq <= len(rows):
        raise LedgerError(f"{path.name} has no entry {seq}; it has {len(rows)}")
    row, note = rows[seq - 1], _newest(path, rows)
    for name in fields:
        if name not in row.entry:
            hint = did_you_mean(name, row.entry)
            raise LedgerError(f"entry {seq} has no field {name!r}{hint}; it has {', '.join(sorted(row.entry))}")
    size = unsigned(note).size
    if seq > size:
        raise LedgerError(
            f"no checkpoint covers entry {seq} yet, the newest ends at {size}; one is signed at each session's end"
        )
    leaves = [leaf_hash(one.digest) for one in rows[:size]]
    return {
        "format": INCLUSION,
        "checkpoint": note,
        "index": seq - 1,
        "path": [node.hex() for node in merkle.inclusion_proof(seq - 1, leaves)],
        "commitments": [one.hex() for one in commitments(row.salt, row.entry)],
        "opened": [
            {"name": name, "salt": field_salt(row.salt, name).hex(), "value": row.entry[name]} for name in fields
        ],
    }


def prove_growth(path: Path, old: Checkpoint) -> dict[str, Any]:
    """Return the proof that the ledger at *path*, up to its newest checkpoint, begins with the one that *old* is of.

    Raises:
        LedgerError: Its newest checkpoint is older than *old*, or it has none.
        LedgerCorruptError: As :func:`zones.audit.read`.
        LedgerUnavailableError: As :func:`zones.audit.read`.
    """
    rows = list(read_verified(path))
    note = _newest(path, rows)
    size = unsigned(note).size
    if not 0 < old.size <= size:
        raise LedgerError(f"the newest checkpoint of {path.name} is of {size} entries, the one given of {old.size}")
    leaves = [leaf_hash(one.digest) for one in rows[:size]]
    path_ = [node.hex() for node in merkle.consistency_proof(old.size, leaves)]
    return {"format": GROWTH, "checkpoint": note, "old_size": old.size, "path": path_}


def _newest(path: Path, rows: Sequence[Verified]) -> str:
    for row in reversed(rows):
        if row.entry["kind"] == "checkpoint":
            return str(row.entry["note"])
    raise LedgerError(
        f"{path.name} has no signed checkpoint yet; the gateway signs one at its start and for each session"
    )


# -- checking -----------------------------------------------------------------------------------


def check(document: Mapping[str, Any], key: VerifierKey) -> tuple[int, dict[str, Any]]:
    """Check an inclusion proof; return the entry's number and the fields that it opens.

    Args:
        document: As :func:`prove` made it.
        key: The zone's.

    Raises:
        ProofError: It proves nothing.
    """
    found, path = _checkpoint(document, INCLUSION, key)
    try:
        listed = [bytes.fromhex(one) for one in document["commitments"]]
        index = int(document["index"])
        fields = {}
        for field in document["opened"]:
            name = str(field["name"])
            if commit(bytes.fromhex(field["salt"]), name, field["value"]) not in listed:
                raise ProofError(f"the value of field {name!r} is not the one in the ledger")
            fields[name] = field["value"]
        root = merkle.root_from_inclusion(leaf_hash(digest_of(listed)), index, found.size, path)
    except (KeyError, TypeError, ValueError) as error:
        raise ProofError(f"this is no inclusion proof: {error}") from None
    if listed != sorted(listed) or root != found.root:
        raise ProofError("the entry is not in the ledger that the checkpoint is of")
    if fields.get("seq", index + 1) != index + 1:
        raise ProofError("the entry's number is not that of its place")
    return index + 1, fields


def check_growth(document: Mapping[str, Any], key: VerifierKey, old: Checkpoint) -> Checkpoint:
    """Check a growth proof against an older checkpoint; return the newer one, which the ledger has grown to.

    Raises:
        ProofError: It proves nothing.
    """
    new, path = _checkpoint(document, GROWTH, key)
    if old.origin != new.origin or document.get("old_size") != old.size:
        raise ProofError("the proof is about another checkpoint than the one given")
    if not merkle.is_consistent(old.size, old.root, new.size, new.root, path):
        raise ProofError("the ledger of the newer checkpoint does not begin with that of the older; it was rewritten")
    return new


def _checkpoint(document: Mapping[str, Any], form: str, key: VerifierKey) -> tuple[Checkpoint, list[bytes]]:
    """Return a proof's checkpoint, whose signature holds, and its path."""
    if document.get("format") != form:
        raise ProofError(f"this is no proof in the form {form!r}; it says {str(document.get('format'))[:60]!r}")
    try:
        return opened(str(document["checkpoint"]), key), [bytes.fromhex(node) for node in document["path"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ProofError(f"its checkpoint does not hold: {error}") from None
