"""The embedded default: Vault, a Ray cluster, custodians, a gateway and a relay on one machine.

One supervisor process starts all of it, in order, and ends all of it; whatever it started dies with it.
``ray-gpu up`` starts the supervisor in the background, ``ray-gpu down`` ends it, the demo and the tests
do both. This module does I/O and starts processes.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray_gpu import background, client_relay, node_identity, nodes, raylet, services
from ray_gpu.ports import NodePorts
from ray_gpu.sandbox import boundary
from ray_gpu.state import Layout
from ray_gpu.vault_declaration import Declaration, NodeSpec, PersonSpec
from ray_gpu.vault_server import VaultServer
from ray_gpu.vault_setup import AppRole, setup
from zones.config import load_zone, zone_names
from zones.errors import ClusterError, UnknownNameError
from zones.model import Carrier, check_id

#: Uids as root: Ray cages, then two for each lease. Below 65534: a container may have no more.
CAGE_UID, LEASE_UID, LEASE_UIDS_PER_NODE = 61001, 62000, 1600
POOL = "shared"
GPU_NODES = ("gpu-1", "gpu-2")
#: All processes are up by then, seconds.
START_TIMEOUT_S = 120.0
_PR_SET_PDEATHSIG = 1
_MAX_SOCKET_PATH_BYTES = 107
#: This module as ``python -m`` knows it, also when it is ``__main__``.
_MODULE = "ray_gpu.embedded"
#: The demo person's team in each shipped zone, as the zone's policy names it.
_TEAMS = {"clinic": "research", "openlab": "staff", "trading": "quants"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to start."""

    state: str
    zone: str = "clinic"
    policies: str
    #: First port; 0 chooses a free range.
    base_port: int = 0
    #: Second-to-last byte of the nodes' loopback addresses.
    net: int = 1
    #: Whether to write the shipped data sets.
    data: bool = True
    #: How the zone reaches Ray; ``None`` for what its zone.yaml says, and where that says nothing ``"edge"`` as root
    #: and ``"client"`` otherwise.
    carrier: Carrier | None = None
    #: What the gateway may use of memory; ``None``: as much as the machine has.
    gateway_memory_bytes: int | None = None


def _usual_carrier() -> Carrier:
    """Return ``client``, which needs no root, for whoever is not root.

    There is ``edge`` alone without grpcio, and without namespaces: a relay that shares the host's network gains nothing
    by a tunnel out of one.
    """
    possible = raylet.has_ray_client() and boundary.survey().namespaces
    return Carrier.CLIENT if possible and os.geteuid() != 0 else Carrier.EDGE


def shipped_policies() -> Path:
    """Return the policies directory of this checkout."""
    return Path(__file__).resolve().parent.parent / "policies"


class Supervisor:
    """Starts and ends every process of an embedded cluster."""

    def __init__(self, plan: Plan, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._layout = Layout(Path(plan.state))
        self.state_file = self._layout.supervisor
        self._log_start = self._layout.log.stat().st_size if self._layout.log.exists() else 0
        self._carrier = plan.carrier or load_zone(Path(plan.policies), plan.zone).carrier or _usual_carrier()
        self._vault: VaultServer | None = None
        self._cluster: nodes.Cluster | None = None
        self._relay: client_relay.ClientRelay | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._base_port = 0

    def start(self) -> dict[str, Any]:
        """Start everything; return what others need to know."""
        plan, layout = self._plan, self._layout
        for path in (layout.root, layout.zone(plan.zone), *(layout.node(node) for node in GPU_NODES)):
            path.mkdir(mode=0o711, parents=True, exist_ok=True)
        data = self._start_data()
        self._say("starting Vault (OpenBao, embedded)")
        self._stop_vault()  # One that outlived a supervisor that was killed.
        self._vault = VaultServer.start(layout.vault)
        layout.vault_ca.write_bytes(self._vault.ca_file.read_bytes())
        layout.vault_ca.chmod(0o644)
        self._say("setting up keys, identities and policies; revoking the root token")
        roles = self._setup_vault(self._vault)
        self._base_port = plan.base_port or nodes.free_base_port()
        raylets = "three" if self._carrier is Carrier.EDGE else "two"
        self._say(f"starting {raylets} raylets, two custodians, the gateway and its relay")
        for index, node in enumerate(GPU_NODES):
            self._start_custodian(index, node, roles["nodes"][node])
        self._start_gateway(roles["gateway"])
        if self._carrier is Carrier.CLIENT:
            self._relay = self._client_relay(roles["nodes"][self._zone_node])
            self._relay.start_relay()
        self._start_cluster(roles["nodes"])
        if self._relay is not None:
            # Not before the head is whole: what Ray Client's server lacks then, it tries again after long pauses.
            self._relay.start_forwarder()
        self._await_sockets()
        if data is not None and data.wait() != 0:
            raise ClusterError(f"the data sets could not be written; see {layout.log}", node="", reason="data")
        services.publish(layout, plan.zone, self._login(roles["gateway"]))
        return self.document()

    def document(self) -> dict[str, Any]:
        """Return the condition of the cluster, as JSON types."""
        assert self._cluster is not None
        return {
            "zone": self._plan.zone,
            "carrier": self._carrier.value,
            "degradations": list(self._degradations()),
            "sandbox_degradations": list(boundary.degradations()),
            "address": self._cluster.address,
            "processes": {name: process.pid for name, process in self._processes.items()}
            | (self._relay.processes() if self._relay else {}),
            "nodes": {node.spec.name: node.process.pid for node in self._cluster.nodes},
        }

    def _degradations(self) -> tuple[str, ...]:
        own = () if os.geteuid() == 0 else ("self-enforced",)
        # Known before the cluster runs: the gateway is started first, and must refuse what is not accepted.
        cage = raylet.degradations(shared_network=True)
        return ("embedded-vault", *own, *cage)

    def _start_data(self) -> subprocess.Popen[bytes] | None:
        directory = self._layout.data(self._plan.zone)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._plan.data:
            return None
        command = [sys.executable, "-m", "ray_gpu.curation", self._plan.zone, str(self._plan.policies), str(directory)]
        return services.spawn(command, log=self._layout.log)

    def _setup_vault(self, server: VaultServer) -> dict[str, Any]:
        root = server.root_client()
        person = PersonSpec(name="dana", zone=self._plan.zone, groups=(_TEAMS.get(self._plan.zone, "research"),))
        declaration = Declaration(
            zones=(self._plan.zone,),
            nodes=(
                *(
                    NodeSpec(name=node, role="gpu", addresses=self._certified(index))
                    for index, node in enumerate(GPU_NODES)
                ),
                NodeSpec(name=self._zone_node, role="zone", addresses=(self._address(len(GPU_NODES)),)),
            ),
            people=(person,),
        )
        try:
            made = setup(root, declaration, policies=Path(self._plan.policies) / "vault")
        finally:
            root.revoke()
        background.write_private(self._layout.person, {"user": person.name, "password": made.people[person.name]})
        return {"gateway": made.gateways[self._plan.zone], "nodes": made.nodes}

    @property
    def _zone_node(self) -> str:
        return f"zone-{self._plan.zone}"

    def _identify(self, roles: Mapping[str, AppRole], spec: raylet.NodeSpec, uid: int) -> raylet.Credentials:
        """Get a node's certificate and the cluster's token from Vault, as a host of its own does."""
        identity = self._obtain(roles[spec.name], spec.name)
        files = node_identity.write(identity, self._ray_dir(spec.name), uid=uid if os.geteuid() == 0 else None)
        return raylet.Credentials(files=files.paths(), environment=files.environment())

    def _obtain(self, role: AppRole, name: str) -> node_identity.RayIdentity:
        assert self._vault is not None
        addresses = self._certified([*GPU_NODES, self._zone_node].index(name))
        return node_identity.obtain(self._vault.client(), role.role_id, role.secret_id, node=name, addresses=addresses)

    def _ray_dir(self, name: str) -> Path:
        return self._layout.root / "ray" / name

    def _address(self, index: int) -> str:
        return f"127.0.{self._plan.net}.{index + 1}"

    def _certified(self, index: int) -> tuple[str, ...]:
        """Return what a node's certificate names. The first GPU node is Ray's head as well."""
        return node_identity.certified_addresses([self._address(index)], head=index == 0)

    def _login(self, role: AppRole) -> services.VaultLogin:
        assert self._vault is not None
        return services.VaultLogin(
            address=self._vault.address,
            ca=str(self._layout.vault_ca),
            role_id=role.role_id,
            secret_id=role.secret_id,
        )

    def _start_custodian(self, index: int, node: str, role: AppRole) -> None:
        self._processes[f"custodian-{node}"] = services.start_custodian(
            self._layout,
            node,
            self._login(role),
            log=self._layout.log,
            pool=POOL,
            gpu_milli=1000,
            uid_base=LEASE_UID + index * LEASE_UIDS_PER_NODE,
            uid_count=LEASE_UIDS_PER_NODE,
            actor_uid=CAGE_UID + index,
            address=self._address(index),
            endpoint_ports=NodePorts.of(self._base_port, index).endpoints,
            policies=self._plan.policies,
        )

    def _start_gateway(self, role: AppRole) -> None:
        self._processes["gateway"] = services.start_gateway(
            self._layout,
            self._plan.zone,
            self._login(role),
            log=self._layout.log,
            memory_bytes=self._plan.gateway_memory_bytes,
            policies=self._plan.policies,
            relay_uid=CAGE_UID + len(GPU_NODES),
            carrier=self._carrier.value,
            degradations=self._degradations(),
        )

    def _start_cluster(self, roles: Mapping[str, AppRole]) -> None:
        plan, layout = self._plan, self._layout
        specs = [
            raylet.NodeSpec(
                name=node,
                address=self._address(index),
                role="gpu",
                num_gpus=1,
                labels={"ray-gpu-pool": POOL},
                socket_dir=layout.custodian_dir(node),
            )
            for index, node in enumerate(GPU_NODES)
        ]
        if self._carrier is Carrier.EDGE:
            specs.append(
                raylet.NodeSpec(
                    name=self._zone_node,
                    address=self._address(len(specs)),
                    role="zone",
                    zone=plan.zone,
                    labels={},
                    socket_dir=layout.relay_dir(plan.zone),
                )
            )
        self._cluster = nodes.Cluster.start(
            layout.root / "ray",
            specs,
            identify=functools.partial(self._identify, roles),
            uid_base=CAGE_UID,
            base_port=self._base_port,
        )

    def _client_relay(self, role: AppRole) -> client_relay.ClientRelay:
        """Return the relay of a zone without a node. The first of the GPU nodes is its head."""
        spec = client_relay.RelaySpec(
            zone=self._plan.zone,
            head=(self._address(0), NodePorts.of(self._base_port, 0).client),
            uid=CAGE_UID + len(GPU_NODES),
            credentials=self._ray_dir(self._zone_node),
            identify=functools.partial(self._obtain, role, self._zone_node),
            log=self._layout.log,
        )
        return client_relay.ClientRelay(self._layout, spec)

    def _await_sockets(self) -> None:
        """Wait until custodians and gateway listen, and a client relay is there; whatever ended meanwhile is named."""
        layout = self._layout
        sockets = [layout.custodian_dir(node) / raylet.CUSTODIAN_SOCKET for node in GPU_NODES]
        sockets.append(gateway := layout.gateway_socket(self._plan.zone))
        services.await_until(
            # A relay in a node's cage ends with its node, which _check_all names; this one may be at its second try.
            lambda: (
                all(services.listens(path) for path in sockets)
                and (self._relay is None or services.gateway_is_ready(gateway))
            ),
            check=self._check_all,
            timeout_s=START_TIMEOUT_S,
            failure=ClusterError(
                f"the cluster did not come up in {START_TIMEOUT_S:.0f} s; see {layout.log}",
                node="",
                reason="timed out",
            ),
        )

    def check(self) -> None:
        """Start a client relay again; what else has ended shows in ``ray-gpu status``, and the rest goes on."""
        if self._relay is not None:
            self._relay.check()

    def _check_all(self) -> None:
        """Raise if a process that should run has ended.

        Raises:
            ClusterError: Names it.
        """
        self.check()
        for name, process in self._processes.items():
            if process.poll() is not None:
                why = services.last_words(self._layout.log, self._log_start)
                raise ClusterError(
                    f"{name} ended (status {process.returncode}){why}; see {self._layout.log}",
                    node=name,
                    reason=f"status {process.returncode}",
                )
        if self._cluster and not self._cluster.alive():
            raise ClusterError(f"a Ray node ended; see {self._layout.log}", node="", reason="raylet")

    def stop(self) -> None:
        """End everything: the gateway first, so that it ends its leases and shreds their keys."""
        gateway = self._processes.pop("gateway", None)
        if gateway is not None:
            services.end(gateway, first_child=True)
        if self._relay is not None:
            self._relay.stop()
        for process in self._processes.values():
            services.end(process)
        self._processes.clear()
        if self._cluster is not None:
            self._cluster.stop()
        self._stop_vault()
        self._layout.public(self._plan.zone).unlink(missing_ok=True)

    def _stop_vault(self) -> None:
        if server := self._vault or VaultServer.find(self._layout.vault):
            server.stop()


# -- starting and ending the supervisor from another process ------------------------------------


def running(layout: Layout) -> dict[str, Any] | None:
    """Return the condition of the cluster in a state directory, if its supervisor runs."""
    return background.running(layout.supervisor, _MODULE)


def up(plan: Plan, say: Callable[[str], None] = lambda _: None, *, tied: bool = False) -> dict[str, Any]:
    """Start an embedded cluster in the background and return when it serves.

    Args:
        plan: What to start.
        say: Is told what happens meanwhile.
        tied: Whether it ends with this process, also when that is killed.

    Raises:
        UnknownNameError: No such zone in the policies.
        ClusterError: It did not come up; nothing is left running.
    """
    check_id(plan.zone, what="zone")
    known = zone_names(Path(plan.policies))
    if plan.zone not in known:
        raise UnknownNameError.of("zone", plan.zone, known)
    # The supervisor runs elsewhere, so its paths are whole ones.
    plan = replace(plan, state=str(Path(plan.state).absolute()), policies=str(Path(plan.policies).absolute()))
    layout = Layout(Path(plan.state))
    _check_length(layout, plan.zone)
    if running(layout):
        raise ClusterError(
            f"a cluster runs in {layout.root} already; use it, or stop it with `ray-gpu down`",
            node="",
            reason="running",
        )
    layout.root.mkdir(mode=0o711, parents=True, exist_ok=True)
    layout.supervisor.unlink(missing_ok=True)
    return background.launch(_MODULE, json.dumps(asdict(plan)), log=layout.log, say=say, tied=tied)


def _check_length(layout: Layout, zone: str) -> None:
    sockets = [layout.gateway_socket(zone), layout.relay_dir(zone) / raylet.RELAY_SOCKET]
    sockets += [layout.custodian_dir(node) / raylet.CUSTODIAN_SOCKET for node in GPU_NODES]
    excess = max(len(os.fsencode(path)) for path in sockets) - _MAX_SOCKET_PATH_BYTES
    if excess > 0:
        raise ClusterError(
            f"{layout.root} is {excess} bytes too long: it holds Unix sockets, whose paths end at "
            f"{_MAX_SOCKET_PATH_BYTES}. Choose a shorter one with --state or RAY_GPU_STATE",
            node="",
            reason="path too long",
        )


def down(layout: Layout) -> bool:
    """End the cluster of a state directory; tell whether there was one. Returns when everything is gone."""
    return background.stop(layout.supervisor, _MODULE)


def main(argv: list[str]) -> int:
    """Be the supervisor. ``argv``: the plan as JSON, and descriptors for :func:`background.serve`."""
    document = json.loads(argv[0])
    plan = Plan(**{**document, "carrier": document["carrier"] and Carrier(document["carrier"])})
    return background.serve(lambda say: Supervisor(plan, say), argv[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
