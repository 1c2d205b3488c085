"""What a Ray node runs inside its cage, and how it ends. This module does I/O and starts processes.

:mod:`ray_gpu.nodes` launches ``python -m ray_gpu.cage`` behind the boundary; this program
starts Ray and, on a zone's node, the relay, which must share PID namespace and uid with its
raylet. It imports nothing heavy: it is on the way of every start.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from ray_gpu.sandbox import boundary

#: How long Ray may take to end by itself without a cage, and the kernel to end a cage, seconds.
_STOP_TIMEOUT_S = 10.0
#: How much of a starting node's output is kept.
_LAST_WORDS_BYTES = 4096


class LastWords:
    """The end of what a node's processes say while it starts. Later nothing is kept: it is read and forgotten."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()
        self._text: bytes | None = b""
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def listen(self) -> None:
        """Begin, once the node has its end of the pipe."""
        os.close(self.write_fd)
        self._thread.start()

    def _drain(self) -> None:
        with os.fdopen(self._read_fd, "rb", 0) as pipe:
            while said := pipe.read(1 << 16):
                if self._text is not None:
                    self._text = (self._text + said)[-_LAST_WORDS_BYTES:]

    def forget(self) -> None:
        """Keep nothing from now on: Ray's workers write there as well."""
        self._text = None

    def last_line(self) -> str:
        """Return the last line of a node that has ended."""
        self._thread.join(_STOP_TIMEOUT_S)
        lines = (self._text or b"").decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else "it said nothing"


def first_processes(process: boundary.Confined) -> list[int]:
    """Return pidfds of the first process inside the cage of *process*; empty without one, or if it ended.

    bubblewrap outside ends as soon as the program inside does, the namespace a little later: only
    its first process tells when it is empty. The caller closes them, by :func:`stop`.
    """
    found = []
    if process.mode != "none":
        for pid in _children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                found.append(os.pidfd_open(pid))
    return found


def main_process(process: boundary.Confined) -> int | None:
    """Return the process id, outside, of the program in a cage; ``None`` without a cage, or when it has ended."""
    if process.mode == "none":
        return None
    # bubblewrap outside, bubblewrap as the namespace's first process, the program.
    for first in _children(process.pid):
        for program in _children(first):
            return program
    return None


def stop(process: boundary.Confined, inside: Sequence[int]) -> None:
    """End a node and everything it started, and return when all of it is gone.

    With a cage all of it dies with the first process of its PID namespace. Without, Ray is asked
    to end, then what is left of the session that *process* was started in is killed: Ray's
    processes leave its process group, but not its session.

    Args:
        process: As launched.
        inside: From :func:`first_processes`; closed.
    """
    if process.mode == "none":
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
    process.end()
    for pidfd in inside:
        select.select([pidfd], [], [], _STOP_TIMEOUT_S)
        os.close(pidfd)
    if process.mode == "none":
        for pid in _session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    return []


def _session(session: int) -> list[int]:
    """Return the processes of a session, all of which are ours."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may hold spaces; the fields after it do not.
            fields = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                found.append(int(stat.parent.name))
    return found


def run_node(session: Path, relay: Sequence[str], command: Sequence[str]) -> int:
    """Run Ray, and the relay beside it where there is one; return when either ended.

    The first program of a node. Without a relay it becomes Ray and does not return.

    Args:
        session: Directory for all that Ray writes; created, private.
        relay: The relay's command line, or nothing.
        command: ``ray start --block ...``.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (session / "spill").mkdir(parents=True, exist_ok=True)
    os.chdir(session)
    if not relay:
        os.execv(command[0], list(command))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    children = [subprocess.Popen(arguments) for arguments in (command, relay)]
    try:
        os.wait()
        return 1
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("started by ray_gpu.nodes alone: SESSION RELAY COMMAND...")
    sys.exit(run_node(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]))
