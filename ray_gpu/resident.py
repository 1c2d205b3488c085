"""Shards that stay open in sandboxes after a call, so that a further call on the same rows sends none. Pure.

The gateway keeps the order in which rows were cut, and which lease has which shard open; a session's leases and
nobody else. What a sandbox says that it keeps decides what is sent again and nothing else.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from zones.plan import Plan

#: Orders of rows that a session remembers; those used longest ago are forgotten.
MAX_REMEMBERED = 8


class Resident:
    """The shards of some rows, and where they are open. Thread-safe."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._lock = threading.Lock()
        #: Shard to the lease that has it open, and the number of the call that brought it there.
        self._open: dict[int, tuple[str, int]] = {}

    def owners(self) -> list[str | None]:
        """Return the lease of each shard, or ``None``."""
        with self._lock:
            return [self._open[shard][0] if shard in self._open else None for shard in range(len(self.plan))]

    def brought_by(self, lease: str, shard: int) -> int | None:
        """Return the number of the call that brought a shard to a lease; ``None`` when it is not open there."""
        with self._lock:
            holder, call = self._open.get(shard, ("", 0))
        return call if holder == lease else None

    def keep(self, shard: int, lease: str, call: int) -> None:
        """Note that a lease has a shard open, which that call brought."""
        with self._lock:
            self._open[shard] = lease, call

    def forget(self, lease: str, shard: int | None = None) -> None:
        """Note that a lease has a shard open no more, or none at all."""
        with self._lock:
            gone = [one for one, (holder, _) in self._open.items() if holder == lease and shard in (None, one)]
            for one in gone:
                del self._open[one]


class Residents:
    """All of a session. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, Resident] = OrderedDict()

    def of(self, key: Hashable, draw: Callable[[], Plan]) -> Resident:
        """Return the shards of the rows, and the way to cut them, that *key* stands for; drawn the first time."""
        with self._lock:
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = Resident(draw())
            self._known.move_to_end(key)
            while len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        return found

    def lost(self, lease: str) -> None:
        """Forget what a lease had open: it is over."""
        with self._lock:
            known = list(self._known.values())
        for resident in known:
            resident.forget(lease)
