"""The data of a call, read inside the zone by the gateway itself. This module does I/O.

A catalog handle is a small document (data set, columns, filter, split) that is resolved here, by name,
against the reviewed catalog: a forged handle can name nothing else. Memory files from a notebook must be
sealed against writing, so that nothing changes between decision and sending.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_gpu.share import open_table
from zones import filters
from zones.errors import ConfigError, UnknownNameError
from zones.model import Dataset, Zone
from zones.plan import split_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows that a call asks to send."""

    #: Catalog name, or ``""`` for data that comes from no catalog handle.
    dataset: str
    #: Projected, filtered and split; memory-mapped where the file's format allows.
    table: pa.Table
    #: Columns that choose rows and do not leave themselves.
    filter_columns: frozenset[str] = frozenset()

    @property
    def columns(self) -> list[str]:
        """Columns that leave."""
        return list(self.table.column_names)

    @property
    def rows(self) -> int:
        """Rows that leave."""
        return int(self.table.num_rows)


def from_catalog(zone: Zone, data_dir: Path, handle: dict[str, Any], columns: tuple[str, ...] | None) -> Source:
    """Resolve a handle's document: ``{"dataset", "columns", "filter", "split", "then"}``.

    ``filter`` chooses rows of the whole, ``split`` a part of them, and ``then`` rows of that part.

    Raises:
        UnknownNameError: No such data set or column.
        ValueError: Filter or split is malformed.
        ConfigError: The data set's file is missing, or lacks a column of the catalog.
    """
    dataset = zone.datasets.get(str(handle.get("dataset")))
    if dataset is None:
        raise UnknownNameError.of("dataset", str(handle.get("dataset")), zone.datasets)
    wanted = _columns(dataset, handle.get("columns"), columns)
    conditions = [handle.get("filter"), handle.get("then")]
    names = list(dataset.columns)
    used = set().union(*(filters.filter_columns(item, names) for item in conditions if item is not None))
    table = _open(dataset, data_dir, tuple(dict.fromkeys([*wanted, *sorted(used)])))
    table = filters.apply_filter(table, conditions[0])
    if handle.get("split") is not None:
        table = _part(table, handle["split"])
    table = filters.apply_filter(table, conditions[1], columns=wanted)
    return Source(dataset=dataset.name, table=table, filter_columns=frozenset(used))


def _open(dataset: Dataset, data_dir: Path, columns: tuple[str, ...]) -> pa.Table:
    path = data_dir / dataset.path
    try:
        return _read(path, path.stat().st_mtime_ns, columns)
    except OSError as error:
        what = f"cannot be read ({error.strerror or type(error).__name__})"
    except (KeyError, pa.ArrowException) as error:
        what = f"is not what catalog.yaml says ({type(error).__name__})"
    raise ConfigError(
        f"the file of data set {dataset.name} {what}; have the zone's operator look at {dataset.path} in "
        "its data directory",
        file=str(dataset.path),
    )


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


@functools.lru_cache(maxsize=8)
def _read(path: Path, mtime_ns: int, columns: tuple[str, ...]) -> pa.Table:
    """Read columns of a file; *mtime_ns* is part of the cache's key."""
    if path.suffix == ".parquet":
        return pq.read_table(path, columns=list(columns))
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().select(list(columns))


def from_memory(fd: int, columns: tuple[str, ...] | None) -> Source:
    """Read an Arrow IPC stream from a notebook's memory file, which is then closed.

    Raises:
        ValueRefusedError: The file is not sealed, or holds no valid table without extension types.
        UnknownNameError: It has no such column.
    """
    table = open_table(fd, trusted=False)
    for name in columns or ():
        if name not in table.column_names:
            raise UnknownNameError.of("column", name, table.column_names)
    return Source(dataset="", table=table.select(list(columns)) if columns else table)
