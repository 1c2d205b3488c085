"""Says what every process of a host is, has in its environment, and is confined by. Runs inside a host, as a script.

Prints a JSON list. Of the standard library alone, as root.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import sys
from pathlib import Path
from typing import Any

_SYS_PIDFD_GETFD, _SIOCGSKNS = 438, 0x894C
#: Namespaces that a cage has of its own.
NAMESPACES = ("pid", "mnt", "ipc", "net")


def describe(process: Path) -> dict[str, Any]:
    """Describe one process."""
    lines = (process / "status").read_text(encoding="utf-8").splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    environment = (process / "environ").read_bytes().decode("utf-8", "replace").split("\0")
    mounts = (process / "mountinfo").read_text(encoding="utf-8").splitlines()
    return {
        "pid": int(process.name),
        "command": (process / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"),
        "environment": dict(item.split("=", 1) for item in environment if "=" in item),
        "uid": int(status["Uid"][1]),
        "no_new_privs": int(status["NoNewPrivs"][0]),
        "capabilities": int(status["CapEff"][0], 16),
        "own": [kind for kind in NAMESPACES if namespace(process, kind) != namespace(Path("/proc/1"), kind)],
        "sockets_of_another_network": other_sockets(process),
        "tmpfs": [line.split()[4] for line in mounts if " - tmpfs " in line],
    }


def other_sockets(process: Path) -> int:
    """Return how many sockets a process has that were made in another network than its own."""
    found, own = 0, os.stat(process / "ns" / "net").st_ino
    pidfd = os.pidfd_open(int(process.name))
    for entry in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            if not os.readlink(entry).startswith("socket:"):
                continue
            copy = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, pidfd, int(entry.name), 0)
            if copy < 0:
                raise OSError(ctypes.get_errno(), "the process, or its descriptor, is gone")
            network = fcntl.ioctl(copy, _SIOCGSKNS)
            found += os.fstat(network).st_ino != own
            os.close(network)
            os.close(copy)
    os.close(pidfd)
    return found


def namespace(process: Path, kind: str) -> str:
    """Return which namespace of a kind a process is in."""
    return os.readlink(process / "ns" / kind)


def main() -> None:
    """Describe every process that is still there when it is its turn."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append(describe(process))
        except OSError:
            continue
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
