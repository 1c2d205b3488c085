"""The shards of a call that wait to be sent, and which node may have which. Pure; its user holds a lock.

Without owners any node may have any shard. With owners a shard waits for its own node, and moves when that is gone;
one without an owner is for any. An owner may be a lease as well, where a node's others are not like it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence

#: A shard, and how often it was sent before.
Item = tuple[int, int]


class Pending:
    """Shards in the order in which they are sent.

    Args:
        count: Number of shards.
        owners: The node or lease of each, ``None`` for any; or ``None`` for all of them.
    """

    def __init__(self, count: int, owners: Sequence[str | None] | None = None) -> None:
        self._items: deque[Item] = deque((index, 0) for index in range(count))
        self._owners = None if owners is None else list(owners)

    def __bool__(self) -> bool:
        return bool(self._items)

    def take(self, node: str) -> Item | None:
        """Return the next shard for a node, which waits no longer: its own before those that have no owner."""
        owners = self._owners
        if owners is None:
            return self._items.popleft() if self._items else None
        for owner in (node, None):
            found = next((item for item in self._items if owners[item[0]] == owner), None)
            if found is not None:
                self._items.remove(found)
                return found
        return None

    def put_first(self, item: Item) -> None:
        """Let a shard wait again, before all others."""
        self._items.appendleft(item)

    def clear(self) -> None:
        """Forget all."""
        self._items.clear()

    def without(self, nodes: Collection[str]) -> list[int]:
        """Return the shards that wait and whose node is none of these; without owners those are all."""
        return [index for index, _ in self._items if self._owners is None or self._owners[index] not in nodes]

    def owner(self, shard: int) -> str | None:
        """Return a shard's node."""
        assert self._owners is not None
        return self._owners[shard]

    def disown(self, nodes: Collection[str]) -> None:
        """Let any node have the shards whose own is none of these."""
        assert self._owners is not None
        self._owners = [owner if owner in nodes else None for owner in self._owners]

    def move(self, shards: Iterable[int], node: str) -> None:
        """Make a node the owner of shards."""
        assert self._owners is not None
        for shard in shards:
            self._owners[shard] = node
