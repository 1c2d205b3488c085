"""A zone's gateway on a host of its own: ``ray-gpu gateway start``. This module does I/O and starts processes.

Run by the zone's own people. With carrier ``edge`` it is beside the zone's node of the cluster (``ray-gpu node
start``), whose cage holds the relay: the gateway waits for its relay, and a relay for its gateway, so either may start
first. With carrier ``client`` nothing of Ray's cluster is in the zone: this service runs the relay as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from ray_gpu import background, node, node_identity, raylet, services
from ray_gpu.client_relay import ClientRelay, RelaySpec
from ray_gpu.host_file import AbsolutePath, Address, VaultPart, read_login
from ray_gpu.node_identity import RayIdentity
from ray_gpu.ports import PORTS
from ray_gpu.sandbox import boundary
from ray_gpu.state import Layout
from zones.config import load_zone
from zones.document import Document, FileModel, Id, read_text_file
from zones.errors import ClusterError
from zones.model import Carrier
from zones.vault import Vault

#: A gateway reads policies and logs in to Vault, which takes a second.
START_TIMEOUT_S = 60.0
#: A relay waits for a driver that the head starts for it, which takes a busy head long, and then tries again. Seconds.
RELAY_TIMEOUT_S = 120.0
_MODULE = "ray_gpu.zone_host"


class RelayPart(FileModel):
    """The relay of a zone whose carrier is ``client``. It speaks for a node of the declaration, of role ``zone``."""

    #: Id of that node, and its address: what the certificate names.
    node: Id
    address: Address
    #: Address of Ray's head.
    head: Address
    #: Port of Ray Client's server there.
    client_port: int = Field(default=PORTS.client, ge=1024, le=65535)
    #: What ``ray-gpu vault issue`` wrote for the node, mode 0600.
    credentials: AbsolutePath


class GatewayFile(FileModel):
    """A gateway.yaml."""

    zone: Id
    #: Directory with the zone's files and its pools'.
    policies: AbsolutePath
    vault: VaultPart
    #: Directory with the catalog's data sets; by default one in the state directory.
    data: AbsolutePath | None = None
    #: What the gateway may use of memory, MiB; by default as much as the machine has. Larger data goes by the disk.
    memory_mib: int | None = Field(default=None, ge=512)
    state: AbsolutePath = "/var/lib/ray-gpu"
    #: With carrier ``client``, and only then.
    relay: RelayPart | None = None


def read_config(path: Path) -> GatewayFile:
    """Read a gateway.yaml.

    Raises:
        ConfigError: With file and line.
    """
    return Document(read_text_file(path), path).check(GatewayFile)


def _check_carrier(config: GatewayFile, path: Path) -> None:
    """Compare a gateway.yaml with what the zone's people reviewed.

    Raises:
        UnknownNameError, ConfigError: There is no such zone, its files are wrong, or one says ``edge`` and one
            ``client``.
    """
    zone = load_zone(Path(config.policies), config.zone)
    carrier = zone.carrier or Carrier.EDGE
    if (carrier is Carrier.CLIENT) != (config.relay is not None):
        said = "needs a part `relay`" if carrier is Carrier.CLIENT else "has no part `relay`"
        document = Document(read_text_file(path), path)
        document.refuse(("relay",), f"a zone whose zone.yaml says `carrier: {carrier}` {said}")


def _state_file(config: GatewayFile) -> Path:
    return Layout(Path(config.state)).zone(config.zone) / "gateway.json"


class Service:
    """The gateway's process, and what notebooks on this host may know of the zone."""

    def __init__(self, config_file: Path, say: Callable[[str], None]) -> None:
        self._config = read_config(config_file)
        _check_carrier(self._config, config_file)
        self._say = say
        self._layout = Layout(Path(self._config.state))
        root = self._layout.zone(self._config.zone)
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.state_file = _state_file(self._config)
        self._log = root / "gateway.log"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._gateway: boundary.Confined | None = None
        self._relay: ClientRelay | None = None
        self._not_after = 0

    def start(self) -> dict[str, Any]:
        """Start the gateway; return its condition once it waits for its relay, or has the one that it starts."""
        config, layout = self._config, self._layout
        role_id, secret_id = read_login(config.vault)
        login = services.VaultLogin(
            address=config.vault.address, ca=config.vault.ca, role_id=role_id, secret_id=secret_id
        )
        self._say(f"starting the gateway of zone {config.zone}")
        degradations = [*([] if os.geteuid() == 0 else ["self-enforced"]), *raylet.degradations()]
        self._gateway = services.start_gateway(
            layout,
            config.zone,
            login,
            log=self._log,
            policies=config.policies,
            relay_uid=node.CAGE_UID,
            carrier=Carrier.CLIENT if config.relay else Carrier.EDGE,
            degradations=degradations,
            data_dir=config.data,
            memory_bytes=None if config.memory_mib is None else config.memory_mib << 20,
        )
        relay = layout.relay_dir(config.zone) / raylet.RELAY_SOCKET
        services.await_until(
            lambda: services.listens(relay),
            check=self.check,
            timeout_s=START_TIMEOUT_S,
            failure=ClusterError(f"the gateway did not serve in time; see {self._log}", node="", reason="timed out"),
        )
        if config.relay is not None:
            self._start_relay(config.relay)
        services.publish(layout, config.zone, login)
        processes = {"gateway": self._gateway.pid} | (self._relay.processes() if self._relay else {})
        ends = {"certificate_not_after": self._not_after} if self._relay else {}
        return {"zone": config.zone, "degradations": degradations, "processes": processes, **ends}

    def _start_relay(self, part: RelayPart) -> None:
        """Start forwarder and relay, and return when the gateway has its relay."""
        config = self._config
        where = f"{part.head}:{part.client_port}"
        self._say(f"starting the relay of zone {config.zone}, as {part.node}, to the head at {where}")
        spec = RelaySpec(
            zone=config.zone,
            head=(part.head, part.client_port),
            uid=node.CAGE_UID,
            credentials=credentials_dir(config),
            identify=lambda: self._identify(part),
            log=self._log,
        )
        self._relay = ClientRelay(self._layout, spec)
        self._relay.start()
        try:
            services.await_until(
                lambda: services.gateway_is_ready(self._layout.gateway_socket(config.zone)),
                check=self.check,
                timeout_s=RELAY_TIMEOUT_S,
                failure=ClusterError("no relay", node=part.node, reason="timed out"),
            )
        except ClusterError as error:
            if error.reason != "timed out":
                raise
            why = services.last_words(self._log, self._log_start)
            raise ClusterError(
                f"the relay did not join the head at {where} in time{why}; see {self._log}: is the head up, and does "
                "the firewall let this host's forwarder through?",
                node=part.node,
                reason="timed out",
            ) from None

    def _identify(self, part: RelayPart) -> RayIdentity:
        """Get the relay's certificate and the cluster's token from Vault, with the login of its node."""
        login = self._config.vault.model_copy(update={"credentials": part.credentials})
        role_id, secret_id = read_login(login)
        vault = Vault(login.address, ca_file=login.ca)
        identity = node_identity.obtain(vault, role_id, secret_id, node=part.node, addresses=[part.address])
        self._not_after = identity.not_after
        return identity

    def check(self) -> None:
        """Raise if the gateway has ended. A relay that has is started again: it ends with each loss of the head."""
        self._check_gateway()
        if self._relay is not None:
            self._relay.check()

    def _check_gateway(self) -> None:
        if self._gateway is not None and self._gateway.poll() is not None:
            why = services.last_words(self._log, self._log_start)
            raise ClusterError(
                f"the gateway of zone {self._config.zone} ended{why}; see {self._log}",
                node="",
                reason=f"status {self._gateway.returncode}",
            )

    def stop(self) -> None:
        """End the gateway, which ends its sessions and shreds their keys."""
        self._layout.public(self._config.zone).unlink(missing_ok=True)
        if self._gateway is not None:
            services.end(self._gateway, first_child=True)
        if self._relay is not None:
            self._relay.stop()


def credentials_dir(config: GatewayFile) -> Path:
    """Return where the relay's certificate and token lie: on a tmpfs, where this user has one."""
    name = f"relay-{config.zone}"
    if os.geteuid() == 0:
        return node.RUN_DIR / name
    own = Path(f"/run/user/{os.geteuid()}")
    return (own / "ray-gpu" if own.is_dir() else Layout(Path(config.state)).zone(config.zone)) / name


def start(config_file: Path, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Start a gateway in the background and return its condition once it serves.

    Raises:
        ConfigError: The gateway.yaml or a file that it names is wrong.
        ClusterError: It did not come up, or runs already; nothing is left half started.
    """
    config = read_config(config_file)
    if running(config) is not None:
        raise ClusterError(
            f"the gateway of zone {config.zone} runs already; stop it with `ray-gpu gateway stop`",
            node="",
            reason="running",
        )
    root = Layout(Path(config.state)).zone(config.zone)
    root.mkdir(mode=0o711, parents=True, exist_ok=True)
    return background.launch(_MODULE, str(config_file.absolute()), log=root / "gateway.log", say=say)


def running(config: GatewayFile) -> dict[str, Any] | None:
    """Return the condition of a gateway on this host, if it runs."""
    return background.running(_state_file(config), _MODULE)


def condition(config: GatewayFile) -> dict[str, Any] | None:
    """Return what runs here, with ``relay``: whether the gateway reaches the cluster; ``None`` when nothing does."""
    document = running(config)
    if document is None:
        return None
    ready = services.gateway_is_ready(Layout(Path(config.state)).gateway_socket(config.zone))
    return {**document, "relay": ready}


def cluster_nodes(config: GatewayFile) -> list[dict[str, Any]]:
    """Return the cluster's nodes as a gateway on this host sees them.

    Empty where its relay has not joined, or the caller is neither root nor the gateway's own user.
    """
    answer = services.ask_gateway(Layout(Path(config.state)).gateway_socket(config.zone), "nodes")
    return list(answer.get("nodes") or [])


def stop(config: GatewayFile) -> bool:
    """End a gateway; tell whether it ran. Returns when its sessions have ended and everything is gone."""
    return background.stop(_state_file(config), _MODULE)


def main(argv: list[str]) -> int:
    """Be the gateway's service. ``argv``: the gateway.yaml, and descriptors for :func:`background.serve`."""
    return background.serve(lambda say: Service(Path(argv[0]), say), argv[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
