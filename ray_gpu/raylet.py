"""One Ray node in its cage: what it is, how it starts, how it ends. This module does I/O and starts processes.

A node is ``ray start --block`` behind :mod:`ray_gpu.sandbox.boundary`, with a uid, PID
namespace, /dev/shm and session directory (tmpfs) of its own, and on a host of its own a
network (:mod:`ray_gpu.cage_net`). It can read Python, this
project's two packages, its credentials for Ray and one directory with one Unix socket, and
nothing else: whatever Ray is made to run there finds nothing worth having. A zone's node
runs the relay in the same cage, since a Ray driver must share PID namespace and uid with
its raylet.

Ray is kept from writing what passes it: no usage statistics, metrics, task events, log
monitor or dashboard, no spilling, output read and forgotten, no core dumps.

Call :func:`start_node` on the main thread: a cage dies with the thread that started it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_gpu import actor, cage, cage_net
from ray_gpu.ports import NodePorts
from ray_gpu.sandbox import boundary
from ray_gpu.sandbox import profile as profiles
from zones.errors import ClusterError

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
#: A node whose head is gone ends after so long: without a head that remembers, it could not join again. Seconds.
_HEADLESS_S = 15
#: Longest that Ray waits for a node that drains to be idle; whoever tells it to has a limit of its own. Seconds.
_LONGEST_DRAIN_S = 7 * 24 * 3600
#: What Ray reads of the host where no namespace replaces it: its processes, memory limits, file types.
_PLAIN_PATHS = (Path("/proc"), Path("/sys/fs/cgroup"), Path("/etc/mime.types"))
#: tmpfs of a cage and their sizes, bytes. Only what is used counts.
_TMPFS_BYTES = {"/s": 256 << 20, "/tmp": 16 << 20, "/dev/shm": 2 * _OBJECT_STORE_BYTES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaler:
    """What Ray's autoscaler reads. The files belong to the cage's uid."""

    #: What ``ray up`` left on the head, with *key* for its key.
    config: Path
    #: SSH key that opens the GPU nodes, and no machine in a zone.
    key: Path
    #: Says to the SSH client who it runs as, inside: it does not start without.
    passwd: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a node shows to other nodes of its cluster. The files belong to the cage's uid."""

    files: tuple[Path, ...]
    #: Where Ray finds them. No secret is in it.
    environment: Mapping[str, str]


def write_for_cage(path: Path, text: str, uid: int) -> None:
    """Write a file anew that the cage's *uid* (we ourselves when not root) alone can read."""
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        if os.geteuid() == 0:
            os.fchown(file.fileno(), uid, uid)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One node as it shall be."""

    #: Node id, also the value of its ``ray-gpu-node`` label.
    name: str
    #: Address of its own. On one host: in 127.0.0.0/8, but not 127.0.0.1, which Ray rewrites itself.
    address: str
    #: What runs beside Ray: a custodian (gpu), a relay in the cage (zone), nothing.
    role: Literal["head", "gpu", "zone"]
    #: Zone of a ``"zone"`` node.
    zone: str | None = None
    #: GPUs that Ray may hand out; purely a number without hardware.
    num_gpus: int = 0
    #: Ray labels on top of node and zone, such as ``{"ray-gpu-pool": "shared"}``.
    labels: Mapping[str, str]
    #: Host directory that holds ``custodian.sock`` (role gpu) or ``relay.sock`` (role zone).
    socket_dir: Path
    #: What the autoscaler on Ray's head works with; only for a head that ``ray up`` started.
    autoscaler: Autoscaler | None = None
    #: What its cage reaches, where it has a network of its own; ``None`` where it shares the host's.
    network: cage_net.CageNetwork | None = None

    def all_labels(self) -> dict[str, str]:
        """Return every label of the node."""
        zone = {"ray-gpu-zone": self.zone} if self.zone else {}
        return {**self.labels, "ray-gpu-node": self.name, **zone}


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
    #: The network of its cage, once it was connected.
    connected: Sequence[cage_net.CageNetwork] = ()

    def alive(self) -> bool:
        """Whether the node's processes run."""
        return self.process.poll() is None

    def main_process(self) -> int | None:
        """Return the id of the process that drains the node upon SIGTERM; ``None`` where there is none."""
        return cage.main_process(self.process) if self.spec.role == "gpu" else None

    def stop(self) -> None:
        """End every process of the node, and return when they are gone."""
        cage.stop(self.process, self.inside or cage.first_processes(self.process))
        for network in self.connected:
            cage_net.remove(network)
        if self.leftover is not None:
            shutil.rmtree(self.leftover, ignore_errors=True)

    def await_port(self, port: int, deadline: float) -> None:
        """Wait until a port of the node accepts connections.

        Args:
            deadline: On the monotonic clock.

        Raises:
            ClusterError: The node ended, or *deadline* passed.
        """
        name = self.spec.name
        while not _answers(self.spec.address, port):
            if not self.alive():
                raise ClusterError(
                    f"node {name} ended while starting (exit status {self.process.returncode}), and said: "
                    f"{self.words.last_line()}. Start again; other processes may have had its ports or the machine",
                    node=name,
                    reason=f"exit status {self.process.returncode}",
                )
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"node {name} did not serve within {START_TIMEOUT_S:g} s; free the machine and start again",
                    node=name,
                    reason="start timed out",
                )
            time.sleep(0.02)

    def await_ready(self, deadline: float) -> None:
        """Wait until the node has joined. From then on nothing that it says is kept. Raises as :meth:`await_port`."""
        self.await_port(self.ports.last_to_open, deadline)
        self.inside = cage.first_processes(self.process)
        self.words.forget()


def _answers(address: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How one node starts: paths as its processes see them, command lines, environment."""

    spec: NodeSpec
    #: ``host:port`` of the cluster's GCS.
    gcs: str
    ports: NodePorts
    uid: int
    #: Directory on a tmpfs for all that Ray writes.
    session: Path
    #: Directory with the node's one Unix socket.
    sockets: Path
    credentials: Credentials

    @property
    def drains(self) -> bool:
        """Whether SIGTERM drains it. In a cage: outside one it is how a node is ended at once."""
        return self.spec.role == "gpu" and self.session == _CAGE_SESSION

    @property
    def is_head(self) -> bool:
        """Whether this node runs the GCS."""
        return self.gcs == f"{self.spec.address}:{self.ports.gcs}"

    def environment(self) -> dict[str, str]:
        """Return what the environment adds to a confined Python's; each closes a leak or says where the node is."""
        return {
            "HOME": str(self.session),
            "USER": "cage",
            **self.credentials.environment,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_metrics_collection": "0",
            "RAY_task_events_report_interval_ms": "0",
            # Workers would otherwise write prints to files; ours go where the raylet's output is forgotten.
            "RAY_LOG_TO_STDERR": "1",
            "RAY_LOG_TO_DRIVER": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": str(_HEADLESS_S),
            # The head answers before another node is started, and knows itself a little later: one try a second.
            **({} if self.is_head else {"RAY_NUM_REDIS_GET_RETRIES": "20"}),
            # Upon SIGTERM Ray lets nothing new onto the node and ends once it is idle. Others have nothing to wait for.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(_LONGEST_DRAIN_S if self.drains else 0),
            # For each client relay the head starts a driver, which takes a busy one long. Seconds.
            **({"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120"} if self.is_head else {}),
            # It starts it by fork, and with other threads inside gRPC the child died of gRPC's own handlers.
            **({"GRPC_ENABLE_FORK_SUPPORT": "0"} if self.is_head else {}),
            # Version 2 does not start the workers of a provider `local`.
            **({"RAY_enable_autoscaler_v2": "0"} if self.spec.autoscaler else {}),
            actor.CUSTODIAN_VARIABLE: str(self.sockets / CUSTODIAN_SOCKET),
            actor.NODE_VARIABLE: self.spec.name,
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
        if self.is_head:
            # Ray ignores the environment variable of the same name.
            no_spill = json.dumps({"automatic_object_spilling_enabled": False})
            head = ["--head", f"--port={self.ports.gcs}", "--include-dashboard=false"]
            # Where Ray can, it opens this one port on the head, whether a zone's carrier needs it or not.
            head += [f"--ray-client-server-port={self.ports.client}"] if has_ray_client() else []
            scaler = self.spec.autoscaler
            head += [f"--autoscaling-config={scaler.config}"] if scaler else ["--no-monitor"]
            return [*command, *head, f"--system-config={no_spill}"]
        return [*command, f"--address={self.gcs}"]

    def init_command(self) -> list[str]:
        """Return the node's first program: Ray, and the relay beside it on a zone's node."""
        relay: list[str] = []
        if self.spec.role == "zone":
            relay = [sys.executable, "-m", "ray_gpu.relay", f"--socket={self.sockets / RELAY_SOCKET}"]
            relay += [f"--address={self.gcs}", f"--node-address={self.spec.address}"]
            relay += [f"--node-port={self.ports.last_to_open}"]
        return [sys.executable, "-m", "ray_gpu.cage", str(self.session), json.dumps(relay), *self.ray_command()]


def has_ray_client() -> bool:
    """Whether Ray Client can work here: on the head, and in a zone whose carrier is ``client``."""
    return importlib.util.find_spec("grpc") is not None


def degradations(*, shared_network: bool = False) -> tuple[str, ...]:
    """Return the ids of the controls that nodes started here lack.

    Args:
        shared_network: Whether they share the host's network wherever they are, as several on one host do.
    """
    network = () if can_have_network() and not shared_network else ("shared-network",)
    return (*(() if boundary.survey().namespaces else ("uncaged-ray",)), *network)


def can_have_network() -> bool:
    """Tell whether a cage here can have a network of its own."""
    return boundary.survey().mode == "root" and not cage_net.lacking()


def start_node(spec: NodeSpec, *, gcs: str, ports: NodePorts, uid: int, credentials: Credentials) -> Node:
    """Start a node, caged where that is possible. It has not joined when this returns; see :meth:`Node.await_ready`.

    Args:
        spec: The node.
        gcs: ``host:port`` of the cluster's GCS; the head's own makes the node the head.
        ports: The node's ports, which are free.
        uid: Uid of the cage when root.
        credentials: Files that *uid* can read.
    """
    caged = boundary.survey().namespaces
    if caged:
        session, sockets = _CAGE_SESSION, _CAGE_SOCKETS
    else:
        # Short, for the socket paths below it, and memory, not disk.
        session, sockets = Path(tempfile.mkdtemp(prefix="rg-", dir="/dev/shm")), spec.socket_dir
        if os.geteuid() == 0:
            os.chown(session, uid, uid)
    plan = _Plan(spec=spec, gcs=gcs, ports=ports, uid=uid, session=session, sockets=sockets, credentials=credentials)
    writable = [(spec.socket_dir, sockets)] + ([] if caged else [(session, session)])
    if spec.autoscaler and caged:
        # A file of root's: nobody inside can write it.
        writable.append((spec.autoscaler.passwd, Path("/etc/passwd")))
    profile = profiles.cage(
        spec.name,
        uid=uid if os.geteuid() == 0 else None,
        bind_rw=tuple(writable),
        tmpfs=_TMPFS_BYTES if caged else {},
        env=plan.environment(),
        network=spec.network is None,
    )
    extra = credentials.files if caged else (*credentials.files, *profiles.package_roots(), *_PLAIN_PATHS)
    if spec.autoscaler:
        extra += (spec.autoscaler.config, spec.autoscaler.key)
    profile = dataclasses.replace(profile, bind_ro=(*profile.bind_ro, *extra))
    return _launch(plan, profile, leftover=None if caged else session)


def _launch(plan: _Plan, profile: boundary.Profile, *, leftover: Path | None) -> Node:
    """Start a node's program, in a network of its own where the node shall have one."""
    words, network = cage.LastWords(), plan.spec.network
    connected: list[cage_net.CageNetwork] = []

    def connect(pid: int) -> None:
        assert network is not None
        cage_net.connect(network, pid)
        connected.append(network)

    prepare, output = (connect if network else None), words.write_fd
    try:
        process = boundary.launch(plan.init_command(), profile, stdout=output, stderr=output, prepare=prepare)
    finally:
        words.listen()
    return Node(spec=plan.spec, ports=plan.ports, process=process, leftover=leftover, words=words, connected=connected)
