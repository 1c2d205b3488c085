"""Escape attempts by way of other processes and the kernel, and bombs. See :mod:`.probe`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.sandbox.reach import TARGET, Attempt, call

_libc = ctypes.CDLL(None, use_errno=True)
_long = ctypes.c_long


# -- other processes ----------------------------------------------------------------------------


def _memory(pid: int, *, write: bool = False) -> None:
    address = TARGET["victim_address"]
    with open(f"/proc/{pid}/mem", "r+b" if write else "rb", buffering=0) as memory:
        memory.seek(address)
        assert memory.write(b"host") == 4 if write else memory.read(4) == b"host"


def _some_memory(pid: int) -> None:
    """Read the first bytes of a process that may be written."""
    lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
    start = int(next(line for line in lines if " rw-p " in line).split("-")[0], 16)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(start)
        assert len(memory.read(64)) == 64


def _any_memory() -> None:
    others = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    for pid in set(others) - {os.getpid()}:
        with contextlib.suppress(OSError, StopIteration, OverflowError):
            _some_memory(pid)
            return
    raise PermissionError(f"none of {len(others) - 1} processes")


def _readv(number: int) -> None:
    """Read (310) or write (311) the victim's memory."""
    buffer = ctypes.create_string_buffer(b"host", 4)
    local, remote = struct.pack("QQ", ctypes.addressof(buffer), 4), struct.pack("QQ", TARGET["victim_address"], 4)
    call(number, ctypes.c_int(TARGET["victim"]), local, _long(1), remote, _long(1), _long(0))


def _descriptor_of(pid: int, numbers: Iterator[int]) -> None:
    """Take a descriptor of another process."""
    pidfd = os.pidfd_open(pid)
    problem: OSError = PermissionError("it has none")
    for number in numbers:
        try:
            os.close(call(438, ctypes.c_int(pidfd), ctypes.c_int(number), ctypes.c_int(0)))
        except OSError as error:
            problem = error if error.errno != errno.EBADF else problem
        else:
            return
    raise problem


def _environ_of(pid: int, expected: str = "=") -> None:
    if expected.encode() not in Path(f"/proc/{pid}/environ").read_bytes():
        raise PermissionError("nothing of the host's in it")


def _stray() -> None:
    """Read what whoever started this left open, or find a file or a second socket that this process did not open."""
    sockets = 0
    for fd in range(3, 1 << 10):
        with contextlib.suppress(OSError):
            mode, name = os.fstat(fd).st_mode, os.readlink(f"/proc/self/fd/{fd}")
            sockets += stat.S_ISSOCK(mode)
            if sockets > 1 or (name.startswith("/") and not name.startswith("/memfd:printed")):
                return
    os.read(TARGET["stray_fd"], 1)


def _own_environment() -> None:
    if TARGET["canary"] not in str(dict(os.environ)):
        raise PermissionError("no canary in it")


# -- the kernel ---------------------------------------------------------------------------------


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def _mount() -> None:
    point = TARGET["mount_point"].encode()
    _checked(_libc.mount(b"none", point, b"tmpfs", 0, None), "mount")
    _libc.umount2(point, 2)


def _unshare(flag: int) -> None:
    _checked(_libc.unshare(flag), "unshare")


def _clone_user() -> None:
    pid = call(56, ctypes.c_ulong(0x10000000 | signal.SIGCHLD), None, None, None, ctypes.c_ulong(0))
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _clone3_user() -> None:
    pid = call(435, struct.pack("11Q", 0x10000000, 0, 0, 0, signal.SIGCHLD, *[0] * 6), _long(88))
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _join_namespace() -> None:
    with open(f"/proc/{TARGET['victim']}/ns/ipc", "rb") as file:
        call(308, ctypes.c_int(file.fileno()), ctypes.c_int(0))


def _perf() -> None:
    attributes = struct.pack("IIQ", 1, 64, 0) + bytes(48)
    call(298, attributes, ctypes.c_int(0), ctypes.c_int(-1), ctypes.c_int(-1), ctypes.c_ulong(0))


def _shared_memory() -> None:
    _libc.shmat.restype = ctypes.c_void_p
    place = _libc.shmat(ctypes.c_int(TARGET["shm_id"]), None, 0o10000)
    if place in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "shmat")
    assert ctypes.string_at(place, 4) == b"host"


def _message_queue() -> None:
    if _libc.msgsnd(TARGET["msg_id"], struct.pack("q8s", 1, b"escaped"), ctypes.c_size_t(8), 0o4000) != 0:
        raise OSError(ctypes.get_errno(), "msgsnd")


def _semaphore() -> None:
    call(66, _long(TARGET["sem_id"]), _long(0), _long(12))  # GETVAL


def _posix_queue() -> None:
    os.close(call(240, f"{TARGET['canary']}".encode(), ctypes.c_int(os.O_RDWR), ctypes.c_int(0), None))


def _dumpable_again() -> None:
    _checked(_libc.prctl(4, ctypes.c_ulong(1), 0, 0, 0), "prctl")


def _core_limit() -> None:
    import resource

    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        raise PermissionError("the hard limit is 0")


def _leave_core() -> None:
    import resource

    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(OSError):
            os.chdir(TARGET["directory"])
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
        os.kill(os.getpid(), signal.SIGSEGV)
    if not os.WCOREDUMP(os.waitpid(pid, 0)[1]):
        raise PermissionError("the kernel wrote none")


def _core_mask() -> None:
    path = Path("/proc/self/coredump_filter")
    if int(path.read_text(encoding="ascii"), 16) == 0:
        path.write_text("0x33", encoding="ascii")


def _core_mask_by_program() -> None:
    """The same as another program, which the kernel makes dumpable again."""
    script = 'm=/proc/self/coredump_filter; read mask <$m || exit 1; [ "$mask" != 00000000 ] || echo 0x33 >$m'
    pid = os.fork()
    if pid == 0:
        os.execve("/bin/sh", ["sh", "-c", script], {})
    if status := os.waitpid(pid, 0)[1]:
        raise PermissionError(f"the program ran and failed, status {status}")


def _capabilities() -> None:
    sets = ctypes.create_string_buffer(24)
    call(125, struct.pack("Ii", 0x20080522, 0), sets)
    if not any(sets.raw):
        raise PermissionError("no capability, effective, permitted or inheritable")


# -- bombs --------------------------------------------------------------------------------------


def _fork_bomb() -> None:
    """Have a number of processes at once, of a program that is small."""
    code = (
        "import os, sys\nr, w = os.pipe()\npids = []\n"
        "try:\n  while len(pids) < int(sys.argv[1]):\n    pid = os.fork()\n"
        "    if pid == 0:\n      os.close(w); os.read(r, 1); os._exit(0)\n    pids.append(pid)\n"
        "except OSError as error: print(error)\n"
        "os.close(w)\nfor pid in pids: os.waitpid(pid, 0)\nprint(len(pids))"
    )
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(writer, 1)
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", code, str(TARGET["bomb_processes"])])
    os.close(writer)
    with os.fdopen(reader) as file:
        said = file.read().split("\n")
    os.waitpid(pid, 0)
    if said[0] != str(TARGET["bomb_processes"]):
        raise BlockingIOError(" after ".join(said[:2]))


def _memory_bomb() -> None:
    kept = [bytearray(1 << 24) for _ in range(TARGET["bomb_bytes"] >> 24)]
    assert all(kept)


def _memory_file_bomb() -> None:
    fd = os.memfd_create("bomb")
    for _ in range(TARGET["bomb_bytes"] >> 20):
        os.write(fd, bytes(1 << 20))


ATTEMPTS: dict[str, Attempt] = {
    "read process memory": ("victim_address", lambda: _memory(TARGET["victim"])),
    "write process memory": ("victim_address", lambda: _memory(TARGET["victim"], write=True)),
    "any process's memory": ("file_name", _any_memory),
    "process_vm_readv": ("victim_address", lambda: _readv(310)),
    "process_vm_writev": ("victim_address", lambda: _readv(311)),
    "read process environment": ("victim", lambda: _environ_of(TARGET["victim"], TARGET["canary"])),
    "custodian's memory": ("custodian", lambda: _some_memory(TARGET["custodian"])),
    "custodian's environment": ("custodian", lambda: _environ_of(TARGET["custodian"])),
    "keeper's memory": ("keeper", lambda: _some_memory(TARGET["keeper"])),
    "keeper's environment": ("keeper", lambda: _environ_of(TARGET["keeper"])),
    "keeper's socket": ("keeper", lambda: _descriptor_of(TARGET["keeper"], iter(range(3, 64)))),
    "other lease's memory": ("other_sandbox", lambda: _some_memory(TARGET["other_sandbox"])),
    "ptrace": ("victim", lambda: call(101, _long(0x4206), _long(TARGET["victim"]), None, None)),
    "signal": ("victim", lambda: os.kill(TARGET["victim"], signal.SIGCONT)),
    "signal by pidfd": (
        "victim", lambda: signal.pidfd_send_signal(os.pidfd_open(TARGET["victim"]), signal.SIGCONT)),
    "descriptor of another process": ("victim", lambda: _descriptor_of(TARGET["victim"], iter([0]))),
    "inherited descriptor": ("stray_fd", _stray),
    "launcher's environment": ("canary", _own_environment),
    "user namespace": ("", lambda: _unshare(0x10000000)),
    "mount namespace": ("", lambda: _unshare(0x20000)),
    "clone user namespace": ("", _clone_user),
    "clone3 user namespace": ("", _clone3_user),
    "join a namespace": ("victim", _join_namespace),
    "mount": ("mount_point", _mount),
    "new mount": ("", lambda: os.close(call(430, b"tmpfs", ctypes.c_int(0)))),
    "chroot": ("", lambda: os.chroot("/usr")),
    "keyctl": ("", lambda: call(250, _long(1), None)),
    "add_key": ("", lambda: call(248, b"user", b"escaped", b"x", _long(1), ctypes.c_int(-2))),
    "io_uring": ("", lambda: call(425, ctypes.c_uint(1), ctypes.create_string_buffer(120))),
    "bpf": ("", lambda: call(321, ctypes.c_int(0), struct.pack("IIII", 2, 4, 4, 1), ctypes.c_uint(16))),
    "perf_event_open": ("", _perf),
    "userfaultfd": ("", lambda: call(323, ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK | 1))),
    "System V shared memory": ("shm_id", _shared_memory),
    "System V semaphore": ("sem_id", _semaphore),
    "System V message queue": ("msg_id", _message_queue),
    "POSIX message queue": ("shm_id", _posix_queue),
    "become dumpable": ("", _dumpable_again),
    "raise core limit": ("", _core_limit),
    "unmask core": ("", _core_mask),
    "unmask core by a program": ("", _core_mask_by_program),
    "leave a core": ("directory", _leave_core),
    "capabilities": ("", _capabilities),
    "become root": ("", lambda: os.setuid(0)),
    "fork bomb": ("bomb_processes", _fork_bomb),
    "memory bomb": ("bomb_bytes", _memory_bomb),
    "memory bomb in a file": ("bomb_bytes", _memory_file_bomb),
}  # fmt: skip
