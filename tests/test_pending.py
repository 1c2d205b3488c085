"""Shards that wait: whose they are, and what becomes of those whose owner is gone; and what stays open where."""

from __future__ import annotations

import numpy as np
import pytest

from ray_gpu.pending import Pending
from ray_gpu.resident import MAX_REMEMBERED, Resident, Residents
from zones.plan import Plan

PLAN = Plan(rows=4, block_rows=1, order=np.arange(4), cuts=((0, 1), (1, 2), (2, 3), (3, 4)))


def taken(pending: Pending, owner: str) -> list[int]:
    """Take all that an owner gets."""
    found = []
    while (item := pending.take(owner)) is not None:
        found.append(item[0])
    return found


def test_own_before_nobodys() -> None:
    """An owner gets its own, then those of nobody, and never another's."""
    pending = Pending(5, ["b", None, "a", "b", "a"])

    assert pending.without(["a"]) == [0, 1, 3]
    assert taken(pending, "a") == [2, 4, 1]
    assert taken(pending, "b") == [0, 3]


def test_disown() -> None:
    """What belongs to somebody who is not there is for any."""
    pending = Pending(4, ["gone", "a", "gone", "b"])
    pending.disown(["a", "b"])

    assert taken(pending, "a") == [1, 0, 2]
    assert taken(pending, "b") == [3]


def test_without_owners() -> None:
    """Any may have any."""
    assert taken(Pending(3), "a") == [0, 1, 2]


def test_resident() -> None:
    """A shard is open in one lease, the last that kept it, under the number of the call that brought it."""
    resident = Resident(PLAN)
    resident.keep(0, "one", 7)
    resident.keep(2, "two", 3)
    resident.keep(2, "one", 9)

    assert resident.owners() == ["one", None, "one", None]
    assert [resident.brought_by("one", shard) for shard in range(4)] == [7, None, 9, None]
    assert resident.brought_by("two", 2) is None
    resident.forget("one", 2)
    assert resident.owners() == ["one", None, None, None]
    resident.forget("two")
    resident.forget("one")
    assert resident.owners() == [None] * 4


def test_residents() -> None:
    """Orders are drawn once for each key, and the oldest are forgotten; a lost lease has nothing open."""
    residents = Residents()
    first = residents.of("a", lambda: PLAN)
    first.keep(1, "one", 1)
    residents.lost("one")

    assert first.owners() == [None] * 4
    assert residents.of("a", lambda: pytest.fail("drawn again")) is first
    for key in range(MAX_REMEMBERED):
        residents.of(key, lambda: PLAN)
    assert residents.of("a", lambda: PLAN) is not first
