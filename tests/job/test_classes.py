"""Classes whose instances stay on GPU nodes with their state: where it lives, who gets at it, and when it is gone."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ray_gpu import Batch, gpu_remote
from ray_gpu.remote_class import RemoteMethod
from zones.errors import (
    EgressDeniedError,
    FunctionRefusedError,
    InstanceLostError,
    PlacementError,
    ValueRefusedError,
)

COLUMNS = ["mean_radius", "mean_texture"]


class Plain:
    """Counts what it sees."""

    def __init__(self, factor: float, offset: float = 0.0) -> None:
        if factor < 0:
            raise ValueError("the factor is negative")
        self.factor, self.offset = factor, offset
        self.rows = 0
        self.state = np.full(1000, factor)

    def scale(self, batch: Batch) -> Any:
        """Scale a column."""
        self.rows += len(batch)
        return batch["mean_radius"] * self.factor + self.offset

    def seen(self) -> int:
        """Return how many rows came by."""
        return self.rows

    def total(self, batch: Batch) -> float:
        """Return a sum of one shard."""
        return float(batch["mean_radius"].sum()) * self.factor

    def change(self, factor: float) -> float:
        """Take another factor; return the one before."""
        before, self.factor = self.factor, factor
        return before

    def who(self) -> int:
        """Return which process this is, in its own namespace, with the identity of its memory."""
        return id(self)

    def fail(self) -> None:
        """Raise after a change."""
        self.factor = -1.0
        raise KeyError("no")

    def vanish(self) -> None:
        """End the process."""
        os._exit(3)

    def spin(self, seconds: float) -> float:
        """Compute for a while."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return seconds


# As a decorator it is the same; mypy, unlike pyright, does not see what decorators make of classes.
Scaler = gpu_remote(Plain, columns=COLUMNS, shard_bytes=64 << 10)


@pytest.fixture
def zone(inside: Any) -> Iterator[Any]:
    """A session of its own; afterwards nothing may be left on the nodes."""
    with inside.cluster.attach("classes") as session:
        yield session


def radius(zone: Any) -> Any:
    """Return the column in source order."""
    return zone.read("breast_cancer", columns=COLUMNS).to_arrow()["mean_radius"].to_numpy()


def test_state_stays(zone: Any) -> None:
    """Calls change the instance that the next one finds; an exception ends neither it nor its state."""
    expected = radius(zone)
    with Scaler.options(session=zone).remote(2.0, offset=1.0) as scaler:
        data = zone.read("breast_cancer")
        assert np.array_equal(scaler.scale.map(data), expected * 2.0 + 1.0)
        assert scaler.seen.remote().result() == len(expected)
        assert scaler.change.remote(3.0).result() == 2.0
        assert np.array_equal(scaler.scale.map(data), expected * 3.0 + 1.0)
        assert scaler.seen.remote().result() == 2 * len(expected)
        assert scaler.total.map_reduce(data, sum) == pytest.approx(expected.sum() * 3.0)
        assert sum(scaler.total.stream(data)) == pytest.approx(expected.sum() * 3.0)
        assert scaler.total.remote(data).result() == pytest.approx(expected.sum() * 3.0)
        with pytest.raises(KeyError, match="no"):
            scaler.fail.remote().result()
        assert scaler.change.remote(1.0).result() == -1.0


def test_here_as_there(zone: Any) -> None:
    """Calling the class makes an ordinary instance, which gives the same."""
    batch = Batch.of_shard(zone.read("breast_cancer", columns=COLUMNS).to_arrow())
    here = Scaler(2.0)
    with Scaler.options(session=zone).remote(2.0) as there:
        assert np.array_equal(here.scale(batch), there.scale.map(zone.read("breast_cancer")))
    assert here.seen() == len(batch)


def test_two_instances(zone: Any) -> None:
    """Each has a sandbox, a GPU and a state of its own; functions run beside them where there is room."""
    with Scaler.options(session=zone).remote(1.0) as one, Scaler.options(session=zone).remote(10.0) as other:
        assert one.change.remote(5.0).result() == 1.0
        assert other.change.remote(6.0).result() == 10.0
        assert len({lease["node"] for lease in zone.status()["leases"]}) == 2
        with pytest.raises(PlacementError):
            Scaler.options(session=zone, placement_timeout_s=1).remote(1.0)
        with pytest.raises(PlacementError):
            gpu_remote(lambda: 3, session=zone, placement_timeout_s=1).remote().result()
        assert (one.change.remote(0.0).result(), other.change.remote(0.0).result()) == (5.0, 6.0)
        one.close()
        assert gpu_remote(lambda: 3, session=zone).remote().result() == 3


def test_several_sandboxes(zone: Any) -> None:
    """With ``concurrency`` there is an instance on each actor: shards go to all, and ``every`` reaches all."""
    expected = radius(zone)
    with Scaler.options(session=zone, concurrency=2).remote(2.0) as scaler:
        assert scaler.change.every(4.0) == [2.0, 2.0]
        data = zone.read("breast_cancer_resampled", columns=COLUMNS)
        assert scaler.scale.map(data).sum() == pytest.approx(data.to_arrow()["mean_radius"].to_numpy().sum() * 4.0)
        seen = scaler.seen.every()
        assert sum(seen) == len(data.to_arrow())
        assert min(seen) > 0
        assert np.array_equal(scaler.scale.map(zone.read("breast_cancer")), expected * 4.0)
        with pytest.raises(KeyError):
            scaler.fail.every()
        assert scaler.change.every(1.0) == [-1.0, -1.0]


def test_nobody_elses_calls(zone: Any) -> None:
    """Another session does not get the idle sandbox of an instance, however long it waits, nor reach it by its id."""
    with Scaler.options(session=zone, concurrency=2).remote(2.0) as scaler, zone_of(zone) as stranger:
        with pytest.raises(PlacementError):
            gpu_remote(lambda: 3, session=stranger, placement_timeout_s=3).remote().result()
        method = RemoteMethod(Scaler._kind, "change", scaler._options, digest=scaler._digest, instance=scaler._id)
        method._options = gpu_remote(lambda: 3, session=stranger)._options
        with pytest.raises(InstanceLostError, match="has ended"):
            method.remote(9.0).result()
        assert scaler.change.every(2.0) == [2.0, 2.0]


def zone_of(zone: Any) -> Any:
    """Return another session with the same zone."""
    import ray_gpu

    return ray_gpu.attach(zone.zone, purpose="another", state_dir=zone._path.parents[3])


@pytest.mark.parametrize(
    "how", ["close", "forget", *(pytest.param(one, marks=pytest.mark.chaos) for one in ("with", "session"))]
)
def test_the_end(zone: Any, inside: Any, how: str, wait_until: Callable[..., None]) -> None:
    """When it is closed, left, forgotten or its session ends, its sandbox is gone, and its GPU free."""
    scaler = Scaler.options(session=zone).remote(2.0)
    method = scaler.change
    assert len(inside.leases()) == 1
    if how == "close":
        scaler.close()
        assert inside.leases() == []
        scaler.close()
    elif how == "with":
        with scaler:
            pass
        assert inside.leases() == []
    elif how == "forget":
        del scaler
        gc.collect()
        wait_until(lambda: not inside.leases(), "the end of what nobody holds")
    else:
        zone.close()
        assert inside.leases() == []
        return
    with pytest.raises(InstanceLostError, match="make another one"):
        method.remote(1.0).result()
    if how in ("close", "with"):
        with pytest.raises(InstanceLostError, match="was closed"):
            _ = scaler.change


@pytest.mark.parametrize(
    "how",
    [*(pytest.param(one, marks=pytest.mark.chaos) for one in ("killed", "cancelled")), "killed in a call", "exits"],
)
def test_lost_state(zone: Any, inside: Any, how: str, in_background: Any) -> None:
    """An instance that lost its sandbox is never silently another one: every further call says what to do."""
    scaler = Scaler.options(session=zone).remote(2.0)
    if how == "killed":
        inside.kill(inside.leases())
    elif how == "killed in a call":
        call = in_background(scaler.spin.remote(60.0).result)
        inside.busy_node()
        inside.kill(inside.leases())
        with pytest.raises(InstanceLostError, match=r"lost its sandbox on gpu-\d, and its state with it"):
            call.result()
    elif how == "exits":
        with pytest.raises(InstanceLostError, match="and its state with it"):
            scaler.vanish.remote().result()
    else:
        spinning = scaler.spin.remote(60.0)
        inside.busy_node()
        spinning.cancel()
    for _ in range(2):
        with pytest.raises(InstanceLostError, match="and its state with it"):
            scaler.seen.remote().result()
        with pytest.raises(InstanceLostError, match="and its state with it"):
            scaler.scale.map(zone.read("breast_cancer"))
    scaler.close()
    with Scaler.options(session=zone).remote(7.0) as another:
        assert another.change.remote(1.0).result() == 7.0


def test_one_of_two_lost(zone: Any, inside: Any) -> None:
    """Where one of two sandboxes is lost, so is the instance."""
    scaler = Scaler.options(session=zone, concurrency=2).remote(2.0)
    inside.kill(inside.lease("sandbox", "gpu-1"))
    for call in (scaler.seen.every, lambda: scaler.scale.map(zone.read("breast_cancer"))):
        with pytest.raises(InstanceLostError, match="lost its sandbox on gpu-1"):
            call()
    scaler.close()


def test_idle_for_long(zone: Any) -> None:
    """An instance that nobody calls for a while keeps its state, while others look for room."""
    with Scaler.options(session=zone).remote(2.0) as scaler, zone_of(zone) as stranger:
        assert gpu_remote(lambda: 3, session=stranger).remote().result() == 3
        time.sleep(3)
        assert scaler.change.remote(1.0).result() == 2.0


def test_calls_take_turns(zone: Any) -> None:
    """Of calls from several threads one runs at a time, and none is lost."""
    with Scaler.options(session=zone).remote(0.0) as scaler:
        threads = [threading.Thread(target=lambda: scaler.scale.map(zone.read("breast_cancer"))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert scaler.seen.remote().result() == 4 * len(radius(zone))


def test_failing_constructor(zone: Any, inside: Any) -> None:
    """What ``__init__`` raises is raised here, and nothing of the instance is left."""
    with pytest.raises(ValueError, match="the factor is negative"):
        Scaler.options(session=zone, concurrency=2).remote(-1.0)

    assert inside.leases() == []


def test_ledger_names_it(zone: Any, inside: Any) -> None:
    """Making it and calling it are decisions of their own, of different functions; refused columns stay refused."""
    before = len(inside.cluster.entries("decision"))
    with Scaler.options(session=zone).remote(2.0) as scaler:
        scaler.seen.remote().result()
        scaler.scale.map(zone.read("breast_cancer"))
        with pytest.raises(EgressDeniedError):
            scaler.scale.options(columns=["record_number"]).map(zone.read("randhie"))
        assert scaler.seen.remote().result() == len(radius(zone))
    made = inside.cluster.entries("decision")[before:]
    assert len({entry["function"] for entry in made}) == 3
    assert [entry["dataset"] for entry in made] == ["", "", "breast_cancer", "randhie"]


def test_misuse(zone: Any) -> None:
    """Wrong names and wrong ways are refused with what to write, before anything is sent."""
    table = zone.read("breast_cancer", columns=COLUMNS).to_arrow()

    @gpu_remote(session=zone)
    class Decorated:
        """Holds data."""

        rows = table

    holds: Any = Decorated
    with pytest.raises(TypeError, match="did you mean 'concurrency'"):
        Scaler.options(concurency=2)
    with pytest.raises(FunctionRefusedError, match="captures"):
        holds.remote()
    with Scaler.options(session=zone).remote(2.0) as scaler:
        with pytest.raises(AttributeError, match="no method 'scael'; did you mean 'scale'"):
            _ = scaler.scael
        with pytest.raises(AttributeError, match="return them from a method"):
            _ = scaler.rows
        with pytest.raises(TypeError, match=r"write \.change\.remote"):
            scaler.change(2.0)
        with pytest.raises(TypeError, match="calling the class"):
            scaler.scale.local(zone.read("breast_cancer"))
        with pytest.raises(ValueError, match=r"Model\.options\(num_gpus=\.\.\.\)"):
            scaler.change.options(num_gpus=0.5)
        with pytest.raises(ValueRefusedError, match="argument 1"):
            scaler.change.remote(scaler)
        with pytest.raises(TypeError, match="does not leave this process"):
            scaler.__reduce__()
