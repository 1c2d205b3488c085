"""zones.obligations: what a decision demands of a call."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from zones.hours import Hours
from zones.model import NodeShare, Obligations, Padding, Shuffle
from zones.obligations import Facts, duties, ends, unmet

#: A Wednesday.
NOW = datetime(2026, 3, 25, 12, tzinfo=UTC)
CALL = Facts(
    purpose="care",
    now=NOW,
    began=NOW - timedelta(hours=1),
    function_reviewed=False,
    gpu_milli=1000,
    rows=1000,
    most_shards=1000,
)

#: Key, an obligation, and what a call has that does not fulfil it, while CALL does.
DEMANDS: list[tuple[str, Obligations, dict[str, Any]]] = [
    ("max_rows", Obligations(max_rows=1000), {"rows": 1001}),
    ("min_shards", Obligations(min_shards=1000), {"most_shards": 999}),
    ("exclusive_gpu", Obligations(exclusive_gpu=True), {"gpu_milli": 500}),
    ("max_session_s", Obligations(max_session_s=3601), {"began": NOW - timedelta(seconds=3601)}),
    ("hours", Obligations(hours=Hours.parse("wed 12:00-13:00 UTC")), {"now": NOW + timedelta(hours=1)}),
    ("purposes", Obligations(purposes=frozenset({"care", "research"})), {"purpose": "marketing"}),
    ("purposes", Obligations(purposes=frozenset({"care"})), {"purpose": ""}),
]


@pytest.mark.parametrize(("key", "obligations", "change"), DEMANDS)
def test_each(key: str, obligations: Obligations, change: dict[str, Any]) -> None:
    """A call that fulfils an obligation is not refused; one that differs in this alone is, by its key."""
    assert unmet(obligations, CALL) == []
    assert [one.key for one in unmet(obligations, replace(CALL, **change))] == [key]
    assert unmet(Obligations(), replace(CALL, **change)) == []


def test_reviewed() -> None:
    """Where functions must be approved, one that is not is refused."""
    demand = Obligations(reviewed_functions_only=True)

    assert [one.key for one in unmet(demand, CALL)] == ["reviewed_functions_only"]
    assert unmet(demand, replace(CALL, function_reviewed=True)) == []


def test_arguments_alone() -> None:
    """Obligations about rows do not bind a call that sends no table."""
    assert unmet(Obligations(max_rows=1, min_shards=9), replace(CALL, rows=None, most_shards=0)) == []


def test_all_are_named() -> None:
    """Whoever breaks several hears of all."""
    demand = Obligations(max_rows=1, min_shards=2, exclusive_gpu=True, purposes=frozenset({"x"}))
    call = replace(CALL, gpu_milli=1, most_shards=1)

    assert [one.key for one in unmet(demand, call)] == ["purposes", "exclusive_gpu", "max_rows", "min_shards"]


@pytest.mark.parametrize(
    ("obligations", "after_s"),
    [
        (Obligations(), None),
        (Obligations(max_session_s=7200), 3600),
        (Obligations(hours=Hours.parse("wed 08:00-12:30 UTC")), 1800),
        (Obligations(hours=Hours.parse("wed 08:00-12:30 UTC"), max_session_s=3601), 1),
        (Obligations(hours=Hours.parse("wed 08:00-12:00 UTC")), 0),
    ],
)
def test_ends(obligations: Obligations, after_s: int | None) -> None:
    """A lease ends with the session or the working hours, whichever is first."""
    end = ends(obligations, began=CALL.began, now=NOW)

    assert (None if end is None else end - int(NOW.timestamp())) == after_s


def test_duties_say_everything() -> None:
    """Each field that demands something is said, by its key of zone.yaml."""
    everything = Obligations(
        shuffle=Shuffle.BLOCKS,
        block_rows=16,
        shuffle_window=1600,
        padding=Padding.COARSE,
        max_rows=10,
        min_shards=2,
        max_node_share=NodeShare(percent=60, window_s=86400),
        accepted_degradations=frozenset({"swap-on", "no-cgroup"}),
        exclusive_gpu=True,
        gpu_kinds=("NVIDIA *",),
        environments=frozenset({"0" * 64}),
        resident_shards=True,
        max_lease_s=60,
        max_session_s=600,
        hours=Hours.parse("mon 07:00-19:00 UTC"),
        purposes=frozenset({"b", "a"}),
        reviewed_functions_only=True,
    )

    said = duties(everything)

    assert said.keys() == {field.name for field in fields(Obligations)} - {"block_rows"}
    assert said["shuffle"] == "blocks(16)"
    assert said["accepted_degradations"] == "no-cgroup, swap-on"
    assert said["purposes"] == "a, b"
    assert said["max_node_share"] == "60 % in 86400 s"
    assert duties(Obligations()).keys() == {"shuffle", "padding", "accepted_degradations", "max_lease_s"}
