"""The hosts file of ``ray-gpu firewall``: names, roles and addresses. Reads the file; nothing else.

::

    hosts:
      - {name: gpu-1, role: gpu, addresses: [192.0.2.11]}
      - {name: zone-clinic-2, role: edge-zone, zone: clinic, addresses: [198.51.100.6]}
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ray_gpu.ports import FirewallHost, Role
from zones.document import Document, FileModel, Id, read_text_file


def _address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address; names and networks are not resolved here") from None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        raise ValueError(f"{text} is an IPv4 address in another form; write it as {address.ipv4_mapped}")
    if address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local:
        raise ValueError(f"{text} is no address that another host can reach")
    return str(address)


class _HostPart(FileModel):
    name: Id
    role: Literal["operator", "head", "gpu", "edge-zone", "client-zone", "vault"]
    addresses: list[Annotated[str, AfterValidator(_address)]] = Field(min_length=1)
    #: Of a host of a zone that has several: they may speak to one another on the ports of the zone's private Ray.
    zone: Id | None = None


class _File(FileModel):
    hosts: list[_HostPart] = Field(min_length=1)


def read(path: Path) -> tuple[FirewallHost, ...]:
    """Read a hosts file.

    Raises:
        ConfigError: It cannot be read, has a role that does not exist, a name or an address twice, two heads, or a zone
            beside another role than a zone's; names file and line.
    """
    document = Document(read_text_file(path), path)
    parts = document.check(_File).hosts
    names: set[str] = set()
    owners: dict[str, str] = {}
    heads: list[str] = []
    for index, part in enumerate(parts):
        if part.name in names:
            document.refuse(("hosts", index, "name"), f"two hosts are called {part.name}; rename one")
        if part.zone is not None and not Role(part.role).is_zone():
            document.refuse(("hosts", index, "zone"), f"a host of role {part.role} is of no zone; remove `zone`")
        if part.role == "head" and heads:
            document.refuse(("hosts", index, "role"), f"{heads[0]} is the head already; a cluster has one")
        for place, address in enumerate(part.addresses):
            if address in owners:
                document.refuse(("hosts", index, "addresses", place), f"{address} is {owners[address]}'s already")
            owners[address] = part.name
        names.add(part.name)
        heads += [part.name] if part.role == "head" else []
    return tuple(
        FirewallHost(name=p.name, role=Role(p.role), addresses=tuple(p.addresses), zone=p.zone or "") for p in parts
    )
