"""Disks of a test bed's hosts: ext4 in a file of the machine, by a loop device. Starts programs; needs root.

A host's disk can be looked at when the host has ended: the file then has every block that was ever written.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from zones.errors import ClusterError

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
#: The kernel writes back what is left when the last process of a host has ended. Seconds.
_RELEASE_TIMEOUT_S = 30.0


def lacking() -> str:
    """Return what this machine lacks for disks, as one sentence, or ``""``."""
    missing = [name for name in ("mkfs.ext4", "losetup") if shutil.which(name, path=_SYSTEM_PATH) is None]
    if missing:
        return f"a host's disk needs {', '.join(missing)}: run scripts/testbed.sh, which installs e2fsprogs and mount"
    if not Path("/dev/loop-control").exists():
        return "a host's disk needs loop devices: load the kernel's loop module, or let this container have /dev/loop*"
    return ""


def make(image: Path, size_bytes: int) -> None:
    """Make an empty disk. Only what is written takes room on the machine's."""
    with image.open("wb") as file:
        file.truncate(size_bytes)
    _run("mkfs.ext4", "-q", "-F", str(image))


def attach(image: Path) -> str:
    """Return the device of a disk."""
    return _run("losetup", "--find", "--show", str(image)).strip()


def release(device: str) -> None:
    """Let a device go: at once, or as soon as it is mounted nowhere any more, whoever is killed until then."""
    _run("losetup", "--detach", device)


def await_released(image: Path) -> None:
    """Return when a disk's host has unmounted it.

    Raises:
        ClusterError: It is mounted still.
    """
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while _run("losetup", "--associated", str(image)):
        if time.monotonic() > deadline:
            raise ClusterError(f"{image} is in use still; end its host first", node="", reason="busy disk")
        time.sleep(0.02)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": _SYSTEM_PATH})
    if done.returncode != 0:
        reason = done.stderr.strip()[-300:]
        raise ClusterError(f"{command[0]} failed: {reason}; is this root, with loop devices?", node="", reason=reason)
    return done.stdout
