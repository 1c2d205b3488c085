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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_gpu.ports import FORWARDER_UID, GATEWAY_UID, PORTS, TABLE, VAULT
from testbed import Host, Testbed
from testbed.cluster import (
    CLUSTER_FILE,
    DECLARATION,
    GATEWAY_CREDENTIALS,
    GATEWAY_FILE,
    NODE_CREDENTIALS,
    NODE_FILE,
    VAULT_CA,
    BedCluster,
)
from testbed.host import HOME
from testbed.ssh import LAUNCHER_KEY
from zones.keys import loopback_tls

CAGE_UID = 61001
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
#: Calls until its standard input ends; says each hundred.
STREAM = """
import threading
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
@ray_gpu.gpu_remote
def double(x):
    return x * 2
with attach() as zone:
    count, nodes = 0, set()
    while not ended.is_set():
        assert double.remote(np.arange(4.0)).result().tolist() == [0, 2, 4, 6]
        count += 1
        if count % 100 == 1:
            nodes |= {lease["node"] for lease in zone.status()["leases"]}
            print(json.dumps({"count": count, "nodes": sorted(nodes)}), flush=True)
    print(json.dumps({"count": count, "nodes": sorted(nodes)}), flush=True)
"""


@pytest.fixture(scope="module")
def cluster(can_build: None) -> Iterator[BedCluster]:
    """A bed whose Vault is set up and whose hosts are equipped; nothing of Ray runs."""
    with Testbed() as bed, BedCluster(bed) as equipped:
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


def await_node(cluster: BedCluster, name: str, *, up: bool = True) -> None:
    """Wait until a host's node is up, or down."""
    deadline = time.monotonic() + TIMEOUT_S
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


#: What is wrong on a host: where, what is started, how to break it, what is said. More of it: tests/test_host_files.py.
WRONG: dict[str, tuple[str, str, str, str]] = {
    "address": (
        "gpu-1",
        "node",
        f"sed -i 's/^address: .*/address: 198.18.2.9/' {NODE_FILE}",
        "compare its addresses with those that `ray-gpu vault setup` was given",
    ),
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
    """From the head, to which `ray up` copied it, the launcher's key opens a GPU host, and no zone's."""
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=2", "-o", "StrictHostKeyChecking=no"]
    key = f"{HOME}/ray_bootstrap_key.pem"
    assert zones.bed["head"].read(key) == zones.bed["operator"].read(LAUNCHER_KEY)

    def opened(target: str) -> str:
        address = zones.bed[target].address
        done = zones.bed["head"].run(["ssh", *options, "-i", key, f"root@{address}", "hostname"], check=False)
        return done.stdout.strip()

    assert opened("gpu-1") == "gpu-1"
    assert opened("zone-clinic") == ""


def test_every_ray_process_is_confined(zones: BedCluster) -> None:
    """Every process of Ray has TLS and token on, the cage's uid, and namespaces and a tmpfs of its own."""
    for name in (*POOL, "zone-clinic"):
        found = [
            p for p in survey(zones.bed[name]) if re.search(r"ray::|/ray/|ray\.scripts|ray_gpu\.relay", p["command"])
        ]
        caged = [p for p in found if "bwrap" not in p["command"] and "raylet.py" not in p["command"]]

        assert any("raylet/raylet" in p["command"] for p in caged), name
        assert any("relay" in p["command"] for p in caged) is name.startswith("zone"), name
        for process in caged:
            environment = process["environment"]
            assert process["uid"] == CAGE_UID, (name, process["command"])
            # A title, such as ray::RuntimeEnvAgent, is written over the beginning of what the raylet gave it.
            if "ray::" not in process["command"]:
                assert (environment["RAY_USE_TLS"], environment["RAY_AUTH_MODE"]) == ("1", "token"), process["command"]
            assert process["own"] == ["pid", "mnt", "ipc"], process["command"]
            assert (process["no_new_privs"], process["capabilities"]) == (1, 0), process["command"]
            assert {"/s", "/dev/shm", "/tmp"} <= set(process["tmpfs"]), process["command"]
        # Nothing outside the cages' own memory.
        assert zones.bed[name].run(["test", "-e", "/tmp/ray"], check=False).returncode == 1, name


# -- a node is restarted, all of it ends, and comes again ----------------------------------------------


def test_restart_loses_no_call(zones: BedCluster) -> None:
    """Calls go on while the GPU node that they use is restarted with a new certificate; none is lost."""
    stream = zones.begin_call("clinic", STREAM)
    assert stream.stdout is not None
    assert stream.stdin is not None
    (used,) = json.loads(stream.stdout.readline())["nodes"]
    before = zones.status(used)
    zones.bed[used].run(["ray-gpu", "node", "restart"], timeout_s=100)
    out, errors = stream.communicate("", 60)
    last = json.loads(out.splitlines()[-1])

    assert stream.returncode == 0, errors
    assert last["count"] > 100
    assert last["nodes"] == ["gpu-1", "gpu-2"]
    after = zones.status(used)
    assert before is not None
    assert after is not None
    assert after["certificate_not_after"] > before["certificate_not_after"]


def test_rotated_token(zones: BedCluster) -> None:
    """A node with another token than the head's does not join; it says what to restart, and nothing of it is left."""
    zones.bed["gpu-2"].run(["ray-gpu", "node", "stop"])
    zones.administer("setup", DECLARATION, "--rotate-token")

    refuses(zones, "gpu-2", "if the Ray token was rotated")


def test_down_and_half_up(zones: BedCluster) -> None:
    """`ray down` leaves nothing in the pool. A second `ray up` says which host is missing, and the other serves."""
    zones.down()
    await_nothing(zones, *POOL)
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
    zones.start_node("zone-clinic")
    assert {lease["node"] for lease in json.loads(zones.call("clinic", FIT))["leases"]} == {"gpu-1"}
    zones.equip("gpu-2")
    zones.start_node("gpu-2")
