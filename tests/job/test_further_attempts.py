"""A shard that is sent again, because a node was lost, says no more of its rows' places than the first time."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adversary.captured import messages
from ray_gpu import gpu_remote
from testbed.capture import Capture
from zones.model import Kind

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root alone can capture what the network carries")

COLUMNS = ["mean_radius", "mean_texture"]


@gpu_remote(columns=COLUMNS, shard_bytes=64 << 10)
def kept(batch: Any, seconds: float) -> Any:
    """Keep a copy of what was given where whoever took the node over can look, and give it back after a while."""
    place = Path(f"/tmp/{time.time_ns()}")
    np.save(place.with_suffix(".part.npy"), np.column_stack([batch[name] for name in COLUMNS]))
    place.with_suffix(".part.npy").rename(place.with_suffix(".npy"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return batch["mean_radius"]


def given(pid: int) -> list[Any]:
    """Return what a sandbox was given so far, in that order, as root on the node can read it."""
    files = sorted(path for path in Path(f"/proc/{pid}/root/tmp").glob("*.npy") if ".part" not in path.name)
    return [np.load(path) for path in files]


def test_further_attempts_tell_nothing(
    cluster: Any, inside: Any, in_background: Any, tmp_path: Path, wait_until: Callable[..., None]
) -> None:
    """The node that is lost in the middle and the one that takes over get a shard in one order, number and size."""
    with cluster.attach("further attempts") as session:
        data = session.read("breast_cancer_resampled", columns=COLUMNS)
        function = kept.options(session=session, concurrency=2)
        function.map(data.split(0.01)[0], 0.0)
        (lost,), (other,) = (inside.lease("sandbox", node) for node in ("gpu-1", "gpu-2"))
        before = {pid: len(given(pid)) for pid in (lost, other)}
        with Capture(os.getpid(), tmp_path / "packets") as capture:
            call = in_background(lambda: function.map(data, 0.4))
            wait_until(lambda: len(given(lost)) > before[lost] + 2, "a third shard on the node that will be lost")
            os.kill(lost, signal.SIGSTOP)
            first = given(lost)[before[lost] :]
            os.kill(lost, signal.SIGKILL)
            found = call.result()
            capture.end()
        second = [shard for pid in inside.leases() for shard in given(pid)[before.get(pid, 0) :]]
        expected = data.to_arrow()["mean_radius"].to_numpy()
    assert capture.dropped == 0
    assert np.array_equal(found, expected)

    # What the lost node had not answered yet came once more, row by row the same; what it had answered did not.
    again = [any(np.array_equal(shard, later) for later in second) for shard in first]
    assert again[-1]
    assert not again[0]

    sent = defaultdict(list)
    for stream in capture.streams().values():
        for header, size in messages(stream):
            if header.kind is Kind.SHARD:
                sent[header.shard].append((header.attempt, size))
    repeated = [attempts for attempts in sent.values() if any(attempt > 0 for attempt, _ in attempts)]
    assert repeated
    for attempts in repeated:
        assert sorted(attempt for attempt, _ in attempts) == [0, 1]
        assert len({size for _, size in attempts}) == 1
