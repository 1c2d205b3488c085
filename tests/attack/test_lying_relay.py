"""A relay that lies: garbage, impossible answers, endpoints that the zone does not allow. It costs the zone nothing.

Quick: the gateway's own code in this process. The whole gateway under a lying relay is at the end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import msgpack
import pytest

import ray_gpu
from ray_gpu.embedded import shipped_policies
from ray_gpu.leases import LeaseOpener
from ray_gpu.relay_link import RelayLink
from ray_gpu.wire import recv_message
from tests.attack.relay import AttackersRelay
from tests.proofs.attacked import Attacked
from zones.config import load_zone
from zones.errors import EgressDeniedError, GatewayError, GrantRefusedError, LedgerUnavailableError, ZoneError


def framed(body: bytes) -> bytes:
    """Return a message of any content."""
    return struct.pack("!I", len(body)) + body


#: What is no message of a relay's: the gateway drops the connection, and whoever waited is told.
GARBAGE = {
    "random bytes": b"\x00\x00\x01\x00" + os.urandom(256),
    "length of four gigabytes": b"\xff\xff\xff\xff" + bytes(64),
    "length over the limit": struct.pack("!I", (64 << 10) + 1) + bytes(64),
    "nested deeply": framed(b"\x81\xa1a" + b"\x91" * 30_000 + b"\xc0"),
    "no map": framed(msgpack.packb([1, 2, 3])),
    "extension": framed(msgpack.packb({"id": msgpack.ExtType(1, b"x")})),
    "id that is a list": framed(b"\x81\xa2id\x91\x01"),
    "draining nodes that are a number": framed(msgpack.packb({"event": "draining", "nodes": 7})),
    "descriptors that are not there": framed(msgpack.packb({"id": 1, "fds": 3})),
}
#: What is a message and says nothing: the next answer counts.
IGNORED = {
    "unknown id": {"id": 999_999, "ok": True},
    "id of another type": {"id": "1", "ok": True},
    "no id": {"ok": True},
    "unknown event": {"event": "exec", "code": "1/0"},
    "lease of somebody else lost": {"event": "lost", "lease": "of-nobody", "reason": "x" * 40_000},
    "all nodes drain": {"event": "draining", "nodes": ["gpu-1", "gpu-2", "\x00" * 1000]},
}


@pytest.fixture
def linked() -> Iterator[tuple[RelayLink, socket.socket]]:
    """The gateway's side of a relay connection, and the relay's end of it."""
    ours, theirs = socket.socketpair()
    link = RelayLink(lambda *_: None)
    serving = threading.Thread(target=link.attach, args=(ours,))
    serving.start()
    with theirs:
        assert link.wait(10)
        yield link, theirs
        with contextlib.suppress(OSError):
            theirs.shutdown(socket.SHUT_RDWR)
        serving.join(10)
        assert not serving.is_alive()


def asked(linked: tuple[RelayLink, socket.socket], answer: Callable[[int], bytes]) -> dict[str, Any]:
    """Return what the gateway makes of a relay's answer to one request."""
    link, relay = linked

    def reply() -> None:
        request, _ = recv_message(relay)
        relay.sendall(answer(request["id"]))

    replying = threading.Thread(target=reply)
    replying.start()
    try:
        return link.request({"op": "place", "pool": "shared"}, timeout_s=20)
    finally:
        replying.join(10)


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_ends_the_connection(linked: tuple[RelayLink, socket.socket], name: str) -> None:
    """Nobody waits for a relay that talks nonsense, and the gateway knows that it has none."""
    with pytest.raises(GatewayError, match="relay is gone"):
        asked(linked, lambda _: GARBAGE[name])
    assert not linked[0].connected


@pytest.mark.parametrize("name", IGNORED)
def test_what_says_nothing_is_ignored(linked: tuple[RelayLink, socket.socket], name: str) -> None:
    """An answer to nobody, or an event about nothing, changes nothing; the honest answer after it arrives."""
    answer = asked(
        linked, lambda number: framed(msgpack.packb(IGNORED[name])) + framed(msgpack.packb({"id": number, "yes": 1}))
    )

    assert answer["yes"] == 1


@pytest.mark.parametrize("error", ["EgressDeniedError", "LedgerUnavailableError", "RemoteFunctionError", "exec"])
def test_relay_cannot_speak_for_others(linked: tuple[RelayLink, socket.socket], error: str) -> None:
    """A relay reports what relays know of: not what policy, ledger or a function would have said."""
    document = {"ok": False, "error": {"error": error, "message": "says the relay", "fields": {"type_name": "X"}}}
    with pytest.raises(ZoneError) as caught:
        asked(linked, lambda number: framed(msgpack.packb({**document, "id": number})))

    assert type(caught.value) is ZoneError
    assert not isinstance(caught.value, (EgressDeniedError, LedgerUnavailableError))


# -- endpoints ------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Where a lying relay would have the gateway connect to."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.setblocking(False)
        yield made


def opener(*endpoints: str) -> LeaseOpener:
    """Return the gateway's side of leases of a zone that allows these endpoints."""
    absent: Any = None
    zone = load_zone(shipped_policies(), "clinic")
    return LeaseOpener(replace(zone, endpoints=endpoints), absent, absent, node_ca="")


def arrived(listener: socket.socket) -> bool:
    """Tell whether somebody connected."""
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def test_endpoint_outside(listener: socket.socket) -> None:
    """An address or a port that zone.yaml does not name is refused before anything connects to it."""
    port = listener.getsockname()[1]
    for endpoint in (f"127.0.0.0/8:{port + 1}-{port + 1}", f"10.0.0.0/8:{port}-{port}", "127.0.0.2/32:1-65535"):
        with pytest.raises(GrantRefusedError, match="endpoints do not allow"):
            opener(endpoint)._connect(["127.0.0.1", port])

    assert not arrived(listener)


def test_endpoint_allowed(listener: socket.socket) -> None:
    """Where zone.yaml names it, the same connection arrives."""
    port = listener.getsockname()[1]

    opener(f"127.0.0.0/8:{port}-{port}")._connect(["127.0.0.1", port]).close()

    assert arrived(listener)


@pytest.mark.parametrize(
    "endpoint",
    [None, [], ["127.0.0.1"], "127.0.0.1:80", ["localhost", 80], ["127.0.0.1", "80x"], ["127.0.0.1", float("inf")],
     ["127.0.0.1", float("nan")], [2130706433, 80], ["0177.0.0.1", 80], {"host": "127.0.0.1"}, ["::ffff:127.0.0.1", 80],
     ["127.0.0.1\x00.example", 80], ["127.0.0.1", -1], ["127.0.0.1", 1 << 70]],
)  # fmt: skip
def test_endpoint_that_is_none(endpoint: Any) -> None:
    """What is no address and port, or another spelling of one, is refused: no name is ever looked up."""
    with pytest.raises(GrantRefusedError):
        opener("127.0.0.0/8:1-65535")._connect(endpoint)


# -- the whole gateway ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attacked(start_cluster: Callable[..., AbstractContextManager[Any]]) -> Iterator[Attacked]:
    """One cluster for this file."""
    with start_cluster() as cluster:
        yield Attacked(state=cluster.state, document=cluster.document, mark="")


def _one_call(session: ray_gpu.Session) -> Any:
    return ray_gpu.gpu_remote(session=session, num_gpus=0.1, placement_timeout_s=20)(lambda x: x + 1).remote(1)


@pytest.mark.heavy
def test_gateway_outlives_lying_relays(attacked: Attacked) -> None:
    """After each lie the gateway is the same process, a lease that it holds goes on, and the next relay is served."""
    gateway = attacked.gateway()
    for lie in (*GARBAGE.values(), *(framed(msgpack.packb(said)) for said in IGNORED.values())):
        with AttackersRelay(attacked) as relay, attacked.attach() as session:
            assert _one_call(session).result(timeout=60) == 2
            relay.sock.sendall(lie)
            assert _one_call(session).result(timeout=60) == 2
        assert attacked.gateway() == gateway


@pytest.mark.heavy
def test_gateway_connects_nowhere_else(attacked: Attacked) -> None:
    """Aimed at a port outside zone.yaml, the gateway refuses; aimed inside, it connects, and finds no keeper there."""
    with socket.create_server(("127.0.0.1", 19_999)) as outside, AttackersRelay(attacked) as relay:
        outside.setblocking(False)
        relay.lies["grant"] = lambda answer: {**answer, "endpoint": ["127.0.0.1", 19_999]}
        with attacked.attach() as session, pytest.raises(GrantRefusedError, match="endpoints do not allow"):
            _one_call(session).result(timeout=60)
        assert not arrived(outside)

        inside, connections = socket.create_server(("127.0.0.1", 29_998)), []
        waiting = threading.Thread(target=lambda: connections.append(inside.accept()[0]))
        waiting.start()
        relay.lies["grant"] = lambda answer: {**answer, "endpoint": ["127.0.0.1", 29_998]}
        with attacked.attach() as session, inside:
            call = _one_call(session)
            waiting.join(60)
            assert len(connections) == 1
            relay.lies.clear()
            connections[0].close()
            with contextlib.suppress(ZoneError):
                call.result(timeout=60)


@pytest.mark.heavy
def test_strangers_on_the_data_port(attacked: Attacked) -> None:
    """Two hundred strangers who were there first neither hear a byte nor keep the gateway out, before or after."""
    strangers: list[socket.socket] = []

    def crowded(answer: dict[str, Any]) -> dict[str, Any]:
        for number in range(200):
            stranger = socket.create_connection(tuple(answer["endpoint"]))
            with contextlib.suppress(OSError):
                stranger.sendall((b"", os.urandom(600), bytes(30))[number % 3])
            strangers.append(stranger)
        return answer

    with AttackersRelay(attacked) as relay, attacked.attach() as session:
        relay.lies["grant"] = crowded
        remote: Any = ray_gpu.gpu_remote(session=session, num_gpus=0.1, concurrency=1)(lambda x: x + 1)

        assert remote.remote(1).result(timeout=60) == 2
        assert [remote.remote(number).result(timeout=60) for number in range(50)] == list(range(1, 51))
        assert len(session.status()["leases"]) == 1
        knock = bytes(next(wire.sent for wire in relay.wires if wire.answered))[:400]
        endpoint = strangers[0].getpeername()
        for stranger in strangers:
            stranger.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                assert stranger.recv(1) == b""
            stranger.close()
        with socket.create_connection(endpoint, timeout=20) as replaying, contextlib.suppress(OSError):
            replaying.sendall(knock)
            assert replaying.recv(1) == b""
        assert remote.remote(1).result(timeout=60) == 2
