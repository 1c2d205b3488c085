"""cluster.yaml before ``ray up``, which names neither file nor line and starts what it can. Reads the file.

Looked at is what starts the wrong thing, or a key on the wrong host; the rest is for Ray, which refuses what it does
not know before it starts anything.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_gpu.ports import FirewallHost, Role
from zones.document import Document, Loc, read_text_file

#: Without these `ray up` would start Ray without a cage, TLS and token.
_START = ["ray-gpu", "node", "start"]
_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


def check(path: Path, hosts: Sequence[FirewallHost] = ()) -> None:
    """Check a cluster.yaml.

    Args:
        path: The file.
        hosts: Every host of the site, from a hosts file; then each host of the cluster must be one of its pool.

    Raises:
        ConfigError: With file and line.
    """
    document = Document(read_text_file(path), path)
    _need(document, ("provider",), dict, "a mapping: type, head_ip, worker_ips")
    kind = _need(document, ("provider", "type"), str, "local")
    if kind != "local":
        document.refuse(("provider", "type"), f"{kind!r} is not checked here; docs/howto-cloud.md is about others")
    _need(document, ("auth",), dict, "a mapping: ssh_user, ssh_private_key")
    _need(document, ("auth", "ssh_private_key"), str, "a path of a key that opens these hosts and no others")
    for name in _COMMANDS:
        _check_commands(document, name)
    _check_addresses(document, hosts)


def _need(document: Document, loc: Loc, kind: type[Any], what: str) -> Any:
    found = document.value
    for name in loc:
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, kind):
        document.refuse(loc, f"{'.'.join(map(str, loc))} must be {what}")
    return found


def _check_commands(document: Document, name: str) -> None:
    commands = _need(document, (name,), list, "a list of commands")
    words = [shlex.split(str(command)) for command in commands]
    if _START not in [line[:3] for line in words]:
        document.refuse((name,), f"{name} has no `{' '.join(_START)}`, so Ray would have no cage, TLS or token")
    for index, line in enumerate(words):
        if line[:2] == ["ray", "start"]:
            document.refuse((name, index), f"`ray start` has no cage, TLS or token; use `{' '.join(_START)}`")


def _check_addresses(document: Document, hosts: Sequence[FirewallHost]) -> None:
    head = _need(document, ("provider", "head_ip"), str, "the head's IPv4 address")
    workers = _need(document, ("provider", "worker_ips"), list, "a list of the GPU hosts' IPv4 addresses")
    seen: dict[str, str] = {}
    for loc, address in [(("provider", "head_ip"), head), *_numbered(workers)]:
        if not _is_ipv4(address):
            document.refuse(loc, f"{address!r} is no IPv4 address; names are not resolved, certificates have none")
        if address in seen:
            document.refuse(loc, f"{address} stands here twice: it is {seen[address]} already")
        seen[address] = "the head" if address == head else "a GPU host"
        if hosts:
            _check_role(document, loc, address, hosts)


def _numbered(workers: Sequence[Any]) -> list[tuple[Loc, Any]]:
    return [(("provider", "worker_ips", index), address) for index, address in enumerate(workers)]


def _check_role(document: Document, loc: Loc, address: str, hosts: Sequence[FirewallHost]) -> None:
    """Refuse a host that has another role, above all a zone's: the launcher's key must open none."""
    wanted = Role.HEAD if loc[-1] == "head_ip" else Role.GPU
    host = next((host for host in hosts if address in host.addresses), None)
    if host is None:
        document.refuse(loc, f"{address} is no host of the hosts file; add it there, for its firewall")
    if host.role.is_zone():
        document.refuse(loc, f"{address} is {host.name}, a zone's: no key of the pool's opens it; it joins by itself")
    if host.role is not wanted:
        document.refuse(loc, f"{address} is {host.name}, whose role is {host.role.value}, not {wanted.value}")


def _is_ipv4(address: Any) -> bool:
    try:
        return isinstance(address, str) and str(ipaddress.IPv4Address(address)) == address
    except ValueError:
        return False
