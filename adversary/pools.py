"""Pools of any size, on paper: shards are planned and given out by the product's own code, and nothing is sent. Pure.

What is assumed of the rest: a node takes the next shard when it has done one, and all take about as long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adversary.guessing import Seen, Shard
from zones import plan, spread
from zones.envelope import padded_size
from zones.model import Obligations, Shuffle
from zones.plan import Index

#: Bytes of a row, and of a shard without padding.
ROW_BYTES = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A pool, and what is done with it."""

    #: GPU nodes; every call uses all.
    nodes: int
    calls: int
    #: Of each call.
    shards: int
    #: Whether sizes are.
    padded: bool = True
    #: Whether in each call a node is lost in the middle: what it worked on and what it had not got goes to others,
    #: under the same numbers. No share is bounded then.
    loses: bool = False


def seen(rows: int, obligations: Obligations, pool: Pool, seed: int, *, groups: Index | None = None) -> Seen:
    """Return what the nodes of a pool see of calls over one data set.

    Args:
        rows: Rows of the data set.
        obligations: Shuffle, and the bound of a node's share if there is one.
        pool: Nodes and calls.
        seed: Of everything that is drawn.
        groups: ``int64[rows]``: rows with one number are kept together; no share is bounded then.
    """
    names = [f"gpu-{number}" for number in range(pool.nodes)]
    rng = np.random.default_rng(seed)
    key = hashlib.sha256(f"{seed}".encode()).digest()
    held: dict[str, set[int]] = {name: set() for name in names}
    found = []
    for call in range(pool.calls):
        drawn = rng.bytes(plan.SEED_BYTES)
        owners: list[str] | None = None
        size: dict[str, Any] = {
            "obligations": obligations,
            "seed": drawn,
            "shard_bytes": 1 << 40,
            "min_shards": pool.shards,
        }
        if groups is not None:
            made = plan.plan_of_groups(groups, ROW_BYTES, **size)
        elif obligations.max_node_share is None:
            made = plan.make_plan(rows, ROW_BYTES, **size)
        else:
            n = plan.block_rows(obligations)
            unit_cells = spread.cells(-(-rows // n), key, ordered=obligations.shuffle is Shuffle.NONE)
            most = spread.most_cells(np.bincount(unit_cells), obligations.max_node_share.percent)
            given, left = spread.assign(range(spread.CELLS), held, dict.fromkeys(names, most))
            assert not left
            for name, cells in given.items():
                held[name] |= set(cells)
            placed = spread.Placed(rows=rows, unit_cells=unit_cells, units=None)
            made, parts = spread.plan_of(
                given, placed, obligations=obligations, seed=drawn, shard_units=rows, min_shards=pool.shards
            )
            owners = [part.node for part in parts]
        found.append(_sent(made, names, owners, rng, began=10.0 * call, pool=pool))
    return Seen(rows=rows, calls=found)


def _sent(
    made: plan.Plan,
    names: Sequence[str],
    owners: Sequence[str] | None,
    rng: np.random.Generator,
    *,
    began: float,
    pool: Pool,
) -> list[Shard]:
    """Return a call's shards as they arrive."""
    free = {name: began + rng.exponential(0.01) for name in names}
    lost = names[int(rng.integers(len(names)))] if pool.loses else None
    found = []

    def send(number: int, node: str) -> None:
        rows = made.row_index(number)
        size = len(rows) * ROW_BYTES
        padded = padded_size(size) if pool.padded else size
        found.append(Shard(node=node, number=number, rows=rows, at=free[node], size=padded))
        free[node] += 0.01 * (1 + rng.exponential(0.2))

    for number in range(len(made)):
        node = owners[number] if owners else min(free, key=lambda name: free[name])
        send(number, node)
        if node == lost and number > len(made) // 2:
            del free[node]
            lost = None
            send(number, min(free, key=lambda name: free[name]))
    return found
