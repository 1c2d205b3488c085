"""The files of a zone's data sets: rows, digests, and what derived ones come from. This module does I/O.

Of a file no more is read than a call needs, but for the digest, which is made once for each version of a file: an
Arrow file is mapped into memory, of a Parquet file only columns that are needed are read, and of those no row group
that a filter rules out by its statistics. What is large when it is decoded goes to a nameless file and is mapped.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq

from ray_gpu import staging
from zones import filters, lineage
from zones.errors import ConfigError
from zones.model import Dataset
from zones.plan import Index

#: Tables that are kept.
_KEPT = 8
#: Most rows of a Parquet file that are decoded at once.
_BATCH_ROWS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """Rows of a data set's file."""

    table: pa.Table
    #: SHA-256 of the file, hexadecimal.
    digest: str
    #: Rows of the whole.
    of_rows: int
    #: ``int64[rows]``, ascending: the number of each row in the whole; ``None``: these are all.
    numbers: Index | None = None


def read(
    dataset: Dataset,
    directory: Path,
    columns: tuple[str, ...],
    condition: Any = None,
    memory_bytes: int = staging.machine_bytes(),
) -> Opened:
    """Return columns of a data set, and of its rows at least those that meet a filter.

    Args:
        dataset: As the catalog has it.
        directory: The zone's data directory.
        columns: Names; *condition* may name no others.
        condition: A filter document; rows that cannot meet it may be left out.
        memory_bytes: Of this process.

    Raises:
        ConfigError: The file is missing, or is not what the catalog says.
        DiskSpaceError: It is large, and the disk does not take it.
    """
    path = directory / dataset.path
    try:
        stamp = _stamp(path)
        where = "" if condition is None else json.dumps(condition)
        table, numbers, of_rows = _read(path, stamp, columns, where, directory, memory_bytes)
        return Opened(table=table, digest=_digest(path, stamp), of_rows=of_rows, numbers=numbers)
    except OSError as error:
        raise _unreadable(dataset, error) from error
    except (KeyError, pa.ArrowException) as error:
        raise _broken(dataset, f"is not what catalog.yaml says ({type(error).__name__})") from error


def digest(dataset: Dataset, directory: Path) -> str:
    """Return the SHA-256 of a data set's file, hexadecimal. Raises as :func:`read`."""
    path = directory / dataset.path
    try:
        return _digest(path, _stamp(path))
    except OSError as error:
        raise _unreadable(dataset, error) from error


def lineage_path(dataset: Dataset, directory: Path) -> Path:
    """Return where it is written what a derived data set comes from."""
    return directory / f"{dataset.path}.lineage.json"


def written_lineage(dataset: Dataset, directory: Path) -> Any:
    """Return what is written there, unchecked; ``None`` where nothing can be read."""
    try:
        return json.loads(lineage_path(dataset, directory).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def checked_lineage(datasets: Mapping[str, Dataset], directory: Path, name: str) -> dict[str, Any] | None:
    """Return what a data set comes from, as it was written down when it was derived; ``None``: from no other.

    Raises:
        ConfigError: It, or one that it comes from, is not what its step would make now of what is there: a file, the
            step or the catalog was changed.
    """
    dataset = datasets[name]
    if dataset.derived is None:
        return None
    for parent in dataset.derived.reads:
        checked_lineage(datasets, directory, parent)
    if not (directory / dataset.path).exists():
        raise _underived(dataset, "it was not derived yet")
    lists = set().union(*(lineage.rounds_read(datasets[one], read) for one, read in dataset.derived.reads.items()))
    for one in lists:
        checked_lineage(datasets, directory, one)
    digests = {one: digest(datasets[one], directory) for one in (name, *dataset.derived.reads, *lists)}
    written = written_lineage(dataset, directory)
    if why := lineage.problem(datasets, dataset, written, digests):
        raise _underived(dataset, why)
    return dict(written)


def _underived(dataset: Dataset, why: str) -> ConfigError:
    return _broken(dataset, f"cannot be used: {why}", "derive it (`ray-gpu data derive`)")


def _unreadable(dataset: Dataset, error: OSError) -> ConfigError:
    return _broken(dataset, f"cannot be read ({error.strerror or type(error).__name__})")


def _broken(dataset: Dataset, what: str, do: str = "look at it") -> ConfigError:
    return ConfigError(
        f"the file of data set {dataset.name} {what}; have the zone's operator {do}: {dataset.path} in its data "
        "directory",
        file=str(dataset.path),
    )


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes with a file."""
    status = path.stat()
    # A change in place may keep the time of the last one; that of the inode's nobody can set.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


@functools.lru_cache(maxsize=64)
def _digest(path: Path, stamp: tuple[int, ...]) -> str:
    """Return the SHA-256 of a file; *stamp* changes with it and is part of the cache's key."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=_KEPT)
def _read(
    path: Path, stamp: tuple[int, ...], columns: tuple[str, ...], condition: str, directory: Path, memory_bytes: int
) -> tuple[pa.Table, Index | None, int]:
    """Return rows of a file, their numbers unless they are all, and how many there are; *stamp* as above."""
    if path.suffix != ".parquet":
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().select(list(columns))
        return table, None, table.num_rows
    # Else all that is read of a row group stays in memory until the end.
    with pq.ParquetFile(path, pre_buffer=False) as file:
        counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        groups = _row_groups(path, json.loads(condition), file.schema_arrow) if condition else None
        if groups is None or len(groups) == len(counts):
            return _decoded(file, list(range(len(counts))), columns, directory, memory_bytes), None, sum(counts)
        table = _decoded(file, groups, columns, directory, memory_bytes)
    first = np.cumsum([0, *counts])
    numbers = [np.arange(first[group], first[group + 1]) for group in groups]
    return table, np.concatenate([np.arange(0), *numbers]), sum(counts)


def _decoded(
    file: pq.ParquetFile, groups: list[int], columns: tuple[str, ...], directory: Path, memory_bytes: int
) -> pa.Table:
    """Return row groups' columns in this order, in memory if as many as are kept take at most half of it."""
    chosen = [file.metadata.row_group(group) for group in groups]
    row_bytes = sum(group.total_byte_size for group in chosen) // max(1, sum(group.num_rows for group in chosen)) + 1
    # In memory rows may be several times larger than they are encoded.
    step = max(1, min(_BATCH_ROWS, memory_bytes // (64 * row_bytes)))
    batches: Iterator[pa.RecordBatch] = file.iter_batches(step, row_groups=groups, columns=list(columns))
    most, held, size = memory_bytes // (2 * _KEPT), [], 0
    # A name that the file lacks is left out silently.
    schema = pa.schema([file.schema_arrow.field(name) for name in columns])
    for batch in batches:
        held.append(batch.select(list(columns)))
        size += batch.nbytes
        if size > most:
            rest = (batch.select(list(columns)) for batch in batches)
            return staging.mapped(schema, itertools.chain(held, rest), directory)
    return pa.Table.from_batches(held, schema).combine_chunks()


def _about_floats(condition: Any, schema: pa.Schema) -> bool:
    """Say whether a filter may let rows through that statistics do not know of: NaN is in none, and -0.0 equals 0.0."""
    try:
        used = filters.filter_columns(condition, schema)
    except ValueError:
        return False
    floating = any(pa.types.is_floating(schema.field(name).type) for name in used)
    return floating and not _is_plain(condition)


def _is_plain(condition: Any) -> bool:
    """Say whether a filter is made of comparisons alone that NaN never passes."""
    first, second, *rest = condition
    if isinstance(second, (list, tuple)):
        return first in ("and", "or") and all(map(_is_plain, [second, *rest]))
    # NaN alone is not what it is.
    return second in ("<", "<=", ">", ">=", "==") and rest[0] == rest[0]


def _row_groups(path: Path, condition: Any, schema: pa.Schema) -> list[int] | None:
    """Return the row groups that may have rows which meet a filter, ascending; ``None`` where that cannot be said."""
    if _about_floats(condition, schema):
        return None
    fragment: Any = ds.ParquetFileFormat().make_fragment(str(path), filesystem=pa.fs.LocalFileSystem())
    try:
        found = fragment.subset(filter=filters.to_expression(condition, schema), schema=schema)
    except (ValueError, NotImplementedError, pa.ArrowException):
        # What is wrong with it is said when it is applied to the rows.
        return None
    return sorted(group.id for group in found.row_groups)
