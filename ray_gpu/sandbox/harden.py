"""What a confined process does to itself before anything else. This module does I/O.

:func:`harden_self` is the first act of every sandbox and keeper, while the process has one
thread and has read nothing from outside. Inside bubblewrap it is the second layer; where
bubblewrap cannot work it is the only one, and the launcher has said so (``no-namespaces``).
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ray_gpu.sandbox import landlock, seccomp

#: How the launcher tells the child about its surroundings; removed by :func:`harden_self`.
VARIABLE = "RAY_GPU_BOUNDARY"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/tty")
_RANDOM = ("/dev/urandom", "/dev/random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the launcher knows and the child needs."""

    #: Paths as the child sees them.
    read: tuple[str, ...]
    write: tuple[str, ...]
    keep_fds: tuple[int, ...]
    #: Most processes and threads of the child's uid; ``None`` where those of others would count.
    processes: int | None
    #: Compiled filter; empty when libseccomp is missing.
    program: bytes
    #: Where the parent dying must be noticed by the child itself: the parent's process id.
    parent: int | None

    def encode(self) -> str:
        """Return the one value of :data:`VARIABLE`."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({**fields, "program": base64.b64encode(self.program).decode()})

    @classmethod
    def decode(cls, text: str) -> Surroundings:
        """Read :meth:`encode`'s text."""
        fields = json.loads(text)
        lists = {name: tuple(fields[name]) for name in ("read", "write", "keep_fds")}
        return cls(**{**fields, **lists, "program": base64.b64decode(fields["program"])})


def harden_self(
    *,
    kind: seccomp.Kind,
    keep_fds: Iterable[int] | None = None,
    landlock_read: Iterable[Path] | None = None,
    landlock_write: Iterable[Path] | None = None,
    allow_tcp: bool = False,
) -> tuple[str, ...]:
    """Give up, for good, what this process does not need.

    Args:
        kind: Whose system call filter to load.
        keep_fds: Descriptors to keep besides 0, 1 and 2; by default those of the launcher's profile.
        landlock_read: Trees to read; by default what the launcher shows to this process.
        landlock_write: Trees to change; by default the profile's. Nothing else stays writable.
        allow_tcp: Whether TCP stays possible where the network does.

    Returns:
        Ids of the layers that could not be put on: ``"no-landlock"``, ``"no-seccomp"``.

    Raises:
        RuntimeError: The process has threads already (they would stay outside), or uid 0 of the host.
    """
    text = os.environ.pop(VARIABLE, None)
    around = Surroundings.decode(text) if text else _unlaunched(kind)
    _check_process()
    _limit(around)
    _close_others(around.keep_fds if keep_fds is None else keep_fds)
    read = [Path(p) for p in (*around.read, *_RANDOM)] if landlock_read is None else landlock_read
    write = [Path(p) for p in (*around.write, *_DEVICES)] if landlock_write is None else landlock_write
    missing = []
    try:
        landlock.restrict(read=read, write=write, allow_tcp=allow_tcp)
    except OSError:
        missing.append("no-landlock")
    try:
        if not around.program:
            raise OSError("no filter was compiled")
        seccomp.load(around.program)
    except OSError:
        missing.append("no-seccomp")
    return tuple(missing)


def _unlaunched(kind: seccomp.Kind) -> Surroundings:
    """Return what holds for a process that no launcher prepared: it may touch nothing but its own /proc."""
    program = seccomp.compile_filter(kind) or b""
    return Surroundings(read=("/proc/self",), write=(), keep_fds=(), processes=None, program=program, parent=None)


def _check_process() -> None:
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("harden_self must come before the first thread; call it before importing numpy")
    if os.getuid() == 0 or os.geteuid() == 0:
        raise RuntimeError("no confined process runs as uid 0; give its profile a uid")


def keep_memory() -> None:
    """Give this process's memory to nobody: no core file, no crash handler, and no other process of its uid.

    For every process of ours that holds a login, a key or data. A program that it starts is open again to its uid, and
    calls this itself; the other two hold for it as well.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A core that is piped to a handler ignores the limit, and execve makes dumpable again: this
    # mask outlives both, so that such a core has no memory in it.
    with contextlib.suppress(OSError):
        Path("/proc/self/coredump_filter").write_text("0", encoding="ascii")
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option} refused; this kernel is not supported")


def _limit(around: Surroundings) -> None:
    """No core dumps, no privileges by execve, no life after the parent's."""
    if around.processes is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (around.processes, around.processes))
    keep_memory()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if around.parent is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != around.parent:
            os._exit(1)


def _close_others(keep: Iterable[int]) -> None:
    """Close every descriptor but 0, 1, 2 and *keep*."""
    low = 3
    for fd in sorted(set(keep) - {0, 1, 2}):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 20)


def main(argv: list[str]) -> None:
    """Confine this process as a cage and become the program *argv*."""
    harden_self(kind="cage", allow_tcp=True)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
