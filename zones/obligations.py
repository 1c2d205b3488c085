"""What a decision demands, and whether a call fulfils it. Pure: the time is passed in.

What a call asks for is checked here, each time, also under a decision that is remembered. What only a node can show
(its device, environment, missing controls) is checked when a lease is opened, and the share of a data set that nodes
hold where shards are given out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime

from zones.model import NodeShare, Obligations, Padding, Shuffle


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a call is, as far as obligations ask."""

    purpose: str
    now: datetime
    #: When the session began.
    began: datetime
    function_reviewed: bool
    gpu_milli: int
    #: Whether its shards shall stay open after it.
    resident: bool = False
    #: Rows that it sends, and at most how many shards they make; ``None`` where no table is sent.
    rows: int | None
    most_shards: int = 0
    #: Digest of the environment that it asks for; ``""``: whichever fits.
    environment: str = ""


@dataclass(frozen=True, slots=True)
class Unmet:
    """One obligation that a call does not fulfil."""

    #: Its key of zone.yaml.
    key: str
    #: What is demanded, and what is the case.
    reason: str
    #: What to do.
    advice: str


def unmet(obligations: Obligations, call: Facts) -> list[Unmet]:
    """Return the obligations that *call* does not fulfil."""
    found = []
    if obligations.purposes is not None and call.purpose.strip() not in obligations.purposes:
        wanted = ", ".join(sorted(obligations.purposes))
        reason = f"the purpose must be one of: {wanted}; this session is for {call.purpose.strip() or 'no purpose'!r}"
        found.append(Unmet("purposes", reason, "attach with purpose=..."))
    if obligations.hours is not None and obligations.hours.end(call.now) is None:
        found.append(Unmet("hours", f"calls are made {obligations.hours}", "call again then"))
    over = _session_ends(obligations, call.began)
    if over is not None and call.now.timestamp() >= over:
        reason = f"a session lasts {obligations.max_session_s} s at most"
        found.append(Unmet("max_session_s", reason, "attach again"))
    if obligations.reviewed_functions_only and not call.function_reviewed:
        reason = "functions must be approved, and this one, as it is now, is not"
        found.append(Unmet("reviewed_functions_only", reason, "have it approved (`ray-gpu policy approve`)"))
    if obligations.exclusive_gpu and call.gpu_milli % 1000:
        reason = f"leases take whole GPUs, and this call asks for {call.gpu_milli / 1000:g}"
        found.append(Unmet("exclusive_gpu", reason, "call with num_gpus=1"))
    if call.resident and not obligations.resident_shards:
        reason = "no shard stays open in a sandbox after its call"
        found.append(Unmet("resident_shards", reason, "call without resident=True"))
    if call.environment and obligations.environments is not None and call.environment not in obligations.environments:
        reason = f"functions run in environments that policy names, and {call.environment[:12]} is none of them"
        found.append(Unmet("environments", reason, "call without environment=..., or with another"))
    if call.rows is not None:
        found += _about_rows(obligations, call.rows, call.most_shards)
    return found


def _about_rows(obligations: Obligations, rows: int, most_shards: int) -> list[Unmet]:
    found = []
    if obligations.max_rows is not None and rows > obligations.max_rows:
        reason = f"a call sends {obligations.max_rows:,} rows at most, and this one has {rows:,}"
        found.append(Unmet("max_rows", reason, "filter or split the data"))
    if most_shards < obligations.min_shards:
        reason = f"rows are cut into {obligations.min_shards} shards at least, and these make {most_shards}"
        found.append(Unmet("min_shards", reason, "send more rows, by .map or .map_reduce"))
    return found


def _session_ends(obligations: Obligations, began: datetime) -> int | None:
    """Return when a session is over, in whole seconds since the epoch, as leases have them."""
    lasts = obligations.max_session_s
    return None if lasts is None else int(began.timestamp()) + lasts


def ends(obligations: Obligations, *, began: datetime, now: datetime) -> int | None:
    """Return by when a lease must end, UTC seconds since the epoch: with the session, and with the working hours."""
    limits = [_session_ends(obligations, began)]
    if obligations.hours is not None:
        # Outside of them, for a call that was decided just before they ended: at once.
        limits.append(int((obligations.hours.end(now) or now).timestamp()))
    return min((limit for limit in limits if limit is not None), default=None)


def strictest(first: Obligations, second: Obligations) -> Obligations:
    """Return obligations whose every fulfilment fulfils both. Of patterns, those that both have are left."""
    if first == second:
        return first
    least = min((first, second), key=_loose)
    return replace(
        first,
        shuffle=least.shuffle,
        block_rows=least.block_rows,
        # No window is the widest.
        shuffle_window=None
        if first.shuffle_window is None or second.shuffle_window is None
        else max(first.shuffle_window, second.shuffle_window),
        padding=Padding.COARSE if Padding.COARSE in (first.padding, second.padding) else first.padding,
        max_rows=_lower(first.max_rows, second.max_rows),
        min_shards=max(first.min_shards, second.min_shards),
        max_node_share=_smaller_share(first.max_node_share, second.max_node_share),
        accepted_degradations=first.accepted_degradations & second.accepted_degradations,
        exclusive_gpu=first.exclusive_gpu or second.exclusive_gpu,
        gpu_kinds=_in_both(first.gpu_kinds, second.gpu_kinds),
        environments=_common(first.environments, second.environments),
        resident_shards=first.resident_shards and second.resident_shards,
        max_lease_s=min(first.max_lease_s, second.max_lease_s),
        max_session_s=_lower(first.max_session_s, second.max_session_s),
        hours=first.hours.within(second.hours) if first.hours and second.hours else first.hours or second.hours,
        purposes=_common(first.purposes, second.purposes),
        reviewed_functions_only=first.reviewed_functions_only or second.reviewed_functions_only,
    )


def _loose(obligations: Obligations) -> float:
    """Return how little rows are moved apart: 0 for each for itself, and so many for blocks."""
    return {Shuffle.ROWS: 0.0, Shuffle.NONE: math.inf}.get(obligations.shuffle, obligations.block_rows)


def _lower(first: int | None, second: int | None) -> int | None:
    return min((limit for limit in (first, second) if limit is not None), default=None)


def _common(first: frozenset[str] | None, second: frozenset[str] | None) -> frozenset[str] | None:
    if first is None or second is None:
        return second if first is None else first
    return first & second


def _in_both(first: tuple[str, ...] | None, second: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if first is None or second is None:
        return second if first is None else first
    return tuple(pattern for pattern in first if pattern in second)


def _smaller_share(first: NodeShare | None, second: NodeShare | None) -> NodeShare | None:
    if first is None or second is None:
        return first or second
    # Windows begin at multiples of their length: none of either may lie in two of the one that counts.
    window_s = math.lcm(first.window_s, second.window_s)
    return NodeShare(percent=min(first.percent, second.percent), window_s=window_s)


def duties(obligations: Obligations) -> dict[str, str]:
    """Return what a decision demands, each by its key of zone.yaml, as text; what demands nothing is left out."""
    share, blocks = obligations.max_node_share, obligations.shuffle is Shuffle.BLOCKS
    listed = {
        "accepted_degradations": obligations.accepted_degradations,
        "gpu_kinds": obligations.gpu_kinds,
        "environments": obligations.environments,
        "purposes": obligations.purposes,
    }
    said = {
        "shuffle": f"blocks({obligations.block_rows})" if blocks else str(obligations.shuffle),
        "shuffle_window": obligations.shuffle_window,
        "padding": str(obligations.padding),
        "max_rows": obligations.max_rows,
        "min_shards": obligations.min_shards if obligations.min_shards > 1 else None,
        "max_node_share": share and f"{share.percent} % in {share.window_s} s",
        "exclusive_gpu": "yes" if obligations.exclusive_gpu else None,
        "resident_shards": "allowed" if obligations.resident_shards else None,
        "max_lease_s": obligations.max_lease_s,
        "max_session_s": obligations.max_session_s,
        "hours": obligations.hours,
        "reviewed_functions_only": "yes" if obligations.reviewed_functions_only else None,
        **{key: None if names is None else ", ".join(sorted(names)) or "none" for key, names in listed.items()},
    }
    return {key: str(value) for key, value in said.items() if value is not None}
