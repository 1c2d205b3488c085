"""The first process of a host: builds what the host sees, then reaps. Mounts file systems; needs root.

Runs as a script, without site packages, in new network, mount, UTS, IPC and PID namespaces, with a :class:`Plan`
as JSON on its standard input. It says its process id, as the machine counts, and a newline. It ends when its
standard input does, and the kernel then ends every process of the host: so nothing outlives the builder, which holds
the other end, however the builder ends.

The host's root is a tmpfs of its own, or a disk. Of the machine it shows read-only what the plan names, and nothing
else.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import TypedDict

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 1, 2, 4, 8, 32, 4096
_MNT_DETACH = 2
#: glibc has no wrapper; the number is x86_64's.
_SYS_PIVOT_ROOT = 155
#: tmpfs and their modes. Only what is used takes memory.
_TMPFS = {"dev/shm": "1777", "run": "0755"}
#: The same, but on a host's disk where it has one.
_FILES = {"tmp": "1777", "var/lib/ray-gpu": "0711"}
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {
    "dev/fd": "/proc/self/fd",
    "dev/stdin": "/proc/self/fd/0",
    "dev/stdout": "/proc/self/fd/1",
    "dev/stderr": "/proc/self/fd/2",
    "dev/ptmx": "pts/ptmx",
    "var/run": "/run",
}

_libc = ctypes.CDLL(None, use_errno=True)


class Plan(TypedDict):
    """What a host is."""

    name: str
    #: Empty directory of the machine that the root is mounted on, for this host alone.
    root: str
    #: Device of the machine, with an ext4 file system, that is the root; a tmpfs is, where this is empty.
    disk: str
    #: Paths of the machine that the host sees, read-only, in the same place.
    shown: list[str]
    #: Device files of the machine that the host may use, besides the usual ones.
    devices: list[str]
    #: Directories of control groups: path on the machine, path in the host.
    groups: dict[str, str]
    #: Files that the host begins with: absolute path, text.
    files: dict[str, str]
    #: Whether it passes packets on.
    forwards: bool


def main() -> None:
    """Build the host, say who we are, and reap until standard input ends."""
    os.umask(0o022)
    plan: Plan = json.loads(sys.stdin.buffer.readline())
    pid = os.readlink("/proc/self")  # the machine's /proc still, so the machine's number
    socket.sethostname(plan["name"])
    _build(Path(plan["root"]), plan)
    for name, value in _network_settings(plan):
        Path("/proc/sys/net", name).write_text(value, encoding="ascii")
    os.write(1, f"{pid}\n".encode("ascii"))
    _reap()


def _network_settings(plan: Plan) -> list[tuple[str, str]]:
    # Nobody else is on a link who could have the same address, and looking for one takes a second.
    settings = [("ipv6/conf/default/accept_dad", "0")]
    if plan["forwards"]:
        settings += [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")]
    return settings


def _build(root: Path, plan: Plan) -> None:
    """Make the host's root below *root*, and enter it."""
    if plan["disk"]:
        _mount(plan["disk"], root, "ext4", _MS_NOSUID)
    else:
        _mount("tmpfs", root, "tmpfs", _MS_NOSUID, "mode=0755")
    for name in ("proc", "sys", "dev/pts", "var/tmp", "var/log", "home", "root", "etc"):
        (root / name).mkdir(parents=True)
    (root / "var/tmp").chmod(0o1777)
    for name, mode in {**_TMPFS, **_FILES}.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(int(mode, 8))
        if plan["disk"] and name in _FILES:
            continue
        _mount("tmpfs", root / name, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode={mode}")
    for path in plan["shown"]:
        _show(Path(path), root)
    for name, target in _LINKS.items():
        (root / name).symlink_to(target)
    for path in [*(f"/dev/{name}" for name in _DEVICES), *plan["devices"]]:
        _bind(Path(path), _below(root, path))
    _mount("devpts", root / "dev/pts", "devpts", _MS_NOSUID | _MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    _mount("proc", root / "proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _mount("sysfs", root / "sys", "sysfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RDONLY)
    _mount("tmpfs", root / "sys/fs/cgroup", "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    for source, target in plan["groups"].items():
        _bind(Path(source), _below(root, target))
    for path, text in plan["files"].items():
        file = _below(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    _enter(root)


def _show(path: Path, root: Path) -> None:
    """Show one path of the machine in the host, read-only. A symbolic link is made anew, not followed."""
    target = _below(root, str(path))
    if path.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.readlink())
        return
    _bind(path, target)
    _mount("none", target, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def _bind(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    _mount(str(source), target, None, _MS_BIND)


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _enter(root: Path) -> None:
    """Make *root* the only root, so that the machine's files are out of reach, not only out of sight."""
    os.chdir(root)
    if _libc.syscall(_SYS_PIVOT_ROOT, b".", b".") != 0:
        _fail("pivot_root", root)
    # The old root now lies on top of the new one, and goes.
    if _libc.umount2(b".", _MNT_DETACH) != 0:
        _fail("umount", root)
    os.chdir("/")


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str = "") -> None:
    kind_bytes = None if kind is None else kind.encode()
    if _libc.mount(source.encode(), os.fsencode(target), kind_bytes, ctypes.c_ulong(flags), options.encode()) != 0:
        _fail(f"mount {kind or source}", target)


def _fail(what: str, path: Path) -> None:
    code = ctypes.get_errno()
    raise OSError(code, f"{what}: {os.strerror(code)}", str(path))


def _reap() -> None:
    """Collect whatever ends, until standard input ends."""
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(woken, select.POLLIN)
    while True:
        if any(fd == 0 for fd, _ in poll.poll()):
            return
        os.read(woken, 4096)
        _collect()


def _collect() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
