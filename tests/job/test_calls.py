"""Many calls at once: lists of arguments, coroutines, and an executor as Python has them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import ray_gpu
from ray_gpu import gpu_remote
from zones.errors import CallCancelledError


@gpu_remote
def divide(a: float, b: float = 1.0) -> float:
    """Divide on arguments alone."""
    return a / b


@gpu_remote
def nap(seconds: float) -> float:
    """Take long."""
    time.sleep(seconds)
    return seconds


@pytest.fixture(scope="module")
def zone(cluster: Any) -> Iterator[Any]:
    """One session for all."""
    with cluster.attach("calls") as session:
        yield session


def test_starmap(zone: Any) -> None:
    """Results are in the order of the arguments, and equal to calls here."""
    arguments = [(float(i), 3.0) for i in range(20)]

    assert divide.options(session=zone).starmap(arguments) == [divide(*each) for each in arguments]
    assert divide.options(session=zone).starmap(iter([(1,), [2, 4]])) == [1.0, 0.5]
    assert divide.options(session=zone).starmap([]) == []


def test_starmap_with_errors(zone: Any) -> None:
    """The first error is raised and ends the rest; or each stands where its value would."""
    function = divide.options(session=zone)
    arguments = [(1.0, 2.0), (1.0, 0.0), (3.0, 4.0)]
    with pytest.raises(ZeroDivisionError):
        function.starmap(arguments)
    found = function.starmap(arguments, return_exceptions=True)

    assert (found[0], found[2]) == (0.5, 0.75)
    assert isinstance(found[1], ZeroDivisionError)
    assert function.remote(1.0, 4.0).result() == 0.25


def test_await(zone: Any) -> None:
    """Calls are awaited, several at once; what a function raises comes out of the coroutine."""
    function = divide.options(session=zone)

    async def several() -> Any:
        with pytest.raises(ZeroDivisionError):
            await function.remote(1.0, 0.0)
        return await asyncio.gather(*(function.remote(float(i), 2.0) for i in range(5)))

    assert asyncio.run(several()) == [0.0, 0.5, 1.0, 1.5, 2.0]


@gpu_remote(columns=["mdvis"])
def in_c(batch: Any = None) -> int:
    """Compute for half an hour in one call of C code, which hears no signal of Python's."""
    import hashlib

    return len(hashlib.pbkdf2_hmac("sha256", b"password", b"salt", (1 << 31) - 1))


@pytest.mark.parametrize("mode", ["remote", "task", pytest.param("rows", marks=pytest.mark.chaos)])
def test_cancelled_in_c(
    cluster: Any, zone: Any, look_inside: Any, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call, or the task that awaits it, is cancelled in C code: it ends, its sandbox is gone, the session goes on."""
    function = in_c.options(session=zone, concurrency=1)
    call = function.remote(zone.read("randhie", columns=["mdvis"])) if mode == "rows" else function.remote()
    with pytest.raises(TimeoutError):
        call.result(timeout=2)
    inside = look_inside(cluster)
    before = set(inside.leases())

    async def cancelled() -> None:
        task = asyncio.ensure_future(call)
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = time.monotonic()
    if mode == "task":
        asyncio.run(cancelled())
    else:
        call.cancel()
    with pytest.raises(CallCancelledError):
        call.result(timeout=60)
    took = time.monotonic() - started
    while len(before & set(inside.leases())) == len(before):
        assert time.monotonic() - started < 60
        time.sleep(0.05)

    with capsys.disabled():
        sys.stdout.write(f"\n{mode}: cancelled after {took:.3f} s\n")
    assert divide.options(session=zone).remote(1.0, 4.0).result(timeout=60) == 0.25


def test_executor(zone: Any) -> None:
    """What takes an executor takes this one: futures, map in order, errors, remote functions and plain ones."""
    with ray_gpu.Executor(session=zone) as executor:
        future = executor.submit(lambda a, b: a - b, 5, 3)
        assert isinstance(future, concurrent.futures.Future)
        assert future.result(timeout=60) == 2
        assert list(executor.map(lambda a, b: a * b, [1, 2, 3], [4, 5, 6])) == [4, 10, 18]
        assert executor.submit(divide.options(session=zone), 1.0, 8.0).result(timeout=60) == 0.125
        failed: Any = executor.submit(lambda: [][1])
        assert isinstance(failed.exception(timeout=60), IndexError)
        waiting = [executor.submit(divide.options(session=zone), float(i)) for i in range(10)]
        assert [one.result() for one in concurrent.futures.as_completed(waiting)] != []
        assert concurrent.futures.wait(waiting).not_done == set()
    with pytest.raises(RuntimeError):
        executor.submit(lambda: 1)


def test_executor_of_scikit_learns_kind(zone: Any) -> None:
    """A library that is given an executor needs to know nothing else of it."""

    def norm(executor: concurrent.futures.Executor, function: Callable[[Any], float], rows: Any) -> list[float]:
        return list(executor.map(function, rows))

    rows = np.arange(12.0).reshape(4, 3)
    with ray_gpu.Executor(session=zone, concurrency=2) as executor:
        found = norm(executor, lambda row: float((row**2).sum()), rows)

    assert found == [float((row**2).sum()) for row in rows]


def test_executor_with_no_such_option() -> None:
    """Options are checked when the executor is made."""
    with pytest.raises(TypeError, match="did you mean 'concurrency'"):
        ray_gpu.Executor(concurency=2)


@gpu_remote(columns=["mdvis"], shard_bytes=64 << 10)
def summed(batch: Any) -> float:
    """Return a shard's sum."""
    return float(batch["mdvis"].sum())


@gpu_remote(columns=["mdvis"], shard_bytes=64 << 10)
def large(batch: Any) -> Any:
    """Return more than travels in a message."""
    return np.full(1 << 18, batch["mdvis"].sum())


@gpu_remote(columns=["mdvis"], shard_bytes=64 << 10, concurrency=1)
def slower(batch: Any, seconds: float) -> float:
    """Return a shard's sum, and take long."""
    time.sleep(seconds)
    return float(batch["mdvis"].sum())


def test_stream(zone: Any) -> None:
    """Every shard's value comes once, as it is there or by number; the report is that of a whole call."""
    data = zone.read("randhie")
    together = sorted(summed.options(session=zone).map_reduce(data, list))
    with summed.options(session=zone).stream(data) as found:
        values = list(found)

    assert len(values) == found.report["shards"] > 2
    assert sum(values) == pytest.approx(sum(together))
    assert found.report["rows"] == 20190
    assert list(found) == []
    assert sum(summed.options(session=zone).stream(data, ordered=True)) == pytest.approx(sum(together))
    arrays = list(large.options(session=zone).stream(data))
    assert sum(float(array[0]) for array in arrays) == pytest.approx(sum(together))
    assert {len(array) for array in arrays} == {1 << 18}


def test_values_come_while_the_call_runs(zone: Any) -> None:
    """The first value is there long before the last; whoever goes away stops the call."""
    data = zone.read("randhie")
    started = time.monotonic()
    stream = slower.options(session=zone).stream(data, 0.5)
    next(stream)
    first = time.monotonic() - started
    rest = len(list(stream))
    whole = time.monotonic() - started

    assert whole - first > 0.4 * rest > 0.4
    with slower.options(session=zone).stream(data, 60.0) as stopped:
        pass
    with pytest.raises(CallCancelledError):
        next(stopped)
    assert summed.options(session=zone).map_reduce(data, sum) > 0


def test_error_in_a_stream(zone: Any) -> None:
    """What a shard raised is raised after the values that came before it."""

    @gpu_remote(columns=["mdvis"], shard_bytes=64 << 10, concurrency=1, session=zone)
    def third_fails(batch: Any) -> int:
        import sys

        seen = sys.__dict__["seen_by_third_fails"] = sys.__dict__.get("seen_by_third_fails", 0) + 1
        if seen == 3:
            raise KeyError("third")
        return len(batch)

    found: list[int] = []
    with pytest.raises(KeyError, match="third"):
        found.extend(third_fails.stream(zone.read("randhie")))

    assert len(found) == 2
    assert sum(third_fails.stream(zone.read("randhie"))) == 20190


@pytest.mark.parametrize("where", ["remote", "local"])
def test_errors_among_the_values(zone: Any, where: str) -> None:
    """Asked for, what a shard raised stands in for its value, with its traceback, and the others come all the same."""

    @gpu_remote(columns=["mdvis"], shard_bytes=64 << 10, concurrency=1, session=zone, where=where)
    def every_other_fails(batch: Any) -> int:
        import sys

        seen = sys.__dict__["seen_by_every_other"] = sys.__dict__.get("seen_by_every_other", 0) + 1
        if seen % 2:
            raise KeyError(seen)
        return len(batch)

    found: list[Any] = list(every_other_fails.stream(zone.read("randhie"), return_exceptions=True))
    raised = [one for one in found if isinstance(one, KeyError)]

    assert [error.args for error in raised] == [(1,), (3,)]
    assert "in every_other_fails" in str(raised[0].__cause__)
    assert 0 < sum(one for one in found if not isinstance(one, KeyError)) < 20190
    with pytest.raises(KeyError):
        list(every_other_fails.stream(zone.read("randhie")))


def test_async_stream(zone: Any) -> None:
    """`async for` takes values as `for` does, and other coroutines go on meanwhile."""

    async def total() -> float:
        return sum([value async for value in summed.options(session=zone).stream(zone.read("randhie"))])

    async def both() -> Any:
        return await asyncio.gather(total(), divide.options(session=zone).remote(1.0, 4.0))

    expected = summed.options(session=zone).map_reduce(zone.read("randhie"), sum)
    assert asyncio.run(both()) == [pytest.approx(expected), 0.25]
