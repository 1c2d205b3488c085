"""The declared flows, the rules made from them, and the hosts file: what may never be is in none of them."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_gpu import hosts_file
from ray_gpu.cli.main import cli
from ray_gpu.ports import (
    FORWARDER_UID,
    GATEWAY_UID,
    PORTS,
    PRIVATE_PORTS,
    End,
    FirewallHost,
    Role,
    allowed,
    cage_opens,
    cage_serves,
    flows,
    host_rules,
    markdown_table,
    router_rules,
)
from zones.errors import ConfigError

ROOT = Path(__file__).parents[1]
HOSTS = """\
hosts:
  - {name: head, role: head, addresses: [192.0.2.10]}
  - {name: gpu-1, role: gpu, addresses: [192.0.2.11, "2001:db8::11"]}
  - {name: clinic, role: edge-zone, addresses: [198.51.100.5, "2001:db8:1::5"]}
  - {name: trading, role: client-zone, addresses: [203.0.113.5]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A hosts file that is right."""
    path = tmp_path / "hosts.yaml"
    path.write_text(HOSTS, encoding="utf-8")
    return path


@pytest.fixture
def hosts(file: Path) -> tuple[FirewallHost, ...]:
    """Its hosts."""
    return hosts_file.read(file)


# -- the declaration --------------------------------------------------------------------------------


def test_no_flow_into_a_client_zone() -> None:
    """Nothing may open a connection into a zone of kind client."""
    assert [flow for flow in flows() if flow.destination is Role.CLIENT_ZONE] == []


def test_no_flow_between_zones() -> None:
    """No zone reaches another; hosts of one zone reach its private Ray's ports, which nothing else has a flow to."""
    between = [flow for flow in flows() if flow.source.is_zone() and flow.destination.is_zone()]
    low, high = PRIVATE_PORTS.gcs, PRIVATE_PORTS.first + 109
    onto = [flow for flow in flows() if flow.ports[1] >= low and flow.ports[0] <= high]

    assert {flow.within_zone for flow in between} == {True}
    assert onto == between
    assert not allowed(Role.EDGE_ZONE, Role.EDGE_ZONE, PRIVATE_PORTS.gcs, 0)
    assert allowed(Role.EDGE_ZONE, Role.EDGE_ZONE, PRIVATE_PORTS.gcs, 0, one_zone=True)
    assert not allowed(Role.EDGE_ZONE, Role.EDGE_ZONE, PRIVATE_PORTS.gcs, End.CAGE, one_zone=True)


def test_rules_within_a_zone(file: Path) -> None:
    """Rules for the hosts of one zone name both ends; a zone of one host has none, nor have hosts of no named zone."""
    alone = file.read_text(encoding="utf-8")
    assert "own Ray" not in host_rules(Role.EDGE_ZONE, hosts_file.read(file))
    named = alone.replace("role: edge-zone,", "role: edge-zone, zone: clinic,")
    more = """\
  - {name: clinic-2, role: edge-zone, zone: clinic, addresses: [198.51.100.6, "2001:db8:1::6"]}
  - {name: lab, role: edge-zone, zone: lab, addresses: [198.51.100.7]}
  - {name: other, role: edge-zone, addresses: [198.51.100.8]}
"""
    file.write_text(named + more, encoding="utf-8")
    hosts = hosts_file.read(file)
    both = "{ 198.51.100.5, 198.51.100.6 }"

    for text, times in ((host_rules(Role.EDGE_ZONE, hosts), 2), (router_rules(hosts), 1)):
        gcs = [line.strip() for line in text.splitlines() if f"dport {PRIVATE_PORTS.gcs} " in line]
        assert len(gcs) == 2 * times  # of each version of IP
        assert [line.startswith(f"ip saddr {both} ip daddr {both} ") for line in gcs].count(True) == times
        assert not any(other in line for line in gcs for other in ("198.51.100.7", "198.51.100.8"))
    for role in (Role.HEAD, Role.GPU, Role.CLIENT_ZONE):
        assert str(PRIVATE_PORTS.gcs) not in host_rules(role, hosts)


def test_private_ray_in_the_documentation() -> None:
    """The document on a zone's private Ray has people start it on the declared ports, each named."""
    text = (ROOT / "docs/howto-ray-data.md").read_text(encoding="utf-8")
    flags = [*PRIVATE_PORTS.flags(), f"--port={PRIVATE_PORTS.gcs}", f"--ray-client-server-port={PRIVATE_PORTS.client}"]

    assert [flag for flag in flags if flag not in text] == []
    assert f":{PRIVATE_PORTS.gcs}" in text


def test_ssh_stays_in_the_pool() -> None:
    """SSH goes from operator and head to the pool, and nowhere else."""
    ssh = {(flow.source, flow.destination) for flow in flows() if flow.ports[0] <= 22 <= flow.ports[1]}

    assert ssh == {(Role.OPERATOR, Role.HEAD), (Role.OPERATOR, Role.GPU), (Role.HEAD, Role.GPU)}


def test_data_endpoints_are_the_gateways() -> None:
    """Only the gateway's uid may open data connections, and only from zones to GPU hosts."""
    low, _, high = PORTS.endpoints.partition("-")
    opened = [flow for flow in flows() if flow.ports[1] >= int(low) and flow.ports[0] <= int(high)]

    assert {(flow.source, flow.destination) for flow in opened} == {
        (Role.EDGE_ZONE, Role.GPU),
        (Role.CLIENT_ZONE, Role.GPU),
    }
    assert {flow.uid for flow in opened} == {GATEWAY_UID}


def test_client_zone_speaks_to_ray_client_alone() -> None:
    """Of Ray a zone of kind client reaches one port of the head's, and only by its forwarder's uid."""
    low, _, high = PORTS.endpoints.partition("-")
    opened = [flow for flow in flows() if flow.source is Role.CLIENT_ZONE and "Ray" in flow.purpose]

    assert [(flow.destination, flow.ports, flow.uid) for flow in opened] == [
        (Role.HEAD, (PORTS.client, PORTS.client), FORWARDER_UID)
    ]
    assert PORTS.client < PORTS.first < int(low) < int(high)


def test_vault_opens_nothing() -> None:
    """The vault answers, and opens no connection."""
    assert [flow for flow in flows() if flow.source is Role.VAULT] == []


def test_ports_without_a_token_are_nobodys() -> None:
    """Ray's metrics and the dashboard's agents, which ask for no token, are declared for nobody."""
    for source, destination, port in product(Role, Role, range(PORTS.first + 3, PORTS.first + 6)):
        assert not allowed(source, destination, port, 0)
        assert not allowed(source, destination, port, End.CAGE)


def test_hosts_have_no_part_in_ray() -> None:
    """Of Ray's ports a host itself opens two, to ask who is there; and none leads into a host."""
    ray = [
        flow for flow in flows() if flow.ports[0] in (PORTS.gcs, PORTS.client, *range(PORTS.first, PORTS.first + 110))
    ]
    asking = {(f.source, f.destination, f.ports) for f in ray if f.opened_by is End.HOST and f.ports[0] != PORTS.client}

    assert {flow.taken_by for flow in ray} == {End.CAGE}
    assert asking == {
        (Role.GPU, Role.HEAD, (PORTS.gcs, PORTS.gcs)),
        (Role.EDGE_ZONE, Role.HEAD, (PORTS.gcs, PORTS.gcs)),
        (Role.HEAD, Role.GPU, (PORTS.last_to_open, PORTS.last_to_open)),
    }


def test_cages_open_ray_and_ssh_alone() -> None:
    """A cage opens connections to cages; but the head's, whose autoscaler starts nodes, also to sshds of GPU hosts."""
    beyond = [flow for flow in flows() if flow.opened_by is End.CAGE and flow.taken_by is End.HOST]

    assert [(flow.source, flow.destination, flow.ports) for flow in beyond] == [(Role.HEAD, Role.GPU, (22, 22))]
    assert cage_opens(Role.EDGE_ZONE) == ((26000, 26000), (26010, 26012), (26020, 26119))
    assert cage_opens(Role.HEAD) == ((26010, 26012), (26020, 26119))
    assert cage_serves(Role.GPU) == cage_serves(Role.EDGE_ZONE) == ((26010, 26012), (26020, 26119))
    assert cage_serves(Role.HEAD) == ((26000, 26000), (26001, 26001), (26010, 26012), (26020, 26119))
    assert [cage_serves(role) for role in (Role.VAULT, Role.OPERATOR, Role.CLIENT_ZONE)] == [()] * 3


def test_table_in_the_documentation() -> None:
    """docs/ports.md shows the declaration as it is; paste `ray_gpu.ports.markdown_table()` after a change."""
    text = (ROOT / "docs/ports.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- flows -->\n(.*?)<!-- /flows -->", text, flags=re.DOTALL)

    assert table == markdown_table()


# -- rules ------------------------------------------------------------------------------------------


def test_rules_drop_by_default(hosts: tuple[FirewallHost, ...]) -> None:
    """Every chain with a hook drops what it does not name."""
    for text in (router_rules(hosts), *(host_rules(role, hosts) for role in Role)):
        assert text.count("policy drop;") == text.count("type filter hook") == (3 if "chain output" in text else 2)


def test_rules_name_no_host_that_is_not_there(hosts: tuple[FirewallHost, ...]) -> None:
    """A role without a host, or an IP version without addresses at both ends, gives no rule."""
    assert "vault" not in router_rules(hosts)
    assert "ip6 saddr { 2001:db8:1::5 } ip6 daddr { 2001:db8::11 }" in router_rules(hosts)
    assert "ip6 daddr" not in "".join(line for line in router_rules(hosts).splitlines() if "to head" in line)


def test_a_host_refuses_what_is_its_cages(hosts: tuple[FirewallHost, ...]) -> None:
    """Where there is no cage, whoever may connect to it is told that nobody listens; no process of the host gets it."""
    chain = host_rules(Role.HEAD, hosts).partition("chain input {")[2].partition("}\n\tchain")[0]
    rules = [line for line in chain.splitlines() if f"dport {PORTS.gcs}" in line]

    assert rules
    assert all("reject with tcp reset" in rule for rule in rules)


def test_client_zone_accepts_answers_alone(hosts: tuple[FirewallHost, ...]) -> None:
    """The input chain of a zone in client mode has no rule that names a port."""
    chain = host_rules(Role.CLIENT_ZONE, hosts).partition("chain input {")[2].partition("}\n\tchain")[0]

    assert "policy drop" in chain
    assert "dport" not in chain


# -- the hosts file and the command -----------------------------------------------------------------


def test_hosts_file(hosts: tuple[FirewallHost, ...]) -> None:
    """Names, roles and addresses are read as they stand."""
    assert hosts[1] == FirewallHost(name="gpu-1", role=Role.GPU, addresses=("192.0.2.11", "2001:db8::11"))


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("role: gpu", "role: worker", 3, "'operator', 'head', 'gpu', 'edge-zone'"),
        ("role: gpu", "role: head", 3, "head is the head already"),
        ("name: gpu-1", "name: head", 3, "two hosts are called head"),
        ("198.51.100.5", "192.0.2.11", 4, "192.0.2.11 is gpu-1's already"),
        ('"2001:db8:1::5"', '"2001:DB8:0::11"', 4, "2001:db8::11 is gpu-1's already"),
        ("192.0.2.11", "192.0.2.0/24", 3, "is not an IP address"),
        ("192.0.2.11", "127.0.0.1", 3, "no address that another host can reach"),
        ("192.0.2.11", '"::ffff:192.0.2.10"', 3, "write it as 192.0.2.10"),
        ("role: gpu, ", "", 3, "Field required"),
        ("role: gpu, ", "role: gpu, zone: lab, ", 3, "a host of role gpu is of no zone"),
        ("name: gpu-1", "nam: gpu-1", 3, "unknown key 'nam' (did you mean 'name'?)"),
        ("name: gpu-1", "name: GPU 1", 3, "characters of a-z"),
        (HOSTS, "hosts: []\n", 1, "at least 1 item"),
    ],
)
def test_bad_hosts_file(file: Path, old: str, new: str, line: int, said: str) -> None:
    """An error names the file, the line and what to correct."""
    assert old in HOSTS
    file.write_text(HOSTS.replace(old, new, 1), encoding="utf-8")

    with pytest.raises(ConfigError) as caught:
        hosts_file.read(file)

    assert caught.value.message.startswith(f"{file}:{line}: ")
    assert said in caught.value.message


@pytest.mark.parametrize("role", ["head", "gpu", "edge-zone", "client-zone"])
def test_command(file: Path, hosts: tuple[FirewallHost, ...], role: str) -> None:
    """``ray-gpu firewall`` prints a role's rules as they are generated, and nothing else."""
    done = CliRunner().invoke(cli, ["firewall", role, "--hosts", str(file)])

    assert (done.exit_code, done.output) == (0, host_rules(Role(role), hosts))


def test_command_router(file: Path, hosts: tuple[FirewallHost, ...]) -> None:
    """The router's rules are printed like a role's."""
    assert CliRunner().invoke(cli, ["firewall", "router", "--hosts", str(file)]).output == router_rules(hosts)


@pytest.mark.parametrize("role", ["vault", "gpus"])
def test_command_wrong_role(file: Path, role: str) -> None:
    """A role that no host of the file has is an error that names those there are."""
    done = CliRunner().invoke(cli, ["firewall", role, "--hosts", str(file)])

    assert done.exit_code == 1
    assert f"no role '{role}'" in done.output
    assert "client-zone, edge-zone, gpu, head, router" in done.output
