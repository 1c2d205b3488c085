"""Tables that come from no catalog: in a zone whose policy lets them leave, they are data like any other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pad
import pytest

from ray_gpu import Batch, gpu_remote
from zones.errors import UnknownNameError, ValueRefusedError

_COLUMNS: dict[str, Any] = {
    "mdvis": np.arange(5000.0),
    "idp": np.arange(5000) % 2,
    "name": [f"n{i}" for i in range(5000)],
}
TABLE = pa.table(_COLUMNS)


@gpu_remote(columns=["mdvis"])
def double(batch: Batch) -> Any:
    """Return one number per row."""
    return batch["mdvis"] * 2


@pytest.fixture(scope="module")
def open_cluster(
    start_cluster: Callable[..., AbstractContextManager[Any]], copy_policies: Callable[..., Path]
) -> Iterator[Any]:
    """A cluster whose zone lets tables of one's own leave, and data sets as before."""
    policies = copy_policies(
        {
            "clinic/egress.cedar": (
                'when { context.classes.contains("direct-identifier") };',
                'when { context.dataset != "" && context.classes.contains("direct-identifier") };\n\n'
                '@id("own-tables")\n@reason("tables of one\'s own may leave")\n'
                'permit (principal in Group::"research", action == Action::"egress", resource == Pool::"shared")\n'
                'when { context.dataset == "" };',
            ),
        }
    )
    with start_cluster(data=False, policies=policies) as running:
        yield running


@pytest.fixture(scope="module")
def open_zone(open_cluster: Any) -> Iterator[Any]:
    """A session in it."""
    with open_cluster.attach("own tables") as session:
        yield session


def _polars(table: pa.Table) -> Any:
    return pytest.importorskip("polars", reason="polars is not installed").from_arrow(table)


SOURCES: dict[str, Callable[[pa.Table, Path], Any]] = {
    "table": lambda table, _: table,
    "chunked": lambda table, _: pa.concat_tables([table.slice(0, 1000), table.slice(1000)]),
    "reader": lambda table, _: table.to_reader(),
    "pandas": lambda table, _: table.to_pandas(),
    "polars": lambda table, _: _polars(table),
    "dataset": lambda table, _: pad.dataset(table),
    "files": lambda table, path: _files(table, path),
}


def _files(table: pa.Table, path: Path) -> Any:
    pad.write_dataset(table, path, format="parquet")
    return pad.dataset(path)


@pytest.mark.parametrize("kind", SOURCES)
def test_own_table_where_policy_allows_it(open_zone: Any, kind: str, tmp_path: Path) -> None:
    """Anything with ``__arrow_c_stream__``, and a data set of files, is mapped like a handle."""
    data = SOURCES[kind](TABLE, tmp_path)

    found = double.options(session=open_zone).map(data)

    np.testing.assert_array_equal(found, TABLE["mdvis"].to_numpy() * 2)


@pytest.mark.parametrize("kind", ["table", "dataset"])
def test_local_on_an_own_table(kind: str, tmp_path: Path) -> None:
    """``f.local`` takes the same kinds of data, and needs no session."""
    np.testing.assert_array_equal(double.local(SOURCES[kind](TABLE, tmp_path)), TABLE["mdvis"].to_numpy() * 2)


def test_text_columns_arrive(open_zone: Any) -> None:
    """Text has no array form but arrives in the table, and comes back."""

    @gpu_remote(columns=["name"], session=open_zone)
    def shout(batch: Batch) -> pa.Table:
        import pyarrow.compute as pc

        loud: Any = pc.utf8_upper(batch.to_arrow()["name"])
        return pa.table({"loud": loud})

    assert shout.map(TABLE)["loud"].to_pylist() == [f"N{i}" for i in range(5000)]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view()], ids=str)
def test_view_columns_are_mapped(open_zone: Any, kind: Any) -> None:
    """Text in Arrow's view layout, which polars gives, leaves as plain text; ``f.local`` gives what ``f.map`` gives."""

    @gpu_remote(columns=["name"], session=open_zone)
    def same(batch: Batch) -> pa.Table:
        return batch.to_arrow()

    table = TABLE.set_column(2, "name", TABLE["name"].cast(kind))

    found = same.map(table)

    assert found.equals(same.local(table))
    assert [str(name) for name in found["name"].cast("string").to_pylist()] == TABLE["name"].to_pylist()


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None if i == 5 else i for i in range(40_000)], pa.int64()),
        pa.array([None if i == 5 else str(i % 7) for i in range(40_000)]).dictionary_encode(),
        pa.array([None if i == 5 else i for i in range(40_000)], pa.int32()).cast(pa.date32()),
        pa.array(range(40_000), pa.int64()),
    ],
    ids=["integers", "categories", "dates", "no null"],
)
def test_one_null_among_many_rows(open_zone: Any, column: Any) -> None:
    """A column is of one type in all shards, whichever of them drew the null; ``f.local`` equals ``f.map``."""

    @gpu_remote(session=open_zone, shard_bytes=64 << 10)
    def same(batch: Batch) -> Any:
        return batch["x"]

    table = pa.table({"x": column})

    found = same.map(table)

    expected = same.local(table)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_categories_that_a_function_asks_for(open_zone: Any, open_cluster: Any) -> None:
    """Codes alone leave, unless the function asks for the values: then the ledger names the column; all come back."""
    words = [None if i == 5 else f"word-{i % 7}" for i in range(4_000)]
    known = {word: code for code, word in enumerate(dict.fromkeys(word for word in words if word))}
    table = pa.table({"x": pa.array(words).dictionary_encode()})

    @gpu_remote(session=open_zone, shard_bytes=64 << 10)
    def same(batch: Batch) -> pa.Table:
        column: Any = batch.to_arrow()["x"]
        return pa.table({"x": column if pa.types.is_integer(column.type) else column.cast(pa.string())})

    codes = same.map(table)["x"].to_pylist()
    values = same.options(categories=["x"]).map(table)["x"].to_pylist()

    assert codes == [word and known[word] for word in words]
    assert values == words
    assert [one["categories"] for one in open_cluster.entries("decision")[-2:]] == [[], ["x"]]
    with pytest.raises(ValueRefusedError, match="column 'y' has no categories"):
        same.options(categories=["y"]).map(pa.table({"y": [1, 2]}))


def test_reader_gives_its_rows_once(open_zone: Any) -> None:
    """A reader that was read before is refused, where it would pass for a table without rows."""
    reader = TABLE.to_reader()
    function = double.options(session=open_zone)
    assert len(function.map(reader)) == 5000

    for run in (function.map, function.local):
        with pytest.raises(ValueRefusedError, match="they were read before"):
            run(reader)


def test_result_without_columns(open_zone: Any) -> None:
    """N rows of nothing are N rows, too."""
    nothing = gpu_remote(session=open_zone, shard_bytes=64 << 10)(lambda batch: batch.xp.zeros((len(batch), 0)))

    assert nothing.map(TABLE).shape == (5000, 0)


def test_result_with_a_name_twice(open_zone: Any) -> None:
    """Arrow lets two columns have one name; the result has both, as with ``f.local``."""

    @gpu_remote(columns=["mdvis"], session=open_zone, shard_bytes=64 << 10)
    def twice(batch: Batch) -> pa.Table:
        column = batch.to_arrow()["mdvis"]
        return pa.Table.from_arrays([column, column], names=["a", "a"])

    found = twice.map(TABLE)

    assert found.column_names == ["a", "a"]
    assert found.equals(twice.local(TABLE))


@pytest.mark.parametrize("rows", [0, 1])
def test_own_table_of_few_rows(open_zone: Any, rows: int) -> None:
    """Also a table without rows, or with one."""
    found = double.options(session=open_zone).map(TABLE.slice(0, rows))

    np.testing.assert_array_equal(found, TABLE["mdvis"].to_numpy()[:rows] * 2)


def test_only_the_columns_asked_for_are_read(open_zone: Any, open_cluster: Any) -> None:
    """The ledger names the columns of an own table that left, and its classes."""
    double.options(session=open_zone).map(TABLE)
    entry = open_cluster.entries("intent")[-1]

    assert (entry["dataset"], entry["columns"], entry["classes"]) == ("", ["mdvis"], ["direct-identifier", "internal"])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([1, 2], "not list"),
        ({"a": [1]}, "not dict"),
        (np.arange(3), "not ndarray"),
        (None, "not NoneType"),
        (pa.chunked_array([[1]]), "must have named columns"),
    ],
    ids=["list", "dict", "array", "none", "column"],
)
def test_data_of_another_kind(data: Any, says: str) -> None:
    """What is no table is refused with what is one."""
    with pytest.raises(TypeError, match=says):
        double.options(columns=None).map(data)
    with pytest.raises(TypeError, match=says):
        double.options(columns=None).local(data)


def test_unknown_column_of_an_own_table(open_zone: Any) -> None:
    """A column that the table lacks is answered with the nearest."""
    with pytest.raises(UnknownNameError, match=r"no column 'mdvi' \(did you mean 'mdvis'\?\)"):
        double.options(columns=["mdvi"], session=open_zone).map(TABLE)


def test_too_many_rows_for_one_batch(open_zone: Any, open_cluster: Any) -> None:
    """``f.remote`` of more rows than fit one batch is refused before anything leaves, and names what takes them."""
    large = pa.table([pa.array(np.zeros(9_000_000))], ["mdvis"])
    count = gpu_remote(session=open_zone)(lambda batch: len(batch))
    assert count.remote(large.slice(0, 5_000_000)).result(timeout=90) == 5_000_000
    before = len(open_cluster.entries("intent")), len(open_cluster.entries("completion"))

    with pytest.raises(ValueRefusedError, match=r"9000000 rows .* use \.map or \.map_reduce"):
        count.remote(large).result(timeout=90)

    assert (len(open_cluster.entries("intent")), len(open_cluster.entries("completion"))) == before
