"""The leases of one instance of a stateful class: its sandboxes, which have its state, and no others."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import fields

from ray_gpu.lease_pool import LeasePool
from ray_gpu.leases import Lease, LeaseTerms
from ray_gpu.request import Options
from zones.errors import InstanceLostError, PlacementError
from zones.model import Decision


def lost_state(node: str, reason: str) -> InstanceLostError:
    """Return the error for an instance that lost a sandbox."""
    return InstanceLostError(
        f"the instance lost its sandbox on {node}, and its state with it ({reason}); make another one with "
        ".remote(...), and give it what you kept of the state",
        node=node,
        reason=reason,
    )


class InstancePool(LeasePool):
    """Leases that were taken while the instance was made, until it ends. Thread-safe.

    Nobody else's calls run on them, they are not given back while they are idle, and none comes in place of one that
    is lost: its state would be missing.

    Args:
        whole: The session's own pool.
    """

    idle_limit_s = math.inf

    def __init__(self, whole: LeasePool) -> None:

        def reclaim() -> None:
            # What the session itself does not use comes first.
            whole.yield_idle(after_s=0.0)
            whole.reclaim()

        super().__init__(whole.opener, reclaim=reclaim, ended=whole.ended)
        self._whole = whole
        self.distrusted = dict(whole.distrusted)
        self._made = False
        #: Why a lease is gone since.
        self._gone: dict[str, str] = {}

    def made(self) -> None:
        """The instance is made: from now on there are no further leases."""
        self._made = True

    def check_open(self) -> None:
        """Raise if the instance is over.

        Raises:
            InstanceLostError: It was ended, or lost a sandbox.
        """
        if self.closed:
            raise InstanceLostError(
                "the instance has ended; make another one with .remote(...)", node="", reason="ended"
            )
        lost = {lease.node: lease.lost for lease in list(self._leases) if lease.lost} if self._made else {}
        for node, why in {**lost, **self._gone}.items():
            raise lost_state(node, why)

    def every(self, terms: LeaseTerms, *, check: Callable[[], None]) -> list[Lease]:
        """Return all leases, once each is free."""
        taken: list[Lease] = []
        with self._lock:
            try:
                self._drop_lost(self.idle_limit_s)
                self.check_open()
                self._check_terms(terms)
                for lease in list(self._leases):
                    # Whoever takes all takes them in this order, so that no two wait for each other.
                    while not lease.lock.acquire(blocking=False):
                        self._await_change()
                        check()
                    taken.append(lease)
                lost = any(lease.lost for lease in taken)
            except BaseException:
                _release(taken)
                raise
            if lost:
                # In a call that had it until just now.
                _release(taken)
                self._drop_lost(self.idle_limit_s)
                self.check_open()
        return taken

    def yield_idle(self, after_s: float = math.inf) -> None:
        """Give nothing back: an instance stays until it is ended."""

    def pass_over(self, node: str, why: str) -> None:
        """What is held against a node here holds for the session's other calls."""
        super().pass_over(node, why)
        self._whole.pass_over(node, why)

    def others(self, lease: Lease) -> bool:
        """Nobody else has the state that an answer comes from."""
        return False

    def _has_more_room(self, terms: LeaseTerms) -> bool:
        return any(not lease.lock.locked() for lease in list(self._leases))

    def _open(
        self,
        terms: LeaseTerms,
        decision: Decision,
        options: Options,
        timeout_s: float | None,
        apart: Collection[str],
    ) -> Lease:
        if not self._made:
            return super()._open(terms, decision, options, timeout_s, apart)
        with self._lock:
            self._opening -= 1
            self._room.notify_all()
        self.check_open()
        self._check_terms(terms)
        raise PlacementError(
            "every sandbox of the instance is in use; wait for its other calls", pool=terms.pool, reason="in use"
        )

    def _check_terms(self, terms: LeaseTerms) -> None:
        """Raise unless policy lets a call run where the instance is."""
        for lease in self._leases:
            other = [
                item.name for item in fields(terms) if getattr(terms, item.name) != getattr(lease.terms, item.name)
            ]
            if other:
                raise PlacementError(
                    f"policy demands of this call another {other[0]} than of the instance, which cannot move; call a "
                    "function that is none of the instance's, or make the instance anew if policy changed",
                    pool=terms.pool,
                    reason=f"another {other[0]}",
                )

    def _remove(self, lease: Lease) -> None:
        super()._remove(lease)
        if self._made and not self.closed:
            left = "its node is about to be restarted" if self.leaves(lease) else "its time is over"
            self._gone[lease.node] = lease.lost or left


def _release(leases: list[Lease]) -> None:
    for lease in leases:
        lease.lock.release()
