"""Addresses and links of the test bed. Pure.

Addresses are those that the standards set aside for benchmarks (RFC 2544) and documentation (RFC 3849), so that a
host of the bed can never be taken for one of the machine's own network. Each host has a /24 and a /64 of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The link between the router and one host."""

    #: Number of the network, from 1; also in the name of the router's end.
    index: int

    @property
    def address(self) -> str:
        """IPv4 address of the host."""
        return f"198.18.{self.index}.2"

    @property
    def address6(self) -> str:
        """IPv6 address of the host."""
        return f"2001:db8:18:{self.index:x}::2"

    @property
    def router(self) -> str:
        """IPv4 address of the router's end."""
        return f"198.18.{self.index}.1"

    @property
    def router6(self) -> str:
        """IPv6 address of the router's end."""
        return f"2001:db8:18:{self.index:x}::1"

    def router_batch(self, host_pid: int) -> str:
        """Return ``ip -batch`` lines that make the link, run in the router's network."""
        end = f"host{self.index}"
        return (
            f"link add {end} type veth peer name eth0 netns {host_pid}\n"
            f"addr add {self.router}/24 dev {end}\n"
            f"addr add {self.router6}/64 dev {end} nodad\n"
            f"link set {end} up\n"
        )

    def host_batch(self) -> str:
        """Return ``ip -batch`` lines for the host's end, once the link is made."""
        return (
            "link set lo up\n"
            f"addr add {self.address}/24 dev eth0\n"
            f"addr add {self.address6}/64 dev eth0 nodad\n"
            "link set eth0 up\n"
            f"route add default via {self.router}\n"
            f"route add ::/0 via {self.router6}\n"
        )
