"""What a run found. Pure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from benchmarks.processes import Cost, Memory
from benchmarks.stages import Stage
from benchmarks.where import Found
from ray_gpu.advice import Link


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much a run measures."""

    #: Rows of the volume data set.
    rows: int
    attaches: int
    call_rounds: int
    #: Calls of each round.
    calls: int
    job_rounds: int
    #: Shards that are taken through the stages one by one.
    stage_shards: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachTimes:
    """Seconds from attach to the first result."""

    seconds: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentCall:
    """Calls on arguments alone: the seconds of each, by round."""

    size: int
    ours: list[list[float]] = field(default_factory=list)
    ray: list[list[float]] = field(default_factory=list)

    def ratio(self) -> float:
        """Median over the rounds of this product's median by plain Ray's of the same round."""
        return statistics.median(self.ratios())

    def ratios(self) -> list[float]:
        """This product's median by plain Ray's, for each round."""
        pairs = zip(self.ours, self.ray, strict=True)
        return [statistics.median(ours) / statistics.median(ray) for ours, ray in pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The volume job with one size of shard: seconds by round, for each shuffle and each form of plain Ray."""

    shard_mib: int
    bytes: int
    ours: dict[str, list[float]] = field(default_factory=dict)
    ray: dict[str, list[float]] = field(default_factory=dict)

    def best_form(self) -> str:
        """Return the form in which plain Ray was fastest."""
        return min(self.ray, key=lambda form: statistics.median(self.ray[form]))

    def ratio(self, how: str) -> float:
        """Median over the rounds of plain Ray's best seconds by this product's: above 1, this product is faster."""
        return _ratio(self.ray[self.best_form()], self.ours[how])

    def cost(self, how: str, beside: str = "rows") -> float:
        """Median over the rounds of the seconds of one way by those of another."""
        return _ratio(self.ours[how], self.ours[beside])


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayMemory:
    """The gateway's memory around one volume job."""

    shuffle: str
    seen: Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Everything that a run found."""

    #: Name to value, in the order to show.
    machine: dict[str, str]
    scale: Scale
    attach: AttachTimes
    call: ArgumentCall
    jobs: list[Job]
    #: ``rows``, alone and with further obligations.
    further: Job
    memory: list[GatewayMemory]
    #: Each shuffle with a gateway of this many MiB, less than the data set has, and beside it with all memory.
    tight_mib: int
    tight: Job
    #: What was predicted of calls in both places, and what the advisor knew of the link.
    places: list[Found]
    link: Link
    call_stages: list[Stage]
    #: What writing down costs: name and seconds.
    ledger: list[tuple[str, float]]
    job_stages: dict[str, list[Stage]]
    #: Of one call: side to cost. Of one job in shards of 4 MiB: shuffle, or plain Ray's form, to cost.
    call_costs: dict[str, Cost]
    job_costs: dict[str, Cost]
    #: Controls that the clusters' sandboxes lacked.
    degradations: list[str]


def _ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(above, below, strict=True))
