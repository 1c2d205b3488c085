"""Forwarder and relay of a zone whose carrier is ``client``: no raylet is in the zone. Starts processes.

The relay's cage has no network. What leads out of it is two Unix sockets, of the gateway and of the forwarder, and
the forwarder reaches Ray Client's server on the head alone (:mod:`ray_gpu.forwarder`). Run this on the main thread.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ray_gpu import node_identity, services
from ray_gpu.forwarder import FORWARDER_SOCKET
from ray_gpu.node_identity import RayFiles, RayIdentity
from ray_gpu.ports import FORWARDER_UID
from ray_gpu.raylet import RELAY_SOCKET, has_ray_client
from ray_gpu.sandbox import boundary
from ray_gpu.sandbox import profile as profiles
from ray_gpu.state import Layout
from zones.errors import ClusterError, ZoneError

#: The forwarder listens within a second; a busy machine gets several times that.
_FORWARDER_TIMEOUT_S = 30.0
#: A relay that ended is not started again before so long after its last start, seconds.
_RESTART_PAUSE_S = 2.0
#: What Ray Client reads. Without the grace period it would hold on to a driver that is gone.
_ENVIRONMENT: Mapping[str, str] = {
    "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "0",
    # The relay connects once the head answers; what takes longer is a busy head.
    "RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "15",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_LOG_TO_DRIVER": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySpec:
    """What a relay is started with."""

    zone: str
    #: Address of the head, and port of Ray Client's server there.
    head: tuple[str, int]
    #: Uid of the relay when root.
    uid: int
    #: Directory for its certificate and token.
    credentials: Path
    #: Gets them. Asked at each start, since Ray reads them at start only.
    identify: Callable[[], RayIdentity]
    #: Where forwarder and relay say what happens to them.
    log: Path


class ClientRelay:
    """Both processes; what ends is started again by :meth:`check`."""

    def __init__(self, layout: Layout, spec: RelaySpec) -> None:
        self._spec = spec
        self._directory = layout.forwarder_dir(spec.zone)
        self._gateway = layout.relay_dir(spec.zone)
        self._root = os.geteuid() == 0
        self._forwarder: boundary.Confined | None = None
        self._relay: boundary.Confined | None = None
        self._not_before = 0.0

    def start(self) -> None:
        """Start both; the relay joins the cluster and then its gateway, which knows when it has. Raises as they do."""
        self.start_relay()
        self.start_forwarder()

    def check(self) -> None:
        """Start again what has ended. What does not work now is tried again later, and written to the log."""
        try:
            if self._forwarder is not None and self._forwarder.poll() is not None:
                self.start_forwarder()
            if self._relay is not None and self._relay.poll() is not None and time.monotonic() > self._not_before:
                self.start_relay()
        except (ZoneError, OSError) as error:
            sys.stderr.write(f"the relay of zone {self._spec.zone} waits, and is tried again: {error}\n")
            sys.stderr.flush()

    def processes(self) -> dict[str, int]:
        """Return process ids by name."""
        found = {"forwarder": self._forwarder, "relay": self._relay}
        return {name: process.pid for name, process in found.items() if process is not None}

    def stop(self) -> None:
        """End both."""
        for process in (self._relay, self._forwarder):
            if process is not None:
                process.end()
        self._relay = self._forwarder = None

    def start_forwarder(self) -> None:
        """Start the forwarder, and return once it serves.

        Raises:
            ClusterError: It does not.
        """
        spec, directory = self._spec, self._directory
        uid = self._make_directory()
        profile = profiles.gateway(
            f"forwarder-{spec.zone}",
            uid=uid,
            bind_ro=(),
            bind_rw=((directory, directory),),
            caged=boundary.survey().namespaces,
        )
        host, port = spec.head
        command = [sys.executable, "-P", "-m", "ray_gpu.forwarder", f"--socket={directory / FORWARDER_SOCKET}"]
        command += [f"--host={host}", f"--port={port}", f"--relay-uid={spec.uid}"]
        process = self._forwarder = self._launch(command, profile)

        def check() -> None:
            if process.poll() is not None:
                raise ClusterError(
                    f"the forwarder of zone {spec.zone} ended while starting; see {spec.log}", node="", reason="ended"
                )

        services.await_until(
            lambda: services.listens(directory / FORWARDER_SOCKET),
            check=check,
            timeout_s=_FORWARDER_TIMEOUT_S,
            failure=ClusterError(f"the forwarder did not serve in time; see {spec.log}", node="", reason="timed out"),
        )

    def start_relay(self) -> None:
        """Start the relay. It waits for the forwarder, and then for the head.

        Raises:
            ClusterError: Ray Client is not installed.
            ZoneError: No certificate can be had.
            OSError: It cannot be started.
        """
        spec = self._spec
        if not has_ray_client():
            raise ClusterError(
                "carrier client needs grpcio, which is not installed; run pip install 'ray-gpu[client]', or use "
                "carrier edge",
                node="",
                reason="no grpcio",
            )
        self._make_directory()
        self._not_before = time.monotonic() + _RESTART_PAUSE_S
        uid = spec.uid if self._root else None
        files = node_identity.write(spec.identify(), spec.credentials, uid=uid)
        profile = relay_profile(spec.zone, uid=uid, files=files, sockets=(self._directory, self._gateway))
        command = [sys.executable, "-P", "-m", "ray_gpu.relay", f"--socket={self._gateway / RELAY_SOCKET}"]
        command += [f"--client={self._directory / FORWARDER_SOCKET}"]
        self._relay = self._launch(command, profile)

    def _make_directory(self) -> int | None:
        """Make the directory of the forwarder's socket; return the forwarder's uid."""
        uid = FORWARDER_UID if self._root else None
        self._directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        if uid is not None:
            os.chown(self._directory, uid, uid)
        return uid

    def _launch(self, command: list[str], profile: boundary.Profile) -> boundary.Confined:
        with self._spec.log.open("ab") as output:
            return boundary.launch(command, profile, stdout=output, stderr=output)


def relay_profile(zone: str, *, uid: int | None, files: RayFiles, sockets: tuple[Path, ...]) -> boundary.Profile:
    """Return what a relay gets: no network, its certificate and token, and directories with a Unix socket each.

    Args:
        zone: Its name.
        uid: Its uid when root.
        files: Readable by that uid.
        sockets: Read-only, which is enough to connect.
    """
    shown = (*files.paths(), *sockets)
    profile = profiles.gateway(f"relay-{zone}", uid=uid, bind_ro=shown, bind_rw=(), caged=boundary.survey().namespaces)
    return dataclasses.replace(profile, network=False, env={**profile.env, **_ENVIRONMENT, **files.environment()})
