"""Which rows go into which shard, drawn from a seed: the shuffle order, the cut, and splits of a data set.

The plan is as secret as the data and never leaves the gateway. Rows move in *units*: one row with ``rows``,
a block of *n* neighbours with ``blocks(n)``, the rows of one group where a call keeps rows together. Only the units'
order is drawn and kept.

======== ==================================================== =======================================
shuffle  what a node can tell                                 cost
======== ==================================================== =======================================
rows     which rows it has, not how they were ordered         a random read per cell
blocks   that the *n* rows of a block were neighbours; the    a random read per block and column
         one shorter block, if any, held the last rows
none     the order of all its rows                            a plain copy
======== ==================================================== =======================================

Nothing here reads a clock, randomness or files. Seeds are passed in.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from zones.keystream import keystream
from zones.model import Obligations, Shuffle

Index = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

#: Bytes of a shuffle seed: one draw from the operating system per call, ``secrets.token_bytes(32)``.
SEED_BYTES = 32
#: Most bits of a key's 64 that a part may take; the rest orders units within it. Two units of a million in one part
#: draw the same 48 bits once in hundreds of calls, and then keep their order.
_PART_BITS = 16
_BLOCKS = re.compile(r"blocks\(([1-9][0-9]{0,8})\)")


def parse_shuffle(text: str) -> tuple[Shuffle, int]:
    """Read ``"rows"``, ``"none"`` or ``"blocks(16)"``; the number is the rows of a block, else 1.

    Raises:
        ValueError: *text* is none of them.
    """
    if match := _BLOCKS.fullmatch(text):
        return Shuffle.BLOCKS, int(match[1])
    if text in (Shuffle.ROWS.value, Shuffle.NONE.value):
        return Shuffle(text), 1
    raise ValueError(f"shuffle {text!r} must be 'rows', 'none' or 'blocks(n)' with n of at least 1")


def order(rows: int, obligations: Obligations, seed: bytes) -> Index | None:
    """Draw the shuffle: ``int64[units]``, the unit at each place, or ``None`` to keep the order.

    With ``shuffle_window`` each unit stays within its window: only where it is in there is drawn.

    Raises:
        ValueError: *seed* is not :data:`SEED_BYTES` long.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a shuffle seed has {SEED_BYTES} bytes, not {len(seed)}")
    if obligations.shuffle is Shuffle.NONE:
        return None
    n = block_rows(obligations)
    units, window = _units(rows, n), obligations.shuffle_window
    if window is None:
        return permutation(units, seed)
    return sorted_units(np.arange(units) // max(1, window // n), draw(units, seed))


def draw(count: int, seed: bytes) -> Keys:
    """Return ``uint64[count]`` that nobody without *seed* can tell from random numbers.

    NumPy's generators are not used: whoever sees enough of their output can compute the rest, and a node may know the
    order of the rows it holds.
    """
    return keystream(seed, 8 * count).view("<u8")


def permutation(count: int, seed: bytes) -> Index:
    """Return ``int64[count]``, a permutation that nobody without *seed* can tell from a random one."""
    return _sorted(draw(count, seed))


def sorted_units(parts: Index, drawn: Keys) -> Index:
    """Return the order of units by the part that each belongs to, from 0, and within it by what was drawn."""
    bits = int(parts.max()).bit_length() if len(parts) else 0
    if bits > _PART_BITS:
        return np.lexsort((drawn, parts)).astype(np.int64, copy=False)
    return _sorted((parts.astype(np.uint64) << np.uint64(64 - bits)) | (drawn >> np.uint64(bits)) if bits else drawn)


def _sorted(keys: Keys) -> Index:
    """Return ``np.argsort(keys, kind="stable")``, in half the time where few keys have the same upper 32 bits."""
    quarters = keys.view("<u2").reshape(len(keys), 4)
    # NumPy sorts 16 bits by radix: so by the upper 32 first, and then by all 64 what is nearly in order already.
    found = np.argsort(quarters[:, 2], kind="stable")
    found = found[np.argsort(quarters[found, 3], kind="stable")]
    return found[np.argsort(keys[found], kind="stable")].astype(np.int64, copy=False)


def cut(rows: int, row_bytes: int, shard_bytes: int, min_shards: int) -> list[tuple[int, int]]:
    """Cut *rows* into runs of nearly equal length, so that no short last shard tells where the end is.

    Args:
        rows: Rows, or units, to cut.
        row_bytes: Bytes of one, on average.
        shard_bytes: Bytes that a shard should not exceed, though it always has at least one row.
        min_shards: Smallest number of shards, as far as there are rows.

    Returns:
        ``(start, stop)`` of each shard; one empty shard for no rows.
    """
    if min(row_bytes, shard_bytes, min_shards) < 1 or rows < 0:
        raise ValueError("row_bytes, shard_bytes and min_shards must be at least 1, and rows at least 0")
    per_shard = max(1, shard_bytes // row_bytes)
    count = max(1, min(rows, max(min_shards, -(-rows // per_shard))))
    edges = [rows * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """Which rows go into which shard. Secret: it is the order that a shuffle hides."""

    rows: int
    #: Rows of a unit; 1 unless blocks are moved.
    block_rows: int
    #: ``int64[units]``, the unit at each place, or ``None`` for the source's order.
    order: Index | None = field(repr=False)
    #: ``(start, stop)`` in places of *order*, for each shard.
    cuts: tuple[tuple[int, int], ...] = field(repr=False)

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self.cuts)

    def shard_rows(self, shard: int) -> int:
        """Return the number of rows in *shard*."""
        return sum(run.stop - run.start for run, _ in self.runs(shard))

    def runs(self, shard: int) -> Iterator[tuple[slice, Index | slice]]:
        """Yield ``(rows of the shard, where they come from)``; the source is whole units by number, or a slice of rows.

        Only the last unit can be short. Its rows come as a slice of their own, so that all others move as equals.
        """
        start, stop = self.cuts[shard]
        n, whole = self.block_rows, self.rows // self.block_rows
        if self.order is None:
            yield slice(0, min(stop * n, self.rows) - start * n), slice(start * n, min(stop * n, self.rows))
            return
        units = self.order[start:stop]
        short = np.flatnonzero(units >= whole) if self.rows % n else units[:0]
        at = int(short[0]) if short.size else len(units)
        yield slice(0, at * n), units[:at]
        if short.size:
            tail = at * n + self.rows % n
            yield slice(at * n, tail), slice(whole * n, self.rows)
            yield slice(tail, tail + (len(units) - at - 1) * n), units[at + 1 :]

    def row_index(self, shard: int) -> Index:
        """Return ``int64[shard_rows]``: the source row of each row of *shard*."""
        index = np.empty(self.shard_rows(shard), np.int64)
        within = np.arange(self.block_rows, dtype=np.int64)
        for target, source in self.runs(shard):
            if isinstance(source, slice):
                index[target] = np.arange(source.start, source.stop)
            else:
                index[target] = (source[:, None] * self.block_rows + within).reshape(-1)
        return index


def make_plan(
    rows: int, row_bytes: int, *, obligations: Obligations, seed: bytes, shard_bytes: int, min_shards: int = 1
) -> Plan:
    """Draw the order and cut it. Arguments as in :func:`order` and :func:`cut`; *row_bytes* from :func:`row_bytes`."""
    n = block_rows(obligations)
    cuts = cut(_units(rows, n), row_bytes * n, shard_bytes, min_shards)
    return Plan(rows=rows, block_rows=n, order=order(rows, obligations, seed), cuts=tuple(cuts))


def plan_of_groups(
    groups: Index, row_bytes: int, *, obligations: Obligations, seed: bytes, shard_bytes: int, min_shards: int = 1
) -> Plan:
    """Draw an order of whole groups and of the rows within each, and cut between groups alone.

    Args:
        groups: ``int64[rows]``: rows with one number are a group.
        row_bytes: And all others: as for :func:`make_plan`. With ``none`` groups come as they begin in the source, and
            their rows as they stand there. Blocks and windows do not matter: a group moves anywhere, and its rows
            within it.
    """
    rows = len(groups)
    _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
    count = len(first)
    kept = obligations.shuffle is Shuffle.NONE
    rank = np.empty(count, np.int64)
    rank[np.argsort(first, kind="stable") if kept else permutation(count, seed)] = np.arange(count)
    of_row = rank[numbers.reshape(-1)]
    ends = np.cumsum(np.bincount(of_row, minlength=count))
    wanted = [stop for _, stop in cut(rows, row_bytes, shard_bytes, min_shards)]
    # Each cut moves to the end of the group that it falls into.
    edges = np.unique(ends[np.searchsorted(ends, wanted)]).tolist() if rows else [0]
    moved = rows_of_groups(of_row, obligations, seed)
    return Plan(rows=rows, block_rows=1, order=moved, cuts=tuple(itertools.pairwise([0, *edges])))


def rows_of_groups(ranks: Index, obligations: Obligations, seed: bytes) -> Index:
    """Return the order of rows whose groups have these ranks; within a group it is drawn, but with ``none``."""
    if obligations.shuffle is Shuffle.NONE:
        return np.argsort(ranks, kind="stable").astype(np.int64, copy=False)
    # A draw of its own: the groups' order came from the seed itself.
    return sorted_units(ranks, draw(len(ranks), hashlib.sha256(b"within groups" + seed).digest()))


def groups_of(column: Any) -> Index:
    """Return ``int64[rows]``: rows with one value get one number; each null is a value of its own."""
    codes = column.combine_chunks().dictionary_encode()
    found: Index = codes.indices.fill_null(-1).to_numpy().astype(np.int64)
    alone = found < 0
    found[alone] = len(codes.dictionary) + np.arange(np.count_nonzero(alone))
    return found


def row_bytes(table: pa.Table) -> int:
    """Return the average bytes of a row, at least 1."""
    return max(1, -(-table.nbytes // max(1, table.num_rows)))


def block_rows(obligations: Obligations) -> int:
    """Return how many neighbouring rows move as one."""
    return obligations.block_rows if obligations.shuffle is Shuffle.BLOCKS else 1


def _units(rows: int, block_rows: int) -> int:
    return -(-rows // block_rows)


def split_rows(rows: int, fractions: Sequence[float], seed: bytes) -> list[Index]:
    """Split row numbers at random into parts, the same ones for the same seed.

    Args:
        rows: Rows of the data set.
        fractions: Share of each part, above 0. What is missing to 1 is a last part.
        seed: Any bytes; the handle's choice.

    Returns:
        ``int64`` row numbers of each part, in the source's order: disjoint, and together all rows.

    Raises:
        ValueError: A fraction is not above 0, or their sum is above 1.
    """
    total = sum(fractions)
    if not fractions or not all(part > 0 for part in fractions) or not total <= 1 + 1e-9:
        raise ValueError("fractions must be above 0 and sum to at most 1, as in split(0.8) or split(0.5, 0.3)")
    shares = np.cumsum([*fractions] if total > 1 - 1e-9 else [*fractions, 1 - total])
    edges = np.rint(shares / shares[-1] * rows).astype(np.int64)[:-1]
    drawn = permutation(rows, hashlib.sha256(b"split" + seed).digest())
    return [np.sort(part) for part in np.split(drawn, edges)]
