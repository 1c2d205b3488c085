"""Sealed messages on a connection: which memory the ciphers see, and keys that are derived ahead of time."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_gpu import frames, source
from ray_gpu import keeper as keeper_module
from ray_gpu.frames import PlainBuffer, SealedSocket
from ray_gpu.keeper import Keeper
from ray_gpu.request import MAX_FUNCTION_BYTES, pack_work, parse
from ray_gpu.sandbox import memory
from ray_gpu.share import share_table
from ray_gpu.wire import recv_message, send_message
from zones import envelope, plan, shards
from zones.errors import EnvelopeError
from zones.model import Direction, Kind, Obligations, Shuffle, Slot

KEY, GRANT, LEASE = bytes(range(32)), "5" * 64, "lease-1"


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), timeout=10)
        theirs = listener.accept()[0]
    with ours, theirs:
        yield ours, theirs


def sealed(sock: socket.socket, outgoing: Direction) -> SealedSocket:
    """Return one end of a lease's connection."""
    key = envelope.LeaseKey(KEY)
    return SealedSocket(sock, key=key, grant_digest=GRANT, lease=LEASE, outgoing=outgoing)


@pytest.fixture
def links(sockets: tuple[socket.socket, socket.socket]) -> tuple[SealedSocket, SealedSocket]:
    """Return both ends of a lease's connection: the gateway's and the keeper's."""
    return sealed(sockets[0], Direction.OUT), sealed(sockets[1], Direction.BACK)


# -- which memory the ciphers see -------------------------------------------------------------------


class Seen:
    """The memory that ciphers were given: how often, and which of it another process could write as well."""

    def __init__(self) -> None:
        self.uses = 0
        self.shared: list[str] = []

    def look(self, buffer: Any) -> None:
        """Note a buffer; ``s`` in ``/proc/self/maps`` marks a mapping that is shared."""
        self.uses += 1
        address = np.frombuffer(buffer, np.uint8).ctypes.data if len(buffer) else 0
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            start, _, end = line.split(" ", 1)[0].partition("-")
            if int(start, 16) <= address < int(end, 16) and line.split()[1].endswith("s"):
                self.shared.append(line)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Look at every buffer that a cipher reads from or writes to in this process."""
    found = Seen()
    for name in ("Cobblestone256Encryptor", "Cobblestone256Decryptor"):
        monkeypatch.setattr(envelope, name, _looking(getattr(envelope, name), found))
    return found


def _looking(cipher: Any, found: Seen) -> Any:
    class Looking:
        def __init__(self, *args: Any) -> None:
            self._cipher = cipher(*args)

        def update_into(self, data: Any, out: Any) -> int:
            found.look(data)
            found.look(out)
            return int(self._cipher.update_into(data, out))

        def finalize(self) -> bytes:
            return bytes(self._cipher.finalize())

    return Looking


@pytest.fixture
def keeper_side(sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Run a keeper in this process; return the sandbox's end of its socket, and the memory that both write."""
    monkeypatch.setattr(keeper_module, "leave", lambda *_, **__: None)  # it would end this process
    custodian, _custodian = socket.socketpair()
    inside, sandbox = socket.socketpair()
    fd = memory.create()
    slots = memory.SlotMap(mmap.mmap(fd, 0))
    os.close(fd)
    start = {
        "key": KEY, "grant_digest": GRANT, "lease": LEASE, "node": "gpu-1", "pool": "shared",
        "degradations": [], "device": "none", "environment": "", "padding": "fine", "contents": {},
    }  # fmt: skip
    before = set(threading.enumerate())
    keeper = Keeper(start, custodian, inside, slots)
    connection = sockets[1].dup()
    keeper.connect(connection)
    with connection, custodian, _custodian, inside, sandbox:
        yield sandbox, slots
        sockets[0].shutdown(socket.SHUT_RDWR)
        sandbox.shutdown(socket.SHUT_RDWR)
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
            assert not thread.is_alive()


def _said_hello(sock: socket.socket) -> SealedSocket:
    """Return the gateway's end of a connection whose keeper has answered."""
    gateway = sealed(sock, Direction.OUT)
    gateway.send(gateway.slot(Kind.HELLO, call=0), b"")
    assert gateway.receive()[0].kind is Kind.HELLO
    return gateway


def _answer(keeper_side: Any, op: str) -> bytes:
    """Do the sandbox's part for one message: return what it holds, having echoed it if it wants a result."""
    sandbox, slots = keeper_side
    message, _ = recv_message(sandbox)
    assert message["op"] == op
    held = bytes(slots.payload(message["slot"], message["bytes"]))
    if op in ("function", "arguments"):
        send_message(sandbox, {"op": "done"})
    else:
        slots.out_view(0)[: len(held)] = held
        send_message(sandbox, {"op": "result", "slot": 0, "bytes": len(held)})
    return held


def test_ciphers_see_private_memory_alone(
    sockets: tuple[socket.socket, socket.socket], keeper_side: Any, seen: Seen
) -> None:
    """From a notebook's memory file to the sandbox's memory and back, no cipher touches what others can write.

    The gateway's and the keeper's own code runs here, on a real memory file and the real slots; only the sandbox's
    part of the conversation is this test's.
    """
    gateway = _said_hello(sockets[0])
    found = source.from_memory(share_table(pa.table({"x": pa.array(np.arange(300_000.0))})), None)
    table = shards.strip(found.table)
    order = plan.make_plan(
        found.rows, 8, obligations=Obligations(shuffle=Shuffle.NONE), seed=bytes(32), shard_bytes=1 << 20, min_shards=2
    )
    plain = PlainBuffer()

    for shard in range(len(order)):
        size = shards.write_shard(table, order, shard, plain.payload)
        gateway.send_padded(gateway.slot(Kind.SHARD, call=1, shard=shard), plain.padded(size))
        _answer(keeper_side, "run")
        _, payload = gateway.receive()
        assert shards.read_ipc(payload, trusted=False).num_rows == order.shard_rows(shard)

    assert seen.uses > 4 * len(order)
    assert seen.shared == []


@pytest.mark.parametrize("size", [100, 700_000], ids=["small", "large"])
def test_ciphers_see_private_functions_and_arguments(
    sockets: tuple[socket.socket, socket.socket], keeper_side: Any, seen: Seen, size: int
) -> None:
    """The same holds for a function, arguments for shards, and a call with its result: as a notebook sent them."""
    gateway = _said_hello(sockets[0])
    function, arguments = os.urandom(min(size, MAX_FUNCTION_BYTES)), os.urandom(size)
    notebook, connection = socket.socketpair()
    with notebook, connection:
        work = pack_work(function, "f", {})
        asked = {"op": "call", "mode": "call", "work": work, "arguments": arguments}
        threading.Thread(target=send_message, args=(notebook, asked), daemon=True).start()
        request = parse(recv_message(connection)[0])

    before = seen.uses
    gateway.send(gateway.slot(Kind.FUNCTION, call=1), request.work.function)
    assert _answer(keeper_side, "function") == function
    gateway.send(gateway.slot(Kind.ARGUMENTS, call=2, shard=1), request.arguments)
    assert _answer(keeper_side, "arguments") == arguments
    for call in (3, 4):
        gateway.send(gateway.slot(Kind.CALL, call=call, shard=1), request.arguments)
        assert _answer(keeper_side, "call") == arguments
        header, payload = gateway.receive()
        assert (header.kind, header.call, bytes(payload)) == (Kind.RESULT, call, arguments)

    # Sealed and opened, each with at least one input and output: a function, arguments, two calls, two results.
    assert seen.uses - before >= 2 * 2 * 6
    assert seen.shared == []


def test_control_shared_memory_is_seen(links: tuple[SealedSocket, SealedSocket], seen: Seen) -> None:
    """The same look finds a cipher that reads a mapping that another process could write."""
    fd = memory.create()
    shared = memoryview(mmap.mmap(fd, 0))[: envelope.padded_size(0)]
    os.close(fd)

    links[0].send_padded(links[0].slot(Kind.CALL, call=1), shared)

    assert len(seen.shared) == 1


# -- keys that are derived ahead of time ------------------------------------------------------------


def _ready(links: tuple[SealedSocket, SealedSocket], call: int) -> None:
    """Have both ends get ready for call *call*, as gateway and keeper do after the one before."""
    gateway, keeper = links
    gateway.get_ready(receive=gateway.incoming_slot(Kind.RESULT, call=call), send=gateway.slot(Kind.CALL, call=call))
    keeper.get_ready(receive=keeper.incoming_slot(Kind.CALL, call=call), send=keeper.slot(Kind.RESULT, call=call))


def _exchange(links: tuple[SealedSocket, SealedSocket], call: int, payload: bytes, shard: int = 0) -> None:
    gateway, keeper = links
    gateway.send(gateway.slot(Kind.CALL, call=call, shard=shard), payload)
    header, arrived = keeper.receive(keep=False)
    assert (header.kind, header.call, header.shard, bytes(arrived)) == (Kind.CALL, call, shard, payload)
    keeper.send(keeper.slot(Kind.RESULT, call=call, shard=shard), payload[::-1])
    header, arrived = gateway.receive()
    assert (header.kind, header.call, header.shard, bytes(arrived)) == (Kind.RESULT, call, shard, payload[::-1])


def _derived(monkeypatch: pytest.MonkeyPatch) -> list[Slot]:
    """Return a list that grows by the slot of each key that is derived from now on."""
    slots: list[Slot] = []
    honest = envelope._shard_key

    def counted(key: envelope.LeaseKey, slot: Slot) -> bytes:
        slots.append(slot)
        return honest(key, slot)

    monkeypatch.setattr(envelope, "_shard_key", counted)
    return slots


def test_ready_for_what_comes(links: tuple[SealedSocket, SealedSocket], monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that were foreseen are sealed and opened with the keys that were derived before."""
    _exchange(links, 1, b"first")
    _ready(links, 2)
    derived = _derived(monkeypatch)

    _exchange(links, 2, b"again")

    assert derived == []


@pytest.mark.parametrize(
    ("payload", "shard"), [(b"x" * 5000, 0), (b"again", 7), (b"", 1)], ids=["size", "slot", "both"]
)
def test_wrong_guess(links: tuple[SealedSocket, SealedSocket], payload: bytes, shard: int) -> None:
    """A message of another size or slot than the one foreseen goes through all the same, and so do those after it."""
    _exchange(links, 1, b"first")
    _ready(links, 2)

    _exchange(links, 2, payload, shard)
    _exchange(links, 3, b"third")


def test_what_was_prepared_serves_once(
    sockets: tuple[socket.socket, socket.socket], links: tuple[SealedSocket, SealedSocket]
) -> None:
    """Two messages for one slot, which nobody sends, still have two salts: the prepared state is used up by one."""
    _exchange(links, 1, b"first")
    _ready(links, 2)
    slot = links[0].slot(Kind.CALL, call=2)

    links[0].send(slot, b"again")
    first = sockets[1].recv(4096)
    links[0].send(slot, b"again")
    second = sockets[1].recv(4096)

    assert first[:64] == second[:64]
    assert first[64:120] != second[64:120]


def test_replay_of_a_foreseen_message(
    sockets: tuple[socket.socket, socket.socket], links: tuple[SealedSocket, SealedSocket]
) -> None:
    """Being foreseen does not let a message in twice."""
    gateway, keeper = links
    _exchange(links, 1, b"first")
    gateway.send(gateway.slot(Kind.CALL, call=2), b"again")
    recorded = sockets[1].recv(4096, socket.MSG_PEEK)
    _ready(links, 2)
    assert bytes(keeper.receive()[1]) == b"again"

    _ready(links, 2)
    sockets[0].sendall(recorded)

    with pytest.raises(EnvelopeError):
        keeper.receive()


def test_forgery_of_a_foreseen_message(
    sockets: tuple[socket.socket, socket.socket], links: tuple[SealedSocket, SealedSocket]
) -> None:
    """A foreseen header before any other body opens as little as without; the connection's state survives it."""
    _exchange(links, 1, b"first")
    _ready(links, 2)
    header = envelope.header_for(links[0].slot(Kind.CALL, call=2), envelope.padded_size(5)).encode()
    size = envelope.sealed_size(envelope.padded_size(5))

    sockets[0].sendall(header + os.urandom(size))

    with pytest.raises(EnvelopeError):
        links[1].receive()
    _exchange(links, 2, b"again")


def test_sending_from_several_threads(links: tuple[SealedSocket, SealedSocket]) -> None:
    """A thread that gets ready while another sends takes nothing away from it."""
    gateway, keeper = links
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            _ready(links, 500)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for call in range(1, 1000):
            gateway.send(gateway.slot(Kind.CALL, call=call), b"x")
            assert keeper.receive()[0].call == call
    finally:
        stop.set()
        thread.join()


# -- peers that stall, and strangers ----------------------------------------------------------------


@pytest.mark.parametrize("much", [1, 63, 64, 200], ids=["a byte", "half a header", "a header", "half a body"])
def test_message_that_never_ends(
    sockets: tuple[socket.socket, socket.socket],
    links: tuple[SealedSocket, SealedSocket],
    monkeypatch: pytest.MonkeyPatch,
    much: int,
) -> None:
    """A message that has begun must end, though each byte of it comes in time; until one begins there is all time."""
    monkeypatch.setattr(frames, "MESSAGE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(frames, "_WAKE_S", 0.1)
    gateway, keeper = links
    gateway.settimeout(None)
    sealed_message = _recorded(sockets, keeper, keeper.slot(Kind.RESULT, call=1))
    ended = threading.Event()

    def trickle() -> None:
        ended.wait(1)  # four times the limit, and nothing has begun
        for byte in sealed_message[:much]:
            sockets[1].sendall(bytes([byte]))
        while not ended.wait(0.05):
            with contextlib.suppress(OSError):
                sockets[1].sendall(sealed_message[much : much + 1])

    trickling = threading.Thread(target=trickle)
    trickling.start()
    try:
        with pytest.raises(frames.StalledError):
            gateway.receive()
    finally:
        ended.set()
        trickling.join()


def test_a_lease_that_hears_nothing_ends_in_time() -> None:
    """A keeper gives up within ten seconds of the last word; how long that takes is measured where keys are revoked."""
    assert frames.SILENCE_LIMIT_S + keeper_module.CLOCK_INTERVAL_S <= 10


def test_control_without_a_deadline(
    sockets: tuple[socket.socket, socket.socket],
    links: tuple[SealedSocket, SealedSocket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no deadline ends it, the same trickle holds the receiver for as long as it lasts."""
    monkeypatch.setattr(frames, "MESSAGE_TIMEOUT_S", 1e9)
    gateway, keeper = links
    gateway.settimeout(None)
    sealed_message = _recorded(sockets, keeper, keeper.slot(Kind.RESULT, call=1))
    receiving = threading.Thread(target=gateway.receive)
    receiving.start()
    waits = threading.Event()
    for byte in sealed_message[:40]:
        sockets[1].sendall(bytes([byte]))
        waits.wait(0.05)

    assert receiving.is_alive()
    sockets[1].sendall(sealed_message[40:])
    receiving.join(20)
    assert not receiving.is_alive()


def _recorded(sockets: tuple[socket.socket, socket.socket], link: SealedSocket, slot: Slot) -> bytes:
    """Return a sealed message, taken off the connection."""
    link.send(slot, bytes(5000))
    return sockets[0].recv(1 << 16)


def test_peer_that_takes_nothing(links: tuple[SealedSocket, SealedSocket], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not read what it is sent holds the sender for a time, not for ever."""
    monkeypatch.setattr(frames, "MESSAGE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(frames, "SLOWEST_BYTES_PER_S", 1 << 30)
    monkeypatch.setattr(frames, "_WAKE_S", 0.1)
    gateway, _ = links
    gateway.settimeout(None)

    def send_on() -> None:
        for shard in range(100):
            gateway.send(gateway.slot(Kind.SHARD, call=1, shard=shard), bytes(4 << 20))

    with pytest.raises(frames.StalledError):
        send_on()


def test_strangers_at_the_keeper(sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred connections of strangers get no byte, and whoever has the key gets the hello while they are there."""
    monkeypatch.setattr(keeper_module, "leave", lambda *_, **__: None)
    start = {
        "key": KEY, "grant_digest": GRANT, "lease": LEASE, "node": "gpu-1", "pool": "shared",
        "degradations": [], "device": "none", "environment": "", "padding": "fine", "contents": {},
    }  # fmt: skip
    custodian, inside = socket.socketpair()
    before = set(threading.enumerate())
    with contextlib.ExitStack() as closing, custodian, inside, socket.create_server(("127.0.0.1", 0)) as listener:
        keeper = Keeper(start, custodian, inside, memory.SlotMap(mmap.mmap(-1, 1)))
        strangers = []
        for number in range(200):
            stranger = closing.enter_context(socket.create_connection(listener.getsockname()))
            keeper.connect(listener.accept()[0])
            with contextlib.suppress(OSError):
                stranger.sendall((b"", os.urandom(600), bytes(30))[number % 3])
            strangers.append(stranger)
        keeper.connect(closing.enter_context(sockets[1].dup()))

        gateway = _said_hello(sockets[0])

        assert all(_hears_nothing(stranger) for stranger in strangers)
        late = closing.enter_context(socket.create_connection(listener.getsockname()))
        keeper.connect(listener.accept()[0])
        assert late.recv(1) == b""
        gateway.shutdown()
        inside.shutdown(socket.SHUT_RDWR)
        custodian.shutdown(socket.SHUT_RDWR)
        for stranger in strangers:
            stranger.close()
        for thread in set(threading.enumerate()) - before:
            thread.join(20)


def _hears_nothing(stranger: socket.socket) -> bool:
    stranger.setblocking(False)
    try:
        return stranger.recv(1) == b""
    except (BlockingIOError, ConnectionError):
        return True
