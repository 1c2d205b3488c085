"""What a decision demands, and whether a call fulfils it. Pure: the time is passed in.

What a call asks for is checked here, each time, also under a decision that is remembered. What only a node can show
(its device, environment, missing controls) is checked when a lease is opened, and the share of a data set that nodes
hold where shards are given out.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from zones.model import Obligations, Shuffle


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a call is, as far as obligations ask."""

    purpose: str
    now: datetime
    #: When the session began.
    began: datetime
    function_reviewed: bool
    gpu_milli: int
    #: Rows that it sends, and at most how many shards they make; ``None`` where no table is sent.
    rows: int | None
    most_shards: int = 0


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
        "max_lease_s": obligations.max_lease_s,
        "max_session_s": obligations.max_session_s,
        "hours": obligations.hours,
        "reviewed_functions_only": "yes" if obligations.reviewed_functions_only else None,
        **{key: None if names is None else ", ".join(sorted(names)) or "none" for key, names in listed.items()},
    }
    return {key: str(value) for key, value in said.items() if value is not None}
