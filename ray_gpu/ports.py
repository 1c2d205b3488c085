"""Every flow between hosts, as data, and the firewalls that let these flows through and nothing else. Pure.

Rules:

1. What :func:`flows` does not declare is dropped, by the host that would send it, by the router, and by the host that
   would receive it. Each of the three alone is enough, but for who on a host it is, which only that host knows.
2. Nothing goes into a zone of kind ``client-zone``, from zone to zone, or between a zone and SSH. The hosts of one zone
   reach one another on the ports of its private Ray cluster alone, and nobody else reaches these.
3. Only the gateway's uid leaves an ``edge-zone`` or ``client-zone`` host for data endpoints, and only the forwarder's
   leaves a ``client-zone`` host for Ray.
4. Ray's ports lead into a host's cage, which has a network of its own (:mod:`ray_gpu.cage_net`), and it alone opens
   connections to those of others. The host itself has no part in it but to ask whether somebody is there.

Syntax of the rules: nftables 1.0, ``man nft``.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from zones.errors import UnknownNameError

#: Uids of gateways and of forwarders, where they have one of their own.
GATEWAY_UID, FORWARDER_UID = 61100, 61101
_PROCESSES = {GATEWAY_UID: "gateway", FORWARDER_UID: "forwarder"}
#: The host's end of the link to its cage.
CAGE_LINK = "ray-cage"
#: Lowest and highest of some ports.
Span = tuple[int, int]
#: Each node's share of the port range, from ``base_port + 10`` on.
_PORTS_PER_NODE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePorts:
    """The ports of one node. gRPC listens on every address, so no two nodes share one."""

    gcs: int
    first: int

    @classmethod
    def of(cls, base_port: int, index: int) -> NodePorts:
        """Return the ports of the node with this index in a cluster."""
        return cls(gcs=base_port, first=base_port + 10 + index * _PORTS_PER_NODE)

    @property
    def client(self) -> int:
        """Port of Ray Client's server: the head's, from which every node of a cluster counts."""
        return self.gcs + 1

    @property
    def last_to_open(self) -> int:
        """Port of the runtime-env agent: a raylet joins the cluster once its agents are up."""
        return self.first + 2

    @property
    def endpoints(self) -> str:
        """Ports for data connections, ``"lowest-highest"``."""
        return f"{self.first + 110}-{self.first + 199}"

    @property
    def services(self) -> tuple[tuple[Span, str], ...]:
        """What Ray's nodes open among one another besides the GCS, and what it is."""
        return (
            ((self.first, self.first + 2), "node manager, object manager, runtime-env agent"),
            ((self.first + 10, self.first + 109), "workers"),
        )

    def fixed(self) -> list[int]:
        """Return the ports that must be free at start."""
        return [self.gcs, self.client, *range(self.first, self.first + 6)]

    def flags(self) -> list[str]:
        """Return ``ray start`` flags that leave no port to chance."""
        names = ["node-manager", "object-manager", "runtime-env-agent", "metrics-export"]
        names += ["dashboard-agent-listen", "dashboard-agent-grpc"]
        flags = [f"--{name}-port={self.first + i}" for i, name in enumerate(names)]
        return [*flags, f"--min-worker-port={self.first + 10}", f"--max-worker-port={self.first + 109}"]


#: Ports of a node that has a host to itself.
PORTS = NodePorts.of(26000, 0)
#: Ports of the private Ray cluster that a zone's people may start on its own hosts, and which no other host reaches.
PRIVATE_PORTS = NodePorts.of(26300, 0)
SSH, VAULT = 22, 8200
#: Name of the table, in the family ``inet``. Other tables are left alone.
TABLE = "ray_gpu"


class Role(enum.Enum):
    """What a host is. A zone is of one of two kinds, which zone.yaml calls its carrier."""

    OPERATOR = "operator"
    HEAD = "head"
    GPU = "gpu"
    EDGE_ZONE = "edge-zone"
    CLIENT_ZONE = "client-zone"
    VAULT = "vault"

    def is_zone(self) -> bool:
        """Whether the host is inside a zone's perimeter."""
        return self in (Role.EDGE_ZONE, Role.CLIENT_ZONE)


class End(enum.Enum):
    """Which network of a host opens a connection, or takes it."""

    HOST = "the host"
    CAGE = "the cage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Connections over TCP that hosts of one role may open to those of another. What answers them needs no flow."""

    source: Role
    destination: Role
    ports: Span
    #: What runs over it.
    purpose: str
    opened_by: End = End.HOST
    taken_by: End = End.HOST
    #: The one uid of the host that may open them; ``None`` for any.
    uid: int | None = None
    #: Whether only hosts of one zone may, among themselves.
    within_zone: bool = False

    @property
    def families(self) -> tuple[str, ...]:
        """IP versions, as nftables calls them: a cage has IPv4 alone."""
        return ("ip",) if End.CAGE in (self.opened_by, self.taken_by) else ("ip", "ip6")

    @property
    def opener(self) -> str:
        """Who may open them, in words."""
        return self.opened_by.value if self.uid is None else f"uid {self.uid}, the {_PROCESSES[self.uid]}"

    def port_text(self) -> str:
        """Return ``"22"`` or ``"26020-26119"``."""
        low, high = self.ports
        return str(low) if low == high else f"{low}-{high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FirewallHost:
    """A host as the firewall knows it."""

    name: str
    role: Role
    #: Its IPv4 and IPv6 addresses.
    addresses: tuple[str, ...]
    #: Name of the zone that it is a host of; ``""`` where that is not said, and then no other host is of its zone.
    zone: str = ""


def flows(ports: NodePorts = PORTS) -> tuple[Flow, ...]:
    """Return every flow between hosts. It is the whole of what may be."""
    return (*_administration(), *_vault(), *_ray(ports), *_data(ports), *_private())


def cage_serves(role: Role, ports: NodePorts = PORTS) -> tuple[Span, ...]:
    """Return the ports of a host's cage that others connect to."""
    found = {flow.ports for flow in flows(ports) if flow.destination is role and flow.taken_by is End.CAGE}
    # A port that somebody may also ask for by itself is in a range of others already.
    return tuple(sorted(s for s in found if not any(s != o and o[0] <= s[0] and s[1] <= o[1] for o in found)))


def cage_opens(role: Role, ports: NodePorts = PORTS) -> tuple[Span, ...]:
    """Return the ports of others' cages that a host's cage connects to."""
    found = {f.ports for f in flows(ports) if f.source is role and f.opened_by is f.taken_by is End.CAGE}
    return tuple(sorted(found))


def _one(port: int) -> Span:
    return port, port


def _administration() -> Iterator[Flow]:
    for destination in (Role.HEAD, Role.GPU):
        yield Flow(source=Role.OPERATOR, destination=destination, ports=_one(SSH), purpose="SSH: ray up, ray down")
    purpose = "SSH: the autoscaler starts nodes"
    yield Flow(source=Role.HEAD, destination=Role.GPU, ports=_one(SSH), purpose=purpose, opened_by=End.CAGE)


def _vault() -> Iterator[Flow]:
    for source in (Role.OPERATOR, Role.HEAD, Role.GPU, Role.EDGE_ZONE, Role.CLIENT_ZONE):
        yield Flow(source=source, destination=Role.VAULT, ports=_one(VAULT), purpose="Vault")


def _ray(ports: NodePorts) -> Iterator[Flow]:
    """Yield what Ray's nodes open among one another. Metrics and agents of the dashboard are for nobody: no token."""
    members = (Role.HEAD, Role.GPU, Role.EDGE_ZONE)
    services = tuple((span, f"Ray: {what}") for span, what in ports.services)
    for source, destination in product(members, members):
        if source is destination is not Role.GPU:  # one head; and no zone reaches another
            continue
        gcs = [(_one(ports.gcs), "Ray: GCS")] if destination is Role.HEAD else []
        for span, purpose in (*gcs, *services):
            yield _to_cage(source, destination, span, purpose, End.CAGE)
    for source in (Role.GPU, Role.EDGE_ZONE):
        yield _to_cage(source, Role.HEAD, _one(ports.gcs), "node start: is it the head?")
    yield _to_cage(Role.HEAD, Role.GPU, _one(ports.last_to_open), "ray up: has the node joined?")
    yield _to_cage(Role.CLIENT_ZONE, Role.HEAD, _one(ports.client), "Ray Client: the relay", uid=FORWARDER_UID)


def _to_cage(
    source: Role,
    destination: Role,
    ports: Span,
    purpose: str,
    opened_by: End = End.HOST,
    uid: int | None = None,
) -> Flow:
    return Flow(
        source=source,
        destination=destination,
        ports=ports,
        purpose=purpose,
        opened_by=opened_by,
        taken_by=End.CAGE,
        uid=uid,
    )


def _data(ports: NodePorts) -> Iterator[Flow]:
    low, _, high = ports.endpoints.partition("-")
    for source in (Role.EDGE_ZONE, Role.CLIENT_ZONE):
        yield Flow(
            source=source,
            destination=Role.GPU,
            ports=(int(low), int(high)),
            purpose="data connections, sealed",
            uid=GATEWAY_UID,
        )


def _private() -> Iterator[Flow]:
    """Yield what the zone's own Ray opens between its hosts: the host's network, which no cage reaches."""
    ports = PRIVATE_PORTS
    for span, what in ((_one(ports.gcs), "GCS"), *ports.services):
        zone, purpose = Role.EDGE_ZONE, f"the zone's own Ray: {what}"
        yield Flow(source=zone, destination=zone, ports=span, purpose=purpose, within_zone=True)


def allowed(
    source: Role, destination: Role, port: int, opener: int | End, *, version: int = 4, one_zone: bool = False
) -> bool:
    """Say whether somebody on a host may open a TCP connection to another host.

    Args:
        source: The host's role.
        destination: The other host's.
        port: Of the other host.
        opener: A uid of the host, or its cage.
        version: Of IP.
        one_zone: Whether both are hosts of one zone.
    """
    end, uid = (opener, None) if isinstance(opener, End) else (End.HOST, opener)
    return any(
        flow.source is source
        and flow.destination is destination
        and flow.ports[0] <= port <= flow.ports[1]
        and flow.opened_by is end
        and flow.uid in (None, uid)
        and (one_zone or not flow.within_zone)
        and (version == 4 or "ip6" in flow.families)
        for flow in flows()
    )


_ONE_ZONE = " of the same zone"


def markdown_table(ports: NodePorts = PORTS) -> str:
    """Return the declaration as the table in docs/ports.md."""
    rows = [
        f"| {flow.source.value} | {flow.destination.value}{_ONE_ZONE if flow.within_zone else ''} | "
        f"{flow.port_text()} | {flow.purpose} | {flow.opener} | {flow.taken_by.value} |"
        for flow in flows(ports)
    ]
    head = "| from | to | TCP ports | for | opened by | taken by |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows, ""])


# -- nftables ---------------------------------------------------------------------------------------

#: Answers, and errors about connections that were let through: without them, no path finds its packet size.
_ANSWERS = "ct state established,related accept"
#: IPv6 finds its neighbours by ICMP; a hop limit of 255 shows that no router passed it on.
_NEIGHBOURS = "ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"


def rules_of(role: str, hosts: Sequence[FirewallHost]) -> str:
    """Return the nftables file for a role by its name, or for ``"router"``.

    Raises:
        UnknownNameError: No such role, or none of *hosts* has it.
    """
    present = {host.role.value: host.role for host in hosts}
    if role == "router":
        return router_rules(hosts)
    if role not in present:
        raise UnknownNameError.of("role", role, [*present, "router"])
    return host_rules(present[role], hosts)


def host_rules(role: Role, hosts: Sequence[FirewallHost], *, ports: NodePorts = PORTS) -> str:
    """Return the nftables file for every host of *role*: what it accepts, what it may open, and both for its cage."""
    taken: dict[End, list[str]] = {end: [] for end in End}
    opened: dict[End, list[str]] = {end: [] for end in End}
    for flow in flows(ports):
        if flow.within_zone:
            # Both ends are named, since the file is the same for every host of the role.
            within = _within_zones(flow, hosts) if flow.source is role else []
            taken[flow.taken_by] += within
            opened[flow.opened_by] += within
            continue
        if flow.destination is role:
            taken[flow.taken_by] += _rules(flow, "saddr", _addresses(flow.source, hosts))
        if flow.source is role:
            opened[flow.opened_by] += _rules(flow, "daddr", _addresses(flow.destination, hosts))
    # What is for the cage comes in here only where there is no cage: then it is told so, as by any closed port.
    closed = [rule.replace(" accept ", " reject with tcp reset ") for rule in taken[End.CAGE]]
    return _table(
        f"a host of role {role.value}",
        _chain("input", [_ANSWERS, "iif lo accept", _NEIGHBOURS, "jump site_input", *taken[End.HOST], *closed]),
        _chain("output", [_ANSWERS, "oif lo accept", _NEIGHBOURS, "jump site_output", *opened[End.HOST]]),
        _chain("forward", [_ANSWERS, "jump site_forward", *_jumps(taken[End.CAGE], opened[End.CAGE])]),
        _plain_chain("from_cage", opened[End.CAGE]),
        _plain_chain("to_cage", taken[End.CAGE]),
        *(_plain_chain(f"site_{hook}", []) for hook in ("input", "output", "forward")),
    )


def _jumps(taken: Sequence[str], opened: Sequence[str]) -> list[str]:
    """Return what a host passes on: what its cage opens or takes, if it has a cage."""
    into = [f'oifname "{CAGE_LINK}" jump to_cage'] if taken else []
    out = [f'iifname "{CAGE_LINK}" jump from_cage'] if opened else []
    return [*into, *out]


def _rules(flow: Flow, side: str, peers: dict[str, str]) -> list[str]:
    """Return a host's rules that let a flow pass; *side* is where its peers stand in a packet."""
    uid = f"meta skuid {flow.uid} " if flow.uid is not None and side == "daddr" else ""
    return [f"{family} {side} {peers[family]} {uid}{_service(flow)}" for family in flow.families if family in peers]


def _within_zones(flow: Flow, hosts: Sequence[FirewallHost]) -> list[str]:
    """Return rules that let a flow pass between the hosts of each zone that has several."""
    found = []
    for zone in dict.fromkeys(host.zone for host in hosts if host.role is flow.source and host.zone):
        members = [host for host in hosts if host.zone == zone]
        for family, addresses in _addresses(flow.source, members).items():
            if len(members) > 1 and family in flow.families:
                found.append(f"{family} saddr {addresses} {family} daddr {addresses} {_service(flow)}")
    return found


def router_rules(hosts: Sequence[FirewallHost], *, ports: NodePorts = PORTS) -> str:
    """Return the nftables file for the router between the hosts: what it passes on. It serves nothing itself."""
    passed = []
    for flow in flows(ports):
        if flow.within_zone:
            passed += _within_zones(flow, hosts)
            continue
        sources, destinations = _addresses(flow.source, hosts), _addresses(flow.destination, hosts)
        for family in sorted(sources.keys() & destinations.keys() & set(flow.families)):
            ends = f"{family} saddr {sources[family]} {family} daddr {destinations[family]}"
            passed.append(f"{ends} {_service(flow)}")
    return _table(
        "the router between the hosts",
        _chain("forward", [_ANSWERS, "jump site_forward", *passed]),
        _chain("input", [_ANSWERS, "iif lo accept", _NEIGHBOURS, "jump site_input"]),
        *(_plain_chain(f"site_{hook}", []) for hook in ("forward", "input")),
    )


def _service(flow: Flow) -> str:
    label = f"{flow.source.value} to {flow.destination.value}, {flow.purpose}"
    return f'tcp dport {flow.port_text()} accept comment "{label}"'


def _addresses(role: Role, hosts: Iterable[FirewallHost]) -> dict[str, str]:
    """Return the addresses of a role's hosts as sets, for each of ``ip`` and ``ip6`` of which there are any."""
    found = [ipaddress.ip_address(address) for host in hosts if host.role is role for address in host.addresses]
    families = {"ip": 4, "ip6": 6}
    sets = {word: [str(one) for one in found if one.version == version] for word, version in families.items()}
    return {word: f"{{ {', '.join(members)} }}" for word, members in sets.items() if members}


def _chain(hook: str, rules: Iterable[str]) -> str:
    return _plain_chain(hook, [f"type filter hook {hook} priority filter; policy drop;", *rules])


def _plain_chain(name: str, rules: Iterable[str]) -> str:
    return "\n".join([f"\tchain {name} {{", *(f"\t\t{rule}" for rule in rules), "\t}"])


def _table(whose: str, *chains: str) -> str:
    """Return an nftables file that replaces the table as a whole, or not at all."""
    return "\n".join(
        [
            f"# Firewall of {whose}, written by `ray-gpu firewall`. Load it with `nft --file`.",
            "# It drops whatever it does not name. What else the site needs (name service, time, its own",
            "# administration) goes into the site_ chains, after this file and from one of the site's own:",
            f"#   add rule inet {TABLE} site_output udp dport 123 accept",
            f"table inet {TABLE}",
            f"delete table inet {TABLE}",
            f"table inet {TABLE} {{",
            *chains,
            "}",
            "",
        ]
    )
