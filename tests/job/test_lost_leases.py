"""Leases that are lost: a sandbox, a keeper or an actor is killed, there is no room, the session ends meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ray_gpu import Batch, gpu_remote
from ray_gpu.job import MAX_ATTEMPTS, backoff_s
from ray_gpu.lease_pool import FRESH_S
from zones.errors import CallCancelledError, CallTimeoutError, LeaseLostError, PlacementError, SessionClosedError

NODES = ("gpu-1", "gpu-2")
COLUMNS = ["mean_radius", "mean_texture"]


@gpu_remote
def add(a: int, b: int) -> int:
    """Do what a function should."""
    return a + b


@gpu_remote
def spin(seconds: float) -> float:
    """Compute for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds


@gpu_remote(columns=COLUMNS, shard_bytes=64 << 10)
def slowly(batch: Batch, seconds: float) -> Any:
    """Return a number per row, after computing for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return batch["mean_radius"] * 3 + batch["mean_texture"]


@pytest.fixture
def zone(inside: Any) -> Iterator[Any]:
    """A session that holds a lease on each node, the function loaded."""
    with inside.cluster.attach("leases that are lost") as session:
        slowly.map(_rows(session, 100), 0.0)
        yield session


def _rows(zone: Any, rows: int | None = None) -> Any:
    data = zone.read("breast_cancer_resampled", columns=COLUMNS)
    return data if rows is None else data.split(rows / 40_000)[0]


def _expected(zone: Any) -> Any:
    table = _rows(zone).to_arrow()
    return table["mean_radius"].to_numpy() * 3 + table["mean_texture"].to_numpy()


def _nodes(zone: Any) -> dict[str, str]:
    return {lease["node"]: lease["lease"] for lease in zone.status()["leases"]}


# -- one part killed in the middle ------------------------------------------------------------------


@pytest.mark.parametrize("part", ["sandbox", pytest.param("keeper", marks=pytest.mark.chaos)])
def test_process_killed_mid_shard(zone: Any, inside: Any, part: str, in_background: Any) -> None:
    """The shards of a lease whose sandbox or keeper is killed go to another lease; the result is exact, in order."""
    before = _nodes(zone)
    assert set(before) == set(NODES)
    call = in_background(lambda: slowly.map(_rows(zone), 0.3))
    inside.busy_node("gpu-1")
    inside.kill(inside.lease(part, "gpu-1"))

    assert np.array_equal(call.result(), _expected(zone))
    assert before["gpu-1"] not in _nodes(zone).values()
    assert before["gpu-2"] in _nodes(zone).values()
    assert add.remote(1, 2).result(timeout=60) == 3


def test_actor_killed_mid_map(zone: Any, inside: Any, in_background: Any) -> None:
    """The shards of a lease whose Ray actor is killed go to the other actor; the result is exact, in order."""
    before = _nodes(zone)
    call = in_background(lambda: slowly.map(_rows(zone), 0.3))
    inside.busy_node("gpu-2")
    inside.kill(inside.actors("gpu-2"))

    assert np.array_equal(call.result(), _expected(zone))
    assert before["gpu-2"] not in _nodes(zone).values()
    assert add.remote(1, 2).result(timeout=60) == 3


def test_both_sandboxes_killed(zone: Any, inside: Any, in_background: Any) -> None:
    """When no lease is left, the call gets others and goes on; the result is exact, in order."""
    before = _nodes(zone)
    call = in_background(lambda: slowly.map(_rows(zone), 0.2))
    inside.busy_node()
    inside.kill(inside.leases())

    assert np.array_equal(call.result(), _expected(zone))
    assert not set(before.values()) & set(_nodes(zone).values())


@pytest.mark.chaos
def test_killed_again_and_again(zone: Any, inside: Any, wait_until: Callable[..., None], in_background: Any) -> None:
    """A call whose leases are lost every time ends, with an error that says so and where to look."""
    call = in_background(lambda: slowly.map(_rows(zone), 30.0))
    killed: set[int] = set()

    def kill_what_computes() -> bool:
        # Well over the second of processor time that it takes to start.
        for pid in {pid for pid in inside.leases() if inside.cpu_ticks(pid) > 130} - killed:
            inside.kill([pid])
            killed.add(pid)
        return bool(call.future.done())

    wait_until(kill_what_computes, "the end of the call", timeout_s=150)
    with pytest.raises(LeaseLostError, match=rf"sent {MAX_ATTEMPTS} times.*ray-gpu status"):
        call.result()
    assert len(killed) <= 2 * MAX_ATTEMPTS
    assert add.remote(1, 2).result(timeout=60) == 3


@pytest.mark.parametrize(
    "part", ["sandbox", *(pytest.param(one, marks=pytest.mark.chaos) for one in ("keeper", "actor"))]
)
def test_part_killed_during_a_call(zone: Any, inside: Any, part: str, in_background: Any) -> None:
    """A call on arguments alone is not repeated, since it may have had an effect: the error says to run it again."""
    call = spin.options(concurrency=1).remote(60.0)
    busy = in_background(call.result)
    used = inside.busy_node()
    inside.kill(inside.actors(used) if part == "actor" else inside.lease(part, used))

    with pytest.raises(LeaseLostError, match="run the call again") as raised:
        busy.result()
    assert raised.value.node == used
    assert raised.value.reason
    assert spin.options(concurrency=1).remote(0.0).result(timeout=60) == 0.0


@gpu_remote(concurrency=1)
def count_and(do: str) -> int:
    """Count the calls of this sandbox; then end it, raise, or return the count."""
    globals()["counted"] = globals().get("counted", 0) + 1
    if do == "exit":
        os._exit(3)
    if do == "raise":
        raise ZeroDivisionError("no")
    return int(globals()["counted"])


def test_waits_get_longer() -> None:
    """Before a call is made again there is a wait, each time twice as long, up to a limit."""
    waits = [backoff_s(retries) for retries in range(1, 20)]
    assert waits[0] > 0
    assert all(second == min(2 * first, waits[-1]) for first, second in pairwise(waits))
    assert waits[-1] == waits[-2] > 8 * waits[0]


def test_retries(zone: Any, inside: Any, in_background: Any) -> None:
    """A call that may be made again is, on another lease; and no oftener than it says."""
    call = spin.options(concurrency=1, max_retries=1).remote(3.0)
    busy = in_background(call.result)
    inside.kill(inside.lease("sandbox", inside.busy_node()))
    assert busy.result() == 3.0

    session = zone.status()["session"]
    with pytest.raises(LeaseLostError, match="run the call again"):
        count_and.options(max_retries=2).remote("exit").result(timeout=60)
    assert count_and.remote("").result(timeout=60) == 1
    zone.close()
    # One that was killed above, and three that the function ended.
    assert len(inside.cluster.entries("lease-end", outcome="lost", session=session)) == 4


def test_no_retries_of_what_a_function_raises(zone: Any) -> None:
    """A function's own exception is its answer, and never tried again."""
    function = count_and.options(max_retries=5)
    with pytest.raises(ZeroDivisionError):
        function.remote("raise").result(timeout=60)

    assert function.remote("").result(timeout=60) == 2


@pytest.mark.chaos
def test_cancelled_between_retries(zone: Any, in_background: Any) -> None:
    """Who gives up while a call waits to be made again does not wait."""
    call = count_and.options(max_retries=100).remote("exit")
    busy = in_background(call.result)
    time.sleep(8)
    began = time.monotonic()
    call.cancel()
    with pytest.raises(CallCancelledError):
        busy.result()
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "part", ["actor", *(pytest.param(one, marks=pytest.mark.chaos) for one in ("keeper", "sandbox"))]
)
def test_part_killed_while_idle(zone: Any, inside: Any, wait_until: Callable[..., None], part: str) -> None:
    """A lease that was lost between two calls is replaced: the next call does not notice."""
    before = set(_nodes(zone).values())
    for node in NODES:
        inside.kill(inside.actors(node) if part == "actor" else inside.lease(part, node))
    idle = time.monotonic()
    wait_until(lambda: not inside.leases("sandbox") and not inside.leases("keeper"), "the end of both leases")
    wait_until(lambda: time.monotonic() > idle + FRESH_S, "leases that were not used a moment ago")

    assert add.remote(1, 2).result(timeout=60) == 3
    assert not before & set(_nodes(zone).values())


def test_lost_idle_lease_frees_its_gpu(zone: Any, inside: Any, wait_until: Callable[..., None]) -> None:
    """A lost lease is given back without anybody calling anything: others can have the GPU, and the key is gone."""
    assert inside.gpus_taken() == 2
    inside.kill(inside.leases())

    wait_until(lambda: inside.gpus_taken() == 0, "the return of the GPUs")
    wait_until(lambda: not inside.lease_keys(), "the end of the keys")


# -- no room ----------------------------------------------------------------------------------------


def test_no_room(zone: Any, inside: Any) -> None:
    """While another session uses all GPUs, a call fails after its time with Ray's reason; later it works."""
    holders = [spin.remote(60.0), spin.remote(60.0)]
    for node in NODES:
        inside.busy_node(node)
    with inside.cluster.attach("the second") as second:
        started = time.monotonic()
        with pytest.raises(PlacementError, match="wait for leases to end, ask for less, or add a node") as raised:
            add.options(session=second, placement_timeout_s=1.0).remote(1, 2).result(timeout=60)

        assert 1.0 <= time.monotonic() - started < 15
        assert raised.value.pool == "shared"
        assert "gpu-1 has 0 of 1 free" in raised.value.reason
        assert "gpu-2 has 0 of 1 free" in raised.value.reason
        waiting = add.options(session=second, placement_timeout_s=60.0).remote(1, 2)
        zone.close()
        assert waiting.result(timeout=60) == 3
    assert all(call.done() for call in holders)


def test_more_than_there_is(zone: Any) -> None:
    """Asking for more GPUs than any node has fails in its time too, and the next call works."""
    with pytest.raises(PlacementError, match="of 1 free"):
        add.options(num_gpus=2, placement_timeout_s=1.0).remote(1, 2).result(timeout=60)

    assert add.remote(1, 2).result(timeout=60) == 3


def test_timeout_while_waiting_for_room(zone: Any) -> None:
    """``timeout_s`` counts the wait for a GPU as well."""
    started = time.monotonic()
    with pytest.raises((CallTimeoutError, PlacementError)):
        add.options(num_gpus=2, timeout_s=1.0).remote(1, 2).result(timeout=60)

    assert time.monotonic() - started < 15


def test_timeout_while_waiting_for_another_call(zone: Any) -> None:
    """``timeout_s`` counts the wait for the session's own calls as well; those are not disturbed."""
    holders = [spin.remote(5.0), spin.remote(5.0)]
    started = time.monotonic()
    with pytest.raises(CallTimeoutError, match="timeout_s"):
        spin.options(timeout_s=0.5).remote(0.0).result(timeout=60)

    assert time.monotonic() - started < 4
    assert [call.result(timeout=60) for call in holders] == [5.0, 5.0]


def test_maps_at_once_share_the_leases(zone: Any, in_background: Any) -> None:
    """Several maps of one session at once come to an end, each exact."""
    calls = [in_background(lambda: slowly.map(_rows(zone), 0.02)) for _ in range(3)]

    for call in calls:
        assert np.array_equal(call.result(), _expected(zone))


# -- the session ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["map", "remote"])
def test_session_closed_while_a_call_runs(zone: Any, inside: Any, how: str, in_background: Any) -> None:
    """Closing the session ends its calls with an error that says so, soon, and nothing stays behind."""
    call = in_background(lambda: slowly.map(_rows(zone), 60.0) if how == "map" else spin.remote(60.0).result())
    inside.busy_node()
    started = time.monotonic()
    zone.close()

    assert time.monotonic() - started < 20
    with pytest.raises(SessionClosedError, match="attach again"):
        call.result()
    with inside.cluster.attach("again") as again:
        assert add.options(session=again).remote(1, 2).result(timeout=60) == 3


def test_call_after_the_end(zone: Any) -> None:
    """A closed session makes no call, whatever still holds it."""
    handle = _rows(zone)
    zone.close()

    with pytest.raises(SessionClosedError, match="attach again"):
        slowly.map(handle, 0.0)
    with pytest.raises(SessionClosedError, match="attach again"):
        add.options(session=zone).remote(1, 2)
