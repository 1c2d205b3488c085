"""The shards of a call that wait to be sent, and which node may have which. Pure; its user holds a lock.

Without owners any node may have any shard. With owners a shard waits for its own node, and moves when that is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable

#: A shard, and how often it was sent before.
Item = tuple[int, int]


class Pending:
    """Shards in the order in which they are sent.

    Args:
        count: Number of shards.
        owners: The node of each, or ``None``.
    """

    def __init__(self, count: int, owners: list[str] | None = None) -> None:
        self._items: deque[Item] = deque((index, 0) for index in range(count))
        self._owners = owners

    def __bool__(self) -> bool:
        return bool(self._items)

    def take(self, node: str) -> Item | None:
        """Return the next shard for a node, which waits no longer."""
        if self._owners is None:
            return self._items.popleft() if self._items else None
        found = next((item for item in self._items if self._owners[item[0]] == node), None)
        if found is not None:
            self._items.remove(found)
        return found

    def put_first(self, item: Item) -> None:
        """Let a shard wait again, before all others."""
        self._items.appendleft(item)

    def clear(self) -> None:
        """Forget all."""
        self._items.clear()

    def without(self, nodes: Collection[str]) -> list[int]:
        """Return the shards that wait and whose node is none of these; without owners those are all."""
        return [index for index, _ in self._items if self._owners is None or self._owners[index] not in nodes]

    def owner(self, shard: int) -> str:
        """Return a shard's node."""
        assert self._owners is not None
        return self._owners[shard]

    def move(self, shards: Iterable[int], node: str) -> None:
        """Make a node the owner of shards."""
        assert self._owners is not None
        for shard in shards:
            self._owners[shard] = node
