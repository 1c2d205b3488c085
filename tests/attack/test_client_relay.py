"""A compromised client relay: what its cage reaches, where its forwarder connects, whom the head's port lets in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ray_gpu import services
from ray_gpu.client_relay import relay_profile
from ray_gpu.node_identity import RayFiles
from ray_gpu.ports import NodePorts
from ray_gpu.sandbox import boundary
from ray_gpu.state import Layout

TIMEOUT_S = 30.0
CAGE_UID = 61003
#: Ray Client's server starts one of its own for each relay in this range, on the head.
RAYS_OWN = range(23000, 24000)
LISTENING = "0A"
#: Ray Client's sign of life: the method, and a ClusterInfoRequest of type PING, as protobuf writes it.
METHOD, PING = "/ray.rpc.RayletDriver/ClusterInfo", b"\x08\x06"
#: Tries every address that it is given, and the forwarder; prints what came of it.
PROBE = """
import json, socket, sys
wanted = json.loads(sys.argv[1])
found = {"interfaces": [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]]}
for name, (family, kind, address) in wanted["targets"].items():
    try:
        with socket.socket(family, kind) as sock:
            sock.settimeout(3)
            sock.connect(tuple(address))
            if kind == socket.SOCK_DGRAM:
                sock.send(b"out")
        found[name] = "done"
    except OSError as error:
        found[name] = f"refused: {error}"
# Its own loopback works: the tunnel is there.
with socket.create_server(("127.0.0.1", 0)) as own:
    socket.create_connection(own.getsockname(), 3).close()
found["peers"] = []
for lie in wanted["lies"]:
    with socket.socket(socket.AF_UNIX) as ask:
        ask.settimeout(20)
        ask.connect(wanted["forwarder"])
        try:
            ask.send(lie.encode("latin-1"))
        except OSError:
            pass  # the forwarder has answered without listening, and hung up
        _, fds, _, _ = socket.recv_fds(ask, 1, 8)
        found["peers"] += [list(socket.socket(fileno=fd).getpeername()) for fd in fds]
print(json.dumps(found))
"""


class Listener:
    """Somebody of the zone's network, or the head: counts who connects."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._server.getsockname()
        self.connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._server.accept()[0].close()
                self.connections += 1

    def close(self) -> None:
        """Accept nobody any more."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(TIMEOUT_S)


@pytest.fixture
def head() -> Iterator[Listener]:
    """What the forwarder is for."""
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def zone_service() -> Iterator[Listener]:
    """Something else that a relay would like to reach."""
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def forwarder(head: Listener, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a forwarder to *head*, which a relay's cage is shown."""
    directory = tmp_path_factory.mktemp("f")
    for path in (directory, *list(directory.parents)[:2]):
        path.chmod(0o711)
    path = directory / "head.sock"
    host, port = head.address
    command = [sys.executable, "-m", "ray_gpu.forwarder", f"--socket={path}", f"--host={host}", f"--port={port}"]
    process = subprocess.Popen([*command, f"--relay-uid={CAGE_UID}"])
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not services.listens(path):
            assert time.monotonic() < deadline
        yield path
    finally:
        process.kill()
        process.wait()


def probe(tmp_path: Path, forwarder: Path, wanted: dict[str, Any], *, network: bool) -> dict[str, Any]:
    """Run the probe in the cage that a relay gets; with *network* on, the cage that it would be without the control."""
    files = RayFiles(directory=tmp_path)
    profile = relay_profile(
        "probe", uid=CAGE_UID if os.geteuid() == 0 else None, files=files, sockets=(forwarder.parent,)
    )
    process = boundary.launch(
        [sys.executable, "-P", "-c", PROBE, json.dumps({**wanted, "forwarder": str(forwarder)})],
        dataclasses.replace(profile, network=True) if network else profile,
        stdout=subprocess.PIPE,
    )
    try:
        out, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.end()
    found: dict[str, Any] = json.loads(out)
    return found


def targets(*listeners: Listener) -> dict[str, Any]:
    """Return every way of speaking to the listeners, and to a name server."""
    ways: dict[str, Any] = {"name server": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.53", 53))}
    for index, listener in enumerate(listeners):
        ways[f"tcp {index}"] = (socket.AF_INET, socket.SOCK_STREAM, listener.address)
        ways[f"udp {index}"] = (socket.AF_INET, socket.SOCK_DGRAM, ("10.255.255.254", listener.address[1]))
    return {"targets": {name: (int(f), int(k), list(a)) for name, (f, k, a) in ways.items()}, "lies": []}


@pytest.mark.skipif(boundary.survey().mode == "none", reason="bubblewrap does not work here: no cage has namespaces")
def test_cage_has_no_network(tmp_path: Path, forwarder: Path, head: Listener, zone_service: Listener) -> None:
    """From a relay's cage neither the zone's services nor the head answer; with the host's network they would."""
    inside = probe(tmp_path, forwarder, targets(head, zone_service), network=False)
    control = probe(tmp_path, forwarder, targets(head, zone_service), network=True)

    assert inside["interfaces"] == ["lo"]
    assert [name for name, said in inside.items() if said == "done" and name.startswith("tcp")] == []
    assert inside["udp 0"].startswith("refused")
    assert {control["tcp 0"], control["tcp 1"]} == {"done"}
    assert zone_service.connections == 1


@pytest.mark.skipif(boundary.survey().mode == "none", reason="bubblewrap does not work here: no cage has namespaces")
def test_forwarder_has_one_destination(tmp_path: Path, forwarder: Path, head: Listener, zone_service: Listener) -> None:
    """Whatever a relay says to its forwarder, each connection that it gets leads to the head."""
    host, port = zone_service.address
    lies = [
        f"CONNECT {host}:{port} HTTP/1.1\r\n\r\n",
        json.dumps({"host": host, "port": port}),
        f"{host}:{port}\n",
        "\x05\x01\x00\x01" + "".join(map(chr, socket.inet_aton(host) + port.to_bytes(2, "big"))),
        "x" * 4096,
    ]
    wanted = targets(zone_service) | {"lies": lies}

    inside = probe(tmp_path, forwarder, wanted, network=False)
    assert inside["peers"] == [list(head.address)] * len(lies)
    assert zone_service.connections == 0
    # Control: the same probe gets there where the cage is not what keeps it.
    assert probe(tmp_path, forwarder, wanted | {"lies": []}, network=True)["tcp 0"] == "done"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: asks as another uid")
def test_forwarder_serves_its_relay_alone(forwarder: Path) -> None:
    """Another uid of the zone's host gets no connection; the relay's does."""
    ask = (
        "import os, socket, sys; os.setuid(int(sys.argv[2])); s = socket.socket(socket.AF_UNIX); s.settimeout(20); "
        "s.connect(sys.argv[1]); print(len(socket.recv_fds(s, 1, 1)[1]))"
    )

    def asked_as(uid: int) -> str:
        command = [sys.executable, "-c", ask, str(forwarder), str(uid)]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout.strip()

    assert (asked_as(61980), asked_as(CAGE_UID)) == ("0", "1")


# -- a running cluster ---------------------------------------------------------------------------


@pytest.fixture
def credentials(client_cluster: Any) -> RayFiles:
    """The relay's own."""
    return RayFiles(directory=Layout(client_cluster.state).root / "ray" / f"zone-{client_cluster.zone}")


def client_port(cluster: Any) -> tuple[str, int]:
    """Return where the head's Ray Client server is."""
    host, _, gcs = cluster.document["address"].partition(":")
    return host, NodePorts.of(int(gcs), 0).client


def pinged(address: tuple[str, int], *, ca: Path, certificate: RayFiles | None, token: str | None) -> str:
    """Ask the head's Ray Client server for a sign of life; return ``"answers"``, or gRPC's status."""
    pair = (certificate.key.read_bytes(), certificate.certificate.read_bytes()) if certificate else (None, None)
    channel = grpc.secure_channel(f"{address[0]}:{address[1]}", grpc.ssl_channel_credentials(ca.read_bytes(), *pair))
    metadata = [("client_id", "stranger"), *([("authorization", f"Bearer {token}")] if token else [])]
    try:
        channel.unary_unary(METHOD)(PING, timeout=TIMEOUT_S, metadata=metadata)
    except grpc.RpcError as error:
        return str(error.code().name)
    finally:
        channel.close()
    return "answers"


def test_strangers_at_the_heads_port(client_cluster: Any, credentials: RayFiles) -> None:
    """Without a certificate of the cluster, or without its token, nobody is served; the relay with both is."""
    address, token = client_port(client_cluster), credentials.token.read_text(encoding="ascii")

    assert pinged(address, ca=credentials.ca, certificate=None, token=token) == "UNAVAILABLE"
    assert pinged(address, ca=credentials.ca, certificate=credentials, token=None) == "UNAUTHENTICATED"
    assert pinged(address, ca=credentials.ca, certificate=credentials, token="0" * len(token)) == "UNAUTHENTICATED"
    assert pinged(address, ca=credentials.ca, certificate=credentials, token=token) == "answers"


def test_relay_as_it_runs(client_cluster: Any) -> None:
    """The relay that runs has no interface but its loopback, and every connection of it stays there."""
    (relay,) = _running(client_cluster.document["pid"], "ray_gpu.relay")
    assert os.readlink(f"/proc/{relay}/ns/net") != os.readlink("/proc/self/ns/net")
    interfaces = Path(f"/proc/{relay}/net/dev").read_text(encoding="ascii").splitlines()[2:]
    remote = {row[2].partition(":")[0] for row in _sockets(relay)}

    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    # 127.0.0.1, also as IPv6 writes it, and nobody for what listens. The host's own table, as control, has more.
    assert remote <= {"0100007F", f"{'0' * 16}FFFF00000100007F", "0" * 8, "0" * 32}
    assert {row[2].partition(":")[0] for row in _sockets("self")} - remote


def test_ports_of_the_nodes(client_cluster: Any) -> None:
    """With Ray Client on, the head opens its one port, and nothing listens that is not declared."""
    gcs = int(client_cluster.document["address"].rpartition(":")[2])
    inodes = {row[9]: int(row[1].rpartition(":")[2], 16) for row in _sockets("self") if row[3] == LISTENING}
    for index, name in enumerate(("gpu-1", "gpu-2")):
        ports = NodePorts.of(gcs, index)
        opened = {
            inodes[inode]
            for pid in _below(client_cluster.document["nodes"][name])
            for inode in _held(pid) & set(inodes)
        }
        workers = range(ports.first + 10, ports.first + 200)
        extra = {ports.gcs, ports.client} if index == 0 else set()

        assert {*extra, ports.first, ports.first + 1, ports.first + 2} <= opened
        left = opened - extra - set(range(ports.first, ports.first + 6)) - set(workers)
        assert {port for port in left if port not in RAYS_OWN} == set(), name
        assert bool(left) is (index == 0)


def _sockets(pid: int | str) -> list[list[str]]:
    """Return the rows of the TCP tables of a process's network."""
    rows = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            rows += [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text("ascii").splitlines()[1:]]
    return rows


def _held(pid: int) -> set[str]:
    """Return the inodes of the sockets that a process holds."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(path)):
                found.add(match[1])
    return found


def _below(pid: int) -> set[int]:
    found = {pid}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text("ascii").split():
                found |= _below(int(child))
    return found


def _running(root: int, module: str) -> list[int]:
    found = []
    for pid in _below(root):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            if Path(words[0]).name.startswith("python") and module in words:
                found.append(pid)
    return found
