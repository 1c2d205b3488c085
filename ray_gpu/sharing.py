"""How one call's rows are given to nodes, where policy bounds a node's share of a data set. This module does I/O."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from ray_gpu.shares import Shares
from ray_gpu.source import Source
from zones import plan, spread
from zones.model import NodeShare, Obligations
from zones.obligations import Unmet
from zones.plan import Index, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What shards of a call shall be."""

    #: Bytes of a row, on average.
    row_bytes: int
    #: Bytes that a shard should not exceed.
    shard_bytes: int
    min_shards: int


class OverShareError(Exception):
    """Some node would be given more than policy allows."""

    def __init__(self, unmet: Unmet) -> None:
        super().__init__(unmet.reason)
        self.unmet = unmet


class Sharing:
    """One call's. Not thread-safe but for what is noted in the book."""

    def __init__(self, shares: Shares, source: Source, obligations: Obligations, share: NodeShare) -> None:
        self._source, self._obligations, self._share = source, obligations, share
        self._of_unit = _units(source, obligations)
        self._book = shares.book(
            source.dataset,
            source.identity(),
            share,
            obligations,
            self._of_unit,
            int(time.time()),
        )
        self._parts: list[spread.Part] = []

    def nodes_needed(self) -> int:
        """Return how many nodes can take all rows of the data set."""
        return self._book.nodes_needed()

    def plan(
        self, nodes: Collection[str], size: Size, accept: Callable[[Plan, list[str]], None], *, anew: bool
    ) -> None:
        """Give each row to a node, and note it once it is accepted.

        Args:
            nodes: Those of the call's leases.
            size: What shards shall be.
            accept: Is given the plan, and the node of each of its shards; raises where they will not do.
            anew: Whether a node may be given what it had not.

        Raises:
            OverShareError: Some rows may go to none of *nodes*, or only anew.
            LedgerUnavailableError: It could not be written down.
        """
        source, obligations = self._source, self._obligations
        units: Index | None
        if source.numbers is None and source.groups is None:
            unit_cells, units = self._book.cells.of_unit, None
        else:
            of_row = self._of_unit if source.numbers is None else self._of_unit[source.numbers]
            numbers, units = np.unique(of_row, return_inverse=True)
            unit_cells, units = self._book.cells.of_unit[numbers], units.reshape(-1)
        with self._book as book:
            given, left = book.assign(np.flatnonzero(np.bincount(unit_cells)).tolist(), nodes)
            new = any(not set(cells) <= book.held(node) for node, cells in given.items())
            if left or (new and not anew):
                raise OverShareError(self.over_share(nodes))
            rows_of_unit = max(1, -(-source.rows // max(1, len(unit_cells))))
            made, self._parts = spread.plan_of(
                given,
                spread.Placed(rows=source.rows, unit_cells=unit_cells, units=units),
                obligations=obligations,
                seed=secrets.token_bytes(plan.SEED_BYTES),
                shard_units=max(1, size.shard_bytes // (size.row_bytes * rows_of_unit)),
                min_shards=size.min_shards,
            )
            accept(made, [part.node for part in self._parts])
            book.give(given)

    def move(self, shards: Sequence[int], node: str) -> list[int]:
        """Give a node shards of another one, and note it; return those that it may have.

        Raises:
            LedgerUnavailableError: It could not be written down.
        """
        moved = []
        with self._book as book:
            for shard in shards:
                cells = self._parts[shard].cells
                if book.fits(node, cells):
                    book.give({node: cells})
                    self._parts[shard] = spread.Part(node=node, cells=cells)
                    moved.append(shard)
        return moved

    def percents(self) -> dict[str, float]:
        """Return how much of the data set each node of the call was given in this window, in percent."""
        with self._book as book:
            return {node: round(book.percent(node), 1) for node in sorted({part.node for part in self._parts})}

    def over_share(self, nodes: Collection[str]) -> Unmet:
        """Return that *nodes* may not be given what a call sends."""
        over = datetime.fromtimestamp(self._book.over, UTC).strftime("%Y-%m-%d %H:%M UTC")
        what = self._source.dataset or "the same values"
        return Unmet(
            "max_node_share",
            f"a GPU node is given at most {self._share.percent} % of {what} in {self._share.window_s} s, and some rows "
            f"of this call may go to none of {', '.join(sorted(nodes))}",
            f"have more GPU nodes free, send fewer rows, or wait until {over}",
        )


def _units(source: Source, obligations: Obligations) -> Index:
    """Return ``int64[of_rows]``: the unit of each row of the whole."""
    if source.groups is not None:
        return source.groups
    rows, n = np.arange(source.of_rows, dtype=np.int64), plan.block_rows(obligations)
    return rows if n == 1 else rows // n
