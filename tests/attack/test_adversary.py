"""An attacker with captured nodes guesses order and place; the same attacker, where nothing is moved, finds out both.

Here on small pools on paper, and on a real cluster; ``make adversary`` tries more and writes docs/adversary.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from adversary import captured, guessing, pools
from adversary.guessing import Seen
from zones.model import NodeShare, Obligations, Shuffle

#: Each guess is right about half the time: three standard deviations of so many trials.
ROWS, TRIALS, NEAR = 24_000, 2500, 0.025
SHARE = NodeShare(percent=60, window_s=86400)
REAL_ROWS, REAL_CALLS = 20_000, 5


def guesses(known: Seen, asked: Seen, count: int) -> list[float]:
    """Return how well the holder of so many nodes guesses neighbours and positions."""
    nodes = [sorted({shard.node for call in seen.calls for shard in call})[:count] for seen in (known, asked)]
    one, other = known.by(set(nodes[0])), asked.by(set(nodes[1]))
    return [question(one, other, TRIALS, 7).auc for question in (guessing.adjacent, guessing.position)]


def on_paper(obligations: Obligations, *, rows: int = ROWS) -> tuple[Seen, Seen]:
    """Return what a pool of four sees of two data sets."""
    one, other = (pools.seen(rows, obligations, nodes=4, calls=4, shards=16, seed=seed) for seed in (1, 2))
    return one, other


@pytest.mark.parametrize(
    "obligations", [Obligations(), Obligations(max_node_share=SHARE)], ids=["rows", "rows, with a bound share"]
)
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_found_out(obligations: Obligations, count: int) -> None:
    """With `rows`, neither who stood beside whom nor where is better than a coin, over repeated calls."""
    for auc in guesses(*on_paper(obligations), count):
        assert abs(auc - 0.5) < NEAR


def test_control_order_is_found_out() -> None:
    """Control: where rows are not moved, the same attacker knows both."""
    assert min(guesses(*on_paper(Obligations(shuffle=Shuffle.NONE)), 1)) > 0.9


def test_blocks_tell_neighbours_and_not_places() -> None:
    """What docs/adversary.md says of blocks and windows: blocks tell who stood beside whom, windows also where."""
    beside, where = guesses(*on_paper(Obligations(shuffle=Shuffle.BLOCKS, block_rows=16)), 2)
    assert beside > 0.9
    assert abs(where - 0.5) < NEAR
    assert min(guesses(*on_paper(Obligations(shuffle_window=500)), 2)) > 0.9


@pytest.fixture(scope="module")
def cluster() -> Iterator[captured.Captured]:
    """A cluster whose rows are numbered."""
    with captured.cluster(REAL_ROWS) as running:
        yield running


@pytest.mark.heavy
@pytest.mark.parametrize("lines", ["shuffle: rows", "shuffle: rows\nmax_node_share: {percent: 60}"])
def test_nothing_is_found_out_for_real(cluster: captured.Captured, lines: str) -> None:
    """The same on real nodes, with their real times: all rows arrive, and nothing is found out of them."""
    cluster.demand(lines)
    known, asked = cluster.seen(REAL_CALLS), cluster.seen(REAL_CALLS)

    for call in asked.calls:
        assert np.sort(np.concatenate([shard.rows for shard in call])).tolist() == list(range(REAL_ROWS))
    for auc in [*guesses(known, asked, 1), *guesses(known, asked, 2)]:
        assert abs(auc - 0.5) < NEAR


@pytest.mark.heavy
def test_control_order_is_found_out_for_real(cluster: captured.Captured) -> None:
    """Control: the same nodes, where rows are not moved."""
    cluster.demand("shuffle: none")

    assert min(guesses(cluster.seen(REAL_CALLS), cluster.seen(REAL_CALLS), 2)) > 0.9
