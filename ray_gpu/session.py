"""A person's session at the gateway: decisions, leases and budgets that its calls share. This module does I/O.

A decision is made once per (function, columns, classes, data set, pool) and reused; leases are kept
between calls, and an idle one is given back when another call of the session, or another session,
needs the room. Caps on small bytes are counted here, over the whole session.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_gpu.leases import HEARTBEAT_S, Lease, LeaseOpener, LeaseTerms
from ray_gpu.request import Request
from ray_gpu.source import Source
from zones.budget import Budget
from zones.errors import BudgetSpentError, LeaseLostError, PlacementError, SessionClosedError, UnknownNameError, ZoneError
from zones.labels import ARGUMENTS, classify, labels
from zones.ledger import Egress, Ledger
from zones.model import Decision, EgressRequest, Zone
from zones.policy import Policy
from zones.vault import Person

#: What one intent of small calls reserves: they draw from it without another fsync.
RESERVED_CALLS, RESERVED_BYTES = 1000, 64 << 20
#: A lease that no call used for so long is given back, seconds.
IDLE_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneServices:
    """What all sessions of a gateway share."""

    zone: Zone
    policy: Policy
    ledger: Ledger
    opener: LeaseOpener
    data_dir: Path
    #: Degradations of the zone's own side, for example ``embedded-vault``.
    degradations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """An allowed decision, written down."""

    request: EgressRequest
    decision: Decision
    #: Number of the ledger's decision entry.
    entry: int


class Session:
    """One attach. Thread-safe."""

    def __init__(self, services: ZoneServices, person: Person, purpose: str) -> None:
        self.services = services
        self.person = person
        self.purpose = purpose
        self.id = secrets.token_hex(8)
        self.secret = secrets.token_hex(16)
        self.started = time.time()
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._leases: list[Lease] = []
        self._opening = 0
        self._allowed: dict[Any, Allowed] = {}
        self._budgets: dict[tuple[str, int], Budget] = {}
        self._functions_seen: set[str] = set()
        self._small_bytes = 0
        self._closed = False
        self.receipts: list[dict[str, Any]] = []
        services.ledger.append({"kind": "session-start", "person": person.name, "session": self.id, "purpose": purpose})

    # -- decisions ------------------------------------------------------------------------------

    def decide(self, request: Request, source: Source | None) -> Allowed:
        """Ask policy and write its answer down, unless this session asked the same before.

        Raises:
            EgressDeniedError: Policy refuses.
            LedgerUnavailableError: The answer could not be written down.
        """
        zone = self.services.zone
        pool = request.options.pool or (zone.pools[0] if zone.pools else "")
        if pool not in zone.pools:
            raise UnknownNameError.of("pool", pool, zone.pools)
        columns = frozenset(source.columns) if source else ARGUMENTS
        dataset = source.dataset if source else ""
        question = EgressRequest(
            zone=zone.name, pool=pool, person=self.person.name, groups=self.person.groups, purpose=self.purpose,
            dataset=dataset, columns=columns, classes=self._classes(request, source),
            function_digest=request.function_digest)
        key = (question, zone.policy_digest)
        found = self._allowed.get(key)
        if found is None:
            found = self._allowed[key] = self._ask(question, source)
        self._count_small_bytes(request)
        return found

    def _ask(self, question: EgressRequest, source: Source | None) -> Allowed:
        decision = self.services.policy.decide(question)
        egress = Egress(request=question, session=self.id, policy_digest=decision.policy_digest,
                        rows=source.rows if source else 0)
        entry = self.services.ledger.decided(egress, decision)
        if not decision.allowed:
            classes = labels(self.services.zone, question.dataset, source.columns) if source else None
            raise self.services.policy.refusal(question, decision, classes)
        return Allowed(request=question, decision=decision, entry=entry)

    def _classes(self, request: Request, source: Source | None) -> frozenset[str]:
        """Classify every byte: what leaves, what was filtered on, the function and its arguments."""
        new_function = 0 if request.function_digest in self._functions_seen else len(request.function)
        columns = {*source.columns, *source.filter_columns} if source else None
        with self._lock:
            return classify(self.services.zone, dataset=source.dataset if source else "", columns=columns,
                            function_bytes=new_function, argument_bytes=len(request.arguments),
                            session_bytes=self._small_bytes)

    def _count_small_bytes(self, request: Request) -> None:
        with self._lock:
            if request.function_digest not in self._functions_seen:
                self._functions_seen.add(request.function_digest)
                self._small_bytes += len(request.function)
            self._small_bytes += len(request.arguments)

    # -- budgets --------------------------------------------------------------------------------

    def egress(self, allowed: Allowed, lease: Lease, rows: int) -> Egress:
        """Return the fields of an intent entry."""
        return Egress(request=allowed.request, session=self.id, policy_digest=allowed.decision.policy_digest, rows=rows,
                      node=lease.node, lease=lease.id, level=lease.level, degradations=lease.degradations)

    def draw(self, allowed: Allowed, lease: Lease, bytes_: int) -> None:
        """Draw one small call from this session's standing budget, writing a new intent when it is spent.

        Raises:
            LedgerUnavailableError: The intent could not be written; nothing may leave.
        """
        key = (lease.id, allowed.entry)
        budget = self._budgets.get(key)
        if budget is not None:
            try:
                budget.draw(1, bytes_)
                return
            except BudgetSpentError:
                budget.settle(outcome="done")
        budget = self.services.ledger.intend(self.egress(allowed, lease, 0), decision=allowed.entry,
                                             calls=RESERVED_CALLS, bytes_=max(RESERVED_BYTES, bytes_))
        self._budgets[key] = budget
        budget.draw(1, bytes_)

    def intend(self, allowed: Allowed, lease: Lease, *, rows: int, bytes_: int) -> Budget:
        """Write the intent of one call over shards; it is on disk when this returns.

        Raises:
            LedgerUnavailableError: It could not be written; nothing may leave.
        """
        return self.services.ledger.intend(self.egress(allowed, lease, rows), decision=allowed.entry, calls=1,
                                           bytes_=bytes_)

    # -- leases ---------------------------------------------------------------------------------

    def terms(self, allowed: Allowed, request: Request) -> LeaseTerms:
        """Return what leases a call needs."""
        obligations = allowed.decision.obligations
        return LeaseTerms(pool=allowed.request.pool, gpu_milli=request.options.gpu_milli,
                          accepted_degradations=tuple(sorted(obligations.accepted_degradations)),
                          max_lease_s=obligations.max_lease_s)

    def try_lease(self, allowed: Allowed, request: Request, *, timeout_s: float) -> Lease | None:
        """Return another lease for a call that has one already, or ``None`` when there is no room."""
        try:
            return self.take(allowed, request, timeout_s=timeout_s)
        except (PlacementError, LeaseLostError):
            return None

    def take(self, allowed: Allowed, request: Request, *, timeout_s: float | None = None) -> Lease:
        """Return a lease for one call: an idle one, a new one if there may be more, else the first that is free.

        Raises:
            PlacementError, SandboxLevelError, GrantRefusedError: None can be had.
        """
        terms = self.terms(allowed, request)
        while True:
            with self._room:
                self._check_open()
                self._drop_lost()
                same = [lease for lease in self._leases if lease.terms == terms]
                for lease in same:
                    if lease.lock.acquire(blocking=False):
                        return lease
                if len(same) + self._opening >= request.options.concurrency:
                    self._room.wait(timeout=1.0)
                    continue
                self._opening += 1
            return self._open(terms, allowed, request, timeout_s)

    def _open(self, terms: LeaseTerms, allowed: Allowed, request: Request, timeout_s: float | None) -> Lease:
        try:
            self._end([lease for lease in self._leases if lease.terms != terms])
            wait = request.options.placement_timeout_s if timeout_s is None else timeout_s
            lease = self.services.opener.open(terms, allowed.decision, timeout_s=wait)
            lease.lock.acquire()
            with self._lock:
                closed = self._closed
                self._leases.append(lease)
        finally:
            with self._room:
                self._opening -= 1
                self._room.notify_all()
        if closed:
            self._end([lease], held=True)
            self._check_open()
        return lease

    def give(self, lease: Lease) -> None:
        """Give a lease back after a call."""
        lease.idle_since = time.monotonic()
        lease.lock.release()
        with self._room:
            self._room.notify_all()

    def _drop_lost(self) -> None:
        for lease in [lease for lease in self._leases if lease.lost]:
            if lease.lock.acquire(blocking=False):
                self._leases.remove(lease)
                threading.Thread(target=self._finish_lease, args=(lease,), daemon=True).start()

    def _end(self, leases: list[Lease], *, held: bool = False) -> None:
        """End those of *leases* that no call uses."""
        for lease in leases:
            if held or lease.lock.acquire(blocking=False):
                with self._lock:
                    if lease in self._leases:
                        self._leases.remove(lease)
                self._finish_lease(lease)

    def _finish_lease(self, lease: Lease) -> None:
        """Close a lease, take its receipt, and write down what its standing budgets were used for."""
        receipt = self.services.opener.close(lease)
        if receipt:
            self.receipts.append(receipt)
        for key in [key for key in self._budgets if key[0] == lease.id]:
            with contextlib.suppress(ZoneError):
                self._budgets.pop(key).settle(outcome="done" if receipt else "lost", receipt=receipt)

    def lose(self, lease_id: str, reason: str) -> None:
        """Mark a lease as lost: the relay says that its actor died. Wakes whoever waits on its connection."""
        for lease in list(self._leases):
            if lease.id == lease_id and not lease.lost:
                lease.lost = reason or "the GPU actor died"
                lease.link.shutdown()

    def heartbeat(self) -> None:
        """Keep idle leases alive, and give back those that nobody used for long. Called every few seconds."""
        now = time.monotonic()
        for lease in list(self._leases):
            with contextlib.suppress(OSError, ZoneError, ValueError):
                if not lease.lost:
                    lease.control({})
        self._end([lease for lease in list(self._leases) if lease.idle_since and now - lease.idle_since > IDLE_LIMIT_S])

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("the session has ended; attach again with ray_gpu.attach(...)")

    def close(self) -> None:
        """End every lease, shred every key, and write the session's end. Running calls fail."""
        with self._room:
            if self._closed:
                return
            self._closed = True
            leases, self._leases = self._leases, []
            self._room.notify_all()
        for lease in leases:
            if not lease.lock.acquire(timeout=0.2):
                lease.lost = "the session was closed"
                lease.link.shutdown()
                lease.lock.acquire(timeout=HEARTBEAT_S)
        ending = [threading.Thread(target=self._finish_lease, args=(lease,)) for lease in leases]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()
        with contextlib.suppress(ZoneError):
            self.services.ledger.append({"kind": "session-end", "person": self.person.name, "session": self.id})

    def status(self) -> dict[str, Any]:
        """Return what a session card shows."""
        return {
            "session": self.id, "zone": self.services.zone.name, "person": self.person.name,
            "groups": sorted(self.person.groups), "purpose": self.purpose, "small_bytes": self._small_bytes,
            "policy_digest": self.services.zone.policy_digest,
            "leases": [{"lease": lease.id, "node": lease.node, "device": lease.device, "level": lease.level,
                        "degradations": list(lease.degradations), "gpu_milli": lease.terms.gpu_milli}
                       for lease in list(self._leases)],
            "receipts": list(self.receipts),
        }
