"""Becomes somebody with less, then runs a command: another uid, no user namespaces, a container's capabilities.

``python lesser.py JSON COMMAND...``, JSON being ``{"uid": int | null, "deny_userns": bool, "container": bool,
"show": [path]}``. Run by root. Nothing of the host changes: mounts and limits are this process's own, in namespaces
that end with it.

*show*: trees that the other uid must reach although they lie in a private home, where Python often is. They are
bound below an empty tmpfs at the same place, so every path stays true and nothing else of the home is shown.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_PR_CAPBSET_DROP, _LAST_CAPABILITY = 24, 63
#: What container engines leave to uid 0: chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap,
#: net_bind_service, net_raw, sys_chroot, mknod, audit_write, setfcap.
_CONTAINER = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def _mount(source: str, target: Path, kind: str | None, flags: int, options: str = "") -> None:
    words = [None if text is None else text.encode() for text in (source, str(target), kind)]
    _check(_libc.mount(*words, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def show(paths: list[Path]) -> None:
    """Make *paths* reachable for every uid, in a mount namespace of this process."""
    tops: dict[Path, list[Path]] = {}
    for path in paths:
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                tops.setdefault(parent, []).append(path)
                break
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", Path("/"), None, _MS_REC | _MS_PRIVATE)
    for top, below in tops.items():
        handles = [os.open(path, os.O_PATH) for path in below]
        _mount("tmpfs", top, "tmpfs", 0, "mode=0755,size=1m")
        for path, handle in zip(below, handles, strict=True):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
            _mount(f"/proc/self/fd/{handle}", path, None, _MS_BIND | _MS_REC)
            os.close(handle)


def deny_userns() -> None:
    """Enter a user namespace that maps every id to itself and allows no further one; a parent must write the maps."""
    ready, go = os.pipe(), os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.read(ready[0], 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{parent}/{name}").write_text("0 0 65536\n", encoding="ascii")
        os.write(go[1], b"g")
        os._exit(0)
    _check(_libc.unshare(_CLONE_NEWUSER), "unshare")
    os.write(ready[1], b"r")
    os.read(go[0], 1)
    os.waitpid(pid, 0)
    Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="ascii")


def main() -> None:
    """See the module."""
    wanted = json.loads(sys.argv[1])
    show([Path(text) for text in wanted["show"]])
    if wanted["deny_userns"]:
        deny_userns()
    if wanted["container"]:
        for capability in set(range(_LAST_CAPABILITY + 1)) - _CONTAINER:
            _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)  # higher ones than the kernel's: EINVAL
    if wanted["uid"] is not None:
        os.setgroups([])
        os.setresgid(wanted["uid"], wanted["uid"], wanted["uid"])
        os.setresuid(wanted["uid"], wanted["uid"], wanted["uid"])
    os.umask(0o022)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
