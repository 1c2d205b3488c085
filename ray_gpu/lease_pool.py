"""The leases of one session: taken for a call, given back after it, kept between calls. This module does I/O.

An idle lease is given back when another call of the session needs other terms, when another session needs the room,
when its node is about to be restarted, or when nobody used it for a minute.
"""

from __future__ import annotations

import math
import select
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

from ray_gpu.leases import HEARTBEAT_S, Lease, LeaseOpener, LeaseTerms
from ray_gpu.request import Options
from zones.environments import Environment
from zones.errors import (
    ClusterError,
    GrantRefusedError,
    LeaseLostError,
    PlacementError,
    SessionClosedError,
    VaultError,
    ZoneError,
)
from zones.model import Decision

#: A lease that answered so recently is not asked again whether it lives, seconds.
FRESH_S = 0.05
#: A lease that no call used for so long goes to another session that needs the room, seconds.
YIELD_AFTER_S = 2.0
#: For so long after somebody had no room leases are given back once they idled that long, seconds.
WANTED_S = 30.0
#: No call begins on a lease that ends so soon, seconds.
LAPSE_MARGIN_S = 5.0
#: How often a call that waits for a lease looks whether it was given up, seconds.
WAKE_S = 0.25
#: Ending a lease takes keeper, relay and Vault a moment each; each of them has its own limit below this, seconds.
FINISH_TIMEOUT_S = 60.0
#: Why a lease could not be had.
NO_LEASE = (PlacementError, ClusterError, LeaseLostError, GrantRefusedError, VaultError)


class LeasePool:
    """Thread-safe.

    Args:
        opener: Opens and closes leases.
        reclaim: Makes other sessions give back the leases that they do not use.
        ended: Told of each lease that was closed, with its custodian's receipt if that came.
    """

    #: A lease that no call used for so long is given back, seconds.
    idle_limit_s = 60.0

    def __init__(
        self,
        opener: LeaseOpener,
        *,
        reclaim: Callable[[], None],
        ended: Callable[[Lease, dict[str, Any] | None], None],
    ) -> None:
        self.opener, self.reclaim, self.ended = opener, reclaim, ended
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._leases: list[Lease] = []
        self._opening = 0
        #: Leases that it opened so far.
        self.opened = 0
        #: Calls that wait for a lease.
        self._waiting = 0
        self.closed = False
        #: When somebody else last had no room.
        self._wanted = -math.inf
        #: Threads that end leases.
        self._finishing: list[threading.Thread] = []
        #: Nodes that sent what no honest node sends, and what that was: passed over while the pool has others.
        self.distrusted: dict[str, str] = {}
        #: Each lease that did so.
        self.lies: list[dict[str, str]] = []

    def __contains__(self, lease: Lease) -> bool:
        return lease in self._leases

    def check_open(self) -> None:
        """Raise if the session was closed.

        Raises:
            SessionClosedError: It was.
        """
        if self.closed:
            raise SessionClosedError("the session has ended; attach again with ray_gpu.attach(...)")

    def try_take(
        self,
        terms: LeaseTerms,
        decision: Decision,
        options: Options,
        *,
        timeout_s: float,
        check: Callable[[], None],
        apart: Collection[str] = (),
    ) -> Lease | None:
        """Return another lease for a call that has one already, or ``None`` when none can be had in time."""
        try:
            if not self._has_more_room(terms):
                return None
            return self.take(terms, decision, options, timeout_s=timeout_s, check=check, apart=apart)
        except NO_LEASE:
            return None

    def take(
        self,
        terms: LeaseTerms,
        decision: Decision,
        options: Options,
        *,
        check: Callable[[], None],
        timeout_s: float | None = None,
        apart: Collection[str] = (),
    ) -> Lease:
        """Return a lease for one call: an idle one, a new one if there may be more, else the first that is free.

        Args:
            terms: What the call needs.
            decision: What a new lease must satisfy.
            options: The call's.
            check: Raises when the call was given up meanwhile.
            timeout_s: Most seconds to wait; by default until the session's other calls are over, and then for
                room as long as the call says.
            apart: Nodes that it should not be on, as long as others have room.

        Raises:
            PlacementError, SandboxLevelError, GrantRefusedError: None can be had.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                lease, same = self._claim(terms, check, apart)
                if lease is not None:
                    return lease
                if same + self._opening < options.concurrency:
                    self._opening += 1
                    break
                if deadline is not None and time.monotonic() > deadline:
                    raise PlacementError(
                        "every lease of this session is in use; wait for its other calls, or give it "
                        "more with .options(concurrency=...)",
                        pool=terms.pool,
                        reason="in use",
                    )
                self._await_change()
        return self._open(terms, decision, options, timeout_s, apart)

    def take_free(self, terms: LeaseTerms, *, check: Callable[[], None]) -> Lease | None:
        """Return one of the session's leases once it is free; ``None`` when it has none, nor opens any."""
        while True:
            with self._lock:
                lease, same = self._claim(terms, check)
                if lease is not None:
                    return lease
                if not same and not self._opening:
                    return None
                self._await_change()

    def _claim(
        self, terms: LeaseTerms, check: Callable[[], None], apart: Collection[str] = ()
    ) -> tuple[Lease | None, int]:
        """Return a lease that was free and is now the caller's, if any, and how many there are; with the lock held."""
        check()
        self.check_open()
        self._drop_lost(self.idle_limit_s)
        same = self._same(terms)
        fitting = (lease for lease in same if lease.node not in apart and lease.lock.acquire(blocking=False))
        return next(fitting, None), len(same)

    def _await_change(self) -> None:
        """Wait until a lease may be free; with the lock held."""
        self._waiting += 1
        self._room.wait(timeout=WAKE_S)
        self._waiting -= 1

    def _same(self, terms: LeaseTerms) -> list[Lease]:
        return [lease for lease in self._leases if lease.terms is terms or lease.terms == terms]

    def has_room_for(self, terms: LeaseTerms, leases: int) -> bool:
        """Tell whether a call finds so many leases at once: idle ones, and free shares of nodes. A hint."""
        idle = sum(lease.terms == terms and not lease.lock.locked() for lease in list(self._leases))
        return idle >= leases or self.opener.rooms.has_room(
            terms.pool, terms.gpu_milli, leases=leases - idle, distrusted=self.distrusted
        )

    def _has_more_room(self, terms: LeaseTerms) -> bool:
        """Tell whether asking for a further lease is worth waiting: one is idle, or a node has a free share."""
        if any(lease.terms == terms and not lease.lock.locked() for lease in list(self._leases)):
            return True
        self.reclaim()
        return self.opener.rooms.has_room(terms.pool, terms.gpu_milli, distrusted=self.distrusted)

    def _open(
        self,
        terms: LeaseTerms,
        decision: Decision,
        options: Options,
        timeout_s: float | None,
        apart: Collection[str],
    ) -> Lease:
        wait = options.placement_timeout_s if timeout_s is None else timeout_s
        try:
            self._end([lease for lease in self._leases if lease.terms != terms])
            if not self.opener.rooms.has_room(terms.pool, terms.gpu_milli, distrusted=self.distrusted):
                self.reclaim()
            lease = self.opener.open(
                terms,
                decision,
                timeout_s=wait if options.timeout_s is None else min(wait, options.timeout_s),
                patient=lambda: timeout_s is None and not self._same(terms),
                distrusted={**dict.fromkeys(apart, "the call has a lease there"), **self.distrusted},
            )
            lease.lock.acquire()
            with self._lock:
                closed = self.closed
                self._leases.append(lease)
                self.opened += 1
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

    def _drop_lost(self, idle_limit_s: float) -> None:
        """Give back, in the background, leases that were lost, end soon, idled so long, or whose node drains.

        Holds the lock.
        """
        for lease in list(self._leases):
            if lease.lock.acquire(blocking=False):
                if not self.leaves(lease) and _usable(lease, idle_limit_s):
                    lease.lock.release()
                    continue
                self._remove(lease)
                thread = threading.Thread(target=self._finish_lease, args=(lease,), daemon=True)
                self._finishing = [item for item in self._finishing if item.is_alive()] + [thread]
                thread.start()

    def _end(self, leases: list[Lease], *, held: bool = False) -> None:
        """End those of *leases* that no call uses."""
        for lease in leases:
            if held or lease.lock.acquire(blocking=False):
                with self._lock:
                    if lease in self._leases:
                        self._remove(lease)
                self._finish_lease(lease)

    def _remove(self, lease: Lease) -> None:
        """Take a lease out; with the lock held."""
        self._leases.remove(lease)

    def _finish_lease(self, lease: Lease) -> None:
        self.ended(lease, self.opener.close(lease))

    def lose(self, lease_id: str, reason: str) -> None:
        """Mark a lease as lost: the relay says that its actor died. Wakes whoever waits on its connection."""
        for lease in list(self._leases):
            if lease.id == lease_id and not lease.lost:
                lease.lost = reason or "the GPU actor died"
                lease.link.shutdown()

    def distrust(self, lease: Lease, why: str) -> None:
        """End a lease that sent what no honest node sends, and pass its node over from now on."""
        with self._lock:
            if not lease.lied:
                lease.lied = True
                self.lies.append({"lease": lease.id, "node": lease.node, "reason": why})
            self.pass_over(lease.node, why)
            same = [other for other in self._leases if other.node == lease.node and other is not lease]
        lease.lost = lease.lost or why
        lease.link.shutdown()
        for other in same:
            if other.lock.acquire(blocking=False):
                other.lost = other.lost or f"another lease of its node lied: {why}"
                other.lock.release()

    def pass_over(self, node: str, why: str) -> None:
        """Take no lease of a node from now on, while the pool has others."""
        self.distrusted = {**self.distrusted, node: why}

    def trust(self, node: str) -> None:
        """Take back what was held against a node: another one gave the same answer, so the function is the cause."""
        with self._lock:
            self.distrusted = {name: why for name, why in self.distrusted.items() if name != node}

    def others(self, lease: Lease) -> bool:
        """Tell whether another node could say what it makes of the same work: a lease of it is here, or it has room."""
        terms = lease.terms
        without = {**self.distrusted, lease.node: "asked already"}
        deadline = time.monotonic() + FINISH_TIMEOUT_S
        with self._lock:
            while self._opening and time.monotonic() < deadline:
                # Where that lease will be, is not known yet.
                self._room.wait(timeout=WAKE_S)
            here = [other for other in self._leases if not other.lost and other.terms == terms]
        if any(other.node not in without for other in here):
            return True
        rooms = self.opener.rooms
        if not rooms.passed_over(terms.pool, without):
            return False
        if not rooms.has_room(terms.pool, terms.gpu_milli, distrusted=without):
            self.reclaim()
        return rooms.has_room(terms.pool, terms.gpu_milli, distrusted=without)

    def yield_idle(self, after_s: float = YIELD_AFTER_S) -> None:
        """Give back the leases that no call has used for so long: somebody else has no room, and may wait for it."""
        now = self._wanted = time.monotonic()
        self._end([lease for lease in list(self._leases) if now - lease.idle_since > after_s])

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
        return lease.node in self.opener.rooms.draining

    def drop_unusable(self) -> None:
        """Give back, in the background, the leases that no call uses and no call shall, or that somebody waits for."""
        waited_for = time.monotonic() - self._wanted < WANTED_S
        with self._lock:
            if not self.closed:
                self._drop_lost(min(self.idle_limit_s, YIELD_AFTER_S) if waited_for else self.idle_limit_s)

    def close(self) -> None:
        """End every lease. Calls that use one fail."""
        with self._lock:
            self.closed = True
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
        for thread in [*ending, *self._finishing]:
            thread.join(FINISH_TIMEOUT_S)

    def status(self) -> list[tuple[dict[str, Any], Environment]]:
        """Return what a session card shows of each lease, and what can be imported there."""
        return [
            (
                {
                    "lease": lease.id,
                    "node": lease.node,
                    "device": lease.device,
                    "level": lease.level,
                    "degradations": list(lease.degradations),
                    "gpu_milli": lease.terms.gpu_milli,
                    "environment": lease.contents.digest,
                },
                lease.contents,
            )
            for lease in list(self._leases)
        ]


def _usable(lease: Lease, idle_limit_s: float) -> bool:
    """Tell whether a lease that no call uses is good for another call."""
    if lease.lost or time.time() > lease.not_after - LAPSE_MARGIN_S:
        return False
    if lease.idle_since and time.monotonic() - lease.idle_since > idle_limit_s:
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
