"""Data larger than memory: put on disk in the order of its shards, read from there, and gone when nobody uses it."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_gpu import data_files, embedded, source, staging
from zones import plan, shards
from zones.config import load_zone
from zones.errors import CallCancelledError, DiskSpaceError
from zones.model import Dataset, Obligations, Shuffle, Zone

ROWS = 10_000
SEED = bytes(range(32))
#: So that a bucket is a few shards.
MEMORY = 32 * 60_000


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Rows of many types in many chunks."""
    rng = np.random.default_rng(3)
    numbers = rng.standard_normal(ROWS)
    texts = [f"text {n % 97}" if n % 5 else None for n in range(ROWS)]
    columns: dict[str, Any] = {
        "number": numbers,
        "whole": np.arange(ROWS),
        "null": pa.array(numbers, mask=numbers > 1),
        "text": texts,
        "yes": numbers > 0,
        "list": [[float(n)] * (n % 3) for n in range(ROWS)],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(4 * ROWS)), 4),
        "when": pa.array(np.arange(ROWS), pa.timestamp("us", "UTC")),
        "category": pa.array(texts).dictionary_encode(),
    }
    whole = pa.table(columns)
    pieces = [whole.slice(start, 777) for start in range(0, ROWS, 777)]
    return shards.strip(pa.concat_tables(pieces), keep_categories=["category"], join=False)


def plans(rows: int) -> dict[str, plan.Plan]:
    """Return plans of all kinds."""
    size: dict[str, Any] = {"shard_bytes": 20_000, "min_shards": 7, "seed": SEED}
    blocks = Obligations(shuffle=Shuffle.BLOCKS, block_rows=16)
    groups = np.arange(rows) % 300
    return {
        "rows": plan.make_plan(rows, 100, obligations=Obligations(), **size),
        "blocks": plan.make_plan(rows, 100, obligations=blocks, **size),
        "none": plan.make_plan(rows, 100, obligations=Obligations(shuffle=Shuffle.NONE), **size),
        "window": plan.make_plan(rows, 100, obligations=Obligations(shuffle_window=500), **size),
        "groups": plan.plan_of_groups(groups, 100, obligations=Obligations(), **size),
    }


@pytest.mark.parametrize("kind", ["rows", "blocks", "none", "window", "groups"])
def test_shards_are_the_same(table: pa.Table, tmp_path: Path, kind: str) -> None:
    """Each shard has the rows that it has of a table in memory, in the same order, whatever order is asked in."""
    made = plans(ROWS)[kind]
    staged = staging.Staged(table, made, tmp_path, MEMORY, lambda: None)
    order = np.random.default_rng(1).permutation(len(made))

    for number in [*range(len(made)), *order.tolist()]:
        assert shards.shard_table(*staged.shard(number)).equals(shards.shard_table(table, made, number))
    written = staged._reader is not None
    assert written is (kind in ("rows", "blocks", "groups"))
    assert len(staged._held) <= 2
    # Its file has no name.
    assert list(tmp_path.iterdir()) == []


def test_source_is_read_once(table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is gone through once for all shards, and each bucket is read once when shards come in order."""
    read: list[int] = []
    pieces, bucket = staging._pieces, staging.Staged._bucket

    def counted(whole: pa.Table, memory_bytes: int) -> Iterator[tuple[int, pa.Table]]:
        for start, piece in pieces(whole, memory_bytes):
            read.append(start)
            yield start, piece

    held: list[int] = []

    def looked(self: staging.Staged, number: int, reader: Any) -> Any:
        held.extend([number] if number not in self._held else [])
        return bucket(self, number, reader)

    monkeypatch.setattr(staging, "_pieces", counted)
    monkeypatch.setattr(staging.Staged, "_bucket", looked)
    made = plans(ROWS)["rows"]
    staged = staging.Staged(table, made, tmp_path, MEMORY, lambda: None)
    for number in range(len(made)):
        staged.shard(number)

    assert read == sorted(set(read))
    assert held == list(range(len(staged._buckets)))
    assert len(held) > 5


def test_rows_by_number(table: pa.Table, tmp_path: Path) -> None:
    """Rows that a filter or segment chose are the same, in memory and mapped from a file."""
    for rows in (np.arange(0), np.arange(3, ROWS, 7), np.arange(ROWS)):
        kept = staging.taken(table, rows, tmp_path, 1 << 60)
        mapped = staging.taken(table, rows, tmp_path, MEMORY // 100)
        assert kept.equals(mapped)
        assert mapped.column("whole").to_numpy().tolist() == rows.tolist()


@pytest.fixture
def zone(tmp_path: Path) -> Zone:
    """A zone with one data set, a Parquet file of several row groups."""
    rng = np.random.default_rng(5)
    names = [f"c{number}" for number in range(6)]
    columns: dict[str, Any] = {name: rng.standard_normal(ROWS) for name in names}
    columns["c0"] = np.arange(ROWS)
    rows = pa.table(columns)
    pq.write_table(rows, tmp_path / "wide.parquet", row_group_size=1000)
    dataset = Dataset(name="wide", path="wide.parquet", columns=dict.fromkeys(names, "internal"))
    shipped = load_zone(embedded.shipped_policies(), "clinic")
    return dataclasses.replace(shipped, datasets={"wide": dataset})


def test_categories_that_differ(tmp_path: Path) -> None:
    """Of a Parquet file written in parts, each with categories of its own, they stay what they are."""
    parts = [
        pa.table({"a": pa.array([f"v{part}-{n % 3}" for n in range(900)]).dictionary_encode()}) for part in range(5)
    ]
    with pq.ParquetWriter(tmp_path / "a.parquet", parts[0].schema) as writer:
        for part in parts:
            writer.write_table(part)
    dataset = Dataset(name="a", path="a.parquet", columns={"a": "internal"})
    data_files._read.cache_clear()
    small = data_files.read(dataset, tmp_path, ("a",)).table
    large = data_files.read(dataset, tmp_path, ("a",), memory_bytes=1 << 10).table
    data_files._read.cache_clear()

    assert large.column("a").to_pylist() == small.column("a").to_pylist()
    assert pa.types.is_dictionary(large.schema.field("a").type)
    rows = np.arange(0, 4500, 7)
    assert (
        staging.taken(large, rows, tmp_path, 1 << 10).column("a").to_pylist()
        == small.column("a").take(rows).to_pylist()
    )


@pytest.mark.parametrize(
    "handle", [{}, {"filter": ["c0", ">", 4321]}, {"split": {"fractions": [0.5], "seed": 1, "part": 0}}], ids=str
)
def test_parquet_larger_than_memory(zone: Zone, tmp_path: Path, handle: dict[str, Any]) -> None:
    """What is decoded of a large Parquet file goes to a nameless file; rows are those that memory would have."""
    data_files._read.cache_clear()
    columns, document = ("c2", "c0"), {"dataset": "wide", **handle}
    small = source.from_catalog(zone, tmp_path, document, columns)
    before = pa.total_allocated_bytes()
    large = source.from_catalog(zone, tmp_path, document, columns, memory_bytes=1 << 16)
    grown = pa.total_allocated_bytes() - before

    assert large.table.equals(small.table)
    assert large.digest == small.digest
    assert np.array_equal(numbers(large), numbers(small))
    assert grown < small.table.nbytes / 4
    assert [path.name for path in tmp_path.iterdir()] == ["wide.parquet"]
    data_files._read.cache_clear()


def test_reading_takes_no_more(tmp_path: Path) -> None:
    """While a large Parquet file is decoded, a part of it is in memory, whatever it is made of."""
    rng = np.random.default_rng(2)
    columns: dict[str, Any] = {f"c{n}": rng.random(200_000) for n in range(10)}
    path = tmp_path / "noise.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=20_000, compression="none", use_dictionary=False)
    code = (
        "import sys, pathlib, pyarrow as pa\n"
        "from ray_gpu import data_files\n"
        "from zones.model import Dataset\n"
        "where, names = pathlib.Path(sys.argv[1]), [f'c{n}' for n in range(10)]\n"
        "dataset = Dataset(name='noise', path='noise.parquet', columns=dict.fromkeys(names, 'internal'))\n"
        "table = data_files.read(dataset, where, tuple(names), memory_bytes=int(sys.argv[2])).table\n"
        "assert table.num_rows == 200_000\n"
        "print(pa.default_memory_pool().max_memory())\n"
    )
    most = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path), str(memory)], check=True, capture_output=True
            ).stdout
        )
        for memory in (32 << 20, 1 << 40)
    ]

    assert most[0] < path.stat().st_size / 2
    # Control: where there is enough memory, all of it is in memory.
    assert most[1] > path.stat().st_size


def numbers(found: source.Source) -> Any:
    """Return the number of each row in the whole."""
    return np.arange(found.rows) if found.numbers is None else found.numbers


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Return what lets this process write no file beyond a size: what a full disk does, with another reason."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_without_room(table: pa.Table, tmp_path: Path, full_disk: Callable[[int], None]) -> None:
    """Who asks for a shard is told that the disk takes no more, where, and what to do; so is the next one, at once."""
    staged = staging.Staged(table, plans(ROWS)["rows"], tmp_path, MEMORY, lambda: None)
    full_disk(200_000)
    for _ in range(2):
        with pytest.raises(DiskSpaceError, match=rf"{tmp_path} does not take it \(File too large\).*make room"):
            staged.shard(0)
    full_disk(resource.RLIM_INFINITY)

    with pytest.raises(DiskSpaceError, match="File too large"):
        staged.shard(0)


def test_directory_that_takes_no_file(table: pa.Table, tmp_path: Path) -> None:
    """A directory that is not there is the same error."""
    with pytest.raises(DiskSpaceError, match="No such file"):
        staging.mapped(table.schema, table.to_batches(), tmp_path / "missing")


def test_cancelled_meanwhile(table: pa.Table, tmp_path: Path) -> None:
    """Who gives up while rows are written is not made to wait, and the file is closed."""

    def gave_up() -> None:
        raise CallCancelledError("gave up")

    before = len(os.listdir("/proc/self/fd"))
    staged = staging.Staged(table, plans(ROWS)["rows"], tmp_path, MEMORY, gave_up)
    with pytest.raises(CallCancelledError):
        staged.shard(0)
    del staged

    assert len(os.listdir("/proc/self/fd")) == before


def test_given_up_while_it_is_decoded(zone: Zone, tmp_path: Path) -> None:
    """Who gives up while a large file is decoded, or rows of it are chosen, is not made to wait for all of it."""
    asked: list[int] = []

    def gave_up_later() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise CallCancelledError("gave up")

    data_files._read.cache_clear()
    with staging.watched(gave_up_later), pytest.raises(CallCancelledError):
        source.from_catalog(zone, tmp_path, {"dataset": "wide"}, ("c1",), memory_bytes=1 << 14)
    assert len(asked) == 3
    # Nothing of it was kept, and nobody watches any more.
    assert source.from_catalog(zone, tmp_path, {"dataset": "wide"}, ("c1",), memory_bytes=1 << 14).rows == ROWS
    data_files._read.cache_clear()
