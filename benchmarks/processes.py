"""What processes cost: processor time and memory, as Linux counts them. Reads /proc."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: How often a process's memory is looked at while a job runs, seconds.
SAMPLE_S = 0.005
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def below(pid: int) -> list[int]:
    """Return a process and everything below it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text("ascii").split():
                found += below(int(child))
    return found


def command(pid: int) -> str:
    """Return a process's command line, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def by_role(roots: Sequence[int], roles: Mapping[str, str], rest: str) -> dict[str, list[int]]:
    """Sort the processes below *roots* into roles: part of a command line to the role's name; *rest* for all others."""
    found: dict[str, list[int]] = {role: [] for role in [*roles.values(), rest]}
    for pid in [pid for root in roots for pid in below(root)]:
        line = command(pid)
        found[next((role for part, role in roles.items() if part in line), rest)].append(pid)
    return found


def cpu_seconds(pids: Mapping[str, list[int]]) -> dict[str, float]:
    """Return the processor seconds that the living processes of each role have used, in user and kernel mode."""
    return {role: sum(_cpu_seconds(pid) for pid in members) for role, members in pids.items()}


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) * _TICK_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What some work costs: time, and processor seconds by role."""

    seconds: float
    cpu: dict[str, float]

    @property
    def total(self) -> float:
        """Processor seconds of all roles."""
        return sum(self.cpu.values())

    def per(self, count: int) -> Cost:
        """Return the cost of one of *count* equal parts."""
        return Cost(seconds=self.seconds / count, cpu={role: value / count for role, value in self.cpu.items()})


def cost(work: Callable[[], object], roles: Mapping[str, list[int]], repeats: int) -> Cost:
    """Return the median time of *work* and the average processor seconds that each role's processes used for it."""
    walls, before = [], cpu_seconds(roles)
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        walls.append(time.perf_counter() - start)
    after = cpu_seconds(roles)
    return Cost(seconds=statistics.median(walls), cpu={role: (after[role] - before[role]) / repeats for role in roles})


@dataclass(slots=True, kw_only=True)
class Memory:
    """A process's resident memory around a job, bytes. Pages of mapped files are the data, and are counted apart."""

    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    #: Most anonymous and shared memory, and most file pages, that any look found while the job ran.
    peak: int = 0
    peak_file: int = 0

    @property
    def grown(self) -> int:
        """By how much anonymous and shared memory exceeded what there was before the job."""
        return self.peak - own_bytes(self.before)


def resident(pid: int) -> dict[str, int]:
    """Return ``RssAnon``, ``RssFile``, ``RssShmem`` and ``VmHWM`` of ``/proc/<pid>/status``, bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem", "VmHWM"):
            found[name] = int(value.split()[0]) << 10
    return found


def own_bytes(status: Mapping[str, int]) -> int:
    """Return what is not the pages of files."""
    return status["RssAnon"] + status["RssShmem"]


@contextlib.contextmanager
def watch_memory(pid: int) -> Iterator[Memory]:
    """Look at a process's memory every ``SAMPLE_S`` while the context runs."""
    seen = Memory(before=resident(pid))
    done = threading.Event()

    def look() -> None:
        while not done.wait(SAMPLE_S):
            status = resident(pid)
            seen.peak = max(seen.peak, own_bytes(status))
            seen.peak_file = max(seen.peak_file, status["RssFile"])

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
        seen.after = resident(pid)
        seen.peak = max(seen.peak, own_bytes(seen.after))
        seen.peak_file = max(seen.peak_file, seen.after["RssFile"])
