"""Several hosts: no canary is on a GPU host's disk, or on the wire at either end, however the calls ended.

The GPU hosts' roots are disks in files, which are searched raw when the hosts have ended. All that zone and GPU hosts
send and receive is captured from before the zone joins. On each disk and wire lies a canary of the test's own.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ray_gpu.ports import GATEWAY_UID, PORTS
from testbed import Host, Testbed, disk, lacking
from testbed.bed import HOSTS
from testbed.capture import Capture
from testbed.cluster import STATE, BedCluster
from testbed.host import HOME, HostProcess
from tests.attack.canary_call import ENDINGS, LEAVING
from tests.proofs import visits
from tests.proofs.attacked import all_powerful, below, command
from tests.proofs.canary import canaries, new_mark
from tests.proofs.memory_search import Search, search

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]

GPU_HOSTS = ("gpu-1", "gpu-2")
ZONE_HOST = "zone-clinic"
DISK_BYTES = 4 << 30
PATIENCE_S = 150.0
CATALOG = "/etc/ray-gpu/policies/clinic/catalog.yaml"
NOTEBOOK = "from tests.attack.canary_call import main\nmain(attach)\n"
WRITE_DATA = """
import sys
from pathlib import Path
from tests.proofs import visits
visits.write(Path(sys.argv[1]), sys.stdin.readline().strip())
"""
#: Writes a canary to a file, and removes it when it is on the disk.
PLANT = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(sys.stdin.read())
    file.flush()
    os.fsync(file.fileno())
os.unlink(sys.argv[1])
"""
#: Where on a GPU host's disk that is, and the channel whose canary it is.
PLANTED = {"/var/lib/ray-gpu/planted": "session", "/tmp/planted": "tmp", f"{HOME}/planted": "opened"}
#: Takes one connection and answers; and who connects. Both send in two packets, with no whole canary in either.
SERVE = """
import socket, sys
answer = sys.stdin.readline().strip().encode()
with socket.create_server((sys.argv[1], int(sys.argv[2]))) as listener:
    print("listening", flush=True)
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(answer[:6])
        connection.sendall(answer[6:])
        while connection.recv(4096):
            pass
"""
CONNECT = """
import socket, sys
said = sys.stdin.readline().strip().encode()
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(said[:6])
    connection.sendall(said[6:])
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(4096):
        pass
"""


#: A host's own file systems in memory, and a channel whose canary is put there.
IN_MEMORY = {"/dev/shm": "value", "/run": "print"}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is left when the hosts have ended."""

    #: Of the calls, and of what was planted.
    mark: str
    control: str
    #: What became of each call.
    became: dict[str, str]
    disks: dict[str, Path]
    captures: dict[str, Capture] = field(default_factory=dict)
    #: What was found, by GPU host, in its own file systems in memory.
    memory: dict[str, Search] = field(default_factory=dict)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, head_packages: Path | None) -> Iterator[World]:
    """Run the cluster, end a call in each way, and end the cluster."""
    reason = lacking() or disk.lacking()
    if reason or not all_powerful():
        pytest.skip(reason or "needs root with all capabilities: reads the memory of other uids' processes")
    directory = tmp_path_factory.mktemp("canaries")
    disks = {name: directory / f"{name}.ext4" for name in GPU_HOSTS}
    for image in disks.values():
        disk.make(image, DISK_BYTES)
    world = World(mark=new_mark(), control=new_mark(), became={}, disks=disks)
    with ExitStack() as stack:
        bed = stack.enter_context(Testbed(HOSTS, disks=disks))
        cluster = stack.enter_context(BedCluster(bed, head_packages=head_packages))
        for name in (ZONE_HOST, *GPU_HOSTS):
            capture = Capture(cluster.bed[name].pid, directory / f"{name}.packets")
            world.captures[name] = stack.enter_context(capture)
        cluster.up()
        write_data(cluster.bed[ZONE_HOST], world.mark)
        cluster.join("clinic")
        plant(cluster, world.control)
        for how in ENDINGS:
            world.became[how] = end_call(cluster, world.mark, how)
        for name in GPU_HOSTS:
            world.memory[name] = in_memory(cluster.bed[name], world)
        for capture in world.captures.values():
            capture.end()
    for image in disks.values():
        disk.await_released(image)
    yield world
    for path in directory.iterdir():
        path.unlink()


def in_memory(host: Host, world: World) -> Search:
    """Search a host's own file systems in memory, which are not on its disk; in each lies a canary of the control."""
    for place, channel in IN_MEMORY.items():
        host.write(f"{place}/planted", f"{world.control}-{channel}")
    trees = [Path(f"/proc/{host.pid}/root{place}") for place in IN_MEMORY]
    return search((world.mark, world.control), (), since=0, trees=trees)


def write_data(host: Host, mark: str) -> None:
    """Give the zone its data set with a canary in every kind of column."""
    line, more = visits.catalog(mark)
    catalog = host.read(CATALOG)
    assert line in catalog
    host.write(CATALOG, catalog.replace(line, more))
    host.run(["python", "-c", WRITE_DATA, f"{STATE}/zones/clinic/data/visits.arrow"], text=f"{mark}\n")


def plant(cluster: BedCluster, mark: str) -> None:
    """Write a canary to each GPU host's disk, and send one each way between the zone and each."""
    port = PORTS.endpoints.partition("-")[2]
    for name in GPU_HOSTS:
        host = cluster.bed[name]
        for path, channel in PLANTED.items():
            host.run(["python", "-c", PLANT, path], text=canaries_of_places(mark)[channel])
        pipe = -1
        with host.popen(["python", "-c", SERVE, host.address, port], stdin=pipe, stdout=pipe) as server:
            assert server.stdin
            assert server.stdout
            server.stdin.write(canaries(mark)["result"] + "\n")
            server.stdin.flush()
            assert server.stdout.readline() == "listening\n"
            sender = ["python", "-c", CONNECT, host.address, port]
            cluster.bed[ZONE_HOST].run(sender, uid=GATEWAY_UID, text=canaries(mark)["value"] + "\n")


def canaries_of_places(mark: str) -> dict[str, str]:
    """Return what is planted, by its word."""
    return {word: f"{mark}-{word}" for word in PLANTED.values()}


# -- one call ----------------------------------------------------------------------------------------


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition, asking often."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        select.select([], [], [], 0.02)


def end_call(cluster: BedCluster, mark: str, how: str) -> str:
    """Make a call, end it, and return what became of it."""
    notebook = cluster.begin_call("clinic", NOTEBOOK)
    try:
        assert notebook.stdin
        notebook.stdin.write(f"{how}\n{mark}\n")
        notebook.stdin.flush()
        assert says(notebook, "calling"), notebook.stderr and notebook.stderr.read()
        name, sandbox = in_flight(cluster, mark)
        lease = running(cluster.bed[name], "ray_gpu.sandbox.child", "ray_gpu.keeper")
        end(cluster.bed[name], notebook, sandbox, how)
        became = says(notebook, ENDINGS[how]) if ENDINGS[how] else ""
        if how not in ("returns", "raises"):
            until(lambda: not any(map(lives, lease)), "the end of keeper and sandbox")
    finally:
        notebook.kill()
        notebook.communicate()
    until(lambda: not leases(cluster), "the end of all leases")
    return became


def says(notebook: HostProcess, word: str) -> str:
    """Read what a notebook says up to a line with that word, and return it; ``""`` when it does not come in time."""
    assert notebook.stdout
    patience = threading.Timer(PATIENCE_S, notebook.kill)
    patience.start()
    try:
        return next((line.strip() for line in notebook.stdout if line.strip() == word), "")
    finally:
        patience.cancel()


def in_flight(cluster: BedCluster, mark: str) -> tuple[str, int]:
    """Wait until a sandbox holds all canaries; return its host and process."""
    found: list[tuple[str, int]] = []

    def one_has() -> bool:
        for name in GPU_HOSTS:
            for sandbox in running(cluster.bed[name], "ray_gpu.sandbox.child")[-1:]:
                if search(mark, [sandbox], since=time.time()).channels() == LEAVING:
                    found.append((name, sandbox))
        return bool(found)

    until(one_has, "the call to be in flight")
    return found[0]


def end(host: Host, notebook: HostProcess, sandbox: int, how: str) -> None:
    """End a call in one of the ways."""
    words = {"actor": "ray::GpuActor", "raylet": "raylet/raylet", "keeper": "ray_gpu.keeper"}
    if how.startswith("kill"):
        part = how.removeprefix("kill ")
        victim = sandbox if part == "sandbox" else running(host, words.get(part, "ray_gpu.custodian"))[-1]
        os.kill(victim, signal.SIGKILL)
    elif how == "cancel":
        notebook.send_signal(signal.SIGINT)
    elif how != "timeout":
        os.kill(sandbox, signal.SIGUSR1)


def running(host: Host, *words: str) -> list[int]:
    """Return a host's processes with one of the words in their command line, innermost last."""
    return [pid for pid in below(host.pid) if any(word in " ".join(command(pid)) for word in words)]


def leases(cluster: BedCluster) -> list[int]:
    """Return the keepers and sandboxes of all hosts."""
    return [pid for name in GPU_HOSTS for pid in running(cluster.bed[name], "ray_gpu.sandbox.child", "ray_gpu.keeper")]


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not collected has no command line any more."""
    return any(command(pid))


# -- what is left ------------------------------------------------------------------------------------


def test_calls_ended(world: World) -> None:
    """Each call was in flight with every canary in its sandbox, and ended as it should."""
    assert world.became == ENDINGS


@pytest.mark.parametrize("name", GPU_HOSTS)
def test_disk(world: World, name: str) -> None:
    """No block of a GPU host's disk has a canary of the calls; each file that was removed from it has its own."""
    found = Search(texts=(world.mark, world.control), since=0)
    found.file(world.disks[name])

    assert found.of(world.mark) == []
    assert found.channels(world.control) == set(PLANTED.values())
    assert found.searched_bytes > 1 << 20


@pytest.mark.parametrize("name", GPU_HOSTS)
def test_memory_file_systems(world: World, name: str) -> None:
    """Nor has a GPU host's own /dev/shm or /run, after the calls; what was put there is found."""
    found = world.memory[name]

    assert found.of(world.mark) == []
    assert found.channels(world.control) >= set(IN_MEMORY.values())


@pytest.mark.parametrize("name", [ZONE_HOST, *GPU_HOSTS])
def test_wire(world: World, name: str) -> None:
    """No packet, and no stream put together from them, has a canary of the calls; both ways, those sent plainly do."""
    capture = world.captures[name]
    found = Search(texts=(world.mark, world.control), since=0)
    for packet in capture.packets():
        found.data(packet, "packet")
    in_packets = found.channels(world.control)
    streams = capture.streams()
    for flow, data in streams.items():
        found.data(data, flow)

    assert capture.dropped == 0
    assert found.of(world.mark) == []
    assert in_packets == set(), "the control was to lie across two packets"
    assert found.channels(world.control) == {"value", "result"}


def test_calls_were_on_the_wire(world: World) -> None:
    """The calls' data went over the captured wires: what the zone sent to endpoints, a GPU host received."""
    low, _, high = PORTS.endpoints.partition("-")

    def carried(name: str) -> int:
        ends = [(flow.split(), data) for flow, data in world.captures[name].streams().items()]
        return sum(len(data) for flow, data in ends if int(low) <= int(flow[3]) <= int(high))

    assert carried(ZONE_HOST) > len(ENDINGS) * visits.ROWS * 8
    assert sum(map(carried, GPU_HOSTS)) > len(ENDINGS) * visits.ROWS * 8
