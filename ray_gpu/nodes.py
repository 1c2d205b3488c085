"""The embedded Ray cluster: caged raylets on loopback addresses of one host. This module does I/O.

What a node is and how it is kept in is :mod:`ray_gpu.raylet`. Run ``Cluster.start`` on the main thread.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ray_gpu.ports import NodePorts
from ray_gpu.raylet import START_TIMEOUT_S, Credentials, Node, NodeSpec, degradations, start_node, write_for_cage
from zones.errors import ClusterError
from zones.model import check_id


class Cluster:
    """The nodes of one embedded cluster, head first."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        #: Ids of missing controls.
        self.degradations = degradations(shared_network=True)

    @classmethod
    def start(
        cls,
        state_dir: Path,
        specs: Sequence[NodeSpec],
        *,
        identify: Callable[[NodeSpec, int], Credentials] | None = None,
        uid_base: int = 61001,
        base_port: int = 26000,
    ) -> Cluster:
        """Start every node and return when all of them serve.

        Args:
            state_dir: Directory for the cluster's token; created if missing.
            specs: The nodes; the first is Ray's head.
            identify: Returns a node's credentials, readable by the uid that it is given; by default a token alone.
            uid_base: Uid of the first node's cage when root; the others count up.
            base_port: First port; see :func:`free_base_port`.

        Raises:
            ClusterError: A port is taken, or a node died or did not serve within ``START_TIMEOUT_S``.
        """
        cluster = cls()
        deadline = time.monotonic() + START_TIMEOUT_S
        identify = identify or _token_alone(state_dir)
        gcs = f"{specs[0].address}:{base_port}"
        try:
            for index, spec in enumerate(specs):
                check_id(spec.name, what="node")
                ports = NodePorts.of(base_port, index)
                _check_free(ports, spec, first=index == 0)
                credentials = identify(spec, uid_base + index)
                node = start_node(spec, gcs=gcs, ports=ports, uid=uid_base + index, credentials=credentials)
                cluster.nodes.append(node)
                if index == 0:
                    # The others need nothing of the head but its GCS, which answers first.
                    node.await_port(base_port, deadline)
            for node in cluster.nodes:
                node.await_ready(deadline)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    @property
    def address(self) -> str:
        """``host:port`` of the GCS."""
        return f"{self.nodes[0].spec.address}:{self.nodes[0].ports.gcs}"

    def alive(self) -> bool:
        """Whether every node's processes run."""
        return bool(self.nodes) and all(node.alive() for node in self.nodes)

    def stop(self) -> None:
        """End every process of every node, and return when they are gone. Idempotent."""
        while self.nodes:
            self.nodes.pop().stop()


def free_base_port(first: int = 22000, *, last: int = 31000) -> int:
    """Return the first of *first*, *first* + 1000, ... from which a cluster of three nodes can be numbered.

    It is this process's until it ends: Ray opens its ports late, and another cluster may start meanwhile.

    Raises:
        ClusterError: There is none.
    """
    for base in range(first, last + 1, 1000):
        if (
            base != _RAYS_OWN
            and _claim(base)
            and not any(_taken(port) for index in range(3) for port in NodePorts.of(base, index).fixed())
        ):
            return base
    raise ClusterError(
        f"no port range between {first} and {last + 999} is free; stop another cluster (ray-gpu down)",
        node="",
        reason="ports taken",
    )


#: Ray Client's server takes ports from here on, on the head, one for each relay, for itself.
_RAYS_OWN = 23000
#: Port ranges that are this process's.
_claims: set[int] = set()


def _claim(base_port: int) -> bool:
    """Claim a port range against every other process of this host: the kernel gives a name to one socket only."""
    if base_port not in _claims:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0ray-gpu-ports-{base_port}")
        except OSError:
            claim.close()
            return False
        claim.detach()  # open as long as this process lives
        _claims.add(base_port)
    return True


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        # As Ray does: what merely lingers from an ended connection does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def _check_free(ports: NodePorts, spec: NodeSpec, *, first: bool) -> None:
    taken = [port for port in ports.fixed() if _taken(port) and (first or port not in (ports.gcs, ports.client))]
    if taken:
        raise ClusterError(
            f"port {taken[0]} of node {spec.name} is taken; stop its owner (ray-gpu down) or move the base port",
            node=spec.name,
            reason=f"taken: {taken}",
        )


def _token_alone(state_dir: Path) -> Callable[[NodeSpec, int], Credentials]:
    token = secrets.token_hex(32)

    def identify(spec: NodeSpec, uid: int) -> Credentials:
        path = state_dir / spec.name / "ray-token"
        write_for_cage(path, token, uid)
        return Credentials(files=(path,), environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)})

    return identify
