"""Services that outlive the command that starts them: supervisors in the background. Starts and ends processes.

A service is a module that is run as ``python -m MODULE ARGUMENT FDS`` and hands both to
:func:`serve`. On the first of ``FDS`` it reports, one JSON map a line: ``say`` while it starts, then
``ready`` or ``failed``. The second, where there is one, is tied to whoever started it: when that process
has ended, however, the service ends too. What it is and how it does stands in its state file; whoever
holds a lock on the state file's directory is the one that runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ray_gpu.sandbox import harden
from ray_gpu.sandbox import profile as profiles
from zones.errors import ClusterError, ZoneError

STOP_TIMEOUT_S = 30.0
#: How often a service that runs looks whether all its parts do, seconds.
_CHECK_INTERVAL_S = 0.5

#: Services that this process started and must reap.
_started: dict[int, subprocess.Popen[bytes]] = {}


class Service(Protocol):
    """What :func:`serve` runs."""

    #: Where its process id and condition stand.
    state_file: Path

    def start(self) -> dict[str, Any]:
        """Start everything; return its condition, JSON types."""

    def check(self) -> None:
        """Raise :class:`~zones.errors.ClusterError` if a part has ended."""

    def stop(self) -> None:
        """End everything that was started."""


def plain_environment() -> dict[str, str]:
    """Return the environment of our own unconfined processes: nothing of the caller's but its time zone and PATH."""
    return {**profiles.python_env(), **{name: os.environ[name] for name in ("PATH", "TZ") if name in os.environ}}


def write_private(path: Path, document: dict[str, Any]) -> None:
    """Write JSON that only we can read; readers see all of it or what was there before."""
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump(document, file)
    os.replace(partial, path)


def running(state_file: Path, module: str) -> dict[str, Any] | None:
    """Return the condition of the service with this state file, if it runs."""
    try:
        document: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
        command = Path(f"/proc/{document['pid']}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError):
        return None
    return document if module.encode() in command.split(b"\0") else None


def launch(module: str, argument: str, *, log: Path, say: Callable[[str], None], tied: bool = False) -> dict[str, Any]:
    """Start a service and return its condition once it serves.

    Args:
        module: What to run.
        argument: For the module; visible in the list of processes, so no secret.
        log: Where its output goes; made private.
        say: Is told what it does meanwhile.
        tied: Whether it ends with this process, also when that is killed.

    Raises:
        ClusterError: It did not come up; nothing is left running.
    """
    read_fd, write_fd = os.pipe()
    theirs = [write_fd]
    if tied:
        # The other end is this process's alone, and nothing but its end closes it.
        life, _ = os.pipe()
        theirs.append(life)
    with log.open("ab") as output:
        log.chmod(0o600)
        process = subprocess.Popen(
            [sys.executable, "-m", module, argument, ",".join(map(str, theirs))],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=plain_environment(),
            start_new_session=True,
        )
    for fd in theirs:
        os.close(fd)
    try:
        with os.fdopen(read_fd, encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                if "say" in message:
                    say(message["say"])
                elif "ready" in message:
                    ready: dict[str, Any] = message["ready"]
                    _started[process.pid] = process
                    return ready
                else:
                    raise ClusterError(message["failed"], node="", reason="start")
    except BaseException:
        _started[process.pid] = process
        terminate(process.pid)
        raise
    process.wait()
    raise ClusterError(f"{module} ended while starting; see {log}", node="", reason="ended")


def reap() -> None:
    """Collect services of ours that somebody else ended."""
    for pid in [pid for pid, child in _started.items() if child.poll() is not None]:
        del _started[pid]


def await_end(pid: int, timeout_s: float) -> bool:
    """Wait until a service has ended by itself; tell whether it did."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], timeout_s)[0])
    finally:
        os.close(handle)


def terminate(pid: int) -> None:
    """End a service, and return when it is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not select.select([handle], [], [], STOP_TIMEOUT_S)[0]:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], STOP_TIMEOUT_S)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)
        if child := _started.pop(pid, None):
            child.wait(STOP_TIMEOUT_S)


def stop(state_file: Path, module: str) -> bool:
    """End the service with this state file; tell whether it ran. Returns when everything of it is gone."""
    reap()
    document = running(state_file, module)
    if document is None:
        return False
    terminate(int(document["pid"]))
    state_file.unlink(missing_ok=True)
    return True


class _Told(BaseException):
    """SIGTERM came."""


def serve(make: Callable[[Callable[[str], None]], Service], fds: str) -> int:
    """Run a service until SIGTERM comes, a part of it ends, or whoever it is tied to; return the exit status.

    Args:
        make: Returns the service; is given what tells the starter what happens.
        fds: Descriptors that :func:`launch` passed, as it passed them.
    """
    report_fd, *life = (int(fd) for fd in fds.split(","))
    report = os.fdopen(report_fd, "w", encoding="utf-8")

    def tell(message: dict[str, Any]) -> None:
        try:
            report.write(json.dumps(message) + "\n")
            report.flush()
        except OSError:
            # Whoever wanted this is gone before it is up, and knows nothing of it.
            raise _Told from None

    def told(*_: object) -> None:
        raise _Told

    # It holds logins, whatever the limits of whoever started this.
    harden.keep_memory()
    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    service: Service | None = None
    try:
        service = make(lambda text: tell({"say": text}))
        lock = _lock(service.state_file.parent)
    except (ZoneError, OSError) as error:
        tell({"failed": getattr(error, "message", str(error))})
        return 1
    try:
        write_private(service.state_file, {"pid": os.getpid()})
        document = {"pid": os.getpid(), **service.start()}
        write_private(service.state_file, document)
        tell({"ready": document})
        report.close()
        tie = select.poll()
        for fd in life:
            tie.register(fd, select.POLLIN)
        while not tie.poll(_CHECK_INTERVAL_S * 1000):
            service.check()
        return 0
    except _Told:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not report.closed:
            with contextlib.suppress(_Told):
                tell({"failed": "it was stopped while it started; start it again"})
        return 0
    except Exception as error:  # noqa: BLE001 - told to whoever started this, and logged
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        traceback.print_exc()
        if not report.closed:
            with contextlib.suppress(_Told):
                tell({"failed": str(error)})
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        service.stop()
        service.state_file.unlink(missing_ok=True)
        os.close(lock)


def _lock(directory: Path) -> int:
    """Keep a directory for this process, as long as the descriptor is open.

    Raises:
        ClusterError: Another service has it.
    """
    lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ClusterError(
            f"something runs in {directory} already; use it, or stop it first", node="", reason="running"
        ) from None
    return lock
