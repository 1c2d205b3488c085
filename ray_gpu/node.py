"""One host of a cluster: ``ray-gpu node start``. This module does I/O and starts processes.

A node logs in to Vault with its own AppRole, gets a certificate and the cluster's token for Ray,
starts its custodian (role gpu), and then Ray in a cage. It runs until it is told to stop or a part
of it ends; then all of it ends, so that whatever restarts it (systemd, ``ray up``) starts a whole one.

Ray's certificate and token lie on a tmpfs, readable by the cage alone. The login stays with the
custodian, which the cage cannot reach into.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from ray_gpu import background, cage_net, head_probe, node_identity, raylet, services
from ray_gpu.host_file import AbsolutePath, Address, Network, VaultPart, read_login
from ray_gpu.mounts import IN_MEMORY, file_system
from ray_gpu.ports import PORTS, NodePorts, Role
from ray_gpu.state import Layout
from zones.document import Document, FileModel, Id, read_text_file
from zones.errors import ClusterError
from zones.vault import Vault

#: Uids as root: the cage, then two for each lease. Below 65534: a container may have no more.
CAGE_UID, LEASE_UID, LEASE_UIDS = 61001, 62000, 3200
#: For certificates and tokens, which must not outlive the host: a tmpfs on every distribution.
RUN_DIR = Path("/run/ray-gpu-nodes")
DEFAULT_CONFIG = Path("/etc/ray-gpu/node.yaml")
_MODULE = "ray_gpu.node"
#: A node's role as the firewall calls it.
_ROLES = {"head": Role.HEAD, "gpu": Role.GPU, "zone": Role.EDGE_ZONE}

_Port = Annotated[int, Field(ge=1024, le=65000)]


class NodeFile(FileModel):
    """A node.yaml."""

    node: Id
    role: Literal["head", "gpu", "zone"]
    address: Address
    #: Address of Ray's head; a head's own.
    head: Address
    #: Whom the cage may reach, on Ray's ports, and who may reach it: the cluster's other hosts and no others.
    cluster: list[Network] = Field(min_length=1)
    vault: VaultPart
    pool: Id | None = None
    num_gpus: int = Field(default=0, ge=0, le=64)
    zone: Id | None = None
    #: Directory with ``pools/<pool>.cedar``, for the custodian.
    policies: AbsolutePath | None = None
    state: AbsolutePath = "/var/lib/ray-gpu"
    gcs_port: _Port = PORTS.gcs
    first_port: _Port = PORTS.first

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        needs = {"gpu": ("pool", "num_gpus", "policies"), "zone": ("zone",), "head": ()}[self.role]
        for name in needs:
            if not getattr(self, name):
                raise ValueError(f"a node of role {self.role} needs {name}")
        for name in {"pool", "num_gpus", "zone", "policies"} - {*needs}:
            if getattr(self, name):
                raise ValueError(f"a node of role {self.role} has no {name}")
        if (self.role == "head") != (self.address == self.head):
            raise ValueError("the head's address is its own address, and no other node's")
        if self.role != "head" and not any(IPv4Address(self.head) in IPv4Network(net) for net in self.cluster):
            raise ValueError(f"cluster lacks the head's address, {self.head}; the node could not reach it")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What to start: a node.yaml, and for a head that ``ray up`` starts its autoscaler's files."""

    config: str
    autoscaling_config: str | None = None
    autoscaling_key: str | None = None
    #: How long such a head waits for the GPU hosts that its autoscaler starts, seconds.
    await_hosts_s: float = 90.0


def read_config(path: Path) -> NodeFile:
    """Read a node.yaml.

    Raises:
        ConfigError: With file and line.
    """
    return Document(read_text_file(path), path).check(NodeFile)


def state_file(config: NodeFile) -> Path:
    """Return where a node's condition stands while it runs."""
    return _root(config) / "node.json"


def _root(config: NodeFile) -> Path:
    return Layout(Path(config.state)).node(config.node)


class Service:
    """The processes of one node."""

    def __init__(self, start: Start, say: Callable[[str], None]) -> None:
        self._start = start
        self._config = read_config(Path(start.config))
        self._ports = NodePorts(gcs=self._config.gcs_port, first=self._config.first_port)
        self._say = say
        self._layout = Layout(Path(self._config.state))
        root = _root(self._config)
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.state_file = state_file(self._config)
        self._log = root / "node.log"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._custodian: subprocess.Popen[bytes] | None = None
        self._node: raylet.Node | None = None

    def start(self) -> dict[str, Any]:
        """Start the node; return its condition once it has joined the cluster."""
        config = self._config
        _check_in_memory(config.node)
        role_id, secret_id = read_login(config.vault)
        self._say(f"getting certificate and token for {config.node} from {config.vault.address}")
        vault = Vault(config.vault.address, ca_file=config.vault.ca)
        addresses = node_identity.certified_addresses([config.address], head=config.role == "head")
        identity = node_identity.obtain(vault, role_id, secret_id, node=config.node, addresses=addresses)
        uid = CAGE_UID if os.geteuid() == 0 else None
        files = node_identity.write(identity, RUN_DIR / config.node / "ray", uid=uid)
        if config.role != "head":
            head_probe.check_head(config.head, config.gcs_port, files, node=config.node)
        if config.role == "gpu":
            self._start_custodian(role_id, secret_id)
        ray = self._start_ray(raylet.Credentials(files=files.paths(), environment=files.environment()))
        if config.zone:
            self._await_gateway(config.zone)
        return {
            "node": config.node,
            "role": config.role,
            "address": f"{config.head}:{config.gcs_port}",
            "labels": ray.spec.all_labels(),
            "num_gpus": config.num_gpus,
            "degradations": list(raylet.degradations()),
            "certificate_not_after": identity.not_after,
            "processes": {"ray": ray.process.pid} | ({"custodian": self._custodian.pid} if self._custodian else {}),
            "drained_by": ray.main_process(),
        }

    def _start_custodian(self, role_id: str, secret_id: str) -> None:
        config = self._config
        self._say(f"starting the custodian of {config.node}")
        login = services.VaultLogin(
            address=config.vault.address, ca=config.vault.ca, role_id=role_id, secret_id=secret_id
        )
        self._custodian = services.start_custodian(
            self._layout,
            config.node,
            login,
            log=self._log,
            pool=config.pool,
            gpu_milli=1000 * config.num_gpus,
            uid_base=LEASE_UID,
            uid_count=LEASE_UIDS,
            actor_uid=CAGE_UID,
            address=config.address,
            endpoint_ports=self._ports.endpoints,
            policies=config.policies,
            degradations=list(raylet.degradations()),
        )
        socket = self._socket_dir() / raylet.CUSTODIAN_SOCKET
        self._await("the custodian", lambda: services.listens(socket))

    def _await_gateway(self, zone: str) -> None:
        """Wait until people can attach, if the zone's gateway runs already: it serves once the relay has joined it."""
        layout = self._layout
        if not services.listens(layout.relay_dir(zone) / raylet.RELAY_SOCKET):
            self._say(f"people can attach once the gateway of zone {zone} runs: ray-gpu gateway start")
            return
        # A gateway that served before this node does so all the time: only it knows that this node's relay is there.
        self._await("the gateway", lambda: services.gateway_is_ready(layout.gateway_socket(zone)))

    def _await(self, what: str, there: Callable[[], bool]) -> None:
        failure = ClusterError(
            f"{what} did not serve in time; see {self._log}", node=self._config.node, reason="timed out"
        )
        services.await_until(there, check=self.check, timeout_s=raylet.START_TIMEOUT_S, failure=failure)

    def _socket_dir(self) -> Path:
        """Return the directory with the one Unix socket that the cage sees."""
        if self._config.zone:
            return self._layout.relay_dir(self._config.zone)
        directory = self._layout.custodian_dir(self._config.node)
        directory.mkdir(mode=0o711, exist_ok=True)
        return directory

    def _start_ray(self, credentials: raylet.Credentials) -> raylet.Node:
        config = self._config
        self._say(f"starting Ray in a cage at {config.address}")
        spec = raylet.NodeSpec(
            name=config.node,
            address=config.address,
            role=config.role,
            zone=config.zone,
            num_gpus=config.num_gpus,
            labels={"ray-gpu-pool": config.pool} if config.pool else {},
            socket_dir=self._socket_dir(),
            autoscaler=self._autoscaler(),
            network=self._network() if raylet.can_have_network() else None,
        )
        node = self._node = raylet.start_node(
            spec,
            gcs=f"{config.head}:{config.gcs_port}",
            ports=self._ports,
            uid=CAGE_UID,
            credentials=credentials,
        )
        try:
            node.await_ready(time.monotonic() + raylet.START_TIMEOUT_S)
        except ClusterError as error:
            if config.role == "head":
                raise
            # Ray says no more of a token that the head does not know than that it gave up.
            raise ClusterError(
                f"{error.message}. The head answers, and takes this node's certificate; if the Ray token was rotated "
                "since the head started, restart the head first (`ray down`, `ray up`)",
                node=config.node,
                reason=error.reason,
            ) from None
        return node

    def _network(self) -> cage_net.CageNetwork:
        """Return what the cage reaches: Ray's ports of the cluster, and by SSH the hosts that it shall start."""
        config, scaling = self._config, self._start.autoscaling_config
        return cage_net.CageNetwork.of(
            _ROLES[config.role],
            config.address,
            config.cluster,
            ssh=_workers(Path(scaling)) if scaling else (),
            ports=self._ports,
        )

    def _autoscaler(self) -> raylet.Autoscaler | None:
        """Copy what ``ray up`` left for the autoscaler to where the cage's uid can read it."""
        if self._start.autoscaling_config is None or self._start.autoscaling_key is None:
            return None
        directory = RUN_DIR / self._config.node / "autoscaler"
        files = raylet.Autoscaler(config=directory / "config.yaml", key=directory / "key", passwd=directory / "passwd")
        document = yaml.safe_load(Path(self._start.autoscaling_config).read_text(encoding="utf-8"))
        document["auth"]["ssh_private_key"] = str(files.key)
        raylet.write_for_cage(files.config, yaml.safe_dump(document), CAGE_UID)
        raylet.write_for_cage(files.key, Path(self._start.autoscaling_key).read_text(encoding="ascii"), CAGE_UID)
        files.passwd.write_text(f"cage:x:{CAGE_UID}:{CAGE_UID}::/s/ray:/bin/sh\n", encoding="ascii")
        return files

    def check(self) -> None:
        """Raise if a process of the node has ended."""
        if self._custodian is not None and self._custodian.poll() is not None:
            raise self._ended("custodian", self._custodian.returncode)
        if self._node is not None and not self._node.alive():
            raise self._ended("Ray", self._node.process.returncode)

    def _ended(self, what: str, status: int | None) -> ClusterError:
        why = services.last_words(self._log, self._log_start)
        return ClusterError(
            f"{what} of node {self._config.node} ended (status {status}){why}; see {self._log}, and start it again",
            node=self._config.node,
            reason=f"{what} ended",
        )

    def stop(self) -> None:
        """End everything: leases first, since the custodian ends them in order."""
        if self._custodian is not None:
            services.end(self._custodian)
        if self._node is not None:
            self._node.stop()


def _check_in_memory(node: str) -> None:
    """Refuse a disk where Ray's token, key and session belong: they would outlive the host.

    Raises:
        ClusterError: There is no tmpfs.
    """
    mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    # In a cage the session has a tmpfs of its own.
    for path in (str(RUN_DIR), *(["/dev/shm"] if "uncaged-ray" in raylet.degradations() else [])):
        place, kind = file_system(path, mounts)
        if kind not in IN_MEMORY:
            raise ClusterError(
                f"{path} is on {place}, which is {kind}: Ray's token and key would lie on a disk (session-on-disk); "
                f"mount a tmpfs there: mount -t tmpfs tmpfs {path}",
                node=node,
                reason="session-on-disk",
            )


def start(what: Start, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Start a node in the background and return its condition once it has joined.

    Raises:
        ConfigError: The node.yaml or a file that it names is wrong.
        ClusterError: It did not come up, or runs already; nothing is left half started.
    """
    config = read_config(Path(what.config))
    if running(config) is not None:
        raise ClusterError(
            f"node {config.node} runs already; stop it with `ray-gpu node stop`", node=config.node, reason="running"
        )
    _root(config).mkdir(mode=0o711, parents=True, exist_ok=True)
    argument = json.dumps({name: getattr(what, name) for name in Start.__dataclass_fields__})
    document = background.launch(_MODULE, argument, log=_root(config) / "node.log", say=say)
    if what.autoscaling_config is not None:
        _await_hosts(Path(what.autoscaling_config), config, what.await_hosts_s, say)
    return document


def _await_hosts(autoscaling_config: Path, config: NodeFile, timeout_s: float, say: Callable[[str], None]) -> None:
    """Wait for the GPU hosts that the head's autoscaler starts by SSH, and say of which nothing came."""
    addresses = _workers(autoscaling_config)
    say(f"waiting for {len(addresses)} GPU hosts")
    # Their own node.yaml could say another port, but none of `ray-gpu firewall` lets through.
    port = NodePorts(gcs=config.gcs_port, first=config.first_port).last_to_open
    for address in head_probe.await_hosts(addresses, port, timeout_s, say):
        say(
            f"GPU host {address} has NOT joined; the others serve. Run `ray-gpu node start` on it: it says what it "
            "lacks, and joins once it has that"
        )


def _workers(autoscaling_config: Path) -> list[str]:
    """Return the addresses of the GPU hosts that the autoscaler starts."""
    found: list[str] = yaml.safe_load(autoscaling_config.read_text(encoding="utf-8"))["provider"].get("worker_ips", [])
    return found


def running(config: NodeFile) -> dict[str, Any] | None:
    """Return the condition of a node on this host, if it runs."""
    return background.running(state_file(config), _MODULE)


def stop(config: NodeFile, *, drain_timeout_s: float = 0.0) -> bool:
    """End a node; tell whether it ran. Returns when everything is gone.

    Args:
        drain_timeout_s: How long a GPU node's leases may go on; it takes no new ones meanwhile, and zones give those
            that they have back after the call that they are used for.
    """
    document = running(config)
    if document is not None and drain_timeout_s > 0 and (main_process := document.get("drained_by")):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(main_process), signal.SIGTERM)
        background.await_end(int(document["pid"]), drain_timeout_s)
    return background.stop(state_file(config), _MODULE) or document is not None


def main(argv: list[str]) -> int:
    """Be the node. ``argv``: what to start as JSON, and descriptors for :func:`background.serve`."""
    what = Start(**json.loads(argv[0]))
    return background.serve(lambda say: Service(what, say), argv[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
