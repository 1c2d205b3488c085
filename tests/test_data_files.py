"""No more of a file is read than a call needs: columns, and row groups that a filter does not rule out."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_gpu import data_files, source
from zones.model import Dataset, Zone

ROWS, COLUMNS, GROUPS = 200_000, 20, 10
NAMES = [f"c{number}" for number in range(COLUMNS)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one table in two formats; ``c0`` ascends, so that its row groups say what they hold."""
    directory = tmp_path_factory.mktemp("wide")
    random = np.random.default_rng(1)
    columns: dict[str, Any] = {"c0": np.arange(ROWS), **{name: random.random(ROWS) for name in NAMES[1:]}}
    table = pa.table(columns)
    pq.write_table(table, directory / "wide.parquet", row_group_size=ROWS // GROUPS, use_dictionary=False)
    with pa.OSFile(str(directory / "wide.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return directory


def zone(suffix: str) -> Zone:
    """Return a zone whose catalog has the table in this format."""
    dataset = Dataset(name="wide", path=f"wide{suffix}", columns=dict.fromkeys(NAMES, "internal"))
    return Zone(
        name="clinic",
        classes=("internal",),
        default_class="internal",
        datasets={"wide": dataset},
        pools=("shared",),
        policy_digest="0" * 64,
        endpoints=(),
        small_bytes=None,
    )


def bytes_read() -> int:
    """Return how much this process has read by system calls so far, bytes."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def resident(path: Path) -> int:
    """Return how much of a mapped file this process has touched, bytes."""
    maps = Path("/proc/self/smaps").read_text()
    return sum(1024 * int(size) for size in re.findall(rf" {re.escape(str(path))}\n.*?Rss: +(\d+) kB", maps, re.S))


@pytest.mark.parametrize(
    ("columns", "condition", "most"),
    [
        (NAMES, None, 1.01),
        (NAMES[:2], None, 0.12),
        (NAMES[:2], ["c0", "<", 15_000], 0.013),
        (NAMES[1:2], ["c0", "==", 100_001], 0.013),
        (NAMES[1:2], ["and", ["c0", ">", 30_000], ["c0", "<", 50_000]], 0.025),
        (NAMES[:2], ["c0", "<", -1], 0.006),
    ],
)
def test_parquet(wide: Path, columns: list[str], condition: Any, most: float) -> None:
    """Of a Parquet file at most this part is read; that all of it is read for all columns is the control."""
    data_files._read.cache_clear()
    data_files.digest(zone(".parquet").datasets["wide"], wide)
    before = bytes_read()
    found = source.from_catalog(zone(".parquet"), wide, {"dataset": "wide", "filter": condition}, tuple(columns))
    read = (bytes_read() - before) / (wide / "wide.parquet").stat().st_size
    whole = source.from_catalog(zone(".arrow"), wide, {"dataset": "wide", "filter": condition}, tuple(columns))

    assert read <= most
    assert condition is not None or columns != NAMES or read > 0.9
    assert found.table.equals(whole.table)
    assert found.of_rows == whole.of_rows == ROWS
    assert condition is None or found.numbers.tolist() == whole.numbers.tolist()  # type: ignore[union-attr]  # both are


def test_arrow(wide: Path) -> None:
    """Of an Arrow file the columns that are used are touched, and no others."""
    path = wide / "copy.arrow"
    path.write_bytes((wide / "wide.arrow").read_bytes())
    dataset = Dataset(name="wide", path=path.name, columns=dict.fromkeys(NAMES, "internal"))
    table = data_files.read(dataset, wide, ("c3",)).table
    table.column("c3").to_numpy().sum()
    one = resident(path) / path.stat().st_size
    every = data_files.read(dataset, wide, tuple(NAMES)).table
    for name in NAMES:
        every.column(name).to_numpy().sum()

    assert 0.04 < one < 0.2
    assert resident(path) / path.stat().st_size > 0.9


@pytest.mark.parametrize(
    "handle",
    [
        {"filter": ["c0", ">", 170_000], "split": {"fractions": [0.5], "seed": 1, "part": 0}},
        {"filter": ["c1", ">", 0.5], "split": {"fractions": [0.5], "seed": 1, "part": 1}, "then": ["c0", "<", 40_000]},
        {"filter": ["or", ["c0", "<", 10], ["c0", ">", 199_990]]},
        {"filter": ["not", ["c0", "<", 199_990]]},
        {"filter": ["c0", "in", [5, 100_000]]},
    ],
)
def test_same_rows(wide: Path, handle: dict[str, Any]) -> None:
    """What is left out of the reading is nothing that the filter lets through, split or not."""
    found, whole = (
        source.from_catalog(zone(suffix), wide, {"dataset": "wide", **handle}, ("c0", "c2"))
        for suffix in (".parquet", ".arrow")
    )

    assert found.table.equals(whole.table)
    assert found.numbers is not None
    assert whole.numbers is not None
    assert found.numbers.tolist() == whole.numbers.tolist() == found.table["c0"].to_pylist()


NAN = float("nan")


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
@pytest.mark.parametrize(
    "condition",
    [
        ["v", "!=", 5.0],
        ["not", ["v", "==", 5.0]],
        ["not", ["v", "<", 10.0]],
        ["not", ["v", "<", NAN]],
        ["v", "in", [0.0]],
        ["v", "not in", [5.0]],
        ["v", "<", 2.0],
        ["v", "==", 0.0],
        ["or", ["v", ">", 4.0], ["v", "is null"]],
    ],
)
def test_what_statistics_do_not_know(tmp_path: Path, condition: Any, kind: Any) -> None:
    """NaN is in no statistics, and -0.0 equals 0.0: rows are those of a file that is read whole."""
    table = pa.table({"v": pa.array([5, NAN, 5, 5, 1, 2, -0.0, -0.0, None, None], kind)})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    found, whole = (
        source.from_catalog(
            replace(zone(""), datasets={"x": Dataset(name="x", path=f"x{suffix}", columns={"v": "internal"})}),
            tmp_path,
            {"dataset": "x", "filter": condition},
            None,
        )
        for suffix in (".parquet", ".arrow")
    )

    assert list(map(repr, found.table["v"].to_pylist())) == list(map(repr, whole.table["v"].to_pylist()))


def test_kept_together(wide: Path) -> None:
    """Groups are those of the whole, which is read for them."""
    handle = {"dataset": "wide", "filter": ["c0", "<", 10]}
    found = source.from_catalog(zone(".parquet"), wide, handle, ("c1",), keep_together="c0")

    assert found.groups is not None
    assert (len(found.groups), found.rows, found.of_rows) == (ROWS, 10, ROWS)


def test_filter_of_another_type(wide: Path) -> None:
    """A filter that cannot be put to the file's statistics is refused when it is applied."""
    handle = {"dataset": "wide", "filter": ["c0", "<", "many"]}
    with pytest.raises(ValueError, match="constant"):
        source.from_catalog(zone(".parquet"), wide, handle, ("c1",))


def test_a_change_that_keeps_the_time(tmp_path: Path) -> None:
    """A file that was changed in place, and given its old time back, has its own digest."""
    dataset = Dataset(name="x", path="x.parquet", columns={"a": "internal"})
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1, 2]}), path)
    before, time = data_files.digest(dataset, tmp_path), path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"x")
    os.utime(path, ns=(time, time))

    assert path.stat().st_mtime_ns == time
    assert data_files.digest(dataset, tmp_path) != before


def test_a_new_version_of_a_file(wide: Path, tmp_path: Path) -> None:
    """A file that took another's place is read anew, and has its own digest."""
    dataset = Dataset(name="x", path="x.parquet", columns={"a": "internal"})
    first, second = tmp_path / "x.parquet", tmp_path / "y.parquet"
    pq.write_table(pa.table({"a": [1, 2]}), first)
    before = data_files.read(dataset, tmp_path, ("a",))
    pq.write_table(pa.table({"a": [3, 4]}), second)
    os.replace(second, first)
    after = data_files.read(dataset, tmp_path, ("a",))

    assert (before.table["a"].to_pylist(), after.table["a"].to_pylist()) == ([1, 2], [3, 4])
    assert before.digest != after.digest
