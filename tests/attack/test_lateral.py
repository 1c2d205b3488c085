"""Section 3, lateral movement: what a rogue Ray job with a node's token and certificate can do on other nodes.

The attacker has taken over gpu-2's cage. His code gets onto a zone's node, and onto gpu-1, in every way that Ray
offers, and says where it runs. The control is the same code, by the same ways, on a Ray node of the same host that has
no cage: what is refused below succeeds there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from ray_gpu.ports import PORTS, SSH
from testbed import Host
from testbed.cluster import GATEWAY_CREDENTIALS, NODE_CREDENTIALS, STATE, VAULT_CA, BedCluster
from testbed.host import ROOT
from tests.attack.rogue_job import VEHICLES, RogueJob, masked
from zones.keys import ExchangeKey
from zones.model import Grant, Offer, Padding, digest
from zones.vault import lease_name

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

ATTACKER, ZONE, GPU = "gpu-2", "zone-clinic", "gpu-1"
CAGE_UID = 61001
TIMEOUT_S = 120.0
#: Stands for what else there is in a zone: a data base on each zone's host.
SERVICE_PORT = 5432
#: Ports of the control's Ray, which no other has.
PLAIN_GCS, PLAIN_FIRST = 30000, 30010
CANARY = f"lateral-{secrets.token_hex(8)}"
#: Has a sandbox of each GPU node keep a canary, and uses the leases until standard input ends.
HOLD = f"""
import threading
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
@ray_gpu.gpu_remote(num_gpus=0.5)
def keep(text):
    import builtins, time
    builtins.kept = text + "-kept"
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        pass
    return len(text)
with attach() as zone:
    while True:
        both = [keep.remote("{CANARY}") for _ in range(2)]
        assert all(call.result() for call in both)
        print(json.dumps(zone.status()["leases"]), flush=True)
        if ended.wait(5):
            break
"""
SERVE = f"""
import socket, sys
listeners = []
for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind((host, {SERVICE_PORT}))
    listener.listen(64)
    listeners.append(listener)
print("ready", flush=True)
sys.stdin.read()
"""
#: As the zone's gateway: makes a lease's key and wraps a data key for terms.
WRAP = """
import json, sys
from zones.vault import Vault
address, ca, credentials = sys.argv[1:]
zone, node, lease, digest = json.load(sys.stdin)
vault = Vault(address, ca_file=ca).login_approle(**json.load(open(credentials)))
vault.create_lease_key(zone, node, lease)
print(vault.data_key(zone, node, lease, digest)[1])
"""

#: Ends what the control's Ray leaves running.
_KILL = "for p in $(grep -lz /run/plain /proc/[0-9]*/cmdline | cut -d/ -f3); do kill -9 $p; done"

#: Those that get somewhere in a cage.
CAGED_VEHICLES = tuple(vehicle for vehicle in VEHICLES if vehicle != "pip")

Report = dict[str, Any]


@pytest.fixture(scope="module")
def cluster(bed_cluster: BedCluster) -> Iterator[BedCluster]:
    """The cluster, with leases at work, and with a service beside Ray on each zone's host."""
    with contextlib.ExitStack() as closing:
        for zone in ("zone-clinic", "zone-trading"):
            service = begin(bed_cluster.bed[zone], ["python", "-c", SERVE])
            closing.callback(end, service)
            assert service.stdout is not None
            assert service.stdout.readline() == "ready\n"
        holder = bed_cluster.begin_call("clinic", HOLD)
        closing.callback(end, holder)
        assert holder.stdout is not None
        line = holder.stdout.readline()
        assert line, holder.stderr.read() if holder.stderr else ""
        assert GPU in {lease["node"] for lease in json.loads(line)}
        yield bed_cluster


def begin(host: Host, command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a program on a host with pipes."""
    pipe = subprocess.PIPE
    return host.popen(command, stdin=pipe, stdout=pipe, stderr=pipe, **options)


def end(process: subprocess.Popen[str]) -> None:
    """End a program that was begun."""
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def rogue(cluster: BedCluster) -> Iterator[RogueJob]:
    """The rogue job, in gpu-2's cage."""
    bed = cluster.bed
    with RogueJob(
        lambda command: begin(bed[ATTACKER], command), f"{bed['head'].address}:{PORTS.gcs}", bed[ATTACKER].address
    ) as job:
        yield job


@dataclass(frozen=True, slots=True)
class Plain:
    """A Ray node without a cage, run by root, and a rogue job on it."""

    job: RogueJob
    node: str = "plain"


#: Gets the report of a vehicle on a node; each goes there once.
Reports = Callable[[str, str], Report]


@pytest.fixture(scope="module")
def reports(cluster: BedCluster, rogue: RogueJob) -> Reports:
    """Return what sends a vehicle to a node, with everything that there is to have there."""
    targets = {ZONE: zone_targets(cluster), GPU: gpu_targets(cluster)}
    return functools.cache(lambda vehicle, node: rogue.vehicle(vehicle, node, targets[node]))


@pytest.fixture(scope="module")
def plain(cluster: BedCluster) -> Iterator[Callable[[str], Plain]]:
    """Return what starts such a node on a host, once; it is a cluster of its own."""
    made: dict[str, Plain] = {}
    with contextlib.ExitStack() as closing:

        def on(name: str) -> Plain:
            if name not in made:
                made[name] = closing.enter_context(plain_ray(cluster.bed[name]))
            return made[name]

        yield on


@contextlib.contextmanager
def plain_ray(host: Host) -> Iterator[Plain]:
    """Run a plain Ray node on a host."""
    ports = ["node-manager", "object-manager", "runtime-env-agent", "metrics-export"]
    ports += ["dashboard-agent-listen", "dashboard-agent-grpc"]
    command = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false"]
    command += [
        f"--node-ip-address={host.address}",
        f"--port={PLAIN_GCS}",
        "--num-cpus=0",
        "--labels=ray-gpu-node=plain",
    ]
    command += [f"--{name}-port={PLAIN_FIRST + index}" for index, name in enumerate(ports)]
    command += ["--object-store-memory=80000000", "--temp-dir=/run/plain"]
    environment = {"RAY_GPU_NODE": "plain", "PYTHONPATH": f"/run/planted:{ROOT}"}
    host.run(["mkdir", "-p", "/run/planted"])
    node = host.popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await_port(host, PLAIN_FIRST + 2)
        with RogueJob(lambda c: begin(host, c), f"{host.address}:{PLAIN_GCS}", host.address) as job:
            yield Plain(job)
    finally:
        node.terminate()
        node.wait()
        host.run(["sh", "-c", _KILL], check=False)


def await_port(host: Host, port: int) -> None:
    """Wait until a port of a host accepts connections from itself."""
    deadline = time.monotonic() + TIMEOUT_S
    probe = f"import socket; socket.create_connection(('{host.address}', {port}), 1)"
    while host.run(["python", "-c", probe], check=False).returncode:
        assert time.monotonic() < deadline, "the control's Ray did not start"


def ran_caged(cluster: BedCluster, report: Report, node: str) -> None:
    """Assert that the code ran on this node, as the cage's uid, among the cage's processes alone."""
    outside = cluster.bed[node].run(["readlink", "/proc/self/ns/pid"]).stdout.strip()
    assert report["node"] == node
    assert report["uid"] == CAGE_UID
    assert report["pid_namespace"] != outside
    assert any("raylet" in command for command in report["commands"])


def got(report: Report, *kinds: str) -> set[str]:
    """Return what a report says was got, of these kinds."""
    return {item for item in report["got"] if item.partition(" ")[0] in kinds}


# -- a zone's node -----------------------------------------------------------------------------------

KINDS = ("file", "unix", "program", "memory")


def zone_targets(cluster: BedCluster) -> dict[str, Any]:
    """Return what there is to have on the zone's host, and where nothing of a zone's Ray has any business."""
    home, bed = f"{STATE}/zones/clinic", cluster.bed
    login = json.loads(bed[ZONE].read(GATEWAY_CREDENTIALS))
    files = {
        "zone data": f"{home}/data/*",
        "ledger": f"{home}/ledger/*",
        "lease key notes": f"{home}/ledger/lease-keys",
        "gateway's settings": f"{home}/settings.json",
        "gateway's login": GATEWAY_CREDENTIALS,
        "node's login": NODE_CREDENTIALS,
    }
    tcp = {
        "other zone": [bed["zone-trading"].address, SERVICE_PORT],
        "other zone's IPv6": [bed["zone-trading"].address6, SERVICE_PORT],
        "SSH of a GPU node": [bed["gpu-1"].address, SSH],
        "SSH of the head": [bed["head"].address, SSH],
        "own loopback": ["127.0.0.1", SERVICE_PORT],
        "own address": [bed[ZONE].address, SERVICE_PORT],
    }
    return {
        "files": files,
        "unix": {"gateway": f"{home}/run/gw.sock"},
        "tcp": tcp,
        "programs": {"gateway": "ray_gpu.gateway"},
        "needles": masked({"gateway's secret": login["secret_id"]}),
    }


EVERYTHING_IN_A_ZONE = {
    "file zone data", "file ledger", "file lease key notes", "file gateway's settings", "file gateway's login",
    "file node's login", "unix gateway", "program gateway", "memory gateway's secret",
}  # fmt: skip
OTHERS = {"tcp other zone", "tcp other zone's IPv6", "tcp SSH of a GPU node", "tcp SSH of the head"}
OWN = {"tcp own loopback", "tcp own address"}


@pytest.mark.parametrize("vehicle", CAGED_VEHICLES)
def test_zone_node(cluster: BedCluster, reports: Reports, vehicle: str) -> None:
    """On a zone's node the rogue code runs, whichever way it came, in the cage; and finds nothing there."""
    report = reports(vehicle, ZONE)

    ran_caged(cluster, report, ZONE)
    assert got(report, *KINDS) == set()


@pytest.mark.parametrize("vehicle", VEHICLES)
def test_zone_node_without_cage(cluster: BedCluster, plain: Callable[[str], Plain], vehicle: str) -> None:
    """Control: on the same host, without a cage, the same code gets all of it."""
    control = plain(ZONE)
    report = control.job.vehicle(vehicle, control.node, zone_targets(cluster))

    assert report["node"] == control.node
    assert got(report, *KINDS) == EVERYTHING_IN_A_ZONE, report["refused"]


@pytest.mark.parametrize("node", [ZONE, GPU])
def test_no_build_in_a_cage(rogue: RogueJob, node: str) -> None:
    """Nobody can put into a cage what Ray's agent asks for before it builds, and plain Ray does not bring.

    Control: where a virtualenv can be planted, it builds (``test_zone_node_without_cage[pip]``).
    """
    with pytest.raises(RuntimeError, match="Please install virtualenv"):
        rogue.vehicle("pip", node, {})


#: A cage's file system, whose root Landlock does not let it list, and this project.
EVERYWHERE = ["/", *(f"/{name}" for name in ("dev", "etc", "home", "opt", "root", "run", "s", "tmp", "usr", "var"))]
EVERYWHERE += [str(ROOT), str(ROOT / "ray_gpu"), sys.prefix]


@pytest.mark.parametrize("node", [ZONE, GPU])
def test_cage_writes_its_own_memory_alone(rogue: RogueJob, node: str) -> None:
    """A cage's code writes to the session's tmpfs, its own /dev/shm and /tmp, and nowhere else."""
    report = rogue.vehicle("task", node, {"writable": EVERYWHERE})
    places = {item.removeprefix("write ") for item in got(report, "write")}

    assert places == {"/s", "/dev/shm", "/tmp"}


def test_writes_without_cage(cluster: BedCluster, plain: Callable[[str], Plain]) -> None:
    """Control: without a cage the same code writes to the host's own directories, the project's, and the kernel's."""
    control = plain(ZONE)
    report = control.job.vehicle("task", control.node, {"writable": EVERYWHERE})

    assert {"write /", "write /etc", "write /proc/sys/kernel/core_pattern"} <= got(report, "write")


@pytest.mark.parametrize("vehicle", CAGED_VEHICLES)
def test_network(reports: Reports, vehicle: str) -> None:
    """From a zone's node the rogue code reaches neither another zone nor anybody's SSH."""
    assert got(reports(vehicle, ZONE), "tcp") <= OWN


def test_services_of_the_host(cluster: BedCluster, reports: Reports) -> None:
    """A service on the zone's own host, by its address or loopback, is out of a cage's reach."""
    outside = cluster.bed[ZONE].run(["readlink", "/proc/self/ns/net"]).stdout.strip()
    report = reports("task", ZONE)
    if report["net_namespace"] == outside:
        pytest.skip("cages share their host's network here: its own services are within reach of a rogue job")
    assert got(report, "tcp") & OWN == set()


def test_network_without_rules(cluster: BedCluster, plain: Callable[[str], Plain]) -> None:
    """Control: without cage and firewalls the same code reaches all of them."""
    control = plain(ZONE)
    for host in (cluster.bed.router, *cluster.bed):
        host.flush_rules()
    try:
        report = control.job.vehicle("task", control.node, {"tcp": zone_targets(cluster)["tcp"]})
    finally:
        cluster.bed.load_firewalls()

    assert got(report, "tcp") == OTHERS | OWN


def test_relay_holds_nothing(cluster: BedCluster, rogue: RogueJob) -> None:
    """The relay is in the cage, so its memory is open to the rogue: there is no login and no canary in it.

    Control: what it does hold, the cluster's address, is found by the same search.
    """
    person = json.loads(cluster.credentials("dana").text)
    logins = {"gateway's secret": GATEWAY_CREDENTIALS, "node's secret": NODE_CREDENTIALS}
    needles = {name: json.loads(cluster.bed[ZONE].read(path))["secret_id"] for name, path in logins.items()}
    needles |= {"person's password": person["password"], "canary": CANARY, "kept": f"{CANARY}-kept"}
    needles |= {"address": f"--address={cluster.bed['head'].address}:{PORTS.gcs}"}
    report = rogue.vehicle("task", ZONE, {"programs": {"relay": "ray_gpu.relay"}, "needles": masked(needles)})

    assert set(report["got"]) == {"program relay", "memory address"}


# -- a GPU node --------------------------------------------------------------------------------------


def gpu_targets(cluster: BedCluster) -> dict[str, Any]:
    """Return what there is to have on a GPU node's host."""
    login = json.loads(cluster.bed[GPU].read(NODE_CREDENTIALS))
    return {
        "files": {"custodian's settings": f"{STATE}/nodes/{GPU}/settings.json", "node's login": NODE_CREDENTIALS},
        "programs": {
            "custodian": "ray_gpu.custodian", "keeper": "ray_gpu.keeper", "sandbox": "ray_gpu.sandbox.child",
        },
        "needles": masked({"custodian's secret": login["secret_id"], "canary": f"{CANARY}-kept"}),
    }  # fmt: skip


EVERYTHING_ON_A_GPU_NODE = {
    "file custodian's settings", "file node's login", "program custodian", "program keeper", "program sandbox",
    "memory custodian's secret", "memory canary",
}  # fmt: skip


@pytest.mark.parametrize("vehicle", CAGED_VEHICLES)
def test_gpu_node(cluster: BedCluster, reports: Reports, vehicle: str) -> None:
    """On a GPU node at work the rogue code finds nothing of the custodian or of any lease, in a GPU actor neither."""
    report = reports(vehicle, GPU)

    ran_caged(cluster, report, GPU)
    assert report["got"] == []
    if vehicle == "ray_call":
        assert report["actor"] == "GpuActor"


def test_gpu_node_without_cage(cluster: BedCluster, plain: Callable[[str], Plain]) -> None:
    """Control: on the same host, without a cage, the same code gets all of it."""
    control = plain(GPU)
    report = control.job.vehicle("task", control.node, gpu_targets(cluster))

    assert report["node"] == control.node
    assert set(report["got"]) == EVERYTHING_ON_A_GPU_NODE, report["refused"]


# -- speaking to the custodian -----------------------------------------------------------------------


class Asked:
    """A lease that the rogue asks a custodian for, as an actor does, with a key that the zone's gateway had wrapped."""

    def __init__(self, cluster: BedCluster, rogue: RogueJob) -> None:
        self._cluster, self._rogue = cluster, rogue
        self._connections = iter(range(secrets.randbits(40), 1 << 50))
        self.connection = next(self._connections)
        self.not_after = int(time.time()) + 300
        self.lease = lease_name(secrets.token_bytes(8), self.not_after)
        offered = self.ask(op="offer")["offer"]
        lists = {name: tuple(offered[name]) for name in ("degradations", "environments")}
        self.offer = Offer(**{**offered, **lists})

    def terms(self, **changes: Any) -> Grant:
        """Return terms that answer the offer."""
        fields = {
            "zone": "clinic", "lease": self.lease, "node": GPU, "pool": "shared",
            "offer_digest": digest(self.offer.document()), "exchange_key": ExchangeKey().public_hex,
            "accepted_degradations": self.offer.degradations, "padding": Padding.FINE,
            "environment": self.offer.environments[0], "gpu_milli": 1, "memory_bytes": 1 << 30,
            "policy_digest": "0" * 64, "not_after": self.not_after,
        }  # fmt: skip
        return Grant(**{**fields, **changes})

    def wrap(self, grant: Grant) -> str:
        """Have the gateway's login wrap a data key for terms."""
        command = ["python", "-c", WRAP, self._cluster.vault, VAULT_CA, GATEWAY_CREDENTIALS]
        asked = json.dumps([grant.zone, GPU, self.lease, grant.digest()])
        return self._cluster.bed[ZONE].run(command, text=asked).stdout.strip()

    def grant(self, grant: Grant, wrapped: str, *, elsewhere: bool = False) -> Any:
        """Hand terms and key to the custodian; return ``True``, or its error's name."""
        message = {"op": "grant", "grant": grant.document(), "wrapped": wrapped}
        answer = self.ask(connection=next(self._connections) if elsewhere else self.connection, **message)
        return True if answer["ok"] else answer["error"]["error"]

    def ask(self, connection: int | None = None, **request: Any) -> Any:
        """Ask the custodian, on the lease's connection unless another is named."""
        return self._rogue.ask(GPU, connection or self.connection, **{"lease": self.lease, **request})


def test_key_opens_once(cluster: BedCluster, rogue: RogueJob) -> None:
    """From a rogue job, too, a wrapped key opens once: not again, and not on another connection, offered for or not.

    Control: the first time it opens.
    """
    asked = Asked(cluster, rogue)
    grant = asked.terms()
    wrapped = asked.wrap(grant)

    assert asked.grant(grant, wrapped, elsewhere=True) == "GrantRefusedError"
    assert asked.grant(grant, wrapped) is True
    assert asked.grant(grant, wrapped) == "GrantRefusedError"
    assert asked.grant(grant, wrapped, elsewhere=True) == "GrantRefusedError"
    assert asked.ask(op="offer")["error"]["error"] == "GrantRefusedError"


@pytest.mark.parametrize("name", ["not_after", "memory_bytes", "gpu_milli", "exchange_key"])
def test_key_opens_for_its_terms_alone(cluster: BedCluster, rogue: RogueJob, name: str) -> None:
    """A key that was wrapped for terms opens for no others, and then no more for its own."""
    asked = Asked(cluster, rogue)
    grant = asked.terms()
    other = asked.terms(**{"exchange_key": grant.exchange_key, name: _another(grant, name)})
    wrapped = asked.wrap(grant)

    assert asked.grant(other, wrapped) == "VaultDeniedError"
    assert asked.grant(grant, wrapped) == "GrantRefusedError"


def _another(grant: Grant, name: str) -> Any:
    return ExchangeKey().public_hex if name == "exchange_key" else getattr(grant, name) + 1


FORBIDDEN: dict[str, dict[str, Any]] = {
    "more memory than the pool gives": {"memory_bytes": (64 << 30) + 1},
    "another pool": {"pool": "other"},
    "another node": {"node": ATTACKER},
    "longer than any lease": {"not_after": int(time.time()) + 48 * 3600},
    "more GPU than there is": {"gpu_milli": 1001},
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden_grant(cluster: BedCluster, rogue: RogueJob, what: str) -> None:
    """Terms that the pool's policy or the custodian forbids are refused although the key was wrapped for just these."""
    asked = Asked(cluster, rogue)
    grant = asked.terms(**FORBIDDEN[what])

    assert asked.grant(grant, asked.wrap(grant)) == "GrantRefusedError"


def test_keys_of_vault_are_on_its_own_host(cluster: BedCluster) -> None:
    """Not even root of another host has Vault's data, or the key that unseals it. Control: on Vault's host root has."""
    command = [
        "find",
        "/var/lib/ray-gpu",
        "/etc/ray-gpu",
        "/run",
        "/root",
        "-name",
        "unseal.key",
        "-o",
        "-name",
        "raft",
    ]
    found = {host.name: host.run(command, check=False).stdout.split() for host in cluster.bed}

    assert any(path.endswith("unseal.key") for path in found.pop("vault"))
    assert not any(found.values()), found
