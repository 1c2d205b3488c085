"""The whole flow of a call. Read :func:`run` first. This module does I/O.

Order is the promise: data is resolved inside the zone, policy decides and the ledger has it on disk,
leases prove what they are, the intent is on disk, and only then does the first byte leave.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ray_gpu.frames import StalledError
from ray_gpu.instance_pool import InstancePool, lost_state
from ray_gpu.lease_pool import NO_LEASE
from ray_gpu.leases import Lease
from ray_gpu.outcome import Outcome, RowsExpected, open_outcome
from ray_gpu.pending import Item, Pending
from ray_gpu.request import Mode, Options, Request, payload_bytes
from ray_gpu.resident import Resident
from ray_gpu.sandbox.functions import VALUE
from ray_gpu.sandbox.memory import SLOT_BYTES
from ray_gpu.session import Allowed, Session
from ray_gpu.share import INLINE_BYTES, share_encoded
from ray_gpu.sharing import OverShareError, Sharing, Size
from ray_gpu.source import Source
from ray_gpu.spending import Spending
from ray_gpu.staging import Staged, fits
from zones import plan, shards
from zones.envelope import HEADER_BYTES, Header, padded_size, sealed_size
from zones.errors import (
    AnswerRefusedError,
    EnvelopeError,
    LeaseLostError,
    RemoteFunctionError,
    ResultTooLargeError,
    RowCountError,
    ValueRefusedError,
    ZoneError,
    to_wire,
)
from zones.model import Kind, Padding
from zones.obligations import Unmet

#: Shards that are on the way in one lease at once.
IN_FLIGHT = 2
#: A caller is told of progress this often, seconds.
PROGRESS_INTERVAL_S = 0.05
#: Times a shard is sent before the call gives up.
MAX_ATTEMPTS = 4
#: Most bytes that travel as one shard when a call wants all rows at once.
MAX_WHOLE_BYTES = 60 << 20
#: How long a further lease may take to be placed before a call goes on without it, seconds.
EXTRA_LEASE_TIMEOUT_S = 15.0
#: How long a call on arguments alone waits before it is made again, seconds: at first, and at most.
FIRST_WAIT_S, MAX_WAIT_S = 0.25, 30.0
#: How long a call that lost a lease and found no room goes on with the others before it looks again, seconds.
PAUSE_S = 0.25


@dataclass(slots=True, kw_only=True)
class Result:
    """What a call brought back into the zone."""

    #: ``map``: one table or array in source order. ``shards``: the encoded values, in slot order. ``stream``: none.
    #: ``call``: one.
    value: Any = None
    encoded: list[memoryview] = field(default_factory=list)
    printed: str = ""
    report: dict[str, Any] = field(default_factory=dict)


class Cancel:
    """Tells whether the caller gave up, and ends what the call uses when it does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: list[Lease] = []
        self._finished = False
        self.error: ZoneError | None = None

    def watch(self, lease: Lease) -> None:
        """End *lease* if the call is cancelled: its sandbox is killed, whatever it computes."""
        with self._lock:
            self._leases.append(lease)
            if self.error:
                _cut(lease)

    def cancel(self, error: ZoneError) -> None:
        """Give the call up with *error*."""
        with self._lock:
            if self._finished:
                return
            self.error = self.error or error
            for lease in self._leases:
                _cut(lease)

    def finish(self) -> None:
        """The call is over: from now on it cannot be given up, and its leases are others' to use."""
        with self._lock:
            self._finished = True

    def check(self) -> None:
        """Raise the error that the call was given up with, if it was."""
        if self.error:
            raise self.error


def _cut(lease: Lease) -> None:
    lease.lost = lease.lost or "the call was cancelled"
    lease.link.shutdown()


#: Called with ``{"event": "progress" | "printed" | "lost" | "part" | "differs", ...}`` and a part's descriptor, from
#: any thread.
Events = Callable[..., None]


def run(session: Session, request: Request, source: Source | None, events: Events, cancelled: Cancel) -> Result:
    """Carry out one call from decision to result.

    Raises:
        EgressDeniedError: Policy refuses; nothing left, and the ledger says so.
        LedgerUnavailableError: It could not be written down; nothing left.
        PlacementError, SandboxLevelError, GrantRefusedError: No node would do; nothing left.
        ValueRefusedError: All rows shall be one batch and are too many (nothing left); or a result is refused.
        LeaseLostError: Nodes were lost more often than a shard may be sent.
        CallCancelledError, CallTimeoutError: The caller gave up.
    """
    pool = session.pool(request.work.options.instance)
    allowed = session.decide(request, source)
    if request.mode is Mode.MAKE:
        return _make(session, request, allowed, events, cancelled)
    if request.mode is Mode.EVERY:
        assert isinstance(pool, InstancePool)
        return _every(session, request, allowed, pool, events, cancelled)
    if source is None:
        return _alone(session, request, allowed, events, cancelled)
    return ShardRun(session, request, allowed, source, events, cancelled).run()


def _alone(session: Session, request: Request, allowed: Allowed, events: Events, cancelled: Cancel) -> Result:
    """Run a function on arguments alone. What one node answers that cannot be believed, another is asked as well.

    When a lease is lost the call is made again as often as it says, after longer and longer waits.
    """
    leases, doubted, retries = session.pool(request.work.options.instance), "", 0
    while True:
        if retries:
            _wait(backoff_s(retries), cancelled)
        lease = _lease_for(session, request, allowed, cancelled)
        try:
            return call(session, request, allowed, lease, events, cancelled)
        except (LeaseLostError, AnswerRefusedError) as error:
            leases.check_open()
            refused = isinstance(error, AnswerRefusedError)
            if isinstance(leases, InstancePool) and isinstance(error, LeaseLostError):
                raise lost_state(lease.node, error.reason) from None
            if isinstance(error, LeaseLostError) and not lease.lied and retries < request.work.options.max_retries:
                retries += 1
                continue
            if doubted or not (refused or lease.lied) or not leases.others(lease):
                if refused and doubted not in ("", lease.node):
                    leases.trust(doubted)
                raise _named(error, lease) from None
            leases.distrust(lease, f"its answer was refused: {error.message}" if refused else lease.lost)
            doubted = lease.node
        finally:
            leases.give(lease)


def backoff_s(retries: int) -> float:
    """Return the least wait before a call is made again for the time *retries*, seconds."""
    return float(min(FIRST_WAIT_S * 2 ** (retries - 1), MAX_WAIT_S))


def _wait(seconds: float, cancelled: Cancel) -> None:
    """Wait, unless the call is given up meanwhile; up to half of it longer, so that calls do not come in step."""
    over = time.monotonic() + seconds * (1 + secrets.randbelow(500) / 1000)
    while (left := over - time.monotonic()) > 0:
        cancelled.check()
        time.sleep(min(left, PAUSE_S))


def _make(session: Session, request: Request, allowed: Allowed, events: Events, cancelled: Cancel) -> Result:
    """Make an instance of a class in as many sandboxes as the call may use at once, on as many nodes as there are."""
    terms, options = session.terms(allowed, request), request.work.options
    instance, pool = session.begin_instance()
    taken: list[Lease] = []
    results: list[Result] = []
    try:
        try:
            while len(taken) < options.concurrency:
                apart = {lease.node for lease in taken}
                taken.append(pool.take(terms, allowed.decision, options, check=cancelled.check, apart=apart))
                results.append(call(session, request, allowed, taken[-1], events, cancelled))
        finally:
            for lease in taken:
                pool.give(lease)
        pool.made()
    except BaseException:
        session.end_instance(instance)
        raise
    found = _joined(results)
    return dataclasses.replace(found, encoded=found.encoded[:1], report={**found.report, "instance": instance})


def _every(
    session: Session, request: Request, allowed: Allowed, pool: InstancePool, events: Events, cancelled: Cancel
) -> Result:
    """Run a function once in every sandbox of an instance."""
    leases = pool.every(session.terms(allowed, request), check=cancelled.check)

    def work(lease: Lease) -> Result:
        try:
            return call(session, request, allowed, lease, events, cancelled)
        except LeaseLostError as error:
            raise lost_state(lease.node, error.reason) from None
        finally:
            pool.give(lease)

    with ThreadPoolExecutor(len(leases)) as threads:
        running = [threads.submit(work, lease) for lease in leases]
    return _joined([one.result() for one in running])


def _joined(results: Sequence[Result]) -> Result:
    """Return the results of calls on different leases as one."""
    nodes: Counter[str] = Counter()
    for result in results:
        nodes.update(result.report["nodes"])
    return Result(
        encoded=[value for result in results for value in result.encoded],
        printed="".join(result.printed for result in results),
        report={"nodes": dict(nodes)},
    )


def _lease_for(session: Session, request: Request, allowed: Allowed, cancelled: Cancel) -> Lease:
    """Return a lease for a call on arguments alone: where no further one can be had, one of those that there are."""
    terms, pool = session.terms(allowed, request), session.pool(request.work.options.instance)
    try:
        return pool.take(terms, allowed.decision, request.work.options, check=cancelled.check)
    except NO_LEASE:
        lease = pool.take_free(terms, check=cancelled.check)
        if lease is None:
            raise
        return lease


def _named(error: ZoneError, lease: Lease) -> ZoneError:
    """Return an error that also says whose answer it is about."""
    if isinstance(error, AnswerRefusedError):
        return AnswerRefusedError(f"node {lease.node}, lease {lease.id}: {error.message}")
    return error


def check_imports(session: Session, request: Request, lease: Lease, events: Events) -> None:
    """Raise if a lease lacks what a function imports; tell in what else its environment differs, before it gets any."""
    if differs := session.check_imports(request, lease):
        events({"event": "differs", "node": lease.node, "differs": differs})


def call(
    session: Session, request: Request, allowed: Allowed, lease: Lease, events: Events, cancelled: Cancel
) -> Result:
    """Run a function once on arguments alone: one sealed message out, one back."""
    cancelled.watch(lease)
    check_imports(session, request, lease, events)
    spending = session.standing(allowed, lease)
    number = prepare(session, request, lease, spending)
    spending.draw(1, lease.wire_bytes(len(request.arguments)))
    try:
        current = lease.next_call()
        link = lease.link
        link.send(link.slot(Kind.CALL, call=current, shard=number), request.arguments)
        # From here to the answer there is time.
        link.finish_call(current - 1)
        link.get_ready(
            receive=link.incoming_slot(Kind.RESULT, call=current, shard=number),
            send=link.slot(Kind.CALL, call=current + 1, shard=number),
        )
        header, payload = _receive(lease)
        if (header.call, header.shard) != (current, number):
            raise EnvelopeError
    except (OSError, EnvelopeError) as error:
        cancelled.check()
        raise _lost(session, lease, error) from None
    outcome = open_outcome(payload)
    return Result(encoded=[outcome.encoded], printed=outcome.printed, report={"nodes": {lease.node: 1}})


def prepare(session: Session, request: Request, lease: Lease, spending: Spending) -> int:
    """Send the function and the broadcasts of a call unless the lease has them; return the function's number."""
    for digest in request.broadcasts:
        if digest not in lease.functions:
            _send_once(session, lease, spending, digest, b"".join((VALUE, session.broadcasts.get(digest))))
    if known := lease.functions.get(request.work.digest):
        return known
    return _send_once(session, lease, spending, request.work.digest, request.work.function)


def _send_once(session: Session, lease: Lease, spending: Spending, digest: str, sent: bytes) -> int:
    """Send what a lease keeps until it ends; return the number that it is known by there."""
    spending.draw(0, lease.wire_bytes(len(sent)))
    number = lease.next_call()
    try:
        lease.link.send(lease.link.slot(Kind.FUNCTION, call=number), sent)
    except OSError as error:
        raise _lost(session, lease, error) from None
    lease.functions[digest] = number
    return number


def _receive(lease: Lease) -> tuple[Header, memoryview]:
    """Receive the next result.

    Raises:
        EnvelopeError: Something else came, or it did not open.
    """
    header, payload = lease.link.receive(most_bytes=padded_size(SLOT_BYTES, Padding.COARSE))
    if header.kind is not Kind.RESULT:
        raise EnvelopeError
    return header, payload


def _lost(session: Session, lease: Lease, error: BaseException) -> LeaseLostError:
    """Give a lease up. What only a liar sends is held against its node, unless the lease was lost already."""
    why = {
        EnvelopeError: "a message did not open",
        StalledError: "a message began and did not end",
        _DoubtedError: f"its answer was refused: {error}",
    }.get(type(error))
    if why and not lease.lost:
        session.pool_of(lease).distrust(lease, why)
    lease.lost = lease.lost or "connection lost"
    lease.link.shutdown()
    return lease.error(lease.lost)


class _DoubtedError(Exception):
    """An answer cannot be believed before another node has said the same."""


@dataclass(slots=True)
class Tally:
    """What one lease did for one call."""

    #: Rows that were sent to it, and shards that it was asked for.
    rows: int = 0
    shards: int = 0
    outcome: str = "lost"


class ShardRun:
    """One ``map`` or ``map_reduce`` over all its leases."""

    def __init__(
        self, session: Session, request: Request, allowed: Allowed, source: Source, events: Events, cancelled: Cancel
    ) -> None:
        self._session, self._request, self._allowed = session, request, allowed
        self._terms, self._leases = session.terms(allowed, request), session.pool(request.work.options.instance)
        self._events, self._cancelled = events, cancelled
        #: Whether all rows may be in memory at once; else they are put into the order of their shards on disk.
        self._fits = fits(source.table.nbytes, session.services.memory_bytes)
        self._table = shards.strip(source.table, keep_categories=request.work.options.categories or (), join=self._fits)
        obligations = allowed.decision.obligations
        options = request.work.options
        self._size = Size(
            row_bytes=plan.row_bytes(self._table),
            shard_bytes=MAX_WHOLE_BYTES if options.whole else payload_bytes(options.shard_bytes),
            min_shards=1 if options.whole else max(obligations.min_shards, 2 * options.concurrency),
        )
        #: Where policy bounds a node's share: the plan then depends on which nodes there are.
        self._sharing = session.sharing(allowed, source)
        #: Where shards stay open: the order is that of the first call, and a shard is for the lease that has it.
        self._resident: Resident | None = None
        if options.resident:
            self._resident = self._find_resident(source)
            self._set_plan(self._resident.plan, self._resident.owners())
        elif self._sharing is None:
            self._set_plan(self._draw(source))
        self._lock = threading.Lock()
        self._parts: dict[int, Any] = {}
        self._encoded: dict[int, memoryview] = {}
        self._nodes: dict[str, int] = {}
        self._sent_bytes = self._done_rows = self._streamed = 0
        self._told = 0.0
        self._held_bytes = 0
        #: Which node's answer stands for each shard and attempt.
        self._accepted: dict[tuple[int, int], str] = {}
        #: Which node first gave an answer to a shard that cannot be believed.
        self._doubts: dict[int, str] = {}
        #: Whether a worker got a lease at the start.
        self._holding = False
        #: Nodes of the leases that work on this call now.
        self._serving: Counter[str] = Counter()
        self._failure: BaseException | None = None
        #: Set once the first worker has its lease, or has failed.
        self._first = threading.Event()

    def _draw(self, source: Source) -> plan.Plan:
        """Return a new order of the rows, cut into shards."""
        seed, groups = secrets.token_bytes(plan.SEED_BYTES), source.row_groups()
        obligations, size = self._allowed.decision.obligations, dataclasses.asdict(self._size)
        if groups is None:
            return plan.make_plan(source.rows, obligations=obligations, seed=seed, **size)
        return plan.plan_of_groups(groups, obligations=obligations, seed=seed, **size)

    def _find_resident(self, source: Source) -> Resident:
        """Return where the shards of these rows are open, cut as this call would cut them."""
        if self._sharing is not None:
            reason = "policy bounds a node's share of these rows, which are then given out anew in each call"
            raise self._session.refuse(self._allowed, [Unmet("max_node_share", reason, "call without resident=True")])
        options = self._request.work.options
        rows = json.dumps([self._request.data, source.columns, source.identity(), source.origin()], default=repr)
        # However many leases the first call was cut for.
        size = dataclasses.replace(self._size, min_shards=0)
        how = (options.whole, options.keep_together, options.categories, size, self._allowed.decision.obligations)
        where = self._terms, options.instance
        return self._session.residents.of((rows, how, where), lambda: self._draw(source))

    def _set_plan(self, made: plan.Plan, owners: Sequence[str | None] | None = None) -> None:
        options, demanded = self._request.work.options, self._allowed.decision.obligations.min_shards
        self._plan, self._count = made, len(made)
        self._pending = Pending(self._count, owners)
        services = self._session.services
        self._staged = (
            None
            if self._fits
            else Staged(self._table, made, services.data_dir, services.memory_bytes, self._cancelled.check)
        )
        if options.whole and self._count > 1:
            raise ValueRefusedError(
                f"f.remote gives a function all rows as one batch, and {made.rows} rows of {self._table.nbytes} "
                f"bytes do not fit one of {MAX_WHOLE_BYTES}; use .map or .map_reduce, which take them in shards"
            )
        if self._count < demanded:
            reason = f"rows are cut into {demanded} shards at least, and these make {self._count}"
            raise self._session.refuse(self._allowed, [Unmet("min_shards", reason, "send more rows")])

    def run(self) -> Result:
        """Run until every shard has one accepted result."""
        leases: list[Lease | None] = [*self._share_out(self._sharing)] if self._sharing else []
        if not leases:
            leases = [None] * min(self._request.work.options.concurrency, max(1, self._count))
        self._opened = threading.Barrier(len(leases))
        workers = [
            threading.Thread(target=self._work, args=(worker, lease), daemon=True)
            for worker, lease in enumerate(leases)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self._cancelled.check()
        if self._failure is not None:
            raise self._failure
        if len(self._parts) + len(self._encoded) + self._streamed < self._count:
            raise LeaseLostError(
                "every lease of this call was lost; run the call again", node="", reason="no lease left"
            )
        return Result(
            value=shards.reassemble(self._parts, self._plan) if self._request.mode is Mode.MAP else None,
            encoded=[self._encoded[index] for index in sorted(self._encoded)],
            report={
                "nodes": self._nodes,
                "shards": self._count,
                "rows": self._plan.rows,
                "sent_bytes": self._sent_bytes,
                **({"shares": self._sharing.percents()} if self._sharing else {}),
            },
        )

    def _share_out(self, sharing: Sharing) -> list[Lease]:
        """Take leases on as many nodes as policy asks for, and plan which of them gets what.

        While other calls have the nodes this waits as a call does that finds no room, and holds none meanwhile.
        """
        options = self._request.work.options
        needed = 1 if options.whole else sharing.nodes_needed()
        deadline = time.monotonic() + options.placement_timeout_s
        while True:
            leases = [self._take_lease()]
            try:
                self._take_further(leases, needed)
                nodes, late = {lease.node for lease in leases}, time.monotonic() > deadline
                # With fewer nodes than it takes for all, what others have would be given once more.
                sharing.plan(nodes, self._size, self._set_plan, anew=late or len(nodes) >= needed)
            except BaseException as error:
                for lease in leases:
                    self._leases.give(lease)
                if not isinstance(error, OverShareError):
                    raise
                if late or len(nodes) >= needed:
                    raise self._session.refuse(self._allowed, [error.unmet]) from None
            else:
                self._serving.update(lease.node for lease in leases)
                return leases
            # Not in step with another call that waits for the same nodes.
            time.sleep(PAUSE_S * (1 + secrets.randbelow(4)))
            self._cancelled.check()

    def _take_further(self, leases: list[Lease], needed: int) -> None:
        """Add further leases of a call to its first, on other nodes as long as there are some."""
        options = self._request.work.options
        most = 1 if options.whole else max(needed, options.concurrency)
        options = dataclasses.replace(options, concurrency=most)
        while len(leases) < most:
            nodes = {lease.node for lease in leases}
            lease = self._try_lease(EXTRA_LEASE_TIMEOUT_S, options, apart=nodes)
            if lease is None:
                return
            leases.append(lease)
            if lease.node in nodes and len(nodes) < needed:
                return

    def _work(self, worker: int, lease: Lease | None) -> None:
        """Serve one lease after another, the given one first, until nothing is pending that it could serve."""
        try:
            if lease is None:
                lease = self._lease(worker)
            while lease is not None:
                served = False
                try:
                    self._serve(lease)
                    served = True
                except LeaseLostError as error:
                    self._cancelled.check()
                    self._events({"event": "lost", "node": lease.node, "reason": error.reason})
                finally:
                    with self._lock:
                        self._serving[self._owner(lease)] -= 1
                        if self._resident is not None:
                            # What it had open, and did not get to, is for any other.
                            self._pending.disown(self._owners())
                        # In one hold: of two leases of a node the last one sees what the other left behind.
                        left = bool(self._pending.without(self._owners()))
                    leaves = self._leases.leaves(lease)
                    self._leases.give(lease)
                if served and not leaves and not left:
                    return
                lease = self._replacement()
                self._begin_serving(lease)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits for this one
            self._fail(error)

    def _begin_serving(self, lease: Lease | None) -> None:
        if lease is not None:
            with self._lock:
                self._serving[self._owner(lease)] += 1

    def _owner(self, lease: Lease) -> str:
        """Return whom the shards of a lease are for: a node, or the lease itself where it has some open."""
        return lease.node if self._resident is None else lease.id

    def _owners(self) -> list[str]:
        """Return that of each lease that works on this call; with the lock held."""
        return [owner for owner, leases in self._serving.items() if leases]

    def _lease(self, worker: int) -> Lease | None:
        """Take this worker's lease. One worker must get one; all begin together, with what there is."""
        lease, failed = None, None
        try:
            if worker == 0:
                try:
                    lease = self._take_lease()
                except NO_LEASE as error:
                    failed = error
                finally:
                    self._first.set()
            else:
                if not self._leases.has_room_for(self._terms, worker + 1):
                    # Else the only room could be this worker's, and the first would wait for it in vain.
                    self._first.wait()
                lease = self._try_lease(EXTRA_LEASE_TIMEOUT_S)
            self._holding |= lease is not None
            self._begin_serving(lease)
        finally:
            self._opened.wait()
        if self._resident is not None:
            with self._lock:
                self._pending.disown(self._owners())
        if failed is not None and not self._holding:
            raise failed
        return lease

    def _try_lease(self, timeout_s: float, options: Options | None = None, apart: Collection[str] = ()) -> Lease | None:
        return self._leases.try_take(
            self._terms,
            self._allowed.decision,
            options or self._request.work.options,
            timeout_s=timeout_s,
            check=self._cancelled.check,
            apart=apart,
        )

    def _take_lease(self) -> Lease:
        return self._leases.take(
            self._terms, self._allowed.decision, self._request.work.options, check=self._cancelled.check
        )

    def _replacement(self) -> Lease | None:
        """Return a lease in place of one that was lost, or ``None`` when the call needs none or can get none.

        While another lease works off the call's shards this waits in short turns; the last one waits for placement.
        """
        deadline = time.monotonic() + self._request.work.options.placement_timeout_s
        while True:
            with self._lock:
                serving = self._owners()
                if not self._pending.without(serving) or self._failure:
                    return None
            lease = self._try_lease(EXTRA_LEASE_TIMEOUT_S) if serving else self._take_lease()
            if lease is not None:
                try:
                    if self._adopt(lease):
                        return lease
                    if not serving and time.monotonic() > deadline:
                        assert self._sharing is not None
                        raise self._session.refuse(self._allowed, [self._sharing.over_share([lease.node])])
                except BaseException:
                    self._leases.give(lease)
                    raise
                self._leases.give(lease)
            time.sleep(PAUSE_S)

    def _adopt(self, lease: Lease) -> bool:
        """Give a lease's node the shards whose own is gone, as far as it may have them; tell whether there are any."""
        if self._sharing is None:
            return True
        with self._lock:
            orphans = self._pending.without(self._owners())
            others = [shard for shard in orphans if self._pending.owner(shard) != lease.node]
            moved = self._sharing.move(others, lease.node)
            self._pending.move(moved, lease.node)
            return bool(moved) or len(others) < len(orphans)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._pending.clear()

    def _serve(self, lease: Lease) -> None:
        """Send shards, at most ``IN_FLIGHT`` at once, and take results, until nothing is pending."""
        self._cancelled.watch(lease)
        check_imports(self._session, self._request, lease, self._events)
        spending = self._session.spending(
            self._allowed, lease, rows=self._plan.rows, calls=1, bytes_=self._most_bytes(lease)
        )
        flying: deque[Item] = deque()
        tally = Tally()
        try:
            current = self._begin(lease, spending)
            while item := self._next(lease, flying, leaves=tally.shards > 0 and self._leases.leaves(lease)):
                if item[0] >= 0:
                    flying.append(item)
                    tally.shards += 1
                    tally.rows += self._send(lease, spending, current, *item)
                else:
                    self._take(lease, current, flying)
            lease.finish(current)
            tally.outcome = "done" if self._failure is None else "failed"
        except (OSError, EnvelopeError, _DoubtedError) as error:
            lost = _lost(self._session, lease, error)
            self._put_back(flying + self._disowned(lease))
            raise lost from None
        except ZoneError as error:
            tally.outcome = "failed"
            if flying:
                # Answers that nobody waits for are on their way: no other call may use this lease.
                _lost(self._session, lease, error)
            raise
        finally:
            spending.settle(tally.outcome, rows=tally.rows)

    def _most_bytes(self, lease: Lease) -> int:
        """Return about what this lease may send: everything, framed and padded. More takes a further intent."""
        framing = len(self._plan) * ((16 << 10) + 1024 * self._table.num_columns)
        data = self._table.nbytes + framing
        return (
            (data * 2 if self._terms.padding is Padding.COARSE else data * 9 // 8)
            + lease.wire_bytes(len(self._request.work.function))
            + lease.wire_bytes(len(self._request.arguments))
            + sum(
                lease.wire_bytes(len(VALUE) + len(self._session.broadcasts.get(digest)))
                for digest in self._request.broadcasts
            )
        )

    def _begin(self, lease: Lease, spending: Spending) -> int:
        """Send function and arguments; return the call number that the lease knows the call by."""
        spending.draw(1, lease.wire_bytes(len(self._request.arguments)))
        function = prepare(self._session, self._request, lease, spending)
        current = lease.next_call()
        slot = lease.link.slot(Kind.ARGUMENTS, call=current, shard=function, attempt=int(self._resident is not None))
        lease.link.send(slot, self._request.arguments)
        return current

    def _next(self, lease: Lease, flying: deque[Item], *, leaves: bool) -> Item | None:
        """Return a shard to send, ``(-1, -1)`` to take a result, or ``None`` when all is done.

        Args:
            leaves: Whether the lease takes no more shards: its node is about to be restarted. It takes one at least,
                so that a call ends whatever the relay says.
        """
        with self._lock:
            if len(flying) < IN_FLIGHT and not (self._failure or leaves):
                item = self._pending.take(self._owner(lease))
                if item is not None:
                    return item
        return (-1, -1) if flying else None

    def _disowned(self, lease: Lease) -> deque[Item]:
        """Forget what a node that lied has answered to this call, and return its shards: others do them again."""
        with self._lock:
            found = [item for item, node in self._accepted.items() if lease.lied and node == lease.node]
            for index, attempt in found:
                del self._accepted[index, attempt]
                self._parts.pop(index, None)
                self._encoded.pop(index, None)
                self._done_rows -= self._plan.shard_rows(index)
            if found:
                del self._nodes[lease.node]
        return deque(found)

    def _put_back(self, flying: deque[Item]) -> None:
        """Queue a lost lease's shards again, each as a new attempt."""
        with self._lock:
            for index, attempt in flying:
                if attempt + 1 >= MAX_ATTEMPTS:
                    self._failure = self._failure or LeaseLostError(
                        f"a shard was sent {MAX_ATTEMPTS} times and its lease was lost each time; look at the nodes "
                        "(ray-gpu status), and in the function for an exit, a native crash or much memory",
                        node="",
                        reason="too many attempts",
                    )
                # First in line: what ends every lease that it is sent to shall be found out soon.
                self._pending.put_first((index, attempt + 1))

    def _send(self, lease: Lease, spending: Spending, current: int, index: int, attempt: int) -> int:
        """Send one shard and return its rows; of one that is open there, its number, and no rows."""
        open_since = self._open_since(lease, index)
        if open_since is not None:
            number = open_since.to_bytes(8, "big")
            wire = lease.wire_bytes(len(number))
            spending.draw(0, wire)
            lease.link.send(lease.link.slot(Kind.RECALL, call=current, shard=index, attempt=attempt), number)
            with self._lock:
                self._sent_bytes += wire
            return 0
        where = (self._table, self._plan, index) if self._staged is None else self._staged.shard(index)
        size = shards.write_shard(*where, lease.plain.payload)
        if size > SLOT_BYTES:
            raise ValueRefusedError(
                f"a shard has {size} bytes, over the limit of {SLOT_BYTES}, because its rows are that large; "
                "select fewer columns, or split the values over more rows"
            )
        plaintext = lease.plain.padded(size)
        wire = HEADER_BYTES + sealed_size(len(plaintext))
        spending.draw(0, wire)
        lease.link.send_padded(lease.link.slot(Kind.SHARD, call=current, shard=index, attempt=attempt), plaintext)
        with self._lock:
            self._sent_bytes += wire
        return self._plan.shard_rows(index)

    def _take(self, lease: Lease, current: int, flying: deque[Item]) -> None:
        """Receive one result, which must be the oldest shard's on this lease."""
        header, payload = _receive(lease)
        index, attempt = flying[0]
        if (header.call, header.shard, header.attempt) != (current, index, attempt):
            raise EnvelopeError
        rows, was_open = self._plan.shard_rows(index), self._open_since(lease, index) is not None
        expected = RowsExpected(rows) if self._request.mode is Mode.MAP else None
        failed: RemoteFunctionError | None = None
        try:
            try:
                outcome = open_outcome(payload, expected=expected)
            except RemoteFunctionError as error:
                if not self._request.return_exceptions:
                    raise
                failed, outcome = error, Outcome(value=None, encoded=payload[:0], printed=error.printed)
            if outcome.absent:
                self._absent(lease, flying[0], was_open=was_open)
                flying.popleft()
                return
            self._hold(len(payload))
        except (AnswerRefusedError, RowCountError) as error:
            self._doubt(lease, index, error)
            flying.popleft()
            return
        except ZoneError as error:
            flying.popleft()
            self._fail(error)
            return
        flying.popleft()
        self._accept(lease, (index, attempt), rows, outcome)
        if self._request.mode is Mode.STREAM:
            self._stream(index, outcome.encoded, failed)
            self._hold(-len(payload))
        if self._resident is not None and outcome.kept and not was_open:
            self._resident.keep(index, lease.id, current)

    def _stream(self, index: int, encoded: memoryview, failed: RemoteFunctionError | None) -> None:
        """Hand a value over, or what was raised. A caller that does not take it holds up the call."""
        part = {"event": "part", "shard": index}
        if failed is not None:
            self._events({**part, "failed": to_wire(failed)})
            return
        if len(encoded) <= INLINE_BYTES:
            self._events({**part, "inline": bytes(encoded)})
            return
        fd, places = share_encoded([encoded])
        try:
            self._events({**part, "places": places}, (fd,))
        finally:
            os.close(fd)

    def _open_since(self, lease: Lease, index: int) -> int | None:
        """Return the number of the call that brought a shard to a lease which has it open, or ``None``."""
        return None if self._resident is None else self._resident.brought_by(lease.id, index)

    def _absent(self, lease: Lease, item: Item, *, was_open: bool) -> None:
        """Let a shard be sent that a sandbox has open no more.

        Raises:
            EnvelopeError: It was never said to be open there.
        """
        if self._resident is None or not was_open:
            raise EnvelopeError
        self._resident.forget(lease.id, item[0])
        self._put_back(deque([item]))

    def _doubt(self, lease: Lease, index: int, error: ZoneError) -> None:
        """Take an answer that no honest node gives, unless the function is the cause: let another node say so.

        Raises:
            _DoubtedError: Another node can be asked; this lease is not to be used any more.
        """
        with self._lock:
            asked = self._doubts.get(index)
            self._doubts[index] = lease.node
        if asked is None and self._leases.others(lease):
            raise _DoubtedError(error.message)
        if asked not in (None, lease.node):
            self._leases.trust(str(asked))
        self._fail(_named(error, lease))

    def _hold(self, size: int) -> None:
        """Count what a result takes here. Nodes could send as much for each shard as fits a slot.

        Raises:
            ResultTooLargeError: The results of this call take more than the gateway gives to one call.
        """
        with self._lock:
            self._held_bytes += size
            held = self._held_bytes
        if size > 0 and not fits(held, self._session.services.memory_bytes):
            raise ResultTooLargeError(
                f"the results of this call take {held >> 20} MiB, more than the gateway has room for; return less for "
                "each shard, or call the function on parts of the data",
                size_bytes=held,
                limit_bytes=self._session.services.memory_bytes // 4,
            )

    def _accept(self, lease: Lease, item: tuple[int, int], rows: int, outcome: Outcome) -> None:
        index = item[0]
        with self._lock:
            self._accepted[item] = lease.node
            if self._request.mode is Mode.MAP:
                self._parts[index] = outcome.value
            elif self._request.mode is Mode.STREAM:
                self._streamed += 1
            else:
                self._encoded[index] = outcome.encoded
            self._nodes[lease.node] = self._nodes.get(lease.node, 0) + 1
            self._done_rows += rows
            done, sent, now = self._done_rows, self._sent_bytes, time.monotonic()
            tell = done == self._plan.rows or now - self._told > PROGRESS_INTERVAL_S
            self._told = now if tell else self._told
        if outcome.printed:
            self._events({"event": "printed", "text": outcome.printed})
        if tell:
            self._events({"event": "progress", "rows": done, "of": self._plan.rows, "bytes": sent})
