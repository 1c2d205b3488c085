"""The data of a call, read inside the zone by the gateway itself. This module does I/O.

A catalog handle is a small document (data set, columns, filter, split) that is resolved here, by name,
against the reviewed catalog: a forged handle can name nothing else. Memory files from a notebook must be
sealed against writing, so that nothing changes between decision and sending.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_gpu import data_files, staging
from ray_gpu.share import open_sealed
from zones import filters, shards
from zones import segments as divisions
from zones.errors import UnknownNameError
from zones.model import Dataset, Zone
from zones.plan import Index, groups_of, split_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows that a call asks to send."""

    #: Catalog name, or ``""`` for data that comes from no catalog handle.
    dataset: str
    #: Projected, filtered and split; memory-mapped where the file's format allows.
    table: pa.Table
    #: SHA-256 of the data set's file, hexadecimal; ``""`` for data that comes from no catalog handle.
    digest: str = ""
    #: Columns that choose rows, or keep them together, and do not leave themselves.
    filter_columns: frozenset[str] = frozenset()
    #: Segments that rows are of, with those that they are parts of; empty where the data set has none.
    segments: frozenset[str] = frozenset()
    #: What the data set comes from, if it is derived: see :mod:`zones.lineage`.
    lineage: Mapping[str, Any] | None = None
    #: SHA-256 of each data set that says which row is in which round, by its name.
    listed: Mapping[str, str] = field(default_factory=dict)
    #: Rows of the whole that these are a part of.
    of_rows: int
    #: ``int64[rows]``: the number of each row in the whole; ``None`` when these are all of it, in order.
    numbers: Index | None = None
    #: ``int64[of_rows]``: rows of the whole with the same number are kept together; ``None``: each is for itself.
    groups: Index | None = None
    #: What the rows came as from a notebook, for :meth:`identity`.
    content: memoryview | None = None

    def row_groups(self) -> Index | None:
        """Return ``int64[rows]``: rows with one number stay together; ``None``: each is for itself."""
        return self.groups if self.groups is None or self.numbers is None else self.groups[self.numbers]

    def origin(self) -> dict[str, Any]:
        """Return what the rows' data set comes from, and what says which round they are in: JSON types."""
        return {"derived": self.lineage, "listed": dict(self.listed)}

    def identity(self) -> str:
        """Return the SHA-256 of the whole that these rows are of, hexadecimal."""
        return self.digest or hashlib.sha256(self.content or b"").hexdigest()

    @property
    def columns(self) -> list[str]:
        """Columns that leave."""
        return list(self.table.column_names)

    @property
    def rows(self) -> int:
        """Rows that leave."""
        return int(self.table.num_rows)


def from_catalog(
    zone: Zone,
    data_dir: Path,
    handle: dict[str, Any],
    columns: tuple[str, ...] | None,
    *,
    keep_together: str | None = None,
    memory_bytes: int = staging.machine_bytes(),
) -> Source:
    """Resolve a handle's document: ``{"dataset", "columns", "segments", "filter", "split", "then"}``.

    ``segments`` names parts of the whole, ``filter`` chooses rows of those, ``split`` a part of them, and ``then`` rows
    of that part. Rows with one value in the column *keep_together* stay together. What is too large for the memory of
    this process is mapped from a nameless file in *data_dir*.

    Raises:
        UnknownNameError: No such data set, column or segment.
        ValueError: Filter or split is malformed.
        ConfigError: The data set's file is missing, or lacks a column of the catalog.
    """
    found = described(zone, data_dir, handle, columns, keep_together=keep_together)
    dataset, wanted, used = zone.datasets[found.dataset], found.columns, sorted(found.filter_columns)
    conditions = [handle.get("filter"), handle.get("then")]
    # What is kept together is kept so in the whole, which then has to be read.
    known = conditions[0] if keep_together is None else None
    opened = data_files.read(dataset, data_dir, tuple(dict.fromkeys([*wanted, *used])), known, memory_bytes)
    table, numbers = opened.table.select(wanted), opened.numbers
    if any(handle.get(key) is not None for key in ("segments", "filter", "split", "then")):
        numbers = np.arange(table.num_rows) if numbers is None else numbers
        # Only what rows are chosen by, with the place of each under a name that no column of a catalog has.
        places = np.arange(table.num_rows)
        chosen = opened.table.select(used).append_column("", pa.array(places))
        if handle.get("segments") is not None:
            divided = replace(dataset, segments=_division(dataset, handle["segments"]))
            members = _members(zone, divided, data_dir, found.segments, found.listed, memory_bytes)
            chosen = chosen.filter(pa.array(np.isin(numbers, members, assume_unique=True)))
        chosen = filters.apply_filter(chosen, conditions[0])
        if handle.get("split") is not None:
            chosen = _part(chosen, handle["split"])
        chosen = filters.apply_filter(chosen, conditions[1])
        places = chosen.column("").to_numpy()
        table, numbers = staging.taken(table, places, data_dir, memory_bytes), numbers[places]
    return replace(
        found,
        table=table,
        digest=opened.digest,
        of_rows=opened.of_rows,
        numbers=numbers,
        groups=None if keep_together is None else groups_of(opened.table.column(keep_together)),
    )


def described(
    zone: Zone,
    data_dir: Path,
    handle: dict[str, Any],
    columns: tuple[str, ...] | None,
    *,
    keep_together: str | None = None,
) -> Source:
    """Return what :func:`from_catalog` would, without a row: all that policy is asked about. Raises as that."""
    dataset = zone.datasets.get(str(handle.get("dataset")))
    if dataset is None:
        raise UnknownNameError.of("dataset", str(handle.get("dataset")), zone.datasets)
    wanted = _columns(dataset, handle.get("columns"), columns)
    names = list(dataset.columns)
    conditions = [handle.get("filter"), handle.get("then")]
    used = set().union(*(filters.filter_columns(item, names) for item in conditions if item is not None))
    if keep_together is not None:
        _check_column(dataset, keep_together)
        used.add(keep_together)
    lineage = data_files.checked_lineage(zone.datasets, data_dir, dataset.name)
    segments = _chosen(dataset, handle.get("segments"))
    division = _division(dataset, handle.get("segments"))
    lists = divisions.listings(division) if division and handle.get("segments") else set()
    return Source(
        dataset=dataset.name,
        table=pa.table({name: pa.nulls(0) for name in wanted}),
        digest=data_files.digest(dataset, data_dir),
        filter_columns=frozenset(used),
        segments=segments,
        lineage=lineage,
        listed={name: _listed(zone, data_dir, name) for name in sorted(lists)},
        of_rows=0,
    )


def _division(dataset: Dataset, wanted: Any) -> Any:
    return None if dataset.segments is None else divisions.divided(dataset.segments, wanted or ())


def _chosen(dataset: Dataset, wanted: Any) -> frozenset[str]:
    """Return every segment that rows are of, if those of *wanted* are chosen; ``None`` stands for all."""
    if wanted is not None and not (isinstance(wanted, list) and wanted):
        raise ValueError("segments must be a list of names, at least one; use handle.segment(...)")
    if dataset.segments is None:
        if wanted is not None:
            raise UnknownNameError.of("segment", str(wanted[0]), ())
        return frozenset()
    chosen = dataset.segments.parts if wanted is None else [str(name) for name in wanted]
    return divisions.touched(dataset.segments, chosen)


def _listed(zone: Zone, data_dir: Path, name: str) -> str:
    """Return the digest of a data set that lists rounds, which must be what its lineage says if it is derived."""
    data_files.checked_lineage(zone.datasets, data_dir, name)
    return data_files.digest(zone.datasets[name], data_dir)


def _members(
    zone: Zone,
    dataset: Dataset,
    data_dir: Path,
    segments: frozenset[str],
    listed: Mapping[str, str],
    memory_bytes: int,
) -> Index:
    """Return the numbers of the rows of segments, ascending, of a data set that has some."""
    assert dataset.segments is not None
    columns = tuple(sorted(divisions.columns(dataset.segments))) or tuple(dataset.columns)[:1]
    opened = data_files.read(dataset, data_dir, columns, memory_bytes=memory_bytes)
    leaf_of = _leaves(dataset.name, repr(dataset.segments), opened.digest, tuple(listed.items()))
    if leaf_of.value is None:

        def rounds(name: str, by: str) -> tuple[Any, Any]:
            wanted = by, divisions.ROUND_COLUMN
            rows = data_files.read(zone.datasets[name], data_dir, wanted, memory_bytes=memory_bytes).table
            return tuple(rows.column(column).combine_chunks() for column in (by, divisions.ROUND_COLUMN))  # type: ignore[return-value]  # two

        found = divisions.assign(
            dataset.segments,
            dataset.name,
            opened.of_rows,
            lambda name: opened.table.column(name).combine_chunks(),
            rounds,
        )
        names, codes = np.unique(found, return_inverse=True)
        leaf_of.value = [str(name) for name in names], codes.reshape(-1)
    names_of, codes_of = leaf_of.value
    return np.flatnonzero(np.isin(codes_of, [place for place, name in enumerate(names_of) if name in segments]))


@dataclass(slots=True)
class _Kept:
    """The leaf of each row: names, and the number of one for each row; ``None`` before it is known."""

    value: tuple[list[str], Index] | None = None


@functools.lru_cache(maxsize=16)
def _leaves(dataset: str, segments: str, digest: str, listed: tuple[tuple[str, str], ...]) -> _Kept:
    """Return where the leaves of a data set are kept, once they were found."""
    return _Kept()


def _part(table: pa.Table, split: Any) -> pa.Table:
    """Return one part of a split: ``{"fractions": [...], "seed": int, "part": index}``."""
    try:
        fractions, seed, part = [float(item) for item in split["fractions"]], str(split["seed"]), int(split["part"])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ValueError("a split has fractions, a seed and the number of a part; use handle.split(...)") from None
    parts = split_rows(table.num_rows, fractions, seed.encode())
    if not 0 <= part < len(parts):
        raise ValueError(f"the split has parts 0 to {len(parts) - 1}, not {part}")
    return table.take(parts[part])


def _columns(dataset: Dataset, handle: Any, option: tuple[str, ...] | None) -> list[str]:
    if handle is not None and not isinstance(handle, list):
        raise ValueError("columns must be a list of names; use handle.select([...])")
    available = list(dataset.columns) if handle is None else [str(name) for name in handle]
    for name in [*available, *(option or ())]:
        _check_column(dataset, name)
    if option is None:
        return available
    for name in option:
        if name not in available:
            raise UnknownNameError.of("column", name, available)
    return list(option)


def _check_column(dataset: Dataset, name: str) -> None:
    if name not in dataset.columns:
        raise UnknownNameError.of("column", name, dataset.columns)


def from_memory(fd: int, columns: tuple[str, ...] | None, *, keep_together: str | None = None) -> Source:
    """Read an Arrow IPC stream from a notebook's memory file, which is then closed.

    Raises:
        ValueRefusedError: The file is not sealed, or holds no valid table without extension types.
        UnknownNameError: It has no such column.
    """
    content = open_sealed(fd)
    whole = shards.read_ipc(content, trusted=False)
    for name in (*(columns or ()), *(() if keep_together is None else (keep_together,))):
        if name not in whole.column_names:
            raise UnknownNameError.of("column", name, whole.column_names)
    return Source(
        dataset="",
        table=whole.select(list(columns)) if columns else whole,
        filter_columns=frozenset() if keep_together is None else frozenset({keep_together}),
        of_rows=whole.num_rows,
        groups=None if keep_together is None else groups_of(whole.column(keep_together)),
        content=content,
    )
