"""Which GPU node gets which rows, where policy bounds a node's share of a data set. Pure.

A data set's units (:mod:`zones.plan`) fall into *cells*, by a key that the gateway keeps: each cell holds units from
everywhere, and none says where it was. A node is given cells, and gets the same ones again as long as the window
lasts, so that epochs, repeated calls and further attempts do not add up to the whole. Within what a node gets, every
call draws a new order.

=============== =====================================================================================
:func:`cells`    unit to cell: a keyed permutation, cut into equal parts; with ``none``, neighbours
:func:`assign`   cell to node: one that has it already, else the one with the most room left
:func:`plan_of`  what each node gets, cut into shards of whole cells, in a new order
=============== =====================================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zones.model import Obligations, Shuffle
from zones.plan import Index, Plan, block_rows, cut, draw, permutation, rows_of_groups, sorted_units

#: Cells of a data set. More would follow shares more closely; fewer make larger steps.
CELLS = 240
#: A cell that holds no unit of a call.
_NOWHERE = -1


def count(units: int) -> int:
    """Return how many cells a data set of so many units has."""
    return min(CELLS, units)


def cells(units: int, key: bytes, *, ordered: bool) -> Index:
    """Return ``int64[units]``: the cell that each unit of the whole is in. *ordered*: neighbours share a cell."""
    places = np.arange(units, dtype=np.int64)
    if not ordered:
        places[permutation(units, key)] = np.arange(units)
    return places * count(units) // max(1, units)


def most_cells(cell_rows: Index, percent: float) -> int:
    """Return how many cells hold at most so much of all rows, whichever cells they are.

    Args:
        cell_rows: Rows of the whole in each cell.
        percent: Of the rows of the whole.
    """
    largest_first = np.cumsum(np.sort(cell_rows)[::-1])
    return int(np.searchsorted(largest_first, percent * cell_rows.sum() / 100, side="right"))


def assign(
    wanted: Collection[int], held: Mapping[str, Collection[int]], most: Mapping[str, int]
) -> tuple[dict[str, list[int]], list[int]]:
    """Give each cell to a node.

    Args:
        wanted: Cells that a call has rows of.
        held: Cells that each of the call's nodes was given before.
        most: How many each may hold in all.

    Returns:
        The cells of each node, and those that no node may have.
    """
    given: dict[str, list[int]] = {node: [] for node in held}
    holding = {node: set(some) for node, some in held.items()}
    left = []
    for cell in sorted(wanted):
        having = [node for node, some in holding.items() if cell in some]
        room = [node for node, some in holding.items() if len(some) < most[node]]
        if having:
            node = min(having, key=lambda name: len(given[name]))
        elif room:
            node = max(room, key=lambda name: (most[name] - len(holding[name]), -len(given[name])))
        else:
            left.append(cell)
            continue
        given[node].append(cell)
        holding[node].add(cell)
    return given, left


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Whose a shard is, and what it is made of."""

    node: str
    cells: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """The rows of a call, and the cells that they are in."""

    rows: int
    #: Cell of each unit of the call.
    unit_cells: Index
    #: ``int64[rows]``: unit of each row, as an index of *unit_cells*; ``None`` where units are the policy's rows or
    #: blocks, in order.
    units: Index | None


def plan_of(
    given: Mapping[str, Sequence[int]],
    placed: Placed,
    *,
    obligations: Obligations,
    seed: bytes,
    shard_units: int,
    min_shards: int,
) -> tuple[Plan, list[Part]]:
    """Cut what each node was given into shards of whole cells, and draw a new order within each.

    Args:
        given: The cells of each node: all that the call has rows in.
        placed: The call's rows.
        obligations: Shuffle and blocks.
        seed: A new one for each call, as for :func:`zones.plan.make_plan`.
        shard_units: Units that a shard should not exceed.
        min_shards: Smallest number of shards, as far as there are cells.

    Returns:
        The plan, and the part that each of its shards is.
    """
    unit_cells, units = placed.unit_cells, placed.units
    parts = _parts(given, np.bincount(unit_cells, minlength=1), seed, shard_units, min_shards)
    shard_of = np.full(CELLS, _NOWHERE, np.int64)
    for shard, part in enumerate(parts):
        shard_of[list(part.cells)] = shard
    shards = shard_of[unit_cells]
    if (shards == _NOWHERE).any():
        raise ValueError("a cell of the call was given to no node; assign all of them first")
    keeps = obligations.shuffle is Shuffle.NONE
    drawn = np.arange(len(shards), dtype=np.uint64) << np.uint64(16) if keeps else draw(len(shards), seed)
    order = sorted_units(shards, drawn)
    if units is None:
        n = block_rows(obligations)
        ends = np.cumsum(np.bincount(shards, minlength=len(parts)))
    else:
        n = 1
        ranks = np.empty_like(order)
        ranks[order] = np.arange(len(order))
        order = rows_of_groups(ranks[units], obligations, seed)
        ends = np.cumsum(np.bincount(shards[units], minlength=len(parts)))
    edges = [0, *ends.tolist()]
    cuts = tuple((edges[i], edges[i + 1]) for i in range(len(parts)))
    return Plan(rows=placed.rows, block_rows=n, order=order, cuts=cuts), parts


def _parts(
    given: Mapping[str, Sequence[int]], sizes: Index, seed: bytes, shard_units: int, min_shards: int
) -> list[Part]:
    """Return the shards of each node, in an order that says nothing of the nodes."""
    nodes = [node for node, some in given.items() if some]
    found = []
    for node in nodes:
        mine = np.array(given[node], np.int64)
        mine = mine[permutation(len(mine), _seed(seed, node))]
        units = int(sizes[mine].sum())
        least = max(-(-min_shards // len(nodes)), -(-units // shard_units))
        edges = cut(len(mine), 1, len(mine), min(len(mine), least))
        found += [Part(node=node, cells=tuple(mine[start:stop].tolist())) for start, stop in edges]
    if not found:
        # No rows are one shard of none.
        return [Part(node=node, cells=()) for node in list(given)[:1]]
    return [found[place] for place in permutation(len(found), _seed(seed, ""))]


def _seed(seed: bytes, purpose: str) -> bytes:
    return hashlib.sha256(seed + purpose.encode()).digest()
