"""A zone's gateway on a host of its own: ``ray-gpu gateway start``. This module does I/O and starts processes.

Run by the zone's own people, beside the zone's node of the cluster (``ray-gpu node start``), whose cage
holds the relay. The gateway waits for its relay, and a relay for its gateway, so either may start first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_gpu import background, node, raylet, services
from ray_gpu.host_file import AbsolutePath, VaultPart, read_login
from ray_gpu.sandbox import boundary
from ray_gpu.state import Layout
from zones.document import Document, FileModel, Id, read_text_file
from zones.errors import ClusterError

#: A gateway reads policies and logs in to Vault, which takes a second.
START_TIMEOUT_S = 60.0


class GatewayFile(FileModel):
    """A gateway.yaml."""

    zone: Id
    #: Directory with the zone's files and its pools'.
    policies: AbsolutePath
    vault: VaultPart
    #: Directory with the catalog's data sets; by default one in the state directory.
    data: AbsolutePath | None = None
    state: AbsolutePath = "/var/lib/ray-gpu"


def read_config(path: Path) -> GatewayFile:
    """Read a gateway.yaml.

    Raises:
        ConfigError: With file and line.
    """
    return Document(read_text_file(path), path).check(GatewayFile)


class Service:
    """The gateway's process, and what notebooks on this host may know of the zone."""

    def __init__(self, config_file: Path, say: Callable[[str], None]) -> None:
        self._config = read_config(config_file)
        self._say = say
        self._layout = Layout(Path(self._config.state))
        root = self._layout.zone(self._config.zone)
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.state_file = root / "gateway.json"
        self._public = root / "zone.json"
        self._log = root / "gateway.log"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._gateway: boundary.Confined | None = None

    def start(self) -> dict[str, Any]:
        """Start the gateway; return its condition once it waits for its relay. Then it serves people too."""
        config, layout = self._config, self._layout
        role_id, secret_id = read_login(config.vault)
        self._say(f"starting the gateway of zone {config.zone}")
        degradations = [*([] if os.geteuid() == 0 else ["self-enforced"]), *raylet.degradations()]
        socket, relay = layout.gateway_socket(config.zone), layout.relay_dir(config.zone) / raylet.RELAY_SOCKET
        settings = {
            "zone": config.zone,
            "policies": config.policies,
            "data_dir": config.data or str(layout.data(config.zone)),
            "ledger": str(layout.ledger(config.zone)),
            "socket_path": str(socket),
            "relay_socket": str(relay),
            "relay_uid": node.CAGE_UID,
            "vault": config.vault.address,
            "vault_ca": config.vault.ca,
            "role_id": role_id,
            "secret_id": secret_id,
            "degradations": degradations,
        }
        self._gateway = services.start_gateway(settings, layout.zone(config.zone) / "settings.json", log=self._log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not services.listens(relay):
            self.check()
            if time.monotonic() > deadline:
                raise ClusterError(f"the gateway did not serve in time; see {self._log}", node="", reason="timed out")
            time.sleep(0.02)
        self._publish(socket)
        return {"zone": config.zone, "degradations": degradations, "processes": {"gateway": self._gateway.pid}}

    def _publish(self, socket: Path) -> None:
        """Write what notebooks on this host may know of the zone."""
        public = {
            "socket": str(socket),
            "vault": self._config.vault.address,
            "vault_ca": self._config.vault.ca,
            "ledger": str(self._layout.ledger(self._config.zone)),
        }
        self._public.write_text(json.dumps(public), encoding="utf-8")
        self._public.chmod(0o644)

    def check(self) -> None:
        """Raise if the gateway has ended."""
        if self._gateway is not None and self._gateway.poll() is not None:
            why = services.last_words(self._log, self._log_start)
            raise ClusterError(
                f"the gateway of zone {self._config.zone} ended{why}; see {self._log}",
                node="",
                reason=f"status {self._gateway.returncode}",
            )

    def stop(self) -> None:
        """End the gateway, which ends its sessions and shreds their keys."""
        self._public.unlink(missing_ok=True)
        if self._gateway is not None:
            services.end(self._gateway, first_child=True)


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
    return background.launch("ray_gpu.zone_host", str(config_file.absolute()), log=root / "gateway.log", say=say)


def running(config: GatewayFile) -> dict[str, Any] | None:
    """Return the condition of a gateway on this host, if it runs."""
    state_file = Layout(Path(config.state)).zone(config.zone) / "gateway.json"
    return background.running(state_file, "ray_gpu.zone_host")


def stop(config: GatewayFile) -> bool:
    """End a gateway; tell whether it ran. Returns when its sessions have ended and everything is gone."""
    background.reap()
    document = running(config)
    if document is not None:
        background.terminate(int(document["pid"]))
    return document is not None


def main(argv: list[str]) -> int:
    """Be the gateway's service. ``argv``: the gateway.yaml, and descriptors for :func:`background.serve`."""
    return background.serve(lambda say: Service(Path(argv[0]), say), argv[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
