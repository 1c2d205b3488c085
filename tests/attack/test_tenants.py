"""Section 6, tenants: two zones on one GPU node, at the same time and one right after the other, do not meet."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest

from testbed import Host
from testbed.cluster import GATEWAY_CREDENTIALS, NODE_CREDENTIALS, VAULT_CA, BedCluster
from tests.attack.rogue_job import masked, probe_code

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

CANARIES = {zone: f"tenant-{zone}-{secrets.token_hex(8)}" for zone in ("clinic", "trading")}
#: Has the sandbox of each of some leases keep a canary, and does it again whenever it is told to. Says which leases it
#: has, and at the end their receipts.
TENANT = """
import itertools
CANARY, LEASES = {canary!r}, {leases}
@ray_gpu.gpu_remote(num_gpus=0.5)
def keep(text):
    import builtins, time
    builtins.kept = text + "-kept"
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        pass
    return len(text)
with attach() as zone:
    for line in itertools.chain(["first"], sys.stdin):
        for call in [keep.remote(CANARY) for _ in range(LEASES)]:
            call.result()
        print(json.dumps(zone.status()["leases"]), flush=True)
print(json.dumps(zone.receipts), flush=True)
"""
#: Says of each process of a lease on this host what it is, its ids, what memory it shares, and whose canaries it has.
LOOK = """
import json, pathlib, re, sys
space = {}
code, canaries = json.load(sys.stdin)
exec(code, space)
found = []
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        words = (process / "cmdline").read_bytes().split(b"\\0")
        kind = next((k for k in ("keeper", "sandbox.child") if f"ray_gpu.{k}".encode() in words), None)
        if kind is None or b"bwrap" in words[0]:
            continue
        groups = (process / "cgroup").read_text()
        maps = [line.split() for line in (process / "maps").read_text().splitlines()]
        found.append({
            "kind": kind, "pid": int(process.name), "uid": process.stat().st_uid,
            "lease": re.search("([0-9a-f]{16}-[0-9]{10})", groups)[1],
            "pid_namespace": str((process / "ns/pid").readlink()), "ipc": str((process / "ns/ipc").readlink()),
            "shared": sorted({m[3] + ":" + m[4] for m in maps if m[1].startswith("rw-s")}),
            "canaries": sorted(space["found_in_memory"]([int(process.name)], canaries)),
        })
    except (OSError, TypeError):
        continue
print(json.dumps(found))
"""
#: Tries to have Vault unwrap with somebody's login what was wrapped for a lease of the clinic.
UNWRAP = """
import json, sys
from zones.errors import VaultDeniedError
from zones.vault import Vault
address, ca, credentials, lease, node = sys.argv[1:]
login = json.load(open(credentials))
vault = Vault(address, ca_file=ca).login_approle(login["role_id"], login["secret_id"])
wrapped = sys.stdin.read().strip()
try:
    print(len(vault.unwrap("clinic", node, lease, "ab" * 32, wrapped)))
except VaultDeniedError:
    print("denied")
"""
WRAP = """
import json, sys
from zones.vault import Vault
address, ca, credentials, lease, node = sys.argv[1:]
login = json.load(open(credentials))
vault = Vault(address, ca_file=ca).login_approle(login["role_id"], login["secret_id"])
print(vault.data_key("clinic", node, lease, "ab" * 32)[1])
"""

Process = dict[str, Any]


class Tenant:
    """A zone's person at work. Use it as a context manager."""

    def __init__(self, cluster: BedCluster, zone: str, leases: int) -> None:
        self.zone = zone
        self._script = cluster.begin_call(zone, TENANT.format(canary=CANARIES[zone], leases=leases))
        self.leases = self._said()
        self.receipts: list[dict[str, Any]] = []

    def _said(self) -> Any:
        assert self._script.stdout is not None
        line = self._script.stdout.readline()
        assert line, self._script.stderr.read() if self._script.stderr else ""
        return json.loads(line)

    def again(self) -> None:
        """Do the same again, over the same leases."""
        assert self._script.stdin is not None
        self._script.stdin.write("again\n")
        self._script.stdin.flush()
        self.leases = self._said()

    def finish(self) -> None:
        """End the session, and return when it has ended."""
        out, errors = self._script.communicate(timeout=120)
        assert self._script.returncode == 0, errors
        self.receipts = [signed["receipt"] for signed in json.loads(out.splitlines()[-1])]

    def __enter__(self) -> Tenant:
        return self

    def __exit__(self, *_: object) -> None:
        if self._script.poll() is None:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.finish()
        self._script.kill()
        self._script.communicate()

    def on(self, node: str) -> list[str]:
        """Return its leases on a node."""
        return [str(lease["lease"]) for lease in self.leases if lease["node"] == node]


def look(host: Host) -> list[Process]:
    """Return every process of a lease on a host."""
    asked = json.dumps([probe_code(), masked({zone: f"{text}-kept" for zone, text in CANARIES.items()})])
    found: list[Process] = json.loads(host.run(["python", "-c", LOOK], text=asked).stdout)
    return found


def shared(ones: list[Process], others: list[Process]) -> set[str]:
    """Return what processes of one side have in common with those of another."""
    found = set()
    for name in ("pid", "uid", "pid_namespace", "ipc", "lease"):
        if {process[name] for process in ones} & {process[name] for process in others}:
            found.add(name)
    if {place for process in ones for place in process["shared"]} & {
        p for process in others for p in process["shared"]
    }:
        found.add("memory")
    return found


def of(processes: list[Process], leases: list[str]) -> list[Process]:
    """Return the keepers and sandboxes of some leases, which must be whole."""
    found = [process for process in processes if process["lease"] in leases]
    assert {process["kind"] for process in found} == {"keeper", "sandbox.child"}
    return found


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of two zones on one node."""

    node: str
    clinic: list[Process]
    #: The same leases of the clinic, after one more call.
    clinic_again: list[Process]
    #: Of the other zone: at the same time, and on the same node after the clinic had gone.
    trading: list[Process]
    trading_after: list[Process]
    #: Who unwraps the clinic's key.
    unwraps: dict[str, str]
    receipts: list[dict[str, Any]]


@pytest.fixture(scope="module")
def seen(bed_cluster: BedCluster) -> Seen:
    """The clinic on both GPU nodes, trading beside it on one, then trading alone, right afterwards."""
    with Tenant(bed_cluster, "clinic", 2) as clinic:
        with Tenant(bed_cluster, "trading", 1) as trading:
            node = str(trading.leases[0]["node"])
            host = bed_cluster.bed[node]
            first = look(host)
            clinic.again()
            second = look(host)
            lease = clinic.on(node)[0]
            unwraps = who_unwraps(bed_cluster, lease, node)
            mine, theirs = of(first, clinic.on(node)), of(first, trading.on(node))
            again = of(second, clinic.on(node))
        clinic.finish()
    # Both GPU nodes, so that the one where the clinic was is among them.
    with Tenant(bed_cluster, "trading", 2) as after:
        left = [process for process in look(host) if process["lease"] in clinic.on(node)]
        later = of(look(host), after.on(node))
        after.finish()
    assert left == []
    return Seen(node, mine, again, theirs, later, unwraps, [*clinic.receipts, *after.receipts])


def who_unwraps(cluster: BedCluster, lease: str, node: str) -> dict[str, str]:
    """Return what becomes of the clinic's key when each login asks Vault to unwrap a data key that it wrapped."""
    bed = cluster.bed
    arguments = [cluster.vault, VAULT_CA]
    zone = bed["zone-clinic"].run(["python", "-c", WRAP, *arguments, GATEWAY_CREDENTIALS, lease, node])
    logins = {"gpu-1": NODE_CREDENTIALS, "gpu-2": NODE_CREDENTIALS, "zone-trading": GATEWAY_CREDENTIALS}
    return {
        name: bed[name]
        .run(["python", "-c", UNWRAP, *arguments, credentials, lease, node], text=zone.stdout)
        .stdout.strip()
        for name, credentials in logins.items()
    }


def test_at_the_same_time(seen: Seen) -> None:
    """Two zones' leases on one node share no process, uid, namespace, or memory."""
    assert shared(seen.clinic, seen.trading) == set()


def test_right_afterwards(seen: Seen) -> None:
    """Nor does a zone's lease right after another's on the same node."""
    assert shared(seen.clinic, seen.trading_after) == set()


def test_one_lease_is_shared(seen: Seen) -> None:
    """Control: the same look at two calls of one zone over one lease finds that they share all of it."""
    assert shared(seen.clinic, seen.clinic_again) == {"pid", "uid", "pid_namespace", "ipc", "lease", "memory"}
    keepers, sandboxes = ([p for p in seen.clinic if p["kind"] == kind] for kind in ("keeper", "sandbox.child"))
    assert "memory" in shared(keepers, sandboxes)


def test_memory(seen: Seen) -> None:
    """Each zone's canary is in its own sandbox, by the same search, and in none of the other zone's processes."""
    for processes, zone in ((seen.clinic, "clinic"), (seen.trading, "trading"), (seen.trading_after, "trading")):
        assert {name for process in processes for name in process["canaries"]} == {zone}


def test_keys(seen: Seen) -> None:
    """A lease's key is its node's alone: neither the other zone's gateway nor the other node opens it."""
    assert seen.unwraps == {**dict.fromkeys(seen.unwraps, "denied"), seen.node: "32"}


def test_receipts_tell_of_the_scrub(seen: Seen) -> None:
    """Each receipt says what was done to GPU memory before the lease; where NumPy stands in, that there is no GPU."""
    said = {receipt["device"]: receipt["scrub"] for receipt in seen.receipts}

    assert len(seen.receipts) >= 4
    for device, scrub in said.items():
        assert (scrub == "no GPU") is device.startswith("numpy stand-in")
