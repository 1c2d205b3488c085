"""Listens for, or sends, many probes at once. Runs inside a host, as a script of the standard library alone.

``listen``: reads a JSON list of ports, serves each over TCP and UDP, IPv4 and IPv6, says "ready", and ends with its
standard input. ``probe``: reads a JSON list of targets ``[protocol, address, port]``, tries them all at the same time,
and prints a JSON list of booleans: whether the target answered. An answer of any kind counts, also a refusal.
``reach``: the same, but only being served counts; ``abstract`` is one more protocol, of Unix sockets by name.

A firewall remembers what it let through, and lets go on what looks the same: UDP for two minutes. Whoever probes again
under other rules gives a number as second argument, another each time: the source port of UDP, the identifier of ICMP.
"""

from __future__ import annotations

import errno
import json
import resource
import selectors
import socket
import struct
import sys
import time

#: Probing ends when nothing has come for so long. A SYN is repeated after 1 s. Seconds.
_QUIET_S = 1.2
_PAYLOAD = b"ray-gpu probe"
_ECHO_REPLIES = {socket.AF_INET: 0, socket.AF_INET6: 129}

Target = tuple[str, str, int]


def listen(ports: list[int]) -> None:
    """Serve until standard input ends."""
    selector = selectors.DefaultSelector()
    for port in ports:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            server = socket.socket(socket.AF_INET6, kind)
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind(("::", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:  # sshd listens there already, which serves as well
                    raise
                continue
            if kind == socket.SOCK_STREAM:
                server.listen(64)
            server.setblocking(False)
            selector.register(server, selectors.EVENT_READ, kind)
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        for key, _ in selector.select():
            if key.data is None:
                return
            ready = key.fileobj
            assert isinstance(ready, socket.socket)
            if key.data == socket.SOCK_STREAM:
                ready.accept()[0].close()
            else:
                data, sender = ready.recvfrom(64)
                ready.sendto(data, sender)


class Probes:
    """Probes under way."""

    def __init__(self, targets: list[Target], *, strict: bool = False, number: int = 0) -> None:
        self.targets = targets
        self.number = number
        self.strict = strict
        self.answered = [False] * len(targets)
        self._selector = selectors.DefaultSelector()
        self._open = 0

    def run(self) -> list[bool]:
        """Send every probe, and return which were answered."""
        for index, (protocol, address, port) in enumerate(self.targets):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            try:
                getattr(self, f"_{protocol}")(index, family, address, port)
            except OSError:  # no way there, not even from here
                if not self.strict:
                    raise
        until = time.monotonic() + _QUIET_S
        while self._open and time.monotonic() < until:
            for key, _ in self._selector.select(until - time.monotonic()):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                answers = self._answers(sock, key.data)
                self.answered[key.data] |= answers
                # A connection that failed stays ready for ever.
                if answers or self.targets[key.data][0] == "tcp":
                    self._selector.unregister(sock)
                    sock.close()
                    self._open -= 1
                    until = time.monotonic() + _QUIET_S
        return self.answered

    def _wait(self, sock: socket.socket, index: int, event: int) -> None:
        self._selector.register(sock, event, index)
        self._open += 1

    def _tcp(self, index: int, family: int, address: str, port: int) -> None:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        code = sock.connect_ex((address, port))
        if code not in (0, errno.EINPROGRESS):
            sock.close()
            raise OSError(code, f"{address} port {port}")
        self._wait(sock, index, selectors.EVENT_WRITE)

    def _abstract(self, index: int, family: int, address: str, port: int) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"\0{address}")
        self.answered[index] = True

    def _udp(self, index: int, family: int, address: str, port: int) -> None:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        sock.setblocking(False)
        if self.number:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one for each target
            sock.bind(("", self.number))
        sock.connect((address, port))
        try:
            sock.send(_PAYLOAD)
        except PermissionError:  # the host's own firewall
            sock.close()
            return
        self._wait(sock, index, selectors.EVENT_READ)

    def _icmp(self, index: int, family: int, address: str, port: int) -> None:
        protocol = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
        sock = socket.socket(family, socket.SOCK_RAW, protocol)
        sock.setblocking(False)
        sock.connect((address, 0))
        number = self.number or index
        request = struct.pack("!BBHHH", 8 if family == socket.AF_INET else 128, 0, 0, number, 1)
        # The kernel fills in the checksum of IPv6 alone.
        request = struct.pack("!BBHHH", request[0], 0, _checksum(request), number, 1)
        try:
            sock.send(request)
        except PermissionError:
            sock.close()
            return
        self._wait(sock, index, selectors.EVENT_READ)

    def _answers(self, sock: socket.socket, index: int) -> bool:
        """Return whether what came is an answer: other ICMP messages reach a raw socket too."""
        if self.targets[index][0] == "tcp":
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            return error == 0 or (error == errno.ECONNREFUSED and not self.strict)
        try:
            data = sock.recv(256)
        except ConnectionRefusedError:
            return not self.strict
        except OSError:
            if self.strict:
                return False
            raise
        if self.targets[index][0] == "udp":
            return data == _PAYLOAD
        header = (data[0] & 15) * 4 if sock.family == socket.AF_INET else 0
        return data[header] == _ECHO_REPLIES[sock.family]


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def main() -> None:
    """Do what the first argument says with what standard input says."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    given = json.loads(sys.stdin.readline())
    if sys.argv[1] == "listen":
        listen(given)
    else:
        number = int(sys.argv[2]) if sys.argv[2:] else 0
        targets = [(protocol, address, port) for protocol, address, port in given]
        sys.stdout.write(json.dumps(Probes(targets, strict=sys.argv[1] == "reach", number=number).run()))


if __name__ == "__main__":
    main()
