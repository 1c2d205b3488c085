"""The command line, against a cluster of its own: what a person sees of each command."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from ray_gpu.cli import show
from ray_gpu.state import Layout
from zones.ledger import read, verify

ROOT = Path(__file__).parents[1]
#: Rows of the volume job.
ROWS = 2000
#: Lines with one long word (a path, a hash, a list) are not folded, so that they can be copied.
UNFOLDED = re.compile(
    r"degraded: |the ledger verifies|  LC_ALL|  .*audit (?:copy|verify)|using the cluster|.*stop it with"
)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def state(small_state: Callable[[], AbstractContextManager[Path]]) -> Iterator[Path]:
    """State directory with small data sets in it, which ``up`` and ``demo`` then use."""
    with small_state() as directory:
        yield directory


@pytest.fixture(scope="module")
def run(state: Path) -> Iterator[Run]:
    """Return what runs ``ray-gpu`` in a process of its own, as nobody's terminal."""

    def run(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": str(columns), "RAY_GPU_STATE": str(state)}
        command = [sys.executable, "-c", "from ray_gpu.cli import main; main()", *arguments]
        return subprocess.run(
            command, cwd=state.parent, env=environment, capture_output=True, text=True, timeout=150, check=False
        )

    yield run
    run("down")


@pytest.fixture(scope="module")
def demo(run: Run) -> subprocess.CompletedProcess[str]:
    """A demo that starts its own cluster and stops it, 80 columns wide."""
    return run("demo", "--rows", str(ROWS))


@pytest.fixture(scope="module")
def up(demo: object, run: Run) -> subprocess.CompletedProcess[str]:
    """``ray-gpu up``, after the demo, since both use one state directory. The last test ends it."""
    return run("up")


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines of a command's output, without the spaces that fill tables."""
    return [line.rstrip() for line in done.stdout.splitlines()]


def section(done: subprocess.CompletedProcess[str], heading: str) -> list[str]:
    """Return the lines from the one that begins with *heading* to the next empty one."""
    found = lines(done)
    start = next(i for i, line in enumerate(found) if line.startswith(heading))
    return found[start : found.index("", start)]


def assert_names_stand_in(done: subprocess.CompletedProcess[str]) -> None:
    """Check that no line speaks of a GPU as if there were one, where NumPy stands in."""
    if show.missing(None)[-1] == "numpy-stand-in":
        assert [line for line in lines(done) if "GPU" in line and "numpy" not in line.lower()] == []
        assert "compute with: numpy stand-in (no GPU)" in done.stdout.replace("computes", "compute")


# -- demo -------------------------------------------------------------------------------------------


def test_demo_begins_and_ends_with_degraded(demo: subprocess.CompletedProcess[str]) -> None:
    """First and last line are the same: ``degraded:``, each reason, and the sandbox's level."""
    assert demo.returncode == 0, demo.stderr
    first, last = lines(demo)[0], lines(demo)[-1]
    ids = show.missing(None)

    assert first == last
    assert first.startswith(f"degraded: {', '.join(ids)} (sandbox level: ")
    assert "embedded-vault" in ids


def test_demo_explains_each_reason(demo: subprocess.CompletedProcess[str]) -> None:
    """Below the first line each reason has a line that says what it means."""
    explained = section(demo, "degraded:")

    for item in show.missing(None):
        assert any(line.startswith(f"  {item} ") and len(line.split()) > 4 for line in explained)


def test_demo_names_the_stand_in(demo: subprocess.CompletedProcess[str]) -> None:
    """Each line that speaks of a GPU says that NumPy stands in, where it does."""
    assert_names_stand_in(demo)


def test_demo_results_are_exact(demo: subprocess.CompletedProcess[str]) -> None:
    """Fit, score and volume are each equal to NumPy's, scikit-learn's and the local run's."""
    equal = [line for line in lines(demo) if line.startswith("equal to ")]

    for what in (
        "numpy.linalg.lstsq on the whole table",
        "scikit-learn's own, row by row",
        "NumPy's own for 1,000 rows",
    ):
        assert len([line for line in equal if what in line]) == 1
    assert len([line for line in equal if "f.local(data)" in line]) == 2


def test_demo_says_what_is_real(demo: subprocess.CompletedProcess[str]) -> None:
    """Real rows are called real, resampled ones resampled, and the volume job gives its throughput."""
    assert section(demo, "(a) Fit")[1].startswith("20,190 real person-years, 10 columns")
    assert section(demo, "(b) Score")[1].startswith("569 real rows, 30 columns")
    heading, result, *_ = section(demo, "(c) Volume")
    assert heading == f"(c) Volume: the same over {ROWS:,} rows, resampled from the 569 real ones"
    assert re.match(rf"{ROWS:,} resampled rows, \d+ MB in [\d.]+ s: \d+ MB/s", result)


def test_demo_shows_the_refusal(demo: subprocess.CompletedProcess[str], state: Path) -> None:
    """The refusal names column, class, rule and reason, and the ledger's entry, which is that refusal."""
    shown = "\n".join(section(demo, "Refused"))

    assert "record_number (direct-identifier)" in shown
    assert "refused by rule no-direct-identifiers: direct identifiers never leave the clinic" in shown
    number = int(re.findall(r"the refusal is entry (\d+)", shown)[0])
    entry = next(entry for entry in read(Layout(state).ledger("clinic")) if entry["seq"] == number)
    assert (entry["decision"], "record_number" in entry["columns"]) == ("refused", True)


def test_demo_shows_the_processes(demo: subprocess.CompletedProcess[str]) -> None:
    """Every process that ran is named with its uid and what confines it; as root none that is confined has uid 0."""
    rows = {line.split("  ")[0].split(" (")[0]: line for line in section(demo, "Where it ran")[3:]}

    assert {"this program", "gateway", "relay", "Ray", "custodian", "keeper", "sandbox", "Vault", "supervisor"} <= {
        *rows
    }
    own = str(os.geteuid())
    for name in ("gateway", "relay", "Ray", "keeper", "sandbox"):
        uid = re.split(r"  +", rows[name])[2]
        assert (uid != "0") if own == "0" else (uid == own)
    for name in ("keeper", "sandbox"):
        assert "gpu-1, gpu-2" in rows[name]
        if "no-namespaces" not in show.missing(None):
            assert "own network, files, pids" in rows[name]


def test_demo_shows_what_left(demo: subprocess.CompletedProcess[str], state: Path) -> None:
    """The table of what left agrees with the ledger, and so do the entries below it, one by one."""
    entries = list(read(Layout(state).ledger("clinic")))
    session = entries[next(i for i, entry in enumerate(entries) if entry.get("purpose") == "demo") :]
    left = {line.split()[0]: line.split() for line in section(demo, "What left")[3:]}

    for dataset, columns, rows in (("randhie", 10, 20_190), ("breast_cancer", 30, 569)):
        intents = [entry["seq"] for entry in session if entry["kind"] == "intent" and entry["dataset"] == dataset]
        size = sum(entry["bytes"] for entry in session if entry.get("intent") in intents)
        assert left[dataset][1:3] == [str(columns), f"{rows:,}"]
        assert left[dataset][-1] == f"{size:,}"
    listed = [re.match(r" *(\d+) +\d\d:\d\d:\d\d +(\S+)", line) for line in section(demo, "A decision and an intent")]
    numbers = [(int(match[1]), match[2]) for match in listed if match]
    # The ledger is signed when the session has ended.
    ended = 1 + next(i for i, entry in enumerate(session) if entry["kind"] == "session-end")
    assert session[ended]["kind"] == "checkpoint"
    assert numbers == [(entry["seq"], entry.get("decision", entry["kind"])) for entry in session[: ended + 1]]


def test_demo_shows_receipts_and_verifies(demo: subprocess.CompletedProcess[str], state: Path) -> None:
    """Each node's receipt says what computed and at which level, and the head shown is a head of the ledger."""
    level = "strict" if "(sandbox level: strict)" in demo.stdout else "degraded"
    for node in ("gpu-1", "gpu-2"):
        (row,) = [line for line in section(demo, "What the nodes say") if line.startswith(node)]
        assert show.device() in row
        assert f" {level} " in row
    (count, head), *_ = re.findall(r"the ledger verifies: (\d+) entries, head (\S+)", demo.stdout)
    entries = verify(Layout(state).ledger("clinic"))
    assert int(count) <= entries.entries
    assert head.startswith(f"{count}:")


def test_demo_stops_what_it_started(demo: subprocess.CompletedProcess[str], state: Path) -> None:
    """It says that everything is stopped, after everything is."""
    assert "everything that this demo started is stopped" in demo.stdout
    assert str(state).encode() not in b"".join(_commands())


def _commands() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:
            continue


def test_demo_is_clean_in_a_log(demo: subprocess.CompletedProcess[str]) -> None:
    """Where nobody's terminal redraws, there is no carriage return, escape sequence or progress."""
    assert not re.search(r"[\r\x1b]", demo.stdout + demo.stderr)
    assert demo.stderr == ""


def test_demo_fits_80_columns(demo: subprocess.CompletedProcess[str]) -> None:
    """No line is longer than 80 columns, but those that can be copied, and no word of a table is broken in two."""
    assert [line for line in lines(demo) if len(line) > 80 and not UNFOLDED.match(line)] == []
    for word in (
        "research-may-send",
        "shared-admits-zones",
        "breast_cancer_resampled",
        "no-direct-identifiers",
        "session-start",
    ):
        assert re.search(rf"(^|\s){word}", demo.stdout)


# -- up and status ----------------------------------------------------------------------------------


def test_up(up: subprocess.CompletedProcess[str]) -> None:
    """It says what is weaker, what computes, how to use it from Python and how to stop it."""
    assert up.returncode == 0, up.stderr
    assert any(line.startswith("degraded: ") for line in lines(up))
    assert "with ray_gpu.attach('clinic') as zone:" in up.stdout
    assert "ray-gpu down" in up.stdout
    assert_names_stand_in(up)


def test_up_twice(up: object, run: Run) -> None:
    """A second cluster in the same directory is refused, with what to do."""
    again = run("up")

    assert again.returncode == 1
    assert "ray-gpu down" in again.stderr


def test_status(up: object, run: Run) -> None:
    """It begins with ``degraded:`` and shows nodes and processes."""
    status = run("status", columns=120)

    assert status.returncode == 0, status.stderr
    assert lines(status)[0].startswith("degraded: ")
    for word in ("gpu-1", "gpu-2", "zone-clinic", "gateway", "relay", "custodian (2)", "policy, ledger, order"):
        assert word in status.stdout
    assert_names_stand_in(status)


@pytest.mark.chaos
def test_demo_uses_a_running_cluster(up: object, run: Run) -> None:
    """A demo beside a running cluster uses it and leaves it running."""
    demo = run("demo", "--rows", str(ROWS), columns=120)

    assert demo.returncode == 0, demo.stderr
    assert "using the cluster that runs" in demo.stdout
    assert "the cluster goes on running" in demo.stdout
    assert lines(demo)[0] == lines(demo)[-1]
    assert run("status").returncode == 0


# -- audit ------------------------------------------------------------------------------------------


@pytest.fixture
def copy(up: object, run: Run, tmp_path: Path) -> Path:
    """A copy of the running cluster's ledger."""
    path = tmp_path / "copy.sqlite"
    done = run("audit", "copy", str(path))
    assert done.returncode == 0, done.stderr
    return path


def test_copy_holds_all_entries(copy: Path, state: Path, run: Run) -> None:
    """The copy has what the running ledger has, unlike what ``cp`` makes of it; a file that exists stays as it is."""
    ledger = Layout(state).ledger("clinic")
    plain = Path(shutil.copy(ledger, copy.with_name("plain.sqlite")))

    assert list(read(copy)) == list(read(ledger))
    again, warned, told = (
        run("audit", *arguments) for arguments in (["copy", str(copy)], ["verify", str(plain)], ["verify", str(copy)])
    )

    assert (again.returncode, "name a new file" in again.stderr) == (2, True)
    assert "`ray-gpu audit copy`" in warned.stderr
    assert "audit copy" not in told.stderr


def test_verify(copy: Path, run: Run) -> None:
    """An unchanged copy verifies."""
    done = run("audit", "verify", str(copy))

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("verifies: zone clinic, ")


def test_verify_names_the_changed_entry(copy: Path, run: Run) -> None:
    """One byte changed in a copy: it does not verify, and the entry whose byte it was is named."""
    refusal = next(entry for entry in read(copy) if entry.get("decision") == "refused")
    with closing(sqlite3.connect(copy)) as database:
        (body,) = database.execute("SELECT body FROM entries WHERE seq = ?", (refusal["seq"],)).fetchone()
    content = bytearray(copy.read_bytes())
    at = content.index(body.encode()) + body.index("record_number")
    content[at] ^= 1
    copy.write_bytes(content)

    done = run("audit", "verify", str(copy))

    assert done.returncode == 1
    assert done.stderr.startswith(f"broken: ledger entry {refusal['seq']} does not verify: content changed")
    assert "Traceback" not in done.stderr


def test_log_shows_what_is_before_the_damage(copy: Path, run: Run) -> None:
    """A damaged ledger is shown up to the entry before the damage, and the damage is named."""
    damaged = copy.read_bytes().replace(b'"rows":569', b'"rows":568', 1)
    copy.write_bytes(damaged)
    number = int(re.findall(r"ledger entry (\d+)", run("audit", "verify", str(copy)).stderr)[0])

    done = run("audit", "log", str(copy), "--last", "1")

    assert done.returncode == 1
    assert lines(done)[-1].split()[0] == str(number - 1)
    assert f"ledger entry {number} " in done.stderr


def test_verify_with_a_head_noted_earlier(copy: Path, run: Run) -> None:
    """A head that the ledger does not reach tells that its end was cut off; text that is no head is refused."""
    report = verify(copy)

    cut = run("audit", "verify", str(copy), "--head", f"{report.entries + 5}:{report.head_hash}")
    nonsense = run("audit", "verify", str(copy), "--head", "yesterday")

    assert (cut.returncode, nonsense.returncode) == (1, 2)
    assert f"ledger entry {report.entries + 1} " in cut.stderr
    assert "number:hash" in nonsense.stderr


# -- what goes wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["status", "--state", "none"], 1, "start it with ray-gpu up"),
        (["down", "--state", "none"], 0, "nothing runs"),
        (["audit", "verify", "--state", "none"], 2, "there is no ledger file"),
        (["audit", "copy", "--state", "none", "copy.sqlite"], 2, "there is no ledger file"),
        (["audit", "log", "none.sqlite"], 2, "there is no ledger file"),
        (["up", "--state", "none", "--zone", "clinik"], 1, "did you mean 'clinic'?"),
        (["up", "--state", "none", "--zone", "../clinic"], 2, "must be 1 to 40"),
        (["demo", "--rows", "1"], 2, "--rows"),
        (["frobnicate"], 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_tells_what_to_do(arguments: list[str], status: int, told: str, run: Run) -> None:
    """What cannot be done is said in a line or two, with an exit status, and never as a traceback."""
    done = run(*arguments)

    assert done.returncode == status
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_every_command(run: Run) -> None:
    """``--help`` shows each command with a line about it."""
    done = run("--help")

    for command in ("up", "down", "status", "demo", "audit"):
        assert re.search(rf"\b{command} +\w+", done.stdout)


def test_down(up: object, run: Run, state: Path) -> None:
    """It ends everything, and says so; the second time there is nothing to end. The last test."""
    first, second = run("down"), run("down")

    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout.startswith("down: ")
    assert second.stdout.startswith("nothing runs: ")
    assert str(state).encode() not in b"".join(_commands())
