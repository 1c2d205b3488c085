"""The gateway's side of the conversation with its relay. This module does I/O.

The relay is caged together with its raylet and counts as compromised: it can lose, delay and invent
answers. So nothing it says is believed that is not signed by a node (offers) or checked against
zone.yaml (endpoints), and it is told nothing secret. Messages are small msgpack maps.
"""

from __future__ import annotations

import itertools
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from ray_gpu.wire import recv_message, send_message
from zones.errors import (
    ClusterError,
    GatewayError,
    GrantRefusedError,
    LeaseLostError,
    PlacementError,
    SandboxLevelError,
    VaultError,
    ZoneError,
    from_wire,
)

#: Largest message either way, bytes.
MAX_RELAY_BYTES = 64 << 10
#: Every request but ``place`` is answered within this time, seconds.
ANSWER_TIMEOUT_S = 45.0
#: What relay, actor and custodian may report. Anything else, such as a refusal of policy, they cannot know of.
REPORTABLE = (
    ClusterError, GatewayError, GrantRefusedError, LeaseLostError, PlacementError, SandboxLevelError, VaultError,
)  # fmt: skip


class RelayLink:
    """Requests to one relay, from any thread.

    Args:
        on_lost: Called with a lease id and a reason when the relay says that its actor is gone.
        on_draining: Called with the names of the nodes that are about to be restarted, whenever that changes.
    """

    def __init__(
        self,
        on_lost: Callable[[str, str], None],
        on_draining: Callable[[frozenset[str]], None] = lambda _: None,
    ) -> None:
        self._on_lost = on_lost
        self._on_draining = on_draining
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._arrived = threading.Event()

    def attach(self, sock: socket.socket) -> None:
        """Serve a relay that connected; returns when it is gone. A newer relay takes the place of an older."""
        with self._lock:
            self._sock = sock
            self._arrived.set()
        try:
            # What the one before said of nodes, this one may not know of.
            self._on_draining(frozenset())
            while True:
                message, _ = recv_message(sock, max_bytes=MAX_RELAY_BYTES)
                self._handle(message)
        except Exception as error:  # noqa: BLE001 - whatever a lying relay's words cause, nobody waits for it any more
            if not isinstance(error, OSError):
                sys.stderr.write(f"the relay sent what is no message of ours ({type(error).__name__})\n")
        finally:
            self._drop(sock)

    def _handle(self, message: dict[str, Any]) -> None:
        if message.get("event") == "lost":
            self._on_lost(str(message.get("lease")), str(message.get("reason"))[:200])
            return
        if message.get("event") == "draining":
            self._on_draining(frozenset(str(name) for name in message.get("nodes") or ()))
            return
        with self._lock:
            future = self._waiting.pop(message.get("id", 0), None)
        if future is not None:
            future.set_result(message)

    def _drop(self, sock: socket.socket) -> None:
        sock.close()
        with self._lock:
            if self._sock is sock:
                self._sock = None
                self._arrived.clear()
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(
                GatewayError(
                    "the relay is gone; with carrier edge start the zone's node again (`ray-gpu node start`, or "
                    "`ray-gpu up`), with carrier client wait: it comes back once the head answers"
                )
            )

    @property
    def connected(self) -> bool:
        """Whether a relay is there now."""
        return self._sock is not None

    def wait(self, timeout_s: float) -> bool:
        """Wait until a relay is there."""
        return self._arrived.wait(timeout_s)

    def request(self, message: dict[str, Any], *, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            GatewayError: No relay, no answer in time, or an error that the relay reports.
            ZoneError: An error of the custodian that the relay passes on.
        """
        future: Future[dict[str, Any]] = Future()
        identifier = next(self._ids)
        with self._lock:
            sock = self._sock
            if sock is None:
                raise GatewayError(
                    "no relay is connected, so no GPU node can be reached; with carrier edge start the zone's node "
                    "(`ray-gpu node start`, or `ray-gpu up`), with carrier client wait: it comes back once the head "
                    "answers"
                )
            self._waiting[identifier] = future
            send_message(sock, {**message, "id": identifier})
        try:
            answer = future.result(timeout=timeout_s)
        except FutureTimeoutError:
            with self._lock:
                self._waiting.pop(identifier, None)
            raise GatewayError("the relay did not answer in time; look at ray-gpu status") from None
        return _checked(answer, message)


def _checked(answer: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    error = answer.get("error")
    if error is None and answer.get("ok", True):
        return answer
    if isinstance(error, dict):
        told = from_wire(error)
        raise told if isinstance(told, REPORTABLE) else ZoneError(f"the relay reports: {told.message[:1024]}")
    text = str(error)[:1024]
    if request["op"] == "place":
        raise PlacementError(
            f"no GPU node of pool {request['pool']} has room: {text}; wait, ask for fewer GPUs, or see ray-gpu status",
            pool=str(request["pool"]),
            reason=text,
        )
    raise ZoneError(f"the relay reports: {text}")
