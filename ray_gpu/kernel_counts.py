"""What the kernel counted on each TCP connection that ended on this host, by ``inet_diag``. Opens a netlink socket.

The kernel tells whoever listens, root alone, of each TCP socket that it takes down, with the numbers that it kept of
it: nobody who used the socket can change those. It tells of the network namespace that the listener is in.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from zones.errors import ClusterError
from zones.reconcile import Counted

_NETLINK_SOCK_DIAG = 4
#: Multicast groups of SOCK_DIAG: TCP sockets taken down, of IPv4 and of IPv6.
_TCP_DESTROY = 1 << 0 | 1 << 2
_HEADER = struct.Struct("=IHHII")
#: Of ``struct inet_diag_msg``: family, state, timer, retransmissions, then ports, addresses, interface and cookie.
_SOCKET_BYTES, _ATTRIBUTE = 72, struct.Struct("=HH")
_PORTS, _SOURCE, _DESTINATION = 4, 8, 24
_INET_DIAG_INFO = 2
#: Of ``struct tcp_info``: ``tcpi_bytes_sent`` and ``tcpi_bytes_retrans``.
_SENT = struct.Struct("=QQ")
_SENT_AT = 200
_SO_RCVBUFFORCE = 33
#: Room for what is told while nobody reads, bytes.
_BUFFER_BYTES = 32 << 20


class KernelCounts:
    """Listens; use it as a context manager.

    Raises:
        ClusterError: This is not root, or the kernel does not tell.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        try:
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
            self._socket.bind((0, _TCP_DESTROY))
        except OSError as error:
            self._socket.close()
            raise ClusterError(
                f"the kernel does not tell of connections that end ({error.strerror}); run this as root, on a kernel "
                "with INET_DIAG",
                node="",
                reason="inet_diag",
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._socket.close()

    def read(self, timeout_s: float) -> list[Counted]:
        """Return what ended since the last look, after at most so many seconds; empty when nothing did.

        Raises:
            ClusterError: Something was missed: the count is not whole.
        """
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError as error:
            raise ClusterError(
                f"connections ended faster than they were read ({error.strerror}): the count is not whole; start again",
                node="",
                reason="missed",
            ) from None
        return list(parse(data))

    def watch(self, keep: Callable[[Counted], object], stop: Callable[[], bool], *, look_s: float = 0.2) -> None:
        """Hand each connection to *keep* as it ends, until *stop* says so and nothing is waiting."""
        while True:
            found = self.read(look_s)
            for one in found:
                keep(one)
            if not found and stop():
                return


def parse(data: bytes) -> Iterator[Counted]:
    """Yield the sockets in what the kernel said."""
    while len(data) >= _HEADER.size:
        length = _HEADER.unpack_from(data)[0]
        if length < _HEADER.size:
            return
        message, data = data[_HEADER.size : length], data[-(-length // 4) * 4 :]
        if len(message) < _SOCKET_BYTES:
            continue
        found = _sent(message[_SOCKET_BYTES:])
        if found is not None:
            ports = struct.unpack_from("!HH", message, _PORTS)
            size = 16 if message[0] == socket.AF_INET6 else 4
            local, remote = (
                _name(message[start : start + size], port)
                for start, port in zip((_SOURCE, _DESTINATION), ports, strict=True)
            )
            yield Counted(local=local, remote=remote, sent=found)


def _sent(attributes: bytes) -> int | None:
    """Return the bytes of data that were sent once, from what the kernel says of a socket."""
    while len(attributes) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if length < _ATTRIBUTE.size:
            return None
        if kind == _INET_DIAG_INFO and length >= _ATTRIBUTE.size + _SENT_AT + _SENT.size:
            sent, again = _SENT.unpack_from(attributes, _ATTRIBUTE.size + _SENT_AT)
            return int(sent - again)
        attributes = attributes[-(-length // 4) * 4 :]
    return None


def _name(address: bytes, port: int) -> str:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return f"{mapped or found}:{port}"
