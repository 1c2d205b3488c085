"""Values that many calls get: each lease is sent them once, and policy is asked about them like about any argument."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_gpu import Batch, gpu_remote
from zones.errors import EgressDeniedError, ValueRefusedError

COLUMNS = ["mean_radius", "mean_texture"]
WEIGHTS = np.linspace(0, 1, 6000)


@gpu_remote(columns=COLUMNS, shard_bytes=64 << 10)
def scaled(batch: Batch, weights: Any, times: float = 1.0) -> Any:
    """Use a value."""
    return batch["mean_radius"] * weights[-1] * times


@gpu_remote
def what(value: Any, *, more: Any = None) -> Any:
    """Give back what it was given, and whether it may be written to."""
    return {"value": value, "more": more, "writeable": getattr(getattr(value, "flags", None), "writeable", None)}


@pytest.fixture
def zone(inside: Any) -> Iterator[Any]:
    """A session of its own."""
    with inside.cluster.attach("broadcast") as session:
        yield session


def sent(inside: Any, zone: Any, call: Any) -> int:
    """Return the sealed bytes that a call sent, as the ledger has them; each call in a session of its own purpose."""
    before = {entry["seq"] for entry in inside.cluster.entries("completion")}
    call()
    return sum(entry["bytes"] for entry in inside.cluster.entries("completion") if entry["seq"] not in before)


def test_second_call_sends_none_of_it(zone: Any, inside: Any) -> None:
    """The first call takes the value to each lease, a further one not; both give what they would give here."""
    data = zone.read("breast_cancer_resampled", columns=COLUMNS)
    expected = data.to_arrow()["mean_radius"].to_numpy()
    weights = zone.broadcast(WEIGHTS)
    found: list[Any] = []
    first = sent(inside, zone, lambda: found.append(scaled.options(session=zone).map(data, weights)))
    second = sent(inside, zone, lambda: found.append(scaled.options(session=zone).map(data, weights, times=2.0)))
    plain = sent(inside, zone, lambda: found.append(scaled.options(session=zone).map(data, WEIGHTS)))

    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[1], expected * 2.0)
    assert np.array_equal(found[2], expected)
    # Two leases, each the value and the function; and the value again with each call where it is an argument.
    assert first - second > 2 * WEIGHTS.nbytes
    assert plain - second > 2 * WEIGHTS.nbytes - 2000


@pytest.mark.parametrize(
    "value",
    [WEIGHTS[:10], {"a": [1, 2.5, None], "b": WEIGHTS[:3]}, "text", pa.table({"x": [1, 2]}), 7, None],
    ids=["array", "nested", "text", "table", "number", "none"],
)
def test_any_value_by_place_or_name(zone: Any, value: Any) -> None:
    """Whatever can be an argument can be broadcast, by place or by name, beside others; arrays are read-only there."""
    one = zone.broadcast(value)
    function = what.options(session=zone)
    by_place, by_name, both = (
        function.remote(one).result(),
        function.remote(1, more=one).result(),
        function.remote(one, more=one).result(),
    )

    assert repr(by_place["value"]) == repr(value) == repr(by_name["more"]) == repr(both["value"]) == repr(both["more"])
    assert by_name["value"] == 1
    assert by_place["writeable"] in (None, False)


def test_lost_lease_gets_it_again(zone: Any, inside: Any) -> None:
    """A lease that is made anew is sent what its calls name."""
    one = zone.broadcast(WEIGHTS)
    function = what.options(session=zone, concurrency=1)
    assert np.array_equal(function.remote(one).result()["value"], WEIGHTS)
    inside.kill(inside.leases())

    assert np.array_equal(function.options(max_retries=2).remote(one).result()["value"], WEIGHTS)


def test_policy_is_asked(zone: Any, inside: Any) -> None:
    """A value above the cap of arguments has the highest class, with every call that names it, and stays."""
    large = zone.broadcast(np.zeros(9000))
    before = len(inside.cluster.entries("intent"))
    for _ in range(2):
        with pytest.raises(EgressDeniedError) as refused:
            what.options(session=zone).remote(large).result()
        assert refused.value.rules == ["no-direct-identifiers"]
    assert len(inside.cluster.entries("intent")) == before


def test_misuse(zone: Any, inside: Any) -> None:
    """It is an argument itself, of its own session, and of a size that fits; here in the zone it is its value."""
    one = zone.broadcast(WEIGHTS)
    with pytest.raises(ValueRefusedError, match="argument 1"):
        what.options(session=zone).remote([one])
    with pytest.raises(TypeError, match="does not travel"):
        one.__reduce__()
    with pytest.raises(ValueRefusedError, match="over the limit"):
        zone.broadcast(np.zeros(9 << 20))
    with pytest.raises(ValueRefusedError, match="not data"):
        zone.broadcast(object())
    with inside.cluster.attach("another") as other, pytest.raises(ValueRefusedError, match="of the session that made"):
        what.options(session=other).remote(one)
    table = zone.read("breast_cancer", columns=COLUMNS)
    assert np.array_equal(scaled.local(table, one), table.to_arrow()["mean_radius"].to_numpy())
