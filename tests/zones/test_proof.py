"""zones.proof and docs/verify_proof.py: what a ledger proves of itself to somebody who does not have it."""

from __future__ import annotations

import copy
import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from zones import proof
from zones.audit import verify
from zones.checkpoint import Checkpoint, VerifierKey, opened, origin
from zones.errors import LedgerCorruptError, LedgerError, ProofError
from zones.ledger import Ledger

STRANGER = Path(__file__).parents[2] / "docs/verify_proof.py"
PRIVATE, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
KEY = VerifierKey(origin("clinic"), PRIVATE.public_key().public_bytes_raw())
PURPOSE = "a purpose of nobody's concern"
#: Entries that are written between checkpoints: the sizes of trees are of every kind.
ENTRIES = 11

Case = tuple[Path, list[str]]


def sign(ledger: Ledger, private: Ed25519PrivateKey = PRIVATE) -> str:
    """Write a signed checkpoint of all entries so far, and return it."""
    state = ledger.checkpoint
    note = state.note(KEY, private.sign(state.text().encode()))
    ledger.append({"kind": "checkpoint", "note": note})
    return note


def start(number: int) -> dict[str, Any]:
    """Return an entry."""
    return {"kind": "session-start", "person": f"person-{number}", "session": f"s{number}", "purpose": PURPOSE}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A ledger that was opened twice, and its checkpoints in order."""
    path, notes = tmp_path_factory.mktemp("proof") / "ledger.sqlite", []
    for run in range(2):
        with Ledger.open(path, zone="clinic") as ledger:
            notes.append(sign(ledger))
            for number in range(ENTRIES):
                ledger.append(start(ENTRIES * run + number))
            notes.append(sign(ledger))
    return path, notes


def stranger(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run what a stranger runs, where nothing of this project can be imported, and no assertion is executed."""
    command = [sys.executable, "-I", "-O", str(STRANGER), *map(str, arguments)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


# -- checkpoints in a ledger ----------------------------------------------------------------------


def test_signed(case: Case) -> None:
    """A ledger whose checkpoints the key signed says up to where; without a key nothing is said of signatures."""
    path, notes = case

    assert verify(path, key=KEY).signed == opened(notes[-1], KEY).size == verify(path).entries - 1
    assert verify(path).signed == 0
    assert proof.newest_note(path) == notes[-1]


@pytest.mark.parametrize("index", range(4))
def test_noted_checkpoint(case: Case, index: int) -> None:
    """A ledger holds against each checkpoint that was kept outside, and against none of another ledger."""
    path, notes = case
    noted = opened(notes[index], KEY)

    assert verify(path, key=KEY, noted=noted).entries == 2 * (ENTRIES + 3)
    for wrong in (
        Checkpoint(origin=noted.origin, size=noted.size, root=bytes(32)),
        Checkpoint(origin=origin("trading"), size=noted.size, root=noted.root),
    ):
        with pytest.raises(LedgerCorruptError, match="rewritten"):
            verify(path, key=KEY, noted=wrong)


def test_cut_off(case: Case, tmp_path: Path) -> None:
    """Entries cut off at the end are found by a noted checkpoint; control: without it nothing is found."""
    path, notes = case
    shorter = tmp_path / "shorter.sqlite"
    shorter.write_bytes(path.read_bytes())
    with closing(sqlite3.connect(shorter)) as database, database:
        database.execute("DELETE FROM entries WHERE seq > 20")

    assert verify(shorter, key=KEY).entries == 20
    with pytest.raises(LedgerCorruptError, match=r"entry 21 .*missing") as caught:
        verify(shorter, key=KEY, noted=opened(notes[-1], KEY))
    assert caught.value.entry == 21


@pytest.mark.parametrize(
    ("forge", "without_key"),
    [
        (lambda ledger: sign(ledger, OTHER), True),
        (lambda ledger: ledger.append({"kind": "checkpoint", "note": "no note"}), False),
        (lambda ledger: ledger.append({"kind": "checkpoint", "note": _of_another_tree(ledger)}), False),
        (lambda ledger: ledger.append({"kind": "checkpoint", "note": _of_the_future(ledger)}), False),
    ],
    ids=["another key", "no note", "another tree", "of entries to come"],
)
def test_checkpoint_that_does_not_hold(tmp_path: Path, forge: Callable[[Ledger], object], *, without_key: bool) -> None:
    """A checkpoint by another key, of another tree or of entries to come is named; without a key, all but the first."""
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path, zone="clinic") as ledger:
        forge(ledger)
        ledger.append(start(0))

    if without_key:
        assert verify(path).entries == 3
    else:
        with pytest.raises(LedgerCorruptError, match=r"entry 2 .*checkpoint"):
            verify(path)
    with pytest.raises(LedgerCorruptError, match=r"entry 2 .*checkpoint"):
        verify(path, key=KEY)


def _signed(checkpoint: Checkpoint) -> str:
    return checkpoint.note(KEY, PRIVATE.sign(checkpoint.text().encode()))


def _of_another_tree(ledger: Ledger) -> str:
    return _signed(Checkpoint(origin=origin("clinic"), size=ledger.head.seq, root=bytes(32)))


def _of_the_future(ledger: Ledger) -> str:
    return _signed(Checkpoint(origin=origin("clinic"), size=99, root=ledger.checkpoint.root))


def test_start_that_names_another_tree(tmp_path: Path, case: Case) -> None:
    """The tree that each start takes up is checked, though chain and hashes hold."""
    path = tmp_path / "ledger.sqlite"
    with Ledger.open(path, zone="clinic") as ledger:
        ledger._write([{"kind": "opened", "zone": "clinic", "format": 2, "frontier": ["00" * 32]}])

    with pytest.raises(LedgerCorruptError, match=r"entry 2 .*tree that it names"):
        verify(path)
    # The next start takes it as it is said: as many hashes as it has entries.
    with Ledger.open(path, zone="clinic") as ledger:
        assert ledger.checkpoint.size == 3
    with closing(sqlite3.connect(case[0])) as database:
        opened_ = [
            json.loads(body) for (body,) in database.execute("SELECT body FROM entries WHERE body LIKE '%opened%'")
        ]
    assert [len(entry["frontier"]) for entry in opened_ if entry["kind"] == "opened"] == [0, 3]


# -- proofs ---------------------------------------------------------------------------------------


def test_every_entry_is_proven(case: Case, tmp_path: Path) -> None:
    """Each entry that a checkpoint covers is proven, by us and by a stranger, with the fields that were chosen."""
    path, _ = case
    for seq in range(1, 2 * (ENTRIES + 3)):
        document = proof.prove(path, seq, ["kind", "seq"])
        assert proof.check(document, KEY) == (seq, {"kind": document["opened"][0]["value"], "seq": seq})
    file = tmp_path / "proof.json"
    for seq in (1, 7, 16, 27):
        file.write_text(json.dumps(proof.prove(path, seq, ["time", "kind"])))
        done = stranger(file, KEY)
        assert done.returncode == 0, done.stderr
        assert set(json.loads(done.stdout)) == {"entry", "time", "kind"}


def test_only_chosen_fields(case: Case) -> None:
    """A proof has neither the value nor the name of a field that was not chosen, nor the entry's salt."""
    path, _ = case
    with closing(sqlite3.connect(path)) as database:
        (salt,) = database.execute("SELECT salt FROM entries WHERE seq = 5").fetchone()
    text = json.dumps(proof.prove(path, 5, ["kind", "person"]))

    assert "person-2" in text
    assert not [word for word in (PURPOSE, "purpose", 'session"', "2026-", salt) if word in text]
    assert PURPOSE in json.dumps(proof.prove(path, 5, ["purpose"]))


def changed(document: dict[str, Any], *path: object, to: object) -> dict[str, Any]:
    """Return a copy with one value changed."""
    other: Any = copy.deepcopy(document)
    place = other
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return dict(other)


def test_forged_inclusion(case: Case, tmp_path: Path) -> None:
    """Whatever is changed in a proof, neither we nor the stranger accept it; as it is, both do."""
    path, notes = case
    document = proof.prove(path, 5, ["person", "seq"])
    forgeries = [
        changed(document, "opened", 0, "value", to="person-3"),
        changed(document, "opened", 0, "name", to="session"),
        changed(document, "opened", 0, "salt", to="00" * 32),
        changed(document, "opened", 0, "salt", to="0"),
        changed(document, "index", to=5),
        changed(document, "index", to=99),
        changed(document, "path", 0, to="00" * 32),
        changed(document, "path", to=document["path"][:-1]),
        changed(document, "path", to=[*document["path"], "00" * 32]),
        changed(document, "commitments", to=document["commitments"][1:]),
        changed(document, "commitments", to=document["commitments"][::-1]),
        changed(document, "checkpoint", to=notes[1]),
        changed(document, "checkpoint", to=notes[-1].replace("\n27\n", "\n28\n")),
        changed(document, "format", to=proof.GROWTH),
        {},
        {"format": proof.INCLUSION},
    ]
    file = tmp_path / "proof.json"

    assert proof.check(document, KEY)[1]["person"] == "person-2"
    for forgery in forgeries:
        with pytest.raises(ProofError):
            proof.check(forgery, KEY)
    with pytest.raises(ProofError, match="signature"):
        proof.check(document, VerifierKey(KEY.name, OTHER.public_key().public_bytes_raw()))
    # A process each: not all of them, but one of each kind.
    for forgery in (forgeries[0], forgeries[4], forgeries[6], forgeries[12], forgeries[14]):
        file.write_text(json.dumps(forgery))
        done = stranger(file, KEY)
        assert done.returncode == 1
        assert done.stderr.startswith("does not hold: ")


def test_growth(case: Case, tmp_path: Path) -> None:
    """From each older checkpoint to the newest is proven, by us and by a stranger; from another ledger's it is not."""
    path, notes = case
    proof_file, note_file = tmp_path / "growth.json", tmp_path / "note"
    for note in notes:
        old = opened(note, KEY)
        document = proof.prove_growth(path, old)
        assert proof.check_growth(document, KEY, old).size == 2 * (ENTRIES + 3) - 1
        proof_file.write_text(json.dumps(document))
        note_file.write_text(note)
        done = stranger(proof_file, KEY, note_file)
        assert done.returncode == 0, done.stderr
        assert f"of {old.size} entries has grown to {2 * (ENTRIES + 3) - 1};" in done.stdout

    old = opened(notes[1], KEY)
    other = Checkpoint(origin=old.origin, size=old.size, root=bytes(32))
    document = proof.prove_growth(path, old)
    for wrong in (other, Checkpoint(origin=origin("trading"), size=old.size, root=old.root)):
        with pytest.raises(ProofError):
            proof.check_growth(document, KEY, wrong)
    with pytest.raises(ProofError, match="rewritten"):
        proof.check_growth(changed(document, "path", 0, to="00" * 32), KEY, old)
    note_file.write_text(_signed(other))
    proof_file.write_text(json.dumps(document))
    assert "the ledger was rewritten" in stranger(proof_file, KEY, note_file).stderr


def test_what_cannot_be_proven(case: Case, tmp_path: Path) -> None:
    """An entry or field that is not there, an entry that no checkpoint covers, and a ledger without one, are named."""
    path, notes = case
    last = 2 * (ENTRIES + 3)
    with pytest.raises(LedgerError, match="has no entry 99"):
        proof.prove(path, 99, [])
    with pytest.raises(LedgerError, match=r"no field 'persn'.*person"):
        proof.prove(path, 5, ["persn"])
    with pytest.raises(LedgerError, match=f"no checkpoint covers entry {last} yet"):
        proof.prove(path, last, [])
    with pytest.raises(LedgerError, match="the one given of 99"):
        proof.prove_growth(path, Checkpoint(origin=origin("clinic"), size=99, root=bytes(32)))
    with Ledger.open(tmp_path / "new.sqlite", zone="clinic"):
        pass
    for call in (proof.newest_note, lambda new: proof.prove(new, 1, [])):
        with pytest.raises(LedgerError, match="no signed checkpoint yet"):
            call(tmp_path / "new.sqlite")
    assert len(notes) == 4
