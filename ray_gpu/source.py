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
from zones.errors import UnknownNameError
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
    """Resolve a handle's document: ``{"dataset", "columns", "filter", "split"}``.

    Raises:
        UnknownNameError: No such data set or column.
        ValueError: Filter or split is malformed.
        OSError: The file cannot be read.
    """
    dataset = zone.datasets.get(str(handle.get("dataset")))
    if dataset is None:
        raise UnknownNameError.of("dataset", str(handle.get("dataset")), zone.datasets)
    wanted = _columns(dataset, handle.get("columns"), columns)
    document = handle.get("filter")
    used = filters.filter_columns(document, list(dataset.columns)) if document is not None else set()
    path = data_dir / dataset.path
    table = _read(path, path.stat().st_mtime_ns, tuple(dict.fromkeys([*wanted, *sorted(used)])))
    if document is not None:
        table = table.filter(filters.to_expression(document, table.schema))
    if handle.get("split") is not None:
        table = _part(table, dict(handle["split"]))
    return Source(dataset=dataset.name, table=table.select(wanted), filter_columns=frozenset(used))


def _part(table: pa.Table, split: dict[str, Any]) -> pa.Table:
    """Return one part of a split: ``{"fractions": [...], "seed": int, "part": index}``."""
    parts = split_rows(table.num_rows, [float(item) for item in split["fractions"]], str(split["seed"]).encode())
    return table.take(parts[int(split["part"])])


def _columns(dataset: Dataset, handle: Any, option: tuple[str, ...] | None) -> list[str]:
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
