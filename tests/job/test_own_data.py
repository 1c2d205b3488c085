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

from ray_gpu import Batch, OnGpu, gpu_remote
from ray_gpu.call import as_table
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


def test_batches_of_ray_data(open_cluster: Any) -> None:
    """Rows in a batch of Ray Data's are mapped where policy lets them leave; what is to be kept goes along here."""
    # The first test: later a session of the module's has all leases, and gives them back after half a minute.
    before, wanted = len(open_cluster.entries("intent")), {**_COLUMNS, "result": _COLUMNS["mdvis"] * 2}
    on_gpu = OnGpu(double, "clinic", keep=["name"], state_dir=open_cluster.state)
    try:
        found = on_gpu(TABLE.replace_schema_metadata({"pandas": "{}"}))
        empty = on_gpu(TABLE.slice(0, 0))
    finally:
        on_gpu.session.close()

    assert found.equals(pa.table(wanted).select(["name", "result"]))
    assert (empty.num_rows, empty.schema) == (0, found.schema)
    assert {tuple(entry["columns"]) for entry in open_cluster.entries("intent")[before:]} == {("mdvis",)}


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
        (None, "not NoneType"),
        (pa.chunked_array([[1]]), "must have named columns"),
    ],
    ids=["list", "dict", "none", "column"],
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


TYPES: dict[str, Any] = {
    "nulls": pa.array([None if n % 3 == 0 else n for n in range(200)]),
    "all null": pa.nulls(200),
    "null floats": pa.array([None if n % 3 == 0 else float(n) for n in range(200)]),
    "small whole": pa.array([n % 100 for n in range(200)], pa.int8()),
    "half": pa.array(np.arange(200, dtype=np.float16)),
    "unsigned": pa.array([2**63 + n for n in range(200)], pa.uint64()),
    "booleans": pa.array([n % 2 == 0 for n in range(200)]),
    "text": pa.array([f"t{n}" if n % 4 else None for n in range(200)]),
    "large text": pa.array([f"t{n}" for n in range(200)], pa.large_string()),
    "bytes": pa.array([bytes([n % 256]) * (n % 5) for n in range(200)]),
    "fixed bytes": pa.array([bytes([n % 256]) * 7 for n in range(200)], pa.binary(7)),
    "dates": pa.array(range(200), pa.date32()),
    "times": pa.array(range(200), pa.time64("ns")),
    "timestamps": pa.array(range(200), pa.timestamp("ns", "Europe/Berlin")),
    "durations": pa.array(range(200), pa.duration("ms")),
    "decimals": pa.array([f"{n}.25" for n in range(200)]).cast(pa.decimal128(20, 2)),
    "large decimals": pa.array([f"{n}.25" for n in range(200)]).cast(pa.decimal256(50, 2)),
    "lists": pa.array([list(range(n % 4)) if n % 7 else None for n in range(200)]),
    "large lists": pa.array([[f"x{n}"] for n in range(200)], pa.large_list(pa.string())),
    "fixed lists": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(600.0)), 3),
    "structs": pa.array([{"a": n, "b": [str(n)]} if n % 5 else None for n in range(200)]),
    "maps": pa.array([[(f"k{n}", n)] for n in range(200)], pa.map_(pa.string(), pa.int64())),
    "nested": pa.array([[{"a": [n, None]}, None] for n in range(200)]),
}


@gpu_remote(shard_bytes=64 << 10)
def itself(batch: Batch) -> pa.Table:
    """Return all rows."""
    return batch.to_arrow()


@pytest.mark.parametrize("rows", [200, 1, 0])
def test_types_there_and_back(open_zone: Any, rows: int) -> None:
    """Columns of every type come back as they went, all rows, one and none, in one chunk and in many."""
    whole = pa.table(TYPES).slice(0, rows)
    for table in (whole, pa.concat_tables([whole.slice(0, 7), whole.slice(7, 0), whole.slice(7)])):
        found = itself.options(session=open_zone).map(table)
        for name in TYPES:
            assert found[name].to_pylist() == table[name].to_pylist(), name
            assert found.schema.field(name).type == table.schema.field(name).type, name


@pytest.mark.parametrize("columns", [100, pytest.param(10_000, marks=pytest.mark.chaos)])
def test_many_columns(open_zone: Any, columns: int) -> None:
    """A table of very many columns comes back whole."""
    values: dict[str, Any] = {f"c{n}": np.arange(40.0) + n for n in range(columns)}
    found = itself.options(session=open_zone).map(pa.table(values))

    assert found.column_names == list(values)
    assert all(np.array_equal(found[name].to_numpy(), values[name]) for name in values)


def test_arrays(open_zone: Any) -> None:
    """An array, and arrays by name, are data; further dimensions arrive as such, and what comes back has them too."""
    images = np.arange(300 * 4 * 5, dtype=np.float32).reshape(300, 4, 5)
    labels = np.arange(300) % 3

    @gpu_remote(session=open_zone)
    def turned(batch: Batch) -> Any:
        return batch["array"].transpose(0, 2, 1) + 1

    @gpu_remote(session=open_zone)
    def sums(batch: Batch) -> Any:
        return batch["image"].sum((1, 2)) + batch["label"]

    assert np.array_equal(turned.map(images), images.transpose(0, 2, 1) + 1)
    assert np.array_equal(turned.map(images[::2]), images[::2].transpose(0, 2, 1) + 1)
    assert np.array_equal(turned.local(images), images.transpose(0, 2, 1) + 1)
    assert np.array_equal(sums.map({"image": images, "label": labels}), images.sum((1, 2)) + labels)


class OfAnotherLibrary:
    """An array that says what it holds by DLPack alone, as PyTorch's tensors do."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.ndim = array.ndim
        self.__dlpack__ = array.__dlpack__
        self.__dlpack_device__ = array.__dlpack_device__


def data_of(data: Any) -> Any:
    """Return what a call makes of its data."""
    return as_table(data)


def test_no_copy_on_the_way_in() -> None:
    """Arrays and tables become a call's data without a copy; that the addresses differ after one is the control."""
    array = np.arange(1000.0).reshape(200, 5)
    values: dict[str, Any] = {"a": array[:, 0].copy()}
    table: Any = pa.table(values)
    for data in (array, OfAnotherLibrary(array), {"array": array}):
        column = data_of(data)["array"].chunk(0)
        assert column.values.buffers()[1].address == array.ctypes.data
    assert data_of(table)["a"].chunk(0).buffers()[1].address == table["a"].chunk(0).buffers()[1].address
    control = data_of(array.copy())["array"].chunk(0)
    assert control.values.buffers()[1].address != array.ctypes.data


def test_no_copy_on_the_way_out(open_zone: Any) -> None:
    """What comes back is the memory that the gateway shared; pages that are written to become one's own."""
    values: dict[str, Any] = {"mdvis": np.arange(2_000_000.0)}
    big = pa.table(values)
    found = double.options(session=open_zone).map(big)
    table = itself.options(session=open_zone).map(big)

    assert not found.flags.owndata
    for address in (found.ctypes.data, table["mdvis"].chunk(0).buffers()[1].address):
        assert mapping_of(address) == "/memfd:ray-gpu"
    assert mapping_of(found.copy().ctypes.data) != "/memfd:ray-gpu"
    found[:10] = -1
    assert found[:11].tolist() == [-1.0] * 10 + [20.0]


def mapping_of(address: int) -> str:
    """Return what this process has mapped at an address."""
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        place, *rest = line.split(maxsplit=5)
        first, last = (int(part, 16) for part in place.split("-"))
        if first <= address < last:
            return rest[4].removesuffix(" (deleted)") if len(rest) > 4 else ""
    return ""


def test_handles_of_other_libraries(open_zone: Any, cluster: Any) -> None:
    """A handle's rows are pandas', polars' and Arrow's where they are asked for, inside the zone; so are results."""
    import polars as pl

    with cluster.attach("interop") as zone:
        data = zone.read("breast_cancer", columns=["mean_radius", "target"])
        table = data.to_arrow()
        assert pa.table(data).equals(table)
        assert data.to_pandas().equals(table.to_pandas())
        assert data.to_polars().equals(pl.from_arrow(table))
        # Of a result, pandas, polars and NumPy take the memory itself.
        found = gpu_remote(columns=["mean_radius"], session=zone)(lambda batch: batch.to_arrow()).map(data)
        address = found["mean_radius"].chunk(0).buffers()[1].address
        taken: Any = pl.from_arrow(found)
        assert taken["mean_radius"].to_numpy().__array_interface__["data"][0] == address
        assert found["mean_radius"].chunk(0).to_numpy().__array_interface__["data"][0] == address
        frame = found.to_pandas(split_blocks=True)
        assert frame["mean_radius"].to_numpy().__array_interface__["data"][0] == address


@pytest.mark.parametrize("wrong", [np.array([object()]), np.array([1 + 2j])], ids=["objects", "complex"])
def test_arrays_that_are_no_columns(wrong: Any) -> None:
    """An array of what Arrow has no numbers for is refused before anything is sent, with what it is."""
    with pytest.raises(TypeError, match=f"an array of numpy {wrong.dtype} cannot be a column"):
        as_table({"a": wrong})


def test_array_api_dispatch(cluster: Any) -> None:
    """Inside a function scikit-learn works on the batch's own arrays, as it does here."""

    @gpu_remote(columns=["mean_radius", "mean_texture", "mean_area"])
    def components(batch: Batch) -> Any:
        import sklearn
        from sklearn.decomposition import PCA

        with sklearn.config_context(array_api_dispatch=True):
            return PCA(2, svd_solver="full").fit(batch.matrix()).explained_variance_

    with cluster.attach("interop") as zone:
        data = zone.read("breast_cancer")
        assert np.allclose(components.remote(data).result(), np.linalg.eigvalsh(np.cov(matrix(data).T))[:0:-1])


def matrix(data: Any) -> Any:
    """Return the same columns here."""
    table = data.to_arrow().select(["mean_radius", "mean_texture", "mean_area"])
    return np.column_stack([column.to_numpy() for column in table.columns])
