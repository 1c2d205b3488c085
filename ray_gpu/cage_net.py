"""The network of a host's cage: a link of its own, and rules for what passes over it. Starts ip and nft; needs root.

A cage has a network namespace. Inside, the host's own address is on ``lo``, so that what a node opens to itself stays
there; one link leads to the host. The host hands connections to the cage's ports on, and forwards what the cage opens
to the cluster's networks on Ray's ports. Nothing else passes: not to the host, whatever its address, not to any other
network, no UDP, no ICMP, no IPv6.

The link's name is the claim on it: a host has one cage. It vanishes with the namespace, also when that is killed. The
table is replaced by the next start, and drops meanwhile what it drops now.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_gpu.ports import CAGE_LINK, PORTS, SSH, NodePorts, Role, Span, cage_opens, cage_serves
from zones.errors import ClusterError

#: Name of the nftables table, in the family ``inet``.
TABLE = "ray_gpu_cage"
#: Both ends of the link. Of link-local addresses (RFC 3927), so that no network of a site has them.
HOST_END, CAGE_END = "169.254.77.1", "169.254.77.2"
_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_IPV4_SETTINGS = Path("/proc/sys/net/ipv4/conf")
#: The kernel removes the link of a cage that ended within milliseconds. Seconds.
_GONE_TIMEOUT_S = 10.0
_COMMAND_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Connections that a cage may open."""

    #: IPv4 networks.
    networks: tuple[str, ...]
    ports: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CageNetwork:
    """What one cage may reach, and who may reach what of it."""

    #: The host's IPv4 address in the cluster.
    address: str
    #: IPv4 networks of those who may connect.
    cluster: tuple[str, ...]
    #: Ports of the cage that they, and the host itself, reach at *address*.
    served: tuple[Span, ...]
    opened: tuple[Passage, ...]

    @classmethod
    def of(
        cls, role: Role, address: str, cluster: Sequence[str], *, ssh: Sequence[str] = (), ports: NodePorts = PORTS
    ) -> CageNetwork:
        """Return what is declared for the cage of a host.

        Args:
            role: The host's.
            address: Its own.
            cluster: Networks of the hosts that its cage has to do with.
            ssh: Addresses of those that the autoscaler in it starts.
            ports: Of the cluster's nodes.
        """
        opened = [Passage(networks=tuple(cluster), ports=cage_opens(role, ports))]
        opened += [Passage(networks=tuple(ssh), ports=((SSH, SSH),))] if ssh else []
        return cls(address=address, cluster=tuple(cluster), served=cage_serves(role, ports), opened=tuple(opened))


def rules(network: CageNetwork, *, outside: str, routes: bool) -> str:
    """Return the nftables file of a cage, which replaces the table as a whole. Pure.

    Args:
        network: Of the cage.
        outside: Interface of the host that has its address.
        routes: Whether the host passes packets on anyway; otherwise it does for its cage alone.
    """
    ours = f"ip daddr {network.address} tcp dport {_ports(network.served)}"
    opened = [f"ip daddr {_set(p.networks)} tcp dport {_ports(p.ports)} accept" for p in network.opened]
    taken = f"ip saddr {_set(network.cluster)} ct status dnat tcp dport {_ports(network.served)} accept"
    answers = "ct state established,related accept"
    others = [] if routes else [f'iifname "{outside}" drop']
    chains = {
        "prerouting": [
            "type nat hook prerouting priority dstnat; policy accept;",
            f'iifname != "{CAGE_LINK}" {ours} dnat ip to {CAGE_END}',
        ],
        "output": ["type nat hook output priority -100; policy accept;", f"{ours} dnat ip to {CAGE_END}"],
        "postrouting": [
            "type nat hook postrouting priority srcnat; policy accept;",
            f"ip saddr {CAGE_END} snat ip to {network.address}",
            # What the host opens to its own address would come from that address, which the cage has as well.
            f'oifname "{CAGE_LINK}" ip saddr {network.address} snat ip to {HOST_END}',
        ],
        "from_cage": [answers, *opened, "drop"],
        "to_cage": [answers, taken, "drop"],
        "to_host": [answers, "drop"],
        "forward": [
            "type filter hook forward priority filter; policy accept;",
            f'iifname "{CAGE_LINK}" jump from_cage',
            f'oifname "{CAGE_LINK}" jump to_cage',
            *others,
        ],
        "input": ["type filter hook input priority filter; policy accept;", f'iifname "{CAGE_LINK}" jump to_host'],
    }
    body = [
        f"\tchain {name} {{\n" + "".join(f"\t\t{line}\n" for line in lines) + "\t}" for name, lines in chains.items()
    ]
    return "\n".join([f"table inet {TABLE}", f"delete table inet {TABLE}", f"table inet {TABLE} {{", *body, "}", ""])


def _ports(spans: Sequence[Span]) -> str:
    return _set([str(low) if low == high else f"{low}-{high}" for low, high in spans])


def _set(members: Sequence[str]) -> str:
    return f"{{ {', '.join(dict.fromkeys(members))} }}"


@functools.cache
def lacking() -> str:
    """Return why no cage can have a network of its own here, as a part of a sentence, or ``""``. Changes nothing."""
    if os.geteuid() != 0:
        return "it takes root"
    missing = [name for name in ("ip", "nft", "nsenter") if _find(name) is None]
    if missing:
        return f"{', '.join(missing)} not found"
    if reason := _fails(["nft", "list", "tables"]):
        return f"nft is refused: {reason}"
    settings = _IPV4_SETTINGS / "all/forwarding"
    if settings.read_text(encoding="ascii").strip() == "0" and not os.access(settings, os.W_OK):
        return f"packets are not passed on here, and {settings} cannot be written"
    return ""


def connect(network: CageNetwork, pid: int) -> None:
    """Connect a new network namespace, in which nothing runs yet, to this host.

    Args:
        network: What may pass.
        pid: Of a process in it.

    Raises:
        ClusterError: It was not possible, or another cage has the link. Nothing of ours is left then.
    """
    outside = _interface(network.address)
    _make_link(pid)
    try:
        _require(["nft", "--file", "-"], rules(network, outside=outside, routes=_routes()))
        for name in (CAGE_LINK, outside):
            _forward(name, "1")
        (Path("/proc/sys/net/ipv6/conf") / CAGE_LINK / "disable_ipv6").write_text("1", encoding="ascii")
        _require(["ip", "-batch", "-"], f"addr add {HOST_END}/30 dev {CAGE_LINK}\nlink set {CAGE_LINK} up\n")
        inside = ["nsenter", f"--target={pid}", "--net", "--", "sh", "-euc", _INSIDE, "sh", network.address]
        _require(inside)
    except BaseException:
        remove(network)
        raise


#: Inside the namespace: no IPv6, the host's address, the link, and the ports that listen on that address alone.
_INSIDE = f"""
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6
echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
ip -batch - <<EOF
link set lo up
addr add $1/32 dev lo
addr add {CAGE_END}/30 dev eth0
link set eth0 up
route add default via {HOST_END}
EOF
nft -f - <<EOF
table ip cage {{
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname eth0 ip daddr {CAGE_END} dnat to $1
    }}
}}
EOF
"""


def remove(network: CageNetwork) -> None:
    """Remove link and rules of a cage that was connected, and pass nothing on any more. Idempotent."""
    _fails(["ip", "link", "delete", CAGE_LINK])
    _fails(["nft", "delete", "table", "inet", TABLE])
    with contextlib.suppress(ClusterError, OSError):  # the interface may be gone
        _forward(_interface(network.address), "0")


def _make_link(pid: int) -> None:
    """Make the link; wait for that of a cage that was killed a moment ago.

    Raises:
        ClusterError: Another cage keeps it.
    """
    command = ["ip", "link", "add", CAGE_LINK, "type", "veth", "peer", "name", "eth0", "netns", str(pid)]
    deadline = time.monotonic() + _GONE_TIMEOUT_S
    while reason := _fails(command):
        if not (Path("/sys/class/net") / CAGE_LINK).exists():
            raise _error(f"the link of the cage could not be made: {reason}")
        if time.monotonic() > deadline:
            raise _error("another node has its cage on this host, and a host has one; stop that node")
        time.sleep(0.05)


def _interface(address: str) -> str:
    """Return the interface that has an address.

    Raises:
        ClusterError: None has.
    """
    done = _run(["ip", "-json", "-4", "address", "show"])
    for link in json.loads(done.stdout or "[]"):
        if any(one.get("local") == address for one in link.get("addr_info", [])):
            return str(link["ifname"])
    raise _error(f"no interface of this host has the address {address}; correct it in node.yaml")


def _routes() -> bool:
    """Tell whether this host passes packets on as a whole."""
    return (_IPV4_SETTINGS / "all/forwarding").read_text(encoding="ascii").strip() == "1"


def _forward(interface: str, value: str) -> None:
    if not _routes():
        (_IPV4_SETTINGS / interface / "forwarding").write_text(value, encoding="ascii")


def _require(command: list[str], text: str = "") -> None:
    if reason := _fails(command, text):
        raise _error(f"{command[0]} failed: {reason}")


def _fails(command: list[str], text: str = "") -> str:
    """Run a command; return nothing, or why it failed."""
    try:
        done = _run(command, text)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    said = " ".join(done.stderr.split())[:300]
    return "" if done.returncode == 0 else said or f"exit status {done.returncode}"


def _run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    program = _find(command[0]) or command[0]
    return subprocess.run(
        [program, *command[1:]],
        input=text,
        capture_output=True,
        text=True,
        env={"PATH": _PATH},
        timeout=_COMMAND_TIMEOUT_S,
        check=False,
    )


def _find(name: str) -> str | None:
    return shutil.which(name, path=_PATH)


def _error(text: str) -> ClusterError:
    return ClusterError(f"the cage gets no network of its own: {text}", node="", reason=text)
