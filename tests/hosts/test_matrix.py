"""Between hosts, exactly the declared flows get through: every pair, TCP, UDP and ICMP, IPv4 and IPv6, whoever it is.

Hosts of the cluster have stand-ins for cages: network namespaces that are connected as a cage's is, but to every host
of the bed, so that the firewall alone tells them apart.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

from ray_gpu import cage_net
from ray_gpu.ports import (
    FORWARDER_UID,
    GATEWAY_UID,
    TABLE,
    End,
    Role,
    allowed,
    cage_serves,
    flows,
    host_rules,
    router_rules,
)
from testbed import Host, HostProcess, Testbed

PROBER = Path(__file__).with_name("prober.py")
#: Nobody's: what is next to declared ranges, what Ray opens by default, and what hosts often have.
UNDECLARED = (21, 23, 53, 80, 443, 6379, 8199, 8201, 8265, 10001, 25999, 26002, 44217, 44227, 52365)
UNDECLARED_NEAR = (26009, 26013, 26014, 26015, 26019, 26210)
#: Root, the gateway, the forwarder, and a cage's uid outside of the cage; all but root only where they live.
UIDS = (0, GATEWAY_UID, FORWARDER_UID, 61003)
OPENERS = (*UIDS, End.CAGE)
TIMEOUT_S = 60.0
#: Makes a network namespace and connects it as a cage's; says a process id in it, and removes it with standard input.
CAGE = """
import ctypes, subprocess, sys
from ray_gpu import cage_net
from ray_gpu.ports import Role
network = cage_net.CageNetwork.of(Role(sys.argv[1]), sys.argv[2], ["198.18.0.0/15"], ssh=["198.18.0.0/15"])
cage = subprocess.Popen(["sleep", "infinity"], preexec_fn=lambda: ctypes.CDLL(None).unshare(0x40000000))
try:
    cage_net.connect(network, cage.pid)
    print(cage.pid, flush=True)
    sys.stdin.read()
finally:
    cage.kill()
    cage.wait()
    cage_net.remove(network)
"""
#: Of a cage's own rules, leaves the translation of addresses alone.
CAGE_OPEN = f"flush chain inet {cage_net.TABLE} forward\nflush chain inet {cage_net.TABLE} input\n"


class Probe(NamedTuple):
    """One attempt."""

    source: str
    #: A uid of the host, or its cage.
    opener: int | End
    protocol: str
    family: int
    destination: str
    port: int


#: For what a firewall remembers of a probe; nobody serves these ports.
_numbers = itertools.count(20000)
#: Says whether a probe shall get through.
Oracle = Callable[[Probe], bool]


@dataclass(frozen=True, slots=True)
class Site:
    """The bed, with cages: by host, the id of a process in each, as that host counts."""

    bed: Testbed
    cages: dict[str, int]

    def command(self, host: str, opener: int | End, command: list[str | Path]) -> list[str | Path]:
        """Return the command that runs another one in a host, or in its cage."""
        return [*(["nsenter", f"--target={self.cages[host]}", "--net", "--"] if opener is End.CAGE else []), *command]

    def load(self) -> None:
        """Load every declared rule."""
        self.bed.load_firewalls()
        for name in self.cages:
            host = self.bed[name]
            host.load_rules(cage_net.rules(_network(host, self.bed.roles[name]), outside="eth0", routes=False))

    def open_cages(self) -> None:
        """Take what cages' own rules drop away: the addresses are still translated."""
        for name in self.cages:
            self.bed[name].load_rules(CAGE_OPEN)

    def open_host(self, host: Host) -> None:
        """Take a host's rules away."""
        host.load_rules(f"delete table inet {TABLE}\n")


def _network(host: Host, role: Role) -> cage_net.CageNetwork:
    return cage_net.CageNetwork.of(role, host.address, ["198.18.0.0/15"], ssh=["198.18.0.0/15"])


@pytest.fixture(scope="module")
def site(bed: Testbed) -> Iterator[Site]:
    """The bed with its cages."""
    pipe = subprocess.PIPE
    started = {
        host.name: host.popen(["python", "-c", CAGE, bed.roles[host.name].value, host.address], stdin=pipe, stdout=pipe)
        for host in bed
        if cage_serves(bed.roles[host.name])
    }
    try:
        yield Site(bed, {name: int(_said(process)) for name, process in started.items()})
    finally:
        for process in started.values():
            process.communicate("", TIMEOUT_S)


def _said(process: HostProcess) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture(scope="module")
def listening(site: Site) -> Iterator[Site]:
    """The same, with a listener on every probed port of every host and cage."""
    started = [_listen(site, host.name, 0) for host in site.bed]
    started += [_listen(site, name, End.CAGE) for name in site.cages]
    try:
        for process in started:
            assert _said(process) == "ready"
        yield site
    finally:
        for process in started:
            process.communicate("", TIMEOUT_S)


@pytest.fixture
def own_rules(listening: Site) -> Iterator[Site]:
    """The same, for a test that changes rules: the declared ones are back afterwards."""
    yield listening
    listening.load()


@pytest.fixture(scope="module")
def outcome(listening: Site) -> list[tuple[Probe, bool]]:
    """What came of every probe under the declared rules."""
    return results(listening)


def test_matrix(listening: Site, outcome: list[tuple[Probe, bool]]) -> None:
    """What gets through is what is declared: no more, no less."""
    assert differences(outcome, declared(listening)) == []


def test_everything_without_rules(own_rules: Site) -> None:
    """Control: without rules, every one of these probes gets through."""
    own_rules.open_cages()
    for host in (own_rules.bed.router, *own_rules.bed):
        own_rules.open_host(host)

    assert differences(results(own_rules), lambda probe: True) == []


@pytest.mark.parametrize("lost", ["input", "output"])
def test_hosts_alone(own_rules: Site, lost: str) -> None:
    """What hosts may open suffices alone, and so does what they accept; but who accepts cannot tell who it is."""
    own_rules.open_cages()
    own_rules.open_host(own_rules.bed.router)
    chain = "to_cage" if lost == "input" else "from_cage"
    for host in own_rules.bed:
        host.load_rules(
            f"flush chain inet {TABLE} {lost}\ndelete chain inet {TABLE} {lost}\n"
            f"flush chain inet {TABLE} {chain}\nadd rule inet {TABLE} {chain} accept\n"
        )
    expected = declared(own_rules)

    assert differences(results(own_rules), expected if lost == "input" else of_anybody(expected)) == []


def test_router_alone(own_rules: Site) -> None:
    """The router's rules suffice, should every host's be lost; but it cannot tell who it is."""
    own_rules.open_cages()
    for host in own_rules.bed:
        own_rules.open_host(host)

    assert differences(results(own_rules), of_anybody(declared(own_rules))) == []


def test_zones_are_closed(outcome: list[tuple[Probe, bool]]) -> None:
    """A zone in client mode accepts no connection at all, and a zone reaches no other zone and no SSH."""
    through = [probe for probe, answered in outcome if answered]

    assert through != []
    assert [probe for probe in through if probe.destination == "zone-trading"] == []
    assert [probe for probe in through if probe.source[:4] == probe.destination[:4] == "zone"] == []
    assert [probe for probe in through if "zone" in probe.source + probe.destination and probe.port == 22] == []


def test_rules_are_loaded_as_a_whole(own_rules: Site) -> None:
    """Loading rules again replaces them, and a file with an error changes nothing."""
    host = own_rules.bed["gpu-1"]
    known = own_rules.bed.firewall_hosts()
    before = host.run(["nft", "list", "table", "inet", TABLE]).stdout
    host.load_rules(host_rules(Role.GPU, known))
    assert host.run(["nft", "list", "table", "inet", TABLE]).stdout == before

    broken = router_rules(known).replace("policy drop", "policy nonsense")
    host.run(["nft", "--file", "-"], text=broken, check=False)

    assert host.run(["nft", "list", "table", "inet", TABLE]).stdout == before


# -- probing ----------------------------------------------------------------------------------------


def probed_ports() -> list[int]:
    """Return both ends and the middle of every declared range, and a sample of other ports."""
    ends = {port for flow in flows() for port in (*flow.ports, sum(flow.ports) // 2)}
    return sorted({*ends, *UNDECLARED, *UNDECLARED_NEAR})


def declared(site: Site) -> Oracle:
    """Return what the declaration says: TCP alone."""
    roles = site.bed.roles
    return lambda probe: (
        probe.protocol == "tcp"
        and allowed(roles[probe.source], roles[probe.destination], probe.port, probe.opener, version=probe.family)
    )


def of_anybody(expected: Oracle) -> Oracle:
    """Return what is expected where nobody looks at who on a host it is."""
    return lambda probe: any(expected(probe._replace(opener=opener)) for opener in OPENERS)


def differences(outcome: list[tuple[Probe, bool]], expected: Oracle) -> list[str]:
    """Return what did not go as expected."""
    found = [(probe, answered) for probe, answered in outcome if answered is not expected(probe)]
    return [f"{probe} {'got through' if answered else 'did not get through'}" for probe, answered in found]


def results(site: Site) -> list[tuple[Probe, bool]]:
    """Probe from every host, as every uid that lives there and from its cage, to every other host, all at once."""
    running = []
    for host in site.bed:
        openers: list[int | End] = list(UIDS if site.bed.roles[host.name].is_zone() else UIDS[:1])
        for opener in [*openers, *([End.CAGE] if host.name in site.cages else [])]:
            probes = list(_probes(site.bed, host.name, opener))
            running.append((probes, _start(site, host.name, "probe", opener), _targets(site.bed, probes)))
    for _, process, targets in running:
        assert process.stdin is not None
        process.stdin.write(f"{json.dumps(targets)}\n")
        process.stdin.flush()
    found: list[tuple[Probe, bool]] = []
    for probes, process, _ in running:
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, err
        found += zip(probes, json.loads(out), strict=True)
    return found


def _probes(bed: Testbed, source: str, opener: int | End) -> Iterator[Probe]:
    # A cage has no IPv6 at all; tests/hosts/test_cluster.py tries it.
    for destination, family in product(
        [name for name in bed.hosts if name != source], (4, 6)[: 1 + (opener is not End.CAGE)]
    ):
        for protocol, port in product(("tcp", "udp"), probed_ports()):
            yield Probe(source, opener, protocol, family, destination, port)
        if opener in (0, End.CAGE):  # raw sockets are root's, which this cage's prober is
            yield Probe(source, opener, "icmp", family, destination, 0)


def _targets(bed: Testbed, probes: list[Probe]) -> list[tuple[str, str, int]]:
    hosts = bed.hosts
    return [
        (p.protocol, hosts[p.destination].address if p.family == 4 else hosts[p.destination].address6, p.port)
        for p in probes
    ]


def _listen(site: Site, name: str, opener: int | End) -> HostProcess:
    process = _start(site, name, "listen", opener, stderr=None)
    assert process.stdin is not None
    process.stdin.write(f"{json.dumps(probed_ports())}\n")
    process.stdin.flush()
    return process


def _start(
    site: Site, name: str, action: str, opener: int | End, *, stderr: int | None = subprocess.PIPE
) -> HostProcess:
    prober: list[str | Path] = [Path(sys.executable).resolve(), "-I", "-S", PROBER, action, str(next(_numbers))]
    command = site.command(name, opener, prober)
    uid = opener if isinstance(opener, int) and opener else None
    pipe = subprocess.PIPE
    return site.bed[name].popen(command, uid=uid, stdin=pipe, stdout=pipe, stderr=stderr)
