"""Escape attempts on what is around a sandbox: files, network, sockets of other processes, Ray. See :mod:`.probe`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What an attempt needs of its target (``""`` for nothing), and the attempt.
Attempt = tuple[str, Callable[[], object]]
#: What is there to be reached, set by the probe.
TARGET: dict[str, Any] = {}
#: Where clouds keep a machine's credentials.
METADATA = "169.254.169.254"
INET, INET6, STREAM, DGRAM = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM

_libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: Any) -> int:
    """Make a system call by its number; raise ``OSError`` when it fails."""
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# -- files --------------------------------------------------------------------------------------


def _file_in(directory: str) -> str:
    return f"{directory}/{TARGET['file_name']}"


def _write_in(directory: str) -> None:
    Path(_file_in(directory)).write_text("escaped", encoding="ascii")


def _open_for_writing(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY))


def _read(path: str) -> None:
    Path(path).read_bytes()


def _read_init() -> None:
    if Path("/proc/1/cmdline").read_bytes().hex() != TARGET["init"]:
        raise PermissionError("not the host's first process")


def _by_handle() -> None:
    """Open the list of users past every directory."""
    handle = bytes.fromhex(TARGET["handle"])
    place = os.open("/usr", os.O_RDONLY)  # anything on the same file system will do
    fd = call(304, ctypes.c_int(place), ctypes.create_string_buffer(handle, len(handle)), ctypes.c_int(os.O_RDONLY))
    assert os.read(fd, 4) == b"root"


def _from_memory(program: str, *arguments: str) -> None:
    """Run a program that is in memory alone."""
    fd = os.memfd_create("program")
    os.write(fd, Path(program).read_bytes())
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        os.execve(fd, [program, *arguments], {})
    status = os.waitpid(pid, 0)[1]
    if status != 0:
        raise PermissionError(f"the program ran and failed, status {status}")


def _device() -> None:
    """Make a node of the host's first memory device, and read it."""
    path = f"/tmp/{TARGET['file_name']}-device"
    os.mknod(path, 0o20600, os.makedev(1, 5))
    try:
        _read_some(path)
    finally:
        os.unlink(path)


def _read_some(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        assert len(file.read(4)) == 4


def _fill(directory: str) -> None:
    path = Path(directory, f"{TARGET['file_name']}-full")
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(TARGET["fill_bytes"] >> 20):
                if file.write(bytes(1 << 20)) != 1 << 20:
                    raise OSError(errno.ENOSPC, "no room")
    finally:
        path.unlink(missing_ok=True)


# -- network ------------------------------------------------------------------------------------


def _send(family: int, kind: int, address: Any) -> None:
    with socket.socket(family, kind) as sock:
        sock.settimeout(5)
        sock.connect(address)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who hangs up was reached
            sock.send(b"escaped")


def _tcp(address: str, port: int) -> None:
    _send(socket.AF_INET, socket.SOCK_STREAM, (address, port))


def _unix(path: str, kind: int = socket.SOCK_STREAM) -> None:
    _send(socket.AF_UNIX, kind, path)


def _reached(port: int) -> None:
    """Connect to the cloud's address; done when the kernel lets the first packet out, if somebody is there or not."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        code = sock.connect_ex((METADATA, port))
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        if TARGET.get("metadata_serves"):
            sock.settimeout(5)
            sock.send(b"escaped")


def _datagram_by_pair() -> None:
    with socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0] as sock:
        sock.sendto(b"escaped", TARGET["unix_datagram"])


def _netlink() -> None:
    """Ask the kernel for the network's addresses, and find the host's among them."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.settimeout(5)
        sock.send(struct.pack("=IHHIIBxxxI", 24, 22, 0x301, 1, 0, socket.AF_INET, 0))
        while answer := sock.recv(1 << 16):
            if socket.inet_aton(TARGET["address"]) in answer:
                return
            if struct.unpack_from("=H", answer, 4)[0] == 3:
                raise PermissionError("no address of the host among them")


def _host_sockets() -> None:
    if TARGET["unix"] not in Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace"):
        raise PermissionError("the host's are not among them")


def _name_taken(name: str) -> None:
    """See whether an abstract name is the host's: two sockets cannot have it."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.bind(f"\0{name}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return
            raise
    raise PermissionError("the name is free here")


def _ray(address: str | None) -> None:
    # Ray writes a token to the home of whoever runs it, which a uid that is nobody's does not have.
    with contextlib.suppress(OSError):
        os.makedirs(TARGET["ray_directory"], exist_ok=True)
    os.environ["HOME"] = TARGET["ray_directory"]
    import ray

    ray.init(address=address, num_cpus=0, include_dashboard=False, _temp_dir=TARGET["ray_directory"])
    ray.shutdown()


ATTEMPTS: dict[str, Attempt] = {
    "write /": ("file_name", lambda: _write_in("/")),
    "write /usr": ("file_name", lambda: _write_in("/usr")),
    "write /var/tmp": ("file_name", lambda: _write_in("/var/tmp")),
    "write /dev/shm": ("file_name", lambda: _write_in("/dev/shm")),
    "write host directory": ("directory", lambda: _write_in(TARGET["directory"])),
    "read /etc/passwd": ("", lambda: _read("/etc/passwd")),
    "read host file": ("secret_file", lambda: _read(TARGET["secret_file"])),
    "read /proc/1": ("init", _read_init),
    "write /proc/1": ("init", lambda: _open_for_writing("/proc/1/oom_score_adj")),
    "read POSIX shared memory": ("shm_name", lambda: _read(f"/dev/shm/{TARGET['shm_name']}")),
    "open core_pattern": ("", lambda: _open_for_writing("/proc/sys/kernel/core_pattern")),
    "program in memory reads": ("secret_file", lambda: _from_memory("/bin/cat", TARGET["secret_file"])),
    "program in memory writes": (
        "directory", lambda: _from_memory("/bin/cp", "/usr/bin/env", _file_in(TARGET["directory"]))),
    "open_by_handle_at": ("handle", _by_handle),
    "make a device": ("file_name", _device),
    "fill /tmp": ("fill_bytes", lambda: _fill("/tmp")),
    "fill /dev/shm": ("fill_bytes", lambda: _fill("/dev/shm")),
    "tcp": ("tcp", lambda: _tcp("127.0.0.1", TARGET["tcp"])),
    "udp": ("udp", lambda: _send(INET, DGRAM, ("127.0.0.1", TARGET["udp"]))),
    "tcp over IPv6": ("tcp6", lambda: _send(INET6, STREAM, ("::1", TARGET["tcp6"]))),
    "udp over IPv6": ("udp6", lambda: _send(INET6, DGRAM, ("::1", TARGET["udp6"]))),
    "listen": ("tcp", lambda: socket.create_server(("127.0.0.1", 0)).close()),
    "raw socket": ("tcp", lambda: socket.socket(INET, socket.SOCK_RAW, 1).close()),
    "packet socket": ("tcp", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 768).close()),
    "netlink": ("address", _netlink),
    METADATA: ("metadata", lambda: _reached(TARGET["metadata"])),
    "unix socket": ("unix", lambda: _unix(TARGET["unix"])),
    "abstract socket": ("abstract", lambda: _unix("\0" + TARGET["abstract"])),
    "datagram by socketpair": ("unix_datagram", _datagram_by_pair),
    "list the host's sockets": ("unix", _host_sockets),
    "custodian's socket": ("custodian_socket", lambda: _unix(TARGET["custodian_socket"])),
    "gateway's socket": ("gateway_socket", lambda: _unix(TARGET["gateway_socket"])),
    "relay's socket": ("relay_socket", lambda: _unix(TARGET["relay_socket"])),
    "raylet's socket": ("raylet_socket", lambda: _unix(TARGET["raylet_socket"])),
    "plasma's socket": ("plasma_socket", lambda: _unix(TARGET["plasma_socket"])),
    "cluster's abstract name": ("cluster_name", lambda: _name_taken(TARGET["cluster_name"])),
    "GCS": ("gcs", lambda: _tcp(*TARGET["gcs"])),
    "raylet's port": ("raylet", lambda: _tcp(*TARGET["raylet"])),
    "lease's endpoint": ("endpoint", lambda: _tcp(*TARGET["endpoint"])),
    "Vault": ("vault", lambda: _tcp(*TARGET["vault"])),
    "ray.init()": ("ray_directory", lambda: _ray(None)),
}  # fmt: skip
