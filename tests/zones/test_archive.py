"""A ledger's old entries go to files of their own: chain, tree and proofs go on over all of them, whatever happens."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ray_gpu.cli.main import cli
from zones import audit, ledger, merkle
from zones.errors import LedgerCorruptError, LedgerUnavailableError
from zones.ledger import Ledger, copy_ledger, read, verify
from zones.merkle import leaf_hash


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a ledger is."""
    return tmp_path / "ledger.db"


def grow(path: Path, entries: int, **options: Any) -> None:
    """Run a gateway that writes so many entries besides those of its start."""
    with Ledger.open(path, zone="clinic", **options) as opened:
        for number in range(entries):
            opened.append({"kind": "session-start", "person": "dana", "session": f"s{number}"})


@pytest.fixture
def three(path: Path) -> Path:
    """A ledger of three files: entries 1 to 5, 6 to 9, and 10 to 12."""
    for entries in (4, 3, 2):
        if path.exists():
            ledger.archive(path)
        grow(path, entries)
    return path


def test_continues(three: Path) -> None:
    """Numbers, chain and tree go on; archives are named after their entries and can be read by their owner alone."""
    report = verify(three)
    entries = list(read(three))
    rows = list(audit.read_verified(three))

    assert [file.name for file in audit.archives(three)] == ["ledger.1-5.db", "ledger.6-9.db"]
    assert {file.stat().st_mode & 0o777 for file in audit.archives(three)} == {0o400}
    assert [entry["seq"] for entry in entries] == list(range(1, 13))
    assert [entry["seq"] for entry in entries if entry["kind"] == "opened"] == [1, 6, 10]
    assert (report.entries, report.checkpoint.size) == (12, 12)
    assert report.checkpoint.root == merkle.root([leaf_hash(row.digest) for row in rows])


def test_same_as_in_one_file(tmp_path: Path) -> None:
    """What a reader sees is what it would in one file that was never archived."""
    one, several = tmp_path / "one.db", tmp_path / "several.db"
    for entries in (4, 3, 2):
        grow(one, entries)
        if several.exists():
            ledger.archive(several)
        grow(several, entries)
    differ = ("time", "frontier")

    def plain(path: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in entry.items() if key not in differ} for entry in read(path)]

    assert plain(one) == plain(several)


def test_by_itself(path: Path) -> None:
    """A start archives what has grown too long; what is counted since the beginning is found in the archives too."""
    grow(path, 9, most_entries=5)
    grow(path, 1, most_entries=5)

    assert [file.name for file in audit.archives(path)] == ["ledger.1-10.db"]
    with Ledger.open(path, zone="clinic") as opened:
        assert len(opened.find("session-start")) == 10
        assert opened.head.seq == 13


def test_unfinished_intents(path: Path) -> None:
    """What a crashed gateway may have sent at most is written down, also where its entries were archived since."""
    from tests.zones.test_ledger import EGRESS

    with Ledger.open(path, zone="clinic") as opened:
        decision = opened.append({**EGRESS.fields(), "kind": "decision", "decision": "allowed", **ANSWER})
        opened.intend(EGRESS, decision=decision, calls=3, bytes_=500)
    ledger.archive(path)
    grow(path, 0)

    (recovered,) = (entry for entry in read(path) if entry["kind"] == "recovered")
    assert (recovered["intent"], recovered["at_most_bytes"]) == (3, 500)


ANSWER: dict[str, Any] = {"rules": [], "reasons": [], "obligations": {}, "policy_digest": "0" * 64}


def test_right_after_a_rotation(three: Path) -> None:
    """Between archiving and the next start there is no newest file: the archives are the ledger."""
    ledger.archive(three)

    assert not three.exists()
    assert verify(three).entries == 12
    grow(three, 0)
    assert verify(three).entries == 13


def test_missing_archive(three: Path) -> None:
    """Without an archive the ledger does not verify, nor does a gateway start where it cannot go on; it says which."""
    middle = audit.archives(three)[1]
    away = middle.rename(middle.parent / "elsewhere")

    with pytest.raises(LedgerUnavailableError, match=r"begins with entry 10, and entries 6 to 9 .*ledger\.6-9\.db"):
        verify(three)
    with pytest.raises(LedgerUnavailableError, match="continues entry 9, which is in no archive"):
        Ledger.open(three, zone="clinic")
    away.rename(middle)
    assert verify(three).entries == 12


def damaged(three: Path) -> Iterator[tuple[Path, int]]:
    """Yield each file with an entry of it."""
    yield from zip([*audit.archives(three), three], (3, 7, 11), strict=True)


@pytest.mark.parametrize("place", range(3))
def test_changed_archive(three: Path, place: int) -> None:
    """A changed entry is found in whichever file it is, and named; so is a file that lost its last entry."""
    file, seq = list(damaged(three))[place]
    file.chmod(0o600)
    with sqlite3.connect(file) as database:
        database.execute("UPDATE entries SET body = replace(body, 'dana', 'eve') WHERE seq = ?", (seq,))
    with pytest.raises(LedgerCorruptError, match=f"entry {seq} does not verify: content changed"):
        verify(three)


def test_cut_archive(three: Path) -> None:
    """Entries cut off the end of an archive are missed by the next file."""
    first = audit.archives(three)[0]
    first.chmod(0o600)
    with sqlite3.connect(first) as database:
        database.execute("DELETE FROM entries WHERE seq = 5")

    with pytest.raises((LedgerCorruptError, LedgerUnavailableError), match=r"entry 5|entries 5 to 5"):
        verify(three)


def test_swapped_archives(three: Path, tmp_path: Path) -> None:
    """An archive of another ledger, under the right name, is no part of this one."""
    other = tmp_path / "other" / "ledger.db"
    other.parent.mkdir()
    grow(other, 4)
    foreign = ledger.archive(other)
    os.replace(foreign, audit.archives(three)[0])

    with pytest.raises(LedgerCorruptError, match="entry 6 does not verify"):
        verify(three)


def test_not_while_a_gateway_writes(path: Path) -> None:
    """A ledger that is being written is not archived; nor is one that is not there."""
    with Ledger.open(path, zone="clinic"), pytest.raises(LedgerUnavailableError, match="another gateway writes it"):
        ledger.archive(path)
    with pytest.raises(LedgerUnavailableError, match="there is no ledger file"):
        ledger.archive(path.with_name("none.db"))


def test_copy(three: Path, tmp_path: Path) -> None:
    """A copy has the archives too, and verifies elsewhere."""
    target = tmp_path / "elsewhere" / "copied.db"
    target.parent.mkdir()
    copy_ledger(three, target)

    assert [file.name for file in audit.archives(target)] == ["copied.1-5.db", "copied.6-9.db"]
    assert verify(target).head == verify(three).head


def test_command(path: Path) -> None:
    """`ray-gpu audit archive` says where the entries are, and that a gateway goes on."""
    grow(path, 2)
    done = CliRunner().invoke(cli, ["audit", "archive", str(path)])

    assert done.exit_code == 0, done.output
    assert "ledger.1-3.db" in done.output.replace("\n", "")
    assert CliRunner().invoke(cli, ["audit", "verify", str(path)]).exit_code == 0
