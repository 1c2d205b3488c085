"""Parts of a data set that always have the same rows: train and test, folds, rounds, and parts of those. Pure.

A zone's catalog declares them, so that policy can say which may leave; nobody else can. Which segment a row is in is a
matter of the catalog and the data alone: the same on every host, in every run.

* By a column: each value's rows go to one segment, by a hash of the value. Rows that are added later, with new values
  or old ones, move no others.
* By none: rows are ranked by a hash of their number, and cut to the percents exactly.
* By rounds, for active learning: a data set of the zone lists which values of a column were labelled in which round;
  rows of the others are ``unlabelled``. What is listed in a later round moves rows there, and nowhere else.
* Stratified: cut so within each value of another column, as near to the percents as there are rows or groups. Rows that
  are added may then move others.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from zones.errors import ConfigError, UnknownNameError
from zones.model import Segments
from zones.plan import Index, draw

#: Returns a column of the whole data set: an Arrow array.
Columns = Callable[[str], Any]
#: Returns two columns of a data set that lists rounds: values of the column of this name, and the round of each.
Rounds = Callable[[str, str], tuple[Any, Any]]
#: Column of such a data set that has the number of the round, from 1.
ROUND_COLUMN = "round"
#: Name of the part that has what is in no round.
UNLABELLED = "unlabelled"
#: Separates a segment's name from that of the one that it is a part of.
SEPARATOR = "/"


def names(segments: Segments, above: str = "") -> Iterator[str]:
    """Yield the names of all segments, each before its parts: ``train``, ``train/fold-1``, ..., ``test``."""
    for part in segments.parts:
        name = f"{above}{part}"
        yield name
        if part in segments.within:
            yield from names(segments.within[part], f"{name}{SEPARATOR}")


def leaves(segments: Segments, chosen: Collection[str]) -> list[str]:
    """Return the segments without parts that are, or are in, one of *chosen*.

    Raises:
        UnknownNameError: There is no such segment.
    """
    every = list(names(segments))
    for one in chosen:
        if one not in every:
            raise UnknownNameError.of("segment", one, every)
    without = [name for name in every if not any(other != name and _is_in(other, name) for other in every)]
    return [name for name in without if any(_is_in(name, one) for one in chosen)]


def touched(segments: Segments, chosen: Collection[str]) -> frozenset[str]:
    """Return every segment that has rows in common with one of *chosen*: those in it, and those that it is in.

    Raises as :func:`leaves`.
    """
    found = leaves(segments, chosen)
    return frozenset(name for name in names(segments) if any(_is_in(leaf, name) for leaf in found))


def _is_in(name: str, other: str) -> bool:
    """Say whether a segment is another, or a part of it."""
    return f"{name}{SEPARATOR}".startswith(f"{other}{SEPARATOR}")


def rounds(count: int) -> dict[str, int]:
    """Return the parts of segments that are so many rounds."""
    return {**{f"round-{number}": 1 for number in range(1, count + 1)}, UNLABELLED: 1}


def divided(segments: Segments, chosen: Collection[str], above: str = "") -> Segments:
    """Return segments without the parts of parts that none of *chosen* is in: how these are divided does not matter."""
    within = {
        part: divided(inner, chosen, f"{above}{part}{SEPARATOR}")
        for part, inner in segments.within.items()
        if any(one.startswith(f"{above}{part}{SEPARATOR}") for one in chosen)
    }
    return replace(segments, within=within)


def listings(segments: Segments) -> set[str]:
    """Return the data sets that say which row is in which round."""
    own = set() if segments.listed_in is None else {segments.listed_in}
    return own.union(*(listings(inner) for inner in segments.within.values()))


def columns(segments: Segments) -> set[str]:
    """Return the columns that decide which row is where."""
    own = {name for name in (segments.by, segments.stratify) if name is not None}
    return own.union(*(columns(inner) for inner in segments.within.values()))


def assign(segments: Segments, dataset: str, rows: int, column: Columns, listed: Rounds | None = None) -> list[str]:
    """Return the leaf that each row of the whole data set is in.

    Args:
        segments: As the catalog has them.
        dataset: Its name, which is part of every hash.
        rows: Of the whole.
        column: Returns one of its columns.
        listed: Returns what a data set lists; needed where segments are rounds.

    Raises:
        ConfigError: What is listed cannot be rounds of these rows.
    """
    whole = _Whole(column, listed, np.empty(rows, object))
    _assign(segments, dataset, np.arange(rows), whole, "")
    return list(whole.found)


class _Whole(NamedTuple):
    """A data set whose rows are assigned, and the leaf of each, as far as it is known."""

    column: Columns
    listed: Rounds | None
    found: npt.NDArray[np.object_]


def _assign(segments: Segments, path: str, members: Index, whole: _Whole, above: str) -> None:
    """Write down the leaf of each of *members*, numbers of rows."""
    if segments.listed_in is None:
        places = _places(segments, path, members, whole.column)
    else:
        places = _rounds(segments, path, members, whole)
    for number, part in enumerate(segments.parts):
        name, inside = f"{above}{part}", members[places == number]
        if part in segments.within:
            below = f"{path}{SEPARATOR}{part}"
            _assign(segments.within[part], below, inside, whole, f"{name}{SEPARATOR}")
        else:
            whole.found[inside] = name


def _places(segments: Segments, path: str, members: Index, column: Columns) -> Index:
    """Return the number of the part that each of *members* is in."""
    seed = hashlib.sha256(f"ray-gpu segments v1\n{path}".encode()).digest()
    limits = list(itertools.accumulate(segments.parts.values()))
    if segments.by is None:
        units, of_row = len(members), np.arange(len(members))
        # By the number in the whole: the draw is the same for each row, whatever else is in the segment above.
        drawn = draw(int(members.max()) + 1 if len(members) else 0, seed)[members]
    else:
        codes = column(segments.by).take(members).dictionary_encode()
        texts = [repr(value) for value in codes.dictionary.to_pylist()] + ["None"] * bool(codes.null_count)
        of_row = codes.indices.fill_null(len(texts) - 1).to_numpy().astype(np.int64)
        units = len(texts)
        drawn = np.array([_hash(seed, text) for text in texts], np.uint64)
    if segments.stratify is None:
        if segments.by is None:
            return _ranked(drawn, np.zeros(units, np.int64), limits)[of_row]
        shares = drawn.astype(np.float64) / 2.0**64 * limits[-1]
        return np.searchsorted(np.array(limits[:-1], np.float64), shares, side="right")[of_row]
    values = column(segments.stratify).take(members).dictionary_encode()
    strata = values.indices.fill_null(len(values.dictionary)).to_numpy().astype(np.int64)
    of_unit = np.zeros(units, np.int64)
    # A group is of the stratum of its first row.
    of_unit[of_row[::-1]] = strata[::-1]
    return _ranked(drawn, of_unit, limits)[of_row]


def _rounds(segments: Segments, path: str, members: Index, whole: _Whole) -> Index:
    """Return the number of the round that each of *members* is in, from 0; that of no round is the last."""
    source, count = segments.listed_in, len(segments.parts) - 1
    assert source is not None
    assert segments.by is not None
    assert whole.listed is not None
    values, numbers = whole.listed(source, segments.by)
    own = whole.column(segments.by).take(members)
    try:
        values, numbers = values.cast(own.type), numbers.cast(pa.int64())
    except pa.ArrowException:
        raise _not_rounds(source, f"its columns {segments.by} and {ROUND_COLUMN} are not of the types wanted") from None
    if values.null_count or numbers.null_count or len(pc.unique(values)) < len(values):
        raise _not_rounds(source, "a value is null, or stands there twice")
    bounds = pc.min_max(numbers)
    if len(numbers) and not 1 <= bounds["min"].as_py() <= bounds["max"].as_py() <= count:
        raise _not_rounds(source, f"there are rounds 1 to {count}, and it has others")
    strange = len(set(values.to_pylist()) - set(own.to_pylist()))
    if strange:
        raise _not_rounds(source, f"{strange} of its values of {segments.by} are of no row of {path}")
    round_of = numbers.take(pc.index_in(own, value_set=values))
    found: Index = pc.subtract(round_of.fill_null(count + 1), 1).to_numpy(zero_copy_only=False)
    return found


def _not_rounds(source: str, why: str) -> ConfigError:
    return ConfigError(f"data set {source} does not list rounds: {why}; correct the data set", file=source)


def _ranked(drawn: npt.NDArray[np.uint64], strata: Index, limits: list[int]) -> Index:
    """Cut the units of each stratum, ranked by what was drawn, to the percents."""
    found = np.zeros(len(drawn), np.int64)
    for stratum in np.unique(strata):
        inside = np.flatnonzero(strata == stratum)
        inside = inside[np.argsort(drawn[inside], kind="stable")]
        edges = [round(len(inside) * limit / limits[-1]) for limit in limits[:-1]]
        found[inside] = np.searchsorted(edges, np.arange(len(inside)), side="right")
    return found


def _hash(seed: bytes, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=seed).digest(), "big")
