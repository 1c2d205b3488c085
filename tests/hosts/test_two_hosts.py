"""Two CPU hosts of one zone read and seal in parallel, driven by Ray Data from a private Ray cluster inside the zone.

Everything is real: two gateways, two Ray clusters on the same hosts, the declared firewalls, Vault, sandboxes.
:mod:`tests.hosts.test_zone_hosts` has the firewalls alone, and `make test` runs that.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_gpu.cage_net import HOST_END
from ray_gpu.ports import PRIVATE_PORTS, Role
from testbed import Host, Testbed
from testbed.bed import HOSTS as ONE_OF_EACH
from testbed.cluster import PEOPLE, PERSON_UID, STATE, BedCluster
from testbed.private_ray import HOME, LOGIN, RUN, TOKEN, PrivateRay
from tests.attack.test_canaries_hosts import running
from tests.hosts.test_cluster import into_cage
from tests.proofs.attacked import command
from tests.proofs.memory_search import search

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

ROLES = {name: role for name, role in ONE_OF_EACH.items() if name != "zone-trading"}
ROLES |= {"zone-clinic-2": Role.EDGE_ZONE, "zone-lab": Role.EDGE_ZONE}
CLINIC = ("zone-clinic", "zone-clinic-2")
LEDGER = f"{STATE}/zones/clinic/ledger/ledger.sqlite"
ROOT = Path(__file__).parents[2]
PROBER = Path(__file__).with_name("prober.py")
#: Something that Ray Data is given by value, for the control of a search.
CANARY = "canary-of-the-purpose-7391"
#: The job of a person, with the answer that pandas gives without any of this.
JOB = """
import pandas as pd, time
@ray_gpu.gpu_remote(columns=["mdvis", "disea"], concurrency=1)
def strain(batch):
    return batch["mdvis"] / (1 + batch["disea"])
where = {"zone": "clinic", "purpose": sys.argv[3], "dataset": "randhie", "keep": ["record_number"]}
where |= {"login": LOGIN, "state_dir": STATE}
ds = ray.data.from_arrow(ray_gpu.parts(12)).repartition(12).map_batches(
    ray_gpu.OnGpu, fn_constructor_args=[strain], fn_constructor_kwargs=where, batch_format="pyarrow",
    batch_size=1, concurrency=2, num_cpus=0, resources={"gateway": 1},
)
found = pa.concat_tables(ray.get(ds.to_arrow_refs())).to_pandas().sort_values("record_number", ignore_index=True)
with ray_gpu.attach("clinic", login=LOGIN, state_dir=STATE) as zone:
    people = zone.read("randhie", columns=["record_number", "mdvis", "disea"]).to_pandas()
people = people.sort_values("record_number", ignore_index=True)
wanted = pd.DataFrame({"record_number": people["record_number"], "result": people["mdvis"] / (1 + people["disea"])})
nodes = [node["NodeName"] for node in ray.nodes() if node["Alive"]]
print(json.dumps({"rows": len(found), "exact": found.equals(wanted), "nodes": sorted(nodes)}))
"""
#: Compares what a job left in ``table`` with what pandas makes of the data set.
COMPARED = """
with ray_gpu.attach("clinic", login=LOGIN) as zone:
    people = zone.read("randhie").to_pandas().sort_values("record_number", ignore_index=True)
people["result"] = people["mdvis"] / (1 + people["disea"])
exact = all(np.array_equal(people[name], table[name]) for name in table)
print(json.dumps({"rows": len(table), "exact": exact, "columns": list(table.columns)}))
"""
#: Rows that Ray Data itself has: nobody classified them.
UNCLASSIFIED = """
@ray_gpu.gpu_remote(columns=["mdvis"])
def double(batch):
    return batch["mdvis"] * 2
where = {"zone": "clinic", "login": LOGIN, "state_dir": STATE}
ds = ray.data.from_arrow(pa.table({"mdvis": [1.0, 2.0]})).map_batches(
    ray_gpu.OnGpu, fn_constructor_args=[double], fn_constructor_kwargs=where, batch_format="pyarrow",
    concurrency=1, num_cpus=0, resources={"gateway": 1},
)
try:
    ds.take_all()
    print(json.dumps("allowed"))
except Exception as error:
    print(json.dumps(str(error)))
"""
#: What is said of a call on few rows where policy bounds a node's share.
FEW = """
from zones.errors import EgressDeniedError
@ray_gpu.gpu_remote(columns=["mdvis"], placement_timeout_s=2)
def total(batch):
    return float(batch["mdvis"].sum())
with attach() as zone:
    few = zone.read("randhie", columns=["mdvis"], filter=["mdvis", ">", 60])
    try:
        print(json.dumps(total.map_reduce(few, sum) == float(few.to_pandas()["mdvis"].sum())))
    except EgressDeniedError as error:
        print(json.dumps(error.message))
"""
ENTRIES = """
import json, sys
from pathlib import Path
from zones.ledger import read
print(json.dumps(list(read(Path(sys.argv[1])))))
"""
#: Connects to a Ray cluster with the token in a file; says how many nodes there are.
CONNECT = """
import sys, ray
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False)
print(len([node for node in ray.nodes() if node["Alive"]]))
"""


@pytest.fixture(scope="module")
def cluster(can_build: None) -> Iterator[BedCluster]:
    """A cluster with both hosts of the clinic joined, and a host of another zone."""
    with Testbed(ROLES) as bed, _Cluster(bed) as equipped:
        equipped.up()
        with ThreadPoolExecutor(2) as both:
            list(both.map(equipped.join, ("clinic", "clinic-2")))
        yield equipped


class _Cluster(BedCluster):
    """The host of the other zone is there for the network alone: it has nobody's files."""

    def equip(self, name: str) -> None:
        if name != "zone-lab":
            super().equip(name)


@pytest.fixture(scope="module")
def private(cluster: BedCluster) -> Iterator[PrivateRay]:
    """The private Ray cluster on the two."""
    with PrivateRay(cluster, "clinic", CLINIC) as ray:
        yield ray


def entries(host: Host) -> list[dict[str, Any]]:
    """Return the ledger of a host's gateway."""
    found: list[dict[str, Any]] = json.loads(host.run(["python", "-c", ENTRIES, LEDGER]).stdout)
    return found


def of_person(host: Host, *words: str) -> list[int]:
    """Return the person's processes on a host, with one of the words in their command line where some are given."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            inside = (entry / "ns/pid").readlink() == Path(f"/proc/{host.pid}/ns/pid").readlink()
            if inside and entry.stat().st_uid == PERSON_UID:
                found.append(int(entry.name))
    return [pid for pid in found if not words or any(word in " ".join(command(pid)) for word in words)]


def test_both_hosts_work(cluster: BedCluster, private: PrivateRay) -> None:
    """Each gateway sends its part of the rows, at the same time as the other, and all is exactly what pandas gives."""
    before = {name: len(entries(cluster.bed[name])) for name in CLINIC}
    said = private.run(JOB, CANARY)
    assert said == {"rows": 20190, "exact": True, "nodes": sorted(host.address for host in private.hosts)}

    done = {
        name: [e for e in entries(cluster.bed[name])[before[name] :] if e["kind"] == "completion"] for name in CLINIC
    }
    rows = {name: sum(entry["rows"] for entry in some) for name, some in done.items()}
    spans = [(min(e["time"] for e in some), max(e["time"] for e in some)) for some in done.values()]
    assert sum(rows.values()) == 20190
    assert min(rows.values()) > 0
    assert max(start for start, _ in spans) < min(end for _, end in spans)
    assert {node for name in CLINIC for e in done[name] for node in [e["node"]]} <= {"gpu-1", "gpu-2"}
    for name in CLINIC:
        verified = cluster.bed[name].run(["ray-gpu", "audit", "verify", LEDGER]).stdout
        assert verified.startswith("verifies: zone clinic")


def test_the_documented_job(private: PrivateRay) -> None:
    """What docs/howto-ray-data.md has a person write runs as it stands, but for the address, and is exact."""
    text = (ROOT / "docs/howto-ray-data.md").read_text(encoding="utf-8")
    (job,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    connect = 'ray.init(address="198.51.100.5:26300")\n'
    assert connect in job

    said = private.run(job.replace(connect, "") + COMPARED)

    assert said == {"rows": 20190, "exact": True, "columns": ["record_number", "result"]}


def test_unclassified_rows_stay(private: PrivateRay) -> None:
    """Rows that come from no catalog are refused by the zone's policy, and Ray Data's user reads by which rule."""
    said = private.run(UNCLASSIFIED)

    assert "EgressDeniedError" in said
    assert "no-direct-identifiers" in said


def test_secrets_stay_out_of_ray(cluster: BedCluster, private: PrivateRay) -> None:
    """Neither the person's password nor Ray's token is in anything that the private Ray wrote, or in an environment.

    Nor is the password in the memory of Ray's own processes. The control: what was given to Ray Data by value is.
    """
    since = time.time() - 3600
    private.run(JOB, CANARY)
    password = json.loads(cluster.credentials(PEOPLE["clinic"]).text)["password"]
    token = private.hosts[0].read(TOKEN).strip()
    for host in private.hosts:
        root = Path(f"/proc/{host.pid}/root")
        everybody, services = of_person(host), of_person(host, "raylet/raylet", "gcs/gcs_server")
        assert len(everybody) > len(services) > 0
        written = search((password, token, CANARY), (), since=since, trees=[root / RUN.lstrip("/")])
        starts = search((password, token, TOKEN), everybody, since=since, places=frozenset({"environ", "cmdline"}))
        inside = search((password, CANARY), services, since=since, places=frozenset({"memory", "map_files"}))

        assert written.of(password) == written.of(token) == []
        assert written.searched_bytes > 1000
        assert starts.of(password) == starts.of(token) == []
        assert starts.of(TOKEN) != []  # where it is, they are told
        assert inside.of(password) == []
        assert (
            host.run(["stat", "-c", "%a %u", LOGIN, TOKEN, HOME, RUN]).stdout.split()
            == ["600", "1000"] * 2
            + [
                "700",
                "1000",
            ]
            * 2
        )
    head = of_person(private.hosts[0], "raylet/raylet", "gcs/gcs_server")
    assert search(CANARY, head, since=since).hits != []
    own = search(password, (), since=since, trees=[Path(f"/proc/{private.hosts[0].pid}/root{HOME}/.ray-gpu")])
    assert own.hits != []


# -- nothing of it is reachable from the spanning cluster -------------------------------------------


def served(host: Host, targets: list[tuple[str, int]], *, inside: bool) -> list[tuple[str, int]]:
    """Return the targets that serve a host or, *inside*, its Ray cage."""
    enter = into_cage(host) if inside else []
    probes = json.dumps([("tcp", address, port) for address, port in targets])
    done = host.run([*enter, "python", "-I", "-S", PROBER, "reach"], text=probes + "\n")
    return [target for target, answered in zip(targets, json.loads(done.stdout), strict=True) if answered]


def listening(host: Host) -> list[int]:
    """Return the TCP ports on which the person's processes listen."""
    lines = host.run(["ss", "-Hltne"]).stdout.splitlines()
    return sorted(
        {int(line.split()[3].rpartition(":")[2]) for line in lines if re.search(rf"\buid:{PERSON_UID}\b", line)}
    )


def test_unreachable_from_the_spanning_cluster(cluster: BedCluster, private: PrivateRay) -> None:
    """No host but the zone's, and no cage, is served by any port of the private Ray; the zone's other host, by its own.

    With every firewall off no cage is either, but all hosts are.
    """
    ports = {host.name: listening(host) for host in private.hosts}
    assert PRIVATE_PORTS.gcs in ports["zone-clinic"]
    everything = [(host.address, port) for host in private.hosts for port in ports[host.name]]
    on_links = [(HOST_END, port) for port in {port for some in ports.values() for port in some}]
    caged = [name for name in ROLES if name in ("head", "gpu-1", "gpu-2", *CLINIC)]
    places = [(name, False) for name in ROLES if name not in CLINIC] + [(name, True) for name in caged]

    def from_everywhere() -> dict[tuple[str, bool], list[tuple[str, int]]]:
        with ThreadPoolExecutor(8) as several:
            found = several.map(
                lambda p: served(cluster.bed[p[0]], [*everything, *on_links] if p[1] else everything, inside=p[1]),
                places,
            )
            return dict(zip(places, found, strict=True))

    assert from_everywhere() == {place: [] for place in places}
    head, other = private.hosts
    mine = {port for address, port in served(other, everything, inside=False) if address == head.address}
    declared = {PRIVATE_PORTS.gcs, *range(PRIVATE_PORTS.first, PRIVATE_PORTS.first + 3)}
    assert declared <= mine
    assert all(port in declared or PRIVATE_PORTS.first + 10 <= port <= PRIVATE_PORTS.first + 109 for port in mine)
    for host in (cluster.bed.router, *cluster.bed):
        host.flush_rules()
    try:
        found = from_everywhere()
    finally:
        cluster.bed.load_firewalls()
    for (name, inside), some in found.items():
        assert (some == []) if inside else ((head.address, PRIVATE_PORTS.gcs) in some), (name, inside, some)


def test_a_rogue_task_in_the_cage(cluster: BedCluster, private: PrivateRay) -> None:
    """A Ray worker of the spanning cluster, on the zone's own host, cannot connect to the private GCS; a neighbour can.

    The neighbour needs the token too: with another one it is refused.
    """
    head, other = private.hosts
    connect = ["timeout", "20", "python", "-c", CONNECT, private.address]
    home = {"HOME": HOME, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": TOKEN, "RAY_NUM_REDIS_GET_RETRIES": "2"}
    other.write(f"{HOME}/.ray-gpu/other", "0" * 64, mode=0o600, uid=PERSON_UID)
    wrong = home | {"RAY_AUTH_TOKEN_PATH": f"{HOME}/.ray-gpu/other"}

    with_token = other.run([*connect, other.address], uid=PERSON_UID, env=home)
    another = other.run([*connect, other.address], uid=PERSON_UID, env=wrong, check=False)
    caged = head.run([*into_cage(head), *connect, head.address], env=home, check=False)

    assert with_token.stdout.split() == ["2"]
    assert another.returncode == 1
    assert "Authentication token is missing or incorrect" in another.stderr
    assert (caged.returncode, caged.stdout) == (124, "")
    assert f"Failed to connect to GCS at address {private.address}" in caged.stderr


def test_two_ray_clusters(cluster: BedCluster, private: PrivateRay) -> None:
    """Neither cluster knows a node of the other; the zone's hosts are in both, under different uids and namespaces."""
    shown = cluster.bed["zone-clinic"].run(["ray-gpu", "status"]).stdout
    rows = [line.split()[0] for line in shown.splitlines() if line.startswith(("head", "gpu-", "zone-"))]

    assert rows == ["gpu-1", "gpu-2", "head", *CLINIC]
    said = private.run("print(json.dumps(sorted(node['NodeManagerAddress'] for node in ray.nodes())))")
    assert said == sorted(host.address for host in private.hosts)
    for host in private.hosts:
        (own,), spanning = of_person(host, "raylet/raylet"), running(host, "raylet/raylet")
        kinds = ("net", "pid", "mnt", "ipc")
        assert spanning
        for pid in spanning:
            assert Path(f"/proc/{pid}").stat().st_uid != PERSON_UID
            assert all(Path(f"/proc/{pid}/ns/{k}").readlink() != Path(f"/proc/{own}/ns/{k}").readlink() for k in kinds)


# -- what two gateways give one node -----------------------------------------------------------------


def test_gateways_divide_a_nodes_share(cluster: BedCluster) -> None:
    """Where a share is bounded, two hosts are refused until zone.yaml says two; then each gives its half at most."""
    path = "/etc/ray-gpu/policies/clinic/zone.yaml"
    before = {name: cluster.bed[name].read(path) for name in CLINIC}

    def said(changes: dict[str, Any]) -> list[Any]:
        for name in CLINIC:
            host, count = cluster.bed[name], len(entries(cluster.bed[name]))
            host.write(path, yaml.safe_dump(yaml.safe_load(before[name]) | changes))
            deadline = time.monotonic() + 30
            while not any(entry["kind"] == "policy" for entry in entries(host)[count:]):
                assert time.monotonic() < deadline
        return [json.loads(cluster.call(name, FEW)) for name in ("clinic", "clinic-2")]

    try:
        refused = said({"max_node_share": {"percent": 60}})
        allowed = said({"max_node_share": {"percent": 60}, "gateways": 2})
    finally:
        for name in CLINIC:
            cluster.bed[name].write(path, before[name])
    shares = {name: [e for e in entries(cluster.bed[name]) if e["kind"] == "share"] for name in CLINIC}

    assert all("set `gateways: 2` in zone.yaml" in message for message in refused)
    assert allowed == [True, True]
    assert all(shares.values())
    assert all(entry["percent"] <= 30 for some in shares.values() for entry in some)
