"""The escape probe in a sandbox of a running cluster: what is there to be reached, and the battery of all attempts."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray_gpu
from ray_gpu import raylet
from tests.proofs.attacked import Attacked, raylet_of
from tests.sandbox import probe
from tests.sandbox.bait import Bait


def escape(program: bytes, target: dict[str, Any]) -> dict[str, str]:
    """Run ``tests.sandbox.probe.packed()`` here. What it then writes in places of its own may succeed."""
    import zlib
    from pathlib import Path

    scope: dict[str, Any] = {}
    exec(zlib.decompress(program), scope)
    outcomes: dict[str, str] = scope["run"](target)
    for place in ("/tmp", "."):
        with contextlib.suppress(OSError):
            Path(place, target["file_name"]).write_text("not an escape", encoding="ascii")
    return outcomes


#: Takes a minute, and longer than an idle lease lasts, so it is not among the battery's attempts.
OWN_RAY = "ray.init()"
#: More than a sandbox's /tmp holds, bytes.
FILL_BYTES = 300 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Battery:
    """What became of the attempts, inside the sandbox and outside, and what the host saw of each run."""

    inside: dict[str, str]
    outside: dict[str, str]
    files_inside: list[str]
    files_outside: list[str]
    heard_inside: int
    heard_outside: int
    #: What the sandbox's lease said that it lacks.
    degradations: tuple[str, ...]
    target: dict[str, Any]
    session: ray_gpu.Session


@contextlib.contextmanager
def fight(attacked: Attacked, **more: Any) -> Iterator[Battery]:
    """Make every attempt in a sandbox of the running cluster, then here; *more* is what else its target has."""
    with contextlib.ExitStack() as stack:
        os.environ["LAUNCHER_CANARY"] = attacked.mark
        stack.callback(os.environ.pop, "LAUNCHER_CANARY")
        below, here = (stack.enter_context(tempfile.TemporaryDirectory(dir=place)) for place in ("/tmp", "/var/tmp"))
        stack.enter_context(contextlib.chdir(here))
        bait = stack.enter_context(Bait(Path(below), attacked.mark))
        mine, other = (stack.enter_context(attacked.attach()) for _ in range(2))
        for session in (mine, other):
            in_sandbox(session, {"file_name": "nothing", "only": []})  # so that there is a lease, and a keeper
        wanted = {**bait.target, **target(attacked, mine, other), "fill_bytes": FILL_BYTES, **more}
        inside, files, heard = in_sandbox(mine, wanted), bait.written(), bait.heard()
        yield Battery(
            degradations=tuple(mine.degradations), inside=inside, files_inside=files, heard_inside=heard,
            outside=outside(wanted),
            files_outside=bait.written(), heard_outside=bait.heard(), target=wanted, session=mine,
        )  # fmt: skip


def own_ray(battery: Battery) -> tuple[str, str]:
    """Return what became of ``import ray; ray.init()`` in the battery's sandbox, and here. Takes a minute."""
    with tempfile.TemporaryDirectory(prefix="r") as directory:
        wanted = {**battery.target, "ray_directory": f"{directory}/r", "only": [OWN_RAY], "limit_s": 150}
        inside = in_sandbox(battery.session, wanted)[OWN_RAY]
        return inside, outside(wanted)[OWN_RAY]


def in_sandbox(session: ray_gpu.Session, target: dict[str, Any]) -> dict[str, str]:
    """Make the attempts in a sandbox of the product."""
    outcomes: dict[str, str] = (
        ray_gpu.gpu_remote(session=session)(escape).remote(probe.packed(), target).result(timeout=300)
    )
    return outcomes


def outside(target: dict[str, Any]) -> dict[str, str]:
    """Make the attempts in a process of this test's, which inherits what is open here."""
    words = [sys.executable, "-m", "tests.sandbox.probe", json.dumps(target)]
    root = Path(probe.__file__).resolve().parents[2]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": str(root)}, cwd=root, stdout=subprocess.PIPE, close_fds=False,
        timeout=300, check=True,
    )  # fmt: skip
    outcomes: dict[str, str] = json.loads(done.stdout)["outcomes"]
    return outcomes


def target(attacked: Attacked, lease: ray_gpu.Session, other: ray_gpu.Session) -> dict[str, Any]:
    """Return what is around the one lease of a session: its node's custodian, its keeper, Ray, and another's lease."""
    (mine,), (others,) = lease.status()["leases"], other.status()["leases"]
    assert mine["node"] != others["node"]
    node, layout = mine["node"], attacked.layout
    vault = urlsplit(attacked.settings("gateway")["vault"])
    gcs = _address(attacked.document["address"])
    return {
        "custodian": attacked.custodian(node),
        "keeper": attacked.leases(node, "ray_gpu.keeper")[-1],
        "other_sandbox": attacked.leases(others["node"], "ray_gpu.sandbox.child")[-1],
        "custodian_socket": str(layout.custodian_dir(node) / raylet.CUSTODIAN_SOCKET),
        "gateway_socket": str(layout.gateway_socket(attacked.zone)),
        "relay_socket": str(layout.relay_dir(attacked.zone) / raylet.RELAY_SOCKET),
        "gcs": gcs,
        "cluster_name": f"ray-gpu-ports-{gcs[1]}",
        "vault": [vault.hostname, vault.port],
        **_ray(attacked.node_processes(node), attacked.settings(node)["endpoint_ports"]),
    }


def _ray(caged: list[int], endpoint_ports: str) -> dict[str, Any]:
    """Return the sockets of a node's raylet, as the host can reach them, and the endpoint of its lease."""
    pid, options = raylet_of(caged)
    return {
        "raylet_socket": f"/proc/{pid}/root{options['raylet_socket_name']}",
        "plasma_socket": f"/proc/{pid}/root{options['store_socket_name']}",
        "raylet": [options["node_ip_address"], int(options["node_manager_port"])],
        "endpoint": _listens(options["node_ip_address"], endpoint_ports),
    }


def _listens(address: str, ports: str) -> list[Any]:
    """Return where somebody accepts connections at *address*, at one of *ports*, ``lowest-highest``."""
    wanted = f"{struct.unpack('=I', socket.inet_aton(address))[0]:08X}"
    lowest, highest = map(int, ports.split("-"))
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        host, port = local.split(":")
        if state == "0A" and host == wanted and lowest <= int(port, 16) <= highest:
            return [address, int(port, 16)]
    raise LookupError(f"nobody listens at {address} on a port from {ports}")


def _address(text: str) -> list[Any]:
    host, _, port = text.rpartition(":")
    return [host, int(port)]
