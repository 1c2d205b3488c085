"""The benchmark runs, and its report says all that it should. Whether a number is good is never asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: It starts two clusters: half a minute.
pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a quick run."""
    path = tmp_path_factory.mktemp("bench") / "report.md"
    port = os.environ.get("RAY_GPU_TEST_PORT", "0")
    command = [sys.executable, "-m", "benchmarks", "--quick", f"--report={path}", f"--base-port={port}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)

    assert run.returncode == 0, run.stderr[-4000:]
    return path.read_text(encoding="utf-8")


def _rows(report: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    lines = report[report.index(f"{heading}") :].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table[2:]


def test_targets(report: str) -> None:
    """Every measured promise has a row with its target and what was found."""
    rows = _rows(report, "## Targets")

    sizes = [f"shards of {size} MiB" for size in (1, 4, 16)]
    assert [row[0].partition("`, ")[0] for row in rows[1:10]] == ["`none"] * 3 + ["`blocks(16)"] * 3 + ["`rows"] * 3
    assert [size for row in rows[1:10] for size in sizes if size in row[0]] == sizes * 3
    assert rows[0][0].startswith("call of 1,024 bytes")
    assert [row[0] for row in rows[10:]] == ["attach to first result", "memory of the gateway above the data"]
    assert all(row[1] and row[2] for row in rows)


@pytest.mark.parametrize(
    ("heading", "least"),
    [
        ("## A call of", 2),
        ("### Where the time of a call goes", 12),
        ("### Processor time of a call", 2),
        ("## The volume job", 15),
        ("### Processor time of the volume job", 5),
        ("### Where the processor time of the volume job goes", 14),
        ("## Memory of the gateway", 3),
        ("## Where to run", 20),
    ],
)
def test_tables(report: str, heading: str, least: int) -> None:
    """Every table is there and complete."""
    rows = _rows(report, heading)

    assert len(rows) >= least
    assert len({len(row) for row in rows}) == 1


def test_machine(report: str) -> None:
    """The report names the machine, the versions and the load that the numbers depend on."""
    names = [row[0] for row in _rows(report, "# Benchmarks")]

    assert names == [
        "date",
        "processor",
        "memory",
        "kernel",
        "versions",
        "load before the run",
        "user",
        "sandboxes",
    ]
