"""The embedded Ray cluster: caged raylets on loopback addresses. This module does I/O and starts processes.

Each node is ``ray start --block`` behind :mod:`ray_gpu.sandbox.boundary`, with a uid, PID
namespace, /dev/shm and session directory (tmpfs) of its own. It can read Python, this
project's two packages and one directory with one Unix socket, and nothing else: whatever
Ray is made to run there finds nothing worth having. A zone's node runs the relay in the
same cage, since a Ray driver must share PID namespace and uid with its raylet.

Ray is kept from writing what passes it: no usage statistics, metrics, task events, log
monitor or dashboard, no spilling, output read and forgotten, no core dumps.

Run ``Cluster.start`` on the main thread: a cage dies with the thread that started it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_gpu import actor, cage
from ray_gpu.sandbox import boundary
from ray_gpu.sandbox import profile as profiles
from zones.errors import ClusterError
from zones.model import check_id

#: A cluster takes about 7 s on two idle cores; a busy machine gets several times that.
START_TIMEOUT_S = 60.0
#: Object store, bytes. Payload never goes through it; Ray refuses less than about 75 MB.
_OBJECT_STORE_BYTES = 80_000_000
#: Name of a custodian's socket in its node's ``socket_dir``.
CUSTODIAN_SOCKET = "custodian.sock"
#: Name of a gateway's socket for its relay in the zone node's ``socket_dir``.
RELAY_SOCKET = "relay.sock"
#: Paths inside a cage. The session is below its tmpfs, so that it can be private to the cage's uid.
_CAGE_SESSION = Path("/s/ray")
_CAGE_SOCKETS = Path("/run/ray-gpu")
#: What Ray reads of the host where no namespace replaces it: its processes, memory limits, file types.
_PLAIN_PATHS = (Path("/proc"), Path("/sys/fs/cgroup"), Path("/etc/mime.types"))
#: tmpfs of a cage and their sizes, bytes. Only what is used counts.
_TMPFS_BYTES = {"/s": 256 << 20, "/tmp": 16 << 20, "/dev/shm": 2 * _OBJECT_STORE_BYTES}
#: Each node's share of the port range, from ``base_port + 10`` on.
_PORTS_PER_NODE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One node as it shall be. The first of a cluster's specs is Ray's head."""

    #: Node id, also the value of its ``ray-gpu-node`` label.
    name: str
    #: Loopback address of its own, in 127.0.0.0/8; Ray rewrites 127.0.0.1 itself.
    address: str
    role: Literal["gpu", "zone"]
    #: Zone of a ``"zone"`` node.
    zone: str | None = None
    #: GPUs that Ray may hand out; purely a number without hardware.
    num_gpus: int = 0
    #: Ray labels on top of node and zone, such as ``{"ray-gpu-pool": "shared"}``.
    labels: Mapping[str, str]
    #: Host directory that holds ``custodian.sock`` (role gpu) or ``relay.sock`` (role zone).
    socket_dir: Path

    def all_labels(self) -> dict[str, str]:
        """Return every label of the node."""
        zone = {"ray-gpu-zone": self.zone} if self.zone else {}
        return {**self.labels, "ray-gpu-node": self.name, **zone}


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePorts:
    """The ports of one node. gRPC listens on every address, so no two nodes share one."""

    gcs: int
    first: int

    @classmethod
    def of(cls, base_port: int, index: int) -> NodePorts:
        """Return the ports of the node with this index in a cluster."""
        return cls(gcs=base_port, first=base_port + 10 + index * _PORTS_PER_NODE)

    @property
    def last_to_open(self) -> int:
        """Port of the runtime-env agent: a raylet joins the cluster once its agents are up."""
        return self.first + 2

    @property
    def endpoints(self) -> str:
        """Ports for data connections, ``"lowest-highest"``."""
        return f"{self.first + 110}-{self.first + 199}"

    def fixed(self) -> list[int]:
        """Return the ports that must be free at start."""
        return [self.gcs, *range(self.first, self.first + 6)]

    def flags(self) -> list[str]:
        """Return ``ray start`` flags that leave no port to chance."""
        names = ["node-manager", "object-manager", "runtime-env-agent", "metrics-export"]
        names += ["dashboard-agent-listen", "dashboard-agent-grpc"]
        flags = [f"--{name}-port={self.first + i}" for i, name in enumerate(names)]
        return [*flags, f"--min-worker-port={self.first + 10}", f"--max-worker-port={self.first + 109}"]


@dataclass(slots=True, kw_only=True)
class Node:
    """A node that was started."""

    spec: NodeSpec
    ports: NodePorts
    process: boundary.Confined
    #: Session directory to remove; ``None`` in a cage, whose tmpfs goes with it.
    leftover: Path | None
    #: Refer to the first process inside the cage; known once the node serves.
    inside: Sequence[int] = ()
    #: What it says while it starts.
    words: cage.LastWords

    def alive(self) -> bool:
        """Whether the node's processes run."""
        return self.process.poll() is None


class Cluster:
    """The nodes of one embedded cluster, head first."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        #: Ids of missing controls.
        self.degradations = degradations()

    @classmethod
    def start(
        cls,
        state_dir: Path,
        specs: Sequence[NodeSpec],
        *,
        uid_base: int = 61001,
        base_port: int = 26000,
    ) -> Cluster:
        """Start every node and return when all of them serve.

        Args:
            state_dir: Private directory for the cluster's token; created if missing.
            specs: The nodes; the first is Ray's head.
            uid_base: Uid of the first node's cage when root; the others count up.
            base_port: First port; see :func:`free_base_port`.

        Raises:
            ClusterError: A port is taken, or a node died or did not serve within ``START_TIMEOUT_S``.
        """
        cluster = cls()
        token = secrets.token_hex(32)
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            for index, spec in enumerate(specs):
                check_id(spec.name, what="node")
                ports = NodePorts.of(base_port, index)
                _check_free(ports, spec, first=index == 0)
                plan = _plan(spec, head=specs[0], ports=ports, uid=uid_base + index, state=state_dir / spec.name)
                _write_token(plan.token, token, plan.uid)
                cluster.nodes.append(_start_node(plan))
                if index == 0:
                    # The others need nothing of the head but its GCS, which answers first.
                    _await_port(cluster.nodes[0], base_port, deadline)
            for node in cluster.nodes:
                _await_port(node, node.ports.last_to_open, deadline)
                node.inside = cage.first_processes(node.process)
                node.words.forget()
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
            node = self.nodes.pop()
            cage.stop(node.process, node.inside or cage.first_processes(node.process))
            if node.leftover is not None:
                shutil.rmtree(node.leftover, ignore_errors=True)


def free_base_port(first: int = 22000, *, last: int = 31000) -> int:
    """Return the first of *first*, *first* + 1000, ... from which a cluster of three nodes can be numbered.

    It is this process's until it ends: Ray opens its ports late, and another cluster may start meanwhile.

    Raises:
        ClusterError: There is none.
    """
    for base in range(first, last + 1, 1000):
        if _claim(base) and not any(_taken(port) for index in range(3) for port in NodePorts.of(base, index).fixed()):
            return base
    raise ClusterError(
        f"no port range between {first} and {last + 999} is free; stop another cluster (ray-gpu down)",
        node="",
        reason="ports taken",
    )


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
    taken = [port for port in ports.fixed() if _taken(port) and (first or port != ports.gcs)]
    if taken:
        raise ClusterError(
            f"port {taken[0]} of node {spec.name} is taken; stop its owner (ray-gpu down) or move the base port",
            node=spec.name,
            reason=f"taken: {taken}",
        )


def _answers(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _await_port(node: Node, port: int, deadline: float) -> None:
    while not _answers(node.spec.address, port):
        if not node.alive():
            raise ClusterError(
                f"node {node.spec.name} ended while starting (exit status {node.process.returncode}), and said: "
                f"{node.words.last_line()}. Start again; other processes may have had its ports or the machine",
                node=node.spec.name,
                reason=f"exit status {node.process.returncode}",
            )
        if time.monotonic() > deadline:
            raise ClusterError(
                f"node {node.spec.name} did not serve within {START_TIMEOUT_S:g} s; free the machine and start again",
                node=node.spec.name,
                reason="start timed out",
            )
        time.sleep(0.02)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How one node starts: paths as its processes see them, command lines, environment."""

    spec: NodeSpec
    head: NodeSpec
    ports: NodePorts
    uid: int
    #: Directory on a tmpfs for all that Ray writes.
    session: Path
    #: Directory with the node's one Unix socket.
    sockets: Path
    #: File with the cluster's token.
    token: Path

    def environment(self) -> dict[str, str]:
        """Return what the environment adds to a confined Python's; each closes a leak or says where the node is."""
        return {
            "HOME": str(self.session),
            "USER": "cage",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_task_events_report_interval_ms": "0",
            # Workers would otherwise write prints to files; ours go where the raylet's output is forgotten.
            "RAY_LOG_TO_STDERR": "1",
            "RAY_LOG_TO_DRIVER": "0",
            actor.CUSTODIAN_VARIABLE: str(self.sockets / CUSTODIAN_SOCKET),
            actor.NODE_VARIABLE: self.spec.name,
            actor.ADDRESS_VARIABLE: self.spec.address,
            actor.PORTS_VARIABLE: self.ports.endpoints,
        }

    def ray_command(self) -> list[str]:
        """Return ``ray start`` with nothing left to its defaults that opens a port or writes a file."""
        labels = ",".join(f"{key}={value}" for key, value in self.spec.all_labels().items())
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={self.spec.address}", f"--node-name={self.spec.name}", *self.ports.flags()]
        command += [f"--temp-dir={self.session}/ray", f"--object-spilling-directory={self.session}/spill"]
        command += [f"--object-store-memory={_OBJECT_STORE_BYTES}", "--include-log-monitor=false"]
        command += ["--num-cpus=0", f"--num-gpus={self.spec.num_gpus}", f"--labels={labels}"]
        if self.session != _CAGE_SESSION:
            # Landlock leaves the session alone of the shared /dev/shm, which is where it is.
            command += [f"--plasma-directory={self.session}"]
        if self.spec is self.head:
            # Ray ignores the environment variable of the same name.
            no_spill = json.dumps({"automatic_object_spilling_enabled": False})
            head = ["--head", f"--port={self.ports.gcs}", "--include-dashboard=false", "--no-monitor"]
            return [*command, *head, f"--system-config={no_spill}"]
        return [*command, f"--address={self.head.address}:{self.ports.gcs}"]

    def init_command(self) -> list[str]:
        """Return the node's first program: Ray, and the relay beside it on a zone's node."""
        relay: list[str] = []
        if self.spec.role == "zone":
            relay = [sys.executable, "-m", "ray_gpu.relay", f"--socket={self.sockets / RELAY_SOCKET}"]
            relay += [f"--address={self.head.address}:{self.ports.gcs}", f"--node-address={self.spec.address}"]
            relay += [f"--node-port={self.ports.last_to_open}"]
        return [sys.executable, "-m", "ray_gpu.cage", str(self.session), json.dumps(relay), *self.ray_command()]


def _plan(spec: NodeSpec, *, head: NodeSpec, ports: NodePorts, uid: int, state: Path) -> _Plan:
    """Return the plan of a node, caged where that is possible."""
    if _can_cage():
        session, sockets, token = _CAGE_SESSION, _CAGE_SOCKETS, state / "ray-token"
    else:
        # Short, for the socket paths below it, and memory, not disk.
        session = Path(tempfile.mkdtemp(prefix="rg-", dir="/dev/shm"))
        sockets, token = spec.socket_dir, session / "ray-token"
        if os.geteuid() == 0:
            os.chown(session, uid, uid)
    return _Plan(spec=spec, head=head, ports=ports, uid=uid, session=session, sockets=sockets, token=token)


def _can_cage() -> bool:
    return boundary.survey().mode != "none"


def degradations() -> tuple[str, ...]:
    """Return the ids of the controls that nodes started here lack."""
    return () if _can_cage() else ("uncaged-ray",)


def _write_token(path: Path, token: str, uid: int) -> None:
    """Write the cluster's token so that only *uid* (we ourselves when not root) can read it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(token)
    if os.geteuid() == 0:
        os.chown(path, uid, uid)


def _start_node(plan: _Plan) -> Node:
    caged = _can_cage()
    roots = {path.parent for path in profiles.package_paths() if not path.is_relative_to(sys.prefix)}
    writable = [(plan.spec.socket_dir, plan.sockets)] + ([] if caged else [(plan.session, plan.session)])
    profile = profiles.cage(
        plan.spec.name,
        uid=plan.uid if os.geteuid() == 0 else None,
        bind_rw=tuple(writable),
        # Python lists the directory that a package is in to find it, and Landlock shows the packages
        # alone. An empty tmpfs below them can be listed and holds nothing else of a checkout.
        tmpfs=_TMPFS_BYTES | {str(root): 1 << 12 for root in roots} if caged else {},
        env=plan.environment(),
    )
    extra = (plan.token,) if caged else (*roots, *_PLAIN_PATHS)
    profile = dataclasses.replace(profile, bind_ro=(*profile.bind_ro, *extra))
    words = cage.LastWords()
    try:
        process = boundary.launch(plan.init_command(), profile, stdout=words.write_fd, stderr=words.write_fd)
    finally:
        words.listen()
    leftover = None if caged else plan.session
    return Node(spec=plan.spec, ports=plan.ports, process=process, leftover=leftover, words=words)
