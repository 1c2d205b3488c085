"""Which GPU nodes are worth asking for a lease, as far as the relay tells. This module does I/O.

The relay is not trusted: what it says here decides only where to ask and how long to wait.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ray_gpu.relay_link import RelayLink
from zones.errors import ZoneError

#: Ray label that names a node's pool.
POOL_LABEL = "ray-gpu-pool"
#: The relay tells at once; longer than this nobody waits for a hint, seconds.
ANSWER_TIMEOUT_S = 10.0
#: A node that failed while a lease was opened is passed over for so long, seconds.
PASS_OVER_S = 10.0
_UNREADABLE = (ZoneError, TypeError, ValueError, LookupError, AttributeError)


class Rooms:
    """Knows the nodes of all pools. Thread-safe."""

    def __init__(self, relay: RelayLink) -> None:
        self._relay = relay
        #: Nodes that failed lately: until when to pass them over, and why.
        self._failed: dict[str, tuple[float, str]] = {}
        #: Nodes that are about to be restarted. Ray places nothing there, and leases are given back after their call.
        self.draining: frozenset[str] = frozenset()

    def failed(self, node: str, why: str) -> None:
        """Note that a lease could not be opened on a node."""
        now = time.monotonic()
        recent = {name: entry for name, entry in list(self._failed.items()) if entry[0] > now}
        self._failed = recent | {node[:40]: (now + PASS_OVER_S, why[:200])}

    def passed_over(self, pool: str, distrusted: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """Return the nodes that failed lately and why, unless that is all the pool has: then they are tried again.

        Args:
            pool: Pool that is asked.
            distrusted: Nodes that count as failed, and why.
        """
        now = time.monotonic()
        failed = {node: why for node, (until, why) in list(self._failed.items()) if until > now} | dict(distrusted)
        if not failed:
            return {}
        try:
            return failed if any(node["name"] not in failed for node in self._members(pool)) else {}
        except _UNREADABLE:
            return {}

    def has_room(
        self, pool: str, gpu_milli: int, *, leases: int = 1, distrusted: Mapping[str, str] = MappingProxyType({})
    ) -> bool:
        """Tell whether Ray counts free GPU shares on nodes that work. A hint: true when nobody can tell.

        Args:
            gpu_milli: Thousandths of a GPU, for each lease.
            leases: How many shares there must be; none is free for 0.
            distrusted: Nodes that do not count while there are others.
        """
        avoid = self.passed_over(pool, distrusted)
        try:
            members = [node for node in self._members(pool) if node["name"] not in avoid]
            return sum(int((float(node["gpus_free"]) * 1000 + 0.5) // gpu_milli) for node in members) >= leases
        except _UNREADABLE:
            return True

    def _members(self, pool: str) -> list[Any]:
        """Return the nodes of a pool that live and stay."""
        found = list(self._relay.request({"op": "nodes"}, timeout_s=ANSWER_TIMEOUT_S).get("nodes") or [])
        here = [node for node in found if node["alive"] and node["labels"].get(POOL_LABEL) == pool]
        return [node for node in here if node["name"] not in self.draining]
