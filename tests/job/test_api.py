"""What a data scientist writes: attach, decorate, map, reduce, call; and what each does when it is used wrongly."""

from __future__ import annotations

import gc
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pad
import pytest

from ray_gpu import Batch, Call, RemoteFunction, gpu_remote
from ray_gpu.client import MAX_OPEN_CALLS
from zones.errors import (
    CallCancelledError,
    CallTimeoutError,
    EgressDeniedError,
    FunctionRefusedError,
    RemoteFunctionError,
    RowCountError,
    UnknownNameError,
    ValueRefusedError,
)

FACTOR = 3.0


@gpu_remote
def add(a: float, b: float = 1.0) -> float:
    """Add on arguments alone."""
    return a + b


@gpu_remote
def nap(seconds: float) -> float:
    """Take long."""
    time.sleep(seconds)
    return seconds


@gpu_remote(columns=["mdvis"])
def double(batch: Batch) -> Any:
    """Return one number per row."""
    return batch["mdvis"] * 2


@gpu_remote
def count(batch: Batch) -> int:
    """Return one number per shard."""
    return len(batch)


@gpu_remote
def first_column(batch: Batch) -> Any:
    """Return the first column, whatever it is called."""
    return batch[batch.columns[0]]


class OwnError(Exception):
    """An exception of the user's own."""


@pytest.fixture(scope="module")
def zone(cluster: Any) -> Iterator[Any]:
    """One session for the tests that need no session of their own."""
    with cluster.attach("try the interface") as session:
        yield session


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_GPU_PROGRESS", "0")


@pytest.fixture
def visits(zone: Any) -> Any:
    """One column of real rows."""
    return zone.read("randhie", columns=["mdvis"])


def _wait_for(condition: Callable[[], object], what: str, *, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        select.select([], [], [], 0.01)


# -- attach -----------------------------------------------------------------------------------------


def test_session_shows_what_is_degraded(zone: Any) -> None:
    """The session's card names every control that is missing, of the zone's side and of the leases held."""
    add.remote(1).result()
    level = {lease["device"] for lease in zone.status()["leases"]}

    text = repr(zone)
    assert text.startswith("Session(zone='clinic', person='dana'")
    assert "degraded: " in text
    assert "embedded-vault" in text
    assert ("numpy-stand-in" in text) is any("numpy" in device for device in level)


# -- decorator and options --------------------------------------------------------------------------


def test_plain_decorator_keeps_the_function() -> None:
    """A decorated function still is the function: name, documentation, types, and calling it."""
    assert (add.__name__, add.__doc__) == ("add", "Add on arguments alone.")
    assert_type(add(1, 2), float)
    assert add(1, b=2) == 3
    assert repr(add) == "<gpu_remote function add>"


def test_decorator_with_options(zone: Any, visits: Any) -> None:
    """Options in the decorator reach the nodes: half a GPU each, so that three actors fit two GPUs."""

    @gpu_remote(num_gpus=0.5, columns=["mdvis"], pool="shared", concurrency=3, shard_bytes=64 << 10)
    def work(batch: Batch) -> int:
        time.sleep(0.2)
        return len(batch)

    def three() -> bool:
        assert work.map_reduce(visits, sum) == 20_190
        leases = zone.status()["leases"]
        assert {lease["gpu_milli"] for lease in leases} == {500}
        return len(leases) == 3

    # A call does not wait long for further actors; on a busy machine the next one gets them.
    _wait_for(three, "room for three", timeout_s=60)


def test_options_make_another_function() -> None:
    """``.options`` returns a changed copy, and keeps what was not named."""
    half = double.options(num_gpus=0.5)

    assert half is not double
    assert half._options.columns == ("mdvis",)
    assert (half._options.num_gpus, double._options.num_gpus) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_gpu", "did you mean 'num_gpus'"),
        ("gpu", "did you mean 'num_gpus'"),
        ("runtime_env", "did you mean 'environment'"),
        ("image", "did you mean 'environment'"),
        ("colums", "did you mean 'columns'"),
        ("timeout", "did you mean 'timeout_s'"),
        ("retries", "did you mean 'max_retries'"),
        ("xyz", "options are num_gpus, pool, concurrency"),
    ],
)
def test_unknown_option_names_the_nearest(name: str, hint: str) -> None:
    """An option that does not exist is refused where it is written, with the nearest valid name."""
    with pytest.raises(TypeError, match=f"no option '{name}'; {hint}"):
        gpu_remote(**{name: 1})
    with pytest.raises(TypeError, match=f"no option '{name}'; {hint}"):
        double.options(**{name: 1})


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_gpus": 0}, ValueError, "num_gpus is from 0.001 to 64"),
        ({"num_gpus": -1}, ValueError, "num_gpus is from 0.001 to 64"),
        ({"num_gpus": float("nan")}, ValueError, "num_gpus is from 0.001 to 64"),
        ({"num_gpus": 1.5}, ValueError, "num_gpus above 1 is a whole number, for example 2"),
        ({"num_gpus": "1"}, TypeError, "num_gpus is a number"),
        ({"num_gpus": True}, TypeError, "num_gpus is a number"),
        ({"num_gpus": None}, TypeError, "num_gpus is a number"),
        ({"pool": 3}, TypeError, "pool is a name"),
        ({"concurrency": 0}, ValueError, "concurrency is from 1 to 64"),
        ({"concurrency": 2.0}, TypeError, "concurrency is a whole number"),
        ({"shard_bytes": 1}, ValueError, "shard_bytes is from 65536"),
        ({"columns": "age"}, TypeError, r"columns is a list of names; write \['age'\]"),
        ({"columns": [1]}, TypeError, "1 is none"),
        ({"columns": []}, ValueError, "at least one column"),
        ({"columns": ["a", "a"]}, ValueError, "each of them once"),
        ({"timeout_s": 0}, ValueError, "timeout_s is a number of seconds above 0"),
        ({"timeout_s": "1"}, TypeError, "timeout_s is a number of seconds"),
        ({"placement_timeout_s": None}, TypeError, "placement_timeout_s is a number of seconds"),
        ({"session": "clinic"}, TypeError, "session is what ray_gpu.attach"),
    ],
    ids=str,
)
def test_wrong_option_value(options: dict[str, Any], error: type[Exception], says: str) -> None:
    """A value that cannot be is refused where it is written, with what it can be."""
    with pytest.raises(error, match=says):
        gpu_remote(**options)


@pytest.mark.parametrize("thing", ["shared", 3, int], ids=repr)
def test_decorating_no_function(thing: Any) -> None:
    """Options without names, or a class of Python's own, are answered with the right form."""
    with pytest.raises(TypeError, match="gpu_remote takes a function or a class of your own"):
        gpu_remote(thing)


def test_unknown_pool(visits: Any) -> None:
    """A pool that the zone does not use is answered with the nearest one."""
    with pytest.raises(UnknownNameError, match=r"no pool 'shard' \(did you mean 'shared'\?\)"):
        double.options(pool="shard").map(visits)


# -- the batch --------------------------------------------------------------------------------------


def test_batch_has_arrays_namespace_and_table(zone: Any) -> None:
    """On the node ``batch["x"]`` is an array of ``batch.xp``, and ``batch.to_arrow()`` an Arrow table."""

    @gpu_remote
    def look(batch: Batch) -> dict[str, Any]:
        import array_api_compat

        array, table = batch["mdvis"], batch.to_arrow()
        return {
            "is_array": array_api_compat.is_array_api_obj(array),
            "namespace": batch.xp.__name__,
            "module": type(array).__module__,
            "sum": float(batch.xp.sum(array)),
            "rows": len(batch),
            "table": type(table).__qualname__,
            "names": table.column_names,
            "columns": batch.columns,
            "matrix": list(batch.matrix().shape),
        }

    seen = look.remote(zone.read("randhie", columns=["mdvis", "idp"])).result()

    assert seen["is_array"]
    assert seen["namespace"] in ("array_api_compat.numpy", "array_api_compat.cupy")
    assert seen["module"] == seen["namespace"].rpartition(".")[2]
    assert seen["table"] == "Table"
    assert seen["names"] == seen["columns"] == ["mdvis", "idp"]
    assert seen["matrix"] == [20_190, 2]
    assert seen["sum"] == zone.read("randhie", columns=["mdvis"]).to_arrow()["mdvis"].to_numpy().sum()


# -- map --------------------------------------------------------------------------------------------


def test_map_is_in_the_original_order(visits: Any) -> None:
    """N rows in, N rows out, each at its place, although the rows left in another order."""
    found = double.options(shard_bytes=64 << 10).map(visits)

    np.testing.assert_array_equal(found, visits.to_arrow()["mdvis"].to_numpy() * 2)


def test_map_of_tables(zone: Any) -> None:
    """A function may return a table per shard; the result is one table in order."""

    @gpu_remote
    def label(batch: Batch) -> pa.Table:
        table = batch.to_arrow()
        return table.append_column("many", pa.array(table["mdvis"].to_numpy() > 5))

    data = zone.read("randhie", columns=["mdvis", "idp"])
    found = label.map(data)

    assert found.column_names == ["mdvis", "idp", "many"]
    assert found.select(["mdvis", "idp"]).equals(data.to_arrow())
    np.testing.assert_array_equal(found["many"].to_numpy(), data.to_arrow()["mdvis"].to_numpy() > 5)


def test_map_of_matrices(zone: Any) -> None:
    """A row of the result may be a vector."""

    @gpu_remote
    def pairs(batch: Batch) -> Any:
        return batch.matrix()

    data = zone.read("randhie", columns=["mdvis", "idp"])

    np.testing.assert_array_equal(pairs.map(data), data.to_arrow().to_pandas().to_numpy())


def test_map_result_can_be_changed(visits: Any) -> None:
    """The result is the caller's own array."""
    found = double.map(visits)
    found[0] = -1.0

    assert found[0] == -1.0


@pytest.mark.parametrize("rows", [0, 1])
def test_map_of_few_rows(zone: Any, rows: int) -> None:
    """A table without rows, or with one, is a table like any other."""
    numbers = zone.read("randhie", columns=["mdvis", "lncoins"])
    few = numbers.filter(["mdvis", "<", 0]) if rows == 0 else numbers.filter(["mdvis", "==", 77])
    assert len(few) == rows

    assert double.map(few).shape == (rows,)
    assert count.map_reduce(few, sum) == rows
    np.testing.assert_array_equal(double.map(few), double.local(few))


@pytest.mark.parametrize("change", [-1, 1], ids=["fewer", "more"])
def test_map_with_another_number_of_rows(zone: Any, change: int) -> None:
    """A result with more or fewer rows than the shard is an error that names both counts."""
    data = zone.read("breast_cancer", columns=["target"])

    @gpu_remote(concurrency=1)
    def cut(batch: Batch, more: int) -> Any:
        return batch.xp.zeros(len(batch) + more)

    with pytest.raises(RowCountError) as error:
        cut.map(data, change)

    assert error.value.got == error.value.expected + change
    assert str(error.value.got) in error.value.message
    assert str(error.value.expected) in error.value.message
    assert "map_reduce" in error.value.message


def test_map_without_rows_in_the_result(visits: Any) -> None:
    """One value per shard is no result of ``map``; the error says what to use."""
    with pytest.raises(ValueRefusedError, match=r"got a int; use f.map_reduce"):
        count.map(visits)


def test_further_arguments(visits: Any) -> None:
    """Arguments after the data reach every shard, by position and by name."""

    @gpu_remote
    def scale(batch: Batch, factor: float, *, offset: Any) -> Any:
        return batch["mdvis"] * factor + batch.xp.asarray(offset)[0]

    found = scale.map(visits, 2.0, offset=np.array([0.5]))

    np.testing.assert_array_equal(found, visits.to_arrow()["mdvis"].to_numpy() * 2 + 0.5)


# -- map_reduce -------------------------------------------------------------------------------------


def test_map_reduce(visits: Any) -> None:
    """One value per shard comes back, and ``reduce`` runs here, where it may use what the zone has."""
    here = os.getpid()
    seen: list[int] = []

    def total(parts: list[int]) -> int:
        seen.append(os.getpid())
        seen.append(len(parts))
        return sum(parts)

    found = count.map_reduce(visits, total)

    assert_type(found, int)
    assert found == 20_190
    assert seen[0] == here
    assert seen[1] >= 2


def test_reduce_that_is_no_function(visits: Any) -> None:
    """Data and reduce in the wrong order are found before anything leaves."""
    with pytest.raises(TypeError, match="reduce takes the list of the shards' values"):
        count.map_reduce(visits, "sum")  # type: ignore[arg-type]  # that is the mistake


# -- remote -----------------------------------------------------------------------------------------


def test_remote_returns_a_future(zone: Any) -> None:
    """``f.remote`` returns at once; ``result`` waits, and gives the same again."""
    call = add.remote(1, b=2)

    assert_type(call, Call[float])
    assert call.result() == call.result() == 3
    assert call.done()
    assert repr(call) == "<Call done>"


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, "text", b"bytes", [1, [2]], (1, (2, 3)), {"a": {"b": None}}, {1: "one"}, np.float32(1.5)],
    ids=repr,
)
def test_values_travel_both_ways(zone: Any, value: Any) -> None:
    """Plain values arrive on the node as they are, and come back."""

    @gpu_remote
    def echo(given: Any) -> Any:
        return given

    found = echo.remote(value).result()
    assert found == value
    assert type(found) is type(value)


def test_remote_on_a_table(zone: Any, visits: Any) -> None:
    """With a handle as first argument the function gets all rows as one batch, and its value comes back as it is."""
    assert count.remote(visits).result() == 20_190


def test_result_with_timeout(zone: Any) -> None:
    """A result that is not there in time is a ``TimeoutError``; the call goes on."""
    call = nap.remote(1.0)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done after 0.05 s; wait longer, or stop it with .cancel"):
        call.result(timeout=0.05)

    assert time.monotonic() - started < 0.8
    assert not call.done()
    assert repr(call) == "<Call running>"
    assert call.result(timeout=30) == 1.0


def test_done_becomes_true_by_itself(zone: Any) -> None:
    """``done`` tells when ``result`` would return, without anybody waiting for it."""
    call = nap.remote(0.3)

    assert not call.done()
    _wait_for(call.done, "the end of a short call")
    assert call.result(timeout=0) == 0.3


def test_done_is_not_fooled_by_progress(zone: Any, visits: Any) -> None:
    """While shards come back one by one, the whole is not done."""

    @gpu_remote(shard_bytes=64 << 10, concurrency=1)
    def slow(batch: Batch) -> int:
        print("a shard")  # noqa: T201 - prints are what is tested
        time.sleep(0.2)
        return len(batch)

    call = slow._call("shards", visits, (), {})
    started = time.monotonic()
    _wait_for(call.done, "the end of the call")

    assert time.monotonic() - started > 0.35
    assert sum(call.result()) == 20_190


def test_cancel(zone: Any) -> None:
    """A cancelled call ends soon, with an error that says so; the next call works."""
    call = nap.remote(60.0)
    with pytest.raises(TimeoutError):
        call.result(timeout=0.2)
    started = time.monotonic()
    call.cancel()

    with pytest.raises(CallCancelledError):
        call.result(timeout=20)
    assert time.monotonic() - started < 10
    assert add.remote(1, 2).result(timeout=60) == 3


def test_cancel_of_a_call_that_waits_for_its_turn(zone: Any) -> None:
    """A call that has no GPU yet can be cancelled as well, and the one before it is not disturbed."""
    one_at_a_time = nap.options(concurrency=1)
    first, second = one_at_a_time.remote(3.0), one_at_a_time.remote(60.0)
    second.cancel()

    with pytest.raises(CallCancelledError):
        second.result(timeout=20)
    assert first.result(timeout=60) == 3.0


def test_cancel_when_done_changes_nothing(zone: Any) -> None:
    """What is done stays done."""
    call = add.remote(1, 2)
    assert call.result() == 3
    call.cancel()

    assert call.result() == 3
    assert add.remote(2, 2).result() == 4


def test_timeout_option_stops_the_call(zone: Any) -> None:
    """``timeout_s`` ends the call itself, not only the wait."""
    with pytest.raises(CallTimeoutError, match="timeout_s"):
        nap.options(timeout_s=0.3).remote(60.0).result(timeout=30)


def test_many_calls_at_once(zone: Any) -> None:
    """More calls than a session has connections are made in turn, and all results are right."""
    calls = [add.remote(number, 1) for number in range(3 * MAX_OPEN_CALLS)]

    assert [call.result() for call in calls] == [number + 1 for number in range(3 * MAX_OPEN_CALLS)]


def test_abandoned_call_is_stopped(zone: Any) -> None:
    """A call that nobody holds any more gives back its connection and its GPU."""
    add.remote(1, 2).result()
    before = len(os.listdir("/proc/self/fd"))
    calls = [nap.options(concurrency=1).remote(60.0) for _ in range(4)]
    del calls
    gc.collect()

    assert len(os.listdir("/proc/self/fd")) <= before
    assert add.options(concurrency=1).remote(1, 2).result(timeout=60) == 3


# -- local ------------------------------------------------------------------------------------------


def test_local_is_what_the_nodes_give(zone: Any, visits: Any) -> None:
    """``f.local`` runs here, on the same rows and columns."""
    found = double.local(zone.read("randhie"))

    assert_type(double.local(visits), Any)
    np.testing.assert_array_equal(found, double.map(zone.read("randhie")))


def test_local_sees_what_a_node_would_see(zone: Any) -> None:
    """Columns, codes and arguments are those that the node gets."""
    table = pa.table({"kind": pa.array(["b", "a", "b"]).dictionary_encode(), "secret": ["x", "y", "z"]})

    @gpu_remote(columns=["kind"])
    def look(batch: Batch, more: int) -> list[Any]:
        return [batch.columns, batch["kind"].tolist(), str(batch.to_arrow().schema.field(0).type), more]

    columns, codes, kind, more = look.local(table, 5)
    assert (columns, codes, more) == (["kind"], [0, 1, 0], 5)
    assert kind.startswith("int")


def test_local_with_categories() -> None:
    """A function that asks for category values gets those of its rows."""
    table = pa.table({"kind": pa.array(["b", "a", "b"]).dictionary_encode()})

    @gpu_remote(categories=["kind"])
    def look(batch: Batch) -> list[Any]:
        return [batch["kind"].tolist(), batch.to_arrow()["kind"].to_pylist()]

    assert look.local(table) == [[1, 0, 1], ["b", "a", "b"]]
    assert look.options(categories=None).local(table)[1] == [0, 1, 0]
    with pytest.raises(TypeError, match="list of names"):
        look.options(categories="kind")


def test_local_refuses_what_could_not_come_back() -> None:
    """A result that a node could not send is found here already."""

    @gpu_remote
    def bad(batch: Batch) -> Any:
        return {"model": object()}

    with pytest.raises(ValueRefusedError, match=r"result\['model'\] is a builtins.object, which is not data"):
        bad.local(pa.table({"a": [1]}))


# -- handles ----------------------------------------------------------------------------------------


def test_handle_reads_what_it_says(zone: Any) -> None:
    """``select``, ``filter`` and ``split`` describe rows; reading them gives those rows, in order."""
    whole = zone.read("randhie").to_arrow()
    handle = zone.read("randhie", columns=["mdvis", "idp"], filter=["mdvis", ">", 20]).filter(["idp", "==", 1])
    expected = whole.filter((pa.compute.field("mdvis") > 20) & (pa.compute.field("idp") == 1)).select(["mdvis", "idp"])

    assert handle.to_arrow().equals(expected)
    assert len(handle) == expected.num_rows > 0
    assert handle.select(["idp"]).to_arrow().column_names == ["idp"]


def test_split_parts_are_disjoint_and_whole(zone: Any) -> None:
    """Parts have no row in common, are all rows together, and are the same for the same seed."""
    data = zone.read("randhie", columns=["record_number"])
    train, test = data.split(0.8, seed=3)
    numbers = [part.to_arrow()["record_number"].to_pylist() for part in (train, test)]

    assert [len(part) for part in numbers] == [16_152, 4_038]
    assert sorted(numbers[0] + numbers[1]) == sorted(data.to_arrow()["record_number"].to_pylist())
    assert data.split(0.8, seed=3)[1].to_arrow()["record_number"].to_pylist() == numbers[1]
    assert data.split(0.8, seed=4)[1].to_arrow()["record_number"].to_pylist() != numbers[1]


def test_numpy_numbers_are_numbers(zone: Any) -> None:
    """Fractions, seeds and constants may come from NumPy; they stand for their Python values."""
    data = zone.read("randhie", columns=["record_number"])
    often = data.filter(["or", ("mdvis", "in", [np.int64(11), np.int16(12)]), ["mdvis", ">", np.float32(12)]])

    assert len(often) == len(data.filter(["mdvis", ">", 10])) > 0
    assert len(data.split(np.float32(0.5), seed=np.int64(3))[0]) == 10_095
    drawn = [data.split(0.5, seed=seed)[0].to_arrow() for seed in (3, np.int64(3))]
    assert drawn[0].equals(drawn[1])


def test_filter_after_split_keeps_the_part(zone: Any) -> None:
    """Filtering a part gives rows of that part only: no row of the test set gets into the training set."""
    train, test = zone.read("randhie", columns=["record_number"]).split(0.8)
    often = ["mdvis", ">", 10]
    in_train, in_test = (set(part.filter(often).to_arrow()["record_number"].to_pylist()) for part in (train, test))

    assert in_train <= set(train.to_arrow()["record_number"].to_pylist())
    assert in_test <= set(test.to_arrow()["record_number"].to_pylist())
    assert len(in_train) + len(in_test) == len(zone.read("randhie", filter=often))


def test_parts_can_be_mapped(zone: Any) -> None:
    """A part of a filtered selection is data like any other."""
    part = zone.read("randhie", columns=["mdvis"]).filter(["idp", "==", 0]).split(0.5)[1].filter(["mdvis", ">", 0])

    np.testing.assert_array_equal(double.map(part), part.to_arrow()["mdvis"].to_numpy() * 2)


@pytest.mark.parametrize("how", ["option", "select", "filter", "then"])
def test_labels_follow_the_handle(zone: Any, how: str) -> None:
    """A direct identifier is refused however it is used, also when it only chooses the rows."""
    data = zone.read("randhie")
    named = ["record_number", ">", 1_000_100]
    cases: dict[str, Any] = {
        "option": (count.options(columns=["mdvis", "record_number"]), data),
        "select": (count, data.select(["mdvis", "record_number"])),
        "filter": (count, data.select(["mdvis"]).filter(named)),
        "then": (count, data.select(["mdvis"]).split(0.5)[0].filter(named)),
    }
    function, handle = cases[how]

    with pytest.raises(EgressDeniedError) as refused:
        function.map_reduce(handle, sum)
    assert refused.value.rules == ["no-direct-identifiers"]
    assert ("record_number" if how in ("option", "select") else "filter") in refused.value.message
    assert count.map_reduce(data.select(["mdvis"]), sum) == 20_190, "without the column it is allowed"


@pytest.mark.parametrize(
    ("use", "error", "says"),
    [
        (lambda zone: zone.read("randhi"), UnknownNameError, r"no dataset 'randhi' \(did you mean 'randhie'"),
        (lambda zone: zone.read("randhie", columns=["mdvi"]), UnknownNameError, "no column 'mdvi'"),
        (lambda zone: zone.read("randhie", columns="mdvis"), TypeError, r"write \['mdvis'\]"),
        (lambda zone: zone.read("randhie").select([]), ValueError, "at least one column"),
        (lambda zone: zone.read("randhie", columns=["idp"]).select(["mdvis"]), UnknownNameError, "no column 'mdvis'"),
        (lambda zone: zone.read("randhie").filter(["age", ">", 1]), UnknownNameError, "no column 'age'"),
        (lambda zone: zone.read("randhie").filter("mdvis > 1"), ValueError, "a filter is"),
        (lambda zone: zone.read("randhie").filter(["mdvis", "~", 1]), ValueError, "operator '~'"),
        (lambda zone: zone.read("randhie").split(), ValueError, r"split\(0.8\)"),
        (lambda zone: zone.read("randhie").split(0.8, 0.3), ValueError, "at most 1"),
        (lambda zone: zone.read("randhie").split(float("nan")), ValueError, r"split\(0.8\)"),
        (lambda zone: zone.read("randhie").split(0.5, seed="a"), TypeError, "integer"),
        (lambda zone: zone.read("randhie").split(0.5)[0].split(0.5), ValueError, "split the whole"),
        (
            lambda zone: double.options(columns=["idp"]).map(zone.read("randhie", columns=["mdvis"])),
            UnknownNameError,
            "no column 'idp'",
        ),
    ],
)
def test_wrong_use_of_handles(zone: Any, use: Callable[[Any], Any], error: type[Exception], says: str) -> None:
    """Mistakes are found where they are written, with what to write instead."""
    with pytest.raises(error, match=says):
        use(zone)


def test_handle_brings_its_session(cluster: Any, zone: Any) -> None:
    """A call on a handle runs in the session that the handle was read from, not in the one attached last."""
    data = zone.read("randhie", columns=["mdvis"])
    with cluster.attach("another purpose") as other:
        assert count.map_reduce(data, sum) == 20_190
        with pytest.raises(ValueError, match="another session"):
            count.options(session=other).map_reduce(data, sum)
        used = other.status()["session"]

    assert cluster.entries("intent", session=used) == []


# -- data of one's own ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pyarrow", "pandas", "dataset"])
def test_own_table_has_the_highest_class(zone: Any, kind: str) -> None:
    """What comes from no catalog handle has the zone's highest class, which the shipped policy keeps in."""
    table = pa.table({"mdvis": [1.0, 2.0]})
    tables: dict[str, Any] = {"pyarrow": table, "pandas": table.to_pandas(), "dataset": pad.dataset(table)}

    with pytest.raises(EgressDeniedError) as refused:
        double.map(tables[kind])
    assert refused.value.rules == ["no-direct-identifiers"]


# -- every byte is classified -----------------------------------------------------------------------


def test_large_arguments_have_the_highest_class(zone: Any) -> None:
    """Above the cap of one call, arguments have the highest class, and policy keeps them in."""

    @gpu_remote
    def size(data: Any) -> int:
        return len(data)

    assert size.remote(bytes(60_000)).result() == 60_000
    with pytest.raises(EgressDeniedError) as refused:
        size.remote(bytes(70_000)).result()
    assert refused.value.rules == ["no-direct-identifiers"]
    with pytest.raises(EgressDeniedError):
        size.remote(np.zeros(9_000)).result()


def test_small_data_call_has_both_classes(cluster: Any, zone: Any) -> None:
    """A call on data is decided on the classes of its columns and of its function and arguments."""
    count.map_reduce(zone.read("randhie", columns=["lncoins", "mdvis"]), sum)

    session = zone.status()["session"]
    assert any(
        entry["columns"] == ["lncoins", "mdvis"] and entry["classes"] == ["confidential", "internal"]
        for entry in cluster.entries("decision", session=session)
    )


def test_large_closure_is_refused(zone: Any) -> None:
    """A closure over 64 KiB does not leave; the variable is named."""
    words = "w" * 70_000

    with pytest.raises(FunctionRefusedError, match="over the cap of 65536") as refused:
        gpu_remote(lambda: len(words)).remote()
    assert refused.value.variable == "words"


def test_captured_table_is_refused(zone: Any, visits: Any) -> None:
    """A captured table or array does not leave; the variable is named."""
    table, array = visits.to_arrow(), np.arange(3)

    with pytest.raises(FunctionRefusedError) as refused:
        gpu_remote(lambda: table.num_rows).remote()
    assert refused.value.variable == "table"
    with pytest.raises(FunctionRefusedError) as refused:
        gpu_remote(lambda: array.sum()).remote()
    assert refused.value.variable == "array"


def test_captured_handle_and_session_are_refused(zone: Any, visits: Any) -> None:
    """A handle or a session in a closure means nothing on a node; the error says how to pass data."""
    with pytest.raises(FunctionRefusedError, match="pass it as an argument, or as the call's data") as refused:
        gpu_remote(lambda: visits.columns).remote()
    assert refused.value.variable == "visits"
    with pytest.raises(FunctionRefusedError, match="attach again") as refused:
        gpu_remote(lambda: zone.person).remote()
    assert refused.value.variable == "zone"


def test_changed_global_reaches_the_node(zone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A global that changed between two calls has its new value in the second, as it has here."""

    @gpu_remote
    def factor() -> float:
        return FACTOR

    assert factor.remote().result() == 3.0
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    assert factor.remote().result() == factor() == 5.0


def test_remote_function_in_a_remote_function(zone: Any) -> None:
    """On the node a captured remote function is the plain function."""

    @gpu_remote
    def twice(number: float) -> float:
        return add(number, number)

    assert twice.remote(4).result() == 8


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((1, object()), {}, r"argument 2 \(builtins object\) cannot be sent"),
        ((), {"b": {1, 2}}, r"b \(builtins set\) cannot be sent"),
        ((1, [lambda: 0]), {}, r"argument 2 \(builtins list\) cannot be sent"),
    ],
    ids=["object", "set", "function"],
)
def test_argument_that_is_not_data(zone: Any, args: tuple[Any, ...], kwargs: dict[str, Any], says: str) -> None:
    """An argument that is no plain data is refused by its position or name."""
    with pytest.raises(ValueRefusedError, match=says):
        add.remote(*args, **kwargs)


def test_handle_in_the_wrong_place(zone: Any, visits: Any) -> None:
    """A handle that is not the first argument is answered with where it belongs."""
    with pytest.raises(ValueRefusedError, match="a handle or a large table is the call's first argument"):
        add.remote(1, visits)


# -- errors and prints ------------------------------------------------------------------------------


def _raises(error: Any) -> RemoteFunction[..., Any]:
    @gpu_remote
    def fail(*_: Any) -> None:
        print("before it failed")  # noqa: T201 - prints are what is tested
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [ValueError("bad value"), KeyError("age"), ZeroDivisionError("by zero"), FileNotFoundError(2, "none", "/x")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("how", ["remote", "map"])
def test_builtin_exception_comes_back(zone: Any, visits: Any, how: str, error: Exception) -> None:
    """A built-in exception is raised as its own type, with its text, and the remote traceback as its cause."""
    function = _raises(error)
    with pytest.raises(type(error)) as raised:
        function.remote(1).result() if how == "remote" else function.map(visits)

    assert type(raised.value) is type(error)
    assert str(raised.value).strip("'") == str(error).strip("'")
    assert "in fail" in str(raised.value.__cause__)
    assert Path(__file__).name in str(raised.value.__cause__)
    assert str(error) in str(raised.value.__cause__)


def test_own_exception_comes_back_by_name(zone: Any) -> None:
    """An exception type that is not built in is an error that has its name, text and traceback."""
    with pytest.raises(RemoteFunctionError, match="something own") as raised:
        _raises(OwnError("something own")).remote().result()

    assert raised.value.type_name.endswith("OwnError")
    assert "in fail" in raised.value.traceback


def test_error_in_the_batch_names_the_column(zone: Any, visits: Any) -> None:
    """A wrong column inside the function is the ``KeyError`` that lists the columns."""

    @gpu_remote
    def wrong(batch: Batch) -> Any:
        return batch["mdvi"]

    with pytest.raises(KeyError, match="no column 'mdvi'; it has"):
        wrong.map(visits)


def test_exit_in_the_function_does_not_end_the_notebook(zone: Any) -> None:
    """``SystemExit`` on the node is an error here, and the session goes on."""
    with pytest.raises(RemoteFunctionError, match="SystemExit"):
        _raises(SystemExit(3)).remote().result()

    assert add.remote(1, 2).result() == 3


def test_call_works_after_an_error(zone: Any) -> None:
    """A function that raised costs no lease: the next call runs on the same one."""
    add.options(concurrency=1).remote(1).result()
    before = {lease["lease"] for lease in zone.status()["leases"]}
    with pytest.raises(ValueError, match="again"):
        _raises(ValueError("again")).options(concurrency=1).remote().result()

    assert add.options(concurrency=1).remote(1).result() == 2
    assert {lease["lease"] for lease in zone.status()["leases"]} == before


def test_prints_appear_here(zone: Any, visits: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """What the function prints, to standard output and error, appears at the caller, once per shard."""

    @gpu_remote
    def talk(batch: Batch) -> int:
        import sys

        print("rows", len(batch))  # noqa: T201 - prints are what is tested
        print("warned", file=sys.stderr)  # noqa: T201 - prints are what is tested
        return len(batch)

    parts: list[int] = talk.map_reduce(visits, list)

    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == sorted([*(f"rows {rows}" for rows in parts), *["warned"] * len(parts)])


def test_prints_before_an_error_appear(zone: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Prints are not lost when the function fails afterwards."""
    with pytest.raises(ValueError, match="bad"):
        _raises(ValueError("bad")).remote().result()

    assert capfd.readouterr().out == "before it failed\n"


def test_prints_of_one_call_do_not_appear_in_the_next(zone: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Each call's prints are its own."""
    with pytest.raises(ValueError, match="bad"):
        _raises(ValueError("bad")).remote().result()
    capfd.readouterr()
    add.remote(1, 2).result()

    assert capfd.readouterr().out == ""
