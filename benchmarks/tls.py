"""``make bench-tls``: what Ray's TLS and token cost the data path; writes docs/benchmarks-tls.md. Needs root.

Two clusters of several hosts (see :mod:`testbed`) run at once and take turns: this product, and a copy of it in which
Ray's processes use neither TLS nor token. The data connection goes past Ray, so both should take the same time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from attacks.catalogue.mutation import Edit
from attacks.mutants import apply
from benchmarks import machine
from testbed import Testbed, lacking
from testbed.bed import HOSTS as ONE_OF_EACH
from testbed.cluster import BedCluster

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "benchmarks-tls.md"
ROUNDS, CALLS = 24, 300
#: What the copy lacks.
WITHOUT = (
    Edit(file="ray_gpu/node_identity.py", old='"RAY_USE_TLS": "1"', new='"RAY_USE_TLS": "0"'),
    Edit(file="ray_gpu/node_identity.py", old='"RAY_AUTH_MODE": "token"', new='"RAY_AUTH_MODE": "disabled"'),
    # It shakes hands by TLS.
    Edit(
        file="ray_gpu/node.py",
        old='if config.role != "head":\n            head_probe',
        new="if False:\n            head_probe",
    ),
)
#: A person's script on a zone's host: for each line that it reads, one session, and a line with what it measured.
_SCRIPT = """
import os, statistics, time
from ray_gpu.examples import score
os.environ["RAY_GPU_PROGRESS"] = "0"
CALLS = %d
@ray_gpu.gpu_remote(concurrency=1)
def echo(value):
    return value
value, rng = bytes(1024), np.random.default_rng(1)
model = [rng.normal(size=30), 0.5, rng.normal(size=30), rng.uniform(1, 2, size=30)]
def once():
    with attach() as zone:
        columns = [name for name in zone.datasets["breast_cancer_resampled"] if name != "target"]
        data = zone.read("breast_cancer_resampled", columns=columns)
        job = score.options(columns=columns, shard_bytes=4 << 20)
        echo.remote(value).result()
        job.map(data, *model)
        seconds = []
        for _ in range(CALLS):
            start = time.perf_counter()
            assert echo.remote(value).result() == value
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        job.map(data, *model)
        return {"call": statistics.median(seconds), "job": time.perf_counter() - start}
print(json.dumps(once()), flush=True)
for _ in sys.stdin:
    print(json.dumps(once()), flush=True)
"""
_INTRODUCTION = """\
# What TLS and token of Ray cost the data path

Written by `make bench-tls`. Two clusters of several hosts on one machine, brought up by `ray up`, ran at the same time
and took turns: this product with all controls on, and a copy of it in which Ray's processes use neither TLS nor token.
{rounds} rounds on each side, each in a session of its own through the public API. The interval holds the median ratio
with 95 % probability (order statistics); the target is that it includes 1.
"""
#: Longest that `ray up` may take until every node is ready, seconds.
MOST_UP_S = 90.0
_NO = "**no**"
#: What is measured, in the report's words.
_MEASURED = {
    "call": f"call of 1,024 bytes, p50 of {CALLS}, ms",
    "job": "volume job, 300 MB in shards of 4 MiB, ms",
}


@dataclass(slots=True)
class Side:
    """One of the two: a process with a bed of its own, which measures when it is told to."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, tree: Path) -> Side:
        """Start it with the product as it stands below *tree*."""
        command = [sys.executable, "-m", "benchmarks.tls", "--side"]
        environment = {"PYTHONPATH": str(tree), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        pipe = subprocess.PIPE
        return cls(subprocess.Popen(command, cwd=tree, env=environment, stdin=pipe, stdout=pipe, text=True))

    def measure(self) -> dict[str, Any]:
        """Return one round's seconds by what was measured."""
        _pipe(self.process.stdin).write("\n")
        _pipe(self.process.stdin).flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """Return the next thing that it says."""
        line = _pipe(self.process.stdout).readline()
        if not line:
            raise RuntimeError(f"a cluster ended with status {self.process.wait()}; see what it said above")
        said: dict[str, Any] = json.loads(line)
        return said

    def stop(self) -> None:
        """End it and its bed."""
        _pipe(self.process.stdin).close()
        self.process.wait(60)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def without_tls(target: Path) -> None:
    """Copy this project to *target* and take TLS and token away from Ray there."""
    for name in ("zones", "ray_gpu", "testbed", "attacks", "benchmarks", "policies", "examples"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "cluster.yaml", target)
    for edit in WITHOUT:
        apply(edit, target)


def serve() -> None:
    """Be one side: bring a cluster up, and pass lines on to a person's script on the zone's host."""
    roles = {name: role for name, role in ONE_OF_EACH.items() if name != "zone-trading"}
    with Testbed(roles) as bed, BedCluster(bed) as cluster:
        started = time.monotonic()
        cluster.up()
        up_s = time.monotonic() - started
        cluster.join("clinic")
        joined_s = time.monotonic() - started
        script = cluster.begin_call("clinic", _SCRIPT % CALLS)
        tls = "RAY_USE_TLS=1" in bed["head"].run(["sh", "-c", "cat /proc/[0-9]*/environ | tr '\\0' '\\n'"]).stdout
        print(json.dumps({"tls": tls, "up_s": up_s, "joined_s": joined_s}), flush=True)
        print(_pipe(script.stdout).readline(), end="", flush=True)
        for line in sys.stdin:
            _pipe(script.stdin).write(line)
            _pipe(script.stdin).flush()
            print(_pipe(script.stdout).readline(), end="", flush=True)
        _, said = script.communicate("", 30)
        sys.stderr.write(said)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return an interval that holds the median with at least 95 % probability, whatever the distribution.

    The order statistics of the sign test: see Conover, Practical Nonparametric Statistics, section 3.2.
    """
    ordered, count = sorted(values), len(values)
    weights = [1.0]
    for k in range(1, count + 1):
        weights.append(weights[-1] * (count - k + 1) / k)
    below, rank = 0.0, 0
    while below + weights[rank] <= 0.025 * 2**count:
        below += weights[rank]
        rank += 1
    if rank == 0:
        raise ValueError(f"{count} values are too few for 95 %; measure at least 6 rounds")
    return ordered[rank - 1], ordered[count - rank]


def markdown(
    rounds: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], host: Mapping[str, str], up: Mapping[str, float]
) -> str:
    """Return the report: pairs of seconds with and without TLS, by what was measured, and how long `ray up` took."""
    rows = []
    for what, words in _MEASURED.items():
        ratios = [ours[what] / bare[what] for ours, bare in rounds]
        low, high = interval(ratios)
        times = [f"{statistics.median(side[what] for side in sides) * 1e3:.3f}" for sides in zip(*rounds, strict=True)]
        met = "yes" if low <= 1.0 <= high else _NO
        rows.append(
            f"| {words} | {times[0]} | {times[1]} | {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} | {met} |"
        )
    facts = [f"| {name} | {value} |" for name, value in host.items()]
    return "\n".join(
        [
            _INTRODUCTION.format(rounds=len(rounds)),
            "| machine |  |",
            "| --- | --- |",
            *facts,
            "",
            "| measured | TLS and token | neither | median ratio | 95 % interval | includes 1 |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"`ray up` took {up['up_s']:.0f} s until head and both GPU hosts were ready, over SSH, with TLS and token; "
            f"with the zone's node, which joins by itself, {up['joined_s']:.0f} s. "
            f"The target is less than {MOST_UP_S:.0f} s: "
            f"{'met' if up['joined_s'] < MOST_UP_S else _NO}.",
            "",
        ]
    )


def main() -> int:
    """Measure, print the report and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of rounds, at least 6")
    parser.add_argument("--report", type=Path, default=REPORT, help="where the report goes")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve()
        return 0
    if reason := lacking():
        sys.stderr.write(f"error: {reason}\n")
        return 1
    host, sides, said = machine.describe(), [], []
    with tempfile.TemporaryDirectory(prefix="rgt") as directory:
        copy = Path(directory)
        copy.chmod(0o755)
        without_tls(copy)
        try:
            for tree in (ROOT, copy):
                sys.stderr.write(f"starting a cluster {'with' if tree is ROOT else 'without'} TLS and token\n")
                sides.append(Side.start(tree))
                said.append(sides[-1].read())
            assert [one["tls"] for one in said] == [True, False], said
            for side in sides:
                side.read()  # the first session warms Ray up
            rounds = []
            for number in range(options.rounds):
                sys.stderr.write(f"round {number + 1} of {options.rounds}\n")
                # Whoever is second in a round is first in the next.
                order = sides if number % 2 else sides[::-1]
                found = {id(side): side.measure() for side in order}
                rounds.append((found[id(sides[0])], found[id(sides[1])]))
        finally:
            for side in sides:
                side.stop()
    text = markdown(rounds, host, said[0])
    sys.stdout.write(text)
    options.report.write_text(text, encoding="utf-8")
    return 1 if _NO in text else 0


if __name__ == "__main__":
    sys.exit(main())
