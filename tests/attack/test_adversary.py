"""An attacker with captured nodes guesses order and place; the same attacker, where nothing is moved, finds out both.

Here on small pools on paper, and on a real cluster; ``make adversary`` tries more and writes docs/adversary.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from adversary import captured, guessing, pools
from adversary.guessing import Seen
from zones.model import NodeShare, Obligations, Padding, Shuffle
from zones.plan import Index

#: Each guess is right about half the time: 3.7 standard deviations of so many trials.
ROWS, TRIALS, NEAR = 96_000, 6000, 0.02
SHARE = NodeShare(percent=60, window_s=86400)
REAL_ROWS, REAL_CALLS = 30_000, 5


def guesses(known: Seen, asked: Seen, count: int) -> list[float]:
    """Return how well the holder of so many nodes guesses neighbours and positions."""
    one, other = known.held_by(count), asked.held_by(count)
    return [question(one, other, TRIALS, 7).auc for question in (guessing.adjacent, guessing.position)]


def on_paper(
    obligations: Obligations, *, groups: Index | None = None, padded: bool = True, loses: bool = False
) -> tuple[Seen, Seen]:
    """Return what a pool of four sees of two data sets."""
    pool = pools.Pool(nodes=4, calls=4, shards=16, padded=padded, loses=loses)
    one, other = (pools.seen(ROWS, obligations, pool, seed, groups=groups) for seed in (1, 2))
    return one, other


@pytest.mark.parametrize(
    "obligations", [Obligations(), Obligations(max_node_share=SHARE)], ids=["rows", "rows, with a bound share"]
)
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_found_out(obligations: Obligations, count: int) -> None:
    """With `rows`, neither who stood beside whom nor where is better than a coin, over repeated calls."""
    for auc in guesses(*on_paper(obligations), count):
        assert abs(auc - 0.5) < NEAR


@pytest.mark.parametrize("count", [1, 3])
def test_further_attempts_tell_nothing(count: int) -> None:
    """What is sent again, after a node was lost, is in the same order under the same number, and tells nothing more."""
    known, asked = on_paper(Obligations(), loses=True)
    for call in asked.calls:
        numbers = [shard.number for shard in call]
        (again,) = {number for number in numbers if numbers.count(number) > 1}
        first, second = (shard for shard in call if shard.number == again)
        assert first.node != second.node

    for auc in guesses(known, asked, count):
        assert abs(auc - 0.5) < NEAR


def test_nothing_is_found_out_of_a_group() -> None:
    """With `rows`, those that `keep_together` keeps in one shard do not stand in the source's order there."""
    for auc in guesses(*on_paper(Obligations(), groups=np.zeros(ROWS, np.int64)), 1):
        assert abs(auc - 0.5) < NEAR


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("groups", [None, np.zeros(ROWS, np.int64)], ids=["rows", "one group"])
def test_control_order_is_found_out(groups: Index | None, *, padded: bool) -> None:
    """Control: where rows are not moved, the same attacker knows both, with padded sizes and without."""
    seen = on_paper(Obligations(shuffle=Shuffle.NONE), groups=groups, padded=padded)

    assert min(guesses(*seen, 1)) > 0.9


def test_sizes() -> None:
    """Which of two payloads is larger is not certain any more where sizes are padded, and less so in coarse steps."""
    fine, coarse = (guessing.larger(padding, 5, TRIALS, 7).auc for padding in Padding)

    assert guessing.larger(None, 5, TRIALS, 7).auc == 1
    assert coarse < fine < 0.9


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
@pytest.mark.parametrize(
    ("lines", "together"),
    [
        ("shuffle: rows", None),
        ("shuffle: rows\nmax_node_share: {percent: 60}", None),
        ("shuffle: rows", captured.ALIKE),
    ],
    ids=["rows", "rows, with a bound share", "rows, all kept together"],
)
def test_nothing_is_found_out_for_real(cluster: captured.Captured, lines: str, together: str | None) -> None:
    """The same on real nodes, with their real times and sizes: all rows arrive, and nothing is found out of them."""
    cluster.demand(lines, min_shards=1 if together else captured.SHARDS)
    known, asked = (cluster.seen(REAL_CALLS, keep_together=together) for _ in range(2))

    for call in asked.calls:
        assert np.sort(np.concatenate([shard.rows for shard in call])).tolist() == list(range(REAL_ROWS))
    for auc in [*guesses(known, asked, 1), *guesses(known, asked, 2)]:
        assert abs(auc - 0.5) < NEAR


@pytest.mark.heavy
def test_control_order_is_found_out_for_real(cluster: captured.Captured) -> None:
    """Control: the same nodes, where rows are not moved."""
    cluster.demand("shuffle: none")

    assert min(guesses(cluster.seen(REAL_CALLS), cluster.seen(REAL_CALLS), 2)) > 0.9
