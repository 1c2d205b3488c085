"""The embedded Ray cluster, its relay and its actors, for real: three raylets and no GPU.

The custodians and the gateway are this file's: tiny servers of our own protocol that record what they get.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_gpu.nodes import Cluster, free_base_port
from ray_gpu.raylet import NodeSpec
from ray_gpu.wire import recv_message, send_message, unix_listen
from zones.errors import ClusterError

TIMEOUT_S = 60.0
#: Rogue work: a plain driver that has a file read by a plain task on a node of its choice.
ROGUE = """
import sys, ray
address, own_address, node, path = sys.argv[1:]
ray.init(address=address, _node_ip_address=own_address, log_to_driver=False)
@ray.remote(num_cpus=0, label_selector={"ray-gpu-node": node})
def read(path):
    try:
        return open(path).read(20)
    except OSError as error:
        return type(error).__name__
print("answer:", ray.get(read.remote(path), timeout=45))
"""
#: Rogue work that prints what it reads, and writes it to a file of its own beside.
PRINTING = """
import sys, ray
address, own_address, node, mark = sys.argv[1:]
ray.init(address=address, _node_ip_address=own_address, log_to_driver=False)
@ray.remote(num_cpus=0, label_selector={"ray-gpu-node": node})
def show(mark):
    print(mark, flush=True)
    with open("/s/ray/planted", "w") as file:
        file.write(mark)
    return "shown"
print("answer:", ray.get(show.remote(mark), timeout=45))
"""
#: Where the custodians here say that they listen.
ENDPOINT = ["192.0.2.11", 26120]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="enters a cage, which needs root")


class FakeCustodian:
    """Answers offers and grants."""

    def __init__(self, directory: Path) -> None:
        self.requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self.actors: list[socket.socket] = []
        self.gone: queue.Queue[str] = queue.Queue()
        self.refuse = False
        self._listener = unix_listen(str(directory / "custodian.sock"), mode=0o666)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                actor, _ = self._listener.accept()
                self.actors.append(actor)
                threading.Thread(target=self._serve, args=(actor,), daemon=True).start()

    def _serve(self, actor: socket.socket) -> None:
        lease = ""
        with contextlib.suppress(OSError):
            while True:
                request, _ = recv_message(actor)
                lease = request["lease"]
                self.requests.put(request)
                send_message(actor, self._reply(request))
        self.gone.put(lease)

    def _reply(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.refuse:
            return {"ok": False, "error": {"error": "GrantRefusedError", "message": "no", "fields": {}}}
        endpoint = {"endpoint": ENDPOINT} if request["op"] == "grant" else {}
        return {"ok": True, "echo": request["op"], **endpoint}

    def close(self) -> None:
        """Stop listening and hang up on every actor."""
        self._listener.close()
        for actor in self.actors:
            actor.close()


class FakeGateway:
    """The other end of the relay's socket."""

    def __init__(self, directory: Path) -> None:
        self._listener = unix_listen(str(directory / "relay.sock"), mode=0o666)
        self._listener.settimeout(TIMEOUT_S)
        self._ids = itertools.count(1)
        self.relay: socket.socket | None = None

    def accept(self) -> None:
        """Wait until the relay is there and ready."""
        self.relay, _ = self._listener.accept()
        self.relay.settimeout(TIMEOUT_S)
        assert recv_message(self.relay)[0] == {"event": "ready"}

    def send(self, op: str, **fields: Any) -> int:
        """Send a request and return its id."""
        assert self.relay is not None
        number = next(self._ids)
        send_message(self.relay, {"op": op, "id": number, **fields})
        return number

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and return its reply; events in between are dropped."""
        number = self.send(op, **fields)
        return next(message for message in self.messages() if message.get("id") == number)

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield messages as they come."""
        assert self.relay is not None
        while True:
            yield recv_message(self.relay)[0]

    def close(self) -> None:
        """Stop listening and hang up on the relay."""
        self._listener.close()
        if self.relay is not None:
            self.relay.close()


class World:
    """A running cluster with what stands around it."""

    def __init__(self, directory: Path, subnet: int) -> None:
        self.directory = directory
        sockets = {name: directory / name for name in ("gpu-1", "gpu-2", "zone")}
        for path in sockets.values():
            path.mkdir(mode=0o755)
        self.custodians = {name: FakeCustodian(sockets[name]) for name in ("gpu-1", "gpu-2")}
        self.gateway = FakeGateway(sockets["zone"])
        pool = {"ray-gpu-pool": "shared"}
        gpu = [
            NodeSpec(
                name=name, address=f"127.0.{subnet}.{i}", role="gpu", num_gpus=1, labels=pool, socket_dir=sockets[name]
            )
            for i, name in enumerate(self.custodians, 1)
        ]
        zone = NodeSpec(
            name="zone",
            address=f"127.0.{subnet}.3",
            role="zone",
            zone="clinic",
            labels={},
            socket_dir=sockets["zone"],
        )
        self.cluster = Cluster.start(directory / "state", [*gpu, zone], base_port=free_base_port())
        self.gateway.accept()

    def place(self, lease: str, gpus: float = 0.5, **fields: Any) -> dict[str, Any]:
        """Place one lease in the shared pool."""
        return self.gateway.ask("place", lease=lease, pool="shared", gpus=gpus, **{"timeout_s": 30.0, **fields})

    def close(self) -> None:
        """Stop everything."""
        self.cluster.stop()
        self.gateway.close()
        for custodian in self.custodians.values():
            custodian.close()


@contextlib.contextmanager
def running(subnet: int) -> Iterator[World]:
    """Run a cluster on 127.0.*subnet*.x."""
    # Short, and open to the cages' uids: pytest's own directories are neither.
    directory = Path(tempfile.mkdtemp(prefix="rgn-"))
    directory.chmod(0o755)
    world = None
    try:
        world = World(directory, subnet)
        yield world
    finally:
        if world is not None:
            world.close()
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One cluster for all tests that leave it whole."""
    with running(subnet=41) as world:
        yield world


@pytest.fixture(autouse=True)
def _released(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts with all GPUs free."""
    yield
    if "world" in request.fixturenames:
        shared: World = request.getfixturevalue("world")
        for lease in ("a", "b", "c"):
            shared.gateway.ask("release", lease=lease)
        for custodian in shared.custodians.values():
            custodian.requests.queue.clear()
            custodian.refuse = False


def peer_pid(sock: socket.socket) -> int:
    """Process at the other end of a Unix socket, as this process numbers it."""
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def ends(pid: int) -> bool:
    """Whether a process ends within the time limit."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], TIMEOUT_S)[0])
    finally:
        os.close(pidfd)


def runs(pid: int) -> bool:
    """Whether a process exists and is not merely waiting for its parent to collect its exit status."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def descendants(root: int) -> set[int]:
    """Every process below *root*, itself included."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def test_labels(world: World) -> None:
    """Ray knows three nodes by name, with their labels and GPUs, all of them free."""
    deadline = time.monotonic() + TIMEOUT_S
    nodes: dict[str, Any] = {}
    # A raylet is in Ray's books a moment after its agents serve, and its resources a moment later.
    while sum(node["gpus_free"] for node in nodes.values()) < 2:
        assert time.monotonic() < deadline, nodes
        nodes = {node["name"]: node for node in world.gateway.ask("nodes")["nodes"]}

    assert set(nodes) == {"gpu-1", "gpu-2", "zone"}
    assert all(node["alive"] for node in nodes.values())
    assert nodes["gpu-1"]["labels"].items() >= {"ray-gpu-pool": "shared", "ray-gpu-node": "gpu-1"}.items()
    assert nodes["zone"]["labels"].items() >= {"ray-gpu-zone": "clinic", "ray-gpu-node": "zone"}.items()
    assert [nodes[name]["gpus_free"] for name in ("gpu-1", "gpu-2", "zone")] == [1.0, 1.0, 0.0]


def test_ping(world: World) -> None:
    """The relay answers with the request's id."""
    assert world.gateway.ask("ping")["ok"] is True


def test_grant(world: World) -> None:
    """Offer and grant reach the custodian as they are, and the gateway hears where the custodian listens for data."""
    placed = world.place("a")
    granted = world.gateway.ask("grant", lease="a", grant={"terms": 1}, wrapped="w")
    custodian = world.custodians[placed["node"]]

    assert placed["echo"] == "offer"
    assert custodian.requests.get(timeout=TIMEOUT_S) == {"op": "offer", "lease": "a"}
    assert custodian.requests.get(timeout=TIMEOUT_S) == {
        "op": "grant",
        "lease": "a",
        "grant": {"terms": 1},
        "wrapped": "w",
    }
    assert granted["endpoint"] == ENDPOINT


def test_spread(world: World) -> None:
    """Two leases that fit anywhere get a node each."""
    assert {world.place("a")["node"], world.place("b")["node"]} == {"gpu-1", "gpu-2"}


def test_selected(world: World) -> None:
    """Labels choose the node, which is how a lost lease's successor avoids its node."""
    assert world.place("a", labels={"ray-gpu-node": "gpu-2"})["node"] == "gpu-2"
    assert world.place("b", labels={"ray-gpu-node": "!in(gpu-2)"})["node"] == "gpu-1"


def test_no_room(world: World) -> None:
    """A lease that fits nowhere is given up in time, with what each node has free, and asks for nothing any more."""
    assert world.place("a", gpus=1)["ok"]
    assert world.place("b", gpus=1)["ok"]

    refused = world.place("c", gpus=1, timeout_s=1.0)

    assert refused["error"]["error"] == "PlacementError"
    assert "gpu-1 has 0 of 1 free" in refused["error"]["fields"]["reason"]
    world.gateway.ask("release", lease="a")
    assert world.place("a", gpus=1)["ok"]


def test_no_such_pool(world: World) -> None:
    """A pool without a node says so."""
    refused = world.gateway.ask("place", lease="a", pool="other", gpus=0.5, timeout_s=1.0)

    assert "no node of this pool is up" in refused["error"]["message"]


def test_waits_for_room(world: World) -> None:
    """A lease that must wait is placed when another ends; requests are answered meanwhile."""
    assert world.place("a", gpus=1)["ok"]
    assert world.place("b", gpus=1)["ok"]

    waiting = world.gateway.send("place", lease="c", pool="shared", gpus=1, timeout_s=TIMEOUT_S)
    assert world.gateway.ask("ping")["ok"]
    world.gateway.send("release", lease="a")

    assert next(m for m in world.gateway.messages() if m.get("id") == waiting)["ok"] is True


@pytest.mark.parametrize(
    "request_fields",
    [{"op": "sing"}, {"op": "place", "lease": "a.b", "pool": "shared", "gpus": 1}, {"op": "place", "lease": "a"}],
    ids=["unknown", "bad id", "incomplete"],
)
def test_bad_request(world: World, request_fields: dict[str, Any]) -> None:
    """A request that makes no sense gets an error for an answer, and the relay lives on."""
    assert world.gateway.ask(**request_fields)["ok"] is False
    assert world.gateway.ask("ping")["ok"] is True


def test_custodian_refuses(world: World) -> None:
    """A custodian's refusal comes through unchanged, and takes no room."""
    for custodian in world.custodians.values():
        custodian.refuse = True

    refused = world.place("a", gpus=1)

    assert refused["error"] == {"error": "GrantRefusedError", "message": "no", "fields": {}}
    assert world.gateway.ask("grant", lease="a")["error"]["error"] == "LeaseLostError"


def test_release(world: World) -> None:
    """The end of a lease reaches the custodian as the end of the actor's connection."""
    node = world.place("a")["node"]

    world.gateway.ask("release", lease="a")

    assert world.custodians[node].gone.get(timeout=TIMEOUT_S) == "a"


def test_killed_actor(world: World) -> None:
    """An actor that is killed is reported as lost, by lease."""
    node = world.place("a")["node"]

    os.kill(peer_pid(world.custodians[node].actors[-1]), signal.SIGKILL)

    lost = next(message for message in world.gateway.messages() if message.get("event") == "lost")
    assert lost["lease"] == "a"
    assert "Died" in lost["reason"] or "died" in lost["reason"]


def test_lost_custodian(world: World) -> None:
    """A custodian that hangs up ends the lease, and the reason says so."""
    node = world.place("a")["node"]

    world.custodians[node].actors[-1].shutdown(socket.SHUT_RDWR)

    lost = next(message for message in world.gateway.messages() if message.get("event") == "lost")
    assert lost == {"event": "lost", "lease": "a", "reason": "the custodian closed the connection"}


@needs_root
@pytest.mark.parametrize("node", ["zone", "gpu-1"])
def test_rogue_task(world: World, node: str) -> None:
    """A task that lands on a node cannot read the zone's data; the node's uid could, were it not for the cage."""
    if "uncaged-ray" in world.cluster.degradations:
        pytest.skip(f"no cage here: {world.cluster.degradations}")
    secret = world.directory / "visits.csv"
    secret.write_text("person,visits\n")
    secret.chmod(0o644)
    readable = str(Path(sys.modules["ray_gpu.nodes"].__file__ or "").with_name("py.typed"))
    uid = 61001 + [n.spec.name for n in world.cluster.nodes].index(node)

    as_node = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "cat", str(secret)]
    assert subprocess.run(as_node, capture_output=True, text=True, check=True).stdout == "person,visits\n"
    assert rogue_read(world, node, readable) == ""
    assert rogue_read(world, node, str(secret)) == "FileNotFoundError"


def rogue_read(world: World, node: str, path: str) -> str:
    """Have a plain task on *node* read a file, and return what it read, or the error's name."""
    return rogue(world, ROGUE, node, path)


@needs_root
def test_prints_are_in_no_file(world: World) -> None:
    """What a worker prints is in no file that Ray writes; what it writes to a file itself is found there."""
    if "uncaged-ray" in world.cluster.degradations:
        pytest.skip(f"no cage here: {world.cluster.degradations}")
    mark = f"printed-{secrets.token_hex(12)}"
    assert rogue(world, PRINTING, "gpu-1", mark) == "shown"
    inside = max(descendants(next(n for n in world.cluster.nodes if n.spec.name == "gpu-1").process.pid))

    session = Path(f"/proc/{inside}/root/s")
    found = [path for path in session.rglob("*") if path.is_file() and mark.encode() in path.read_bytes()]

    assert session / "ray/planted" in found
    assert [path.name for path in found if path.name != "planted"] == []


def rogue(world: World, code: str, *arguments: str) -> str:
    """Run a plain driver beside the relay, in its cage and with its environment; return its answer."""
    assert world.gateway.relay is not None
    relay = peer_pid(world.gateway.relay)
    environment = dict(
        line.split("=", 1) for line in Path(f"/proc/{relay}/environ").read_text().split("\0") if "=" in line
    )
    zone = world.cluster.nodes[-1]
    inside = ["nsenter", f"--target={relay}", "--mount", "--pid", "--ipc", "--"]
    inside += ["setpriv", "--reuid=61003", "--regid=61003", "--clear-groups"]
    command = [*inside, sys.executable, "-c", code, world.cluster.address, zone.spec.address, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    answers = [line.removeprefix("answer:").strip() for line in done.stdout.splitlines() if line.startswith("answer:")]
    assert answers, done.stderr
    return answers[0]


@pytest.mark.chaos
def test_end() -> None:
    """Without its relay a cluster loses its actors and the zone's node; stopping it leaves no process."""
    with running(subnet=42) as world:
        node = world.place("a")["node"]
        processes = set().union(*(descendants(node.process.pid) for node in world.cluster.nodes))
        assert world.gateway.relay is not None
        assert {peer_pid(world.gateway.relay), peer_pid(world.custodians[node].actors[-1])} <= processes
        assert world.cluster.alive()

        os.kill(peer_pid(world.gateway.relay), signal.SIGKILL)

        assert world.custodians[node].gone.get(timeout=TIMEOUT_S) == "a"
        assert ends(world.cluster.nodes[-1].process.pid)
        assert not world.cluster.alive()
        world.cluster.stop()
        assert {pid for pid in processes if runs(pid)} == set()


def test_relay_follows_gateway() -> None:
    """A gateway that closes takes its relay, and with it its leases' actors, along."""
    with running(subnet=43) as world:
        node = world.place("a")["node"]
        assert world.gateway.relay is not None
        relay = peer_pid(world.gateway.relay)

        world.gateway.relay.close()

        assert ends(relay)
        assert world.custodians[node].gone.get(timeout=TIMEOUT_S) == "a"


def test_port_taken(tmp_path: Path) -> None:
    """A taken port is one clear error, before anything starts."""
    base_port = free_base_port()
    with socket.create_server(("127.0.44.1", base_port)):
        spec = NodeSpec(name="gpu-1", address="127.0.44.1", role="gpu", labels={}, socket_dir=tmp_path)
        with pytest.raises(ClusterError, match=str(base_port)):
            Cluster.start(tmp_path / "state", [spec], base_port=base_port)
