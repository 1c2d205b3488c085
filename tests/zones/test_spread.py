"""zones.spread and plans of groups: what nodes get adds up, stays theirs, and says nothing of its place."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zones import plan, shards, spread
from zones.model import Obligations, Shuffle
from zones.plan import Index

KEY, SEED = b"k" * 32, b"s" * 32
ROWS = Obligations(shuffle=Shuffle.ROWS)
BLOCKS = Obligations(shuffle=Shuffle.BLOCKS, block_rows=7)
NONE = Obligations(shuffle=Shuffle.NONE)


@given(units=st.integers(0, 5000), ordered=st.booleans())
def test_cells(units: int, ordered: bool) -> None:
    """Cells are as many as they can be, of nearly equal size; with order kept they are runs of neighbours."""
    cells = spread.cells(units, KEY, ordered=ordered)
    sizes = np.bincount(cells, minlength=spread.count(units))

    assert len(cells) == units
    assert len(sizes) == spread.count(units) == min(units, spread.CELLS)
    assert units == 0 or sizes.max() - sizes.min() <= 1
    assert not ordered or (np.diff(cells) >= 0).all()


def test_cells_follow_the_key() -> None:
    """The same key makes the same cells, another one others, which have no more rows in common than chance gives."""
    one, again, other = (spread.cells(24000, key, ordered=False) for key in (KEY, KEY, b"o" * 32))

    assert (one == again).all()
    assert abs((one == other).mean() - 1 / spread.CELLS) < 0.003
    # Neighbours are not in one cell more often than others.
    assert abs((one[1:] == one[:-1]).mean() - 1 / spread.CELLS) < 0.003


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=40), percent=st.integers(1, 99))
def test_most_cells(sizes: list[int], percent: int) -> None:
    """Whichever cells a node gets, they hold no more than its share; one more could."""
    rows = np.array(sizes, np.int64)
    most = spread.most_cells(rows, percent)
    largest = np.sort(rows)[::-1]

    assert largest[:most].sum() * 100 <= percent * rows.sum()
    assert most == len(rows) or largest[: most + 1].sum() * 100 > percent * rows.sum()


@given(
    wanted=st.sets(st.integers(0, 30)),
    held=st.dictionaries(st.sampled_from("abc"), st.sets(st.integers(0, 30), max_size=12), min_size=1),
    most=st.integers(0, 20),
)
def test_assign(wanted: set[int], held: dict[str, set[int]], most: int) -> None:
    """Each cell goes to one node, which has it or has room; one that a node of the call has goes nowhere else."""
    bounds = dict.fromkeys(held, most)
    found, left = spread.assign(wanted, held, bounds)

    assert sorted([*left, *(cell for cells in found.values() for cell in cells)]) == sorted(wanted)
    for node, cells in found.items():
        assert len(held[node] | set(cells)) <= max(most, len(held[node]))
    for cell in wanted & set().union(*held.values()):
        assert any(cell in found[node] and cell in held[node] for node in held)
    if left:
        assert all(len(held[node] | set(found[node])) >= most for node in held)
    again, left_again = spread.assign(wanted - set(left), {n: held[n] | set(found[n]) for n in held}, bounds)
    assert left_again == []
    assert all(set(again[node]) <= held[node] | set(found[node]) for node in held)


@pytest.mark.parametrize("percent", [50, 60, 75])
def test_room_for_failover(percent: int) -> None:
    """Nodes are filled evenly, so what policy leaves over is there when one of them fails."""
    most = spread.most_cells(np.full(spread.CELLS, 100), percent)
    found, left = spread.assign(range(spread.CELLS), {"a": (), "b": ()}, {"a": most, "b": most})

    assert left == []
    assert {node: len(cells) for node, cells in found.items()} == {"a": 120, "b": 120}
    assert most - 120 == (percent - 50) * spread.CELLS // 100


def table(rows: int) -> pa.Table:
    """Return a table whose values are their places."""
    return pa.table({"x": pa.array(np.arange(rows)), "y": pa.array(np.arange(rows) * 0.5)})


def planned(
    rows: int, obligations: Obligations, units: Index | None = None, *, chosen: Index | None = None
) -> tuple[plan.Plan, list[spread.Part], Index]:
    """Return a plan for two nodes, its parts, and the cell of each row of the whole."""
    of_row = np.arange(rows) // plan.block_rows(obligations) if units is None else units
    of_unit = spread.cells(int(of_row.max()) + 1, KEY, ordered=obligations.shuffle is Shuffle.NONE)
    numbers, inverse = np.unique(of_row if chosen is None else of_row[chosen], return_inverse=True)
    whole = units is None and chosen is None
    unit_cells = of_unit if whole else of_unit[numbers]
    wanted = np.unique(unit_cells).tolist()
    given_, _ = spread.assign(wanted, {"a": (), "b": ()}, {"a": len(wanted), "b": len(wanted)})
    count = rows if chosen is None else len(chosen)
    placed = spread.Placed(rows=count, unit_cells=unit_cells, units=None if whole else inverse.reshape(-1))
    made, parts = spread.plan_of(given_, placed, obligations=obligations, seed=SEED, shard_units=200, min_shards=4)
    return made, parts, of_unit[of_row]


@pytest.mark.parametrize("obligations", [ROWS, BLOCKS, NONE], ids=["rows", "blocks", "none"])
@pytest.mark.parametrize("rows", [1, 5, 1000, 2503])
def test_plan_of(rows: int, obligations: Obligations) -> None:
    """Every row is in one shard, of the node that its cell was given to, and comes back to its place."""
    made, parts, cell_of = planned(rows, obligations)
    data = table(rows)

    sent = [shards.shard_table(data, made, shard) for shard in range(len(made))]
    for found, part in zip(sent, parts, strict=True):
        assert set(cell_of[found["x"].to_numpy()]) == set(part.cells)
    assert np.sort(np.concatenate([found["x"].to_numpy() for found in sent])).tolist() == list(range(rows))
    assert shards.reassemble(dict(enumerate(sent)), made).equals(data)
    assert len(made) >= min(4, len(set(cell_of)))


@pytest.mark.parametrize("obligations", [ROWS, BLOCKS, NONE], ids=["rows", "blocks", "none"])
def test_part_of_the_rows(obligations: Obligations) -> None:
    """Rows that were chosen are in the cells that they are in when all are sent: parts do not add up to the whole."""
    chosen = np.flatnonzero(np.arange(3000) % 3 == 0)
    made, parts, cell_of = planned(3000, obligations, chosen=chosen)
    data = pa.table({"x": pa.array(chosen)})

    sent = [shards.shard_table(data, made, shard) for shard in range(len(made))]
    for found, part in zip(sent, parts, strict=True):
        assert set(cell_of[found["x"].to_numpy()]) == set(part.cells)
    assert shards.reassemble(dict(enumerate(sent)), made).equals(data)


def test_new_order_for_each_call() -> None:
    """Two calls with one seed each send a node the same rows in another order."""
    placed = spread.Placed(rows=1000, unit_cells=spread.cells(1000, KEY, ordered=False), units=None)
    given_, _ = spread.assign(range(spread.CELLS), {"a": ()}, {"a": spread.CELLS})
    first, second = (
        spread.plan_of(given_, placed, obligations=ROWS, seed=seed, shard_units=5000, min_shards=1)[0].order
        for seed in (SEED, b"t" * 32)
    )

    assert first is not None
    assert second is not None
    assert sorted(first) == sorted(second)
    assert (first == second).mean() < 0.02


def test_order_kept() -> None:
    """With `none` each shard's rows are in the source's order, and neighbours stay together."""
    made, _, _ = planned(2400, NONE)

    for shard in range(len(made)):
        index = made.row_index(shard)
        assert (np.diff(index) > 0).all()


# -- groups ------------------------------------------------------------------------------------------


@given(groups=st.lists(st.integers(0, 12), max_size=60), least=st.integers(1, 9), shuffle=st.sampled_from([ROWS, NONE]))
def test_groups_stay_together(groups: list[int], least: int, shuffle: Obligations) -> None:
    """No group is in two shards, its rows keep their order with `none` alone, and every row comes back to its place."""
    numbers = np.array(groups, np.int64)
    made = plan.plan_of_groups(numbers, 8, obligations=shuffle, seed=SEED, shard_bytes=40, min_shards=least)
    data = table(len(groups))

    where: dict[int, set[int]] = {}
    for shard in range(len(made)):
        index = made.row_index(shard)
        for number in set(numbers[index]):
            where.setdefault(int(number), set()).add(shard)
            assert shuffle is ROWS or (np.diff(index[numbers[index] == number]) > 0).all()
    assert all(len(found) == 1 for found in where.values())
    assert len(made) <= max(1, len(where))
    if groups:
        sent = {shard: shards.shard_table(data, made, shard) for shard in range(len(made))}
        assert shards.reassemble(sent, made).equals(data)


def test_groups_are_moved() -> None:
    """Groups change places as rows do: each is first about equally often."""
    numbers = np.repeat(np.arange(8), 5)
    first = Counter(
        int(numbers[made.order[0]])
        for seed in range(800)
        if (made := plan.plan_of_groups(
            numbers, 8, obligations=ROWS, seed=seed.to_bytes(32, "big"), shard_bytes=1000, min_shards=1
        )).order is not None
    )  # fmt: skip

    assert sorted(first) == list(range(8))
    assert all(60 <= times <= 140 for times in first.values())


@pytest.mark.parametrize("bound", [False, True], ids=["no share", "a bound share"])
@pytest.mark.parametrize("obligations", [ROWS, BLOCKS, Obligations(shuffle_window=20), NONE])
def test_rows_of_a_group_are_moved(obligations: Obligations, *, bound: bool) -> None:
    """A column that is the same everywhere keeps all rows together: that gives nobody their order, but with `none`."""
    groups = np.repeat(np.arange(3), 1000)
    if bound:
        made, _, _ = planned(3000, obligations, groups)
    else:
        made = plan.plan_of_groups(groups, 8, obligations=obligations, seed=SEED, shard_bytes=1 << 20, min_shards=3)

    orders = [made.row_index(shard) for shard in range(len(made))]
    assert sorted(len(index) for index in orders) == [1000, 1000, 1000]
    for index in orders:
        assert len(set(groups[index])) == 1
        rising = (np.diff(index) > 0).mean()
        assert rising == 1 if obligations is NONE else abs(rising - 0.5) < 0.05
        assert obligations is NONE or np.abs(np.diff(index)).mean() > 250


def test_groups_with_order_kept() -> None:
    """With `none` groups come as they begin in the source."""
    numbers = np.array([5, 5, 3, 5, 3, 9])
    made = plan.plan_of_groups(numbers, 8, obligations=NONE, seed=SEED, shard_bytes=1000, min_shards=1)

    assert numbers[made.row_index(0)].tolist() == [5, 5, 5, 3, 3, 9]


# -- windows -----------------------------------------------------------------------------------------


def test_window() -> None:
    """With a window rows move within it and no further; blocks too, and as blocks."""
    for demand, width in (
        (Obligations(shuffle_window=100), 1),
        (Obligations(shuffle=Shuffle.BLOCKS, block_rows=10, shuffle_window=100), 10),
    ):
        made = plan.make_plan(1000, 8, obligations=demand, seed=SEED, shard_bytes=800, min_shards=1)
        index = np.concatenate([made.row_index(shard) for shard in range(len(made))])

        assert sorted(index) == list(range(1000))
        assert (index // 100 == np.arange(1000) // 100).all()
        assert (index != np.arange(1000)).mean() > 0.5
        assert (index.reshape(-1, width)[:, 0] % width == 0).all()


def test_more_parts_than_fit_a_key() -> None:
    """Windows of one row, of which there are more than a key has room for, keep every row in its place."""
    made = plan.order(70_000, Obligations(shuffle_window=1), SEED)

    assert made is not None
    assert (made == np.arange(70_000)).all()


def test_no_rows() -> None:
    """A call without rows is one shard of none, of some node."""
    placed = spread.Placed(rows=0, unit_cells=np.zeros(0, np.int64), units=np.zeros(0, np.int64))
    made, parts = spread.plan_of({"a": [], "b": []}, placed, obligations=ROWS, seed=SEED, shard_units=10, min_shards=4)

    assert (len(made), made.rows, parts) == (1, 0, [spread.Part(node="a", cells=())])
