from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zones.errors import BudgetSpentError, LedgerCorruptError, LedgerUnavailableError
from zones.ledger import MAX_ENTRY_BYTES, Budget, Egress, Head, Ledger, archive, copy_ledger, read, verify
from zones.model import Decision, EgressRequest, canonical
from zones.wal import whole_bytes

ROOT = Path(__file__).resolve().parents[2]
ZONE = "clinic"
REQUEST = EgressRequest(
    zone=ZONE,
    pool="shared",
    person="ada",
    groups=frozenset({"research"}),
    purpose="readmission study",
    dataset="randhie",
    columns=frozenset({"mdvis", "age"}),
    classes=frozenset({"pseudonymous"}),
    function_digest="ab" * 32,
)
EGRESS = Egress(request=REQUEST, session="s1", policy_digest="cd" * 32, node="gpu-1", lease="l1", rows=20190)
ALLOWED = Decision(allowed=True, rules=("r1",), reasons=("study approved",), policy_digest="cd" * 32)
REFUSED = Decision(allowed=False, rules=("default",), reasons=(), policy_digest="cd" * 32)
START = {"kind": "session-start", "person": "ada", "session": "s1"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a new ledger may be created."""
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    """Return an open ledger with one entry."""
    with Ledger.open(path, zone=ZONE) as opened:
        yield opened


def budget_of(ledger: Ledger, *, calls: int = 10, bytes_: int = 1000) -> Budget:
    """Return the budget of a fresh intent under a fresh decision."""
    return ledger.intend(EGRESS, decision=ledger.decided(EGRESS, ALLOWED), calls=calls, bytes_=bytes_)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a closed ledger of 40 entries of every kind but ``recovered``. Tests change copies of it."""
    path = tmp_path_factory.mktemp("whole") / "ledger.sqlite"
    with Ledger.open(path, zone=ZONE) as ledger:
        for _ in range(7):
            ledger.append(START)
            budget = budget_of(ledger)
            budget.draw(1, 100)
            budget.settle(outcome="done", rows=5, receipt={"node": "gpu-1", "signature": "00" * 32})
            ledger.decided(EGRESS, REFUSED)
        for _ in range(4):
            ledger.append(START | {"kind": "session-end"})
    assert verify(path).entries == 40
    return path


# --- what an entry says -------------------------------------------------------------------------------------------


def test_entries_of_a_call(path: Path) -> None:
    """Decision, intent and completion say who sent what where, under which rule, and how much it was."""
    at = datetime(2026, 5, 1, 14, 0, tzinfo=timezone(timedelta(hours=2)))
    with Ledger.open(path, zone=ZONE, clock=lambda: at) as ledger:
        budget = budget_of(ledger, calls=3, bytes_=300)
        budget.draw(2, 150)
        assert budget.drawn == (2, 150)
        budget.settle(outcome="done", rows=20190, receipt={"signature": "aa"})

    opened, decision, intent, completion = read(path)

    assert opened == {
        "kind": "opened", "zone": ZONE, "format": 2, "frontier": [], "seq": 1, "time": "2026-05-01T12:00:00.000000Z",
    }  # fmt: skip
    assert decision["decision"] == "allowed"
    assert decision["rules"] == ["r1"]
    assert intent["columns"] == ["age", "mdvis"]
    assert (intent["person"], intent["purpose"], intent["node"]) == ("ada", "readmission study", "gpu-1")
    assert (intent["decision_entry"], intent["calls"], intent["bytes"]) == (2, 3, 300)
    assert completion == {
        "kind": "completion",
        "seq": 4,
        "time": "2026-05-01T12:00:00.000000Z",
        "intent": 3,
        "lease": "l1",
        "node": "gpu-1",
        "outcome": "done",
        "calls": 2,
        "rows": 20190,
        "bytes": 150,
        "receipt": {"signature": "aa"},
    }


def test_refusal_is_an_entry(path: Path, ledger: Ledger) -> None:
    """What policy refuses is written down too, and no intent can rest on it."""
    refused = ledger.decided(EGRESS, REFUSED)

    assert list(read(path))[-1]["decision"] == "refused"
    with pytest.raises(ValueError, match="not a decision that allowed"):
        ledger.intend(EGRESS, decision=refused, calls=1, bytes_=1)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"kind": "intent"}, ValueError),
        ({"person": "ada", "session": "s1"}, ValueError),
        ({"kind": "session-start", "person": "ada"}, ValueError),
        (START | {"seq": 9}, ValueError),
        (START | {"time": "now"}, ValueError),
        (START | {"note": 0.5}, TypeError),
        (START | {"note": "x" * MAX_ENTRY_BYTES}, ValueError),
    ],
    ids=["intent", "no kind", "field missing", "own number", "own time", "float", "too large"],
)
def test_bad_entry(path: Path, ledger: Ledger, entry: dict[str, Any], error: type[Exception]) -> None:
    """An entry that breaks the rules is refused, and the ledger goes on."""
    with pytest.raises(error):
        ledger.append(entry)

    ledger.append(START)
    assert verify(path).entries == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_round_trip(tmp_path: Path) -> None:
    """Whatever JSON without floats is appended is read back the same, and verifies."""
    with Ledger.open(tmp_path / "l.sqlite", zone=ZONE) as ledger:

        @given(note=JSON)
        def check(note: Any) -> None:
            seq = ledger.append(START | {"note": note})
            *_, last = read(tmp_path / "l.sqlite")
            assert (last["seq"], last["note"]) == (seq, note)

        check()


def test_chain_and_tree_are_as_specified(path: Path, ledger: Ledger) -> None:
    """Head and root can be recomputed from the document alone."""
    ledger.append(START)
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT body, salt, hash FROM entries ORDER BY seq").fetchall()

    head, leaves = hashlib.sha256(b"ray-gpu ledger v2 genesis\n" + ZONE.encode()).digest(), []
    for body, salt, stored in rows:
        commitments = []
        for name, value in json.loads(body).items():
            own = hashlib.sha256(f'ray-gpu ledger v2 salt\n"{name}"'.encode() + bytes.fromhex(salt)).digest()
            field = json.dumps([name, value], sort_keys=True, separators=(",", ":")).encode()
            commitments.append(hashlib.sha256(b"ray-gpu ledger v2 field\n" + own + field).digest())
        digest = hashlib.sha256(b"ray-gpu ledger v2 entry\n" + b"".join(sorted(commitments))).digest()
        head = hashlib.sha256(b"ray-gpu ledger v2 head\n" + head + digest).digest()
        leaves.append(hashlib.sha256(b"\0" + digest).digest())
        assert stored == head.hex()
    report = verify(path)
    assert ledger.head == Head(seq=2, hash=head.hex()) == report.head
    assert report.checkpoint.root == hashlib.sha256(b"\1" + leaves[0] + leaves[1]).digest()
    assert ledger.checkpoint == report.checkpoint
    assert (report.checkpoint.origin, report.checkpoint.size) == ("ray-gpu.ledger/clinic", 2)
    assert len({salt for _, salt, _ in rows}) == 2


# --- opening ------------------------------------------------------------------------------------------------------


def test_mode_is_0600(path: Path, ledger: Ledger) -> None:
    """Nobody but the gateway can read any of the ledger's files."""
    ledger.append(START)

    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    assert len(list(path.parent.iterdir())) == 4


def test_readable_by_others(path: Path) -> None:
    """A ledger that others can read is not opened."""
    Ledger.open(path, zone=ZONE).close()
    path.chmod(0o640)

    with pytest.raises(LedgerUnavailableError, match="chmod 600"):
        Ledger.open(path, zone=ZONE)


def test_second_writer(path: Path, ledger: Ledger) -> None:
    """A second writer is refused, in this process and in another; readers are not."""
    code = f"from zones.ledger import Ledger; from pathlib import Path; Ledger.open(Path({str(path)!r}), zone={ZONE!r})"

    with pytest.raises(LedgerUnavailableError, match="another gateway"):
        Ledger.open(path, zone=ZONE)
    other = run(code)
    assert "another gateway writes it" in other.stderr
    assert verify(path).entries == 1
    ledger.close()
    assert run(code).returncode == 0


def test_other_zone(path: Path) -> None:
    """A ledger of another zone is refused by name."""
    Ledger.open(path, zone="registry").close()

    with pytest.raises(LedgerUnavailableError, match="'registry', not 'clinic'"):
        Ledger.open(path, zone=ZONE)


def test_no_directory(tmp_path: Path) -> None:
    """A missing directory is named as the cause."""
    with pytest.raises(LedgerUnavailableError, match="No such file or directory"):
        Ledger.open(tmp_path / "nowhere" / "ledger.sqlite", zone=ZONE)


def test_not_sqlite(path: Path) -> None:
    """A file that is no database is refused, by writer and verifier."""
    path.write_bytes(b"no ledger" * 1000)
    path.chmod(0o600)

    with pytest.raises(LedgerUnavailableError, match="no SQLite file"):
        Ledger.open(path, zone=ZONE)
    with pytest.raises(LedgerCorruptError, match="not a database"):
        verify(path)


def test_damaged_tail(whole: Path, tmp_path: Path) -> None:
    """A start refuses a chain that was broken since the last start, and names the entry."""
    copy = copy_of(whole, tmp_path)
    with closing(sqlite3.connect(copy)) as database, database:
        database.execute("UPDATE entries SET body = replace(body, 'ada', 'eve') WHERE seq = 17")

    with pytest.raises(LedgerCorruptError) as caught:
        Ledger.open(copy, zone=ZONE)
    assert caught.value.entry == 17


def test_reopen(path: Path) -> None:
    """The chain goes on where it ended."""
    for _ in range(3):
        with Ledger.open(path, zone=ZONE) as ledger:
            ledger.append(START)

    assert [entry["kind"] for entry in read(path)] == ["opened", "session-start"] * 3


# --- budgets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("calls", "bytes_"), [(3, 0), (0, 101), (3, 101)], ids=["calls", "bytes", "both"])
def test_draw_beyond(ledger: Ledger, calls: int, bytes_: int) -> None:
    """A draw that does not fit takes nothing, and what still fits can be drawn."""
    budget = budget_of(ledger, calls=2, bytes_=100)

    with pytest.raises(BudgetSpentError):
        budget.draw(calls, bytes_)
    budget.draw(2, 100)
    with pytest.raises(BudgetSpentError):
        budget.draw(1, 0)


def test_negative_draw(ledger: Ledger) -> None:
    """A budget cannot be refilled."""
    with pytest.raises(ValueError, match="not negative"):
        budget_of(ledger).draw(0, -1)


def test_settled(path: Path, ledger: Ledger) -> None:
    """A settled budget gives nothing more, and is settled once."""
    budget = budget_of(ledger)
    seq = budget.settle(outcome="cancelled")

    with pytest.raises(BudgetSpentError):
        budget.draw(1, 1)
    assert budget.settle(outcome="done") == seq
    assert [entry["outcome"] for entry in read(path) if entry["kind"] == "completion"] == ["cancelled"]


def test_threads_share_a_budget(ledger: Ledger) -> None:
    """Eight threads together draw exactly the budget."""
    budget = budget_of(ledger, calls=1000, bytes_=10**9)

    def drain(_: int) -> int:
        drawn = 0
        try:
            while True:
                budget.draw(1, 7)
                drawn += 1
        except BudgetSpentError:
            return drawn

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(drain, range(8))) == 1000
    assert budget.drawn == (1000, 7000)


# --- crashes ------------------------------------------------------------------------------------------------------

#: A page and its frame's header in a -wal.
FRAME = 4096 + 24

CRASH = """
import os, sys
from pathlib import Path
from zones.ledger import *
from zones.model import *
request = EgressRequest(zone="clinic", pool="shared", person="ada")
egress = Egress(request=request, session="s1", policy_digest="", node="gpu-1", lease="l1")
allowed = Decision(allowed=True, rules=("r1",), reasons=("",), policy_digest="")
ledger = Ledger.open(Path(sys.argv[1]), zone="clinic")
decision = ledger.decided(egress, allowed)
done = ledger.intend(egress, decision=decision, calls=5, bytes_=50)
done.draw(1, 10)
done.settle(outcome="done")
open_ = ledger.intend(egress, decision=decision, calls=7, bytes_=70)
open_.draw(2, 20)
os._exit(9)
"""


OPEN_AND_CRASH = """
import os, sys
from pathlib import Path
from zones.ledger import *
Ledger.open(Path(sys.argv[1]), zone="clinic")
os._exit(9)
"""


def run(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run *code* in a fresh Python that can import this project."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_crash_between_intent_and_completion(path: Path) -> None:
    """After a crash the ledger says that at most the budget left, once, and goes on."""
    assert run(CRASH, str(path)).returncode == 9

    for _ in range(2):
        with Ledger.open(path, zone=ZONE):
            pass

    recovered = [entry for entry in read(path) if entry["kind"] == "recovered"]
    assert len(recovered) == 1
    assert recovered[0]["intent"] == 5
    assert (recovered[0]["at_most_calls"], recovered[0]["at_most_bytes"]) == (7, 70)
    assert verify(path).entries == 5 + 2 + 1


def test_crash_leaves_a_ledger_that_verifies(path: Path, tmp_path: Path) -> None:
    """What a crash left verifies as it lies, with its -wal file, and is not changed by that."""
    assert run(CRASH, str(path)).returncode == 9
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("ledger.sqlite", "ledger.sqlite-wal"):
        shutil.copy(path.parent / name, copy)
    before = {file.name: file.read_bytes() for file in copy.iterdir()}

    assert verify(copy / path.name).entries == 5

    assert {name: (copy / name).read_bytes() for name in before} == before
    assert before["ledger.sqlite-wal"]


def commits(wal: bytes) -> list[int]:
    """Return where each commit of a log ends, and where its header does."""
    return [32, *(at + FRAME for at in range(32, len(wal), FRAME) if wal[at + 4 : at + 8] != bytes(4))]


def crashed(path: Path, directory: Path, *, database: bytes, wal: bytes) -> Path:
    """Put down what a crash left."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    copy = directory / path.name
    copy.touch(0o600)
    copy.write_bytes(database)
    copy.with_name(copy.name + "-wal").write_bytes(wal)
    return copy


@pytest.mark.parametrize("sampled", [40, pytest.param(2000, marks=pytest.mark.chaos)])
def test_crash_at_any_byte(path: Path, tmp_path: Path, sampled: int) -> None:
    """Whatever was written of the -wal: what was whole is there, and what was not is named and kept."""
    assert run(CRASH, str(path)).returncode == 9
    database, wal = path.read_bytes(), path.with_name(path.name + "-wal").read_bytes()
    before = list(read(path))
    ends = commits(wal)
    chance = random.Random(11)
    edges = {at + more for at in range(32, len(wal) + 1, FRAME) for more in (-1, 0, 1, 24)}
    places = {*edges, *range(0, 33, 4), *(chance.randrange(len(wal)) for _ in range(sampled))}
    for cut in sorted(at for at in places if 0 <= at <= len(wal)):
        copy = crashed(path, tmp_path / "left", database=database, wal=wal[:cut])
        lost = cut - max([end for end in ends if end <= cut], default=0)
        if lost:
            with pytest.raises((LedgerCorruptError, LedgerUnavailableError)):
                verify(copy)
        with Ledger.open(copy, zone=ZONE) as ledger:
            repairs = ledger.repairs
        found = list(read(copy))

        assert verify(copy).entries == len(found)
        opened = [entry["kind"] for entry in found].index("opened", 1) if found[0] == before[0] else 0
        assert found[:opened] == before[:opened]
        assert found[opened]["kind"] == "opened"
        if not lost:
            assert repairs == []
            continue
        (repair,) = repairs
        (entry,) = (entry for entry in found if entry["kind"] == "repaired")
        assert entry.items() >= repair.items()
        assert (entry["seq"], entry["dropped_bytes"]) == (opened + 2, lost)
        assert (copy.parent / entry["kept"]).read_bytes() == wal[:cut]
        assert verify(copy).repairs == (opened + 2,)


def test_every_whole_commit_is_there_after_a_crash(path: Path, tmp_path: Path) -> None:
    """Cut in the middle of a commit, the ledger has all of those before, entry by entry."""
    assert run(CRASH, str(path)).returncode == 9
    database, wal = path.read_bytes(), path.with_name(path.name + "-wal").read_bytes()
    ends = commits(wal)[1:]
    held = []
    for end in ends:
        copy = crashed(path, tmp_path / "left", database=database, wal=wal[: end + 100])
        with Ledger.open(copy, zone=ZONE):
            pass
        held.append([entry["kind"] for entry in read(copy)].index("opened", 1))

    assert held[-5:] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("sampled", [40, pytest.param(2000, marks=pytest.mark.chaos)])
def test_crash_while_the_wal_is_folded(path: Path, tmp_path: Path, sampled: int) -> None:
    """Whatever was written of the database file itself, the -wal has it all still: nothing is lost."""
    assert run(CRASH, str(path)).returncode == 9
    old, wal = path.read_bytes(), path.with_name(path.name + "-wal").read_bytes()
    copy = crashed(path, tmp_path / "whole", database=old, wal=wal)
    with closing(sqlite3.connect(copy)) as other:
        other.execute("PRAGMA wal_checkpoint(FULL)")
        new = copy.read_bytes()
    chance = random.Random(12)
    for cut in [*range(0, len(new) + 1, 4096), *(chance.randrange(len(new)) for _ in range(sampled))]:
        copy = crashed(path, tmp_path / "left", database=new[:cut] + old[cut:], wal=wal)
        assert verify(copy).entries == 5
        with Ledger.open(copy, zone=ZONE) as ledger:
            assert ledger.repairs == []
        assert verify(copy).entries == 7


def test_a_wal_that_is_gone_is_named(path: Path) -> None:
    """What a crashed gateway's -wal held is lost with it: the next start says that there may have been some."""
    assert run(CRASH, str(path)).returncode == 9
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(FULL)")
        old = path.read_bytes()
    path.write_bytes(old)
    path.with_name(path.name + "-wal").unlink(missing_ok=True)
    with Ledger.open(path, zone=ZONE) as ledger:
        assert ledger.repairs == [{"kind": "repaired", "dropped_bytes": 0, "kept": "", "kept_digest": ""}]
    with Ledger.open(path, zone=ZONE) as ledger:
        assert ledger.repairs == []

    assert verify(path).repairs == (7,)


def damaged(path: Path) -> bytes:
    """Crash a gateway, and damage an early frame of its -wal; return that."""
    assert run(CRASH, str(path)).returncode == 9
    wal = path.with_name(path.name + "-wal")
    content = bytearray(wal.read_bytes())
    content[commits(bytes(content))[2] + 100] ^= 1
    wal.write_bytes(content)
    return bytes(content)


def test_damage_is_named_once(path: Path) -> None:
    """A start that crashes, and one after it, do not find again what the first one named."""
    content = damaged(path)
    for _ in range(2):
        assert run(OPEN_AND_CRASH, str(path)).returncode == 9
        assert len(verify(path).repairs) == 1
    with Ledger.open(path, zone=ZONE) as ledger:
        assert ledger.repairs == []

    (entry,) = (entry for entry in read(path) if entry["kind"] == "repaired")
    assert [file.read_bytes() for file in path.parent.glob("*-torn-*")] == [content]
    assert entry["dropped_bytes"] == len(content) - commits(content)[2]


@pytest.mark.parametrize("torn", [True, False])
def test_a_start_that_fails_changes_nothing_of_it(path: Path, *, torn: bool) -> None:
    """After a start with the wrong zone the next one says what was lost, and nothing where nothing was."""
    if torn:
        damaged(path)
    else:
        Ledger.open(path, zone=ZONE).close()
    with pytest.raises(LedgerUnavailableError, match="belongs to zone"):
        Ledger.open(path, zone="other")
    assert not verify(path).without_wal
    with Ledger.open(path, zone=ZONE) as ledger:
        assert [bool(repair["dropped_bytes"]) for repair in ledger.repairs] == [True] * torn


def test_damage_is_named_after_archiving(path: Path) -> None:
    """What archiving leaves out of a damaged -wal is kept, and the next start names it."""
    content = damaged(path)
    archive(path)
    with Ledger.open(path, zone=ZONE) as ledger:
        (repair,) = ledger.repairs

    assert (path.parent / repair["kept"]).read_bytes() == content
    assert len(verify(path).repairs) == 1


def test_damage_is_not_copied_away(path: Path, tmp_path: Path) -> None:
    """A copy of a damaged ledger would be a shorter one that verifies: there is none until a start has said so."""
    damaged(path)
    with pytest.raises(LedgerCorruptError, match="is not copied"):
        copy_ledger(path, tmp_path / "copy.sqlite")
    assert not (tmp_path / "copy.sqlite").exists()
    Ledger.open(path, zone=ZONE).close()
    copy_ledger(path, tmp_path / "copy.sqlite")
    assert len(verify(tmp_path / "copy.sqlite").repairs) == 1


def test_zeros_in_the_wal_are_damage(path: Path) -> None:
    """Frames that a power cut left empty are no frames of an earlier generation."""
    assert run(CRASH, str(path)).returncode == 9
    wal = path.with_name(path.name + "-wal")
    content = wal.read_bytes()
    wal.write_bytes(content[: -2 * FRAME] + bytes(2 * FRAME))
    with pytest.raises(LedgerCorruptError, match="of no whole commit"):
        verify(path)
    with Ledger.open(path, zone=ZONE) as ledger:
        assert [repair["dropped_bytes"] for repair in ledger.repairs] == [2 * FRAME]


# --- failures -----------------------------------------------------------------------------------------------------

FILL = """
import json, resource, sys
from pathlib import Path
from zones.errors import LedgerUnavailableError
from zones.ledger import Ledger, verify
path = Path(sys.argv[1])
ledger = Ledger.open(path, zone="clinic")
{prepare}
written = 1
try:
    for written in range(1, 10_000):
        ledger.append({{"kind": "session-start", "person": "ada", "session": "x" * 2000}})
except LedgerUnavailableError as error:
    message = error.message
head = ledger.head
report = verify(path)
assert report.head == head and report.entries == written, (report, head, written)
{after}
print(message)
"""
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
REFUSES = """
try:
    ledger.append({"kind": "session-start", "person": "ada", "session": "s"})
except LedgerUnavailableError as error:
    assert "earlier write failed" in error.message
else:
    raise SystemExit("wrote to a ledger in doubt")
"""
FREED = """
(path.parent / "ballast").unlink()
assert ledger.append({"kind": "session-start", "person": "ada", "session": "s"}) == report.entries + 1
ledger.close()
assert verify(path).entries == report.entries + 1
"""


def test_file_size_limit(path: Path) -> None:
    """A write error leaves what was written whole, and the ledger refuses to go on."""
    done = run(FILL.format(prepare=LIMIT, after=REFUSES), str(path))

    assert done.returncode == 0, done.stderr
    assert "look at the disk" in done.stdout


def on_small_disk(mount_point: Path, code: str, *, ballast_bytes: int = 0) -> subprocess.CompletedProcess[str]:
    """Run *code* with a ledger path on a 400 KiB tmpfs that only its own mount namespace sees."""
    script = (
        'mount -t tmpfs -o size=400k none "$2" && head -c "$3" /dev/zero > "$2/ballast" && exec "$0" -c "$1" "$2/l.db"'
    )
    arguments = [sys.executable, code, str(mount_point), str(ballast_bytes)]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


needs_mounts = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True, check=False).returncode
    != 0,
    reason="needs user and mount namespaces (unshare --map-root-user --mount), for a small disk and a read-only one",
)


@needs_mounts
def test_disk_full(tmp_path: Path) -> None:
    """A full disk refuses the entry by name; once there is room the same ledger goes on."""
    done = on_small_disk(tmp_path, FILL.format(prepare="", after=FREED), ballast_bytes=100_000)

    assert done.returncode == 0, done.stderr
    assert "disk is full" in done.stdout


@needs_mounts
def test_read_only(tmp_path: Path) -> None:
    """A ledger on a read-only disk is not opened, while it verifies there."""
    code = """
import subprocess, sys
from pathlib import Path
from zones.errors import LedgerUnavailableError
from zones.ledger import Ledger, verify
path = Path(sys.argv[1])
Ledger.open(path, zone="clinic").close()
{remount}
assert verify(path).entries == 1
Ledger.open(path, zone="clinic")
"""
    remount = 'subprocess.run(["mount", "-o", "remount,bind,ro", path.parent], check=True)'

    control = on_small_disk(tmp_path, code.format(remount=""))
    done = on_small_disk(tmp_path, code.format(remount=remount))

    assert control.returncode == 0, control.stderr
    assert "LedgerUnavailableError" in done.stderr
    assert "Read-only file system" in done.stderr


def test_locked_by_another_program(path: Path, ledger: Ledger) -> None:
    """While another program holds the database nothing is written; afterwards the ledger goes on."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailableError, match="another program holds"):
            ledger.append(START)
        other.execute("ROLLBACK")

    assert ledger.append(START) == 2
    assert verify(path).entries == 2


def test_foreign_row(path: Path, ledger: Ledger) -> None:
    """A row that somebody else wrote stops the ledger."""
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("INSERT INTO entries VALUES (2, '{}', '', '')")

    for _ in range(2):
        with pytest.raises(LedgerUnavailableError, match="another program wrote"):
            ledger.append(START)


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_deleted_file(path: Path, ledger: Ledger, suffix: str) -> None:
    """Entries are not written to a file that was deleted, which SQLite would do without a word."""
    path.with_name(path.name + suffix).unlink()

    with pytest.raises(LedgerUnavailableError, match="moved, replaced or deleted"):
        ledger.append(START)


def test_closed(path: Path, ledger: Ledger) -> None:
    """A closed ledger refuses entries, intents and completions."""
    budget, decision = budget_of(ledger), ledger.decided(EGRESS, ALLOWED)
    ledger.close()
    ledger.close()

    for act in (
        lambda: ledger.append(START),
        lambda: ledger.intend(EGRESS, decision=decision, calls=1, bytes_=1),
        lambda: budget.settle(outcome="done"),
    ):
        with pytest.raises(LedgerUnavailableError, match="closed"):
            act()


def test_interrupted_write(path: Path) -> None:
    """An interrupt in the middle of a write leaves no entry and no writer without an answer."""
    calls = iter([datetime.now(UTC)])

    def clock() -> datetime:
        for now in calls:
            return now
        raise KeyboardInterrupt

    with Ledger.open(path, zone=ZONE, clock=clock) as ledger:
        with pytest.raises(KeyboardInterrupt):
            ledger.append(START)
        with pytest.raises(LedgerUnavailableError, match="interrupted"):
            ledger.append(START)
    assert verify(path).entries == 1


def test_concurrent_writers(path: Path, ledger: Ledger) -> None:
    """Eight threads write at once: every entry has its own number, is on disk on return, and the chain holds."""
    start = threading.Barrier(8)

    def write(worker: int) -> list[int]:
        start.wait()
        return [ledger.append(START | {"session": f"{worker}-{i}"}) for i in range(25)]

    with ThreadPoolExecutor(8) as pool:
        numbers = {seq: worker for worker, seqs in enumerate(pool.map(write, range(8))) for seq in seqs}

    assert sorted(numbers) == list(range(2, 202))
    assert all(entry["session"].startswith(f"{numbers[entry['seq']]}-") for entry in read(path) if entry["seq"] > 1)
    assert verify(path).head == ledger.head


def test_writers_fail_together(path: Path, ledger: Ledger) -> None:
    """When a shared commit fails, each of its writers is told."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other, ThreadPoolExecutor(3) as pool:
        other.execute("BEGIN IMMEDIATE")
        writers = [pool.submit(ledger.append, START) for _ in range(3)]
        errors = [writer.exception() for writer in writers]
        other.execute("ROLLBACK")

    assert all(isinstance(error, LedgerUnavailableError) for error in errors)
    assert ledger.append(START) == 2


# --- tampering ----------------------------------------------------------------------------------------------------


def copy_of(path: Path, folder: Path) -> Path:
    """Return a plain copy of the ledger in *folder*."""
    return Path(shutil.copy(path, folder / "copy.sqlite"))


def _shift(database: sqlite3.Connection, n: int) -> None:
    """Delete row *n* and renumber what follows."""
    database.execute("DELETE FROM entries WHERE seq = ?", (n,))
    database.execute("UPDATE entries SET seq = -seq + 1 WHERE seq > ?", (n,))
    database.execute("UPDATE entries SET seq = -seq WHERE seq < 1")


def _swap(database: sqlite3.Connection, n: int) -> None:
    """Exchange rows *n* and *n* + 1."""
    database.execute("UPDATE entries SET seq = -seq WHERE seq IN (?, ?)", (n, n + 1))
    database.execute("UPDATE entries SET seq = ? + seq WHERE seq < 0", (2 * n + 1,))


def _set(sql: str) -> Callable[[sqlite3.Connection, int], None]:
    def change(database: sqlite3.Connection, n: int) -> None:
        database.execute(f"UPDATE entries SET {sql} WHERE seq = ?", (n,))

    return change


_OTHER = "FROM entries AS other WHERE other.seq = entries.seq"
TAMPER: dict[str, tuple[Callable[[sqlite3.Connection, int], object], str]] = {
    "content": (_set("""body = replace(body, '"time":"2', '"time":"3')"""), "content changed"),
    "hash": (_set("hash = substr(hash, 2) || substr(hash, 1, 1)"), "hash changed"),
    "salt": (_set("salt = substr(salt, 2) || substr(salt, 1, 1)"), "content changed"),
    "salt in capitals": (_set("salt = upper(salt)"), "content changed"),
    "cut salt": (_set("salt = substr(salt, 1, 63)"), "content changed"),
    "hash in capitals": (_set("hash = upper(hash)"), "hash changed"),
    "deleted": (lambda database, n: database.execute("DELETE FROM entries WHERE seq = ?", (n,)), "missing"),
    "deleted and renumbered": (_shift, "missing"),
    "swapped": (_swap, "reordered"),
    "repeats the one before": (
        _set(f"(body, salt, hash) = (SELECT body, salt, hash {_OTHER} - 1)"),
        "duplicated",
    ),
    "not JSON": (_set("body = replace(body, '{', '[')"), "not JSON"),
    "cut body": (_set("body = substr(body, 1, length(body) - 9)"), "truncated"),
    "cut hash": (_set("hash = substr(hash, 1, 63)"), "truncated"),
    "emptied": (_set("body = ''"), "truncated"),
    "blob": (_set("body = CAST(body AS BLOB)"), "not text"),
    "renumbered": (_set("""body = replace(body, '"seq":' || seq, '"seq":' || (seq + 3))"""), "content changed"),
}


@pytest.mark.parametrize("name", TAMPER)
def test_tampered_entry(whole: Path, tmp_path: Path, name: str) -> None:
    """Each way to tamper with each entry is found, and the entry is named with what is wrong."""
    change, what = TAMPER[name]
    for n in range(2, 40):
        copy = copy_of(whole, tmp_path)
        with closing(sqlite3.connect(copy)) as database, database:
            change(database, n)
        with pytest.raises(LedgerCorruptError, match=what) as caught:
            verify(copy)
        assert caught.value.entry == n
        copy.unlink()


def test_control_without_the_chain(whole: Path, tmp_path: Path) -> None:
    """The same change of an entry passes every check that the database itself makes: only the chain finds it."""
    copy = copy_of(whole, tmp_path)
    with closing(sqlite3.connect(copy)) as database, database:
        TAMPER["content"][0](database, 5)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (body,) = database.execute("SELECT body FROM entries WHERE seq = 5").fetchone()

    assert json.loads(body)["time"].startswith("3")
    with pytest.raises(LedgerCorruptError):
        verify(copy)


@pytest.mark.parametrize("name", ["content", "hash", "not JSON", "cut hash", "deleted"])
@pytest.mark.parametrize("n", [1, 40], ids=["first", "last"])
def test_tampered_end(whole: Path, tmp_path: Path, name: str, n: int) -> None:
    """The first entry is guarded like the others; so is the last, except from deletion."""
    copy = copy_of(whole, tmp_path)
    with closing(sqlite3.connect(copy)) as database, database:
        TAMPER[name][0](database, n)

    if (name, n) == ("deleted", 40):
        assert verify(copy).entries == 39
    else:
        with pytest.raises(LedgerCorruptError) as caught:
            verify(copy)
        assert caught.value.entry == n


def test_added_entry(whole: Path, tmp_path: Path) -> None:
    """A row added behind the last is named."""
    copy = copy_of(whole, tmp_path)
    with closing(sqlite3.connect(copy)) as database, database:
        database.execute("INSERT INTO entries SELECT 41, body, salt, hash FROM entries WHERE seq = 40")

    with pytest.raises(LedgerCorruptError, match="duplicated") as caught:
        verify(copy)
    assert caught.value.entry == 41


def test_other_zone_named(whole: Path, tmp_path: Path) -> None:
    """The first entry cannot be made to name another zone."""
    copy = copy_of(whole, tmp_path)
    with closing(sqlite3.connect(copy)) as database, database:
        database.execute("UPDATE entries SET body = replace(body, 'clinic', 'clinix') WHERE seq = 1")

    with pytest.raises(LedgerCorruptError) as caught:
        verify(copy)
    assert caught.value.entry == 1


def test_redefined_table(whole: Path, tmp_path: Path) -> None:
    """A view in place of the table is not believed, nor is an empty table."""
    copy = copy_of(whole, tmp_path)
    with closing(sqlite3.connect(copy)) as database, database:
        database.execute("ALTER TABLE entries RENAME TO hidden")
        database.execute("CREATE VIEW entries AS SELECT * FROM hidden")
    with pytest.raises(LedgerCorruptError, match="redefined"):
        verify(copy)

    copy = copy_of(whole, tmp_path)
    with closing(sqlite3.connect(copy)) as database, database:
        database.execute("DELETE FROM entries")
    with pytest.raises(LedgerCorruptError, match="empty"):
        verify(copy)


def test_read_stops_before_the_first_bad_entry(whole: Path, tmp_path: Path) -> None:
    """Reports see verified entries only."""
    copy = copy_of(whole, tmp_path)
    with closing(sqlite3.connect(copy)) as database, database:
        TAMPER["content"][0](database, 5)

    seen: list[int] = []
    with pytest.raises(LedgerCorruptError):
        seen.extend(entry["seq"] for entry in read(copy))
    entries = read(copy)
    assert [next(entries)["seq"] for _ in range(4)] == [1, 2, 3, 4]


def test_noted_head(whole: Path, tmp_path: Path) -> None:
    """Entries cut off at the end, or a rewritten chain, are found by a head noted elsewhere, and only by it."""
    noted = Head.parse(str(verify(whole).head))
    shorter = copy_of(whole, tmp_path)
    with closing(sqlite3.connect(shorter)) as database, database:
        database.execute("DELETE FROM entries WHERE seq > 30")
    rewritten = tmp_path / "rewritten.sqlite"
    with Ledger.open(rewritten, zone=ZONE) as ledger:
        for _ in range(44):
            ledger.append(START)

    assert verify(whole, expected_head=noted).head == noted
    assert verify(shorter).entries == 30
    with pytest.raises(LedgerCorruptError, match="missing") as caught:
        verify(shorter, expected_head=noted)
    assert caught.value.entry == 31
    assert verify(rewritten).entries == 45
    with pytest.raises(LedgerCorruptError, match="rewritten") as caught:
        verify(rewritten, expected_head=noted)
    assert caught.value.entry == 40


@pytest.mark.parametrize("text", ["", "1", "0:" + "a" * 64, "1:" + "A" * 64, "1:" + "a" * 63])
def test_bad_head(text: str) -> None:
    """What is not a noted head is refused."""
    with pytest.raises(ValueError, match="number:hash"):
        Head.parse(text)


# --- the file's bytes ---------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> tuple[list[dict[str, Any]], str] | int | None:
    """Return all entries and the head, or the entry that is named as not verifying."""
    try:
        return list(read(path)), verify(path).head_hash
    except LedgerCorruptError as error:
        return error.entry


def test_every_byte_of_an_entry(whole: Path, tmp_path: Path) -> None:
    """A byte flipped anywhere in a stored entry, its salt or its hash is found, and that entry is named."""
    data = whole.read_bytes()
    rows = list(read(whole))
    copy = tmp_path / "copy.sqlite"
    with closing(sqlite3.connect(whole)) as database:
        kept = [
            (salt + hash_).encode() for salt, hash_ in database.execute("SELECT salt, hash FROM entries ORDER BY seq")
        ]

    for n in (1, 3, 20, 40):
        stored = canonical(rows[n - 1]) + kept[n - 1]
        start = data.index(stored)
        assert data.count(stored) == 1
        for at in range(start, start + len(stored)):
            copy.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(LedgerCorruptError) as caught:
                verify(copy)
            assert caught.value.entry == n


def test_flips_anywhere(whole: Path, tmp_path: Path, record_testsuite_property: Callable[[str, object], None]) -> None:
    """A flip anywhere in the file is found, or has changed nothing that the ledger says."""
    data = bytearray(whole.read_bytes())
    true = fingerprint(whole)
    copy = tmp_path / "copy.sqlite"
    chance = random.Random(7)
    found = 0
    # Every byte of SQLite's header and of the table's definition at the end of the first page, then a sample.
    places = [(at, 1 << chance.randrange(8)) for at in (*range(112), *chance.choices(range(112, len(data)), k=700))]
    places += [(at, 0x80) for at in range(4096 - 160, 4096)]
    for at, flip in places:
        data[at] ^= flip
        copy.write_bytes(data)
        data[at] ^= flip
        seen = fingerprint(copy)
        if isinstance(seen, tuple):
            assert seen == true, f"byte {at}"
        else:
            found += 1
    record_testsuite_property("flips found", f"{found} of {len(places)}")
    assert found > len(places) // 2


def test_flips_in_the_wal(path: Path, tmp_path: Path) -> None:
    """A flip in the -wal beside a copy never shortens the ledger in silence."""
    assert run(CRASH, str(path)).returncode == 9
    copy = tmp_path / "copy.sqlite"
    wal_copy = tmp_path / "copy.sqlite-wal"
    data = bytearray(path.with_name(path.name + "-wal").read_bytes())
    chance = random.Random(7)
    # Every byte of the log's header and of the last frame's, then a sample.
    last = len(data) - 4096 - 24
    for at in [*range(32), *range(last, last + 24), *(chance.randrange(len(data)) for _ in range(60))]:
        shutil.copy(path, copy)
        data[at] ^= (flip := 1 << chance.randrange(8))
        wal_copy.write_bytes(data)
        data[at] ^= flip
        with pytest.raises(LedgerCorruptError):
            verify(copy)
        copy.with_name(copy.name + "-shm").unlink(missing_ok=True)

    wal_copy.write_bytes(data)
    assert verify(copy).entries == 5


def test_wal_left_over_from_an_earlier_generation(path: Path, ledger: Ledger) -> None:
    """Old frames behind the current ones are not damage."""
    for _ in range(20):
        ledger.append(START)
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(RESTART)")
    ledger.append(START)
    wal = path.with_name(path.name + "-wal").read_bytes()

    end = 32 + 3 * FRAME
    assert len(wal) > end
    assert whole_bytes(wal)[1] == 0
    assert whole_bytes(b"") == (0, 0)
    assert whole_bytes(wal[:-1])[1] == FRAME - 1
    assert whole_bytes(wal[:20]) == (0, 20)


def test_copies(path: Path, tmp_path: Path, ledger: Ledger) -> None:
    """A copy made while the gateway runs is one complete file; so is the file after a close."""
    ledger.append(START)
    head = ledger.head
    copy_ledger(path, tmp_path / "copy.sqlite")
    with pytest.raises(LedgerUnavailableError, match="new file"):
        copy_ledger(path, tmp_path / "copy.sqlite")
    ledger.append(START)
    ledger.close()
    plain = Path(shutil.copy(path, tmp_path / "plain.sqlite"))

    assert verify(tmp_path / "copy.sqlite").head == head
    assert not verify(tmp_path / "copy.sqlite").without_wal
    assert not verify(plain).without_wal
    assert (tmp_path / "copy.sqlite").stat().st_mode & 0o777 == 0o600
    assert verify(plain).entries == 3
    assert not list(tmp_path.glob("*-wal"))
    assert not list(tmp_path.glob("*-shm"))


def test_copy_without_the_wal_says_so(path: Path, tmp_path: Path, ledger: Ledger) -> None:
    """What `cp` alone takes from a running gateway lacks entries: verifying says that it may, or that it has none."""
    empty = Path(shutil.copy(path, tmp_path / "empty.sqlite"))
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(FULL)")
    ledger.append(START)
    older = Path(shutil.copy(path, tmp_path / "older.sqlite"))

    with pytest.raises(LedgerUnavailableError, match="`ray-gpu audit copy`"):
        verify(empty)
    report = verify(older)
    assert (report.entries, report.without_wal) == (1, True)
    report = verify(path)
    assert (report.entries, report.without_wal) == (2, False)
    shutil.copy(path.with_name(path.name + "-wal"), tmp_path / "older.sqlite-wal")
    report = verify(older)
    assert (report.entries, report.without_wal) == (2, False)


@pytest.mark.parametrize("content", [b"", b"no ledger"], ids=["none", "other"])
def test_what_is_no_ledger_is_not_copied(tmp_path: Path, content: bytes) -> None:
    """A missing file and one of another kind are told apart, and nothing is made of them."""
    source = tmp_path / "ledger.sqlite"
    if content:
        source.write_bytes(content)

    with pytest.raises(LedgerCorruptError if content else LedgerUnavailableError):
        copy_ledger(source, tmp_path / "copy.sqlite")
    assert not (tmp_path / "copy.sqlite").exists()


def test_verify_leaves_nothing_behind(whole: Path, tmp_path: Path) -> None:
    """Verifying a copy creates no file and changes no byte."""
    copy = copy_of(whole, tmp_path)
    verify(copy)

    assert [file.name for file in tmp_path.iterdir()] == [copy.name]
    assert copy.read_bytes() == whole.read_bytes()


def test_no_file(tmp_path: Path) -> None:
    """A missing file is not an empty ledger."""
    with pytest.raises(LedgerUnavailableError, match="no ledger file"):
        verify(tmp_path / "ledger.sqlite")


def test_verify_speed(path: Path, ledger: Ledger, record_testsuite_property: Callable[[str, object], None]) -> None:
    """Five thousand entries verify; how long that takes is reported, not asserted."""
    entry = EGRESS.fields() | {
        "kind": "decision",
        "decision": "allowed",
        "rules": ["r1"],
        "reasons": ["study approved"],
        "obligations": {},
    }
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda _: ledger.append(entry), range(5_000)))
    start = time.perf_counter()
    report = verify(path)
    record_testsuite_property("seconds to verify 5,000 entries", round(time.perf_counter() - start, 2))

    assert report.entries == 5_001
    assert report.head == ledger.head
