"""Shards that stay open: a further call on the same rows sends none of them, whatever happened meanwhile is exact."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ray_gpu import gpu_remote
from zones.errors import EgressDeniedError

COLUMNS = ["mdvis", "lncoins", "lpi"]


@gpu_remote(columns=COLUMNS, shard_bytes=64 << 10, resident=True)
def weighted(batch: Any, weights: Any) -> Any:
    """Return one number for each row."""
    return sum(np.asarray(batch[name]) * weight for name, weight in zip(COLUMNS, weights, strict=True))


@gpu_remote(columns=COLUMNS, shard_bytes=64 << 10, resident=True)
def total(batch: Any) -> float:
    """Return a sum."""
    return float(np.asarray(batch["mdvis"]).sum())


@pytest.fixture(scope="module")
def own(start_cluster: Callable[..., Any], copy_policies: Callable[..., Any]) -> Iterator[Any]:
    """A cluster whose policy lets shards stay open."""
    policies = copy_policies({"clinic/zone.yaml": ("shuffle: rows", "shuffle: rows\nresident_shards: true")})
    with start_cluster(policies=policies) as cluster:
        yield cluster


@pytest.fixture
def zone(own: Any) -> Iterator[Any]:
    """A session of the test's own: what stays open is the session's."""
    with own.attach("epochs") as session:
        yield session


def sent(cluster: Any, call: Callable[[], Any]) -> tuple[Any, int, int]:
    """Return what a call gave, and the bytes and rows that left by the ledger meanwhile."""
    before = len(cluster.entries("completion"))
    result = call()
    entries = cluster.entries("completion")[before:]
    return result, sum(entry["bytes"] for entry in entries), sum(entry["rows"] for entry in entries)


def test_second_epoch_sends_no_data(own: Any, zone: Any) -> None:
    """By the ledger the first call sends every row once and the others none, of another function too; all are exact."""
    data = zone.read("randhie")
    table = data.to_arrow()
    function = weighted.options(session=zone)
    for epoch, weights in enumerate(([1.0, 2.0, 3.0], [0.5, 0.25, -1.0], [0.0, 0.0, 1.0])):
        found, bytes_, rows = sent(own, lambda weights=weights: function.map(data, weights))  # type: ignore[misc]  # its own
        expected = sum(table[name].to_numpy() * weight for name, weight in zip(COLUMNS, weights, strict=True))
        np.testing.assert_array_equal(found, expected)
        assert rows == (0 if epoch else 20_190)
        assert bytes_ > 20_190 * 24 if epoch == 0 else bytes_ < 60_000
    other, bytes_, rows = sent(own, lambda: total.options(session=zone).map_reduce(data, sum))
    assert other == pytest.approx(table["mdvis"].to_numpy().sum())
    assert (rows, bytes_ < 60_000) == (0, True)


def test_control_without_it(own: Any, zone: Any) -> None:
    """Without the option each call sends every row."""
    data, function = zone.read("randhie"), total.options(session=zone, resident=False)
    for _ in range(2):
        _, bytes_, rows = sent(own, lambda: function.map_reduce(data, sum))
        assert (rows, bytes_ > 20_190 * 24) == (20_190, True)


@pytest.mark.parametrize(
    "change",
    [
        {"columns": ["mdvis", "lpi"]},
        {"shard_bytes": 128 << 10},
        {"keep_together": "lncoins"},
    ],
    ids=str,
)
def test_other_rows_or_cuts_are_sent(own: Any, zone: Any, change: dict[str, Any]) -> None:
    """What is asked for in another way is not what is open."""
    data = zone.read("randhie")
    expected, _, _ = sent(own, lambda: total.options(session=zone).map_reduce(data, sum))
    found, _, rows = sent(own, lambda: total.options(session=zone, **change).map_reduce(data, sum))
    filtered, _, some = sent(own, lambda: total.options(session=zone).map_reduce(data.filter(["mdvis", ">", 3]), sum))

    assert (found, rows) == (pytest.approx(expected), 20_190)
    assert 0 < filtered < expected
    assert 0 < some < 20_190


@pytest.mark.parametrize("kind", ["sandbox", "keeper"])
def test_what_a_lost_lease_had_is_sent_again(own: Any, zone: Any, look_inside: Callable[[Any], Any], kind: str) -> None:
    """A lease that ends takes what it had open with it: that part is sent again, and results are exact."""
    data, function = zone.read("randhie"), weighted.options(session=zone)
    weights = [1.0, 2.0, 3.0]
    expected = function.map(data, weights)
    inside = look_inside(own)
    os.kill(inside.leases(kind)[0], signal.SIGKILL)
    found, _, rows = sent(own, lambda: function.map(data, weights))
    again, _, none = sent(own, lambda: function.map(data, weights))

    inside.close()
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(again, expected)
    assert 0 < rows <= 20_190
    assert none == 0


def test_fewer_leases(own: Any, zone: Any) -> None:
    """A call with one lease sends what others have open; with two again, it sends what its leases have not."""
    data = zone.read("randhie")
    expected = total.options(session=zone).map_reduce(data, sum)
    for concurrency in (1, 2, 1, 2):
        found, _, rows = sent(own, lambda: total.options(session=zone, concurrency=concurrency).map_reduce(data, sum))  # noqa: B023 - at once
        assert found == pytest.approx(expected)
        assert rows < 20_190


def test_a_function_that_fails(own: Any, zone: Any) -> None:
    """An error of the function's own is raised, and the next call is right."""

    @gpu_remote(session=zone, columns=COLUMNS, shard_bytes=64 << 10, resident=True)
    def fails(batch: Any) -> float:
        raise ValueError("no")

    data = zone.read("randhie")
    expected = total.options(session=zone).map_reduce(data, sum)
    with pytest.raises(ValueError, match="no"):
        fails.map_reduce(data, sum)
    found, _, _ = sent(own, lambda: total.options(session=zone).map_reduce(data, sum))

    assert found == pytest.approx(expected)


def test_only_where_policy_allows_it(cluster: Any) -> None:
    """The shipped policy lets none stay open: the call is refused by the obligation's name, and nothing leaves."""
    with cluster.attach() as session:
        before = len(cluster.entries("intent"))
        with pytest.raises(EgressDeniedError, match=r"\(obligation resident_shards\); call without resident=True"):
            total.options(session=session).map_reduce(session.read("randhie"), sum)

        assert cluster.entries("refusal")[-1]["obligations"] == ["resident_shards"]
        assert len(cluster.entries("intent")) == before
        assert np.isfinite(total.options(session=session, resident=False).map_reduce(session.read("randhie"), sum))


@gpu_remote(columns=COLUMNS, shard_bytes=64 << 10, resident=True)
def fails_for_memory(batch: Any) -> None:
    """Find that there is no memory left."""
    raise MemoryError(f"{len(batch)} rows")


def test_dropped_for_memory(own: Any, zone: Any) -> None:
    """Where a function found no memory its sandbox drops what is open; a further call sends it again, and is exact."""
    data = zone.read("randhie")
    expected = data.to_arrow()["mdvis"].to_numpy().sum()
    again = total.options(session=zone, concurrency=1)
    for _ in range(2):
        found, _, rows = sent(own, lambda: again.map_reduce(data, sum))
    assert (found, rows) == (pytest.approx(expected), 0)
    with pytest.raises(MemoryError):
        fails_for_memory.options(session=zone, concurrency=1).map_reduce(data, len)
    found, _, rows = sent(own, lambda: again.map_reduce(data, sum))
    assert (found, rows) == (pytest.approx(expected), 20_190)
    found, _, rows = sent(own, lambda: again.map_reduce(data, sum))
    assert (found, rows) == (pytest.approx(expected), 0)
