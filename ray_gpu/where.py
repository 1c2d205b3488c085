"""``where="auto"``: measures what calls take on GPU nodes and here, predicts it, and chooses. This module does I/O.

What it runs for that, and when:

* Once in a session, for each pool: a dozen small calls of our own to a node (:mod:`ray_gpu.sandbox.probe`), some 100 KB
  of zeros in all, and the same here. They are calls like any other, which policy decides and the ledger has. They need
  a lease, and open one.
* Once for each function, if nothing is known of it: the function itself, here, on the first rows of its data: on more
  and more of them, each time twice, until that takes some milliseconds. So a function that has effects has them a few
  times more. Whoever calls waits for it, also in a coroutine.
* For data that the gateway has, each time: a request whether policy lets the call's rows leave. What policy refuses
  of a call is refused wherever it would run. Rows that are read here are those that ``handle.to_arrow()`` reads.

Everything else is learned from calls that the session makes anyway, if no other runs beside them, from the first time
on that advice was asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ray_gpu import functions, progress
from ray_gpu.advice import Advice, Advisor, Key, Link, Load, Terms
from ray_gpu.call import Call
from ray_gpu.handle import Handle
from ray_gpu.local_call import LocalCall, LocalWork, seconds_of
from ray_gpu.request import pack_work
from ray_gpu.sandbox.probe import probe
from ray_gpu.share import open_table
from zones import values
from zones.errors import EgressDeniedError, SessionClosedError

if TYPE_CHECKING:
    from ray_gpu.client import Session

#: Of the reference computation: rows and columns of its matrix.
PROBE_SIZE = 320
#: Sent to learn what bytes cost: below what small arguments may have, so that it is of their class.
PROBE_BYTES = 32 << 10
#: The best of so many small calls counts.
PROBE_CALLS = 5
#: Copied here to learn what rows from the gateway cost, which hands them over in shared memory, bytes.
COPIED_BYTES = 8 << 20
#: A pool that could not be measured is not asked again for so long, seconds.
AGAIN_S = 60.0
#: Rows that a function is tried on here, one after the other, until that takes long enough to say something.
SAMPLE_ROWS = (64, 512, 4096, 32_768)
ENOUGH_S = 0.005
#: What takes so long is tried once; all else twice, and the better one counts.
DEAR_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A call that is about to be made."""

    name: str
    session: Session
    #: What the gateway would be sent.
    request: dict[str, Any]
    work: LocalWork

    @property
    def key(self) -> Key:
        """What is remembered of it is remembered by this."""
        return _digest(self.request["work"]), hash(self.work.arguments)

    @property
    def terms(self) -> Terms:
        """What leases are opened for."""
        options = self.work.options
        return options.pool, options.num_gpus, options.environment

    def load(self, size_bytes: int, rows: int) -> Load:
        """Return what is known of it once its size is."""
        options, data = self.work.options, self.work.data
        actors = 1 if self.work.whole or data is None else max(1, min(options.concurrency, rows))
        open_leases = self.session.advisor.leases(self.terms, time.monotonic())
        return Load(
            size_bytes=size_bytes,
            actors=actors,
            rows=data is not None,
            in_gateway=isinstance(data, Handle),
            opens=open_leases < actors,
            fresh=not self.session.advisor.runs(self.key).sent,
        )


@functools.lru_cache(maxsize=64)
def _digest(work: bytes) -> str:
    return hashlib.sha256(work).hexdigest()


def begin_here(planned: Planned, advice: Advice) -> LocalCall[Any]:
    """Start a call here, and learn from it.

    Raises:
        SessionClosedError: The session has ended, as any call then says.
    """
    if planned.session.closed:
        raise SessionClosedError("the session has ended; attach again with ray_gpu.attach(...)")
    advisor, pool = planned.session.advisor, planned.work.options.pool

    def took(size_bytes: int, read_s: float, run_s: float, beside: bool) -> None:
        if not beside:
            load = planned.load(size_bytes, 1)
            advisor.saw_local(planned.key, load, run_s)
            if load.in_gateway:
                advisor.saw_read(pool, size_bytes, read_s)

    return LocalCall(planned.work, advice=advice, took=took)


def learner(planned: Planned) -> Callable[[dict[str, Any]], None] | None:
    """Return what learns from a call to GPU nodes that is about to be made, once it is told its report.

    ``None`` as long as nobody in the session asked for advice.
    """
    if not planned.session.advisor.asked:
        return None
    session, alone = planned.session, not planned.session.open_calls
    work, advisor, pool = planned.work, planned.session.advisor, planned.work.options.pool
    key, terms = planned.key, planned.terms

    def ended(report: dict[str, Any]) -> None:
        now, opened = time.monotonic(), int(report.get("leases_opened", 0))
        advisor.saw_leases(terms, opened, now)
        # Of calls side by side none says what it takes alone; resident shards are not sent.
        if not alone or session.open_calls > 1 or work.options.resident:
            return
        if work.data is None:
            size = len(work.arguments)
        else:
            size = int(report["sent_bytes"]) if isinstance(work.data, Handle) else work.data.nbytes
        load = dataclasses.replace(planned.load(size, int(report.get("rows", 1))), opens=False)
        learn = advisor.saw_opening if opened else advisor.saw_remote
        learn(key, pool, load, float(report["seconds"]))

    return ended


def choose(planned: Planned) -> Advice | None:
    """Return where a call runs by its option ``where``, and say so; ``None``: on GPU nodes, as by default.

    Raises:
        ZoneError: As :func:`weigh`.
    """
    wanted = planned.work.options.where
    if wanted == "remote":
        return None
    if wanted == "local":
        reason = 'it runs here, as where="local" says'
        return Advice(predicted_remote_s=None, predicted_local_s=None, chosen="local", reason=reason)
    advice, runs = weigh(planned), planned.session.advisor.runs(planned.key)
    if progress.wanted() and runs.said != advice.chosen:
        progress.tell(planned.name, advice.reason)
    runs.said = advice.chosen
    return advice


def weigh(planned: Planned) -> Advice:
    """Return where a call is faster.

    Raises:
        EgressDeniedError: Policy refuses that rows of the gateway leave by this call.
        ZoneError: What else would keep it from being made.
    """
    if planned.session.closed:
        raise SessionClosedError("the session has ended; attach again with ray_gpu.attach(...)")
    advisor, pool = planned.session.advisor, planned.work.options.pool
    advisor.asked = True
    unmeasured = measure(planned)
    load, few, refused = _look(planned)
    if few is not None:
        _try(planned, few)
    raised = "" if advisor.runs(planned.key).local else advisor.exact(planned.key).raised
    if raised:
        refused = refused or f"remote: tried here, on a few of the rows, it raised {raised}"
    advice = advisor.predict(planned.key, pool, load, refused=refused)
    if unmeasured and advice.predicted_remote_s is None:
        advice = dataclasses.replace(advice, reason=f"{advice.reason}; a node could not be measured: {unmeasured}")
    return advice


def _look(planned: Planned) -> tuple[Load, pa.Table | None, str]:
    """Return what is known of a call, rows to try it on if it has to be tried, and why it cannot run here, if so."""
    data, session = planned.work.data, planned.session
    if data is None:
        return planned.load(len(planned.work.arguments), 1), None, ""
    known = session.advisor.runs(planned.key).local or session.advisor.exact(planned.key).raised
    if not isinstance(data, Handle):
        return planned.load(data.nbytes, data.num_rows), None if known or not data.num_rows else data, ""
    first = 0 if known else SAMPLE_ROWS[-1]
    started = time.perf_counter()
    reply, fds = session.ask({**planned.request, "op": "weigh", "data": data.document(), "first": first})
    few = open_table(fds[0], trusted=True)
    session.advisor.saw_asking(planned.work.options.pool, time.perf_counter() - started)
    size = int(reply["bytes"])
    refused = (
        "" if reply["readable"] else f"remote: the gateway has no room to hand out {size >> 20} MiB of rows at once"
    )
    return planned.load(size, int(reply["rows"])), few if few.num_rows else None, refused


def _try(planned: Planned, few: pa.Table) -> None:
    """Run the function here on a few rows, and remember how long it took, or that it raised."""
    seen = []
    try:
        for number, rows in enumerate(SAMPLE_ROWS):
            part = few.slice(0, rows)
            size, seconds = seconds_of(planned.work, part)
            if seconds < DEAR_S:
                again = seconds_of(planned.work, part)[1]
                # What only the first time does is no part of it; afterwards what came between may be.
                seconds = again if number == 0 else min(seconds, again)
            seen.append((size, seconds))
            if seconds >= ENOUGH_S or rows >= few.num_rows:
                break
    except Exception as error:  # noqa: BLE001 - the call itself says what is wrong, where it runs
        planned.session.advisor.exact(planned.key).raised = getattr(error, "type_name", type(error).__name__)
        return
    for size, seconds in seen[-2:]:
        planned.session.advisor.saw_local(planned.key, planned.load(size, 1), seconds)


def measure(planned: Planned) -> str:
    """Measure a pool, unless that was done; return why it could not be, if so."""
    advisor, pool, now = planned.session.advisor, planned.work.options.pool, time.monotonic()
    if pool in advisor.links:
        return ""
    reason, when = advisor.unmeasured.get(pool, ("", now - AGAIN_S))
    if now - when < AGAIN_S:
        return reason
    try:
        advisor.links[pool] = _measured(planned, advisor)
    except Exception as error:  # noqa: BLE001 - a node of another version may raise anything; the call itself says more
        # What policy refuses it refuses again, and the ledger has each time.
        advisor.unmeasured[pool] = type(error).__name__, math.inf if isinstance(error, EgressDeniedError) else now
        return type(error).__name__
    return ""


def _measured(planned: Planned, advisor: Advisor) -> Link:
    options = dataclasses.replace(
        planned.work.options, columns=None, keep_together=None, categories=None, concurrency=1
    )

    def packed(function: Callable[..., Any]) -> bytes:
        return pack_work(functions.pack(function), "probe", {**options.document(), "whole": False, "instance": ""})

    usual = packed(probe)

    def call(size: int = 0, sent: bytes = b"", work: bytes = usual) -> tuple[float, float, int]:
        """Return the seconds of one call, what it returned, and how many leases it opened."""
        request = {"op": "call", "mode": "call", "work": work, "arguments": bytes(values.encode([[sent, size], {}]))}
        started = time.perf_counter()
        one: Call[float] = Call(planned.session, request, None, show=None, one=True)
        value = one.result()
        return time.perf_counter() - started, value, int(one.report["leases_opened"])

    first_s, _, opened = call()
    advisor.saw_leases(planned.terms, opened, time.monotonic())
    trip_s = min(call()[0] for _ in range(PROBE_CALLS))
    fresh_s = call(work=packed(functools.partial(probe)))[0]
    try:
        sent_s = min(call(sent=bytes(PROBE_BYTES))[0] for _ in range(3))
    except EgressDeniedError:
        # More than this zone lets arguments have. Calls on data will show what bytes cost.
        sent_s = trip_s
    _, node_s, _ = call(PROBE_SIZE)
    here_s = probe(b"", PROBE_SIZE)
    return Link(
        trip_s=trip_s,
        open_s=max(0.0, first_s - fresh_s) if opened else 0.0,
        fresh_s=max(0.0, fresh_s - trip_s),
        sent_s_per_byte=max(0.0, sent_s - trip_s) / PROBE_BYTES,
        read_s_per_byte=_copying_s() / COPIED_BYTES,
        node_s_per_local_s=node_s / here_s,
    )


def _copying_s() -> float:
    """Return the seconds that a copy of :data:`COPIED_BYTES` takes, into memory that was never written to."""
    block = np.ones(COPIED_BYTES, dtype=np.uint8)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        block.copy()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
