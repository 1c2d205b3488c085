"""What escape attempts lead to: files, listeners, System V objects and a process, as the target that a probe is given.

Somebody answers at the clouds' address for credentials where :func:`own_network` was called before.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.sandbox.reach import DGRAM, INET, INET6, METADATA, STREAM, call

VICTIM = """
import ctypes, os, sys
secret = ctypes.create_string_buffer(b"host memory")
if len(sys.argv) > 1:
    os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
    ctypes.CDLL(None).prctl(4, ctypes.c_ulong(1), 0, 0, 0)
print(ctypes.addressof(secret), flush=True)
sys.stdin.read()
"""
#: Least number of a descriptor that whoever starts programs left open: beyond those that a sandbox opens itself.
STRAY_FD = 200
_EVERYONE = 0o666
_IPC_CREAT, _IPC_RMID = 0o1000, 0
_SIOCSIFFLAGS, _SIOCSIFADDR, _UP = 0x8914, 0x8916, 1


def own_network() -> None:
    """Enter a network with a loopback interface alone, which has the clouds' address too. Needs root."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(INET, DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _UP))
        address = struct.pack("16sHH4s8x", b"lo:1", INET, 0, socket.inet_aton(METADATA))
        fcntl.ioctl(sock, _SIOCSIFADDR, address + bytes(8))


class Bait(contextlib.ExitStack):
    """All of it, in *directory*, which is made passable for everyone. Gone with the ``with`` statement."""

    def __init__(self, directory: Path, canary: str, *, victim_uid: int | None = None) -> None:
        super().__init__()
        self._listeners: list[socket.socket] = []
        self._directory, self.canary, self._victim_uid = directory, canary, victim_uid
        self.target: dict[str, Any] = {
            "canary": canary, "file_name": f"escaped-{canary}", "metadata": 80, "address": _own_address(),
            "fill_bytes": 4 << 20, "init": Path("/proc/1/cmdline").read_bytes().hex(),
        }  # fmt: skip

    def __enter__(self) -> Bait:
        super().__enter__()
        directory = self._directory
        directory.chmod(0o755)
        for name in ("d", "m"):
            (directory / name).mkdir()
        (directory / "secret").write_text("secret", encoding="ascii")
        self.target |= {
            "directory": str(directory / "d"), "mount_point": str(directory / "m"),
            "secret_file": str(directory / "secret"),
        }  # fmt: skip
        self._listen()
        self._memory()
        self._start_victim()
        with contextlib.suppress(OSError):  # not every file system has handles
            self.target["handle"] = _handle(b"/etc/passwd")
        for name in ("d", "s", "g"):
            (directory / name).chmod(0o777)
        stray = os.open("/dev/zero", os.O_RDONLY)
        self.target["stray_fd"] = fcntl.fcntl(stray, fcntl.F_DUPFD, STRAY_FD)
        os.close(stray)
        self.callback(os.close, self.target["stray_fd"])
        return self

    def _listen(self) -> None:
        unix, directory = socket.AF_UNIX, self._directory
        places: dict[str, tuple[int, int, Any]] = {
            "tcp": (INET, STREAM, ("127.0.0.1", 0)), "udp": (INET, DGRAM, ("127.0.0.1", 0)),
            "metadata": (INET, STREAM, (METADATA, 0)), "unix": (unix, STREAM, str(directory / "s")),
            "unix_datagram": (unix, DGRAM, str(directory / "g")), "abstract": (unix, STREAM, f"\0{self.canary}"),
            "tcp6": (INET6, STREAM, ("::1", 0)), "udp6": (INET6, DGRAM, ("::1", 0)),
        }  # fmt: skip
        for name, (family, kind, address) in places.items():
            # Not every host has IPv6, and few a metadata service.
            with contextlib.suppress(OSError) if name in ("tcp6", "udp6", "metadata") else contextlib.nullcontext():
                listener = self.enter_context(socket.socket(family, kind))
                listener.bind(address)
                listener.setblocking(False)
                if kind == STREAM:
                    listener.listen(16)
                self.target[name] = listener.getsockname()[1] if family != unix else address
                self._listeners.append(listener)
        self.target |= {"abstract": self.canary, "metadata_serves": self.target["metadata"] != 80}

    def _memory(self) -> None:
        """Make System V and POSIX objects that everyone may use."""
        shared = call(29, ctypes.c_long(0), ctypes.c_long(4096), ctypes.c_int(_IPC_CREAT | _EVERYONE))
        self.callback(call, 31, ctypes.c_int(shared), ctypes.c_int(_IPC_RMID), None)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.shmat.restype = ctypes.c_void_p
        place = libc.shmat(shared, None, 0)
        ctypes.memmove(place, b"host", 4)
        libc.shmdt(ctypes.c_void_p(place))
        semaphore = call(64, ctypes.c_long(0), ctypes.c_int(1), ctypes.c_int(_IPC_CREAT | _EVERYONE))
        self.callback(call, 66, ctypes.c_int(semaphore), ctypes.c_int(0), ctypes.c_int(_IPC_RMID))
        queue = call(68, ctypes.c_long(0), ctypes.c_int(_IPC_CREAT | _EVERYONE))
        self.callback(call, 71, ctypes.c_int(queue), ctypes.c_int(_IPC_RMID), None)
        name = self.canary.encode()
        os.close(call(240, name, ctypes.c_int(os.O_CREAT | os.O_RDWR), ctypes.c_int(_EVERYONE), None))
        self.callback(call, 241, name)
        path = Path("/dev/shm", self.canary)
        path.write_text("host", encoding="ascii")
        self.callback(path.unlink)
        self.target |= {"shm_id": shared, "sem_id": semaphore, "msg_id": queue, "shm_name": path.name}

    def _start_victim(self) -> None:
        uid = [] if self._victim_uid is None else [str(self._victim_uid)]
        pipe = subprocess.PIPE
        victim = self.enter_context(subprocess.Popen([sys.executable, "-c", VICTIM, *uid], stdin=pipe, stdout=pipe))
        self.callback(victim.kill)
        assert victim.stdout is not None
        self.target |= {"victim": victim.pid, "victim_address": int(victim.stdout.readline())}

    def heard(self) -> int:
        """Return how many messages of attempts came since the last time."""
        return sum(sum(1 for _ in _messages(listener)) for listener in self._listeners)

    def written(self) -> list[str]:
        """Return where escaped files lie on the host, and remove them."""
        found = []
        for directory in ("/", "/usr", "/var/tmp", "/dev/shm", "/tmp", self.target["directory"]):
            path = Path(directory) / self.target["file_name"]
            if path.exists():
                found.append(directory)
                path.unlink()
        return found


def _messages(listener: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        while True:
            if listener.type == DGRAM:
                yield listener.recv(64)
            else:
                with listener.accept()[0] as peer:
                    peer.settimeout(5)
                    if message := peer.recv(64):
                        yield message


def _own_address() -> str:
    """Return an address of this host's that is not every host's, or its own loopback address where it has no other."""
    with socket.socket(INET, DGRAM) as sock, contextlib.suppress(OSError):
        sock.connect((METADATA, 80))  # sends nothing
        return str(sock.getsockname()[0])
    return "127.0.0.1"


def _handle(path: bytes) -> str:
    """Return a file's handle in hexadecimal."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
    call(303, ctypes.c_int(-100), path, handle, ctypes.byref(ctypes.c_int()), ctypes.c_int(0))
    return handle.raw[: 8 + struct.unpack_from("I", handle)[0]].hex()
