"""The Ray actor that stands for a lease on a GPU node. This module does I/O.

It is fixed code and knows neither payload nor key: it asks the node's custodian for an
offer, hands the grant on, and says where the custodian listens for data. Its life is the
lease's: the custodian ends the lease when the actor's Unix connection closes, and
:meth:`GpuActor.watch` returns when the custodian closes it.

The class is plain Python and imported by name in Ray's workers, so nothing of it is kept
in Ray's function table; :mod:`ray_gpu.relay` makes it an actor. Where it runs is read from
the environment that :mod:`ray_gpu.nodes` gives to a node's workers.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from typing import Any

import msgpack

from ray_gpu.wire import error_reply, recv_message, send_message, unix_connect
from zones.errors import ClusterError

#: Path of the custodian's Unix socket as the node's workers see it.
CUSTODIAN_VARIABLE = "RAY_GPU_CUSTODIAN"
#: Id of the node.
NODE_VARIABLE = "RAY_GPU_NODE"

#: Offers and grants are small; anything larger is no offer or grant.
MAX_DOCUMENT_BYTES = 1 << 16

#: A custodian starts keeper and sandbox during a grant, which takes seconds on a busy node.
CUSTODIAN_TIMEOUT_S = 60.0


class GpuActor:
    """One lease's presence on a GPU node."""

    def __init__(self) -> None:
        self._custodian: socket.socket | None = None
        # An actor that cannot even start would not say on which node; this one says it when asked for an offer.
        with contextlib.suppress(OSError):
            self._custodian = unix_connect(os.environ[CUSTODIAN_VARIABLE])
            self._custodian.settimeout(CUSTODIAN_TIMEOUT_S)
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def offer(self, lease_id: str) -> dict[str, Any]:
        """Return the node's id and the custodian's answer, unread: ``{"node": ..., "reply": {...}}``.

        The answer of a node without a custodian is a :class:`~zones.errors.ClusterError` that names it.
        """
        node = os.environ[NODE_VARIABLE]
        try:
            return {"node": node, "reply": self._ask({"op": "offer", "lease": lease_id})}
        except OSError as error:
            lonely = ClusterError(
                f"the custodian of node {node} does not answer; start it again", node=node, reason=type(error).__name__
            )
            return {"node": node, "reply": error_reply(lonely)}

    def grant(self, document: bytes) -> dict[str, Any]:
        """Hand a grant to the custodian, which opens the data endpoint if it accepts.

        Args:
            document: msgpack map, at most ``MAX_DOCUMENT_BYTES``; must hold ``lease``. Opaque otherwise.

        Returns:
            ``{"endpoint": [host, port] or None, "reply": {...}}``; no endpoint when the custodian refused.

        Raises:
            ValueError: *document* is too long or no map.
            OSError: The custodian is gone.
        """
        if len(document) > MAX_DOCUMENT_BYTES:
            raise ValueError(f"a grant has at most {MAX_DOCUMENT_BYTES} bytes; shorten it")
        request = msgpack.unpackb(document, raw=False)
        if not isinstance(request, dict) or not isinstance(request.get("lease"), str):
            raise ValueError("a grant is a map that names its lease; send it again")
        reply = self._ask(request | {"op": "grant"})
        return {"endpoint": reply.pop("endpoint", None), "reply": reply}

    def watch(self) -> str:
        """Block until the custodian's connection or this actor closes; return what ended it.

        The relay keeps this call pending: its result or failure says that the lease is lost.
        """
        if self._custodian is None:
            self._closed.wait()
            return "the actor was closed"
        poller = select.poll()
        # Not POLLIN: replies belong to the thread that asked for them.
        poller.register(self._custodian, select.POLLRDHUP)
        while not self._closed.is_set():
            if poller.poll(1000):
                return "the custodian closed the connection"
        return "the actor was closed"

    def close(self) -> None:
        """Close the custodian's connection, which ends the lease. Idempotent."""
        self._closed.set()
        if self._custodian is not None:
            self._custodian.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._custodian is None:
            raise ConnectionError("there is no custodian on this node; start it, then place the lease again")
        with self._lock:
            send_message(self._custodian, request)
            reply, _ = recv_message(self._custodian, max_bytes=MAX_DOCUMENT_BYTES)
        return reply
