"""The zone's only Ray driver: places GPU actors and carries small control messages. This module does I/O.

It runs in a cage, holds nothing worth having, and is not trusted:
the gateway gives it no data, and takes from it only msgpack primitives, never a pickle.

The zone's carrier says how it reaches Ray. With ``edge`` it is a driver beside the zone's own raylet, whose cage it
shares. With ``client`` no raylet is in the zone: its cage has no network, and it speaks Ray Client (``ray://``)
through a tunnel to the head (:mod:`ray_gpu.forwarder`), where Ray runs the driver for it.

Messages (:mod:`ray_gpu.wire`, at most 64 KiB) on the gateway's Unix socket. The relay
connects, sends ``{"event": "ready"}``, then answers requests in any order, each reply
carrying its request's ``id`` and ``ok``:

======== ============================================== ==========================================
op       request                                        reply
======== ============================================== ==========================================
place    lease, pool, gpus, timeout_s, labels           node, and the custodian's offer reply
grant    lease, and whatever the custodian needs        endpoint [host, port], and its grant reply
release  lease                                          (nothing more)
nodes    (nothing more)                                 nodes: id, name, alive, labels, gpus
ping     (nothing more)                                 (nothing more)
======== ============================================== ==========================================

``labels`` are Ray label selectors (``{"ray-gpu-node": "!in(gpu-1)"}``) on top of the pool's.
``{"event": "lost", "lease": ..., "reason": ...}`` says that an actor died without being released, and
``{"event": "draining", "nodes": [...]}`` which nodes are about to be restarted: whenever that changes.
The relay ends when its gateway does, and with carrier ``client`` also when the head is lost; its actors end with it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import msgpack
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from ray_gpu.accounts import Accounts
from ray_gpu.actor import MAX_DOCUMENT_BYTES, GpuActor
from ray_gpu.forwarder import Tunnel
from ray_gpu.wire import PeerClosedError, error_reply, recv_message, send_message, unix_connect
from zones.errors import GatewayError, LeaseLostError, PlacementError, ZoneError
from zones.model import check_id

_T = TypeVar("_T")

#: Label that names a node's pool.
POOL_LABEL = "ray-gpu-pool"
#: Label that names a node.
NODE_LABEL = "ray-gpu-node"
#: Label that names the zone of a CPU node.
ZONE_LABEL = "ray-gpu-zone"

#: Longest text that a foreign error contributes to a reply, in characters.
_MAX_REASON_CHARS = 1024
#: Longest that a place request may wait, seconds.
_MAX_PLACE_S = 3600.0
#: A grant starts keeper and sandbox on the node.
_GRANT_TIMEOUT_S = 90.0
#: How often the relay looks which nodes drain, seconds.
_DRAIN_INTERVAL_S = 0.5
#: Such a question takes milliseconds, and waits for the actor that answers it. Seconds.
_ACCOUNTS_TIMEOUT_S = 60.0
#: Resource that Ray's head alone has, a little of which keeps an actor there.
_ON_HEAD = {"node:__internal_head__": 0.001}
#: The gateway may come up after its node does.
_CONNECT_TIMEOUT_S = 120.0


@dataclass(slots=True)
class _Lease:
    """A placed or waiting actor. ``released`` tells an ordered end from a loss."""

    #: Ray's handle. Its methods get ``.remote`` at run time, which no type knows of.
    actor: Any
    node: str = ""
    released: bool = False


class _Accounts(Protocol):
    """As :class:`Accounts`, wherever the answers come from."""

    def nodes(self) -> list[dict[str, Any]]: ...

    def draining(self) -> list[str]: ...


class _AccountsOnHead:
    """Asks an actor on the head, which comes back when it dies."""

    def __init__(self) -> None:
        # Whoever looks for free GPUs waits for the answer, and nobody shall wait behind another.
        options = {"num_cpus": 0, "resources": _ON_HEAD, "max_restarts": -1, "max_task_retries": -1}
        made: Any = ray.remote(Accounts)
        self._actor: Any = made.options(**options, max_concurrency=16, enable_task_events=False).remote()

    def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ray.get(self._actor.nodes.remote(), timeout=_ACCOUNTS_TIMEOUT_S)
        return found

    def draining(self) -> list[str]:
        found: list[str] = ray.get(self._actor.draining.remote(), timeout=_ACCOUNTS_TIMEOUT_S)
        return found


class Relay:
    """Serves one gateway over one connection.

    Args:
        gateway: The connection.
        accounts: Tells of the cluster's nodes.
    """

    def __init__(self, gateway: socket.socket, accounts: _Accounts) -> None:
        self._gateway = gateway
        self._accounts = accounts
        self._send_lock = threading.Lock()
        self._lease_lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._actor_class = ray.remote(GpuActor)
        # Places wait for room that only releases make, so the two never share threads.
        self._waiting = ThreadPoolExecutor(64, thread_name_prefix="place")
        self._prompt = ThreadPoolExecutor(16, thread_name_prefix="prompt")
        self._operations: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "place": self._place,
            "grant": self._grant,
            "release": self._release,
            "nodes": lambda _: {"nodes": self._accounts.nodes()},
            "ping": lambda _: {},
        }

    def serve(self) -> None:
        """Answer requests until the gateway closes the connection."""
        self._send({"event": "ready"})
        threading.Thread(target=self._tell_draining, daemon=True).start()
        while True:
            try:
                request, _ = recv_message(self._gateway, max_bytes=MAX_DOCUMENT_BYTES)
            except (PeerClosedError, OSError):
                return
            pool = self._waiting if request.get("op") == "place" else self._prompt
            pool.submit(self._answer, request)

    def _tell_draining(self) -> None:
        told: list[str] = []
        while True:
            with contextlib.suppress(RayError, RuntimeError):
                if (found := self._ask_draining()) != told:
                    self._send({"event": "draining", "nodes": found})
                    told = found
            time.sleep(_DRAIN_INTERVAL_S)

    def _ask_draining(self) -> list[str]:
        try:
            return self._accounts.draining()
        except ConnectionError as error:
            # Ray Client's own words: the connection stands, and Ray's driver behind it is gone.
            _lost_head(str(error))

    def _answer(self, request: dict[str, Any]) -> None:
        try:
            operation = self._operations.get(str(request.get("op")))
            if operation is None:
                raise GatewayError(f"the relay knows no operation {str(request.get('op'))[:40]!r}; use one version")
            reply = {"ok": True} | operation(request)
        except Exception as error:  # noqa: BLE001 - every failure becomes this request's reply
            reply = _failure(error)
        self._send(reply | {"id": request.get("id")})

    def _send(self, message: dict[str, Any]) -> None:
        # A gateway that is gone is noticed by serve().
        with self._send_lock, contextlib.suppress(OSError):
            send_message(self._gateway, message)

    def _place(self, request: dict[str, Any]) -> dict[str, Any]:
        lease_id = check_id(request["lease"], what="lease")
        pool = check_id(request["pool"], what="pool")
        deadline = time.monotonic() + min(float(request.get("timeout_s", 30.0)), _MAX_PLACE_S)
        selector = {str(k): str(v) for k, v in (request.get("labels") or {}).items()} | {POOL_LABEL: pool}
        gpus = float(request["gpus"])
        lease = self._start(lease_id, gpus, selector)
        try:
            answer = _result(lease.actor.offer.remote(lease_id), max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            self._end(lease_id)
            raise _no_room(self._accounts.nodes(), pool, gpus, selector) from None
        except BaseException:
            self._end(lease_id)
            raise
        lease.node = answer["node"]
        if answer["reply"].get("ok") is not True:
            self._end(lease_id)
        return {**answer["reply"], "node": lease.node}

    def _start(self, lease_id: str, gpus: float, selector: dict[str, str]) -> _Lease:
        with self._lease_lock:
            if lease_id in self._leases:
                raise GatewayError(f"lease {lease_id} is placed already; release it or choose another id")
            actor: Any = self._actor_class.options(
                num_cpus=0,
                num_gpus=gpus,
                max_restarts=0,
                # offer or grant, close, and the pending watch; one to spare.
                max_concurrency=4,
                label_selector=selector,
                scheduling_strategy="SPREAD",
                enable_task_events=False,
            ).remote()
            lease = self._leases[lease_id] = _Lease(actor)
        watch = actor.watch.remote().future()
        # Ray calls back on its own I/O thread, where calling Ray would wait for itself.
        watch.add_done_callback(lambda ended: self._prompt.submit(self._watch_ended, lease_id, lease, ended))
        return lease

    def _watch_ended(self, lease_id: str, lease: _Lease, ended: Any) -> None:
        error = ended.exception()
        if lease.released:
            return
        self._end(lease_id)
        self._send({"event": "lost", "lease": lease_id, "reason": _text(error) if error else str(ended.result())})

    def _grant(self, request: dict[str, Any]) -> dict[str, Any]:
        lease = self._find(request["lease"])
        document = msgpack.packb({key: value for key, value in request.items() if key != "id"}, use_bin_type=True)
        try:
            answer = _result(lease.actor.grant.remote(document), _GRANT_TIMEOUT_S)
        except RayActorError as error:
            raise LeaseLostError(
                "the GPU actor died during the grant; place the lease again", node=lease.node, reason=_text(error)
            ) from None
        return {**answer["reply"], "endpoint": answer["endpoint"], "node": lease.node}

    def _release(self, request: dict[str, Any]) -> dict[str, Any]:
        self._end(str(request["lease"]))
        return {}

    def _find(self, lease_id: Any) -> _Lease:
        with self._lease_lock:
            lease = self._leases.get(str(lease_id))
        if lease is None:
            raise LeaseLostError("the relay has no such lease; place it first", node="", reason="unknown lease")
        return lease

    def _end(self, lease_id: str) -> None:
        with self._lease_lock:
            lease = self._leases.pop(lease_id, None)
        if lease is not None:
            lease.released = True
            ray.kill(lease.actor)


def _result(reference: Any, timeout_s: float) -> dict[str, Any]:
    answer: dict[str, Any] = ray.get(reference, timeout=timeout_s)
    return answer


def _text(error: BaseException) -> str:
    """Return an error's type and text, bounded."""
    return f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARS]


def _failure(error: BaseException) -> dict[str, Any]:
    if isinstance(error, ZoneError):
        return error_reply(error)
    if isinstance(error, RayActorError):
        lost = LeaseLostError("the GPU actor died; place the lease again", node="", reason=_text(error))
        return error_reply(lost)
    if isinstance(error, (RayError, ValueError, TypeError, KeyError, OSError)):
        # Nothing confidential reaches the relay, so its errors may be quoted.
        return error_reply(GatewayError(f"the relay refused the request: {_text(error)}"))
    return error_reply(error)


def _no_room(nodes: list[dict[str, Any]], pool: str, gpus: float, selector: dict[str, str]) -> PlacementError:
    """Say which GPUs the pool has and how many are free, from Ray's own accounts."""
    members = [node for node in nodes if node["alive"] and node["labels"].get(POOL_LABEL) == pool]
    if members:
        rooms = ", ".join(f"{node['name']} has {node['gpus_free']:g} of {node['gpus']:g} free" for node in members)
    else:
        rooms = "no node of this pool is up"
    reason = f"{gpus:g} GPU asked with labels {selector}; {rooms}"[:_MAX_REASON_CHARS]
    return PlacementError(
        f"no GPU node of pool {pool} had room in time ({rooms}); wait for leases to end, ask for less, or add a node",
        pool=pool,
        reason=reason,
    )


def _lost_head(why: str) -> NoReturn:
    """End the relay: with the head its actors are gone, and whoever started it starts it again."""
    sys.stderr.write(f"relay: lost the head: {why[:_MAX_REASON_CHARS]}\n")
    sys.stderr.flush()
    os._exit(1)


def _await(connect: Callable[[], _T]) -> _T:
    """Return what *connect* returns once it does not fail: raylet and gateway start beside the relay.

    Raises:
        OSError: It still failed after ``_CONNECT_TIMEOUT_S``.
    """
    deadline = time.monotonic() + _CONNECT_TIMEOUT_S
    while True:
        try:
            return connect()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _join_as_driver(address: str, node_address: str, node_port: int) -> _Accounts:
    """Become a driver beside a raylet, once that serves."""
    _await(lambda: socket.create_connection((node_address, node_port)).close())
    ray.init(address=address, _node_ip_address=node_address, log_to_driver=False, configure_logging=False)
    return Accounts()


def _join_as_client(forwarder: str) -> _Accounts:
    """Have the head run a driver for us. It is tried again for as long as a head takes to start."""
    tunnel = Tunnel(forwarder, lambda: _lost_head("the connection ended"))
    _await(tunnel.probe)
    # It tells at length what it passes to the head; the gateway's log is for what goes wrong.
    logging.getLogger("ray.client_builder").setLevel(logging.WARNING)
    try:
        ray.init(f"ray://127.0.0.1:{tunnel.port}", log_to_driver=False)
    except ConnectionError as error:
        sys.exit(
            f"the relay did not start: the head answers, and does not take its certificate or token ({error}); if the "
            "Ray token was rotated since the head started, restart the head first (`ray down`, `ray up`)"
        )
    return _AccountsOnHead()


def main() -> None:
    """Run the relay until its gateway closes the connection."""
    parser = argparse.ArgumentParser(prog="python -m ray_gpu.relay", description="the zone's Ray driver")
    parser.add_argument("--socket", required=True, help="the gateway's Unix socket for its relay")
    parser.add_argument("--client", metavar="SOCKET", help="speak Ray Client; the forwarder's Unix socket")
    parser.add_argument("--address", help="host:port of Ray's GCS")
    parser.add_argument("--node-address", help="address of the raylet beside this process")
    parser.add_argument("--node-port", type=int, help="port that answers once that raylet serves")
    options = parser.parse_args()
    if options.client:
        accounts = _join_as_client(options.client)
    else:
        accounts = _join_as_driver(options.address, options.node_address, options.node_port)
    gateway = _await(lambda: unix_connect(options.socket))
    Relay(gateway, accounts).serve()
    with contextlib.suppress(RayError):
        ray.shutdown()
    # Places that still wait for room would keep the interpreter alive.
    os._exit(0)


if __name__ == "__main__":
    main()
