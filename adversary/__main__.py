"""``make adversary``: attack every shuffle, on paper and on a real cluster; writes docs/adversary.md."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adversary import captured, guessing, pools
from adversary.guessing import Guess, Seen
from benchmarks import machine
from zones.model import NodeShare, Obligations, Padding, Shuffle

REPORT = Path(__file__).resolve().parent.parent / "docs" / "adversary.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is attacked."""

    name: str
    #: As the product has it, and as zone.yaml demands it.
    obligations: Obligations
    lines: str
    #: Whether nothing may be found out; of the control, all has to be.
    hides: bool = False
    control: bool = False
    #: Rows that are kept together: so many neighbours each, or 0 for all that there are.
    group_rows: int | None = None
    #: Whether the attacker sees padded sizes.
    padded: bool = True
    #: Whether a node is lost in each call.
    loses: bool = False


DEMANDS = (
    Demand(name="rows", lines="shuffle: rows", obligations=Obligations(), hides=True),
    Demand(
        name="rows, at most 60 % to a node",
        lines="shuffle: rows\nmax_node_share: {percent: 60}",
        obligations=Obligations(max_node_share=NodeShare(percent=60, window_s=86400)),
        hides=True,
    ),
    Demand(name="rows, a node lost in each call", lines="", obligations=Obligations(), hides=True, loses=True),
    Demand(name="rows, all kept together", lines="shuffle: rows", obligations=Obligations(), group_rows=0, hides=True),
    Demand(name="rows, by 8 neighbours kept together", lines="", obligations=Obligations(), group_rows=8),
    Demand(
        name="blocks(16)",
        lines="shuffle: blocks(16)",
        obligations=Obligations(shuffle=Shuffle.BLOCKS, block_rows=16),
    ),
    Demand(
        name="rows in windows of 1,000",
        lines="shuffle: rows\nshuffle_window: 1000",
        obligations=Obligations(shuffle_window=1000),
    ),
    Demand(name="none (control)", lines="shuffle: none", obligations=Obligations(shuffle=Shuffle.NONE), control=True),
    Demand(
        name="none, and sizes not padded (control)",
        lines="",
        obligations=Obligations(shuffle=Shuffle.NONE),
        control=True,
        padded=False,
    ),
)
POOL, CAPTURED = 8, (1, 2, 4, 8)
#: How far from a coin a guess may be where nothing may be found out, and how far it has to be for the control.
NEAR, FOUND_OUT = 0.02, 0.9
#: By how much two payloads differ in size at most of which an attacker guesses which is larger, percent.
APART = (1, 5, 25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is tried."""

    pool_rows: int
    real_rows: int
    pool_calls: int
    real_calls: int
    trials: int


#: So many that what happens by chance stays within NEAR: four standard deviations.
FULL = Scale(pool_rows=500_000, real_rows=40_000, pool_calls=10, real_calls=24, trials=7500)
QUICK = Scale(pool_rows=12_000, real_rows=8_000, pool_calls=3, real_calls=4, trials=1000)


def main() -> int:
    """Attack, print the report and write it; return 1 where something is found out, or the control is not."""
    parser = argparse.ArgumentParser(prog="python -m adversary", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few trials: whether it runs, not what it finds")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("the attacker sees all traffic, which takes a capture of the network: run it as root")
    os.environ["RAY_GPU_PROGRESS"] = "0"
    scale = QUICK if options.quick else FULL
    host = machine.describe()
    paper, real = list(_on_paper(scale)), list(_for_real(scale))
    text = "\n".join(_report(host, scale, paper, real)) + "\n"
    sys.stdout.write(text)
    if options.quick:
        return 0
    REPORT.write_text(text, encoding="utf-8")
    wrong = failures([*paper, *real])
    for row in wrong:
        _say(f"not as it must be: {row.demand.name}, {row.captured}: {row.cells()}")
    return int(bool(wrong))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was guessed."""

    demand: Demand
    captured: str
    adjacent: Guess
    position: Guess
    same_call: Guess | None

    def cells(self) -> list[str]:
        """Return the row of the table."""
        guesses = (self.adjacent, self.position, self.same_call)
        shown = (f"{guess.auc:.3f}" if guess else "-" for guess in guesses)
        return [self.demand.name, self.captured, *shown, f"{min(self.adjacent.trials, self.position.trials):,}"]


def failures(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in which something is found out that must not be, or the control is not found out."""
    return [row for row in rows if not _is_as_it_must_be(row)]


def _is_as_it_must_be(row: Row) -> bool:
    found = (row.adjacent.auc, row.position.auc)
    if row.demand.control:
        return min(found) > FOUND_OUT
    return not row.demand.hides or all(abs(auc - 0.5) <= NEAR for auc in found)


def _on_paper(scale: Scale) -> Iterator[Row]:
    """Yield a row for each demand and number of captured nodes of a pool."""
    for demand in DEMANDS:
        _say(f"{demand.name}: a pool of {POOL}")
        numbers = np.arange(scale.pool_rows)
        groups = None if demand.group_rows is None else numbers // (demand.group_rows or scale.pool_rows)
        pool = pools.Pool(nodes=POOL, calls=scale.pool_calls, shards=8 * POOL, padded=demand.padded, loses=demand.loses)
        known, asked = (pools.seen(scale.pool_rows, demand.obligations, pool, seed, groups=groups) for seed in (1, 2))
        for count in CAPTURED:
            yield _asked(demand, f"{count} of {POOL}", known.held_by(count), asked.held_by(count), scale, one=False)


def _for_real(scale: Scale) -> Iterator[Row]:
    """Yield a row for each demand that policy can make, and number of captured nodes of a real cluster."""
    with captured.cluster(scale.real_rows) as cluster:
        for demand in DEMANDS:
            if not demand.lines:
                continue
            _say(f"{demand.name}: a cluster of 2")
            together = captured.ALIKE if demand.group_rows == 0 else None
            # All together are one shard.
            cluster.demand(demand.lines, min_shards=captured.SHARDS if together is None else 1)
            known, asked = (cluster.seen(scale.real_calls, keep_together=together) for _ in range(2))
            for count in (1, 2):
                several = count > 1 and together is None
                yield _asked(demand, f"{count} of 2", known.held_by(count), asked.held_by(count), scale, one=several)


def _asked(demand: Demand, holder: str, known: Seen, asked: Seen, scale: Scale, *, one: bool) -> Row:
    return Row(
        demand=demand,
        captured=holder,
        adjacent=guessing.adjacent(known, asked, scale.trials, 3),
        position=guessing.position(known, asked, scale.trials, 3),
        same_call=guessing.same_call(known, asked, scale.trials // 4, 3) if one else None,
    )


_HEAD = """# What captured GPU nodes can tell

Written by `make adversary`. An attacker who holds everything that *k* of *n* GPU nodes were sent in repeated calls over
one data set (rows, their order, shards' numbers, sizes and times), and has learned from as many calls of which it knew
the answers, guesses: which of two pairs of rows stood **side by side** in the source, which of two rows had the earlier
**position**, which shards of different nodes are of **one call**. The numbers are areas under the ROC curve: 0.5 is a
coin, 1 is certainty. Rows are numbered and nothing else, so values give nothing away here; real ones may, whatever
their order.

The target is 0.5 +- 0.02 for the first two with `rows` over the whole data set, and more than 0.9 for the controls;
`make adversary` fails without. All else is printed as measured. "All kept together" is `keep_together` by a column
that is the same everywhere.
"""
_COLUMNS = ("shuffle", "captured", "side by side", "position", "one call", "trials")


def _report(host: dict[str, str], scale: Scale, paper: Sequence[Row], real: Sequence[Row]) -> Iterator[str]:
    yield _HEAD
    yield from _table(["machine", ""], [[key, value] for key, value in host.items()])
    yield f"\n## A pool of {POOL} nodes, on paper\n"
    yield f"The product's own code plans and gives out {scale.pool_calls} calls over {scale.pool_rows:,} rows."
    yield "Nothing is sent.\n"
    yield from _table(_COLUMNS, [row.cells() for row in paper])
    yield "\n## A real cluster of 2 nodes\n"
    yield f"{scale.real_calls} calls over {scale.real_rows:,} rows through the public API, all controls on. Sizes are"
    yield "those of a capture of the network.\n"
    yield from _table(_COLUMNS, [row.cells() for row in real])
    yield "\n## Sizes\n"
    yield "Which of two payloads of 100 kB to 10 MB is larger, whose sizes differ by at most so much? On paper.\n"
    yield from _table(["apart by at most", "not padded (control)", *map(str, Padding)], _sizes(scale))
    wrong = failures([*paper, *real])
    yield f"\nAll is as it must be: {'no' if wrong else 'yes'}."


def _sizes(scale: Scale) -> Iterator[list[str]]:
    for percent in APART:
        guesses = (guessing.larger(how, percent, scale.trials, 3) for how in (None, *Padding))
        yield [f"{percent} %", *(f"{guess.auc:.3f}" for guess in guesses)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
