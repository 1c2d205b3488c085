"""A call that runs here: waiting for it, giving it up, what holds it up. Its results: tests/job/test_where.py."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_gpu import Batch
from ray_gpu.advice import decide
from ray_gpu.local_call import LocalCall, LocalWork
from ray_gpu.options import FunctionOptions
from ray_gpu.request import Mode
from ray_gpu.stream import Stream
from zones import values
from zones.errors import CallCancelledError, CallTimeoutError, ResultTooLargeError

ROWS = pa.table({"x": pa.array(np.arange(100.0))})
PATIENCE_S = 60.0


class Gate:
    """A function that waits until it is let go, and says when it began."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.count = 0

    def __call__(self, batch: Batch) -> int:
        """Wait, and return the rows."""
        self.count += 1
        self.begun.release()
        assert self.go.acquire(timeout=PATIENCE_S)
        return len(batch)


def _call(function: Any, mode: Mode = Mode.SHARDS, took: Any = lambda *_: None, **options: Any) -> LocalCall[Any]:
    work = LocalWork(
        function=function,
        mode=mode,
        whole=False,
        options=FunctionOptions(where="local", **options),
        data=ROWS,
        arguments=bytes(values.encode([[], {}])),
        broadcasts={},
    )
    return LocalCall(work, advice=decide(2.0, 1.0), took=took)


def test_waiting() -> None:
    """It is done when its function has returned for every shard, and says how long that took."""
    gate, took = Gate(), threading.Event()
    call = _call(gate, took=lambda *_: took.set(), concurrency=1)
    assert gate.begun.acquire(timeout=PATIENCE_S)
    assert not call.done()
    with pytest.raises(TimeoutError, match="not done after"):
        call.result(timeout=0.001)
    gate.go.release(2)

    assert call.result(PATIENCE_S) == [50, 50]
    assert call.done()
    assert took.wait(PATIENCE_S)
    assert {key: call.report[key] for key in ("shards", "rows", "sent_bytes")} == {
        "shards": 2,
        "rows": 100,
        "sent_bytes": 0,
    }
    assert call.report["seconds"] > 0
    assert "local is faster" in str(call.advice)
    assert "here: 2" in call._repr_html_()


def test_cancelled() -> None:
    """One that is given up says so at once, and begins no further shard."""
    gate = Gate()
    call = _call(gate, concurrency=1)
    assert gate.begun.acquire(timeout=PATIENCE_S)
    call.cancel()
    with pytest.raises(CallCancelledError):
        call.result(PATIENCE_S)
    gate.go.release(2)

    assert call.done()
    assert not gate.begun.acquire(timeout=0.05)
    assert gate.count == 1


def test_time_limit() -> None:
    """One that takes longer than its limit says so."""
    gate = Gate()
    with pytest.raises(CallTimeoutError, match="timeout_s of 0"):
        _call(gate, timeout_s=0.01).result(PATIENCE_S)
    gate.go.release(4)


def test_nobody_holds_it() -> None:
    """One that nobody holds any more begins no further shard."""
    gate = Gate()
    call = _call(gate, concurrency=1)
    assert gate.begun.acquire(timeout=PATIENCE_S)
    del call
    gc.collect()
    gate.go.release(2)

    assert not gate.begun.acquire(timeout=0.05)


def test_stream_waits() -> None:
    """A stream whose values nobody takes holds its function up, and gives all of them in order."""
    gate = Gate()
    gate.go.release(100)
    stream: Stream[Any] = Stream(_call(gate, Mode.STREAM, concurrency=4), ordered=True)
    for _ in range(2):
        assert gate.begun.acquire(timeout=PATIENCE_S)
    assert not gate.begun.acquire(timeout=0.05)

    assert list(stream) == [12, 13, 12, 13, 12, 13, 12, 13]
    assert stream.report["rows"] == 100


def test_too_large() -> None:
    """An answer that no node could give is refused here too."""
    with pytest.raises(ResultTooLargeError):
        _call(lambda batch: np.zeros(70 << 20, np.uint8)).result(PATIENCE_S)
