"""Carrier client in short, as root and as a user: a job, an error, a lost actor, no room, a lost relay.

The whole suite runs with it by ``pytest --carrier client tests/job``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_gpu import Batch, examples, gpu_remote
from ray_gpu.sandbox import profile
from zones.errors import GatewayError, PlacementError

HERE = Path(__file__).resolve()
PROJECT = HERE.parents[2]
COLUMNS = ["mean_radius", "mean_texture"]
#: Somebody who is not root, and whose home is nobody's.
USER_UID = 61992


@gpu_remote(columns=COLUMNS, shard_bytes=64 << 10)
def slowly(batch: Batch, seconds: float) -> Any:
    """Return a number per row, after computing for a while."""
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return batch["mean_radius"] * 3 + batch["mean_texture"]


@gpu_remote
def fail() -> None:
    """Raise."""
    raise KeyError("missing")


@gpu_remote
def add(a: int, b: int) -> int:
    """Do what a function should."""
    return a + b


@pytest.fixture
def inside(client_cluster: Any, look_inside: Callable[[Any], Any]) -> Iterator[Any]:
    """The cluster from inside; nothing of a test may be left there."""
    looked = look_inside(client_cluster)
    yield looked
    looked.nothing_left()
    looked.close()


def test_no_node_in_the_zone(client_cluster: Any) -> None:
    """The cluster's nodes are those outside the zone; the zone has a gateway, a forwarder and a relay."""
    with client_cluster.attach("nodes") as zone:
        nodes = {node["name"]: node["gpus"] for node in zone.status()["nodes"]}

    assert nodes == {"gpu-1": 1.0, "gpu-2": 1.0}
    assert client_cluster.document["carrier"] == "client"
    assert {"gateway", "forwarder", "relay"} <= set(client_cluster.document["processes"])


def test_main_job(client_cluster: Any) -> None:
    """The fit on real data is exact, on two nodes."""
    with client_cluster.attach("fit") as zone:
        data = zone.read("randhie", columns=examples.RANDHIE_COLUMNS)
        fitted = examples.statistics.options(concurrency=2, shard_bytes=1 << 16).map_reduce(data, examples.solve)
        leases = zone.status()["leases"]
        exact = examples.least_squares(data.to_arrow())

    assert np.allclose(fitted, exact, rtol=1e-8, atol=1e-10)
    assert {lease["node"] for lease in leases} == {"gpu-1", "gpu-2"}


def test_error(client_cluster: Any) -> None:
    """A function's own error arrives as what it is."""
    with client_cluster.attach("error") as zone, pytest.raises(KeyError, match="missing"):
        fail.options(session=zone).remote().result(timeout=90)


def test_lost_actor(client_cluster: Any, inside: Any, in_background: Any) -> None:
    """An actor that is killed in the middle of a map costs its lease, and nothing else."""
    with client_cluster.attach("lost actor") as zone:
        data = zone.read("breast_cancer_resampled", columns=COLUMNS)
        table = data.to_arrow()
        call = slowly.options(session=zone)
        call.map(data.split(0.01)[0], 0.0)
        before = {lease["lease"] for lease in zone.status()["leases"]}
        running = in_background(lambda: call.map(data, 0.2))
        inside.kill(inside.actors(inside.busy_node()))

        expected = table["mean_radius"].to_numpy() * 3 + table["mean_texture"].to_numpy()
        assert np.array_equal(running.result(), expected)
        assert before - {lease["lease"] for lease in zone.status()["leases"]}


def test_no_room(client_cluster: Any, inside: Any) -> None:
    """Where every GPU is lent, whoever waits is told which node has how much, in time."""
    with client_cluster.attach("has the GPUs") as owner, client_cluster.attach("wants one") as late:
        data = owner.read("breast_cancer_resampled", columns=COLUMNS)
        running = slowly.options(session=owner, concurrency=2)
        running.map(data.split(0.01)[0], 0.0)
        # Both leases are in use while this runs, so neither is taken back.
        assert add.options(session=owner).remote(1, 2).result(timeout=90) == 3
        busy = _Busy(lambda: running.map(data, 1.0))
        inside.busy_node()

        with pytest.raises(PlacementError, match=r"gpu-1 has 0 of 1 free, gpu-2 has 0 of 1 free|in time"):
            add.options(session=late, placement_timeout_s=1.0).remote(1, 2).result(timeout=90)
        busy.join()
    inside.nothing_left()


class _Busy:
    """Runs a call on a thread; its result is nobody's."""

    def __init__(self, call: Callable[[], Any]) -> None:
        from threading import Thread

        self._thread = Thread(target=call)
        self._thread.start()

    def join(self) -> None:
        """Wait until it is over."""
        self._thread.join(120)


def test_relay_comes_back(client_cluster: Any, inside: Any, wait_until: Callable[..., None]) -> None:
    """A relay that is killed ends its leases and is started again; meanwhile calls say what is the matter."""
    with client_cluster.attach("lost relay") as zone:
        assert add.options(session=zone).remote(1, 2).result(timeout=90) == 3
        (before,) = inside.relay()
        inside.kill([before])
        wait_until(lambda: not inside.leases("sandbox") and not inside.leases("keeper"), "the end of the leases")

        said: set[str] = set()

        def works() -> bool:
            try:
                return bool(add.options(session=zone).remote(3, 4).result(timeout=90) == 7)
            except GatewayError as error:
                said.add(error.message)
                return False

        wait_until(works, "a relay", 120.0)
        assert [text for text in said if "it comes back once the head answers" not in text] == []
        assert inside.relay() != [before]


@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: becomes somebody with less. Run as a user, all above does it"
)
@pytest.mark.timeout(600)
@pytest.mark.chaos
def test_as_a_user() -> None:
    """All of this works without root, and is what somebody without root gets by default."""
    places = [PROJECT, *profile.runtime_paths(), Path(sys.executable).resolve().parents[1]]
    show = [str(place) for place in dict.fromkeys(map(Path.resolve, places))]
    wanted = json.dumps({"uid": USER_UID, "deny_userns": False, "container": False, "show": show})
    with tempfile.TemporaryDirectory(prefix="rg") as home:
        os.chown(home, USER_UID, USER_UID)
        environment = {
            "PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "PYTHONPATH": str(PROJECT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        command = [sys.executable, str(HERE.with_name("lesser.py")), wanted, sys.executable, "-m", "pytest", "-q"]
        command += [
            "-p",
            "no:cacheprovider",
            f"--rootdir={PROJECT}",
            f"--config-file={PROJECT}/pyproject.toml",
            str(HERE),
        ]
        done = subprocess.run(
            command, env=environment, cwd=home, capture_output=True, text=True, timeout=500, check=False
        )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed, 1 skipped" in done.stdout
