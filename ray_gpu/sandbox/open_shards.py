"""Shards that stay open in a sandbox after their call, and which of them make room. Runs in the sandbox."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable

#: This process may have so much memory for each byte of room before shards are dropped: most of a lease's memory, of
#: which the room is half (``ray_gpu.keeper.RESIDENT_PART``).
_MEMORY_PER_ROOM = 1.8


class OpenShards:
    """Shards by the call that brought them, the call that was used longest ago first.

    Args:
        resident_bytes: Tells how much memory this process has.
    """

    def __init__(self, resident_bytes: Callable[[], int] | None = None) -> None:
        self._calls: OrderedDict[int, dict[int, memoryview]] = OrderedDict()
        self._resident_bytes = resident_bytes or _resident_bytes

    def get(self, call: int, shard: int) -> memoryview | None:
        """Return a shard, which is then used last; ``None`` if it is not open any more."""
        found = self._calls.get(call, {}).get(shard)
        if found is not None:
            self._calls.move_to_end(call)
        return found

    def keep(self, call: int, shard: int, payload: memoryview, *, room: int) -> bool:
        """Copy a shard to this process's own memory, in place of other calls' if need be; tell whether it is open.

        Args:
            call: That brings it.
            shard: Its number there.
            payload: The shard.
            room: Bytes that all open shards may take.
        """
        own = sum(map(len, self._calls.get(call, {}).values()))
        if own + len(payload) > room:
            return False
        while self._taken() + len(payload) > room:
            self._drop_one(but=call)
        self._calls.setdefault(call, {})[shard] = memoryview(bytes(payload))
        self._calls.move_to_end(call)
        return True

    def relieve(self, room: int) -> None:
        """Drop shards as long as this process has nearly all memory of its lease: what is to run now needs some.

        Args:
            room: Bytes that open shards may take, which says how much a lease has.
        """
        while self._calls and self._resident_bytes() > room * _MEMORY_PER_ROOM:
            self._drop_one()

    def clear(self) -> None:
        """Drop all of them."""
        self._calls.clear()

    def _taken(self) -> int:
        return sum(len(payload) for shards in self._calls.values() for payload in shards.values())

    def _drop_one(self, but: int | None = None) -> None:
        call = next(number for number in self._calls if number != but)
        self._calls[call].popitem()
        if not self._calls[call]:
            del self._calls[call]


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
