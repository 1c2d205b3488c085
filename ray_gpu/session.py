"""A person's session at the gateway: decisions, leases and budgets that its calls share. This module does I/O.

A decision is made once per (function, columns, classes, data set, pool) and reused; leases are kept
between calls, and an idle one is given back when another call of the session needs the room, or when
nobody used it for a minute. Caps on small bytes are counted here, over the whole session.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_gpu.leases import HEARTBEAT_S, Lease, LeaseOpener, LeaseTerms
from ray_gpu.request import Request
from ray_gpu.source import Source
from ray_gpu.spending import Spending
from zones.errors import (
    ClusterError,
    GrantRefusedError,
    LeaseLostError,
    LedgerError,
    PlacementError,
    SessionClosedError,
    UnknownNameError,
    VaultError,
    ZoneError,
)
from zones.labels import ARGUMENTS, classify, labels
from zones.ledger import Egress, Ledger
from zones.model import Decision, EgressRequest, Zone
from zones.policy import Policy
from zones.vault import Person

#: What one intent of small calls reserves: they draw from it without another fsync.
RESERVED_CALLS, RESERVED_BYTES = 1000, 64 << 20
#: A lease that answered so recently is not asked again whether it lives, seconds.
FRESH_S = 0.05
#: A lease that no call used for so long goes to another session that needs the room, seconds.
YIELD_AFTER_S = 2.0
#: A lease that no call used for so long is given back, seconds.
IDLE_LIMIT_S = 60.0
#: No call begins on a lease that ends so soon, seconds.
LAPSE_MARGIN_S = 5.0
#: How often a call that waits for a lease looks whether it was given up, seconds.
WAKE_S = 0.25
#: Ending a lease takes keeper, relay and Vault a moment each; each of them has its own limit below this, seconds.
FINISH_TIMEOUT_S = 60.0


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
    #: Makes the other sessions give back the leases that they do not use.
    reclaim: Callable[[Session], None]


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
        #: Calls that wait for a lease.
        self._waiting = 0
        self._allowed: dict[Any, Allowed] = {}
        self._terms: dict[tuple[int, int], LeaseTerms] = {}
        self._standing: dict[tuple[str, int], Spending] = {}
        self._functions_seen: set[str] = set()
        self._small_bytes = 0
        self._closed = False
        self._over = threading.Event()
        #: Connections that joined; the gateway counts them.
        self.connections = 0
        #: Threads that end leases.
        self._finishing: list[threading.Thread] = []
        self.receipts: list[dict[str, Any]] = []
        services.ledger.append({"kind": "session-start", "person": person.name, "session": self.id, "purpose": purpose})

    # -- decisions ------------------------------------------------------------------------------

    def decide(self, request: Request, source: Source | None) -> Allowed:
        """Ask policy and write its answer down, unless this session asked the same before.

        Raises:
            EgressDeniedError: Policy refuses.
            LedgerUnavailableError: The answer could not be written down.
        """
        self.check_open()
        zone = self.services.zone
        pool = request.work.options.pool or (zone.pools[0] if zone.pools else "")
        if pool not in zone.pools:
            raise UnknownNameError.of("pool", pool, zone.pools)
        small = self._count_small_bytes(request)
        what = (source.dataset, tuple(source.columns), source.filter_columns) if source else None
        key = (request.work.digest, pool, small, what)
        found = self._allowed.get(key)
        if found is None:
            try:
                found = self._allowed[key] = self._ask(request, source, pool, small)
            except BaseException:
                with self._lock:
                    # Nothing leaves; the function stays counted, once, so that asking again is not cheaper.
                    self._small_bytes -= len(request.arguments)
                raise
        return found

    def _count_small_bytes(self, request: Request) -> frozenset[str]:
        """Count the function, once, and the arguments towards the session's cap; return their class."""
        with self._lock:
            new = 0 if request.work.digest in self._functions_seen else len(request.work.function)
            small = classify(
                self.services.zone,
                dataset="",
                columns=None,
                # The function's own cap holds each time that it is asked for, not only the first time.
                function_bytes=len(request.work.function),
                argument_bytes=len(request.arguments),
                session_bytes=self._small_bytes - (len(request.work.function) - new),
            )
            self._functions_seen.add(request.work.digest)
            self._small_bytes += new + len(request.arguments)
        return small

    def _ask(self, request: Request, source: Source | None, pool: str, small: frozenset[str]) -> Allowed:
        """Ask policy about every byte: what leaves, what was filtered on, the function and its arguments."""
        zone, policy = self.services.zone, self.services.policy
        columns = {*source.columns, *source.filter_columns} if source else set()
        question = EgressRequest(
            zone=zone.name,
            pool=pool,
            person=self.person.name,
            groups=self.person.groups,
            purpose=self.purpose,
            dataset=source.dataset if source else "",
            columns=frozenset(source.columns) if source else ARGUMENTS,
            classes=small | set(labels(zone, source.dataset, columns).values()) if source else small,
            function_digest=request.work.digest,
        )
        decision = policy.decide(question)
        rows = source.rows if source else 0
        egress = Egress(request=question, session=self.id, policy_digest=decision.policy_digest, rows=rows)
        entry = self.services.ledger.decided(egress, decision)
        if not decision.allowed:
            raise policy.refusal(question, decision, labels(zone, source.dataset, source.columns) if source else None)
        return Allowed(request=question, decision=decision, entry=entry)

    # -- budgets --------------------------------------------------------------------------------

    def spending(self, allowed: Allowed, lease: Lease, *, rows: int, calls: int, bytes_: int) -> Spending:
        """Return a budget for *lease*; its first intent is written with the first draw."""
        egress = Egress(
            request=allowed.request,
            session=self.id,
            policy_digest=allowed.decision.policy_digest,
            rows=rows,
            node=lease.node,
            lease=lease.id,
            level=lease.level,
            degradations=tuple(sorted({*lease.degradations, *self.services.degradations})),
        )
        return Spending(self.services.ledger, egress, decision=allowed.entry, calls=calls, bytes_=bytes_)

    def standing(self, allowed: Allowed, lease: Lease) -> Spending:
        """Return the budget that small calls under one decision share on *lease*."""
        key = (lease.id, allowed.entry)
        found = self._standing.get(key)
        if found is None:
            found = self._standing[key] = self.spending(
                allowed, lease, rows=0, calls=RESERVED_CALLS, bytes_=RESERVED_BYTES
            )
        return found

    # -- leases ---------------------------------------------------------------------------------

    def terms(self, allowed: Allowed, request: Request) -> LeaseTerms:
        """Return what leases a call needs."""
        key = (allowed.entry, request.work.options.gpu_milli)
        found = self._terms.get(key)
        if found is None:
            obligations = allowed.decision.obligations
            found = self._terms[key] = LeaseTerms(
                pool=allowed.request.pool,
                gpu_milli=request.work.options.gpu_milli,
                accepted_degradations=tuple(sorted(obligations.accepted_degradations)),
                max_lease_s=obligations.max_lease_s,
            )
        return found

    def try_lease(
        self, allowed: Allowed, request: Request, *, timeout_s: float, check: Callable[[], None]
    ) -> Lease | None:
        """Return another lease for a call that has one already, or ``None`` when none can be had in time."""
        try:
            if not self._has_more_room(self.terms(allowed, request)):
                return None
            return self.take(allowed, request, timeout_s=timeout_s, check=check)
        except (PlacementError, ClusterError, LeaseLostError, GrantRefusedError, VaultError):
            return None

    def take(
        self, allowed: Allowed, request: Request, *, check: Callable[[], None], timeout_s: float | None = None
    ) -> Lease:
        """Return a lease for one call: an idle one, a new one if there may be more, else the first that is free.

        Args:
            check: Raises when the call was given up meanwhile.
            timeout_s: Most seconds to wait; by default until the session's other calls are over, and then for
                room as long as the call says.

        Raises:
            PlacementError, SandboxLevelError, GrantRefusedError: None can be had.
        """
        terms = self.terms(allowed, request)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                check()
                self.check_open()
                self._drop_lost()
                same = [lease for lease in self._leases if lease.terms is terms or lease.terms == terms]
                for lease in same:
                    if lease.lock.acquire(blocking=False):
                        return lease
                if len(same) + self._opening < request.work.options.concurrency:
                    self._opening += 1
                    break
                if deadline is not None and time.monotonic() > deadline:
                    raise PlacementError(
                        "every lease of this session is in use; wait for its other calls, or give it "
                        "more with .options(concurrency=...)",
                        pool=terms.pool,
                        reason="in use",
                    )
                self._waiting += 1
                self._room.wait(timeout=WAKE_S)
                self._waiting -= 1
        return self._open(terms, allowed, request, timeout_s)

    def has_room_for(self, allowed: Allowed, request: Request, leases: int) -> bool:
        """Tell whether a call finds so many leases at once: idle ones, and free shares of nodes. A hint."""
        terms = self.terms(allowed, request)
        idle = sum(lease.terms == terms and not lease.lock.locked() for lease in list(self._leases))
        return idle >= leases or self.services.opener.rooms.has_room(terms.pool, terms.gpu_milli, leases=leases - idle)

    def _has_more_room(self, terms: LeaseTerms) -> bool:
        """Tell whether asking for a further lease is worth waiting: one is idle, or a node has a free share."""
        if any(lease.terms == terms and not lease.lock.locked() for lease in list(self._leases)):
            return True
        self.services.reclaim(self)
        return self.services.opener.rooms.has_room(terms.pool, terms.gpu_milli)

    def _open(self, terms: LeaseTerms, allowed: Allowed, request: Request, timeout_s: float | None) -> Lease:
        options = request.work.options
        wait = options.placement_timeout_s if timeout_s is None else timeout_s
        try:
            self._end([lease for lease in self._leases if lease.terms != terms])
            if not self.services.opener.rooms.has_room(terms.pool, terms.gpu_milli):
                self.services.reclaim(self)
            lease = self.services.opener.open(
                terms,
                allowed.decision,
                timeout_s=wait if options.timeout_s is None else min(wait, options.timeout_s),
                patient=timeout_s is None,
            )
            lease.lock.acquire()
            with self._lock:
                closed = self._closed
                self._leases.append(lease)
        finally:
            with self._lock:
                self._opening -= 1
                self._room.notify_all()
        if closed:
            self._end([lease], held=True)
            self.check_open()
        return lease

    def give(self, lease: Lease) -> None:
        """Give a lease back after a call."""
        lease.idle_since = time.monotonic()
        lease.lock.release()
        with self._lock:
            if self._waiting:
                self._room.notify_all()

    def _drop_lost(self) -> None:
        """Give back, in the background, what was lost, ends soon, idled long, or is on a node that drains. Locked."""
        for lease in list(self._leases):
            if lease.lock.acquire(blocking=False):
                if not self.leaves(lease) and _usable(lease):
                    lease.lock.release()
                    continue
                self._leases.remove(lease)
                thread = threading.Thread(target=self._finish_lease, args=(lease,), daemon=True)
                self._finishing = [item for item in self._finishing if item.is_alive()] + [thread]
                thread.start()

    def _end(self, leases: list[Lease], *, held: bool = False) -> None:
        """End those of *leases* that no call uses."""
        for lease in leases:
            if held or lease.lock.acquire(blocking=False):
                with self._lock:
                    if lease in self._leases:
                        self._leases.remove(lease)
                self._finish_lease(lease)

    def _finish_lease(self, lease: Lease) -> None:
        """Close a lease and write down what its budgets were used for and what its custodian attests."""
        receipt = self.services.opener.close(lease)
        if receipt:
            self.receipts.append(receipt)
        outcome = "done" if receipt else "lost"
        with contextlib.suppress(LedgerError):
            for key in [key for key in self._standing if key[0] == lease.id]:
                self._standing.pop(key).settle(outcome)
            self.services.ledger.append(
                {
                    "kind": "lease-end",
                    "person": self.person.name,
                    "session": self.id,
                    "lease": lease.id,
                    "node": lease.node,
                    "outcome": outcome,
                    "receipt": receipt,
                }
            )

    def lose(self, lease_id: str, reason: str) -> None:
        """Mark a lease as lost: the relay says that its actor died. Wakes whoever waits on its connection."""
        for lease in list(self._leases):
            if lease.id == lease_id and not lease.lost:
                lease.lost = reason or "the GPU actor died"
                lease.link.shutdown()

    def yield_idle(self) -> None:
        """Give back the leases that no call has used for a moment: another session has no room."""
        now = time.monotonic()
        self._end([lease for lease in list(self._leases) if now - lease.idle_since > YIELD_AFTER_S])

    def heartbeat(self) -> None:
        """Keep idle leases alive, and give back those that nobody used for long. Called every few seconds."""
        for lease in list(self._leases):
            if time.time() > lease.not_after and not lease.lost:
                # Its keeper ends it too, unless that hangs.
                lease.lost = "its time is over"
                lease.link.shutdown()
            # While something is being sent, that says that we are here; and waiting for it could take long.
            if lease.lost or lease.link.sending:
                continue
            try:
                lease.control({})
            except (OSError, ZoneError, ValueError):
                lease.lost = lease.lost or "connection lost"
                lease.link.shutdown()
        self.drop_unusable()

    def leaves(self, lease: Lease) -> bool:
        """Tell whether a lease's node is about to be restarted: the lease is given back after what it does now."""
        return lease.node in self.services.opener.rooms.draining

    def drop_unusable(self) -> None:
        """Give back, in the background, the leases that no call uses and no call shall."""
        with self._lock:
            if not self._closed:
                self._drop_lost()

    def check_open(self) -> None:
        """Raise if the session was closed.

        Raises:
            SessionClosedError: It was.
        """
        if self._closed:
            raise SessionClosedError("the session has ended; attach again with ray_gpu.attach(...)")

    def close(self) -> None:
        """End every lease, shred every key, and write the session's end. Running calls fail.

        Returns when all that is done, also to a second caller.
        """
        with self._lock:
            first, self._closed = not self._closed, True
            leases, self._leases = self._leases, []
            self._room.notify_all()
        if not first:
            self._over.wait(FINISH_TIMEOUT_S)
            return
        try:
            self._close(leases)
        finally:
            self._over.set()

    def _close(self, leases: list[Lease]) -> None:
        for lease in leases:
            if not lease.lock.acquire(timeout=0.2):
                lease.lost = "the session was closed"
                lease.link.shutdown()
                lease.lock.acquire(timeout=HEARTBEAT_S)
        ending = [threading.Thread(target=self._finish_lease, args=(lease,)) for lease in leases]
        for thread in ending:
            thread.start()
        for thread in [*ending, *self._finishing]:
            thread.join(FINISH_TIMEOUT_S)
        with contextlib.suppress(ZoneError):
            self.services.ledger.append({"kind": "session-end", "person": self.person.name, "session": self.id})

    def status(self) -> dict[str, Any]:
        """Return what a session card shows."""
        return {
            "session": self.id,
            "zone": self.services.zone.name,
            "person": self.person.name,
            "groups": sorted(self.person.groups),
            "purpose": self.purpose,
            "small_bytes": self._small_bytes,
            "policy_digest": self.services.zone.policy_digest,
            "leases": [
                {
                    "lease": lease.id,
                    "node": lease.node,
                    "device": lease.device,
                    "level": lease.level,
                    "degradations": list(lease.degradations),
                    "gpu_milli": lease.terms.gpu_milli,
                }
                for lease in list(self._leases)
            ],
            "receipts": list(self.receipts),
        }


def _usable(lease: Lease) -> bool:
    """Tell whether a lease that no call uses is good for another call."""
    if lease.lost or time.time() > lease.not_after - LAPSE_MARGIN_S:
        return False
    if lease.idle_since and time.monotonic() - lease.idle_since > IDLE_LIMIT_S:
        return False
    if time.monotonic() - lease.idle_since < FRESH_S:
        return True
    # Nothing arrives unasked: whatever there is to read from an idle keeper is its end.
    poller = select.poll()
    poller.register(lease.link.fileno(), select.POLLIN | select.POLLRDHUP)
    if poller.poll(0):
        lease.lost = "its keeper or sandbox ended while idle"
        return False
    return True
