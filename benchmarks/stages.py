"""What each stage of a call costs by itself: the product's own functions, on the sizes of the measured calls.

No code path of the product exists for this. Each stage runs here alone, warm, in one process; what the whole
costs beyond their sum is named in the report. This module does I/O: a ledger, sockets, shared memory.
"""

from __future__ import annotations

import mmap
import secrets
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.arithmetic import echo, score_batch
from ray_gpu import Batch, functions
from ray_gpu.answers import write_outcome
from ray_gpu.outcome import open_outcome
from ray_gpu.share import open_sealed, share_value
from ray_gpu.wire import recv_message, send_message
from zones import plan, shards, values
from zones.config import load_zone
from zones.envelope import (
    LENGTH_BYTES,
    PIECE_BYTES,
    SEAL_SLACK_BYTES,
    LeaseKey,
    Opener,
    Sealer,
    length_prefix,
    open_,
    padded_size,
    seal,
)
from zones.labels import ARGUMENTS
from zones.ledger import Egress, Ledger
from zones.model import Decision, Direction, EgressRequest, Kind, Obligations, Slot
from zones.policy import Policy

#: A stage's name, where it runs, and its seconds.
Stage = tuple[str, str, float]

#: Size of the volume job's shards here, bytes.
SHARD_BYTES = 4 << 20
_GRANT_DIGEST = "0" * 64
_LEASE = "lease-of-the-benchmark"
_ECHO_PROGRAM = """
import socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
while data := sock.recv(65536):
    sock.sendall(data)
"""


def _median(work: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of *work*, after one run that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _slot(kind: Kind, number: int, direction: Direction = Direction.OUT) -> Slot:
    return Slot(lease=_LEASE, direction=direction, kind=kind, call=number, shard=0, attempt=0)


class Gate:
    """Policy and ledger of a zone, as the gateway has them, on the same disk.

    Args:
        policies: Policies directory.
        zone: Name of the zone.
        directory: Where the ledger's file goes.
    """

    def __init__(self, policies: Path, zone: str, directory: Path) -> None:
        loaded = load_zone(policies, zone)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._policy = Policy.load(policies, loaded)
        self._ledger = Ledger.open(directory / "ledger.sqlite", zone=zone)
        self._zone = loaded

    def question(self, dataset: str, columns: list[str], pool: str = "shared") -> EgressRequest:
        """Return a request that policy allows."""
        classes = {self._zone.datasets[dataset].columns[name] for name in columns if dataset} | {"internal"}
        return EgressRequest(
            zone=self._zone.name,
            pool=pool,
            person="dana",
            groups=frozenset({"research"}),
            purpose="benchmark",
            dataset=dataset,
            columns=frozenset(columns),
            classes=frozenset(classes),
            function_digest="0" * 64,
        )

    def decide(self, question: EgressRequest) -> Decision:
        """Ask policy."""
        return self._policy.decide(question)

    def egress(self, question: EgressRequest) -> Egress:
        """Return what an entry says."""
        return Egress(request=question, session="benchmark", policy_digest=self._zone.policy_digest)

    def decided(self, question: EgressRequest, decision: Decision) -> int:
        """Write a decision down, durably."""
        return self._ledger.decided(self.egress(question), decision)

    def intend(self, question: EgressRequest, entry: int) -> Any:
        """Write an intent down, durably."""
        return self._ledger.intend(self.egress(question), decision=entry, calls=1000, bytes_=1 << 40)

    def close(self) -> None:
        """Close the ledger."""
        self._ledger.close()


#: Threads that write entries at once, as the calls of so many sessions do.
WRITERS = 64


def of_ledger(gate: Gate, *, repeats: int = 300) -> list[tuple[str, float]]:
    """Return what writing down costs, seconds: an entry alone, one of many at once, and what a small call pays."""
    question = gate.question("", list(ARGUMENTS))
    decision = gate.decide(question)
    entry = gate.decided(question, decision)
    budget = gate.intend(question, entry)
    alone = _median(lambda: gate.decided(question, decision), repeats)
    entries = 10 * repeats
    with ThreadPoolExecutor(WRITERS) as writers:
        start = time.perf_counter()
        list(writers.map(lambda _: gate.decided(question, decision), range(entries)))
        together = (time.perf_counter() - start) / entries
    return [
        ("an entry on disk, one writer", alone),
        (f"an entry on disk, {WRITERS} writers at once, who share commits: for each", together),
        ("a small call's draw on an intent that is on disk", _median(lambda: budget.draw(0, 1), repeats)),
    ]


# --- one small call -----------------------------------------------------------------------------------------------


def of_call(gate: Gate, value: bytes, *, repeats: int = 300) -> list[Stage]:
    """Return the stages of ``f.remote(value).result()``, in the order in which they happen."""
    arguments = bytes(values.encode([[value], {}]))
    function = functions.pack(echo)
    request = {"op": "call", "mode": "call", "name": "echo", "function": function, "arguments": arguments}
    question = gate.question("", list(ARGUMENTS))
    entry = gate.decided(question, gate.decide(question))
    budget = gate.intend(question, entry)
    answer = memoryview(bytearray(64 << 10))
    used = write_outcome(answer, {"status": "ok", "printed": ""}, value, values.encode_into)
    key = LeaseKey(secrets.token_bytes(32))
    sealed = [
        seal(payload, key=key, grant_digest=_GRANT_DIGEST, slot=_slot(Kind.CALL, 1))
        for payload in (arguments, answer[:used])
    ]

    def timed(work: Callable[[], object]) -> float:
        return _median(work, repeats)

    def sealing(payload: Any) -> float:
        return timed(lambda: seal(payload, key=key, grant_digest=_GRANT_DIGEST, slot=_slot(Kind.CALL, 1)))

    def opening(message: bytes) -> float:
        return timed(lambda: open_(message, key=key, grant_digest=_GRANT_DIGEST, slot=_slot(Kind.CALL, 1)))

    pair = socket.socketpair()
    message = _message_seconds(pair, request, repeats)
    small = _message_seconds(pair, {"op": "call", "slot": 0, "bytes": 1024, "function": 1}, repeats)
    for end in pair:
        end.close()
    unix, tcp = hops(repeats=repeats)
    return [
        ("encode the arguments", "notebook", timed(lambda: values.encode([[value], {}]))),
        ("request: pack, move, unpack", "notebook, gateway", message),
        ("policy: find the remembered decision", "gateway", timed(lambda: {question: entry}.get(replace(question)))),
        ("ledger: draw on a written intent (a new one each 1,000 calls)", "gateway", timed(lambda: budget.draw(0, 1))),
        ("seal", "gateway", sealing(arguments)),
        ("open", "keeper", opening(sealed[0])),
        ("messages keeper to sandbox and back", "keeper, sandbox", 2 * small),
        ("decode, run, encode", "sandbox", timed(lambda: _run(arguments, answer))),
        ("seal the result", "keeper", sealing(answer[:used])),
        ("open the result", "gateway", opening(sealed[1])),
        ("check the result", "gateway", timed(lambda: open_outcome(answer[:used]))),
        ("reply: pack, move, unpack", "gateway, notebook", message),
        ("decode the result", "notebook", timed(lambda: values.decode(bytes(values.encode(value))))),
        ("six wake-ups: two Unix round trips, one TCP", "kernel", 2 * unix + tcp),
    ]


def _run(arguments: bytes, answer: memoryview) -> None:
    args, kwargs = values.decode(arguments)
    write_outcome(answer, {"status": "ok", "printed": ""}, echo(*args, **kwargs), values.encode_into)


def _message_seconds(pair: tuple[socket.socket, socket.socket], message: dict[str, Any], repeats: int) -> float:
    def once() -> None:
        send_message(pair[0], message)
        recv_message(pair[1])

    return _median(once, repeats)


def hops(*, repeats: int) -> tuple[float, float]:
    """Return the seconds of a round trip between two Python processes: over a Unix socket, and over loopback TCP."""
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    listener.close()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return _round_trip(*socket.socketpair(), repeats=repeats), _round_trip(near, far, repeats=repeats)


def _round_trip(near: socket.socket, far: socket.socket, *, repeats: int) -> float:
    child = subprocess.Popen([sys.executable, "-c", _ECHO_PROGRAM, str(far.fileno())], pass_fds=(far.fileno(),))
    far.close()

    def once() -> None:
        near.sendall(b"x" * 64)
        near.recv(64)

    try:
        return _median(once, repeats)
    finally:
        near.close()
        child.wait()


# --- the volume job -----------------------------------------------------------------------------------------------


def of_job(
    gate: Gate, dataset: str, table: pa.Table, coefficients: list[Any], obligations: Obligations, sample: int
) -> list[Stage]:
    """Return the processor seconds that the stages of ``f.map(table)`` take, each summed over all shards.

    Args:
        gate: Policy and ledger.
        dataset: Catalog name.
        table: The rows; memory-mapped.
        coefficients: The function's further arguments.
        obligations: How rows are shuffled.
        sample: Shards to measure; the sum is scaled to all of them.
    """
    question = gate.question(dataset, table.column_names)
    clock = Clock()
    with clock.stage("policy: one decision", "gateway"):
        decision = gate.decide(question)
    with clock.stage("ledger: decision, intent and completion on disk", "gateway"):
        gate.intend(question, gate.decided(question, decision)).settle(outcome="done")
    with clock.stage("strip and plan (draw the order)", "gateway"):
        stripped = shards.strip(table)
        order = plan.make_plan(
            table.num_rows,
            plan.row_bytes(stripped),
            obligations=obligations,
            seed=secrets.token_bytes(32),
            shard_bytes=SHARD_BYTES - SHARD_BYTES // 64 - (8 << 10),
        )
    totals, parts = _shards(stripped, order, coefficients, sample)
    for (name, where), seconds in totals.items():
        clock.seconds[name, where] = seconds
    with clock.stage("put the rows back in order", "gateway"):
        result = shards.reassemble(parts, order)
    with clock.stage("hand the result over in shared memory", "gateway, notebook"):
        values.decode(open_sealed(share_value(result)))
    return [(name, where, seconds) for (name, where), seconds in clock.seconds.items()]


def _shards(
    table: pa.Table, order: plan.Plan, coefficients: list[Any], sample: int
) -> tuple[dict[tuple[str, str], float], dict[int, Any]]:
    """Take *sample* shards through every stage; return the stages scaled to all shards, and a result per shard."""
    with _Path(shards.shard_size(table, order, 0)) as path:
        path.shard(table, order, 0, coefficients)
        path.clock.seconds.clear()
        taken = range(0, len(order), max(1, len(order) // sample))
        parts = {index: path.shard(table, order, index, coefficients) for index in taken}
        seconds = {name: value * len(order) / len(taken) for name, value in path.clock.seconds.items()}
    # The shards that were left out get a result of their length, so that all can be put in order.
    return seconds, {
        index: parts.get(index, np.resize(parts[0], order.shard_rows(index))) for index in range(len(order))
    }


class Clock:
    """Processor seconds of the calling thread, by stage and place.

    Not of the process: a linear algebra library's threads spin for a while after each product.
    """

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = {}

    @contextmanager
    def stage(self, name: str, where: str) -> Iterator[None]:
        """Add what the context costs to a stage."""
        start = time.thread_time()
        yield
        self.add(name, where, time.thread_time() - start)

    def add(self, name: str, where: str, seconds: float) -> None:
        """Add seconds to a stage."""
        self.seconds[name, where] = self.seconds.get((name, where), 0.0) + seconds


class _Path:
    """Buffers, key and socket that shards go through, and the seconds of each stage so far."""

    def __init__(self, shard_size: int) -> None:
        room = 2 * padded_size(shard_size) + (1 << 20)
        self._plain, self._opened = (
            memoryview(mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) for _ in range(2)
        )
        self._shared = memoryview(mmap.mmap(-1, room))
        self._sealed = memoryview(bytearray(room))
        self._piece = memoryview(bytearray(PIECE_BYTES))
        self._key = LeaseKey(secrets.token_bytes(32))
        self._number = 0
        self.clock = Clock()
        self._near, self._far = _loopback()

    def __enter__(self) -> _Path:
        return self

    def __exit__(self, *_: object) -> None:
        self._near.close()
        self._far.close()

    def shard(self, table: pa.Table, order: plan.Plan, index: int, coefficients: list[Any]) -> Any:
        """Take one shard through every stage and return its result."""
        stage = self.clock.stage
        with stage("gather the rows into an Arrow stream", "gateway"):
            size = shards.write_shard(table, order, index, lambda _: self._plain[LENGTH_BYTES:])
        start = time.thread_time()
        padded, body = self._seal(size, Kind.SHARD, Direction.OUT)
        sealed = time.thread_time() - start
        more = 1 - (LENGTH_BYTES + size) / padded
        self.clock.add("seal", "gateway", sealed * (1 - more))
        self.clock.add("padding: its part of the sealing, by bytes", "gateway", sealed * more)
        self._move(body, "send and receive over loopback TCP", "gateway, keeper")
        with stage("open", "keeper"):
            self._open(padded, body, Kind.SHARD, Direction.OUT)
        with stage("copy into the sandbox's memory", "keeper"):
            self._shared[:size] = self._opened[LENGTH_BYTES : LENGTH_BYTES + size]
        with stage("compute", "sandbox"):
            batch = Batch(shards.read_ipc(self._shared[:size], trusted=True))
            value = score_batch(batch, *coefficients)
            del batch
        with stage("encode the result", "sandbox"):
            used = write_outcome(self._shared, {"status": "ok", "printed": ""}, value, values.encode_into)
        back = ("seal, send, receive, open the result", "keeper, gateway")
        with stage(*back):
            self._plain[LENGTH_BYTES : LENGTH_BYTES + used] = self._shared[:used]
            padded, body = self._seal(used, Kind.RESULT, Direction.BACK)
        self._move(body, *back)
        with stage(*back):
            self._open(padded, body, Kind.RESULT, Direction.BACK)
        with stage("check and decode the result", "gateway"):
            copy = memoryview(bytes(self._opened[LENGTH_BYTES : LENGTH_BYTES + used]))
            return open_outcome(copy).value

    def _seal(self, size: int, kind: Kind, direction: Direction) -> tuple[int, int]:
        padded = padded_size(size)
        self._plain[:LENGTH_BYTES] = length_prefix(size)
        self._plain[LENGTH_BYTES + size : padded] = bytes(padded - LENGTH_BYTES - size)
        self._number += 1
        sealer = Sealer(self._key, _GRANT_DIGEST, _slot(kind, self._number, direction), padded)
        filled = 0
        for start in range(0, padded, PIECE_BYTES):
            piece = self._plain[start : min(start + PIECE_BYTES, padded)]
            filled += sealer.update_into(piece, self._sealed[filled : filled + len(piece) + SEAL_SLACK_BYTES])
        tail = sealer.finalize()
        self._sealed[filled : filled + len(tail)] = tail
        return padded, filled + len(tail)

    def _open(self, padded: int, body: int, kind: Kind, direction: Direction) -> None:
        opener = Opener(self._key, _GRANT_DIGEST, _slot(kind, self._number, direction), padded)
        filled = 0
        for start in range(0, body, PIECE_BYTES):
            filled += opener.update_into(self._sealed[start : min(start + PIECE_BYTES, body)], self._opened[filled:])
        opener.finalize_into(self._opened[filled:])

    def _move(self, size: int, name: str, where: str) -> None:
        """Send *size* sealed bytes in another thread and receive them in this one, both counted for the stage."""

        def send() -> None:
            start = time.thread_time()
            self._near.sendall(self._sealed[:size])
            sent.append(time.thread_time() - start)

        sent: list[float] = []
        sender = threading.Thread(target=send)
        sender.start()
        start, left = time.thread_time(), size
        while left:
            left -= self._far.recv_into(self._piece[: min(left, PIECE_BYTES)])
        received = time.thread_time() - start
        sender.join()
        self.clock.add(name, where, sum(sent) + received)


def _loopback() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far
