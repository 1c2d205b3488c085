"""The network of a cage on a host of a bed: a host has one, and nothing of it is left when it could not be made."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from ray_gpu import cage_net
from testbed import Host, Testbed

TIMEOUT_S = 60.0
#: Connects a new network namespace as a cage's; says "connected" or why not, and kills it when told.
CAGE = """
import ctypes, subprocess, sys
from ray_gpu import cage_net
from ray_gpu.ports import Role
from zones.errors import ClusterError
cage_net._GONE_TIMEOUT_S = float(sys.argv[2])
network = cage_net.CageNetwork.of(Role.GPU, sys.argv[1], ["198.18.0.0/15"])
cage = subprocess.Popen(["sleep", "infinity"], preexec_fn=lambda: ctypes.CDLL(None).unshare(0x40000000))
try:
    cage_net.connect(network, cage.pid)
    print("connected", flush=True)
    if sys.stdin.readline() == "remove\\n":
        cage_net.remove(network)
        cage_net.remove(network)
except ClusterError as error:
    print(error.message)
finally:
    cage.kill()
"""


@pytest.fixture
def host(can_build: None) -> Iterator[Host]:
    """A GPU host of a bed of its own: these tests break it."""
    with Testbed() as bed:
        yield bed["gpu-1"]


def start(host: Host, *, address: str = "", timeout_s: float = 20.0) -> tuple[subprocess.Popen[str], str]:
    """Connect a stand-in for a cage; return its process and what it says."""
    pipe = subprocess.PIPE
    command = ["python", "-c", CAGE, address or host.address, str(timeout_s)]
    process = host.popen(command, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def refusal(host: Host, *, address: str = "", timeout_s: float = 20.0) -> str:
    """Try to connect a stand-in for a cage, and return why it was refused."""
    process, said = start(host, address=address, timeout_s=timeout_s)
    process.communicate("", TIMEOUT_S)
    return said


def left(host: Host) -> str:
    """Return what a host has of a cage's network: link, table, forwarding."""
    script = (
        "ip -o link show | grep -o ray-cage; nft list tables | grep -o ray_gpu_cage; "
        "cat /proc/sys/net/ipv4/conf/eth0/forwarding"
    )
    return " ".join(host.run(["sh", "-c", script]).stdout.split())


def test_one_cage(host: Host) -> None:
    """A second cage is refused and does not disturb the first; when that is killed, the next one takes its place."""
    first, said = start(host)
    assert (said, left(host)) == ("connected", "ray-cage ray_gpu_cage 1")
    rules = host.run(["nft", "list", "table", "inet", cage_net.TABLE]).stdout
    assert "another node has its cage on this host" in refusal(host, timeout_s=0.1)
    assert host.run(["nft", "list", "table", "inet", cage_net.TABLE]).stdout == rules
    first.communicate("", TIMEOUT_S)  # kills its cage and cleans nothing up

    third, said = start(host)
    assert said == "connected"
    third.communicate("remove\n", TIMEOUT_S)
    assert left(host) == "0"


def test_nothing_half_made(host: Host) -> None:
    """A cage that cannot be connected leaves no link, no rules, and a host that passes nothing on."""
    assert "no interface of this host has the address 198.18.2.99" in refusal(host, address="198.18.2.99")
    assert left(host) == "0"

    host.run(["sh", "-euc", "printf '#!/bin/sh\\nexit 1\\n' >/tmp/nsenter; chmod +x /tmp/nsenter"])
    host.run(["mount", "--bind", "/tmp/nsenter", "/usr/bin/nsenter"])
    assert "nsenter failed: exit status 1" in refusal(host)
    assert left(host) == "0"


def test_a_host_that_routes(host: Host) -> None:
    """A host that passes packets on anyway goes on doing so, with a cage and after it."""
    host.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"])
    process, said = start(host)
    assert said == "connected"
    assert 'iifname "eth0" drop' not in host.run(["nft", "list", "table", "inet", cage_net.TABLE]).stdout
    process.communicate("remove\n", TIMEOUT_S)

    assert left(host) == "1"
