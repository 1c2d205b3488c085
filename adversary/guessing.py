"""What captured nodes saw, and an attacker who guesses from it. Pure.

The attacker knows everything that a node holds: which rows it was sent, in which shards, in which order and when, and
the shards' numbers and sizes. It has learned from as many calls, of which it knew the answers, as it is then asked
about. Values say nothing: rows are numbered, and the numbers are the answers. No pair of rows is asked about twice.

==========  ========================================================================================
question    a guess is right when
==========  ========================================================================================
adjacent    of two pairs of rows, it ranks the pair that stood side by side in the source first
position    of two rows, it ranks the one first that stood nearer to the source's beginning
same call   of two pairs of shards on different nodes, it ranks the pair of one call first
larger      of two payloads, it ranks the larger one first, by what is seen of their sizes
==========  ========================================================================================

All are areas under the ROC curve: 0.5 is a coin, 1 is certainty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from zones.header import padded_size
from zones.model import Padding

Floats = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]

#: Place of a row that a node has not got.
_ABSENT = -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard, as the node that got it holds it."""

    node: str
    #: As in the header, which is in clear on the wire.
    number: int
    #: ``int64[rows]``: number in the source of each row, in the order in which it was received.
    rows: Index
    #: When it was there, seconds.
    at: float
    #: On the wire, bytes.
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is known of some calls over one data set."""

    #: Rows of the data set.
    rows: int
    #: Each call's shards.
    calls: Sequence[Sequence[Shard]]

    def by(self, captured: set[str]) -> Seen:
        """Return what some of the nodes saw."""
        return Seen(rows=self.rows, calls=[[one for one in call if one.node in captured] for call in self.calls])

    def held_by(self, count: int) -> Seen:
        """Return what so many nodes saw: those that were sent the most."""
        sent: Counter[str] = Counter()
        for call in self.calls:
            for shard in call:
                sent[shard.node] += len(shard.rows)
        return self.by({node for node, _ in sent.most_common(count)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """How well a question was answered."""

    auc: float
    trials: int


@dataclass(slots=True)
class _Places:
    """Where each row was in one call: shard's number, place in it, relative place, node, time; -1 where it was not."""

    table: Floats
    nodes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: int, call: Sequence[Shard]) -> _Places:
        """Look at one call."""
        found = cls(np.full((rows, 6), _ABSENT))
        began = min((shard.at for shard in call), default=0.0)
        for shard in call:
            node = found.nodes.setdefault(shard.node, len(found.nodes))
            places = np.arange(len(shard.rows))
            found.table[shard.rows, 0] = shard.number
            found.table[shard.rows, 1] = places
            found.table[shard.rows, 2] = places / max(1, len(places))
            found.table[shard.rows, 3:] = node, shard.at - began, shard.size
        return found


#: Features of pairs, and whether each is what is asked for.
_Trials = tuple[Floats, npt.NDArray[np.bool_]]


def adjacent(known: Seen, asked: Seen, trials: int, seed: int) -> Guess:
    """Guess which pairs of rows stood side by side, having learned from *known*."""

    def pairs(seen: Seen, rng: np.random.Generator) -> _Trials:
        held = _held(seen)
        first = held[:-1][np.diff(held) == 1]
        first = rng.permutation(first)[:trials]
        left, right = rng.permutation(held), rng.permutation(held)
        apart = np.flatnonzero(np.abs(left - right) > 1)[: len(first)]
        found = np.concatenate([np.stack([first, first + 1], 1), np.stack([left[apart], right[apart]], 1)])
        # Which of the two is named first says nothing.
        found = np.where(rng.random((len(found), 1)) < 0.5, found, found[:, ::-1])
        return _pair_features(seen, found, np.abs), np.arange(len(found)) < len(first)

    return _guess(pairs, known, asked, seed)


def position(known: Seen, asked: Seen, trials: int, seed: int) -> Guess:
    """Guess which of two rows stood nearer to the beginning, having learned from *known*."""

    def pairs(seen: Seen, rng: np.random.Generator) -> _Trials:
        held = _held(seen)
        found = np.stack([rng.permutation(held), rng.permutation(held)], 1)
        found = found[found[:, 0] != found[:, 1]][: 2 * trials]
        return _pair_features(seen, found, lambda difference: difference), found[:, 0] < found[:, 1]

    return _guess(pairs, known, asked, seed)


def same_call(known: Seen, asked: Seen, trials: int, seed: int) -> Guess:
    """Guess which shards of different nodes are of one call, having learned from *known*."""

    def pairs(seen: Seen, rng: np.random.Generator) -> _Trials:
        shards = [(number, shard) for number, call in enumerate(seen.calls) for shard in call]
        features, answers = [], []
        for together in rng.permutation(np.arange(2 * trials) < trials):
            call, one = shards[rng.integers(len(shards))]
            others = [item for item in shards if (item[0] == call) is bool(together) and item[1].node != one.node]
            if others:
                _, other = others[rng.integers(len(others))]
                features.append(_shard_features(one, other))
                answers.append(bool(together))
        return np.array(features), np.array(answers)

    return _guess(pairs, known, asked, seed)


def larger(padding: Padding | None, percent: float, trials: int, seed: int) -> Guess:
    """Guess which of two payloads is larger, that differ by at most *percent*, from their sizes on the wire."""
    rng = np.random.default_rng(seed)
    one = np.exp(rng.uniform(np.log(1e5), np.log(1e7), 2 * trials)).astype(np.int64)
    other = (one * (1 + rng.uniform(-percent, percent, 2 * trials) / 100)).astype(np.int64)
    one, other = one[one != other], other[one != other]
    seen, against = (
        np.array([n if padding is None else padded_size(int(n), padding) for n in some]) for some in (one, other)
    )
    return Guess(auc=float(roc_auc_score(one > other, np.sign(seen - against))), trials=len(one))


def _shard_features(one: Shard, other: Shard) -> list[float]:
    apart = (one.at - other.at, one.size - other.size, one.number - other.number, len(one.rows) - len(other.rows))
    return [*map(abs, apart), float(one.size), float(one.number == other.number)]


def _held(seen: Seen) -> Index:
    """Return the rows that were seen at all, ascending."""
    found = [shard.rows for call in seen.calls for shard in call]
    return np.unique(np.concatenate(found))


def _pair_features(seen: Seen, pairs: Index, difference: Callable[[Floats], Floats]) -> Floats:
    """Return, for each pair, how the places of its rows differ: on average over the calls, and at the least."""
    summed = np.zeros((len(pairs), 6))
    nearest = np.full(len(pairs), np.inf)
    together = np.zeros(len(pairs))
    counted = np.zeros(len(pairs))
    single = np.zeros((len(pairs), 6))
    for call in seen.calls:
        places = _Places.of(seen.rows, call).table
        one, other = places[pairs[:, 0]], places[pairs[:, 1]]
        both = (one[:, 0] != _ABSENT) & (other[:, 0] != _ABSENT)
        apart = difference(one - other)
        summed[both] += apart[both]
        single += one - other if difference is not np.abs else one + other
        shard = both & (one[:, 0] == other[:, 0])
        nearest[shard] = np.minimum(nearest[shard], np.abs(one - other)[shard, 1])
        together += shard
        counted += both
    mean = summed / np.maximum(1, counted)[:, None]
    many = max(1, len(seen.calls))
    far = np.where(np.isfinite(nearest), nearest, 1e9)
    return np.column_stack([mean, single / many, far, together / many, counted / many])


def _guess(pairs: Callable[[Seen, np.random.Generator], _Trials], known: Seen, asked: Seen, seed: int) -> Guess:
    """Learn from what is known, and be asked about the rest."""
    rng = np.random.default_rng(seed)
    features, answers = pairs(known, rng)
    model = HistGradientBoostingClassifier(max_iter=60, max_depth=4, random_state=seed)
    model.fit(features, answers)
    features, answers = pairs(asked, rng)
    ranked = model.predict_proba(features)[:, 1]
    return Guess(auc=float(roc_auc_score(answers, ranked)), trials=len(answers))
