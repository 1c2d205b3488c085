"""A zone's gateway on a host of its own: ``ray-gpu gateway start``. This module does I/O and starts processes.

Run by the zone's own people, beside the zone's node of the cluster (``ray-gpu node start``), whose cage
holds the relay. The gateway waits for its relay, and a relay for its gateway, so either may start first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_gpu import background, node, raylet, services
from ray_gpu.host_file import AbsolutePath, VaultPart, read_login
from ray_gpu.sandbox import boundary
from ray_gpu.state import Layout
from ray_gpu.wire import MalformedMessageError, recv_message, send_message, unix_connect
from zones.document import Document, FileModel, Id, read_text_file
from zones.errors import ClusterError

#: A gateway reads policies and logs in to Vault, which takes a second.
START_TIMEOUT_S = 60.0
_MODULE = "ray_gpu.zone_host"


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


def _state_file(config: GatewayFile) -> Path:
    return Layout(Path(config.state)).zone(config.zone) / "gateway.json"


class Service:
    """The gateway's process, and what notebooks on this host may know of the zone."""

    def __init__(self, config_file: Path, say: Callable[[str], None]) -> None:
        self._config = read_config(config_file)
        self._say = say
        self._layout = Layout(Path(self._config.state))
        root = self._layout.zone(self._config.zone)
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        self.state_file = _state_file(self._config)
        self._log = root / "gateway.log"
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._gateway: boundary.Confined | None = None

    def start(self) -> dict[str, Any]:
        """Start the gateway; return its condition once it waits for its relay. Then it serves people too."""
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
            degradations=degradations,
            data_dir=config.data,
        )
        relay = layout.relay_dir(config.zone) / raylet.RELAY_SOCKET
        services.await_until(
            lambda: services.listens(relay),
            check=self.check,
            timeout_s=START_TIMEOUT_S,
            failure=ClusterError(f"the gateway did not serve in time; see {self._log}", node="", reason="timed out"),
        )
        services.publish(layout, config.zone, login)
        return {"zone": config.zone, "degradations": degradations, "processes": {"gateway": self._gateway.pid}}

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
        self._layout.public(self._config.zone).unlink(missing_ok=True)
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
    return background.launch(_MODULE, str(config_file.absolute()), log=root / "gateway.log", say=say)


def running(config: GatewayFile) -> dict[str, Any] | None:
    """Return the condition of a gateway on this host, if it runs."""
    return background.running(_state_file(config), _MODULE)


def cluster_nodes(config: GatewayFile) -> list[dict[str, Any]]:
    """Return the cluster's nodes as a gateway on this host sees them.

    Empty where its relay has not joined, or the caller is neither root nor the gateway's own user.
    """
    path = Layout(Path(config.state)).gateway_socket(config.zone)
    try:
        with unix_connect(str(path)) as sock:
            send_message(sock, {"op": "nodes"})
            return list(recv_message(sock)[0].get("nodes") or [])
    except (OSError, MalformedMessageError):
        return []


def stop(config: GatewayFile) -> bool:
    """End a gateway; tell whether it ran. Returns when its sessions have ended and everything is gone."""
    return background.stop(_state_file(config), _MODULE)


def main(argv: list[str]) -> int:
    """Be the gateway's service. ``argv``: the gateway.yaml, and descriptors for :func:`background.serve`."""
    return background.serve(lambda say: Service(Path(argv[0]), say), argv[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
