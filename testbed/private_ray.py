"""A private Ray cluster on a zone's hosts, as a person there starts it: docs/howto-ray-data.md. Starts processes.

It has nothing of the spanning cluster: other ports, another token, other files, the person's own uid, no cage.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ray_gpu.ports import PRIVATE_PORTS
from testbed.cluster import PEOPLE, PERSON_UID, STATE, BedCluster
from testbed.host import Host, HostProcess

HOME, RUN = "/srv/person", f"/run/user/{PERSON_UID}"
#: What the person's processes find on each host, mode 0600.
LOGIN, TOKEN = f"{HOME}/.ray-gpu/login.json", f"{HOME}/.ray-gpu/private-token"
#: Of each node. Nothing here holds much.
_OBJECT_STORE_BYTES = 256 << 20
_START_TIMEOUT_S = 60.0


class PrivateRay:
    """Ray on some hosts of a zone, the first one its head, from ``with`` to its end.

    Args:
        cluster: Whose hosts they are; their gateways run.
        zone: The zone's name.
        names: Hosts, such as ``("zone-clinic", "zone-clinic-2")``.
    """

    def __init__(self, cluster: BedCluster, zone: str, names: Sequence[str]) -> None:
        self.hosts = [cluster.bed[name] for name in names]
        self._cluster, self._zone = cluster, zone
        self._started: list[HostProcess] = []

    @property
    def address(self) -> str:
        """``host:port`` of its GCS."""
        return f"{self.hosts[0].address}:{PRIVATE_PORTS.gcs}"

    def __enter__(self) -> Self:
        token = secrets.token_hex(32)
        for host in self.hosts:
            self._equip(host, token)
            self._started.append(self._start(host))
            self._await(host)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._started):
            process.terminate()
        for process in self._started:
            process.wait()

    def _equip(self, host: Host, token: str) -> None:
        """Give the person a home and a directory in memory, and in it login and token."""
        script = f"mkdir -p {HOME} {RUN}; chown {PERSON_UID}:{PERSON_UID} {HOME} {RUN}; chmod 0700 {HOME} {RUN}"
        host.run(["sh", "-euc", script])
        host.run(["mkdir", "-p", f"{HOME}/.ray-gpu"], uid=PERSON_UID)
        login = self._cluster.credentials(PEOPLE[self._zone]).text
        host.write(LOGIN, login, mode=0o600, uid=PERSON_UID)
        host.write(TOKEN, token, mode=0o600, uid=PERSON_UID)

    def _start(self, host: Host) -> HostProcess:
        command = ["ray", "start", "--block", *self.flags(host)]
        # What it says goes nowhere: nobody reads a pipe for as long as it runs.
        quiet = subprocess.DEVNULL
        return host.popen(
            ["sh", "-c", 'umask 077; exec "$@"', "sh", *command],
            uid=PERSON_UID,
            env=environment(),
            stdout=quiet,
            stderr=quiet,
        )

    def flags(self, host: Host) -> list[str]:
        """Return what docs/howto-ray-data.md has a person give to ``ray start`` on a host."""
        head = [f"--address={self.address}"]
        if host is self.hosts[0]:
            head = ["--head", f"--port={PRIVATE_PORTS.gcs}", f"--ray-client-server-port={PRIVATE_PORTS.client}"]
            head += ["--include-dashboard=false"]
        own = [f"--node-ip-address={host.address}", f"--temp-dir={RUN}/ray", *PRIVATE_PORTS.flags()]
        return [
            *head,
            *own,
            "--disable-usage-stats",
            "--num-cpus=1",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            '--resources={"gateway": 1}',
        ]

    def _await(self, host: Host) -> None:
        """Wait until a node has joined."""
        probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1).close()"
        deadline = time.monotonic() + _START_TIMEOUT_S
        command = ["python", "-I", "-S", "-c", probe, host.address, str(PRIVATE_PORTS.last_to_open)]
        while host.run(command, check=False).returncode != 0:
            assert self._started[-1].poll() is None, f"{host.name}: ray start ended"
            assert time.monotonic() < deadline, f"{host.name}: ray start took too long"

    def run(self, script: str, *arguments: str, timeout_s: float = 100.0) -> Any:
        """Run Python on the head's host as the person, connected; return the JSON that it prints last.

        ``LOGIN`` and ``STATE`` are paths for :class:`ray_gpu.OnGpu`; ``sys.argv[3:]`` are the *arguments*.
        """
        host = self.hosts[0]
        done = host.run(
            ["python", "-c", _DRIVER + script, self.address, host.address, *arguments],
            uid=PERSON_UID,
            env=environment(),
            timeout_s=timeout_s,
        )
        return json.loads(done.stdout.splitlines()[-1])

    def files(self, host: Host) -> list[Path]:
        """Return what a node has written on its host that is a file."""
        return [Path(line) for line in host.run(["find", RUN, "-type", "f"]).stdout.splitlines()]


def environment() -> dict[str, str]:
    """Return what the person's processes have in their environment besides: where secrets are, and no secret."""
    return {
        "HOME": HOME,
        "USER": "person",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_GPU_PROGRESS": "0",
        "RAY_GPU_STATE": STATE,
    }


_DRIVER = f"""
import json, sys
import numpy as np, pyarrow as pa
import ray, ray.data
import ray_gpu
LOGIN, STATE = {LOGIN!r}, {STATE!r}
ray.data.DataContext.get_current().enable_progress_bars = False
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False)
"""
