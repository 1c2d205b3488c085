"""Where an embedded cluster keeps its files. Reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def default_state_dir() -> Path:
    """Return ``RAY_GPU_STATE``, or a directory of this user that outlives a reboot, as its ledger must."""
    if named := os.environ.get("RAY_GPU_STATE"):
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/ray-gpu")
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "ray-gpu"


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below a state directory."""

    root: Path

    @property
    def vault(self) -> Path:
        """The embedded Vault's directory, private to whoever started it."""
        return self.root / "vault"

    @property
    def vault_ca(self) -> Path:
        """The CA that clients check Vault with, readable by everyone."""
        return self.root / "vault-ca.pem"

    @property
    def supervisor(self) -> Path:
        """Process id and condition of the supervisor."""
        return self.root / "supervisor.json"

    @property
    def log(self) -> Path:
        """The supervisor's and its processes' log; no plaintext of data is ever written there."""
        return self.root / "supervisor.log"

    @property
    def person(self) -> Path:
        """Login of the person who started the cluster, private."""
        return self.root / "person.json"

    @property
    def environments(self) -> Path:
        """What this host's operator published for sandboxes (:mod:`ray_gpu.environment_store`)."""
        return self.root / "environments"

    def zone(self, name: str) -> Path:
        """A zone's directory."""
        return self.root / "zones" / name

    def public(self, zone: str) -> Path:
        """What notebooks on this host may know of a zone; there while its gateway is meant to run."""
        return self.zone(zone) / "zone.json"

    def data(self, zone: str) -> Path:
        """A zone's data sets."""
        return self.zone(zone) / "data"

    def ledger(self, zone: str) -> Path:
        """A zone's ledger."""
        return self.zone(zone) / "ledger" / "ledger.sqlite"

    def gateway_socket(self, zone: str) -> Path:
        """Where people connect to a zone's gateway."""
        return self.zone(zone) / "run" / "gw.sock"

    def relay_dir(self, zone: str) -> Path:
        """Directory with the socket between gateway and relay."""
        return self.zone(zone) / "relay"

    def forwarder_dir(self, zone: str) -> Path:
        """Directory with the socket between a zone's client relay and its forwarder."""
        return self.zone(zone) / "forwarder"

    def node(self, name: str) -> Path:
        """A node's directory."""
        return self.root / "nodes" / name

    def custodian_dir(self, node: str) -> Path:
        """Directory with the socket between a node's actors and its custodian."""
        return self.node(node) / "socket"
