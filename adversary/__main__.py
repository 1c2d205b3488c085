"""``make adversary``: attack every shuffle, on paper and on a real cluster; writes docs/adversary.md."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adversary import captured, guessing, pools
from adversary.guessing import Guess, Seen
from benchmarks import machine
from zones.model import NodeShare, Obligations, Shuffle

REPORT = Path(__file__).resolve().parent.parent / "docs" / "adversary.md"
#: What is attacked: name, as zone.yaml demands it, and as the product has it.
DEMANDS: Sequence[tuple[str, str, Obligations]] = (
    ("rows", "shuffle: rows", Obligations()),
    (
        "rows, at most 60 % to a node",
        "shuffle: rows\nmax_node_share: {percent: 60}",
        Obligations(max_node_share=NodeShare(percent=60, window_s=86400)),
    ),
    ("blocks(16)", "shuffle: blocks(16)", Obligations(shuffle=Shuffle.BLOCKS, block_rows=16)),
    ("rows in windows of 1,000", "shuffle: rows\nshuffle_window: 1000", Obligations(shuffle_window=1000)),
    ("none (control)", "shuffle: none", Obligations(shuffle=Shuffle.NONE)),
)
#: Those of which nothing may be found out.
WHOLE = (DEMANDS[0][0], DEMANDS[1][0])
POOL, CAPTURED = 8, (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is tried."""

    pool_rows: int
    real_rows: int
    pool_calls: int
    real_calls: int
    trials: int


FULL = Scale(pool_rows=60_000, real_rows=40_000, pool_calls=10, real_calls=24, trials=5000)
QUICK = Scale(pool_rows=12_000, real_rows=8_000, pool_calls=3, real_calls=4, trials=1000)


def main() -> int:
    """Attack, print the report and write it."""
    parser = argparse.ArgumentParser(prog="python -m adversary", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few trials: whether it runs, not what it finds")
    options = parser.parse_args()
    os.environ["RAY_GPU_PROGRESS"] = "0"
    scale = QUICK if options.quick else FULL
    host = machine.describe()
    text = "\n".join(_report(host, scale, list(_on_paper(scale)), list(_for_real(scale)))) + "\n"
    sys.stdout.write(text)
    if not options.quick:
        REPORT.write_text(text, encoding="utf-8")
    return 0


def _on_paper(scale: Scale) -> Iterator[list[str]]:
    """Yield a row for each demand and number of captured nodes of a pool."""
    for name, _, obligations in DEMANDS:
        _say(f"{name}: a pool of {POOL}")
        known, asked = (
            pools.seen(scale.pool_rows, obligations, nodes=POOL, calls=scale.pool_calls, shards=8 * POOL, seed=seed)
            for seed in (1, 2)
        )
        for count in CAPTURED:
            nodes = {f"gpu-{number}" for number in range(count)}
            yield [name, f"{count} of {POOL}", *_asked(known.by(nodes), asked.by(nodes), scale, same_call=False)]


def _for_real(scale: Scale) -> Iterator[list[str]]:
    """Yield a row for each demand and number of captured nodes of a real cluster."""
    with captured.cluster(scale.real_rows) as cluster:
        for name, lines, _ in DEMANDS:
            _say(f"{name}: a cluster of 2")
            cluster.demand(lines)
            known, asked = cluster.seen(scale.real_calls), cluster.seen(scale.real_calls)
            for count in (1, 2):
                one, other = (seen.by(set(_nodes(seen)[:count])) for seen in (known, asked))
                yield [name, f"{count} of 2", *_asked(one, other, scale, same_call=count > 1)]


def _nodes(seen: Seen) -> list[str]:
    return sorted({shard.node for call in seen.calls for shard in call})


def _asked(known: Seen, asked: Seen, scale: Scale, *, same_call: bool) -> list[str]:
    questions: list[Callable[[Seen, Seen, int, int], Guess]] = [guessing.adjacent, guessing.position]
    found = [question(known, asked, scale.trials, 3) for question in questions]
    found += [guessing.same_call(known, asked, scale.trials // 4, 3)] if same_call else []
    return [*(f"{guess.auc:.3f}" for guess in found), *([] if same_call else ["-"]), f"{found[0].trials:,}"]


_HEAD = """# What captured GPU nodes can tell

Written by `make adversary`. An attacker who holds everything that *k* of *n* GPU nodes were sent in repeated calls over
one data set (rows, their order, shards' numbers, sizes and times), and has learned from as many calls of which it knew
the answers, guesses: which of two pairs of rows stood **side by side** in the source, which of two rows had the earlier
**position**, which shards of different nodes are of **one call**. The numbers are areas under the ROC curve: 0.5 is a
coin, 1 is certainty. Rows are numbered and nothing else, so values give nothing away here; real ones may, whatever
their order.

The target is 0.5 +- 0.02 for the first two with `rows` over the whole data set. All else is printed as measured.
"""
_COLUMNS = ("shuffle", "captured", "side by side", "position", "one call", "trials")


def _report(host: dict[str, str], scale: Scale, paper: list[list[str]], real: list[list[str]]) -> Iterator[str]:
    yield _HEAD
    yield from _table(["machine", ""], [[key, value] for key, value in host.items()])
    yield f"\n## A pool of {POOL} nodes, on paper\n"
    yield f"The product's own code plans and gives out {scale.pool_calls} calls over {scale.pool_rows:,} rows."
    yield "Nothing is sent.\n"
    yield from _table(_COLUMNS, paper)
    yield "\n## A real cluster of 2 nodes\n"
    yield f"{scale.real_calls} calls over {scale.real_rows:,} rows through the public API, all controls on.\n"
    yield from _table(_COLUMNS, real)
    far = [
        row for row in [*paper, *real] if row[0] in WHOLE and max(abs(float(cell) - 0.5) for cell in row[2:4]) > 0.02
    ]
    kept = [row for row in [*paper, *real] if "control" in row[0] and min(map(float, row[2:4])) <= 0.9]
    yield f"\nWith `rows` over the whole data set every guess is within 0.5 +- 0.02: {'no' if far else 'yes'}."
    yield f"The control is found out, above 0.9, each time: {'no' if kept else 'yes'}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
