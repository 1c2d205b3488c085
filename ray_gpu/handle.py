"""Rows of a catalog data set, as a notebook names them. Nothing is read until a call needs it.

A handle is a description: the gateway resolves it against the reviewed catalog, by name, so that a forged one can
name nothing else and the columns' classes are the catalog's.
"""

from __future__ import annotations

import importlib
import numbers
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ray_gpu.share import open_table
from zones import filters
from zones.errors import UnknownNameError

if TYPE_CHECKING:
    from ray_gpu.client import Session

#: What people look for who take a handle for its rows.
_NAMES_ROWS = (
    "it names rows, which a call reads. For mini-batches slice the batch inside the function, or split the handle; "
    ".to_arrow() and .to_pandas() give the rows here, in the zone"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """Rows of a catalog data set that the gateway reads. Nothing is read until a call needs it.

    Labels follow ``select``, ``filter`` and ``split``: the gateway resolves them again, by name.
    """

    session: Session
    dataset: str
    columns: tuple[str, ...]
    #: Segments of the data set; ``None``: all of it.
    segments: tuple[str, ...] | None = None
    #: A filter on the rows, as ``zones.filters`` describes it.
    condition: Any = None
    #: Fractions, seed and index of the part, when this is a part of a split.
    part: tuple[tuple[float, ...], int, int] | None = None
    #: A filter on the rows of the part.
    then: Any = None

    def select(self, columns: Iterable[str]) -> Handle:
        """Return a handle on some of the columns, in the order given.

        Raises:
            UnknownNameError: The handle has no such column.
            TypeError, ValueError: *columns* is no list of names, or names one twice.
        """
        return replace(self, columns=column_names(columns, self.columns))

    def segment(self, *names: str) -> Handle:
        """Return a handle on the rows of segments that the catalog declares, such as ``"train"`` or ``"train/fold-1"``.

        Which row is in which segment is always the same. Policy may forbid that a segment leaves, and with it a handle
        that has rows of it.

        Raises:
            UnknownNameError: The data set has no such segment.
            ValueError: None is named, or the handle is of some already.
        """
        if not names or self.segments is not None:
            raise ValueError('segment takes names, once, as in segment("train") or segment("fold-1", "fold-2")')
        known = self.session.segments(self.dataset)
        for name in names:
            if name not in known:
                raise UnknownNameError.of("segment", name, known)
        return replace(self, segments=tuple(dict.fromkeys(names)))

    def filter(self, condition: Any) -> Handle:
        """Return a handle on the rows that meet *condition*, for example ``["age", ">", 60]``.

        It may name columns that the handle does not select: they do not leave, but which rows leave shows them, so
        their classes count too.

        Raises:
            UnknownNameError: The data set has no such column.
            ValueError: *condition* is no filter.
        """
        condition = filters.plain(condition)
        filters.filter_columns(condition, list(self.session.datasets[self.dataset]))
        if self.part is None:
            return replace(self, condition=_both(self.condition, condition))
        return replace(self, then=_both(self.then, condition))

    def split(self, *fractions: float, seed: int = 0) -> tuple[Handle, ...]:
        """Return handles on disjoint random parts: ``split(0.8)`` gives two, ``split(0.6, 0.2)`` three.

        The same seed gives the same parts.

        Raises:
            ValueError: Fractions are not above 0 or sum to more than 1, or the handle is a part already.
            TypeError: A fraction or the seed is no number.
        """
        if not all(isinstance(part, numbers.Real) for part in fractions):
            raise TypeError("split takes fractions one by one, as in split(0.6, 0.2)")
        shares, seed = tuple(float(part) for part in fractions), operator.index(seed)
        # Asked this way round, so that what is not a number is refused too.
        if not shares or not all(part > 0 for part in shares) or not sum(shares) <= 1 + 1e-9:
            raise ValueError("split takes fractions above 0 that sum to at most 1, as in split(0.8)")
        if self.part is not None:
            raise ValueError("this handle is one part of a split; split the whole into more parts instead")
        parts = len(shares) + (sum(shares) < 1 - 1e-9)
        return tuple(replace(self, part=(shares, seed, index)) for index in range(parts))

    def document(self) -> dict[str, Any]:
        """Return what the gateway resolves."""
        return {
            "dataset": self.dataset,
            "columns": list(self.columns),
            "segments": None if self.segments is None else list(self.segments),
            "filter": self.condition,
            "split": self._split(),
            "then": self.then,
        }

    def _split(self) -> dict[str, Any] | None:
        if self.part is None:
            return None
        fractions, seed, part = self.part
        return {"fractions": list(fractions), "seed": seed, "part": part}

    def __reduce__(self) -> Any:
        raise TypeError("a zone.read(...) handle does not leave the zone; pass it as the call's data")

    def to_arrow(self) -> pa.Table:
        """Return the rows, inside the zone."""
        _, fds = self.session.ask({"op": "read", "data": self.document()})
        return open_table(fds[0], trusted=True)

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """Return the rows, inside the zone, for whatever reads Arrow streams."""
        table: Any = self.to_arrow()
        return table.__arrow_c_stream__(requested_schema)

    def to_pandas(self) -> Any:
        """Return the rows, inside the zone, as a ``pandas.DataFrame``."""
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """Return the rows, inside the zone, as a ``polars.DataFrame``.

        Raises:
            ImportError: Polars is not installed.
        """
        return importlib.import_module("polars").from_arrow(self.to_arrow())

    def overlap(self, other: Handle, columns: Iterable[str] | None = None) -> int:
        """Return how many rows of *other* have the same values as some row of this one: what leaks between segments.

        Both are read here, in the zone.

        Args:
            other: Such as ``zone.read("digits").segment("test")``, with this being the rows that a model learns from.
            columns: What is compared, such as a patient's number or everything but the label; all by default.

        Raises:
            UnknownNameError: One of the two has no such column.
        """
        names = column_names(self.columns if columns is None else columns, self.columns)
        seen, asked = (map(repr, handle.select(names).to_arrow().to_pylist()) for handle in (self, other))
        known = set(seen)
        return sum(row in known for row in asked)

    def __getattr__(self, name: str) -> Any:
        # Asked only for what a handle has not.
        hint = "" if name.startswith("_") else f"; {_NAMES_ROWS}"
        raise AttributeError(f"a handle has no attribute {name!r}{hint}")

    def __getitem__(self, place: object) -> Any:
        """Refuse: there are no rows here."""
        raise TypeError(f"a handle cannot be indexed; {_NAMES_ROWS}")

    def __len__(self) -> int:
        reply, _ = self.session.ask({"op": "read", "data": self.document(), "rows": False})
        return int(reply["rows"])

    def __repr__(self) -> str:
        where = "".join(
            f", {name}={value!r}"
            for name, value in (
                ("segments", self.segments),
                ("filter", self.condition),
                ("split", self.part),
                ("then", self.then),
            )
            if value is not None
        )
        return f"Handle({self.dataset!r}, columns={list(self.columns)}{where})"


def _both(first: Any, second: Any) -> Any:
    return second if first is None else ["and", first, second]


def column_names(columns: Any, known: Iterable[str] | None = None) -> tuple[str, ...]:
    """Return *columns* as names.

    Raises:
        TypeError: It is no list of names.
        ValueError: It is empty, or names one twice.
        UnknownNameError: A name is not among the *known*.
    """
    if isinstance(columns, str):
        raise TypeError(f"columns is a list of names; write [{columns!r}]")
    names = tuple(columns)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"columns is a list of names, and {name!r} is none")
        if known is not None and name not in known:
            raise UnknownNameError.of("column", name, known)
    if not names or len(set(names)) < len(names):
        raise ValueError("columns names at least one column, and each of them once")
    return names
