"""Bombs in a sandbox (attack suite, 2): the cap is hit, the caller is told, the host and another's lease go on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_gpu import gpu_remote
from ray_gpu.sandbox import cgroup, profile
from zones.errors import CallTimeoutError, LeaseLostError

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]
#: A sandbox with this share of the processes that it may have is at its cap: the kernel counts threads too.
NEARLY = 0.9


def forks_without_end() -> None:
    """Have as many processes as there can be, and keep trying."""
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.2)


def eats_memory() -> list[bytearray]:
    """Take half a GiB more than a lease has."""
    return [bytearray(1 << 26) for _ in range(72)]


def eats_memory_in_a_file() -> None:
    """The same in a file that is in memory."""
    fd = os.memfd_create("bomb")
    for _ in range(72):
        os.write(fd, bytes(1 << 26))


def fills_its_disk() -> None:
    """Write more to /tmp than it has room for."""
    with open("/tmp/full", "wb", buffering=0) as file:
        for _ in range(300):
            if file.write(bytes(1 << 20)) < 1 << 20:
                raise OSError(28, "No space left on device")


class Bystander(threading.Thread):
    """Another session, which computes on the other node until it is told to stop."""

    def __init__(self, session: Any) -> None:
        super().__init__(daemon=True)
        self._add = gpu_remote(concurrency=1, session=session)(lambda a, b: a + b)
        self._stop_now = threading.Event()
        self.results: list[int] = []
        self.compute()

    def compute(self) -> None:
        """Compute once."""
        self.results.append(self._add.remote(20, 22).result(timeout=120))

    def run(self) -> None:
        """Compute, and compute."""
        while not self._stop_now.is_set():
            self.compute()

    @contextlib.contextmanager
    def computes_meanwhile(self) -> Iterator[None]:
        """Compute while the block runs, and have got every result right, and more than one."""
        self.start()
        try:
            yield
        finally:
            self._stop_now.set()
            self.join(120)
        assert not self.is_alive()
        assert set(self.results) == {42}
        assert len(self.results) > 2


def _most_processes(stop: threading.Event, lease: str) -> int:
    """Return how many processes and threads a lease had at once, at most, until *stop*."""
    found = cgroup.hierarchy()
    assert found is not None
    most = 0
    while not stop.wait(0.05):
        for path in (found.pids or Path()).glob(f"{lease}-*/pids.current"):
            if "-keeper-" not in str(path):
                with contextlib.suppress(OSError):
                    most = max(most, int(path.read_text(encoding="ascii")))
    return most


@pytest.mark.parametrize(
    ("bomb", "error", "says"),
    [
        (forks_without_end, CallTimeoutError, r"more time with \.options\(timeout_s"),
        (eats_memory, LeaseLostError, "run the call again.*MiB of memory"),
        (eats_memory_in_a_file, LeaseLostError, "run the call again.*MiB of memory"),
        (fills_its_disk, OSError, "No space left on device"),
    ],
)
def test_bomb_hits_its_cap(cluster: Any, bomb: Callable[[], Any], error: type[Exception], says: str) -> None:
    """The caller gets an error that says what to do; the other session computes meanwhile, and the next call works."""
    with cluster.attach("bombs") as mine, cluster.attach("bystander") as other:
        if "no-cgroup" in mine.degradations:
            pytest.skip("nothing caps memory here (degraded: no-cgroup), so that the whole machine would run out of it")
        works = gpu_remote(concurrency=1, session=mine)(lambda: 42)
        assert works.remote().result(timeout=120) == 42
        bystander = Bystander(other)
        (lease,), (others,) = mine.status()["leases"], other.status()["leases"]
        assert lease["node"] != others["node"]
        stop, most = threading.Event(), [0]
        watch = threading.Thread(target=lambda: most.append(_most_processes(stop, lease["lease"])))
        watch.start()
        options = {"timeout_s": 30.0} if bomb is forks_without_end else {}

        with bystander.computes_meanwhile(), pytest.raises(error, match=f"(?s){says}"):
            gpu_remote(concurrency=1, session=mine, **options)(bomb).remote().result(timeout=180)

        stop.set()
        watch.join()
        assert max(most) <= profile.MAX_PROCESSES
        if bomb is forks_without_end:
            assert max(most) > NEARLY * profile.MAX_PROCESSES
        assert works.remote().result(timeout=120) == 42
