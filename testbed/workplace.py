"""The test bed's directory on the machine, and its control groups: made, removed, and swept after a kill.

Everything else of a bed lives in namespaces, which vanish with their last process. What is left of a bed whose
builder was killed is known by its name and by its lock, which nobody holds any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "ray-gpu-testbed-"
_LOCK = "lock"
#: A directory without a lock may be about to get one. Seconds.
_UNLOCKED_S = 60.0
#: The kernel calls a group busy for a moment after its last process has ended. Seconds.
_BUSY_S = 5.0
_GROUPS = Path("/sys/fs/cgroup")


class Workplace:
    """The directory of one bed, locked for as long as its builder lives."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / "root").mkdir()

    def groups(self, host: str) -> dict[str, str]:
        """Make control groups for one host, and return their directories: on the machine, and in the host.

        A host sees its own alone: process ids and names in another's would mean nothing to it.
        """
        made = {}
        for mount in _hierarchies():
            directory = mount / self.path.name / host
            directory.mkdir(parents=True, exist_ok=True)
            if (mount / "cgroup.subtree_control").exists():
                for parent in (mount, mount / self.path.name):
                    (parent / "cgroup.subtree_control").write_text("+memory +pids", encoding="ascii")
            made[str(directory)] = str(mount)
        return made

    def remove(self) -> None:
        """Remove directory and groups. The bed's processes must be gone."""
        deadline = time.monotonic() + _BUSY_S
        while not _remove(self.path) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.close(self._lock)


def sweep() -> list[str]:
    """Remove what beds whose builder was killed have left, and return their names. Others' things stay."""
    return [path.name for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*") if _abandoned(path) and _remove(path)]


def _abandoned(path: Path) -> bool:
    try:
        if path.is_symlink() or path.stat().st_uid != os.geteuid():
            return False
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return path.is_dir() and time.time() - path.stat().st_mtime > _UNLOCKED_S
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _remove(path: Path) -> bool:
    """Remove groups, then the directory that they are known by; return whether both are gone."""
    tops = [mount / path.name for mount in _hierarchies()]
    for top in tops:
        # The kernel's own files in them cannot be removed and need not be.
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
    if any(top.exists() for top in tops):
        return False
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def _hierarchies() -> list[Path]:
    """Return where the machine's control groups for memory and processes are: version 2, or each of version 1."""
    found = []
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, options, *_ = line.split()
        mount = Path(where)
        if not mount.is_relative_to(_GROUPS) or not os.access(mount, os.W_OK):
            continue
        if kind == "cgroup" and {"memory", "pids"} & set(options.split(",")):
            found.append(mount)
        if kind == "cgroup2" and "memory" in (mount / "cgroup.controllers").read_text(encoding="ascii").split():
            found.append(mount)
    return found
