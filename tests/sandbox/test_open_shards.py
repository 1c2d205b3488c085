"""Shards that stay open make room: those of the call that was used longest ago, and all when memory is short."""

from __future__ import annotations

from ray_gpu.sandbox.open_shards import OpenShards

SHARD = memoryview(bytes(100))


def kept(shards: OpenShards, call: int, count: int, *, room: int) -> list[bool]:
    """Keep so many shards of a call."""
    return [shards.keep(call, number, SHARD, room=room) for number in range(count)]


def there(shards: OpenShards, call: int) -> list[int]:
    """Return which shards of a call are open; asking for them uses them."""
    return [number for number in range(20) if shards.get(call, number) is not None]


def test_a_call_does_not_push_out_its_own() -> None:
    """Of one that does not fit, as much stays open as does, so that a further one finds it."""
    shards = OpenShards()
    assert kept(shards, 1, 5, room=350) == [True, True, True, False, False]
    assert there(shards, 1) == [0, 1, 2]


def test_used_longest_ago_goes_first() -> None:
    """A further call takes the room of the call that was used longest ago, and no more than it needs."""
    shards = OpenShards()
    kept(shards, 1, 2, room=450)
    kept(shards, 2, 2, room=450)
    assert there(shards, 1) == [0, 1]
    assert kept(shards, 3, 1, room=450) == [True]
    assert (there(shards, 1), len(there(shards, 2)), there(shards, 3)) == ([0, 1], 1, [0])
    kept(shards, 4, 4, room=450)
    assert there(shards, 4) == [0, 1, 2, 3]
    assert sum(len(there(shards, call)) for call in (1, 2, 3)) == 0


def test_memory_is_short() -> None:
    """Shards are dropped until the process has less than most of its memory; with enough memory none is."""
    memory = [1000]
    shards = OpenShards(lambda: memory[0])
    kept(shards, 1, 3, room=1000)
    shards.relieve(1000)
    assert there(shards, 1) == [0, 1, 2]

    def less() -> int:
        memory[0] -= 400
        return memory[0] + 400

    memory[0] = 2500
    short = OpenShards(less)
    kept(short, 1, 3, room=1000)
    short.relieve(1000)
    assert len(there(short, 1)) == 1
    short.clear()
    assert there(short, 1) == []


def test_asks_the_kernel() -> None:
    """By default it is this process's own memory: far below the room of a lease, far above a byte."""
    shards = OpenShards()
    kept(shards, 1, 2, room=1 << 40)
    shards.relieve(1 << 40)
    assert there(shards, 1) == [0, 1]
    shards.relieve(1)
    assert there(shards, 1) == []
