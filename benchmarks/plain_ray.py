"""Plain Ray, as anybody would start it: three raylets, a driver on one, an actor on each of the others.

This module does I/O and starts processes. Ray's own defaults are kept, with what slows it on a small
machine left out: no dashboard, no log monitor, no usage statistics. The driver is a process of its own
(``python -m benchmarks.plain_ray``) that is steered by JSON lines.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import processes
from benchmarks.arithmetic import echo, probabilities, score_table

#: Forms in which a shard can travel to an actor.
FORMS = ("matrix", "table")
_START_TIMEOUT_S = 60.0
#: Second-to-last byte of the raylets' loopback addresses: not the product's.
_NET = 9
_PR_SET_PDEATHSIG = 1


class PlainRay:
    """A plain Ray cluster of three raylets and its driver.

    Args:
        state: Directory for what Ray writes; short, for the socket paths below it.
        base_port: First of about 600 free ports.
        table: Arrow file with the table to score.
    """

    def __init__(self, state: Path, *, base_port: int, table: Path) -> None:
        self._state = state
        self._base_port = base_port
        self._hosts = [f"127.0.{_NET}.{index + 1}" for index in range(3)]
        self._raylets: list[subprocess.Popen[bytes]] = []
        self._table = table
        self._driver: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the raylets and the driver; return when both actors answered."""
        self._state.mkdir(parents=True, exist_ok=True)
        for index in range(3):
            self._raylets.append(self._raylet(index))
            self._await(index)
        arguments = [f"{self._hosts[0]}:{self._base_port}", self._hosts[0], str(self._table)]
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.plain_ray", *arguments],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log("driver"),
            preexec_fn=_die_with_parent,
            env=_environment(),
        )
        self.ask({"op": "warm"})

    def _raylet(self, index: int) -> subprocess.Popen[bytes]:
        first = self._base_port + 10 + 200 * index
        names = (
            "node-manager",
            "object-manager",
            "runtime-env-agent",
            "metrics-export",
            "dashboard-agent-listen",
            "dashboard-agent-grpc",
        )
        ports = [f"--{name}-port={first + offset}" for offset, name in enumerate(names)]
        where = (
            ["--head", f"--port={self._base_port}"] if index == 0 else [f"--address={self._hosts[0]}:{self._base_port}"]
        )
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            *where,
            *ports,
            f"--node-ip-address={self._hosts[index]}",
            f"--temp-dir={self._state}/r{index}",
            "--num-cpus=1",
            f'--resources={{"host-{index}": 1}}',
            "--include-log-monitor=false",
            "--disable-usage-stats",
            f"--min-worker-port={first + 10}",
            f"--max-worker-port={first + 109}",
        ]
        if index == 0:
            command.append("--include-dashboard=false")
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log(f"raylet-{index}"),
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
            env=_environment(),
        )

    def _log(self, name: str) -> Any:
        return open(self._state / f"{name}.log", "ab")

    def _await(self, index: int) -> None:
        """Wait until a raylet's agent answers, the last of its ports to open."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        address = (self._hosts[index], self._base_port + 10 + 200 * index + 2)
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(address, timeout=1).close()
                return
            if self._raylets[index].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"plain Ray did not start; see {self._state}/raylet-{index}.log")
            time.sleep(0.05)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have the driver do something and return what it measured."""
        assert self._driver is not None
        questions, answers = self._driver.stdin, self._driver.stdout
        assert questions is not None
        assert answers is not None
        questions.write(json.dumps(request) + "\n")
        questions.flush()
        line = answers.readline()
        if not line:
            raise RuntimeError(f"plain Ray's driver ended; see {self._state}/driver.log")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def calls(self, count: int, size: int) -> list[float]:
        """Return the seconds of each of *count* calls that carry *size* bytes."""
        return [float(item) for item in self.ask({"op": "calls", "count": count, "size": size})["seconds"]]

    def score(self, shard_bytes: int, form: str, coefficients: list[Any]) -> tuple[float, float]:
        """Score the table; return the seconds, and the sum of all probabilities as a check."""
        answer = self.ask({"op": "score", "shard_bytes": shard_bytes, "form": form, "coefficients": coefficients})
        return float(answer["seconds"]), float(answer["sum"])

    def roles(self) -> dict[str, list[int]]:
        """Return all processes, by role."""
        assert self._driver is not None
        roles = {"benchmarks.plain_ray": "driver", "ray::Scorer": "actors", "raylet/raylet": "raylets"}
        return processes.by_role([self._driver.pid, *(raylet.pid for raylet in self._raylets)], roles, "all others")

    def stop(self) -> None:
        """End driver and raylets, and return when they are gone."""
        processes: list[subprocess.Popen[Any]] = [*([self._driver] if self._driver else []), *reversed(self._raylets)]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": root, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class Scorer:
    """The actor."""

    def echo(self, value: bytes) -> bytes:
        """Return the argument."""
        return echo(value)

    def matrix(self, matrix: Any, *coefficients: Any) -> Any:
        """Score ``float64[rows, 30]``."""
        return probabilities(matrix, *coefficients)

    def table(self, table: pa.Table, *coefficients: Any) -> Any:
        """Score an Arrow table."""
        return score_table(table, *coefficients)


class Driver:
    """What the driver process does for each request."""

    def __init__(self, ray: Any, table: pa.Table) -> None:
        self._ray = ray
        self._table = table
        actor = ray.remote(Scorer)
        self._actors = [actor.options(num_cpus=0, resources={f"host-{index}": 1}).remote() for index in (1, 2)]

    def on_warm(self, _: dict[str, Any]) -> dict[str, Any]:
        """Wait until both actors answer."""
        self._ray.get([actor.echo.remote(b"") for actor in self._actors])
        return {}

    def on_calls(self, request: dict[str, Any]) -> dict[str, Any]:
        """Call one actor again and again."""
        get, method, value = self._ray.get, self._actors[0].echo, os.urandom(request["size"])
        seconds = []
        for _ in range(request["count"]):
            start = time.perf_counter()
            answer = get(method.remote(value))
            seconds.append(time.perf_counter() - start)
            assert answer == value
        return {"seconds": seconds}

    def on_score(self, request: dict[str, Any]) -> dict[str, Any]:
        """Score the whole table on both actors."""
        coefficients = [np.asarray(item) if isinstance(item, list) else item for item in request["coefficients"]]
        form = request["form"]
        start = time.perf_counter()
        references = []
        for index, shard in enumerate(self._shards(request["shard_bytes"])):
            data = shard if form == "table" else _matrix(shard)
            references.append(getattr(self._actors[index % 2], form).remote(data, *coefficients))
        # All at once: waiting for one result after another made Ray up to 20 times slower here.
        parts = self._ray.get(references)
        result = np.concatenate(parts)
        return {"seconds": time.perf_counter() - start, "sum": float(result.sum()), "rows": len(result)}

    def _shards(self, shard_bytes: int) -> Iterator[pa.Table]:
        rows = max(1, shard_bytes // (8 * self._table.num_columns))
        for start in range(0, self._table.num_rows, rows):
            yield self._table.slice(start, rows)


def _matrix(table: pa.Table) -> Any:
    out = np.empty((table.num_rows, table.num_columns))
    for index, column in enumerate(table.columns):
        out[:, index] = column.to_numpy()
    return out


def main(argv: list[str]) -> None:
    """Be the driver. ``argv``: address of the GCS, own address, Arrow file."""
    import ray  # noqa: PLC0415 - the driver alone loads Ray

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints must not mix with answers
    address, host, path = argv
    ray.init(address=address, _node_ip_address=host, log_to_driver=False)
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    table = table.select([name for name in table.column_names if name != "target"])
    driver = Driver(ray, table)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(getattr(driver, f"on_{request['op']}")(request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
