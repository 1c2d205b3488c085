"""ray_gpu.shares: what a node was given counts whichever way rows were moved, and after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ray_gpu.shares import Book, Shares
from zones import ledger as ledgers
from zones.errors import ConfigError, LedgerUnavailableError
from zones.ledger import Ledger, read
from zones.model import NodeShare, Obligations, Shuffle
from zones.plan import Index

ROWS, NOW = 4800, 1_800_000_000
SHARE = NodeShare(percent=60, window_s=86400)
ALONE = np.arange(ROWS)
#: Two ways of keeping the same number of rows together that have the same sizes.
ALTERNATING, HALVES, TWO = ALONE // 2, np.concatenate([ALONE[::2], ALONE[1::2]]) // 2, ALONE % 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the ledger is."""
    return tmp_path / "ledger.db"


@pytest.fixture
def shares(path: Path) -> Iterator[Shares]:
    """Shares of a new ledger."""
    with Ledger.open(path, zone="clinic") as ledger:
        yield Shares(ledger, path, NOW)


def book(shares: Shares, of_row: Index = ALONE, *, now: int = NOW, obligations: Obligations = Obligations()) -> Book:  # noqa: B008 - a frozen value
    """Return the data set's book."""
    return shares.book("d", "ab" * 32, SHARE, obligations, of_row, now)


def give(one: Book, *nodes: str) -> list[int]:
    """Give nodes all that they may have; return the cells that none may."""
    with one:
        given, left = one.assign(range(len(one.cells.rows)), nodes)
        one.give(given)
    return left


def rows_of(one: Book, node: str, of_row: Index) -> set[int]:
    """Return the rows that a node was given by this system of cells."""
    held = one.held(node)
    return {row for row in range(ROWS) if int(one.cells.of_unit[of_row[row]]) in held}


def test_again_is_the_same(shares: Shares) -> None:
    """The same data set in the same window has the same cells, and nothing new is given or written."""
    first = book(shares)
    assert give(first, "a", "b") == []
    again = book(shares, now=NOW + 100)

    assert (again.cells.of_unit == first.cells.of_unit).all()
    assert again.held("a") == first.held("a")
    assert give(again, "a", "b") == []
    assert again.percent("a") == 50


def test_changed_within_a_window(shares: Shares, path: Path) -> None:
    """What a node was given of an earlier version counts in full, after a restart too, until the window is over."""
    give(book(shares), "a", "b")

    def left(some: Shares, name: str, now: int = NOW) -> float:
        changed = some.book(name, "cd" * 32, SHARE, Obligations(), ALONE, now)
        give(changed, "a")
        return changed.percent("a")

    assert 55 < left(shares, "d") <= 60
    assert left(shares, "d", NOW + SHARE.window_s) == 60
    # Control: another data set is not counted.
    assert shares.book("e", "ef" * 32, SHARE, Obligations(), ALONE, NOW).percent("a") == 0
    later = Shares(shares._ledger, path, NOW)
    assert later.book("d", "01" * 32, SHARE, Obligations(), ALONE, NOW).percent("a") > 55


def test_two_names_of_one_data_set(shares: Shares, path: Path) -> None:
    """Under another name the same data has the same cells, and each entry has the name that was asked for."""
    asked = [shares.book(name, "ab" * 32, SHARE, Obligations(), ALONE, NOW) for name in ("d", "e", "d")]
    give(asked[0], "a")
    give(asked[1], "a", "b")

    assert len({one.cells.system for one in asked}) == 1
    assert [(entry["dataset"], entry["node"]) for entry in read(path) if entry["kind"] == "share"] == [
        ("d", "a"),
        ("e", "b"),
    ]


@pytest.mark.parametrize("other", [HALVES, TWO, ALONE])
@pytest.mark.parametrize("first", [ALTERNATING, TWO, ALONE])
def test_systems_add_up(shares: Shares, first: Index, other: Index) -> None:
    """However rows are kept together first and then, a node never holds more rows than its share, as it says."""
    one, two = book(shares, first), book(shares, other)
    give(one, "a", "b")
    give(two, "a", "b")

    for node in ("a", "b"):
        rows = rows_of(one, node, first) | rows_of(two, node, other)
        assert len(rows) <= SHARE.percent / 100 * ROWS
        assert 100 * len(rows) / ROWS <= two.percent(node) + 1e-9
        assert two.percent(node) <= SHARE.percent


def test_other_groups_are_other_cells(shares: Shares) -> None:
    """Groups of the same sizes with other rows in them are another system."""
    one, two = book(shares, ALTERNATING), book(shares, HALVES)

    assert one.cells.system != two.cells.system
    assert one.cells.system != book(shares, obligations=Obligations(shuffle=Shuffle.NONE)).cells.system


def test_restart(path: Path) -> None:
    """Another gateway on the same ledger counts on, from archives too; without one of them it does not start."""
    with Ledger.open(path, zone="clinic") as ledger:
        one = book(Shares(ledger, path, NOW))
        give(one, "a", "b")
        held = one.held("a")
    for archived in (False, True):
        if archived:
            moved = ledgers.archive(path)
        with Ledger.open(path, zone="clinic") as ledger:
            again = book(Shares(ledger, path, NOW + 60))
            assert (again.held("a"), again.percent("a")) == (held, 50)
            assert (again.cells.of_unit == one.cells.of_unit).all()
    moved.rename(path.with_name("elsewhere"))
    with (
        pytest.raises(LedgerUnavailableError, match=r"in no archive beside it; put that archive there"),
        Ledger.open(path, zone="clinic") as ledger,
    ):
        Shares(ledger, path, NOW)


def test_next_window(shares: Shares) -> None:
    """In the next window counting begins anew, with other cells."""
    one = book(shares)
    give(one, "a", "b")
    later = book(shares, now=one.over)

    assert later.held("a") == set()
    assert (later.cells.of_unit != one.cells.of_unit).any()
    assert later.percent("a") == 0


def test_key(path: Path) -> None:
    """The key is private and stays; a file that holds none says what to do, and a new one makes the old cells count."""
    with Ledger.open(path, zone="clinic") as ledger:
        give(book(Shares(ledger, path, NOW)), "a", "b")
        key = path.with_name("cells.key")
        assert key.stat().st_mode & 0o777 == 0o600
        key.write_bytes(b"")
        with pytest.raises(ConfigError, match="holds no key; remove it"):
            Shares(ledger, path, NOW)
        key.unlink()
        other = book(Shares(ledger, path, NOW))

        assert other.held("a") == set()
        assert (other.percent("a"), other.most("a")) == (50, 24)
