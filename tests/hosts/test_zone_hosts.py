"""Hosts of one zone reach one another on the ports of its private Ray; nobody else does, their own Ray cages included.

A bed of its own, with two hosts of one zone and one of another; :mod:`tests.hosts.test_two_hosts` has the real Ray.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from ray_gpu.cage_net import HOST_END
from ray_gpu.ports import GATEWAY_UID, PRIVATE_PORTS, Role, cage_serves
from testbed import HostProcess, Testbed
from testbed.cluster import PERSON_UID
from tests.hosts.test_matrix import CAGE, CAGE_OPEN, PROBER

ROLES = {
    "head": Role.HEAD,
    "gpu-1": Role.GPU,
    "zone-clinic": Role.EDGE_ZONE,
    "zone-clinic-2": Role.EDGE_ZONE,
    "zone-lab": Role.EDGE_ZONE,
    "zone-trading": Role.CLIENT_ZONE,
    "vault": Role.VAULT,
    "operator": Role.OPERATOR,
}
CLINIC = ("zone-clinic", "zone-clinic-2")
#: Both ends of each range; and what Ray opens besides, for its own host alone: Ray Client, metrics and agents.
DECLARED = (PRIVATE_PORTS.gcs, *(port for span, _ in PRIVATE_PORTS.services for port in span))
OWN = (PRIVATE_PORTS.client, *range(PRIVATE_PORTS.first + 3, PRIVATE_PORTS.first + 6), PRIVATE_PORTS.first + 110)
TIMEOUT_S = 60.0


class Place(NamedTuple):
    """Where somebody is."""

    host: str
    #: ``"cage"``, or a uid of the host.
    who: str | int


Reached = set[tuple[Place, str, int]]


class Site:
    """A bed whose hosts have cages and where the clinic's hosts serve all of these ports."""

    def __init__(self, bed: Testbed, cages: dict[str, int]) -> None:
        self.bed, self._cages = bed, cages

    def places(self) -> list[Place]:
        """Return everybody who tries."""
        uids = {name: (0, PERSON_UID, GATEWAY_UID) if ROLES[name].is_zone() else (0,) for name in ROLES}
        return [Place(name, uid) for name, some in uids.items() for uid in some] + [
            Place(name, "cage") for name in self._cages
        ]

    def reached(self) -> Reached:
        """Return who is served by which of the clinic's hosts on which port, by whichever address."""
        with ThreadPoolExecutor(8) as several:
            return set().union(*several.map(self._reached, self.places()))

    def _reached(self, place: Place) -> Reached:
        caged = place.who == "cage"
        targets = [
            (name, address, port)
            for name in CLINIC
            for address in self._addresses(place, name)
            for port in (*DECLARED, *OWN)
        ]
        enter = ["nsenter", f"--target={self._cages[place.host]}", "--net", "--"] if caged else []
        done = self.bed[place.host].run(
            [*enter, "python", "-I", "-S", PROBER, "reach"],
            uid=place.who if isinstance(place.who, int) and place.who else None,
            text=json.dumps([("tcp", address, port) for _, address, port in targets]) + "\n",
        )
        found = zip(targets, json.loads(done.stdout), strict=True)
        return {(place, name, port) for (name, _, port), served in found if served}

    def _addresses(self, place: Place, name: str) -> list[str]:
        host = self.bed[name]
        if place.who != "cage":
            return [host.address, host.address6]
        # The address of its own host is also the cage's; the host is at the other end of the link.
        return [HOST_END] if place.host == name else [host.address]


@pytest.fixture(scope="module")
def site(can_build: None) -> Iterator[Site]:
    """The bed, with the declared rules."""
    pipe = subprocess.PIPE
    with Testbed(ROLES) as bed:
        caged = [name for name, role in ROLES.items() if cage_serves(role)]
        started = {
            name: bed[name].popen(["python", "-c", CAGE, ROLES[name].value, bed[name].address], stdin=pipe, stdout=pipe)
            for name in caged
        }
        listeners = [
            bed[name].popen(["python", "-I", "-S", PROBER, "listen"], stdin=pipe, stdout=pipe) for name in CLINIC
        ]
        try:
            for listener in listeners:
                assert listener.stdin is not None
                listener.stdin.write(f"{json.dumps([*DECLARED, *OWN])}\n")
                listener.stdin.flush()
            cages = {name: int(_said(process)) for name, process in started.items()}
            assert [_said(listener) for listener in listeners] == ["ready\n"] * 2
            yield Site(bed, cages)
        finally:
            for process in (*started.values(), *listeners):
                process.communicate("", TIMEOUT_S)


def _said(process: HostProcess) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _own(site: Site) -> Reached:
    """Return what a host's own people reach of it, which no firewall is about."""
    return {
        (place, place.host, port)
        for place in site.places()
        if place.host in CLINIC and place.who != "cage"
        for port in (*DECLARED, *OWN)
    }


def test_only_the_zones_hosts(site: Site) -> None:
    """The zone's other host reaches the declared ports and no others; no other zone, head, GPU host or cage any."""
    neighbours = {
        (Place(source, uid), destination, port)
        for source, destination in (CLINIC, CLINIC[::-1])
        for uid in (0, PERSON_UID, GATEWAY_UID)
        for port in DECLARED
    }

    assert site.reached() == _own(site) | neighbours


def test_a_cage_alone(site: Site) -> None:
    """With every firewall off each host reaches all of it, and no cage any of it; without the cages' rules they do."""
    everything = {(place, name, port) for place in site.places() for name in CLINIC for port in (*DECLARED, *OWN)}
    of_cages = {found for found in everything if found[0].who == "cage"}
    for host in (site.bed.router, *site.bed):
        host.flush_rules()
    try:
        assert site.reached() == everything - of_cages
        for name in {place.host for place, _, _ in of_cages}:
            site.bed[name].load_rules(CAGE_OPEN)
        assert site.reached() == everything
    finally:
        site.bed.load_firewalls()
