"""Runs the demo's functions in one sandbox, as a keeper would, without a cluster; Ray need not be installed.

``python sandboxed.py JSON`` with ``{"gpu": bool}`` prints ``{"device": ..., "level": ..., ...}``. No key and no
connection: a socket and shared memory as :mod:`ray_gpu.sandbox` wants them, and the protocol of its child.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
from typing import Any

import numpy as np
import pyarrow as pa

from ray_gpu import demo_data, examples, functions
from ray_gpu.outcome import open_outcome
from ray_gpu.sandbox import boundary, memory
from ray_gpu.wire import recv_message, send_message
from zones import values
from zones.model import sandbox_level

#: A lease's; unused without root.
UID = 61011
MEMORY_BYTES = 8 << 30
#: CUDA's first start compiles and loads for many seconds.
ANSWER_TIMEOUT_S = 120.0
SHARDS = 3


class Sandbox:
    """The keeper's end of one sandbox."""

    def __init__(self, *, gpu: bool) -> None:
        slots = memory.create()
        self._sock, theirs = socket.socketpair()
        self._memory = memory.SlotMap(mmap.mmap(slots, 0))
        self.process = boundary.launch_sandbox(
            uid=UID, memory_bytes=MEMORY_BYTES, name="gpu-test", fds=(theirs.fileno(), slots),
            devices=boundary.gpu_devices() if gpu else (),
        )  # fmt: skip
        theirs.close()
        os.close(slots)
        self._sock.settimeout(ANSWER_TIMEOUT_S)
        self.ready, _ = recv_message(self._sock)
        self._ids = 0

    def _ask(self, message: dict[str, Any], payload: bytes | bytearray) -> dict[str, Any]:
        self._memory.payload(0, len(payload))[:] = payload
        send_message(self._sock, {**message, "slot": 0, "bytes": len(payload)})
        answer, _ = recv_message(self._sock)
        return answer

    def map(self, function: Any, tables: list[pa.Table], *args: Any) -> list[Any]:
        """Return what *function*, a remote function or a plain one, returns for each table."""
        plain = getattr(function, "__wrapped__", function)
        number = self._ids = self._ids + 1
        self._ask({"op": "function", "id": number}, functions.pack(plain))
        self._ask({"op": "arguments", "id": number, "function": number}, values.encode([list(args), {}]))
        return [self._run(number, table) for table in tables]

    def _run(self, number: int, table: pa.Table) -> Any:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        answer = self._ask({"op": "run", "arguments": number}, sink.getvalue().to_pybytes())
        outcome = open_outcome(memoryview(bytes(self._memory.out_view(answer["slot"])[: answer["bytes"]])))
        send_message(self._sock, {"op": "free", "free": [answer["slot"]]})
        return values.decode(outcome.encoded)


def inside(batch: Any) -> dict[str, Any]:
    """Say what the sandbox computes with, and whether anything of Ray is loaded in it."""
    import sys

    total = batch.xp.sum(batch["mdvis"])
    loaded = sorted(name for name in sys.modules if name == "ray" or name.startswith("ray."))
    return {"array": f"{type(total).__module__}.{type(total).__name__}", "ray": loaded}


def cut(table: pa.Table) -> list[pa.Table]:
    """Return the table in pieces."""
    rows = -(-table.num_rows // SHARDS)
    return [table.slice(start, rows).combine_chunks() for start in range(0, table.num_rows, rows)]


def largest_difference(got: Any, expected: Any) -> float:
    """Return the largest absolute difference of two arrays."""
    return float(np.max(np.abs(np.asarray(got) - np.asarray(expected))))


def main() -> None:
    """See the module."""
    randhie = demo_data.randhie().select(examples.RANDHIE_COLUMNS)
    cancer = demo_data.breast_cancer()
    cancer = cancer.drop_columns(["target"])
    matrix = np.column_stack([cancer[name].to_numpy() for name in cancer.column_names])
    mean, scale = matrix.mean(axis=0), matrix.std(axis=0)
    weights = np.linspace(-1, 1, matrix.shape[1])
    sandbox = Sandbox(gpu=json.loads(sys.argv[1])["gpu"])
    try:
        about = sandbox.map(inside, [randhie])[0]
        fitted = examples.solve(sandbox.map(examples.statistics, cut(randhie)))
        scored = np.concatenate(sandbox.map(examples.score, cut(cancer), weights, 0.5, mean, scale))
    finally:
        sandbox.process.end()
    expected = 1 / (1 + np.exp(-((matrix - mean) / scale @ weights + 0.5)))
    sys.stdout.write(json.dumps({
        **about, "device": sandbox.ready["device"], "missing": sandbox.ready["missing"],
        "level": sandbox_level(boundary.degradations()), "rows": len(scored),
        "fit": largest_difference(fitted, examples.least_squares(randhie)),
        "score": largest_difference(scored, expected),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
