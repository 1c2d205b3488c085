"""Where calls run: here or on GPU nodes, by what is known of both; results, errors and refusals are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_gpu import Batch, gpu_remote
from ray_gpu.advice import Advisor, Link
from ray_gpu.local_call import LocalCall
from zones.errors import (
    EgressDeniedError,
    RemoteFunctionError,
    RowCountError,
    SessionClosedError,
    UnknownNameError,
    ValueRefusedError,
)

#: A pool that nothing is worth going to, and one that computes in no time.
FAR = Link(trip_s=3600.0, shards_s=3600.0)
NEAR = Link(node_s_per_local_s=1e-9)
PLACES = ("remote", "local")


@gpu_remote
def total(batch: Batch, factor: float = 1.0) -> dict[str, float]:
    """Return the sum of each column, in exact numbers."""
    return {name: float(batch[name].sum()) * factor for name in batch}


@gpu_remote
def shape(batch: Batch) -> list[Any]:
    """Return what a function sees of its rows."""
    return [batch.columns, len(batch), [str(batch[name].dtype) for name in batch], str(batch.to_arrow().schema)]


@gpu_remote
def half(batch: Batch) -> Any:
    """Return one number per row."""
    return batch[batch.columns[0]] / 2


@gpu_remote
def add(left: float, right: Any = 1.0) -> Any:
    """Take numbers, or arrays."""
    return left + right


class OwnError(Exception):
    """An exception of the user's own."""


@gpu_remote
def fail(kind: str) -> None:
    """Raise."""
    raise {"key": KeyError("gone"), "own": OwnError("mine"), "exit": SystemExit(3)}[kind]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_GPU_PROGRESS", "0")


@pytest.fixture(scope="module")
def shared(cluster: Any) -> Iterator[Any]:
    """One session for all tests here."""
    with cluster.attach("choose a place") as session:
        yield session


@pytest.fixture
def zone(shared: Any) -> Any:
    """The same, which knows nothing of its links and functions."""
    shared.advisor = Advisor()
    return shared


@pytest.fixture
def people(zone: Any) -> Any:
    """Real rows."""
    return zone.read("randhie", columns=["mdvis", "lncoins"])


def _own_rows() -> pa.Table:
    kinds = pa.array(["a", "b", None] * 1000).dictionary_encode()
    return pa.table({"x": pa.array(np.arange(3000)), "y": pa.array([1, None, 3] * 1000), "kind": kinds})


# -- the same in both places ------------------------------------------------------------------------


def test_calls_on_rows(people: Any) -> None:
    """Every kind of call gives the same here as on nodes, and the same number of shards."""
    found: list[dict[str, Any]] = []
    for where in PLACES:
        options = {"where": where, "concurrency": 1}
        f, g, seen = total.options(**options), half.options(**options), shape.options(**options)
        shards: list[dict[str, float]] = f.map_reduce(people, list, 2.0)
        stream = seen.stream(people)
        found.append(
            {
                "sum": {name: sum(one[name] for one in shards) for name in ("mdvis", "lncoins")},
                "shards": len(shards),
                "rows": g.map(people),
                "whole": f.remote(people).result(),
                "stream": sorted(map(repr, stream)),
                "report": {key: stream.report[key] for key in ("shards", "rows")},
            }
        )
    remote, local = found

    assert np.array_equal(remote.pop("rows"), local.pop("rows"))
    assert remote.pop("sum") == pytest.approx(local.pop("sum"))
    assert remote.pop("whole") == pytest.approx(local.pop("whole"))
    assert remote == local


def test_rows_kept_together(zone: Any) -> None:
    """Rows of one value stay in one shard here too, by a column that the function does not see."""

    @gpu_remote(columns=["mdvis"], keep_together="hlthp", where="local", session=zone)
    def seen(batch: Batch) -> list[Any]:
        return [batch.columns, len(batch)]

    whole = zone.read("randhie", columns=["hlthp"]).to_arrow()["hlthp"].value_counts().to_pylist()
    shards = seen.map_reduce(zone.read("randhie"), list)

    assert all(columns == ["mdvis"] for columns, _ in shards)
    assert sorted(rows for _, rows in shards) == sorted(one["counts"] for one in whole)
    with pytest.raises(UnknownNameError, match="hlthp"):
        seen.options(columns=None).map_reduce(_own_rows(), list)


def test_own_rows(zone: Any) -> None:
    """Of rows of one's own a function sees here what it would on a node: codes, and numbers with nulls as floats."""

    @gpu_remote(where="local", session=zone)
    def seen(batch: Batch) -> list[Any]:
        return [{name: str(batch[name].dtype) for name in batch}, len(batch), str(batch["kind"].dtype)]

    (kinds, rows, _), *others = seen.map_reduce(_own_rows(), list)

    assert (kinds, rows, len(others)) == ({"x": "int64", "y": "float64", "kind": "float64"}, 750, 3)


def test_arguments(zone: Any) -> None:
    """Arguments are copies, broadcasts cannot be written to, and results are what comes back from nodes."""
    given, sent = np.ones(3), zone.broadcast(np.ones(3))

    @gpu_remote(session=zone)
    def spoil(own: Any, shared: Any) -> tuple[bool, Any]:
        own[0] = 7
        return shared.flags.writeable, own

    for where in PLACES:
        writeable, own = spoil.options(where=where).remote(given, sent).result()
        assert (given[0], writeable, own.tolist()) == (1.0, False, [7.0, 1.0, 1.0])
        assert add.options(where=where).starmap([(1, 2), (3, 4)]) == [3, 7]
        assert asyncio.run(_awaited(add.options(where=where))) == 3.0


async def _awaited(function: Any) -> Any:
    return await function.remote(2.0)


@pytest.mark.parametrize("where", PLACES)
def test_errors(zone: Any, where: str) -> None:
    """What the function raises, and what it may not return, is the same error in both places."""
    there = fail.options(where=where)
    with pytest.raises(KeyError) as raised:
        there.remote("key").result()
    assert "in fail\n" in str(raised.value.__cause__)
    for kind, name in (("own", "OwnError"), ("exit", "SystemExit")):
        with pytest.raises(RemoteFunctionError, match=name):
            there.remote(kind).result()

    @gpu_remote(where=where, session=zone)
    def wrong(batch: Batch, result: str) -> Any:
        return {"short": batch["mdvis"][1:], "none": None, "code": print}[result]

    rows = zone.read("randhie", columns=["mdvis"])
    for result, error in (("short", RowCountError), ("none", ValueRefusedError), ("code", ValueRefusedError)):
        with pytest.raises(error):
            wrong.map(rows, result)


# -- choosing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("link", "place"), [(FAR, "local"), (NEAR, "remote")], ids=["far", "near"])
def test_choice_is_carried_out(zone: Any, people: Any, link: Link, place: str) -> None:
    """By what is known of the link a call runs here or on a node, and both give the same."""
    zone.advisor.links[""] = link
    auto = total.options(where="auto")
    advice, call = auto.advise(people), auto.remote(people)

    assert call.result() == pytest.approx(total.local(people))
    assert isinstance(call, LocalCall) is (place == "local")
    assert ("here" in call.report["nodes"]) is (place == "local")
    assert call.advice is not None
    assert (advice.chosen, call.advice.chosen) == (place, place)
    assert f"{place} is faster: " in str(call.advice)
    assert np.array_equal(half.options(where="auto").map(people), half.local(people))


def test_own_rows_stay(zone: Any, cluster: Any) -> None:
    """A sum of rows of one's own, which would not be let out, runs here, and nobody is asked."""
    zone.advisor.links[""] = FAR
    before = len(cluster.entries())

    assert total.options(where="auto").map_reduce(pa.table({"x": [1.0, 2.0]}), list)
    assert len(cluster.entries()) == before


def test_refused_is_refused(zone: Any, cluster: Any) -> None:
    """What policy does not let out is refused wherever it would run, before the function runs at all."""
    zone.advisor.links[""] = FAR
    ran: list[Any] = []
    secret = zone.read("randhie", columns=["record_number"])
    before = len(cluster.entries("decision", decision="refused"))
    auto = total.options(where="auto")
    for ask in (auto.advise, auto.map, auto.remote, lambda data: auto.map_reduce(data, ran.append)):
        with pytest.raises(EgressDeniedError, match="no-direct-identifiers"):
            ask(secret)

    assert not ran
    # The person may read these rows here, and calls that say so run here.
    assert total.options(where="local").remote(secret).result()["record_number"] > 0
    assert len(cluster.entries("decision", decision="refused")) > before


def test_measured(zone: Any, people: Any, cluster: Any) -> None:
    """Without knowledge a node is measured, once, and then both places are predicted; what was seen is learned."""
    auto = total.options(where="auto")
    first = auto.advise(people)
    entries = len(cluster.entries())
    again = auto.advise(people)
    link = zone.advisor.links[""]

    assert 0 < link.trip_s < 60
    assert link.node_s_per_local_s > 0
    for advice in (first, again):
        assert advice.predicted_local_s is not None
        assert advice.predicted_local_s > 0
        assert advice.predicted_remote_s is not None
        assert advice.predicted_remote_s >= link.trip_s
    assert len(cluster.entries()) == entries

    total.map_reduce(people, list)
    total.map_reduce(people, list)
    total.options(where="local").map_reduce(people, list)
    runs = zone.advisor.runs(auto._planned("map", people, (), {}).key)
    assert runs.sent
    assert runs.remote
    assert len(runs.local) >= 2


def test_arguments_alone(zone: Any) -> None:
    """A function of arguments alone is first called on a node; what it took there says what it would take here."""
    unknown = add.options(where="auto")
    first = unknown.remote(1.0, 2.0)
    assert first.result() == 3.0
    assert first.advice is not None
    assert (first.advice.chosen, first.advice.predicted_local_s) == ("remote", None)
    zone.advisor.links[""] = FAR
    second = unknown.remote(1.0, 2.0)

    assert second.result() == 3.0
    assert isinstance(second, LocalCall)


def test_fails_when_tried(zone: Any, people: Any) -> None:
    """A function that raises on a few rows here runs on nodes, which say what is wrong with it, if it is still."""
    zone.advisor.links[""] = FAR

    @gpu_remote(where="auto", session=zone)
    def many_only(batch: Batch) -> int:
        if len(batch) < 1000:
            raise LookupError("too few rows")
        return len(batch)

    call = many_only.remote(people)

    assert call.result() == len(people)
    assert call.advice is not None
    assert (call.advice.chosen, call.advice.reason) == (
        "remote",
        "remote: tried here, on a few of the rows, it raised LookupError",
    )


def test_wrong_arguments_are_not_held_against_it(zone: Any, people: Any) -> None:
    """A function that raised on other arguments is tried on these all the same."""
    zone.advisor.links[""] = FAR
    auto = total.options(where="auto")
    with pytest.raises(TypeError):
        auto.remote(people, "three").result()
    advice = auto.advise(people)

    assert (advice.chosen, "raised" in advice.reason) == ("local", False)


def test_line(zone: Any, people: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on standard error says where a function runs, when that is new; none where lines are off."""
    zone.advisor.links[""] = FAR
    auto = total.options(where="auto")
    auto.remote(people).result()
    assert capsys.readouterr().err == ""
    zone.advisor = Advisor()
    zone.advisor.links[""] = FAR
    monkeypatch.setenv("RAY_GPU_PROGRESS", "1")
    for _ in range(3):
        auto.remote(people).result()
    said = capsys.readouterr().err

    assert said.startswith("total: local is faster: ")
    assert said.count("\n") == 1


def test_closed_session(cluster: Any) -> None:
    """Nothing runs in a session that has ended, wherever it would."""
    with cluster.attach() as session:
        pass
    for where in ("local", "auto"):
        with pytest.raises(SessionClosedError, match="attach again"):
            add.options(where=where, session=session).remote(1.0)


# -- options ----------------------------------------------------------------------------------------


def test_unknown_place() -> None:
    """A place that is none is refused with those that are."""
    with pytest.raises(ValueError, match=r"where is 'remote', 'local' or 'auto', not 'here'"):
        gpu_remote(where="here")
    with pytest.raises(ValueError, match="did you mean 'local'"):
        add.options(where="locally")


def test_classes_stay_on_nodes(zone: Any) -> None:
    """A class keeps its state on nodes: no other place can be asked for, of it or of its methods."""

    class Model:
        def rows(self, batch: Batch) -> int:
            return len(batch)

    for where in ("auto", "local"):
        with pytest.raises(ValueError, match="Model is a class, whose instances keep their state on GPU nodes"):
            gpu_remote(where=where)(Model)
    with gpu_remote(Model).options(session=zone).remote() as model:
        with pytest.raises(ValueError, match="is for functions"):
            model.rows.options(where="auto")
        with pytest.raises(TypeError, match="where its instance is"):
            model.rows.advise(zone.read("randhie", columns=["mdvis"]))
