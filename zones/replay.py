"""Refuses every slot that was seen before (docs/envelope.md, 5). Pure: memory and a lock."""

from __future__ import annotations

import threading
from typing import Final

from zones.errors import EnvelopeError
from zones.model import Direction, Kind, Slot

#: Most shards that a :class:`ReplayGuard` remembers in calls that are not finished: about 19 MB.
MAX_TRACKED_SLOTS: Final = 1 << 18

#: Kinds that belong to the lease rather than to a call: numbered upwards, kept in order by the connection.
_SEQUENCED: Final = frozenset({Kind.HELLO, Kind.CONTROL})


class ReplayGuard:
    """Accepts every slot of one lease at most once (5). Safe to share between threads.

    Ask it after a message has opened and before its payload is used: before that, anybody could use up slots.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lease: str | None = None
        self._finished = -1
        self._tracked = 0
        #: Highest accepted attempt of each shard.
        self._attempts: dict[tuple[Direction, Kind, int], dict[int, int]] = {}
        self._last: dict[tuple[Direction, Kind], tuple[int, int, int]] = {}

    def accept(self, slot: Slot) -> None:
        """Remember *slot*.

        Raises:
            EnvelopeError: It was seen, is older than what was seen, belongs to a finished call or another lease,
                or ``MAX_TRACKED_SLOTS`` are remembered.
        """
        with self._lock:
            if self._lease is None:
                self._lease = slot.lease
            if slot.lease != self._lease:
                raise EnvelopeError
            if slot.kind in _SEQUENCED:
                self._accept_next(slot)
            else:
                self._accept_shard(slot)

    def finish(self, call: int) -> None:
        """Forget *call* and every call below it, and refuse their slots from now on."""
        with self._lock:
            self._finished = max(self._finished, call)
            for entry in [entry for entry in self._attempts if entry[2] <= self._finished]:
                self._tracked -= len(self._attempts.pop(entry))

    def _accept_next(self, slot: Slot) -> None:
        number = (slot.call, slot.shard, slot.attempt)
        last = self._last.get((slot.direction, slot.kind))
        if last is not None and number <= last:
            raise EnvelopeError
        self._last[slot.direction, slot.kind] = number

    def _accept_shard(self, slot: Slot) -> None:
        attempts = self._attempts.get((slot.direction, slot.kind, slot.call), {})
        seen = attempts.get(slot.shard)
        full = seen is None and self._tracked >= MAX_TRACKED_SLOTS
        if slot.call <= self._finished or full or (seen is not None and slot.attempt <= seen):
            raise EnvelopeError
        self._tracked += seen is None
        attempts[slot.shard] = slot.attempt
        self._attempts[slot.direction, slot.kind, slot.call] = attempts
