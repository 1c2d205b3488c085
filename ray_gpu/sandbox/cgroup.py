"""Memory and process caps by control groups, version 1 or 2. This module does I/O.

Groups live in ``<mount>/ray-gpu/``, one directory per launch, removed when its processes are
gone. Never RLIMIT_AS: it counts address space, and CUDA reserves more of that than there is memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PARENT = "ray-gpu"
_POLL_S = 0.005
#: An empty group younger than this may be about to be entered. Seconds.
_LEFT_BEHIND_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """Where groups can be made on this host."""

    version: int
    #: Directory that holds our groups with the memory controller.
    memory: Path
    #: The same for the pids controller; equal to *memory* with version 2, ``None`` when missing.
    pids: Path | None
    #: Whether a group can be kept out of swap.
    swap_control: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    """The group of one launched process and all that it starts."""

    version: int
    #: Its directories, memory first.
    directories: tuple[Path, ...]

    def entrances(self) -> tuple[Path, ...]:
        """Return the files that a process writes its id to in order to enter."""
        return tuple(directory / "cgroup.procs" for directory in self.directories)

    def oom_kills(self) -> int:
        """Return how many processes the kernel killed because the group was at its cap."""
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        for line in (self.directories[0] / name).read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def processes(self) -> list[int]:
        """Return the ids of the group's processes."""
        with contextlib.suppress(FileNotFoundError):
            return [int(line) for line in self.entrances()[0].read_text(encoding="ascii").split()]
        return []

    def remove(self, *, timeout_s: float = 5.0) -> bool:
        """Kill what is left in the group and remove it; return whether it is gone."""
        deadline = time.monotonic() + timeout_s
        while members := self.processes():
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        gone = [_remove_directory(directory, deadline) for directory in self.directories]
        return all(gone)


def create(name: str, *, memory_bytes: int | None, processes: int | None) -> Cgroup | None:
    """Make a group with these caps, or return ``None`` where the host has none to give.

    Raises:
        OSError: The host has groups but refused this one.
    """
    found = hierarchy()
    if found is None:
        return None
    memory = found.memory / name
    memory.mkdir()
    if memory_bytes is not None:
        _cap_memory(found, memory, memory_bytes)
    directories = [memory]
    if processes is not None and found.pids is not None:
        pids = found.pids / name
        pids.mkdir(exist_ok=True)
        _write(pids / "pids.max", processes)
        directories = list(dict.fromkeys([memory, pids]))
    return Cgroup(version=found.version, directories=tuple(directories))


def _cap_memory(found: Hierarchy, directory: Path, memory_bytes: int) -> None:
    if found.version == 2:
        _write(directory / "memory.max", memory_bytes)
        with contextlib.suppress(FileNotFoundError):
            _write(directory / "memory.oom.group", 1)
        if found.swap_control:
            _write(directory / "memory.swap.max", 0)
        return
    _write(directory / "memory.limit_in_bytes", memory_bytes)
    _write(directory / "memory.swappiness", 0)
    if found.swap_control:
        # Memory and swap together: as much as memory alone, so no swap.
        _write(directory / "memory.memsw.limit_in_bytes", memory_bytes)


@functools.cache
def hierarchy() -> Hierarchy | None:
    """Return where groups can be made, found out by making the parent group, or ``None``."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    for _, where, kind, options, *_ in mounts:
        with contextlib.suppress(OSError):
            if kind == "cgroup2" and "memory" in (Path(where) / "cgroup.controllers").read_text().split():
                return _version2(Path(where))
            if kind == "cgroup" and "memory" in options.split(","):
                pids = [Path(m[1]) for m in mounts if m[2] == "cgroup" and "pids" in m[3].split(",")]
                return _version1(Path(where), pids)
    return None


def _version1(memory: Path, pids: list[Path]) -> Hierarchy:
    parents = [mount / _PARENT for mount in (memory, *pids[:1])]
    for parent in parents:
        _make_parent(parent)
    return Hierarchy(
        version=1,
        memory=parents[0],
        pids=parents[1] if pids else None,
        swap_control=(parents[0] / "memory.memsw.limit_in_bytes").exists(),
    )


def _version2(mount: Path) -> Hierarchy:
    parent = mount / _PARENT
    _make_parent(parent)
    for directory in (mount, parent):
        _write(directory / "cgroup.subtree_control", "+memory +pids")
    probe = parent / f"probe-{os.getpid()}"
    probe.mkdir()
    try:
        return Hierarchy(version=2, memory=parent, pids=parent, swap_control=(probe / "memory.swap.max").exists())
    finally:
        probe.rmdir()


def _make_parent(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"{directory} belongs to somebody else")
    sweep(directory, older_than_s=_LEFT_BEHIND_S)


def sweep(parent: Path, *, older_than_s: float) -> None:
    """Remove the empty groups below *parent* that a launcher which was killed has left behind."""
    for directory in parent.iterdir():
        with contextlib.suppress(OSError):  # busy: in use
            if directory.is_dir() and time.time() - directory.stat().st_mtime > older_than_s:
                directory.rmdir()


def _write(path: Path, value: int | str) -> None:
    # Not write_text: control files have no O_CREAT or O_TRUNC.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode("ascii"))
    finally:
        os.close(fd)


def _remove_directory(directory: Path, deadline: float) -> bool:
    """Remove an empty group; the kernel says "busy" for a moment after the last process has left."""
    while True:
        try:
            directory.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        else:
            return True
