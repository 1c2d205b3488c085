"""zones.reconcile: the ledger and the kernel agree to the byte, or the difference is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from zones.reconcile import MOST_KNOCKS, SMALL_BYTES, Counted, reconcile

HERE, NODE = "198.18.4.2:40000", "198.18.2.2:26130"


def ended(lease: str = "l1", *, local: str = HERE, outcome: str = "done", controls: int = 3) -> dict[str, Any]:
    """Return the entry of a lease that ended."""
    return {
        "kind": "lease-end", "lease": lease, "node": "gpu-1", "outcome": outcome, "connection": [local, NODE],
        "controls": controls, "time": "2026-11-28T12:00:00.000000Z",
    }  # fmt: skip


LEDGER: list[Mapping[str, Any]] = [
    {"kind": "opened", "zone": "clinic"},
    {"kind": "completion", "lease": "l1", "bytes": 70_000},
    {"kind": "completion", "lease": "l2", "bytes": 5},
    {"kind": "completion", "lease": "l1", "bytes": 30_000},
    ended(),
]
ALL = 100_000 + 4 * SMALL_BYTES


@pytest.mark.parametrize(
    ("more", "problem"),
    [(0, ""), (1, "1 bytes left that the ledger does not have"), (-1, "1 bytes are in the ledger that did not leave")],
)
def test_to_the_byte(more: int, problem: str) -> None:
    """One byte more than the ledger has, or less, is found."""
    (line,) = reconcile(LEDGER, [Counted(local=HERE, remote=NODE, sent=ALL + more)])

    assert line.problem == problem
    assert (line.lease, line.ledger_bytes, line.framing_bytes) == ("l1", 100_000, 4 * SMALL_BYTES)


def test_lost_lease() -> None:
    """Of a lost lease less may have left than the ledger has, which was written before; more may not."""
    entries = [*LEDGER[:-1], ended(outcome="lost")]
    for sent, fits in ((ALL - 4000, True), (ALL, True), (ALL + 1, False)):
        (line,) = reconcile(entries, [Counted(local=HERE, remote=NODE, sent=sent)])
        assert (line.problem == "") is fits


def test_crash() -> None:
    """What a crashed gateway may have sent at most is known as well."""
    entries = [*LEDGER[:-1], {"kind": "recovered", "lease": "l1", "at_most_bytes": 50}, ended(outcome="lost")]
    (line,) = reconcile(entries, [Counted(local=HERE, remote=NODE, sent=ALL + 50)])

    assert line.problem == ""


def test_connection_of_no_lease() -> None:
    """Whoever else sends to a lease's endpoint is found; a knock that was not answered is none, nor is another's."""
    others = [
        Counted(local="198.18.4.2:40001", remote=NODE, sent=1),
        Counted(local="198.18.4.2:40002", remote=NODE, sent=SMALL_BYTES),
        Counted(local="198.18.4.2:40003", remote=NODE, sent=0),
        Counted(local="198.18.4.2:40004", remote="198.18.9.9:443", sent=1000),
    ]
    lines = list(reconcile(LEDGER, [Counted(local=HERE, remote=NODE, sent=ALL), *others]))

    assert [(line.local, line.problem) for line in lines] == [
        (HERE, ""),
        ("198.18.4.2:40001", "1 bytes left that the ledger does not have"),
    ]


def test_not_counted() -> None:
    """A lease whose connection the kernel did not count is named, unless it ended before the count began."""
    (line,) = reconcile(LEDGER, [])
    assert "no such connection" in line.problem
    assert list(reconcile(LEDGER, [], since="2026-11-28T12:00:01.000000Z")) == []


def test_many_knocks() -> None:
    """A few knocks that were not answered are no news; more of them than a gateway makes are."""
    knocks = [Counted(local=f"198.18.4.2:{50_000 + i}", remote=NODE, sent=SMALL_BYTES) for i in range(MOST_KNOCKS + 3)]
    lines = list(reconcile(LEDGER, [Counted(local=HERE, remote=NODE, sent=ALL), *knocks]))

    assert sum(bool(line.problem) for line in lines) == 3


def test_same_ends_twice() -> None:
    """Two leases whose connections had the same two ends, one after the other, are two."""
    entries = [*LEDGER, {"kind": "completion", "lease": "l3", "bytes": 7}, ended("l3")]
    sent = [ALL, 7 + 4 * SMALL_BYTES]
    lines = list(reconcile(entries, [Counted(local=HERE, remote=NODE, sent=some) for some in sent]))

    assert [(line.lease, line.problem) for line in lines] == [("l1", ""), ("l3", "")]
