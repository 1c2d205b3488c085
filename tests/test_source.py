"""Handles resolved inside the zone: a notebook's document can name what the catalog has, and nothing else."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_gpu import data_files, demo_data, share, source
from ray_gpu.embedded import shipped_policies
from zones import segments as divisions
from zones.config import load_zone
from zones.errors import ConfigError, UnknownNameError, ValueRefusedError
from zones.model import Dataset, Segments, Zone

CLASSES = {"age": "confidential", "name": "direct-identifier", "visits": "internal"}


def _table(rows: int = 100) -> pa.Table:
    columns: dict[str, Any] = {
        "age": list(range(rows)),
        "name": [f"n{i}" for i in range(rows)],
        "visits": [i % 7 for i in range(rows)],
    }
    return pa.table(columns)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A zone's data directory with one data set in two formats."""
    with pa.OSFile(str(tmp_path / "people.arrow"), "wb") as file, pa.ipc.new_file(file, _table().schema) as writer:
        writer.write_table(_table())
    pq.write_table(_table(), tmp_path / "people.parquet")
    (tmp_path / "secret.arrow").write_bytes((tmp_path / "people.arrow").read_bytes())
    (tmp_path / "broken.arrow").write_bytes(b"ARROW1 and then nothing")
    return tmp_path


@pytest.fixture
def zone() -> Zone:
    """A zone whose catalog has the data set in both formats, one that is missing and one that is broken."""
    names = {
        "people": "people.arrow",
        "parquet": "people.parquet",
        "missing": "no-such.arrow",
        "broken": "broken.arrow",
    }
    datasets = {name: Dataset(name=name, path=path, columns=CLASSES) for name, path in names.items()}
    more = Dataset(name="more", path="people.arrow", columns={**CLASSES, "income": "confidential"})
    return Zone(
        name="clinic",
        classes=("internal", "confidential", "direct-identifier"),
        default_class="direct-identifier",
        datasets={**datasets, "more": more},
        pools=("shared",),
        policy_digest="0" * 64,
        endpoints=(),
        small_bytes=None,
    )


@pytest.mark.parametrize("name", ["people", "parquet"])
def test_whole_data_set(zone: Zone, directory: Path, name: str) -> None:
    """Without more, a handle is all rows and columns of the file."""
    found = source.from_catalog(zone, directory, {"dataset": name}, None)

    assert found.table.equals(_table())
    assert (found.dataset, found.rows, found.columns, found.filter_columns) == (name, 100, list(CLASSES), frozenset())


def test_columns_filter_and_split(zone: Zone, directory: Path) -> None:
    """Filter, split and the filter after it choose rows in this order; columns of either are reported."""
    handle = {
        "dataset": "people",
        "columns": ["age"],
        "filter": ["visits", "==", 1],
        "split": {"fractions": [0.5], "seed": 1, "part": 0},
        "then": ["name", "!=", "n8"],
    }
    found = source.from_catalog(zone, directory, handle, None)
    without = source.from_catalog(zone, directory, {**handle, "then": None}, None)

    assert found.columns == ["age"]
    assert found.filter_columns == {"visits", "name"}
    assert without.rows == 8
    assert found.table["age"].to_pylist() == [age for age in without.table["age"].to_pylist() if age != 8]
    assert {int(age or 0) % 7 for age in found.table["age"].to_pylist()} == {1}


def test_option_chooses_among_the_handles_columns(zone: Zone, directory: Path) -> None:
    """The function's columns are a choice among those of the handle, never more."""
    handle = {"dataset": "people", "columns": ["age", "visits"]}

    assert source.from_catalog(zone, directory, handle, ("visits",)).columns == ["visits"]
    with pytest.raises(UnknownNameError, match="no column 'name'"):
        source.from_catalog(zone, directory, handle, ("name",))


@pytest.mark.parametrize(
    ("handle", "error"),
    [
        ({}, UnknownNameError),
        ({"dataset": "secret"}, UnknownNameError),
        ({"dataset": "secret.arrow"}, UnknownNameError),
        ({"dataset": "../secret"}, UnknownNameError),
        ({"dataset": ["people"]}, UnknownNameError),
        ({"dataset": "people", "columns": ["income"]}, UnknownNameError),
        ({"dataset": "people", "columns": "age"}, ValueError),
        ({"dataset": "people", "columns": {"age": 1}}, ValueError),
        ({"dataset": "people", "filter": ["income", ">", 1]}, UnknownNameError),
        ({"dataset": "people", "filter": "age > 1"}, ValueError),
        ({"dataset": "people", "filter": ["age", ">", "old"]}, ValueError),
        ({"dataset": "people", "then": ["age", "~", 1]}, ValueError),
        ({"dataset": "people", "split": 3}, ValueError),
        ({"dataset": "people", "split": {}}, ValueError),
        ({"dataset": "people", "split": {"fractions": [0.5], "seed": 1, "part": 2}}, ValueError),
        ({"dataset": "people", "split": {"fractions": [0.5], "seed": 1, "part": -1}}, ValueError),
        ({"dataset": "people", "split": {"fractions": [2], "seed": 1, "part": 0}}, ValueError),
        ({"dataset": "people", "split": {"fractions": [float("nan")], "seed": 1, "part": 0}}, ValueError),
        ({"dataset": "people", "split": {"fractions": [0.5], "seed": 1, "part": float("inf")}}, ValueError),
    ],
    ids=str,
)
def test_forged_handle(zone: Zone, directory: Path, handle: dict[str, Any], error: type[Exception]) -> None:
    """A document that a client would not write is refused as a mistake, whatever it tries."""
    with pytest.raises(error):
        source.from_catalog(zone, directory, handle, None)


@pytest.mark.parametrize("name", ["missing", "broken", "more"])
def test_file_that_is_not_as_the_catalog_says(zone: Zone, directory: Path, name: str) -> None:
    """A missing or broken file, or one without a column, is the operator's to mend; the message names the file."""
    with pytest.raises(ConfigError, match=f"data set {name} .* operator") as error:
        source.from_catalog(zone, directory, {"dataset": name}, None)

    assert error.value.file is not None
    assert str(directory) not in error.value.message


def test_changed_file_is_read_again(zone: Zone, directory: Path) -> None:
    """What is kept in memory is the file as it is now."""
    assert source.from_catalog(zone, directory, {"dataset": "parquet"}, None).rows == 100
    pq.write_table(_table(50), directory / "people.parquet")

    assert source.from_catalog(zone, directory, {"dataset": "parquet"}, None).rows == 50


# -- memory files -----------------------------------------------------------------------------------


def test_memory_file() -> None:
    """A table in a sealed memory file is read without a copy, and has no data set."""
    found = source.from_memory(share.share_table(_table()), ("age",))

    assert found.dataset == ""
    assert found.table.equals(_table().select(["age"]))


def test_unknown_column_of_a_memory_file() -> None:
    """A column that it lacks is named."""
    with pytest.raises(UnknownNameError, match="no column 'income'"):
        source.from_memory(share.share_table(_table()), ("income",))


def test_unsealed_memory_file_is_refused() -> None:
    """A file that its sender could still change is refused: it would leave other bytes than were decided on."""
    sealed = share.share_table(_table())
    content = os.pread(sealed, os.fstat(sealed).st_size, 0)
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(fd, content)

    with pytest.raises(ValueRefusedError, match="not sealed"):
        source.from_memory(fd, None)
    assert source.from_memory(sealed, None).rows == 100, "the same bytes, sealed"


def test_sealed_memory_file_cannot_be_changed() -> None:
    """Once shared, not even its maker can write, grow, shrink or unseal it."""
    fd = share.share_table(_table())
    try:
        for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 1), lambda: os.ftruncate(fd, 1 << 20)):
            with pytest.raises(PermissionError):
                change()
    finally:
        os.close(fd)


def test_control_unsealed_memory_file_is_changed() -> None:
    """The same bytes in a memory file without seals change under whoever has mapped them."""
    sealed = share.share_table(_table())
    content = os.pread(sealed, os.fstat(sealed).st_size, 0)
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        before = bytes(mapped)
        os.pwrite(fd, b"x", 0)
        after = bytes(mapped)
    for each in (fd, sealed):
        os.close(each)

    assert before == content
    assert after != content


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"ARROW1", os.urandom(500)], ids=["empty", "zeros", "magic", "noise"]
)
def test_memory_file_without_a_table(content: bytes) -> None:
    """A sealed file that holds no table is refused."""

    def fill(view: memoryview) -> int:
        view[: len(content)] = content
        return len(content)

    with pytest.raises(ValueRefusedError):
        source.from_memory(share.sealed_file(max(1, len(content)), fill), None)


def test_file_that_is_no_memory_file(tmp_path: Path) -> None:
    """A descriptor of an ordinary file is refused: it cannot be sealed."""
    path = tmp_path / "data"
    path.write_bytes(b"x" * 100)

    with pytest.raises(ValueRefusedError, match="not sealed"):
        source.from_memory(os.open(path, os.O_RDONLY), None)


def test_values_side_by_side() -> None:
    """Several encoded values share one file, each at its place."""
    from zones import values

    parts = [memoryview(values.encode(item)) for item in ({"a": 1}, [2, 3], "four")]
    fd, places = share.share_encoded(parts)
    view = share.open_sealed(fd)

    assert [values.decode(view[start:stop]) for start, stop in places] == [{"a": 1}, [2, 3], "four"]
    assert all(start % 64 == 0 for start, _ in places)


# -- segments ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the shipped zone openlab's digits."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra demo)")
    directory = tmp_path_factory.mktemp("openlab")
    with pa.OSFile(str(directory / "digits.arrow"), "wb") as file:
        table = demo_data.digits()
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return directory


OPENLAB = load_zone(shipped_policies(), "openlab")


def rows_of(digits: Path, *segments: str, **handle: Any) -> source.Source:
    """Return rows of segments."""
    document = {"dataset": "digits", "segments": list(segments) or None, **handle}
    return source.from_catalog(OPENLAB, digits, document, None)


def test_segments_make_up_the_whole(digits: Path) -> None:
    """Train and test have every row once, folds every row of train, and each label its share of all of them."""
    whole, train, test = rows_of(digits), rows_of(digits, "train"), rows_of(digits, "test")
    folds = [rows_of(digits, f"train/fold-{number}") for number in range(1, 6)]

    assert train.numbers is not None
    assert test.numbers is not None
    assert sorted([*train.numbers, *test.numbers]) == list(range(whole.rows))
    assert sorted(np.concatenate([fold.numbers for fold in folds if fold.numbers is not None])) == sorted(train.numbers)
    assert test.table.equals(whole.table.take(test.numbers))
    for label in range(10):
        of_label = [part.table["label"].to_pylist().count(label) for part in (whole, test, *folds)]
        assert abs(of_label[1] - of_label[0] / 5) <= 1
        assert max(of_label[2:]) - min(of_label[2:]) <= 1


def test_what_a_segment_touches(digits: Path) -> None:
    """Rows of a fold are rows of train too; without a segment they are of all; a filter or split changes nothing."""
    every = {"train", "test", *(f"train/fold-{number}" for number in range(1, 6))}

    assert rows_of(digits).segments == every
    assert rows_of(digits, "train/fold-2").segments == {"train", "train/fold-2"}
    assert rows_of(digits, "test", filter=["label", "==", 3]).segments == {"test"}
    three = rows_of(digits, "train", filter=["label", "==", 3])
    assert set(three.table["label"].to_pylist()) == {3}
    assert rows_of(digits, filter=["label", "==", 3]).segments == every


@pytest.fixture
def learning(zone: Zone, directory: Path) -> Zone:
    """A zone whose people are in rounds of learning, of which a file says who was labelled when."""
    rounds = Segments(parts=divisions.rounds(2), by="age", listed_in="labelled")
    divided = replace(
        zone.datasets["people"], segments=Segments(parts={"train": 80, "test": 20}, within={"train": rounds})
    )
    labelled = Dataset(name="labelled", path="labelled.parquet", columns={"age": "confidential", "round": "internal"})
    return replace(zone, datasets={**zone.datasets, "people": divided, "labelled": labelled})


def label(directory: Path, rounds: dict[int, int]) -> None:
    """Write who was labelled in which round."""
    pq.write_table(pa.table({"age": list(rounds), "round": list(rounds.values())}), directory / "labelled.parquet")


def test_rounds_of_learning(learning: Zone, directory: Path) -> None:
    """Labelling moves rows from the rest into their round, on the next call; the source says by which file."""

    def ages(*segments: str) -> list[Any]:
        found = source.from_catalog(learning, directory, {"dataset": "people", "segments": list(segments)}, None)
        list_ = {"labelled": data_files.digest(learning.datasets["labelled"], directory)}
        assert found.listed == (list_ if any("/" in segment for segment in segments) else {})
        return list(found.table["age"].to_pylist())

    label(directory, {})
    train, test = ages("train"), ages("test")
    assert ages("train/unlabelled") == train
    label(directory, {train[0]: 1, train[5]: 1})
    assert ages("train/round-1") == [train[0], train[5]]
    label(directory, {train[0]: 1, train[5]: 1, train[7]: 2})
    assert (ages("train/round-1"), ages("train/round-2")) == ([train[0], train[5]], [train[7]])
    assert ages("train/round-1", "train/round-2") == [train[0], train[5], train[7]]
    assert len(ages("train/unlabelled")) == len(train) - 3
    assert (ages("train"), ages("test")) == (train, test)
    label(directory, {test[0]: 1})
    with pytest.raises(ConfigError, match="of no row of people/train"):
        ages("train/unlabelled")


def test_rounds_that_nobody_asks_for(learning: Zone, directory: Path) -> None:
    """Train and test are what they are, whether or not there is a file that says who was labelled; a round needs it."""
    for segments in (None, ["train"], ["test"], ["train", "test"]):
        found = source.from_catalog(learning, directory, {"dataset": "people", "segments": segments}, None)
        assert (found.listed, bool(found.rows)) == ({}, True)
    with pytest.raises(ConfigError, match=r"labelled\.parquet"):
        source.from_catalog(learning, directory, {"dataset": "people", "segments": ["test", "train/round-1"]}, None)


@pytest.mark.parametrize("segments", [[], "train", ["trian"], [3]])
def test_no_segment(digits: Path, segments: Any) -> None:
    """What is no segment is refused, whatever a notebook sends."""
    with pytest.raises((ValueError, UnknownNameError)):
        source.from_catalog(OPENLAB, digits, {"dataset": "digits", "segments": segments}, None)
