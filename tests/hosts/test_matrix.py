"""Between hosts, exactly the declared flows get through: every pair, TCP, UDP and ICMP, IPv4 and IPv6, every uid."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

from ray_gpu.ports import FORWARDER_UID, GATEWAY_UID, TABLE, Role, allowed, flows, host_rules, router_rules
from testbed import HostProcess, Testbed

PROBER = Path(__file__).with_name("prober.py")
#: Nobody's: what is next to declared ranges, what Ray opens by default, and what hosts often have.
UNDECLARED = (21, 23, 53, 80, 443, 6379, 8199, 8201, 8265, 10001, 25999, 26002, 52365)
UNDECLARED_NEAR = (26009, 26013, 26014, 26015, 26019, 26210)
#: Root, the gateway, the forwarder, and a cage; all but root only where they live.
UIDS = (0, GATEWAY_UID, FORWARDER_UID, 61003)
TIMEOUT_S = 60.0


class Probe(NamedTuple):
    """One attempt."""

    source: str
    uid: int
    protocol: str
    family: int
    destination: str
    port: int


#: Says whether a probe shall get through.
Oracle = Callable[[Probe], bool]


@pytest.fixture(scope="module")
def listening(bed: Testbed) -> Iterator[Testbed]:
    """The bed, with a listener on every probed port of every host."""
    started = [(host, _listen(bed, host.name)) for host in bed]
    try:
        for _, process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield bed
    finally:
        for _, process in started:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture
def own_rules(listening: Testbed) -> Iterator[Testbed]:
    """The same, for a test that changes rules: the declared ones are back afterwards."""
    yield listening
    listening.load_firewalls()


@pytest.fixture(scope="module")
def outcome(listening: Testbed) -> list[tuple[Probe, bool]]:
    """What came of every probe under the declared rules."""
    return results(listening)


def test_matrix(listening: Testbed, outcome: list[tuple[Probe, bool]]) -> None:
    """What gets through is what is declared: no more, no less."""
    assert differences(outcome, declared(listening)) == []


def test_everything_without_rules(own_rules: Testbed) -> None:
    """Control: without rules, every one of these probes gets through."""
    for host in (own_rules.router, *own_rules):
        host.flush_rules()

    assert differences(results(own_rules), lambda probe: True) == []


@pytest.mark.parametrize("lost", ["input", "output"])
def test_hosts_alone(own_rules: Testbed, lost: str) -> None:
    """What hosts may open suffices alone, and so does what they accept; but who accepts cannot tell uids."""
    own_rules.router.flush_rules()
    for host in own_rules:
        host.load_rules(f"flush chain inet {TABLE} {lost}\ndelete chain inet {TABLE} {lost}\n")
    expected = declared(own_rules)

    assert differences(results(own_rules), expected if lost == "input" else of_any_uid(expected)) == []


def test_router_alone(own_rules: Testbed) -> None:
    """The router's rules suffice, should every host's be lost; but it cannot tell uids."""
    for host in own_rules:
        host.flush_rules()

    assert differences(results(own_rules), of_any_uid(declared(own_rules))) == []


def test_zones_are_closed(outcome: list[tuple[Probe, bool]]) -> None:
    """A zone in client mode accepts no connection at all, and a zone reaches no other zone and no SSH."""
    through = [probe for probe, answered in outcome if answered]

    assert through != []
    assert [probe for probe in through if probe.destination == "zone-trading"] == []
    assert [probe for probe in through if probe.source[:4] == probe.destination[:4] == "zone"] == []
    assert [probe for probe in through if "zone" in probe.source + probe.destination and probe.port == 22] == []


def test_rules_are_loaded_as_a_whole(own_rules: Testbed) -> None:
    """Loading rules again replaces them, and a file with an error changes nothing."""
    host = own_rules["gpu-1"]
    known = own_rules.firewall_hosts()
    before = host.run(["nft", "list", "ruleset"]).stdout
    host.load_rules(host_rules(Role.GPU, known))
    assert host.run(["nft", "list", "ruleset"]).stdout == before

    broken = router_rules(known).replace("policy drop", "policy nonsense")
    host.run(["nft", "--file", "-"], text=broken, check=False)

    assert host.run(["nft", "list", "ruleset"]).stdout == before


# -- probing ----------------------------------------------------------------------------------------


def probed_ports() -> list[int]:
    """Return both ends and the middle of every declared range, and a sample of other ports."""
    ends = {port for flow in flows() for port in (*flow.ports, sum(flow.ports) // 2)}
    return sorted({*ends, *UNDECLARED, *UNDECLARED_NEAR})


def declared(bed: Testbed) -> Oracle:
    """Return what the declaration says: TCP alone, the same for both IP versions."""
    return lambda probe: (
        probe.protocol == "tcp"
        and allowed(bed.roles[probe.source], bed.roles[probe.destination], probe.port, probe.uid)
    )


def of_any_uid(expected: Oracle) -> Oracle:
    """Return what is expected where nobody looks at the uid."""
    return lambda probe: any(expected(probe._replace(uid=uid)) for uid in UIDS)


def differences(outcome: list[tuple[Probe, bool]], expected: Oracle) -> list[str]:
    """Return what did not go as expected."""
    found = [(probe, answered) for probe, answered in outcome if answered is not expected(probe)]
    return [f"{probe} {'got through' if answered else 'did not get through'}" for probe, answered in found]


def results(bed: Testbed) -> list[tuple[Probe, bool]]:
    """Probe from every host, as every uid that lives there, to every other host, all at the same time."""
    running = []
    for host in bed:
        for uid in UIDS if bed.roles[host.name].is_zone() else UIDS[:1]:
            probes = list(_probes(bed, host.name, uid))
            running.append((probes, _start(bed, host.name, "probe", uid), _targets(bed, probes)))
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


def _probes(bed: Testbed, source: str, uid: int) -> Iterator[Probe]:
    for destination, family in product([name for name in bed.hosts if name != source], (4, 6)):
        for protocol, port in product(("tcp", "udp"), probed_ports()):
            yield Probe(source, uid, protocol, family, destination, port)
        if uid == 0:  # raw sockets are root's
            yield Probe(source, uid, "icmp", family, destination, 0)


def _targets(bed: Testbed, probes: list[Probe]) -> list[tuple[str, str, int]]:
    hosts = bed.hosts
    return [
        (p.protocol, hosts[p.destination].address if p.family == 4 else hosts[p.destination].address6, p.port)
        for p in probes
    ]


def _listen(bed: Testbed, name: str) -> HostProcess:
    process = _start(bed, name, "listen", 0, stderr=None)
    assert process.stdin is not None
    process.stdin.write(f"{json.dumps(probed_ports())}\n")
    process.stdin.flush()
    return process


def _start(bed: Testbed, name: str, action: str, uid: int, *, stderr: int | None = subprocess.PIPE) -> HostProcess:
    command: list[str | Path] = [Path(sys.executable).resolve(), "-I", "-S", PROBER, action]
    pipe = subprocess.PIPE
    return bed[name].popen(command, uid=uid or None, stdin=pipe, stdout=pipe, stderr=stderr)
