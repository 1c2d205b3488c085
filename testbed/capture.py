"""Every byte that a network sends and receives, captured by a process in it, and put together again. Needs root.

As a program: records whole packets of every interface, its own loopback too, from when it says ``capturing`` until its
standard input ends; then it says how many the kernel dropped. A record is a length, four bytes little-endian, and the
packet from its Ethernet header on.
"""

from __future__ import annotations

import select
import socket
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

_ALL = 3  # ETH_P_ALL
_BUFFER_BYTES = 256 << 20
_SO_RCVBUFFORCE, _SOL_PACKET, _PACKET_STATISTICS = 33, 263, 6
#: Ethernet types, and where in a packet IP begins.
_IPV4, _IPV6, _ETHERNET_BYTES = 0x0800, 0x86DD, 14
_TCP = 6


class Capture:
    """A capture in the network of one process, from ``with`` to :meth:`end`.

    Args:
        pid: Of the process: a host's of the test bed, or one's own.
        path: File to write.
    """

    def __init__(self, pid: int, path: Path) -> None:
        self._path = path
        #: Packets that the kernel dropped, known at the end; a capture that lost some proves nothing.
        self.dropped = -1
        # In its network alone: the file is the machine's.
        command = ["nsenter", f"--target={pid}", "--net", "--", sys.executable, __file__, str(path)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def __enter__(self) -> Self:
        assert self._process.stdout
        assert self._process.stdout.readline() == "capturing\n"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.communicate()

    def end(self) -> None:
        """Stop recording."""
        said, _ = self._process.communicate()
        self.dropped = int(said.split()[1])

    def packets(self) -> Iterator[bytes]:
        """Yield every packet."""
        data = self._path.read_bytes()
        at = 0
        while at < len(data):
            (size,) = struct.unpack_from("<I", data, at)
            yield data[at + 4 : at + 4 + size]
            at += 4 + size

    def streams(self) -> dict[str, bytes]:
        """Return what TCP carried, for each connection and direction: a text may lie in two packets."""
        pieces: dict[str, dict[int, bytes]] = defaultdict(dict)
        for packet in self.packets():
            if found := _tcp(packet):
                flow, sequence, payload = found
                if len(payload) >= len(pieces[flow].get(sequence, b"")):
                    pieces[flow][sequence] = payload
        return {flow: _in_order(parts) for flow, parts in pieces.items()}


def _tcp(packet: bytes) -> tuple[str, int, bytes] | None:
    """Return a TCP packet's flow, sequence number and payload."""
    kind = int.from_bytes(packet[12:14], "big")
    ip = packet[_ETHERNET_BYTES:]
    if kind == _IPV4 and ip[9] == _TCP:
        length = int.from_bytes(ip[2:4], "big") or len(ip)
        ends, tcp = f"{socket.inet_ntoa(ip[12:16])} {socket.inet_ntoa(ip[16:20])}", ip[(ip[0] & 15) * 4 : length]
    elif kind == _IPV6 and ip[6] == _TCP:
        ends = " ".join(socket.inet_ntop(socket.AF_INET6, address) for address in (ip[8:24], ip[24:40]))
        tcp = ip[40:]
    else:
        return None
    source, target, sequence = struct.unpack_from(">HHI", tcp)
    return f"{ends} {source} {target}", sequence, tcp[(tcp[12] >> 4) * 4 :]


def _in_order(parts: dict[int, bytes]) -> bytes:
    """Put payloads in the order of their numbers, what was sent again once; a gap is a gap of one zero.

    Numbers wrap around at 2^32: the first is taken to be the one after the widest gap.
    """
    numbers = sorted(parts)
    gaps = [(numbers[i] - numbers[i - 1]) % (1 << 32) for i in range(len(numbers))]
    first = max(range(len(numbers)), key=gaps.__getitem__)
    done = bytearray()
    expected: int | None = None
    for number in numbers[first:] + numbers[:first]:
        payload = parts[number]
        ahead = 0 if expected is None else (number - expected + (1 << 31)) % (1 << 32) - (1 << 31)
        done += b"\0" if ahead > 0 else b""
        new = payload[max(0, -ahead) :]
        if new:
            done += new
            expected = (number + len(payload)) % (1 << 32)
    return bytes(done)


def _record(path: Path) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL)) as packets, path.open("wb") as file:
        packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        packets.setblocking(False)
        print("capturing", flush=True)  # noqa: T201 - it is a program
        while True:
            ready, _, _ = select.select([packets, sys.stdin], [], [])
            try:
                while True:
                    packet = packets.recv(1 << 18)
                    file.write(struct.pack("<I", len(packet)) + packet)
            except BlockingIOError:
                pass
            if sys.stdin in ready:
                break
        _, dropped = struct.unpack("II", packets.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    print("dropped", dropped, flush=True)  # noqa: T201 - it is a program


if __name__ == "__main__":
    _record(Path(sys.argv[1]))
