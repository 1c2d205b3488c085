"""The launcher of every confined process: sandboxes, keepers, cages. This module starts processes.

As root, bubblewrap makes the namespaces and ``setpriv`` changes to the profile's uid with no
capability left; no user namespace is involved, and uid 0 runs nothing inside but bubblewrap's own
reaper, without capabilities. Otherwise bubblewrap uses a user namespace with the launcher's one
uid. Where neither works, the process starts plainly and confines itself (:mod:`.harden`).
:func:`degradations` says which it is before anything is launched.

Everything confined dies with its launcher, whatever happens to it: bubblewrap asks the kernel for
that. The kernel means the *thread* that started it, so a thread that lasts does all starting here.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO

from ray_gpu.sandbox import bubblewrap, cgroup, seccomp
from ray_gpu.sandbox import profile as profiles
from ray_gpu.sandbox.harden import VARIABLE, Surroundings, harden_self
from ray_gpu.sandbox.profile import Profile
from ray_gpu.sandbox.survey import Mode, Survey, degradations, drop, survey
from zones.errors import SandboxLevelError

__all__ = [
    "Confined", "Profile", "Survey", "degradations", "device_hint", "gpu_devices", "harden_self",
    "kill", "launch", "launch_keeper", "launch_sandbox", "peer_uid", "survey",
]  # fmt: skip

#: What a stream of a launched process may be, as for :class:`subprocess.Popen`.
Stream = int | IO[bytes] | None

#: Caps a keeper's memory: its slots are shared with the sandbox, the rest is Python and its buffers.
KEEPER_BYTES = 2 << 30
#: A namespace is empty within milliseconds of its end, or the kernel hangs. Seconds.
_GONE_TIMEOUT_S = 10.0
#: Enters the groups whose files stand before ``--`` and becomes what stands behind it.
_ENTER = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 125; shift; done; shift; exec "$@"'
#: Of the host's /proc, what may be read where it cannot be replaced by one without other processes.
_OWN_PROC = (
    "self", "cpuinfo", "meminfo", "stat", "filesystems", "version", "devices", "driver/nvidia", "driver/nvidia-uvm",
    "sys/vm",
)  # fmt: skip


class Confined(subprocess.Popen[bytes]):
    """A launched process. Its ``pid`` is bubblewrap's, outside; killing that ends everything inside."""

    #: Its control group, if it has one.
    cgroup: cgroup.Cgroup | None = None
    #: How it is confined.
    mode: Mode = "none"

    def end(self) -> None:
        """Kill it and all that it started, wait, and remove its control group. May be repeated."""
        with contextlib.ExitStack() as closing:
            # The first process of the namespace, which is gone only when all others in it are.
            first = _children(self.pid) if self.mode != "none" and self.poll() is None else []
            for pidfd in first:
                closing.callback(os.close, pidfd)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self.mode == "none" and self.poll() is None:
                    os.killpg(self.pid, signal.SIGKILL)
            # Killed before bubblewrap, so that bubblewrap collects it; not every init does.
            for pidfd in first:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if first:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.wait(_GONE_TIMEOUT_S)
            self.kill()
            self.wait()
            for pidfd in first:
                select.select([pidfd], [], [], _GONE_TIMEOUT_S)
        if self.cgroup is not None:
            self.cgroup.remove()


def launch(
    argv: Sequence[str | Path],
    profile: Profile,
    *,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = None,
    stderr: Stream = None,
    prepare: Callable[[int], None] | None = None,
) -> Confined:
    """Start *argv* inside *profile*. Any thread may call this.

    A sandbox's or keeper's program calls :func:`harden_self` as its first act. A cage's is
    started by a program of ours that does it, since Ray does not.

    Args:
        argv: Program and arguments.
        profile: What it gets.
        stdin: As for :class:`subprocess.Popen`, and so are the others.
        stdout: See there.
        stderr: See there.
        prepare: Called with the id of a process in the new namespaces before *argv* runs. When it raises, nothing runs,
            and that is raised here. Needs bubblewrap.

    Raises:
        ValueError: The launcher is root and the profile has no uid, or uid 0.
        SandboxLevelError: There is no bubblewrap, and Python cannot be read under another uid.
        OSError: A program is missing, or the control group was refused.
    """
    found = survey()
    if found.root and not profile.uid:
        raise ValueError(f"profile {profile.name!r} needs a uid other than 0 when the launcher is root")
    if not found.python_readable:
        raise SandboxLevelError(
            f"bubblewrap cannot work here ({found.reason}) and {sys.prefix} cannot be read under another uid; "
            "make it readable, or allow bubblewrap", node="", reasons=["no-namespaces"],
        )  # fmt: skip
    group = None
    if profile.memory_bytes is not None or profile.processes is not None:
        name = f"{profile.name}-{os.urandom(4).hex()}"
        group = cgroup.create(name, memory_bytes=profile.memory_bytes, processes=profile.processes)
    try:
        with _Halt(prepare) as halt:
            process = _start(argv, profile, group, (stdin, stdout, stderr), halt.options())
            process.cgroup, process.mode = group, found.mode
            halt.release(process)
    except BaseException:
        if group is not None:
            group.remove()
        raise
    return process


class _Halt:
    """Halts a process between the making of its namespaces and its program, for *prepare*."""

    def __init__(self, prepare: Callable[[int], None] | None) -> None:
        self._prepare = prepare
        self._closing = contextlib.ExitStack()
        self._fds: tuple[int, ...] = ()

    def __enter__(self) -> _Halt:
        if self._prepare is not None:
            self._said, told = os.pipe()
            waits, self._go = os.pipe()
            self._fds = (told, waits)
            for fd in (self._said, told, waits, self._go):
                self._closing.callback(os.close, fd)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def options(self) -> tuple[tuple[str, int], ...]:
        """Return bubblewrap's options, each with its descriptor."""
        return tuple(zip(("--info-fd", "--block-fd"), self._fds, strict=False))

    def release(self, process: Confined) -> None:
        """Call *prepare*, then let the program run; end *process* when that fails."""
        if self._prepare is None:
            return
        # bubblewrap writes it in pieces, once there are namespaces. Without any it ends, and says why itself.
        said = b""
        while not said.endswith(b"}\n"):
            if select.select([self._said], [], [], 0.1)[0]:
                said += os.read(self._said, 4096)
            elif process.poll() is not None:
                return
        try:
            self._prepare(int(json.loads(said)["child-pid"]))
        except BaseException:
            process.end()
            raise
        os.write(self._go, b".")


def _children(pid: int) -> list[int]:
    """Return process descriptors of the children of *pid*."""
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
            found.append(os.pidfd_open(int(child)))
    return found


def _start(
    argv: Sequence[str | Path],
    profile: Profile,
    group: cgroup.Cgroup | None,
    streams: tuple[Stream, Stream, Stream],
    halting: tuple[tuple[str, int], ...],
) -> Confined:
    """Put the command line together, inside out: program, cage, uid, bubblewrap, group."""
    found = survey()
    around = _surroundings(profile, found.mode)
    command = [sys.executable, "-P", "-m", "ray_gpu.sandbox.harden"] if profile.kind == "cage" else []
    command = [*(drop(profile, found.capability) if found.root else []), *command, *map(str, argv)]
    fds, env = profile.keep_fds, {**profile.env, VARIABLE: around}
    stdin, stdout, stderr = streams
    with contextlib.ExitStack() as closing:
        if found.mode != "none":
            options = bubblewrap.arguments(profile, userns=found.mode == "userns")
            options += [word for option, number in halting for word in (option, str(number))]
            fd = _memory_file("\0".join([*options, "--setenv", VARIABLE, around]))
            closing.callback(os.close, fd)
            # The options go by descriptor and the environment is empty: both are readable inside.
            command = [str(found.bwrap), "--args", str(fd), "--", *command]
            fds, env = (*fds, fd, *(number for _, number in halting)), {}
        if group is not None:
            command = ["/bin/sh", "-c", _ENTER, "sh", *map(str, group.entrances()), "--", *command]
        return _on_lasting_thread(lambda: Confined(
            command, env=env, pass_fds=fds, stdin=stdin, stdout=stdout, stderr=stderr, cwd="/", start_new_session=True,
        ))  # fmt: skip


def _surroundings(profile: Profile, mode: Mode) -> str:
    """Return what the child is told, see :class:`Surroundings`."""
    plain = mode == "none"
    shown = [*profiles.SYSTEM, *profiles.SYSTEM_FILES, *profile.readable()]
    # Python lists what a package is in to find it. bubblewrap shows of it nothing but what is shown anyway.
    shown += profiles.package_roots() if profile.kind == "cage" and not plain else []
    shown += [Path("/proc") / name for name in _OWN_PROC] if plain else [Path("/proc"), Path("/dev")]
    write = [*profile.devices, *(outside if plain else inside for outside, inside in profile.bind_rw)]
    write += [] if plain else [Path(place) for place in profile.tmpfs]
    # CUDA names its threads, and gives up when it cannot. Of a process that is not dumpable only the names are open.
    write += [Path("/proc/self/task")] if profile.devices else []
    # Ray's processes do leave their group; :mod:`ray_gpu.cage` ends them otherwise.
    grouped = plain and profile.kind != "cage"
    program = seccomp.compile_filter(profile.kind, gpu=bool(profile.devices), grouped=grouped) or b""
    return Surroundings(
        read=tuple(map(str, shown)),
        write=tuple(map(str, write)),
        keep_fds=profile.keep_fds,
        processes=profile.processes if survey().counts_processes else None,
        program=program,
        parent=os.getpid() if plain else None,
    ).encode()


def _memory_file(text: str) -> int:
    fd = os.memfd_create("options", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb", closefd=False) as file:
        file.write(text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


_starts: queue.SimpleQueue[tuple[Callable[[], Confined], Future[Confined]]] = queue.SimpleQueue()
_starter: threading.Thread | None = None
_starter_lock = threading.Lock()


def _on_lasting_thread(start: Callable[[], Confined]) -> Confined:
    """Run *start* on a thread that lives as long as this process."""
    global _starter
    with _starter_lock:
        if _starter is None or not _starter.is_alive():
            _starter = threading.Thread(target=_serve_starts, name="boundary", daemon=True)
            _starter.start()
    future: Future[Confined] = Future()
    _starts.put((start, future))
    return future.result()


def _serve_starts() -> None:
    while True:
        start, future = _starts.get()
        try:
            future.set_result(start())
        except BaseException as error:  # noqa: BLE001 - belongs to the caller's thread
            future.set_exception(error)


def launch_sandbox(
    *,
    uid: int,
    memory_bytes: int,
    name: str,
    fds: tuple[int, int],
    devices: tuple[Path, ...] | None = None,
    site: Path | None = None,
) -> Confined:
    """Start one lease's sandbox: ``ray_gpu.sandbox.child`` with its socket and its shared memory.

    Args:
        uid: Of this lease alone; unused without root.
        memory_bytes: Cap on its memory.
        name: The lease.
        fds: Its end of the socket to the keeper, and the memory that it shares with the keeper.
        devices: GPU device nodes it may use; by default all of this host's.
        site: Directory of the packages that it has, of a published environment; by default this Python's own.
    """
    profile = profiles.sandbox(
        name, uid=uid, memory_bytes=memory_bytes, keep_fds=fds,
        devices=gpu_devices() if devices is None else devices, site=site,
    )  # fmt: skip
    # What Python has of the distribution's own packages is no part of a published environment either.
    python = [sys.executable] if site is None else [sys._base_executable, "-S"]  # type: ignore[attr-defined]  # CPython's
    return launch([*python, "-P", "-m", "ray_gpu.sandbox.child", *map(str, fds)], profile)


def launch_keeper(*, uid: int, name: str, control_fd: int, sandbox_fd: int, memory_fd: int) -> Confined:
    """Start one lease's keeper: ``ray_gpu.keeper`` with the custodian's and the sandbox's sockets and the memory."""
    fds = (control_fd, sandbox_fd, memory_fd)
    profile = profiles.keeper(f"{name}-keeper", uid=uid, memory_bytes=KEEPER_BYTES, keep_fds=fds)
    return launch([sys.executable, "-P", "-m", "ray_gpu.keeper", *map(str, fds)], profile)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and, when :func:`launch` started it, all that it started."""
    if isinstance(process, Confined):
        process.end()
    else:
        process.kill()
        process.wait()


def peer_uid(sock: socket.socket) -> int:
    """Return the uid of the process at the other end of a Unix socket, as it was when it connected."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def gpu_devices() -> tuple[Path, ...]:
    """Return the device nodes of every NVIDIA GPU of this host, and of its parts (MIG)."""
    nodes = [*Path("/dev").glob("nvidia*"), *Path("/dev/nvidia-caps").glob("*")]
    return tuple(sorted(path for path in nodes if path.is_char_device()))


def device_hint() -> str:
    """Return the model of this host's first GPU, or ``"numpy stand-in"``, without loading CUDA."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name == "Model" and gpu_devices():
                return value.strip()
    return "numpy stand-in"
