"""The keeper of one lease: holds its key and its data connection, and runs no user code. This module does I/O.

Between the zone and the sandbox stands this process. It opens what the gateway sealed in private memory,
then copies it to memory that it shares with the sandbox alone; and it copies what the sandbox answers to
private memory, then seals it. What the sandbox says is untrusted: sizes are checked.

Descriptors, inherited: the custodian's socket (start message with the key, data connections, final
statistics), the sandbox's socket, the shared memory.

Threads: one reader (connection to sandbox), one writer (sandbox to connection), one per candidate
connection until the first one proves that it holds the lease's key. The process ends, and with it
the lease, when the connection, the sandbox or the custodian is gone, at ``not_after``, or after
10 s without an authentic message, whatever else comes: whoever is between can hold the connection open.
"""

from __future__ import annotations

import gc
import mmap
import os
import queue
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgpack

from ray_gpu.frames import SILENCE_LIMIT_S, SealedSocket
from ray_gpu.sandbox.harden import harden_self
from ray_gpu.sandbox.memory import IN_SLOTS, OUT_SLOTS, SLOT_BYTES, SlotMap
from ray_gpu.wire import Inbox, PeerClosedError, recv_message, send_message
from zones.envelope import MIN_PADDED_BYTES, Header, LeaseKey
from zones.errors import EnvelopeError, ZoneError
from zones.model import Direction, Kind, Padding

#: A lease to whose keeper nobody has proven himself by then is over, seconds.
CONNECT_LIMIT_S = 15.0
#: A connection that has not proven itself by then is dropped, seconds.
KNOCK_TIMEOUT_S = 5.0
#: Connections that may try to prove themselves at once. One more takes the place of the oldest: whoever has the key
#: proves it at once, and whoever has not shall not keep it out by holding a place.
MAX_CANDIDATES = 32
#: Of a lease's memory, shards that stay open take one part of so many at most.
RESIDENT_PART = 2
#: How often the clock is looked at, seconds.
CLOCK_INTERVAL_S = 0.5


@dataclass(slots=True, kw_only=True)
class Work:
    """One message that the sandbox has not answered yet."""

    slot: int
    #: Slot of the answer: (call, shard, attempt), or ``None`` when the sandbox only acknowledges.
    answer: tuple[int, int, int] | None
    #: Whether it is a call on arguments alone: another one likely follows.
    call: bool


class Keeper:
    """State of one lease in this process."""

    def __init__(
        self, start: dict[str, Any], custodian: socket.socket, sandbox: socket.socket, memory: SlotMap
    ) -> None:
        self._start = start
        self._custodian = custodian
        self._sandbox = sandbox
        self._memory = memory
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(IN_SLOTS):
            self._free.put(slot)
        self._pending: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._chosen = threading.Lock()
        self._sandbox_lock = threading.Lock()
        #: Out slots that the sandbox does not know to be free yet: told with its next message, or once all are taken.
        self._taken: list[int] = []
        self._link: SealedSocket | None = None
        #: Connections that have not proven themselves, oldest first.
        self._candidates: deque[SealedSocket] = deque()
        self._candidates_lock = threading.Lock()
        self._connect_by = time.monotonic() + CONNECT_LIMIT_S
        #: Signed receipts that the custodian sent; the main thread puts them here.
        self.receipts: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.calls = 0
        self.shards = 0

    def deadline(self) -> float:
        """Return until when the zone must have been heard, on the monotonic clock."""
        return self._connect_by if self._link is None else self._link.deadline

    def connect(self, sock: socket.socket) -> None:
        """Let one candidate connection prove that it holds the key; the first that does is the lease's."""
        link = SealedSocket(
            sock,
            key=self._key(),
            grant_digest=self._start["grant_digest"],
            lease=self._start["lease"],
            outgoing=Direction.BACK,
            padding=Padding(self._start["padding"]),
        )
        link.settimeout(KNOCK_TIMEOUT_S)
        with self._candidates_lock:
            if self._chosen.locked():
                link.close()
                return
            if len(self._candidates) >= MAX_CANDIDATES:
                self._candidates.popleft().shutdown()
            self._candidates.append(link)
        threading.Thread(target=self._knock, args=(link,), daemon=True).start()

    def _knock(self, link: SealedSocket) -> None:
        try:
            header, _ = link.receive(most_bytes=MIN_PADDED_BYTES)
            proven = header.kind is Kind.HELLO
        except (ZoneError, OSError):
            proven = False
        with self._candidates_lock:
            # Not there: a newer one has taken its place.
            waiting = link in self._candidates
            if waiting:
                self._candidates.remove(link)
            chosen = proven and waiting and self._chosen.acquire(blocking=False)
        if chosen:
            self._serve(link)
        else:
            link.close()

    def _key(self) -> LeaseKey:
        return LeaseKey.from_bytes(self._start["key"])

    def _serve(self, link: SealedSocket) -> None:
        self._link = link
        link.settimeout(SILENCE_LIMIT_S)
        said = ("node", "pool", "degradations", "device", "environment", "contents")
        hello = {name: self._start[name] for name in said}
        link.send(link.slot(Kind.HELLO, call=0), msgpack.packb(hello))
        threading.Thread(target=self._write_results, args=(link,), daemon=True).start()
        try:
            self._read_messages(link)
        except (ZoneError, OSError, ValueError, queue.Empty) as error:
            leave(f"data connection: {type(error).__name__}")
        leave("closed by the gateway", status=0)

    def _read_messages(self, link: SealedSocket) -> None:
        """Open messages into free slots and tell the sandbox, until the gateway says ``close``."""
        while True:
            header, payload = link.receive(keep=False)
            if header.kind is Kind.CONTROL:
                if self._control(link, header, msgpack.unpackb(payload)):
                    return
                continue
            slot = self._free.get()
            message, answer = self._message(header, slot, len(payload))
            self._memory.payload(slot, len(payload))[:] = payload
            self._pending.put(Work(slot=slot, answer=answer, call=header.kind is Kind.CALL))
            self._tell(message)

    def _message(self, header: Header, slot: int, size: int) -> tuple[dict[str, Any], tuple[int, int, int] | None]:
        """Return the sandbox's message for an opened frame, and the slot of the answer.

        A function's id and an argument list's id are the number of the call that brought them; which
        function or arguments a later message means is authenticated with it, in its attempt and shard. The attempt
        of arguments is 1 where their call's shards shall stay open.
        """
        base = {"slot": slot, "bytes": size}
        where = (header.call, header.shard, header.attempt)
        if header.kind is Kind.FUNCTION:
            return base | {"op": "function", "id": header.call}, None
        if header.kind is Kind.ARGUMENTS:
            room = self._start["memory_bytes"] // RESIDENT_PART if header.attempt else 0
            return base | {"op": "arguments", "id": header.call, "function": header.shard, "room": room}, None
        if header.kind is Kind.CALL:
            self.calls += 1
            return base | {"op": "call", "function": header.shard}, where
        if header.kind is Kind.SHARD:
            self.shards += 1
            return base | {"op": "run", "arguments": header.call, "shard": header.shard}, where
        if header.kind is Kind.RECALL:
            return base | {"op": "rerun", "arguments": header.call, "shard": header.shard}, where
        raise EnvelopeError

    def _control(self, link: SealedSocket, header: Header, message: dict[str, Any]) -> bool:
        """Handle a control message; return whether the lease is to end."""
        if "finish" in message:
            self.calls += 1
            link.finish_call(int(message["finish"]))
        if message.get("close"):
            send_message(self._custodian, {"op": "receipt", **self._statistics(link)})
            receipt = self.receipts.get(timeout=KNOCK_TIMEOUT_S)
            link.send(link.slot(Kind.CONTROL, call=header.call, shard=header.shard), msgpack.packb(receipt))
            return True
        return False

    def _statistics(self, link: SealedSocket) -> dict[str, int]:
        return {
            "calls": self.calls,
            "shards": self.shards,
            "received_bytes": link.received_bytes,
            "sent_bytes": link.sent_bytes,
        }

    def _write_results(self, link: SealedSocket) -> None:
        """Copy each answer of the sandbox to private memory, seal and send it."""
        inbox = Inbox(self._sandbox, max_bytes=4096)
        try:
            while True:
                message, _ = inbox.receive()
                work = self._pending.get_nowait()
                if work.answer is not None:
                    self._send_result(link, message, work.answer)
                self._free.put(work.slot)
                if work.call and work.answer is not None:
                    call, shard, _ = work.answer
                    link.finish_call(call)
                    link.get_ready(
                        receive=link.incoming_slot(Kind.CALL, call=call + 1, shard=shard),
                        send=link.slot(Kind.RESULT, call=call + 1, shard=shard),
                    )
        except (ZoneError, OSError, ValueError, KeyError, TypeError, queue.Empty) as error:
            leave(f"sandbox: {type(error).__name__}")

    def _send_result(self, link: SealedSocket, message: dict[str, Any], answer: tuple[int, int, int]) -> None:
        slot, size = message["slot"], message["bytes"]
        if message["op"] != "result" or not 0 <= slot < OUT_SLOTS or not 0 <= size <= SLOT_BYTES:
            raise ValueError("malformed answer")
        call, shard, attempt = answer
        link.send(link.slot(Kind.RESULT, call=call, shard=shard, attempt=attempt), self._memory.out_view(slot)[:size])
        with self._sandbox_lock:
            self._taken.append(slot)
            enough = len(self._taken) < OUT_SLOTS
        if not enough:
            self._tell({"op": "free"})

    def _tell(self, message: dict[str, Any]) -> None:
        """Send a message to the sandbox, with the out slots that it may use again."""
        with self._sandbox_lock:
            free, self._taken = self._taken, []
            send_message(self._sandbox, {**message, "free": free} if free else message)


def leave(reason: str, *, status: int = 1) -> None:
    """End this process at once. Its memory, with the key, goes with it."""
    sys.stderr.write(f"keeper ends: {reason}\n")
    sys.stderr.flush()
    os._exit(status)


def main(argv: list[str]) -> None:
    """Serve one lease. ``argv``: descriptors of the custodian's socket, the sandbox's socket, the memory."""
    custodian_fd, sandbox_fd, memory_fd = (int(text) for text in argv)
    missing = harden_self(kind="keeper", keep_fds=(custodian_fd, sandbox_fd, memory_fd))
    memory = SlotMap(mmap.mmap(memory_fd, 0))
    custodian, sandbox = socket.socket(fileno=custodian_fd), socket.socket(fileno=sandbox_fd)
    try:
        ready, _ = recv_message(sandbox, max_bytes=4096)
        start, _ = recv_message(custodian)
    except (OSError, ZoneError):
        leave("sandbox or custodian did not start")
    start["device"] = str(ready.get("device"))[:80]
    # What the sandbox says of itself only ever makes the level worse.
    said = [str(name)[:40] for name in ready.get("missing") or ()]
    stand_in = ["numpy-stand-in"] if start["device"].startswith("numpy") else []
    start["degradations"] = sorted({*start["degradations"], *missing, *said, *stand_in})
    gc.freeze()
    keeper = Keeper(start, custodian, sandbox, memory)
    send_message(custodian, {"op": "ready", "device": start["device"], "degradations": start["degradations"]})
    threading.Thread(target=_watch_clock, args=(keeper, start["not_after"]), daemon=True).start()
    try:
        while True:
            message, fds = recv_message(custodian, max_fds=1)
            if message["op"] == "receipt":
                keeper.receipts.put(message)
            for fd in fds:
                keeper.connect(socket.socket(fileno=fd))
    except (PeerClosedError, OSError):
        leave("custodian is gone")


def _watch_clock(keeper: Keeper, not_after: int) -> None:
    """End the lease when its time is over, or the zone has been silent for too long, whatever else hangs."""
    while (left_s := not_after - time.time()) > 0:
        if time.monotonic() > keeper.deadline():
            leave("the zone is silent")
        time.sleep(min(left_s, CLOCK_INTERVAL_S))
    leave("lease expired")


if __name__ == "__main__":
    main(sys.argv[1:])
