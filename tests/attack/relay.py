"""A relay of an attacker's own in the real one's place: it sees all that the gateway tells it, and says what it likes.

It places leases itself, on the cluster's real custodians, by the product's own actor class; so no Ray takes part, and
what the gateway sends to nodes can be recorded byte by byte on its way.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import msgpack

from ray_gpu import actor, raylet
from ray_gpu.actor import GpuActor
from ray_gpu.embedded import CAGE_UID, GPU_NODES, POOL
from ray_gpu.wire import recv_message, send_message, unix_connect
from tests.proofs.attacked import Attacked

#: Where the actors of this relay listen: the clinic's zone.yaml allows it, and no node's own ports are there.
HOST = "127.0.9.1"
#: Uid of the zone's real relay, whose place is taken.
RELAY_UID = CAGE_UID + len(GPU_NODES)


@dataclass(slots=True)
class Wire:
    """One data connection, as whoever is on the path between gateway and node records it."""

    lease: str
    sent: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)


class AttackersRelay:
    """Use it as a context manager. What it does not lie about it does honestly."""

    def __init__(self, attacked: Attacked) -> None:
        self._attacked = attacked
        #: All that the gateway said, oldest first.
        self.heard: list[dict[str, Any]] = []
        self.wires: list[Wire] = []
        #: Answers in place of the honest ones, by operation.
        self.lies: dict[str, Any] = {}
        self._actors: dict[str, tuple[GpuActor, str, int]] = {}
        self._free = dict.fromkeys(GPU_NODES, 1000)
        self._lock, self._send_lock = threading.Lock(), threading.Lock()
        self._room = threading.Condition(self._lock)
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        path = self._attacked.layout.relay_dir(self._attacked.zone) / raylet.RELAY_SOCKET
        with _as_relay():
            self.sock = self._closing.enter_context(unix_connect(str(path)))
        self.say({"event": "ready"})
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        for lease in list(self._actors):
            self._release(lease)
        self._closing.close()

    def say(self, message: dict[str, Any]) -> None:
        """Send any message."""
        with self._send_lock:
            send_message(self.sock, message)

    # -- what it does ---------------------------------------------------------------------------

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                request, _ = recv_message(self.sock)
                self.heard.append(request)
                threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def _answer(self, request: dict[str, Any]) -> None:
        operation = str(request["op"])
        answer = getattr(self, f"_on_{operation}")(request)
        if operation in self.lies:
            answer = self.lies[operation](answer) if callable(self.lies[operation]) else self.lies[operation]
        with contextlib.suppress(OSError):
            self.say({"ok": True, **answer, "id": request["id"]})

    def _on_nodes(self, _: dict[str, Any]) -> dict[str, Any]:
        return {
            "nodes": [
                {"id": name, "name": name, "alive": True, "labels": {"ray-gpu-pool": POOL}, "gpus": 1.0,
                 "gpus_free": free / 1000}
                for name, free in self._free.items()
            ]
        }  # fmt: skip

    def _on_place(self, request: dict[str, Any]) -> dict[str, Any]:
        avoid = re.split(r"[(),]", str(request["labels"].get("ray-gpu-node", "")))
        milli = round(request["gpus"] * 1000)
        with self._lock:
            if not self._room.wait_for(lambda: self._fitting(milli, avoid), request["timeout_s"]):
                return {"ok": False, "error": "no room"}
            fits = self._fitting(milli, avoid)
            node = max(fits, key=lambda name: self._free[name])
            self._free[node] -= milli
            os.environ[actor.CUSTODIAN_VARIABLE] = str(
                self._attacked.layout.custodian_dir(node) / raylet.CUSTODIAN_SOCKET
            )
            os.environ[actor.NODE_VARIABLE] = node
            made = GpuActor()
            self._actors[request["lease"]] = made, node, milli
        threading.Thread(target=self._watch, args=(request["lease"], made), daemon=True).start()
        answer = made.offer(request["lease"])
        return {**answer["reply"], "node": node}

    def _fitting(self, milli: int, avoid: list[str]) -> list[str]:
        return [name for name, free in self._free.items() if free >= milli and name not in avoid]

    def _watch(self, lease: str, made: GpuActor) -> None:
        reason = made.watch()
        if self._release(lease):
            with contextlib.suppress(OSError):
                self.say({"event": "lost", "lease": lease, "reason": reason})

    def _on_grant(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            made = self._actors[request["lease"]][0]
        answer = made.grant(msgpack.packb({name: value for name, value in request.items() if name != "id"}))
        endpoint = answer["endpoint"] and self._tapped(request["lease"], answer["endpoint"])
        return {**answer["reply"], "endpoint": endpoint}

    def _on_release(self, request: dict[str, Any]) -> dict[str, Any]:
        self._release(request["lease"])
        return {}

    def _release(self, lease: str) -> bool:
        with self._lock:
            made, node, milli = self._actors.pop(lease, (None, "", 0))
            if made is None:
                return False
            self._free[node] += milli
            self._room.notify_all()
        made.close()
        return True

    # -- what it records ------------------------------------------------------------------------

    def _tapped(self, lease: str, endpoint: list[Any]) -> list[Any]:
        """Return an endpoint that passes all to *endpoint*, and keeps a copy."""
        listener = self._closing.enter_context(socket.create_server((HOST, 0)))
        threading.Thread(target=self._tap, args=(lease, listener, endpoint), daemon=True).start()
        return list(listener.getsockname())

    def _tap(self, lease: str, listener: socket.socket, endpoint: list[Any]) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._closing.enter_context(listener.accept()[0])
                far = self._closing.enter_context(socket.create_connection((endpoint[0], endpoint[1])))
                wire = Wire(lease)
                self.wires.append(wire)
                for source, target, record in ((near, far, wire.sent), (far, near, wire.answered)):
                    threading.Thread(target=_pass_on, args=(source, target, record), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            record += data
            target.sendall(data)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _as_relay() -> Iterator[None]:
    """Connect as the relay's uid: the gateway asks the kernel who is there."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(RELAY_UID)
    try:
        yield
    finally:
        os.seteuid(0)
