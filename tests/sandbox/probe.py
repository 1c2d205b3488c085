"""Escape attempts. Run by the battery both inside a sandbox and, as positive control, outside.

``python probe.py JSON`` prints ``{"name": "done" | "refused: ..."}`` for every attempt, each made
in a process of its own. It confines itself first when a launcher prepared it. x86_64 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
TARGET: dict[str, Any] = json.loads(sys.argv[1])


def _call(number: int, *arguments: Any) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _write_in(directory: str) -> None:
    path = Path(directory) / TARGET["file_name"]
    path.write_text("escaped", encoding="ascii")


def _send(family: int, kind: int, address: Any) -> None:
    with socket.socket(family, kind) as sock:
        sock.settimeout(2)
        sock.connect(address)
        sock.send(b"escaped")


def _datagram_by_pair() -> None:
    with socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0] as sock:
        sock.sendto(b"escaped", TARGET["unix_datagram"])


def _victim_memory() -> None:
    with Path(f"/proc/{TARGET['victim']}/mem").open("rb", buffering=0) as memory:
        memory.seek(TARGET["victim_address"])
        assert memory.read(4) == b"host"


def _victim_readv() -> None:
    buffer = ctypes.create_string_buffer(4)
    local = struct.pack("QQ", ctypes.addressof(buffer), 4)
    remote = struct.pack("QQ", TARGET["victim_address"], 4)
    _call(310, ctypes.c_int(TARGET["victim"]), local, ctypes.c_ulong(1), remote, ctypes.c_ulong(1), ctypes.c_ulong(0))


def _environ_of(pid: int | str) -> None:
    if TARGET["canary"].encode() not in Path(f"/proc/{pid}/environ").read_bytes():
        raise PermissionError("no canary in it")


def _own_environment() -> None:
    if TARGET["canary"] not in str(dict(os.environ)):
        raise PermissionError("no canary in it")


def _mount() -> None:
    if _libc.mount(b"none", TARGET["mount_point"].encode(), b"tmpfs", 0, None) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    _libc.umount2(TARGET["mount_point"].encode(), 2)


def _unshare(flag: int) -> None:
    if _libc.unshare(flag) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _clone_user() -> None:
    pid = _call(56, ctypes.c_ulong(0x10000000 | signal.SIGCHLD), None, None, None, ctypes.c_ulong(0))
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _perf() -> None:
    attributes = struct.pack("IIQ", 1, 64, 0) + bytes(48)
    _call(298, attributes, ctypes.c_int(0), ctypes.c_int(-1), ctypes.c_int(-1), ctypes.c_ulong(0))


def _dumpable_again() -> None:
    if _libc.prctl(4, ctypes.c_ulong(1), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _core_limit() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if hard == 0:
        raise PermissionError("the hard limit is 0")


def _capabilities() -> None:
    sets = ctypes.create_string_buffer(24)
    _call(125, struct.pack("Ii", 0x20080522, 0), sets)
    if not any(sets.raw):
        raise PermissionError("no capability, effective, permitted or inheritable")


def _core_mask() -> None:
    path = Path("/proc/self/coredump_filter")
    if int(path.read_text(encoding="ascii"), 16) == 0:
        path.write_text("0x33", encoding="ascii")


def _open_for_writing(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY))


def _read(path: str) -> None:
    Path(path).read_bytes()


def _keyring() -> None:
    _call(250, ctypes.c_long(1), None)


ATTEMPTS: dict[str, Callable[[], object]] = {
    "write /": lambda: _write_in("/"),
    "write /usr": lambda: _write_in("/usr"),
    "write /var/tmp": lambda: _write_in("/var/tmp"),
    "write /dev/shm": lambda: _write_in("/dev/shm"),
    "write host directory": lambda: _write_in(TARGET["directory"]),
    "read /etc/passwd": lambda: _read("/etc/passwd"),
    "read host file": lambda: _read(TARGET["secret_file"]),
    "open core_pattern": lambda: _open_for_writing("/proc/sys/kernel/core_pattern"),
    "tcp": lambda: _send(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", TARGET["tcp"])),
    "udp": lambda: _send(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", TARGET["udp"])),
    "unix socket": lambda: _send(socket.AF_UNIX, socket.SOCK_STREAM, TARGET["unix"]),
    "abstract socket": lambda: _send(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + TARGET["abstract"]),
    "datagram by socketpair": _datagram_by_pair,
    "read process memory": _victim_memory,
    "process_vm_readv": _victim_readv,
    "read process environment": lambda: _environ_of(TARGET["victim"]),
    "ptrace": lambda: _call(101, ctypes.c_long(0x4206), ctypes.c_long(TARGET["victim"]), None, None),
    "signal": lambda: os.kill(TARGET["victim"], signal.SIGCONT),
    "inherited descriptor": lambda: os.read(TARGET["stray_fd"], 1),
    "launcher's environment": _own_environment,
    "user namespace": lambda: _unshare(0x10000000),
    "mount namespace": lambda: _unshare(0x20000),
    "clone user namespace": _clone_user,
    "mount": _mount,
    "keyctl": _keyring,
    "io_uring": lambda: _call(425, ctypes.c_uint(1), ctypes.create_string_buffer(120)),
    "bpf": lambda: _call(321, ctypes.c_int(0), struct.pack("IIII", 2, 4, 4, 1), ctypes.c_uint(16)),
    "perf_event_open": _perf,
    "userfaultfd": lambda: _call(323, ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK)),
    "become dumpable": _dumpable_again,
    "raise core limit": _core_limit,
    "unmask core": _core_mask,
    "capabilities": _capabilities,
    "become root": lambda: os.setuid(0),
}


def main() -> None:
    """Confine this process if a launcher prepared it, try everything, print the outcomes."""
    missing: tuple[str, ...] = ()
    if "RAY_GPU_BOUNDARY" in os.environ and not TARGET.get("bare"):
        from ray_gpu.sandbox.harden import harden_self

        missing = harden_self(kind="sandbox")
    outcomes = {name: _in_child(attempt) for name, attempt in ATTEMPTS.items()}
    kept = os.read(TARGET["kept_fd"], 4).decode() if "kept_fd" in TARGET else ""
    print(json.dumps({"outcomes": outcomes, "missing": missing, "kept": kept, "uid": os.getuid()}))  # noqa: T201 - the output


def _in_child(attempt: Callable[[], object]) -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
            text = "done"
        except BaseException as error:  # noqa: BLE001 - every failure is an outcome
            text = f"refused: {error!r}"
        with contextlib.suppress(OSError):
            os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    return text or "refused: killed"


if __name__ == "__main__":
    main()
