"""The batch that a function gets: arrays of columns, with NumPy where there is no GPU."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_gpu import arrays
from ray_gpu.arrays import Batch, to_host


def _batch(**columns: Any) -> Batch:
    return Batch(pa.table(columns))


def _host(array: Any) -> Any:
    return to_host(array)


def test_column_is_an_array_of_the_namespace() -> None:
    """``batch["age"]`` is an array of ``batch.xp``, one entry per row."""
    batch = _batch(age=[1.0, 2.0], sex=[0, 1])
    age = batch["age"]

    assert type(age) is type(batch.xp.zeros(1))
    assert (age.dtype, age.shape) == (np.dtype("float64"), (2,))
    assert float(batch.xp.sum(age)) == 3.0


def test_column_is_copied_once() -> None:
    """The second use gets the same array: to a GPU it was copied once."""
    batch = _batch(age=[1.0, 2.0])

    assert batch["age"] is batch["age"]


def test_stand_in_is_named() -> None:
    """Where NumPy computes, the device says so; a GPU has its own name."""
    stands_in = arrays.namespace().__name__.endswith("numpy")

    assert (arrays.device() == "numpy stand-in (no GPU)") is stands_in
    assert arrays.device() in repr(_batch(age=[1]))


def test_batch_is_like_a_mapping() -> None:
    """Length is rows; iteration and ``in`` are about columns; ``to_arrow`` is the table itself."""
    table = pa.table({"a": [1], "b": ["x"]})
    batch = Batch(table)

    assert (len(batch), list(batch), batch.columns) == (1, ["a", "b"], ["a", "b"])
    assert "a" in batch
    assert "c" not in batch
    assert batch.to_arrow() is table


def test_unknown_column_lists_what_there_is() -> None:
    """A typing error is a ``KeyError`` that shows the names."""
    with pytest.raises(KeyError, match=r"no column 'agee'; it has \['age'\]"):
        _batch(age=[1])["agee"]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1.0, None], pa.float64(), [1.0, np.nan]),
        ([1, None], pa.int64(), [1.0, np.nan]),
        ([1, 2], pa.int32(), [1, 2]),
        ([True, False], pa.bool_(), [True, False]),
        ([1, 255], pa.uint8(), [1, 255]),
        ([dt.date(1970, 1, 3), None], pa.date32(), [2.0, np.nan]),
        ([dt.datetime(1970, 1, 1, 0, 0, 1)], pa.timestamp("ms"), [1000]),
        ([dt.timedelta(seconds=2)], pa.duration("us"), [2_000_000]),
        ([dt.time(0, 0, 3)], pa.time32("s"), [3]),
        ([], pa.float64(), []),
    ],
    ids=str,
)
def test_values(values: list[Any], kind: Any, expected: list[Any]) -> None:
    """Nulls are NaN; dates and times are counts in the column's unit; all else is itself."""
    np.testing.assert_array_equal(_host(_batch(x=pa.array(values, kind))["x"]), expected)


def test_chunks_are_joined() -> None:
    """A column in several chunks, or in none, is one array."""
    chunked: Any = pa.chunked_array([pa.array([1, 2]), pa.array([3])])

    assert _host(_batch(x=chunked)["x"]).tolist() == [1, 2, 3]
    assert _host(_batch(x=pa.chunked_array([], pa.int64()))["x"]).tolist() == []


def test_dictionary_is_its_codes() -> None:
    """Category values stay in the zone; the codes are what can be computed with."""
    column = pa.array(["b", "a", "b", None]).dictionary_encode()

    np.testing.assert_array_equal(_host(_batch(x=column)["x"]), [0, 1, 0, np.nan])


@pytest.mark.parametrize(
    "column",
    [pa.array(["a"]), pa.array([b"a"]), pa.array([[1, 2]]), pa.array([Decimal("1.5")]), pa.array([True, None])],
    ids=lambda column: str(column.type),
)
def test_no_array_form(column: Any) -> None:
    """Text, lists, decimals and booleans with nulls are refused by name, with the way out."""
    with pytest.raises(TypeError, match=r"column 'x' of type .* has no array form; use batch.to_arrow\(\)"):
        _batch(x=column)["x"]


def test_type_of_a_column_does_not_depend_on_the_rows() -> None:
    """Where the call's data has nulls, a shard without one gives the same types as one with some."""
    kinds: dict[str, Any] = {"a": pa.int64(), "b": pa.int64(), "c": pa.bool_(), "d": pa.date32()}
    fields = [pa.field(name, kind, nullable=name != "b") for name, kind in kinds.items()]
    columns = [pa.array([0, 1], pa.int32()).cast(kind) for kind in kinds.values()]
    batch = Batch.of_shard(pa.Table.from_arrays(columns, schema=pa.schema(fields)))

    assert [batch[name].dtype for name in "abd"] == [np.dtype("float64"), np.dtype("int64"), np.dtype("float64")]
    with pytest.raises(TypeError, match="bool with nulls has no array form"):
        batch["c"]
    with pytest.raises(ValueError, match="column 'a' has nulls"):
        batch.matrix(["b", "a"], dtype=np.int64)
    assert batch.matrix(["b"], dtype=np.int64).dtype == np.int64
    assert all(field.nullable for field in batch.to_arrow().schema)


def test_matrix() -> None:
    """``matrix`` puts columns side by side, in the order asked for, as ``float64`` unless told otherwise."""
    batch = _batch(a=[1, 2], b=[3.5, None])

    np.testing.assert_array_equal(_host(batch.matrix()), [[1.0, 3.5], [2.0, np.nan]])
    chosen = batch.matrix(["a"], dtype="int32")
    assert (chosen.shape, chosen.dtype) == ((2, 1), np.dtype("int32"))
    assert batch.matrix(["b", "a"])[0].tolist() == [3.5, 1.0]


def test_matrix_of_nothing() -> None:
    """No rows and no columns are shapes too."""
    assert _batch(a=pa.array([], pa.float64())).matrix().shape == (0, 1)
    assert _batch(a=[1, 2]).matrix([]).shape == (2, 0)


def test_matrix_has_no_integer_for_null() -> None:
    """A null would become an arbitrary integer, so that is refused."""
    with pytest.raises(ValueError, match="column 'b' has nulls"):
        _batch(b=[1, None]).matrix(dtype=np.int64)


@pytest.mark.parametrize(
    "value", [None, 1, "x", [1, (2, {"a": 3})], pa.table({"a": [1]})], ids=lambda v: type(v).__name__
)
def test_to_host_leaves_host_values(value: Any) -> None:
    """What is no device array comes back equal, containers of the same kind."""
    assert to_host(value) == value
    assert type(to_host(value)) is type(value)
