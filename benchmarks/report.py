"""The report, as Markdown. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks import where
from benchmarks.measured import ArgumentCall, GatewayMemory, Job, Measured
from benchmarks.processes import own_bytes

_INTRODUCTION = """\
# Benchmarks

Written by `make bench`; every number comes from one run of it on the machine below. Both sides ran there at the same
time and took turns. Times are medians, and ratios are medians of the rounds' ratios.

This product is called through its public API, with policy, the durable ledger, padding and sandboxes on; nothing in
it exists for this benchmark. The policies are the shipped ones but for two things: the volume data set stands in the
catalog once for each set of obligations, and a session may send as many small calls as the benchmark makes. Plain Ray
runs as `ray start` makes it: three raylets, the driver on one, an actor on each of the others, without token, TLS,
dashboard and log monitor, which only makes it faster. Both compute the same NumPy function on the same table. All
processes share the machine's cores.
"""
_CALL = """\
## A call of {size:,} bytes

`f.remote(value).result()` against `ray.get(actor.f.remote(value))`. The value goes there and comes back; {rounds}
rounds of {calls} calls on each side.
"""
_CALL_STAGES = """\
### Where the time of a call goes

Each stage alone, with the product's own functions, warm, in one process.
"""
_LEDGER = """\
### What the ledger costs

Entries are durable when the writer goes on. A decision is remembered and an intent reserves 1,000 calls, so a small
call pays for neither.
"""
_CALL_COSTS = """\
### Processor time of a call, by process
"""
_JOB = """\
## The volume job: {size:,.0f} MB

`f.map(table)` on two actors, from the memory-mapped table to the probabilities of all rows in order; {rounds} rounds.
Plain Ray gets all shards at once and gives all results at once, which was its fastest way, as matrices that the
driver builds or as Arrow tables. Ratios are against the faster of the two.
"""
_FURTHER = """\
### What further obligations cost

The same job in shards of {mib} MiB, in rounds of its own, with obligations that a zone may demand besides: its time by
that with `rows` alone, and plain Ray's by it. Coarse padding makes a shard of a little over {mib} MiB twice as large on
the wire; sizes are a lease's, so each time the first call, which may open leases, is not counted.
"""
_JOB_COSTS = """\
### Processor time of the volume job, by process

Shards of 4 MiB. The processor time of all processes, divided by the number of cores, is the least time that a job
takes.
"""
_JOB_STAGES = """\
### Where the processor time of the volume job goes

Each stage alone, in one process, on the same shards of 4 MiB, in processor seconds for all shards together. In the
product, stages of different shards overlap on all cores.
"""
_MEMORY = """\
## Memory of the gateway

Anonymous and shared memory (`RssAnon` and `RssShmem` of `/proc/<pid>/status`), looked at every 5 ms during a volume
job in shards of 4 MiB. Pages of the memory-mapped data set (`RssFile`) are the data; they stand in a column of their
own.
"""
_TIGHT = """\
## Data larger than memory

The volume job in shards of {mib} MiB with a gateway whose control group caps it at {tight} MiB, page cache included:
less than the data set has. What a shuffle would gather from everywhere goes once through a nameless file on the zone's
disk. Beside it, in the same rounds, a gateway with all of the machine's memory.
"""
_ATTACH = """\
## Attach to first result

A session for which nothing is warm: Vault login, policy, an actor placed by Ray, grant, keys, keeper and sandbox
started, one call. Seconds of each session: {seconds}.
"""


def markdown(found: Measured) -> str:
    """Return the whole report."""
    call, job = found.call, found.jobs[0]
    seconds = ", ".join(f"{second:.2f}" for second in found.attach.seconds)
    parts = [
        _INTRODUCTION,
        _table(("machine", ""), [*found.machine.items(), ("sandboxes", _sandbox(found.degradations))]),
        "## Targets\n",
        _table(("measured", "target", "found", "met"), _targets(found)),
        _CALL.format(size=call.size, rounds=len(call.ours), calls=len(call.ours[0])),
        _table(("", "p50 ms", "p95 ms"), _calls(call)),
        _ratios(call),
        _CALL_STAGES,
        _table(("stage", "where", "µs"), _call_stages(found)),
        _LEDGER,
        _table(("", "µs"), [(name, f"{seconds * 1e6:,.1f}") for name, seconds in found.ledger]),
        _CALL_COSTS,
        _table(("", "processor µs", "of which"), _call_costs(found)),
        _JOB.format(size=job.bytes / 1e6, rounds=found.scale.job_rounds),
        _table(("shards", "", "seconds", "MB/s", "ratio"), _jobs(found.jobs)),
        *_further(found.further),
        _JOB_COSTS,
        _table(("", "seconds", "processor seconds", "of which"), _job_costs(found)),
        _JOB_STAGES,
        _table(("stage", "where", *(f"`{shuffle}`" for shuffle in found.job_stages)), _job_stages(found)),
        _MEMORY,
        _table(("shuffle", "before MB", "peak MB", "grown MB", "after MB", "data MB"), _memory(found.memory)),
        _TIGHT.format(mib=found.tight.shard_mib, tight=found.tight_mib),
        _table(("shuffle", "seconds", "MB/s", "of the time with all memory"), _tight(found)),
        where.section(found.places, found.link, found.scale.job_rounds),
        _ATTACH.format(seconds=seconds),
    ]
    return "\n".join(parts)


def _sandbox(degradations: Sequence[str]) -> str:
    return f"degraded: {', '.join(degradations)}" if degradations else "strict"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _targets(found: Measured) -> list[tuple[str, str, str, str]]:
    attach = statistics.median(found.attach.seconds)
    grown = max(item.seen.grown for item in found.memory) / 1e6
    ratio = found.call.ratio()
    rows = [
        (f"call of {found.call.size:,} bytes, p50 / plain Ray's", "at most 0.80", f"{ratio:.2f}", _met(ratio <= 0.8))
    ]
    for shuffle, least in (("none", 1.5), ("blocks(16)", 1.2), ("rows", 1.0)):
        for job in found.jobs:
            what = f"`{shuffle}`, shards of {job.shard_mib} MiB: bytes/s / plain Ray's"
            ratio = job.ratio(shuffle)
            rows.append((what, f"at least {least:.1f}", f"{ratio:.2f}", _met(ratio >= least)))
    rows.append(("attach to first result", "at most 5 s", f"{attach:.2f} s", _met(attach <= 5)))
    rows.append(("memory of the gateway above the data", "at most 200 MB", f"{grown:.0f} MB", _met(grown <= 200)))
    return rows


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def _ratios(call: ArgumentCall) -> str:
    low, middle, high = np.percentile(call.ratios(), (25, 50, 75))
    rounds = len(call.ratios())
    return f"p50 by plain Ray's p50, over {rounds} rounds: median {middle:.2f}, quartiles {low:.2f} and {high:.2f}."


def _calls(call: ArgumentCall) -> list[tuple[str, str, str]]:
    rows = []
    for name, rounds in (("this product", call.ours), ("plain Ray", call.ray)):
        p50, p95 = np.percentile(np.concatenate(rounds), (50, 95)) * 1e3
        rows.append((name, f"{p50:.3f}", f"{p95:.3f}"))
    return rows


def _call_stages(found: Measured) -> list[tuple[str, str, str]]:
    total = float(np.percentile(np.concatenate(found.call.ours), 50))
    stages = sum(seconds for _, _, seconds in found.call_stages)
    return [
        *((name, where, _micros(seconds)) for name, where, seconds in found.call_stages),
        ("**sum**", "", _micros(stages)),
        (
            "remainder: cold caches, system calls, waiting for a core, Python between stages",
            "",
            _micros(total - stages),
        ),
        ("**measured, p50**", "", _micros(total)),
    ]


def _call_costs(found: Measured) -> list[tuple[str, str, str]]:
    rows = []
    for side, cost in found.call_costs.items():
        parts = ", ".join(f"{role} {_micros(seconds)}" for role, seconds in cost.cpu.items())
        rows.append((side, _micros(cost.total), parts))
    return rows


def _micros(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def _jobs(jobs: Sequence[Job]) -> list[tuple[str, ...]]:
    rows = []
    for job in jobs:
        for form, seconds in job.ray.items():
            rows.append(_job(job, f"plain Ray, {form}", seconds, "1" if form == job.best_form() else ""))
        for shuffle, seconds in job.ours.items():
            rows.append(_job(job, f"this product, `{shuffle}`", seconds, f"{job.ratio(shuffle):.2f}"))
    return rows


def _further(job: Job) -> list[str]:
    rows = []
    for how, seconds in job.ours.items():
        _, *shown = _job(job, how, seconds, f"{job.cost(how):.2f}")
        rows.append((*shown, f"{job.ratio(how):.2f}"))
    return [_FURTHER.format(mib=job.shard_mib), _table(("", "seconds", "MB/s", "by `rows`", "ratio"), rows)]


def _tight(found: Measured) -> list[tuple[str, ...]]:
    rows, job = [], found.tight
    for name, seconds in job.ours.items():
        shuffle, comma, _ = name.partition(f", {found.tight_mib} MiB")
        if comma:
            _, *shown = _job(job, f"`{shuffle}`", seconds, f"{job.cost(name, shuffle):.2f}")
            rows.append(tuple(shown))
    return rows


def _job(job: Job, name: str, seconds: Sequence[float], ratio: str) -> tuple[str, ...]:
    median = statistics.median(seconds)
    return f"{job.shard_mib} MiB", name, f"{median:.2f}", f"{job.bytes / median / 1e6:,.0f}", ratio


def _job_costs(found: Measured) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, cost in found.job_costs.items():
        parts = ", ".join(f"{role} {seconds:.2f}" for role, seconds in cost.cpu.items())
        shown = name if name.startswith("plain") else f"this product, `{name}`"
        rows.append((shown, f"{cost.seconds:.2f}", f"{cost.total:.2f}", parts))
    return rows


def _job_stages(found: Measured) -> list[tuple[str, ...]]:
    shuffles = list(found.job_stages)
    by_name = {shuffle: {name: seconds for name, _, seconds in found.job_stages[shuffle]} for shuffle in shuffles}
    sums = {shuffle: sum(by_name[shuffle].values()) for shuffle in shuffles}
    used = {shuffle: found.job_costs[shuffle].total for shuffle in shuffles}
    rows: list[tuple[str, ...]] = [
        (name, where, *(f"{by_name[shuffle][name]:.3f}" for shuffle in shuffles))
        for name, where, _ in found.job_stages[shuffles[0]]
    ]
    rest = "remainder: system calls, page faults, Python between stages"
    rows.append(("**sum**", "", *(f"{sums[shuffle]:.3f}" for shuffle in shuffles)))
    rows.append((rest, "", *(f"{used[shuffle] - sums[shuffle]:.3f}" for shuffle in shuffles)))
    rows.append(("**measured**", "", *(f"{used[shuffle]:.3f}" for shuffle in shuffles)))
    return rows


def _memory(memory: Sequence[GatewayMemory]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for item in memory:
        seen = item.seen
        sizes = (own_bytes(seen.before), seen.peak, seen.grown, own_bytes(seen.after), seen.peak_file)
        rows.append((f"`{item.shuffle}`", *(f"{size / 1e6:.0f}" for size in sizes)))
    return rows
