"""Sealed messages on a data connection: what gateway and keeper have in common. This module does I/O.

Rules:

1. Every AEAD call reads from and writes into memory of this process alone. What goes to or comes
   from memory that a sandbox can write is copied, and goes there only after ``finalize`` succeeded.
2. A header is believed only after the body opened: it is part of the context.
3. A slot opens once (:class:`zones.envelope.ReplayGuard`).
4. Buffers are kept and reused; a body moves in pieces of at most 1 MiB.
5. A message that has begun must end in time: who sends a byte now and then holds nobody for ever.
6. Whoever waits may derive the keys of the messages that come next meanwhile
   (:meth:`SealedSocket.get_ready`). A wrong guess costs that time and nothing else: what was
   prepared serves one message with exactly its header, or none.
"""

from __future__ import annotations

import math
import mmap
import os
import socket
import struct
import threading
import time

from ray_gpu.wire import PeerClosedError
from zones.envelope import (
    HEADER_BYTES,
    LENGTH_BYTES,
    MAX_PADDED_BYTES,
    MIN_PADDED_BYTES,
    OPEN_SLACK_BYTES,
    PIECE_BYTES,
    SEAL_SLACK_BYTES,
    Header,
    LeaseKey,
    Opener,
    ReplayGuard,
    Sealer,
    header_for,
    padded_size,
    split_payload,
)
from zones.errors import EnvelopeError
from zones.model import Direction, Kind, Padding, Slot

#: A side that hears nothing authentic for this long while it waits for a message is alone, seconds.
SILENCE_LIMIT_S = 9.0
#: What is opened of a large message buys the rest of it time at this rate, bytes per second. Slower connections than
#: that are none; and whoever held back a message and lets it drip keeps a lease for its size at this rate, no longer.
PROVEN_BYTES_PER_S = 1 << 20
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
#: A message that has begun is there after so long, and a second more for each of so many bytes: no network that anybody
#: computes over is slower. Seconds, bytes.
MESSAGE_TIMEOUT_S, SLOWEST_BYTES_PER_S = 20.0, 64 << 10
#: How often a thread that waits for a message to begin or to end wakes and looks, seconds.
_WAKE_S = 5


class StalledError(TimeoutError):
    """The peer began a message and did not end it in time."""


class PlainBuffer:
    """A private, growing buffer that holds one padded plaintext: length, payload, zeros."""

    def __init__(self, padding: Padding = Padding.FINE) -> None:
        self._padding = padding
        self._memory = mmap.mmap(-1, PIECE_BYTES, flags=_PRIVATE)
        self._size = 0

    def payload(self, capacity: int) -> memoryview:
        """Return where to write up to *capacity* payload bytes."""
        room = padded_size(capacity, self._padding)
        if LENGTH_BYTES + room > len(self._memory):
            self._memory = mmap.mmap(-1, 2 * room, flags=_PRIVATE)
        return memoryview(self._memory)[LENGTH_BYTES : LENGTH_BYTES + capacity]

    def fill(self, payload: bytes | bytearray | memoryview) -> memoryview:
        """Copy a payload and return its padded plaintext."""
        size = len(payload)
        total, end = padded_size(size, self._padding), LENGTH_BYTES + size
        if total > len(self._memory):
            self._memory = mmap.mmap(-1, 2 * total, flags=_PRIVATE)
        view = memoryview(self._memory)
        view[:LENGTH_BYTES] = size.to_bytes(LENGTH_BYTES, "big")
        view[LENGTH_BYTES:end] = payload
        view[end:total] = bytes(total - end)
        return view[:total]

    def padded(self, size: int) -> memoryview:
        """Return the padded plaintext whose first *size* payload bytes were written."""
        total = padded_size(size, self._padding)
        view = memoryview(self._memory)
        view[:LENGTH_BYTES] = size.to_bytes(LENGTH_BYTES, "big")
        end = LENGTH_BYTES + size
        view[end:total] = bytes(total - end)
        return view[:total]


class SealedSocket:
    """Sends and receives sealed messages of one lease over one connection.

    Sending is safe from several threads; receiving belongs to one thread at a time.

    Args:
        sock: Connected TCP socket, owned by this object from now on.
        key: The lease's key.
        grant_digest: Hexadecimal SHA-256 of the grant, part of every context.
        lease: Lease id.
        outgoing: The direction in which this side seals.
        padding: Of what this side sends.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        key: LeaseKey,
        grant_digest: str,
        lease: str,
        outgoing: Direction,
        padding: Padding = Padding.FINE,
    ) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._key = key
        self._grant_digest = grant_digest
        self._lease = lease
        self._outgoing = outgoing
        self._incoming = Direction.BACK if outgoing is Direction.OUT else Direction.OUT
        self._guard = ReplayGuard()
        self._send_lock = threading.Lock()
        self._sealed = bytearray(HEADER_BYTES + PIECE_BYTES + SEAL_SLACK_BYTES)
        #: What arrived and is not opened yet lies between the two marks.
        self._arrived = memoryview(bytearray(PIECE_BYTES + HEADER_BYTES))
        self._start = self._end = 0
        self._plain = PlainBuffer(padding)
        self._opened = memoryview(b"")
        #: How long to wait for a message to begin, ``None`` for ever, and when the one that has begun must be there.
        self._timeout_s: float | None = None
        self._deadline = 0.0
        self._prepared: tuple[Slot, int, Sealer] | None = None
        self._expected: tuple[bytes, Header, Slot, Opener] | None = None
        #: Padded sizes of the last messages: the likeliest of the next.
        self._sent_padded = self._received_padded = MIN_PADDED_BYTES
        #: Until when the message that is waited for must be there, on the monotonic clock; infinite when none is.
        #: Bytes alone do not move it: whoever holds the connection can make those up.
        self.deadline = math.inf
        #: Bytes put on and taken from the connection, headers included.
        self.sent_bytes = 0
        self.received_bytes = 0

    def fileno(self) -> int:
        """Return the connection's descriptor, for ``poll``."""
        return self._sock.fileno()

    def names(self) -> tuple[str, str]:
        """Return the connection's two ends, ours first, each as ``address:port``."""
        ours, theirs = self._sock.getsockname(), self._sock.getpeername()
        return f"{ours[0]}:{ours[1]}", f"{theirs[0]}:{theirs[1]}"

    @property
    def sending(self) -> bool:
        """Whether a message is being sent now."""
        return self._send_lock.locked()

    def slot(self, kind: Kind, *, call: int, shard: int = 0, attempt: int = 0) -> Slot:
        """Return the outgoing slot of a message."""
        return Slot(lease=self._lease, direction=self._outgoing, kind=kind, call=call, shard=shard, attempt=attempt)

    def incoming_slot(self, kind: Kind, *, call: int, shard: int = 0, attempt: int = 0) -> Slot:
        """Return the slot of a message from the peer."""
        return Slot(lease=self._lease, direction=self._incoming, kind=kind, call=call, shard=shard, attempt=attempt)

    def get_ready(self, *, receive: Slot, send: Slot) -> None:
        """Derive the keys of the messages that likely come next, each of the padded size of the last one.

        For a moment when there is nothing else to do: whoever was woken by the last message, and waits for this
        processor, goes first.
        """
        os.sched_yield()
        padded = self._received_padded
        header = header_for(receive, padded)
        self._expected = header.encode(), header, receive, Opener(self._key, self._grant_digest, receive, padded)
        padded = self._sent_padded
        sealer = Sealer(self._key, self._grant_digest, send, padded)
        with self._send_lock:
            self._prepared = send, padded, sealer

    def send(self, slot: Slot, payload: bytes | bytearray | memoryview) -> None:
        """Seal and send a payload. *payload* may be shared memory: it is copied to private memory first."""
        with self._send_lock:
            self._send_padded(slot, self._plain.fill(payload))

    def send_padded(self, slot: Slot, plaintext: memoryview) -> None:
        """Seal and send a padded plaintext (see :class:`PlainBuffer`) that lies in private memory."""
        with self._send_lock:
            self._send_padded(slot, plaintext)

    def _send_padded(self, slot: Slot, plaintext: memoryview) -> None:
        sealer = self._sealer(slot, len(plaintext))
        sealed = memoryview(self._sealed)
        sealed[:HEADER_BYTES] = sealer.header
        filled = HEADER_BYTES
        for start in range(0, len(plaintext), PIECE_BYTES):
            piece = plaintext[start : start + PIECE_BYTES]
            filled += sealer.update_into(piece, sealed[filled:])
            if start + PIECE_BYTES < len(plaintext):
                self._flush(sealed[:filled])
                filled = 0
        tail = sealer.finalize()
        sealed[filled : filled + len(tail)] = tail
        self._flush(sealed[: filled + len(tail)])

    def _sealer(self, slot: Slot, padded_bytes: int) -> Sealer:
        """Return what was prepared, once, if it is for this very message; else prepare it now. Holds the lock."""
        prepared, self._prepared = self._prepared, None
        self._sent_padded = padded_bytes
        if prepared is not None and prepared[0] == slot and prepared[1] == padded_bytes:
            return prepared[2]
        return Sealer(self._key, self._grant_digest, slot, padded_bytes)

    def _flush(self, view: memoryview) -> None:
        self.sent_bytes += len(view)
        sent = self._send_some(view)
        if sent == len(view):
            return
        deadline = time.monotonic() + MESSAGE_TIMEOUT_S + len(view) / SLOWEST_BYTES_PER_S
        while sent < len(view):
            if time.monotonic() > deadline:
                raise StalledError("the peer does not take a message in time")
            sent += self._send_some(view[sent:])

    def _send_some(self, view: memoryview) -> int:
        try:
            return self._sock.send(view)
        except BlockingIOError:
            return 0

    def receive(self, *, keep: bool = True, most_bytes: int = MAX_PADDED_BYTES) -> tuple[Header, memoryview]:
        """Receive and open one message.

        Args:
            most_bytes: Largest padded plaintext to take: memory is reserved before anything is authentic.
            keep: Whether the caller keeps the payload; if not, it is valid until the next call only.

        Returns:
            The header, now authentic, and the payload in private memory.

        Raises:
            EnvelopeError: The message did not open, or its slot was seen before.
            ConnectionError: The connection ended.
            StalledError: The message began and did not end in time.
            OSError: None began within the time that :meth:`settimeout` set.
        """
        self._deadline = self._due() if self._end > self._start else 0.0
        self.deadline = time.monotonic() + SILENCE_LIMIT_S
        header, slot, opener = self._opener(self._head(), most_bytes)
        target = self._target(header.padded_bytes, keep=keep)
        self._open_body(opener, header.padded_bytes, target)
        self._guard.accept(slot)
        self.deadline = math.inf
        self.received_bytes += HEADER_BYTES + opener.body_bytes
        self._received_padded = header.padded_bytes
        return header, split_payload(target[: header.padded_bytes])

    def _opener(self, raw: bytes, most_bytes: int) -> tuple[Header, Slot, Opener]:
        """Return what a header claims, and what opens its body: made ready if this very header was expected."""
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == raw and expected[1].padded_bytes <= most_bytes:
            return expected[1:]
        header = Header.decode(raw)
        if header.padded_bytes > most_bytes:
            raise EnvelopeError
        slot = header.slot(lease=self._lease, direction=self._incoming)
        return header, slot, Opener(self._key, self._grant_digest, slot, header.padded_bytes)

    def _head(self) -> bytes:
        """Return the next header. One system call brings as much of a small message as is there."""
        while self._end - self._start < HEADER_BYTES:
            if self._start:
                left = bytes(self._arrived[self._start : self._end])
                self._arrived[: len(left)] = left
                self._start, self._end = 0, len(left)
            self._end += self._receive_into(self._arrived[self._end :])
        self._start += HEADER_BYTES
        return bytes(self._arrived[self._start - HEADER_BYTES : self._start])

    def _some(self, most: int) -> memoryview:
        """Return the next bytes of a body: what came with its header, else what one system call brings."""
        if self._start == self._end:
            self._start = 0
            self._end = self._receive_into(self._arrived[: min(most, PIECE_BYTES)])
        start = self._start
        self._start = min(self._end, start + most)
        return self._arrived[start : self._start]

    def _receive_into(self, view: memoryview) -> int:
        while True:
            try:
                received = self._sock.recv_into(view)
            except BlockingIOError:
                self._wait_on()
                continue
            if not received:
                raise PeerClosedError("peer closed the connection")
            if not self._deadline:
                self._deadline = self._due()
            elif time.monotonic() > self._deadline:
                raise StalledError("a message began and did not end in time")
            return received

    def _due(self) -> float:
        return time.monotonic() + (self._timeout_s or MESSAGE_TIMEOUT_S)

    def _wait_on(self) -> None:
        """Return if there is reason to wait on, after the kernel's timeout."""
        if self._deadline and time.monotonic() > self._deadline:
            raise StalledError("a message began and did not end in time")
        if not self._deadline and self._timeout_s is not None:
            raise TimeoutError("no message came in time")

    def _target(self, padded_bytes: int, *, keep: bool) -> memoryview:
        if keep:
            return memoryview(bytearray(padded_bytes))
        size = padded_bytes + OPEN_SLACK_BYTES
        if len(self._opened) < size:
            self._opened = memoryview(mmap.mmap(-1, 2 * size, flags=_PRIVATE))
        return self._opened

    def _open_body(self, opener: Opener, padded_bytes: int, target: memoryview) -> None:
        left, filled = opener.body_bytes, 0
        if left > PIECE_BYTES:
            self._deadline += left / SLOWEST_BYTES_PER_S
        if self._end - self._start == left:
            # All of it came with its header, as a small message does.
            view = self._arrived[self._start : self._end]
            self._start = self._end = left = 0
            filled = opener.update_into(view, target)
        while left:
            view = self._some(left)
            opened = opener.update_into(view, target[filled:])
            # Each part was authentic, or this had raised.
            self.deadline += opened / PROVEN_BYTES_PER_S
            filled += opened
            left -= len(view)
        tail = opener.finalize()
        target[filled : filled + len(tail)] = tail
        if filled + len(tail) != padded_bytes:
            raise EnvelopeError

    def finish_call(self, call: int) -> None:
        """Forget a call's slots; later messages of that call or an earlier one are refused."""
        self._guard.finish(call)

    def settimeout(self, seconds: float | None) -> None:
        """Bound how long to wait until a message begins, and again until it has ended.

        Args:
            seconds: ``None``: a message may begin whenever it likes, and must end within ``MESSAGE_TIMEOUT_S``.
                What is sent has that time in any case.
        """
        # The kernel's own timeouts: Python's would ask poll() before every receive and every send.
        self._timeout_s = seconds
        self._sock.settimeout(None)
        for option, limit in ((socket.SO_RCVTIMEO, seconds or _WAKE_S), (socket.SO_SNDTIMEO, _WAKE_S)):
            whole = int(limit)
            packed = struct.pack("@ll", whole, int((limit - whole) * 1_000_000))
            self._sock.setsockopt(socket.SOL_SOCKET, option, packed)

    def shutdown(self) -> None:
        """End the connection in both directions, so that a thread that waits on it wakes."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def close(self) -> None:
        """Close the connection and wipe the buffers that held plaintext (best effort)."""
        self._sock.close()
