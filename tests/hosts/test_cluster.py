"""A cluster of several hosts: `ray up` brings up the pool, zones join by themselves, and calls start from them.

One bed for the file, in the order of a cluster's life: nothing runs, `ray up`, zones join, `ray down`, `ray up` again.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_gpu.cage_net import HOST_END
from ray_gpu.ports import FORWARDER_UID, GATEWAY_UID, PORTS, TABLE, VAULT
from testbed import Host, Testbed
from testbed.cluster import (
    CLUSTER_FILE,
    DECLARATION,
    GATEWAY_CREDENTIALS,
    GATEWAY_FILE,
    NODE_CREDENTIALS,
    NODE_FILE,
    PERSON_UID,
    STATE,
    VAULT_CA,
    BedCluster,
)
from testbed.host import HOME
from testbed.ssh import LAUNCHER_KEY
from tests.attack.rogue_job import ENTER
from tests.hosts.vault_like import stand_in
from zones.keys import loopback_tls

CAGE_UID = 61001
#: Protocol, address, port.
Target = tuple[str, str, int]
PROBER = Path(__file__).with_name("prober.py")
#: Ports that every host serves by TCP and UDP: names, the web, what is next to Ray's, data.
SERVICES = [53, 8080, 26013, PORTS.first + 199]
#: Serves an abstract Unix socket until its standard input ends.
ABSTRACT = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind("\\0ray-gpu-test")
server.listen(8)
sys.stdin.readline()
print("ready", flush=True)
sys.stdin.read()
"""
FOREIGN_CA = f"{HOME}/foreign.pem"
TIMEOUT_S = 60.0
POOL = ("head", "gpu-1", "gpu-2")
SURVEY = Path(__file__).with_name("survey.py")
#: What belongs to no cluster: the bed's own, and what this file and the autoscaler look with.
FOREIGN = ("testbed/init.py", "sshd", "survey.py")
#: Changes a secret in a file of credentials.
FORGE = """sed -i 's/"secret_id": "....../"secret_id": "000000/'"""
FIT = """
from ray_gpu.examples import RANDHIE_COLUMNS, least_squares, solve, statistics
with attach() as zone:
    data = zone.read("randhie", columns=RANDHIE_COLUMNS)
    fit = statistics.options(concurrency=2, shard_bytes=1 << 16).map_reduce(data, solve)
    exact = bool(np.allclose(fit, least_squares(data.to_arrow()), rtol=1e-9, atol=1e-12))
    print(json.dumps({"exact": exact, "leases": zone.status()["leases"], "nodes": zone.status()["nodes"]}))
"""
MACRODATA = """
@ray_gpu.gpu_remote(columns=["realgdp"])
def total(batch):
    return float(batch["realgdp"].sum())
with attach() as zone:
    print(json.dumps(total.map_reduce(zone.read("macrodata", columns=["realgdp"]), sum) > 0))
"""
#: Listens on a port of the kernel's choice, and says which.
_LISTEN = """
import socket, sys
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""
#: Calls, and fits in small shards meanwhile, until its standard input ends; says each hundred calls.
STREAM = """
import threading
from concurrent.futures import ThreadPoolExecutor
from ray_gpu.examples import RANDHIE_COLUMNS, least_squares, solve, statistics
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
@ray_gpu.gpu_remote
def double(x):
    return x * 2
def fit(zone):
    exact, data = [], zone.read("randhie", columns=RANDHIE_COLUMNS)
    wanted = least_squares(data.to_arrow())
    while not ended.is_set():
        found = statistics.options(session=zone, concurrency=2, shard_bytes=1 << 16).map_reduce(data, solve)
        exact.append(bool(np.allclose(found, wanted, rtol=1e-9, atol=1e-12)))
    return exact
with ThreadPoolExecutor(1) as background, attach() as zone:
    count, nodes, fits = 0, set(), background.submit(fit, zone)
    while not ended.is_set():
        assert double.remote(np.arange(4.0)).result().tolist() == [0, 2, 4, 6]
        count += 1
        if count % 100 == 1:
            nodes |= {lease["node"] for lease in zone.status()["leases"]}
            print(json.dumps({"count": count, "nodes": sorted(nodes)}), flush=True)
    print(json.dumps({"count": count, "nodes": sorted(nodes), "exact": fits.result()}), flush=True)
"""


@pytest.fixture(scope="module")
def cluster(can_build: None, head_packages: Path | None) -> Iterator[BedCluster]:
    """A bed with Vault set up and hosts equipped, the head with ray[default]; nothing of Ray runs."""
    with Testbed() as bed, BedCluster(bed, head_packages=head_packages) as equipped:
        yield equipped


@pytest.fixture(scope="module")
def pool(cluster: BedCluster) -> BedCluster:
    """The same with head and GPU hosts up, by `ray up`."""
    started = time.monotonic()
    said = cluster.up()
    # Shown by pytest -s. No assertion: it is the machine's to say how long it takes.
    print(f"ray up: every host ready after {time.monotonic() - started:.0f} s")  # noqa: T201 - see above
    assert "NOT joined" not in said
    return cluster


@pytest.fixture(scope="module")
def zones(pool: BedCluster) -> BedCluster:
    """The same with both zones joined."""
    with ThreadPoolExecutor(2) as both:
        list(both.map(pool.join, ("clinic", "trading")))
    return pool


def survey(host: Host) -> list[dict[str, Any]]:
    """Return every process of a host that is not the bed's own."""
    found: list[dict[str, Any]] = json.loads(host.run(["python", SURVEY]).stdout)
    return [process for process in found if not any(word in process["command"] for word in FOREIGN)]


def ours(host: Host) -> list[str]:
    """Return the commands of everything of this project, or of Ray, that runs on a host, but for commands under way."""
    words = ("ray_gpu.", "/ray/", "ray::", "bwrap")
    return [p["command"] for p in survey(host) if any(word in p["command"] for word in words)]


def await_nothing(cluster: BedCluster, *names: str) -> None:
    """Wait until nothing of ours runs on these hosts."""
    deadline = time.monotonic() + TIMEOUT_S
    for name in names:
        while left := ours(cluster.bed[name]):
            assert time.monotonic() < deadline, (name, left)


def await_node(cluster: BedCluster, name: str, *, up: bool = True, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until a host's node is up, or down."""
    deadline = time.monotonic() + timeout_s
    while (cluster.status(name) is not None) is not up:
        assert time.monotonic() < deadline, name


# -- nothing runs ------------------------------------------------------------------------------------


def refuses(cluster: BedCluster, name: str, message: str, part: str = "node") -> None:
    """Assert that a host's node or gateway does not start, with this message and no traceback, and leaves nothing."""
    done = cluster.bed[name].run(["ray-gpu", part, "start"], check=False, timeout_s=100)
    said = " ".join(done.stderr.split())

    assert done.returncode == 1, (done.stdout, said)
    assert re.search(message, said), said
    assert "Traceback" not in done.stderr
    assert not ours(cluster.bed[name])
    assert network_left(cluster.bed[name]) == []


def network_left(host: Host) -> list[str]:
    """Return what a host still has of a cage's network."""
    script = (
        "ip -o link show | grep -o ray-cage; nft list tables | grep -o ray_gpu_cage; "
        "grep -l 1 /proc/sys/net/ipv4/conf/*/forwarding; true"
    )
    return host.run(["sh", "-c", script]).stdout.split()


#: What is wrong on a host: where, what is started, how to break it, what is said. More of it: tests/test_host_files.py.
WRONG: dict[str, tuple[str, str, str, str]] = {
    "address": (
        "gpu-1",
        "node",
        f"sed -i 's/^address: .*/address: 198.18.2.9/' {NODE_FILE}",
        "compare its addresses with those that `ray-gpu vault setup` was given",
    ),
    "missing CA": ("gpu-1", "node", f"rm {VAULT_CA}", r"vault-ca\.pem: no such file"),
    "missing CA of a gateway": ("zone-clinic", "gateway", f"rm {VAULT_CA}", r"vault-ca\.pem: no such file"),
    "foreign CA": ("gpu-1", "node", f"cp {FOREIGN_CA} {VAULT_CA}", "check .* the CA file"),
    "secret": ("gpu-1", "node", f"{FORGE} {NODE_CREDENTIALS}", "refuse"),
    "head": ("gpu-1", "node", "true", r"the head at \S+:26000 does not answer \(Connection refused\); start it first"),
    "gateway's zone": ("zone-clinic", "gateway", f"sed -i 's/^zone: .*/zone: clinik/' {GATEWAY_FILE}", "clinik"),
    "gateway's login": (
        "zone-clinic",
        "gateway",
        f"cp {NODE_CREDENTIALS} {GATEWAY_CREDENTIALS}",
        "not that of the gateway",
    ),
    "gateway's policy": ("zone-clinic", "gateway", "rm /etc/ray-gpu/policies/clinic/catalog.yaml", "catalog.yaml"),
}


@pytest.mark.parametrize(("name", "part", "command", "message"), WRONG.values(), ids=WRONG)
def test_wrong(cluster: BedCluster, name: str, part: str, command: str, message: str) -> None:
    """Whatever a node or a gateway finds missing or wrong is named, and nothing is left running."""
    host = cluster.bed[name]
    host.write(FOREIGN_CA, loopback_tls(datetime.now(UTC), 1).ca_pem.decode())
    host.run(["sh", "-c", command])
    try:
        refuses(cluster, name, message, part)
    finally:
        cluster.equip(name)


#: Vault's clock and certificate: what is said of them, and where to turn.
WRONG_VAULTS: dict[str, tuple[dict[str, int], str]] = {
    "clock behind": ({"advance_s": 90}, r"this host's clock is (89|90|91) s behind Vault's"),
    "clock ahead": ({"advance_s": -90}, r"this host's clock is (89|90|91) s ahead of Vault's"),
    "expired certificate": ({"days": 1, "ago": 2}, r"certificate has expired"),
}


@pytest.mark.parametrize(("options", "message"), WRONG_VAULTS.values(), ids=WRONG_VAULTS)
@pytest.mark.parametrize(
    ("name", "part", "file"),
    [("gpu-1", "node", NODE_FILE), ("zone-clinic", "gateway", GATEWAY_FILE)],
    ids=["node", "gateway"],
)
def test_wrong_vault(
    cluster: BedCluster, name: str, part: str, file: str, options: dict[str, int], message: str
) -> None:
    """A node or gateway whose clock differs from Vault's, or whose Vault's certificate has ended, does not start."""
    host, says = cluster.bed[name], {"auth": {"client_token": "t"}}
    try:
        with stand_in(host, VAULT_CA, says=says, **options) as address:
            host.run(["sed", "-i", f"s#https://[^, }}]*#{address}#", file])
            refuses(cluster, name, message, part)
    finally:
        cluster.equip(name)


def test_stopped_while_it_starts(cluster: BedCluster) -> None:
    """Whoever starts a node that somebody else stops meanwhile is told so; nothing is left."""
    host, pipe = cluster.bed["head"], subprocess.PIPE
    with host.popen(["ray-gpu", "node", "start"], stdout=pipe, stderr=pipe) as starting:
        deadline = time.monotonic() + TIMEOUT_S
        while host.run(["ray-gpu", "node", "status"], check=False).stdout != "it starts\n":
            assert time.monotonic() < deadline
            assert starting.poll() is None
        host.run(["ray-gpu", "node", "stop"])
        _, said = starting.communicate(timeout=TIMEOUT_S)

    assert starting.returncode == 1
    assert said == "ClusterError: it was stopped while it started; start it again\n"
    await_nothing(cluster, "head")


# -- ray up ------------------------------------------------------------------------------------------


def test_pool_is_up(pool: BedCluster) -> None:
    """After `ray up` each host says what it is: its labels, its GPUs, its custodian, and when its certificate ends."""
    states = {name: pool.status(name) for name in POOL}

    for name, state in states.items():
        assert state is not None, name
        assert state["labels"]["ray-gpu-node"] == name
        assert state["certificate_not_after"] > time.time() + 86400
        gpu = name != "head"
        assert (state["num_gpus"], state["labels"].get("ray-gpu-pool")) == ((1, "shared") if gpu else (0, None))
        assert ("custodian" in state["processes"]) is gpu


def test_zones_join(zones: BedCluster) -> None:
    """A zone's CPU host is a node beside the GPU nodes; a client zone's is none. The call is exact, on both of them."""
    said = json.loads(zones.call("clinic", FIT))
    nodes = {node["name"]: node for node in said["nodes"] if node["alive"]}

    assert said["exact"] is True
    assert {lease["node"] for lease in said["leases"]} == {"gpu-1", "gpu-2"}
    assert set(nodes) == {*POOL, "zone-clinic"}
    assert nodes["zone-clinic"]["labels"]["ray-gpu-zone"] == "clinic"
    assert [nodes[name]["gpus"] for name in ("gpu-1", "gpu-2", "zone-clinic", "head")] == [1, 1, 0, 0]
    assert nodes["gpu-1"]["labels"]["ray-gpu-pool"] == "shared"


def test_status(zones: BedCluster) -> None:
    """`ray-gpu status` shows a host's own node, and beside a zone's gateway every node of the cluster with labels."""
    gpu, zone = (zones.bed[name].run(["ray-gpu", "status"]).stdout for name in ("gpu-1", "zone-clinic"))
    rows = {line.split()[0]: line.split()[1:] for line in zone.splitlines() if line.startswith((*POOL, "zone-"))}

    assert re.search(r"^node gpu-1 \(gpu\): in the cluster at \S+; strict; pool=shared; 1 for leases", gpu)
    assert "zone-clinic" not in gpu
    assert re.search(r"^node zone-clinic \(zone\): in the cluster at \S+; strict; zone=clinic; certificate until", zone)
    assert "gateway of zone clinic: runs" in zone
    assert rows["zone-clinic"] == ["zone=clinic"]
    # A zone with carrier client has no node.
    assert "zone-trading" not in rows
    assert rows["gpu-2"] == ["pool=shared", "1", "of", "1"]
    # The node list is for whoever runs the gateway: a person attaches.
    said = zones.bed["zone-clinic"].run(["ray-gpu", "status"], uid=PERSON_UID, check=False)
    assert "gpu-2" not in said.stdout


#: What an operator types in a cage, and the labels of the nodes as Ray has them.
RAY_STATUS = """
import json, sys, ray
from ray.scripts.scripts import main
address, own = sys.argv[1:]
ray.init(address=address, _node_ip_address=own, log_to_driver=False)
print("labels", json.dumps([node["Labels"] for node in ray.nodes() if node["Alive"]]))
ray.shutdown()
sys.argv = ["ray", "status", "--verbose", f"--address={address}"]
main()
"""


def test_ray_status(zones: BedCluster) -> None:
    """Ray's own `ray status`, in the head's cage, shows the zone's node beside the pool's; its label says the zone."""
    head = zones.bed["head"]
    command = ["python", "-c", ENTER, f"{head.address}:{PORTS.gcs}", head.address, "-c", RAY_STATUS]
    said = head.run(command, timeout_s=100).stdout
    labels = json.loads(re.findall(r"^labels (.*)$", said, re.MULTILINE)[0])

    assert [item["ray-gpu-zone"] for item in labels if "ray-gpu-zone" in item] == ["clinic"]
    assert len(labels) == len(re.findall(r"^Node: ", said, re.MULTILINE)) == len(POOL) + 1, (labels, said)


def test_two_zones(zones: BedCluster) -> None:
    """The other zone computes on its own data, and its gateway's login opens no key of the first; its own, it does."""
    assert json.loads(zones.call("trading", MACRODATA)) is True

    script = """
import json, sys
from zones.errors import VaultDeniedError
from zones.vault import Vault
vault = Vault(sys.argv[1], ca_file=sys.argv[2])
vault.login_approle(**json.load(open(sys.argv[3])))
for zone in ("trading", "clinic"):
    for path in ("keys/gpu-1.probe", "datakey/plaintext/gpu-1.probe"):
        body = {"type": "aes256-gcm96", "derived": True} if path.startswith("keys") else {"context": "eHg="}
        try:
            vault.call("POST", f"zone-{zone}/{path}", **body)
            print(zone, "opens")
        except VaultDeniedError:
            print(zone, "denied")
"""
    said = zones.bed["zone-trading"].run(["python", "-c", script, zones.vault, VAULT_CA, GATEWAY_CREDENTIALS]).stdout

    assert said.splitlines() == ["trading opens"] * 2 + ["clinic denied"] * 2


def test_client_zone_is_closed(zones: BedCluster) -> None:
    """A zone with carrier client computes while its firewall accepts no connection at all; without rules it would."""
    host = zones.bed["zone-trading"]
    others = [other for other in zones.bed if other.name != host.name]
    rules = json.loads(host.run(["nft", "--json", "list", "chain", "inet", TABLE, "input"]).stdout)["nftables"]
    accepting = [rule["rule"]["expr"] for rule in rules if "rule" in rule and {"accept": None} in rule["rule"]["expr"]]

    # Answers, the loopback, and the neighbours' ICMP: nothing that names TCP, UDP or a port.
    assert [part for rule in accepting for part in rule if "dport" in str(part) or "saddr" in str(part)] == []
    assert len(accepting) == 3
    assert json.loads(zones.call("trading", MACRODATA)) is True

    def reached(port: int) -> list[str]:
        probe = f"import socket; socket.create_connection(({host.address!r}, {port}), timeout=1.5)"
        with ThreadPoolExecutor(len(others)) as several:
            done = several.map(lambda other: other.run(["python", "-c", probe], check=False), others)
            return [other.name for other, probe in zip(others, done, strict=True) if probe.returncode == 0]

    with host.popen(["python", "-c", _LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        listening = int(server.stdout.readline())
        try:
            assert reached(listening) == []
            for one in (host, zones.bed.router, *others):
                one.flush_rules()
            assert reached(listening) == [other.name for other in others]
        finally:
            zones.bed.load_firewalls()
            server.kill()


def test_client_zone_reaches_the_head_alone(zones: BedCluster) -> None:
    """Of what a client zone runs only the forwarder has a connection to the cluster's Ray, and that to one port."""
    host, head = zones.bed["zone-trading"], zones.bed["head"].address
    listed = host.run(["ss", "-Htne", "state", "established"]).stdout.splitlines()
    remote = {(line.split()[3], int((re.search(r"uid:(\d+)", line) or [0, 0])[1])) for line in listed}
    outward = {(peer, uid) for peer, uid in remote if not peer.startswith("127.")}
    document = json.loads(host.run(["ray-gpu", "gateway", "status", "--json"]).stdout)

    assert (f"{head}:{PORTS.client}", FORWARDER_UID) in outward
    assert {peer.rpartition(":")[2] for peer, uid in outward if uid != GATEWAY_UID} <= {str(PORTS.client), str(VAULT)}
    assert document["relay"] is True
    assert document["certificate_not_after"] > time.time() + 86400
    relays = [p for p in survey(host) if "-m ray_gpu.relay" in p["command"] and "bwrap" not in p["command"]]
    assert [(relay["uid"], relay["environment"]["RAY_USE_TLS"]) for relay in relays] == [(CAGE_UID, "1")]
    assert [p["command"] for p in survey(host) if "raylet" in p["command"]] == []


def test_launchers_key(zones: BedCluster) -> None:
    """From the head's cage, to which `ray up` copied it, the launcher's key opens a GPU host, and no zone's."""
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=2", "-o", "StrictHostKeyChecking=no"]
    key = f"{HOME}/ray_bootstrap_key.pem"
    assert zones.bed["head"].read(key) == zones.bed["operator"].read(LAUNCHER_KEY)

    def opened(target: str) -> str:
        address = zones.bed[target].address
        ssh = ["ssh", *options, "-i", key, f"root@{address}", "hostname"]
        done = zones.bed["head"].run([*into_cage(zones.bed["head"]), *ssh], check=False)
        return done.stdout.strip()

    assert opened("gpu-1") == "gpu-1"
    assert opened("zone-clinic") == ""


def test_every_ray_process_is_confined(zones: BedCluster) -> None:
    """Every process of Ray has TLS and token on, the cage's uid, and namespaces, a network and a tmpfs of its own."""
    with zones.begin_call("clinic", STREAM) as stream:
        assert stream.stdout is not None
        used = json.loads(stream.stdout.readline())["nodes"][0]
        assert any("ray::GpuActor" in process["command"] for process in survey(zones.bed[used]))  # a lease is at work
        for name in (*POOL, "zone-clinic"):
            found = [
                p
                for p in survey(zones.bed[name])
                if re.search(r"ray::|/ray/|ray\.scripts|ray_gpu\.relay", p["command"])
            ]
            caged = [p for p in found if "bwrap" not in p["command"] and "raylet.py" not in p["command"]]

            assert any("raylet/raylet" in p["command"] for p in caged), name
            assert any("relay" in p["command"] for p in caged) is name.startswith("zone"), name
            for process in caged:
                environment, command = process["environment"], process["command"]
                assert process["uid"] == CAGE_UID, (name, process["command"])
                # A title, such as ray::RuntimeEnvAgent, is written over the beginning of what the raylet gave it.
                if "ray::" not in command:
                    assert (environment["RAY_USE_TLS"], environment["RAY_AUTH_MODE"]) == ("1", "token"), process[
                        "command"
                    ]
                assert process["own"] == ["pid", "mnt", "ipc", "net"], process["command"]
                # A socket stays in the network where it was made, also for whoever gets it.
                assert process["sockets_of_another_network"] == 0, process["command"]
                assert (process["no_new_privs"], process["capabilities"]) == (1, 0), process["command"]
                assert {"/s", "/dev/shm", "/tmp"} <= set(process["tmpfs"]), process["command"]
            # Nothing outside the cages' own memory.
            assert zones.bed[name].run(["test", "-e", "/tmp/ray"], check=False).returncode == 1, name
        _, errors = stream.communicate("", TIMEOUT_S)
        assert stream.returncode == 0, errors


# -- what a cage reaches -----------------------------------------------------------------------------


@pytest.fixture
def listening(zones: BedCluster) -> Iterator[BedCluster]:
    """The same with services on every host and on the router, and no firewall but the cages' own rules."""
    pipe = subprocess.PIPE
    everyone = [zones.bed.router, *zones.bed]
    servers = [host.popen(["python", "-I", "-S", PROBER, "listen"], stdin=pipe, stdout=pipe) for host in everyone]
    servers += [host.popen(["python", "-c", ABSTRACT], stdin=pipe, stdout=pipe) for host in everyone]
    for host in everyone:
        host.load_rules(f"delete table inet {TABLE}\n")
    try:
        for server in servers:
            assert server.stdin is not None
            assert server.stdout is not None
            server.stdin.write(f"{json.dumps(SERVICES)}\n")
            server.stdin.flush()
            assert server.stdout.readline() == "ready\n"
        yield zones
    finally:
        zones.bed.load_firewalls()
        for server in servers:
            server.communicate("", TIMEOUT_S)


def into_cage(host: Host) -> list[str]:
    """Return what runs a command in the network of a host's cage."""
    raylet = next(process["pid"] for process in survey(host) if "raylet/raylet" in process["command"])
    return ["nsenter", f"--target={raylet}", "--net", "--"]


def reached(host: Host, targets: list[Target], *, inside: bool) -> list[Target]:
    """Return those targets that serve a process of a host or, *inside*, of its cage."""
    enter = into_cage(host) if inside else []
    done = host.run([*enter, "python", "-I", "-S", PROBER, "reach"], text=f"{json.dumps(targets)}\n")
    return [target for target, served in zip(targets, json.loads(done.stdout), strict=True) if served]


def others_of(cluster: BedCluster, name: str) -> list[Target]:
    """Return what a host reaches and its cage must not: its own services, every other host's, Vault, the router."""
    host = cluster.bed[name]
    others = [other for other in cluster.bed if other is not host]
    addresses = ["127.0.0.1", HOST_END, host.link.router, *(other.address for other in others)]
    targets: list[Target] = [(p, a, port) for a in addresses for port in SERVICES for p in ("tcp", "udp")]
    targets += [("tcp", host.address, port) for port in SERVICES]
    targets += [(p, other.address6, 8080) for other in others for p in ("tcp", "udp")]
    targets += [("tcp", "::1", 8080), ("tcp", host.address6, 8080), ("udp", host.link.router6, 53)]
    targets += [("icmp", a, 0) for a in addresses[1:]] + [("icmp", other.address6, 0) for other in others]
    targets += [("tcp", cluster.bed["vault"].address, VAULT), ("tcp", cluster.bed["gpu-2"].address, 22)]
    # Ray's own ports, but of a node that this one has nothing to do with, or those that nobody may use.
    zone = "zone-trading" if name.startswith("zone") else "vault"
    targets += [("tcp", cluster.bed[zone].address, PORTS.first), ("tcp", "127.0.0.1", VAULT)]
    return [*targets, ("abstract", "ray-gpu-test", 0)]


def test_a_cage_reaches_rays_ports_alone(listening: BedCluster) -> None:
    """With every firewall off, a cage reaches Ray's ports of the cluster and nothing else; its host, all."""
    hosts = listening.bed.hosts
    # What the host reaches neither: nothing is there, or another zone's cage, which knows its peers.
    nowhere = {("tcp", hosts["vault"].address, PORTS.first), ("tcp", "127.0.0.1", VAULT)}
    nowhere |= {("tcp", hosts["zone-trading"].address, PORTS.first)}
    for name in ("zone-clinic", "gpu-1"):
        forbidden = others_of(listening, name)
        peers = [hosts[other] for other in ("head", "gpu-1", "gpu-2", "zone-clinic") if other != name]
        ray: list[Target] = [("tcp", peer.address, PORTS.first) for peer in peers]
        ray += [("tcp", hosts["head"].address, PORTS.gcs)]
        by_host = reached(hosts[name], forbidden, inside=False)

        assert reached(hosts[name], [*forbidden, *ray], inside=True) == ray
        assert set(forbidden) - set(by_host) <= nowhere


#: Hosts with a cage, but for the head.
CAGED = ("gpu-1", "gpu-2", "zone-clinic")
#: What ray[default] opens besides on the head: the dashboard's agent, twice, and metrics of autoscaler and dashboard.
AGENTS = (PORTS.first + 4, PORTS.first + 5, 44217, 44227)
_CONNECT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def serves(port):
    try:
        socket.create_connection((sys.argv[1], port), timeout=1.5).close()
        return True
    except OSError:
        return False
ports = json.loads(sys.argv[2])
with ThreadPoolExecutor(len(ports)) as several:
    print(json.dumps([port for port, served in zip(ports, several.map(serves, ports)) if served]))
"""


def test_heads_agents(zones: BedCluster, full_ray: Path) -> None:
    """The head has all of ray[default]: its agents, which take no token, serve in its own cage and nowhere else.

    Nor do they where every firewall is off, but for the cages' own rules.
    """
    head = zones.bed["head"]

    def serving(host: Host, *, inside: bool) -> list[int]:
        probe = ["python", "-c", _CONNECT, head.address, json.dumps([PORTS.gcs, *AGENTS])]
        found: list[int] = json.loads(host.run([*(into_cage(host) if inside else []), *probe]).stdout)
        return found

    def from_elsewhere() -> list[set[int]]:
        places = [(host, False) for host in zones.bed] + [(zones.bed[name], True) for name in CAGED]
        with ThreadPoolExecutor(len(places)) as several:
            return [set(found) for found in several.map(lambda place: serving(place[0], inside=place[1]), places)]

    assert serving(head, inside=True) == [PORTS.gcs, *AGENTS]
    assert set().union(*from_elsewhere()) == {PORTS.gcs}
    for host in (zones.bed.router, *zones.bed):
        host.flush_rules()
    try:
        assert set().union(*from_elsewhere()) == {PORTS.gcs}
    finally:
        zones.bed.load_firewalls()


# -- a node is restarted, all of it ends, and comes again ----------------------------------------------


def test_restart_loses_no_call(zones: BedCluster) -> None:
    """Calls and fits go on while a GPU node that they use is restarted with a new certificate; none is lost."""
    with zones.begin_call("clinic", STREAM) as stream:
        assert stream.stdout is not None
        used = json.loads(stream.stdout.readline())["nodes"][0]
        before = zones.status(used)
        zones.bed[used].run(["ray-gpu", "node", "restart"], timeout_s=100)
        out, errors = stream.communicate("", 60)
    last = json.loads(out.splitlines()[-1])

    assert stream.returncode == 0, errors
    assert last["count"] > 100
    assert last["nodes"] == ["gpu-1", "gpu-2"]
    assert len(last["exact"]) > 3
    assert all(last["exact"])
    after = zones.status(used)
    assert before is not None
    assert after is not None, zones.bed[used].read(f"{STATE}/nodes/{used}/node.log")[-2000:]
    assert after["certificate_not_after"] > before["certificate_not_after"]


@pytest.mark.chaos
def test_autoscaler_starts_a_node_again(zones: BedCluster) -> None:
    """A GPU node that was stopped on its host comes back by itself, also with nobody at it."""
    zones.bed["gpu-2"].run(["ray-gpu", "node", "stop"])
    assert zones.status("gpu-2") is None

    await_node(zones, "gpu-2", timeout_s=2 * TIMEOUT_S)


@contextmanager
def left_alone(host: Host) -> Iterator[None]:
    """Keep the head's autoscaler, which stops and starts a node that it misses, from a host."""
    keys = "/etc/ssh/authorized_keys"
    known = host.read(keys)
    host.write(keys, "")
    try:
        yield
    finally:
        host.write(keys, known)


@pytest.mark.chaos
def test_rotated_token(zones: BedCluster) -> None:
    """A node with another token than the head's does not join; it says what to restart, and nothing of it is left."""
    with left_alone(zones.bed["gpu-2"]):
        zones.bed["gpu-2"].run(["ray-gpu", "node", "stop"])
        zones.administer("setup", DECLARATION, "--rotate-token")

        refuses(zones, "gpu-2", "if the Ray token was rotated")


@pytest.mark.chaos
def test_down_and_half_up(zones: BedCluster) -> None:
    """`ray down` leaves nothing in the pool. A second `ray up` says which host is missing, and the other serves."""
    zones.down()
    await_nothing(zones, *POOL)
    assert [network_left(zones.bed[name]) for name in POOL] == [[]] * 3
    bad, operator = zones.bed["gpu-2"], zones.bed["operator"]
    bad.run(["rm", NODE_CREDENTIALS])
    edited = yaml.safe_load(operator.read(CLUSTER_FILE))
    edited["head_start_ray_commands"][-1] += " --await-hosts 5"
    operator.write(CLUSTER_FILE, yaml.safe_dump(edited))
    said = zones.up()

    assert f"GPU host {bad.address} has NOT joined" in said
    assert "`ray-gpu node start` on it" in said
    refuses(zones, "gpu-2", "write it with `ray-gpu vault issue`")
    await_node(zones, "gpu-1")
    await_node(zones, "zone-clinic", up=False)
    assert network_left(zones.bed["zone-clinic"]) == []
    zones.start_node("zone-clinic")
    assert {lease["node"] for lease in json.loads(zones.call("clinic", FIT))["leases"]} == {"gpu-1"}
    zones.equip("gpu-2")
    zones.start_node("gpu-2")


def test_service_killed(zones: BedCluster) -> None:
    """When a node's service is killed, its cage and the link to it are gone, and the next start has them anew."""
    host, state = zones.bed["gpu-2"], zones.status("gpu-2")
    assert state is not None
    assert "ray-cage" in network_left(host)
    with left_alone(host):
        host.run(["kill", "-KILL", str(state["pid"])])
        await_nothing(zones, "gpu-2")
        deadline = time.monotonic() + TIMEOUT_S
        while "ray-cage" in network_left(host):
            assert time.monotonic() < deadline
        assert "ray_gpu_cage" in network_left(host)  # until the next start, what it drops is still dropped

        zones.start_node("gpu-2")
        assert network_left(host)[:2] == ["ray-cage", "ray_gpu_cage"]
        host.run(["ray-gpu", "node", "stop"])
        assert network_left(host) == []
