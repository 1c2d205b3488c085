"""Rows that do not fit into memory, written to the zone's own disk in an order that can be read. This module does I/O.

A shuffle takes the rows of each shard from everywhere in the source: where that is larger than memory, every shard
reads nearly every page of it again. So rows are written once more, in *buckets* of neighbouring shards: the source is
read once from beginning to end, each bucket once, and a few buckets are all that memory ever holds.

Files lie in the zone's data directory and have no name there; the kernel frees them when they are closed, or their
process ends, however it does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from zones import plan
from zones.errors import DiskSpaceError, ZoneError
from zones.plan import Index, Plan

#: Most data of a bucket, and of what is read at once of a source.
MAX_BUCKET_BYTES = 256 << 20
#: Buckets that are held: two leases may work at the edge of two.
_HELD = 2


def machine_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fits(size: int, memory_bytes: int) -> bool:
    """Say whether so many bytes more can be held by this process of so much memory: a quarter of what it has left.

    So what other calls hold now counts, and each of several calls at once leaves room for the others.
    """
    return size <= memory_bytes // 64 or size <= (memory_bytes - _own_bytes()) // 4


def _own_bytes() -> int:
    """Return the memory that is this process's alone, and not mapped from a file."""
    lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def bucket_bytes(memory_bytes: int) -> int:
    """Return how much data a bucket has: as much once more is read, moved and about to leave, each in copies."""
    return min(memory_bytes // 32, MAX_BUCKET_BYTES)


#: Raises when nobody wants any more what is written.
_check: ContextVar[Callable[[], None]] = ContextVar("check", default=lambda: None)


@contextlib.contextmanager
def watched(check: Callable[[], None]) -> Iterator[None]:
    """Inside, whatever this thread writes to disk is given up when *check* raises."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


class Temporary:
    """A nameless file of record batches, written once inside ``with`` and then read.

    Args:
        directory: Where, on a disk with room for it.
        schema: Of all batches.
        apart: Whether batches are read one by one, in any order: all have the same categories then.
    """

    def __init__(self, directory: Path, schema: pa.Schema, *, apart: bool) -> None:
        self._directory = directory
        with self._explained("take"):
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by __exit__
        self._writer = (pa.ipc.new_file if apart else pa.ipc.new_stream)(self._file, schema)
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is not written yet need not be, if nobody wants it.
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self._file.close()

    def add(self, rows: pa.RecordBatch) -> int:
        """Write a batch; return its number.

        Raises:
            DiskSpaceError: There is no room, or the disk fails.
            ZoneError: What the check of :func:`watched` raises.
        """
        _check.get()()
        with self._explained("take"):
            self._writer.write_batch(rows)
        self._count += 1
        return self._count - 1

    def _end(self) -> None:
        with self._explained("take"):
            self._writer.close()
            self._file.flush()

    def mapped(self) -> pa.Table:
        """End the file and return all its rows, which are the file itself."""
        self._end()
        with self._explained("give back"):
            data = pa.py_buffer(mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ))
            table: pa.Table = pa.ipc.open_stream(data).read_all()
        return table

    def reader(self) -> Callable[[int], pa.RecordBatch]:
        """End the file and return what reads one of its batches."""
        self._end()
        with self._explained("give back"):
            file = pa.OSFile(f"/proc/self/fd/{self._file.fileno()}", "rb")
            # Neighbours of a batch are other buckets': what the kernel reads ahead, megabytes, would be in vain.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            reader: Any = pa.ipc.open_file(file)

        def read(number: int) -> pa.RecordBatch:
            with self._explained("give back"):
                batch: pa.RecordBatch = reader.get_batch(number)
                return batch

        return read

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowInvalid) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise DiskSpaceError(
                f"data larger than memory is put on the zone's disk before it leaves, and {self._directory} does not "
                f"{what} it ({reason}); nothing of it left. Read fewer columns or rows, or have the zone's operator "
                "make room there for the data once more",
            ) from None


def mapped(schema: pa.Schema, batches: Iterable[pa.RecordBatch], directory: Path) -> pa.Table:
    """Write batches to a nameless file and return them as a table that is mapped from there."""
    with Temporary(directory, schema, apart=False) as file:
        for batch in batches:
            file.add(batch)
        return file.mapped()


def taken(table: pa.Table, rows: Index, directory: Path, memory_bytes: int) -> pa.Table:
    """Return rows of a table by number, ascending: in memory if they fit, else mapped from a nameless file."""
    if fits(len(rows) * plan.row_bytes(table), memory_bytes):
        return _take(table, rows)

    def parts() -> Iterator[pa.RecordBatch]:
        for start, piece in _pieces(table, memory_bytes):
            edges = np.searchsorted(rows, [start, start + piece.num_rows])
            yield from _take(piece, rows[slice(*edges)] - start).to_batches()

    return mapped(table.schema, parts(), directory)


def _take(table: pa.Table, rows: Index) -> pa.Table:
    places: Any = pa.array(rows)
    return table.take(places).combine_chunks()


def _pieces(table: pa.Table, memory_bytes: int) -> Iterator[tuple[int, pa.Table]]:
    """Yield runs of rows from beginning to end, with the number of the first, each with one chunk per column."""
    step = max(1, bucket_bytes(memory_bytes) // plan.row_bytes(table))
    for start in range(0, table.num_rows, step):
        yield start, table.slice(start, step).combine_chunks()


class Staged:
    """The shards of a table that does not fit into memory.

    Args:
        table: From :func:`zones.shards.strip`; its columns may have many chunks.
        made: Which rows go into which shard.
        directory: Of the nameless file, which is written when a shard is asked for that has rows from far apart.
        memory_bytes: Of this process.
        check: Raises when nobody wants the shards any more.
    """

    def __init__(
        self, table: pa.Table, made: Plan, directory: Path, memory_bytes: int, check: Callable[[], None]
    ) -> None:
        self._table, self._plan, self._directory, self._check = table, made, directory, check
        self._memory_bytes, self._bucket_bytes = memory_bytes, bucket_bytes(memory_bytes)
        self._row_bytes = plan.row_bytes(table)
        self._lock = threading.Lock()
        self._reader: Callable[[int], pa.RecordBatch] | None = None
        self._failure: ZoneError | None = None
        #: Of each shard, the bucket; of each bucket, its shards and batches.
        self._bucket_of: list[int] = []
        self._buckets: list[range] = []
        self._batches: list[list[int]] = []
        self._held: OrderedDict[int, tuple[pa.Table, Index]] = OrderedDict()

    def shard(self, number: int) -> tuple[pa.Table, Plan, int]:
        """Return a shard's rows: a small table, and a plan and the number of the shard in it. Any thread may ask.

        Raises:
            DiskSpaceError: The disk does not take the rows.
        """
        rows = self._plan.row_index(number)
        first, stop = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        if (stop - first) * self._row_bytes <= 2 * self._bucket_bytes:
            return _alone(self._table.slice(first, stop - first).combine_chunks(), rows - first)
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._reader is None:
                try:
                    self._reader = self._write()
                except ZoneError as error:
                    self._failure = error
                    raise
            table, sources = self._bucket(self._bucket_of[number], self._reader)
        return _alone(table, np.searchsorted(sources, rows))

    def _bucket(self, number: int, reader: Callable[[int], pa.RecordBatch]) -> tuple[pa.Table, Index]:
        """Return a bucket's rows and the number in the source of each, ascending; with the lock held."""
        if number not in self._held:
            while len(self._held) >= _HELD:
                self._held.popitem(last=False)
                # Arrow's allocator keeps what is free for later, which would be several buckets more.
                pa.default_memory_pool().release_unused()
            batches = [reader(batch) for batch in self._batches[number]]
            table = pa.Table.from_batches(batches, self._table.schema).combine_chunks()
            sources = np.sort(np.concatenate([self._plan.row_index(shard) for shard in self._buckets[number]]))
            self._held[number] = table, sources
        return self._held[number]

    def _write(self) -> Callable[[int], pa.RecordBatch]:
        """Write the source's rows, each to its bucket, in the source's order within it; return a reader."""
        shards_each = max(1, self._bucket_bytes * len(self._plan) // max(1, self._row_bytes * self._plan.rows))
        starts = range(0, len(self._plan), shards_each)
        self._buckets = [range(start, min(start + shards_each, len(self._plan))) for start in starts]
        self._bucket_of = [bucket for bucket, shards in enumerate(self._buckets) for _ in shards]
        self._batches = [[] for _ in self._buckets]
        bucket_of_row = np.empty(self._plan.rows, np.uint16 if len(self._buckets) < 1 << 16 else np.uint32)
        for shard, bucket in enumerate(self._bucket_of):
            bucket_of_row[self._plan.row_index(shard)] = bucket
        with watched(self._check), Temporary(self._directory, self._table.schema, apart=True) as file:
            for start, piece in _pieces(self._table, self._memory_bytes):
                buckets = bucket_of_row[start : start + piece.num_rows]
                order = np.argsort(buckets, kind="stable")
                (moved,) = _take(piece, order).to_batches()
                edges = np.searchsorted(buckets[order], np.arange(len(self._buckets) + 1))
                for bucket in np.flatnonzero(np.diff(edges)).tolist():
                    run = moved.slice(edges[bucket], edges[bucket + 1] - edges[bucket])
                    self._batches[bucket].append(file.add(run))
            return file.reader()


def _alone(table: pa.Table, rows: Index) -> tuple[pa.Table, Plan, int]:
    return table, Plan(rows=table.num_rows, block_rows=1, order=rows, cuts=((0, len(rows)),)), 0
