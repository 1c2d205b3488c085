"""The report, as Markdown. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.measured import ArgumentCall, GatewayMemory, Job, Measured
from benchmarks.stages import Stage

_INTRODUCTION = """\
# Benchmarks

Written by `make bench`. Both sides ran at the same time of day on the same machine and took turns; numbers are medians, and
ratios are medians of the rounds' ratios. This product was called through its public API, with policy, the durable ledger,
padding and sandboxes on; nothing in it exists for this benchmark. Plain Ray ran as `ray start` makes it, three raylets with
the driver on one and an actor on each of the others, without token, TLS, dashboard and log monitor, which makes it faster.
Both compute the same NumPy function on the same table. All processes share the machine's cores.
"""


def markdown(found: Measured) -> str:
    """Return the whole report."""
    parts = [
        _INTRODUCTION,
        _table(("machine", ""), found.machine.items()),
        f"Sandbox: {_sandbox(found.degradations)}. {_scale(found)}\n",
        "## Targets\n",
        _table(("measured", "target", "found", "met"), _targets(found)),
        f"## A call of {found.call.size:,} bytes\n",
        f"`f.remote(value).result()` against `ray.get(actor.f.remote(value))`; the value goes there and comes back. "
        f"{len(found.call.ours)} rounds of {len(found.call.ours[0])} calls each.\n",
        _table(("", "p50 ms", "p95 ms"), _calls(found.call)),
        _stages_of_call(found),
        f"## The volume job: {found.jobs[0].bytes / 1e6:,.0f} MB\n",
        "`f.map(table)` on two actors, from the memory-mapped table to the probabilities of all rows in order. Plain Ray gets "
        "every shard at once, as a matrix that the driver builds or as an Arrow table; ratios are against the faster one.\n",
        _table(("shards", "run", "seconds", "MB/s", "ratio"), _jobs(found.jobs)),
        _costs(found),
        _stages_of_job(found),
        "## Memory of the gateway\n",
        "Anonymous and shared memory (`RssAnon` and `RssShmem` of `/proc/<pid>/status`), looked at every 5 ms during a volume "
        "job in shards of 4 MiB; pages of the memory-mapped data set are the data, and stand in a column of their own.\n",
        _table(("shuffle", "before MB", "peak MB", "after MB", "grown MB", "data pages MB"), _memory(found.memory)),
        "## Attach to first result\n",
        "A session for which nothing is warm: Vault login, policy, a GPU actor placed by Ray, grant, keys, keeper and sandbox "
        "started, one call. Seconds of each: " + ", ".join(f"{second:.2f}" for second in found.attach.seconds) + ".\n",
    ]
    return "\n".join(parts)


def _sandbox(degradations: Sequence[str]) -> str:
    return f"degraded: {', '.join(degradations)}" if degradations else "strict"


def _scale(found: Measured) -> str:
    scale = found.scale
    return f"{scale.rows:,} rows, {scale.job_rounds} rounds of the volume job."


def _table(head: Sequence[str], rows: object) -> str:
    lines = [list(head), ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]  # type: ignore[attr-defined]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _targets(found: Measured) -> list[tuple[str, str, str, str]]:
    attach, grown = statistics.median(found.attach.seconds), max(item.seen.grown for item in found.memory) / 1e6
    rows = [
        (
            f"call of {found.call.size:,} bytes, p50 by plain Ray's",
            "at most 0.80",
            f"{found.call.ratio():.2f}",
            _met(found.call.ratio() <= 0.8),
        )
    ]
    for shuffle, least in (("none", 1.5), ("blocks(16)", 1.0), ("rows", 0.0)):
        for job in found.jobs:
            ratio = job.ratio(shuffle)
            rows.append(
                (
                    f"bytes/s by plain Ray's, `{shuffle}`, shards of {job.shard_mib} MiB",
                    f"at least {least:.1f}" if least else "reported",
                    f"{ratio:.2f}",
                    _met(ratio >= least) if least else "",
                )
            )
    rows.append(("attach to first result", "at most 5 s", f"{attach:.2f} s", _met(attach <= 5)))
    rows.append(("gateway's memory above the data", "at most 200 MB", f"{grown:.0f} MB", _met(grown <= 200)))
    return rows


def _met(met: bool) -> str:
    return "yes" if met else "no"


def _calls(call: ArgumentCall) -> list[tuple[str, str, str]]:
    return [
        (name, *(f"{np.percentile(np.concatenate(rounds), percent) * 1e3:.3f}" for percent in (50, 95)))
        for name, rounds in (("this product", call.ours), ("plain Ray", call.ray))
    ]  # type: ignore[misc]


def _jobs(jobs: Sequence[Job]) -> list[tuple[str, ...]]:
    rows = []
    for job in jobs:
        for form, seconds in job.ray.items():
            rows.append(_job(job, f"plain Ray, {form}", seconds, "1" if form == job.best_form() else ""))
        for shuffle, seconds in job.ours.items():
            rows.append(_job(job, f"this product, `{shuffle}`", seconds, f"{job.ratio(shuffle):.2f}"))
    return rows


def _job(job: Job, name: str, seconds: Sequence[float], ratio: str) -> tuple[str, ...]:
    median = statistics.median(seconds)
    return f"{job.shard_mib} MiB", name, f"{median:.2f}", f"{job.bytes / median / 1e6:,.0f}", ratio


def _memory(memory: Sequence[GatewayMemory]) -> list[tuple[str, ...]]:
    rows = []
    for item in memory:
        seen = item.seen
        before, after = (status["RssAnon"] + status["RssShmem"] for status in (seen.before, seen.after))
        rows.append(
            (
                f"`{item.shuffle}`",
                *(f"{size / 1e6:.0f}" for size in (before, seen.peak, after, seen.grown, seen.peak_file)),
            )
        )
    return rows


def _stages_of_call(found: Measured) -> str:
    total = statistics.median(statistics.median(calls) for calls in found.call.ours)
    head = "### Where the time of a call goes\n\nEach stage alone, with the product's own functions, warm, in one process.\n"
    rows = [(name, where, f"{seconds * 1e6:,.0f}") for name, where, seconds in found.call_stages]
    stages = sum(seconds for _, _, seconds in found.call_stages)
    rows.append(("**sum**", "", f"{stages * 1e6:,.0f}"))
    rows.append(
        ("remainder: cold caches, thread switches and Python between the stages", "", f"{(total - stages) * 1e6:,.0f}")
    )
    rows.append(("**measured, p50**", "", f"{total * 1e6:,.0f}"))
    return head + "\n" + _table(("stage", "where", "µs"), rows)


def _costs(found: Measured) -> str:
    head = (
        "### Processor seconds of one job, by process\n\nShards of 4 MiB. What all processes use together, divided by the "
        "cores, is the least that a job can take.\n"
    )
    rows = []
    for run, costs in found.job_costs.items():
        parts = ", ".join(f"{role} {seconds:.2f}" for role, seconds in costs.items() if role != "wall")
        total = sum(seconds for role, seconds in costs.items() if role != "wall")
        rows.append((run, f"{costs['wall']:.2f}", f"{total:.2f}", parts))
    return head + "\n" + _table(("run", "seconds", "processor seconds", "of which"), rows)


def _stages_of_job(found: Measured) -> str:
    head = (
        "### Where the processor time of the volume job goes\n\nEach stage alone on the same shards of 4 MiB, one process, "
        "summed over all shards; seconds. Stages of different shards overlap in the product, on all cores.\n"
    )
    shuffles = list(found.job_stages)
    names = [(name, where) for name, where, _ in found.job_stages[shuffles[0]]]
    columns = {shuffle: _seconds(found.job_stages[shuffle]) for shuffle in shuffles}
    rows = [(name, where, *(f"{columns[shuffle][name]:.3f}" for shuffle in shuffles)) for name, where in names]
    sums = {shuffle: sum(columns[shuffle].values()) for shuffle in shuffles}
    used = {shuffle: _used(found, shuffle) for shuffle in shuffles}
    rows.append(("**sum**", "", *(f"{sums[shuffle]:.3f}" for shuffle in shuffles)))
    rows.append(
        (
            "remainder: page faults, waking processes, Python between the stages",
            "",
            *(f"{used[shuffle] - sums[shuffle]:.3f}" for shuffle in shuffles),
        )
    )
    rows.append(("**measured processor seconds**", "", *(f"{used[shuffle]:.3f}" for shuffle in shuffles)))
    return head + "\n" + _table(("stage", "where", *(f"`{shuffle}`" for shuffle in shuffles)), rows)


def _used(found: Measured, shuffle: str) -> float:
    return sum(seconds for role, seconds in found.job_costs[f"this product, {shuffle}"].items() if role != "wall")


def _seconds(stages: Sequence[Stage]) -> dict[str, float]:
    return {name: seconds for name, _, seconds in stages}
