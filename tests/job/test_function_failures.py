"""Functions that misbehave: each is one clear error at the caller, and the next call works."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ray_gpu import Batch, gpu_remote
from zones.errors import CallTimeoutError, LeaseLostError, RemoteFunctionError, ResultTooLargeError, ValueRefusedError

#: What the sandbox keeps of prints, messages and tracebacks, bytes.
KEPT_TEXT = 64 << 10


@pytest.fixture(scope="module")
def zone(cluster: Any, look_inside: Callable[[Any], Any]) -> Iterator[Any]:
    """One session for all tests; after it nothing may be left."""
    with cluster.attach("functions that misbehave") as session:
        yield session
    inside = look_inside(cluster)
    inside.nothing_left()
    inside.close()


@gpu_remote(concurrency=1)
def add(a: int, b: int) -> int:
    """Do what a function should."""
    return a + b


def works() -> bool:
    """Whether a normal call of the same session works, on the one lease that all tests here share."""
    return bool(add.remote(20, 22).result(timeout=90) == 42)


def run(function: Callable[[], Any], **options: Any) -> Any:
    """Call a function on a node."""
    return gpu_remote(concurrency=1, **options)(function).remote().result(timeout=120)


# -- functions that end their process ---------------------------------------------------------------


def leaves() -> None:
    """Exit without a word."""
    os._exit(3)


def crashes() -> None:
    """Read where nothing is."""
    ctypes.string_at(0)


def closes_everything() -> None:
    """Close the descriptors of the program that runs it."""
    os.closerange(0, 100)


def eats_memory() -> list[bytearray]:
    """Take memory until there is none."""
    kept: list[bytearray] = []
    while True:
        kept.append(bytearray(1 << 26))


def recurses_natively() -> Any:
    """Recurse until the C stack ends."""
    sys.setrecursionlimit(1 << 30)

    def again(_: int) -> Any:
        return max([1], key=again)  # through C each time

    return again(1)


@pytest.mark.parametrize("function", [leaves, crashes, closes_everything, recurses_natively, eats_memory])
def test_function_that_ends_its_process(zone: Any, function: Callable[[], Any]) -> None:
    """The sandbox dies with it: the error says where to look, and the next call gets another sandbox."""
    if function is eats_memory and "no-cgroup" in zone.degradations:
        pytest.skip("memory is not limited here (degraded: no-cgroup), so that the whole machine would run out of it")
    with pytest.raises(LeaseLostError, match="run the call again") as raised:
        run(function)

    assert "native crash" in raised.value.message
    assert "MiB of memory" in raised.value.message
    assert raised.value.node in ("gpu-1", "gpu-2")
    assert works()


def test_endless_loop_is_stopped(zone: Any) -> None:
    """``timeout_s`` ends a loop that never ends, soon after it is over."""

    def loops() -> None:
        while True:
            pass

    assert works()
    started = time.monotonic()
    with pytest.raises(CallTimeoutError, match=r"more time with \.options\(timeout_s"):
        run(loops, timeout_s=0.5)

    assert time.monotonic() - started < 20
    assert works()


def test_endless_loop_in_a_map_is_stopped(zone: Any) -> None:
    """The same for a call over shards, on every lease that it uses."""

    @gpu_remote(columns=["mdvis"], timeout_s=1.0)
    def loops(batch: Batch) -> Any:
        while True:
            pass

    with pytest.raises(CallTimeoutError, match="timeout_s"):
        loops.map(zone.read("randhie"))

    assert works()


def test_thread_that_stays_is_no_obstacle(zone: Any) -> None:
    """A thread that the function leaves behind neither delays its result nor the end of its lease."""

    def leaves_a_thread() -> int:
        threading.Thread(target=lambda: time.sleep(600)).start()
        return 1

    assert run(leaves_a_thread) == 1
    assert works()


def test_fork_that_returns_twice_answers_once(zone: Any) -> None:
    """The child of a fork inside the function gives no second answer, which a later call could take for its own."""

    def forks() -> int:
        return min(1, os.fork())

    assert [run(forks) for _ in range(3)] == [1, 1, 1]
    assert [add.remote(number, 0).result() for number in range(20)] == list(range(20))


# -- exceptions of odd kinds ------------------------------------------------------------------------


class OwnError(Exception):
    """An exception of the user's own."""


class MuteError(Exception):
    """An exception whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class StubbornError(Exception):
    """An exception whose arguments cannot be had."""

    @property
    def args(self) -> tuple[Any, ...]:  # type: ignore[override]  # that is what is wrong with it
        """Fail."""
        raise RuntimeError("no arguments")


class Bare(BaseException):
    """No ``Exception`` at all."""


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (OwnError("own", 3), RemoteFunctionError, r"OwnError: \('own', 3\)"),
        (KeyError(("age", 1)), KeyError, "'age', 1"),
        (MuteError(), RemoteFunctionError, "MuteError: <its text cannot be shown: RuntimeError>"),
        (StubbornError(), RemoteFunctionError, "StubbornError"),
        (Bare("bare"), RemoteFunctionError, "Bare: bare"),
        (StopIteration(5), StopIteration, "5"),
        (KeyboardInterrupt(), RemoteFunctionError, "KeyboardInterrupt"),
        (GeneratorExit(), RemoteFunctionError, "GeneratorExit"),
        (MemoryError(), MemoryError, "^\nThe node had too little memory"),
        (TimeoutError("the function's own"), TimeoutError, "the function's own"),
        (ConnectionResetError("the function's own"), ConnectionResetError, "the function's own"),
        (ExceptionGroup("several", [ValueError("one")]), ExceptionGroup, "several"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), UnicodeDecodeError, "can't decode byte 0xff in position 0"),
        (ValueError("\ud800 is no character"), ValueError, "ud800 is no character"),
        (ValueError(1 << 80), ValueError, str(1 << 80)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exception_of_an_odd_kind(zone: Any, error: BaseException, kind: type[Exception], says: str) -> None:
    """Whatever the function raises comes back as one error with the remote traceback; no lease is lost."""
    assert works()
    before = {lease["lease"] for lease in zone.status()["leases"]}
    make = type(error)
    arguments = getattr(error, "args", ()) if make is not StubbornError else ()

    def raises() -> None:
        raise make(*arguments)

    with pytest.raises(kind, match=says) as raised:
        run(raises)

    assert "in raises" in str(raised.value.__cause__)
    assert works()
    assert {lease["lease"] for lease in zone.status()["leases"]} == before


def test_chained_exception_shows_all_links(zone: Any) -> None:
    """What an exception came from is in the remote traceback; what called the function is not."""

    def raises() -> None:
        try:
            dict[str, int]()["patient"]
        except KeyError as error:
            raise ValueError("outer") from error

    with pytest.raises(ValueError, match="outer") as raised:
        run(raises)

    shown = str(raised.value.__cause__)
    assert "KeyError: 'patient'" in shown
    assert "direct cause" in shown
    assert "child.py" not in shown


def test_exception_with_a_huge_text(zone: Any) -> None:
    """Megabytes in an exception arrive cut."""

    def raises() -> None:
        raise ValueError(*["x" * (1 << 20)] * 4)

    with pytest.raises(ValueError, match="xxx") as raised:
        run(raises)

    assert len(str(raised.value)) < 2 * KEPT_TEXT
    assert works()


def test_exception_while_the_function_is_loaded(zone: Any) -> None:
    """A function that cannot be loaded on the node is an error of the call, not of the lease."""

    class Trap:
        def __reduce__(self) -> Any:
            return (int, ("not a number",))

    trap = Trap()

    def uses() -> Any:
        return trap

    with pytest.raises(ValueError, match="not a number"):
        run(uses)
    assert works()


# -- results and prints -----------------------------------------------------------------------------


def some_objects() -> Any:
    """Return an array of Python objects."""
    return np.array([object(), 1], dtype=object)


def an_own_class() -> Any:
    """Return an object of a class of the user's own."""
    return OwnError("as a value")


def a_function() -> Any:
    """Return a function."""
    return lambda: 1


def a_generator() -> Any:
    """Return something that yields."""
    return (number for number in range(3))


def broken_text() -> Any:
    """Return a string that is no Unicode."""
    return "\ud800"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (some_objects, "dtype object"),
        (an_own_class, "OwnError, which is not data"),
        (a_function, "function, which is not data"),
        (a_generator, "generator, which is not data"),
        (broken_text, "Unicode"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_result_that_is_no_plain_data(zone: Any, function: Callable[[], Any], says: str) -> None:
    """What could execute, or has no plain form, is refused with the way to return it instead."""
    with pytest.raises(ValueRefusedError, match=says) as raised:
        run(function)

    assert ";" in raised.value.message
    assert works()


def test_result_over_the_limit(zone: Any) -> None:
    """A result that does not fit is refused with both sizes; one that just fits is returned."""

    def zeros(size: int) -> Any:
        return np.zeros(size, dtype=np.uint8)

    call = gpu_remote(concurrency=1)(zeros)
    with pytest.raises(ResultTooLargeError, match="return less") as raised:
        call.remote(65 << 20).result(timeout=90)

    assert raised.value.size_bytes > 64 << 20 >= raised.value.limit_bytes
    assert call.remote(63 << 20).result(timeout=90).nbytes == 63 << 20
    assert works()


def test_object_that_fails_while_it_is_read(zone: Any) -> None:
    """A result whose own code raises while it is encoded is an error of the function."""

    class Odd(dict):  # type: ignore[type-arg]  # only its items matter
        def items(self) -> Any:
            raise RuntimeError("items of my own")

    def odd() -> Any:
        return [Odd(a=1)]

    with pytest.raises((RuntimeError, ValueRefusedError)):
        run(odd)
    assert works()


def test_huge_prints_are_cut(zone: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Megabytes of prints do not break the call: the beginning is shown, with a line that says how much there was."""

    def chatters() -> int:
        print("y" * (5 << 20))  # noqa: T201 - the point
        return 1

    assert run(chatters) == 1
    shown = capfd.readouterr().out
    assert f"[cut: {(5 << 20) + 1} bytes printed, {KEPT_TEXT} kept]" in shown
    assert shown.startswith("y" * KEPT_TEXT)
    assert works()


def test_closed_output_is_opened_again(zone: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """A function that closes standard output hurts neither its own result nor the next function's prints."""

    def closes() -> int:
        sys.stdout.close()
        return 1

    def prints() -> int:
        print("seen again")  # noqa: T201 - the point
        return 2

    assert (run(closes), run(prints)) == (1, 2)
    assert "seen again" in capfd.readouterr().out


@gpu_remote(columns=["mdvis"], shard_bytes=256 << 10, concurrency=1)
def needs_little(batch: Any, most: int, kind: str) -> Any:
    """Give the rows back, unless there are too many for this node's memory."""
    if len(batch) > most:
        error = MemoryError if kind == "Python's" else type("OutOfMemoryError", (Exception,), {})
        raise error(f"{len(batch)} rows")
    return batch["mdvis"] * 2


@pytest.mark.parametrize("kind", ["Python's", "a GPU's"])
def test_halved(zone: Any, kind: str) -> None:
    """Asked for, shards get smaller until a node has the memory for them; if that is never so, the error stays."""
    data = zone.read("randhie", columns=["mdvis"])
    halving = needs_little.options(session=zone, halve_shards=True)
    expected = data.to_pandas()["mdvis"].to_numpy() * 2

    with pytest.raises((MemoryError, RemoteFunctionError), match="rows"):
        needs_little.options(session=zone).map(data, 9000, kind)
    assert np.array_equal(halving.map(data, 9000, kind), expected)
    assert halving.map_reduce(data, lambda parts: sum(part.sum() for part in parts), 9000, kind) == expected.sum()
    with pytest.raises((MemoryError, RemoteFunctionError), match="rows"):
        halving.map(data, 10, kind)
