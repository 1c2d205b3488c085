"""``make bench``: this product and plain Ray, side by side, interleaved; writes docs/benchmarks.md."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks import machine, processes, report, sealed, stages, where
from benchmarks.arithmetic import DATASET, probabilities
from benchmarks.measured import ArgumentCall, AttachTimes, GatewayMemory, Job, Measured, Scale
from benchmarks.plain_ray import FORMS, PlainRay
from ray_gpu import demo_data, nodes
from ray_gpu.advice import Link
from zones.model import Obligations, Shuffle

MIB = 1 << 20
SHARD_MIB, FURTHER_MIB = (1, 4, 16), 4
#: Of a gateway that gets less memory than the volume data set has; and rounds of it.
TIGHT_MIB, TIGHT_ROUNDS = 256, 3
CALL_BYTES = 1024
FULL = Scale(rows=demo_data.RESAMPLED_ROWS, attaches=5, call_rounds=20, calls=100, job_rounds=5, stage_shards=24)
QUICK = Scale(rows=40_000, attaches=1, call_rounds=2, calls=20, job_rounds=1, stage_shards=2)
REPORT = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def main() -> int:
    """Measure, print the report and write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a small table and few repeats: whether it runs, not how fast"
    )
    parser.add_argument(
        "--report", type=Path, help="where the report goes; docs/benchmarks.md, or nowhere with --quick"
    )
    parser.add_argument("--base-port", type=int, default=0, help="first of 2,000 ports; free ones by default")
    options = parser.parse_args()
    os.environ["RAY_GPU_PROGRESS"] = "0"
    target = options.report or (None if options.quick else REPORT)
    measured = run(QUICK if options.quick else FULL, base_port=options.base_port)
    text = report.markdown(measured)
    sys.stdout.write(text)
    if target is not None:
        target.write_text(text, encoding="utf-8")
        say(f"written to {target}")
    return 0


def say(text: str) -> None:
    """Tell where the run is."""
    sys.stderr.write(f"{text}\n")


def run(scale: Scale, *, base_port: int) -> Measured:
    """Start both clusters, measure, and stop them, however it ends."""
    host = machine.describe()
    with sealed.state_directory() as root, contextlib.ExitStack() as stack:
        own_port = base_port or nodes.free_base_port()
        ours = sealed.Sealed(root / "s", base_port=own_port, rows=scale.rows)
        say("starting this product: Vault, three raylets, two custodians, gateway, relay")
        stack.callback(ours.stop)
        ours.start()
        plain = PlainRay(
            root / "r",
            base_port=base_port + 1000 if base_port else nodes.free_base_port(own_port + 1000, last=own_port + 20_000),
            table=ours.table,
        )
        say("starting plain Ray: three raylets, a driver, two actors")
        stack.callback(plain.stop)
        plain.start()
        bench = Bench(scale, ours, plain)
        attach = bench.attach()
        with ours.attach() as bench.session:
            calls = bench.calls()
            jobs = bench.jobs()
            memory = bench.memory()
            call_costs, job_costs = bench.call_costs(), bench.job_costs()
            places, link = bench.places()
            # At the end: it opens leases anew.
            further = bench.further()
            tight = bench.tight(sealed.Sealed(root / "m", base_port=0, rows=scale.rows, memory_bytes=TIGHT_MIB * MIB))
        return Measured(
            machine=host,
            scale=scale,
            attach=attach,
            call=calls,
            jobs=jobs,
            further=further,
            memory=memory,
            tight_mib=TIGHT_MIB,
            tight=tight,
            places=places,
            link=link,
            call_stages=bench.call_stages(root),
            ledger=bench.ledger(root),
            job_stages=bench.job_stages(root),
            call_costs=call_costs,
            job_costs=job_costs,
            degradations=ours.degradations(),
        )


class Bench:
    """The measurements, each interleaved between this product and plain Ray."""

    session: Any

    def __init__(self, scale: Scale, ours: sealed.Sealed, plain: PlainRay) -> None:
        self._scale = scale
        self._ours = ours
        self._plain = plain
        rng = np.random.default_rng(1)
        # Any coefficients would do: what is measured does not depend on them.
        self._coefficients: list[Any] = [rng.normal(size=30), 0.5, rng.normal(size=30), rng.uniform(1, 2, size=30)]
        with pa.memory_map(str(ours.table)) as file:
            table = pa.ipc.open_file(file).read_all()
        self._table = table.select([name for name in table.column_names if name != "target"])
        matrix = np.column_stack([column.to_numpy() for column in self._table.columns])
        self._expected = probabilities(matrix, *self._coefficients)

    def attach(self) -> AttachTimes:
        """From attach to the first result of a session for which nothing is warm."""
        say("attach to first result")
        return AttachTimes(seconds=[sealed.first_result(self._ours) for _ in range(self._scale.attaches)])

    def calls(self) -> ArgumentCall:
        """Small calls, in rounds that take turns."""
        say(f"calls of {CALL_BYTES} bytes")
        value = os.urandom(CALL_BYTES)
        sealed.calls(self.session, value, 50)
        self._plain.calls(50, CALL_BYTES)
        found = ArgumentCall(size=CALL_BYTES)
        for _ in range(self._scale.call_rounds):
            found.ours.append(sealed.calls(self.session, value, self._scale.calls))
            found.ray.append(self._plain.calls(self._scale.calls, CALL_BYTES))
        return found

    def jobs(self) -> list[Job]:
        """The volume job for each size of shard: plain Ray in every form, and this product with every shuffle."""
        found = [Job(shard_mib=size, bytes=self._table.nbytes) for size in SHARD_MIB]
        for shuffle, form in zip(sealed.SHUFFLES, FORMS, strict=False):
            # The second lease, Ray's first transfers and the files' first pages count for neither.
            self._score(shuffle, 4 * MIB)
            self._score_plain(4 * MIB, form)
        for turn in range(self._scale.job_rounds):
            for job in found:
                say(f"volume job, round {turn + 1} of {self._scale.job_rounds}, shards of {job.shard_mib} MiB")
                for form in FORMS:
                    job.ray.setdefault(form, []).append(self._score_plain(job.shard_mib * MIB, form))
                for shuffle in sealed.SHUFFLES:
                    job.ours.setdefault(shuffle, []).append(self._score(shuffle, job.shard_mib * MIB))
        return found

    def _score_plain(self, shard_bytes: int, form: str) -> float:
        plain = [item.tolist() if isinstance(item, np.ndarray) else item for item in self._coefficients]
        seconds, total = self._plain.score(shard_bytes, form, plain)
        assert np.isclose(total, self._expected.sum()), "plain Ray's result is wrong"
        return seconds

    def _score(self, shuffle: str, shard_bytes: int) -> float:
        seconds, result = sealed.score(self.session, shuffle, shard_bytes, self._coefficients)
        assert np.allclose(result, self._expected, rtol=0, atol=1e-12), "a result is wrong"
        return seconds

    def further(self) -> Job:
        """The volume job under further obligations, and with `rows` alone beside them."""
        job = Job(shard_mib=FURTHER_MIB, bytes=self._table.nbytes)
        for turn in range(self._scale.job_rounds):
            say(f"further obligations, round {turn + 1} of {self._scale.job_rounds}")
            for form in FORMS:
                job.ray.setdefault(form, []).append(self._score_plain(FURTHER_MIB * MIB, form))
            for how in ("rows", *sealed.FURTHER):
                # Sizes are a lease's: with others it is another lease, which the first call opens.
                self._score(how, FURTHER_MIB * MIB)
                job.ours.setdefault(how, []).append(self._score(how, FURTHER_MIB * MIB))
        return job

    def memory(self) -> list[GatewayMemory]:
        """The gateway's memory around a volume job of each shuffle."""
        say("memory of the gateway")
        found = []
        for shuffle in sealed.SHUFFLES:
            with processes.watch_memory(self._ours.gateway_pid()) as seen:
                self._score(shuffle, 4 * MIB)
            found.append(GatewayMemory(shuffle=shuffle, seen=seen))
        return found

    def tight(self, small: sealed.Sealed) -> Job:
        """The volume job with a gateway whose memory is less than the data, and beside it with one that has enough."""
        say(f"a gateway of {TIGHT_MIB} MiB")
        job = Job(shard_mib=FURTHER_MIB, bytes=self._table.nbytes)
        with contextlib.ExitStack() as stack:
            stack.callback(small.stop)
            small.start()
            with small.attach() as session:
                for turn in range(-1, min(TIGHT_ROUNDS, self._scale.job_rounds)):
                    for shuffle in sealed.SHUFFLES:
                        seconds, result = sealed.score(session, shuffle, FURTHER_MIB * MIB, self._coefficients)
                        assert np.allclose(result, self._expected, rtol=0, atol=1e-12), "a result is wrong"
                        beside = self._score(shuffle, FURTHER_MIB * MIB)
                        # In the first turn leases are opened.
                        if turn >= 0:
                            job.ours.setdefault(f"{shuffle}, {TIGHT_MIB} MiB", []).append(seconds)
                            job.ours.setdefault(shuffle, []).append(beside)
        return job

    def places(self) -> tuple[list[where.Found], Link]:
        """What is predicted of calls on nodes and here, and what they take."""
        say("where to run")
        return where.measure(self.session, self._scale.job_rounds)

    def job_costs(self) -> dict[str, processes.Cost]:
        """Processor seconds of one volume job by process, this product's and plain Ray's."""
        say("processor time of the volume job")
        repeats, found = self._scale.job_rounds, {}
        for form in FORMS:
            work = functools.partial(self._score_plain, stages.SHARD_BYTES, form)
            found[f"plain Ray, {form}"] = processes.cost(work, self._plain.roles(), repeats)
        for shuffle in sealed.SHUFFLES:
            work = functools.partial(self._score, shuffle, stages.SHARD_BYTES)
            found[shuffle] = processes.cost(work, self._ours.roles(), repeats)
        return found

    def call_costs(self) -> dict[str, processes.Cost]:
        """Processor seconds of one small call by process."""
        say("processor time of a call")
        value, count, rounds = os.urandom(CALL_BYTES), self._scale.calls, self._scale.call_rounds
        ray = processes.cost(lambda: self._plain.calls(count, CALL_BYTES), self._plain.roles(), rounds)
        ours = processes.cost(lambda: sealed.calls(self.session, value, count), self._ours.roles(), rounds)
        return {"plain Ray": ray.per(count), "this product": ours.per(count)}

    def call_stages(self, root: Path) -> list[stages.Stage]:
        """What a small call consists of."""
        say("stages of a call")
        with contextlib.closing(self._gate(root / "c")) as gate:
            return stages.of_call(gate, os.urandom(CALL_BYTES))

    def ledger(self, root: Path) -> list[tuple[str, float]]:
        """What writing down costs."""
        say("the ledger")
        with contextlib.closing(self._gate(root / "l")) as gate:
            return stages.of_ledger(gate)

    def job_stages(self, root: Path) -> dict[str, list[stages.Stage]]:
        """What the volume job consists of, for each shuffle, in shards of 4 MiB."""
        say("stages of the volume job")
        obligations = {
            "none": Obligations(shuffle=Shuffle.NONE),
            "rows": Obligations(shuffle=Shuffle.ROWS),
            "blocks(16)": Obligations(shuffle=Shuffle.BLOCKS, block_rows=16),
        }
        with contextlib.closing(self._gate(root / "j")) as gate:
            return {
                shuffle: stages.of_job(
                    gate, DATASET, self._table, self._coefficients, obligations[shuffle], self._scale.stage_shards
                )
                for shuffle in sealed.SHUFFLES
            }

    def _gate(self, directory: Path) -> stages.Gate:
        return stages.Gate(self._ours.policies, sealed.ZONE, directory)


if __name__ == "__main__":
    sys.exit(main())
