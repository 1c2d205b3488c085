"""A person's session at the gateway: decisions, leases and budgets that its calls share. This module does I/O.

A decision is made once per (function, columns, classes, data set, pool) and reused; leases are kept
between calls (:mod:`ray_gpu.lease_pool`). Caps on small bytes are counted here, over the whole session.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_gpu.broadcasts import Broadcasts
from ray_gpu.in_force import InForce
from ray_gpu.instance_pool import InstancePool
from ray_gpu.lease_pool import FINISH_TIMEOUT_S, LeasePool
from ray_gpu.leases import Lease, LeaseOpener, LeaseTerms
from ray_gpu.request import Request
from ray_gpu.resident import Residents
from ray_gpu.shares import Shares
from ray_gpu.sharing import Sharing
from ray_gpu.source import Source
from ray_gpu.spending import Spending
from zones.environments import DIGEST, Environment, minor
from zones.errors import (
    EgressDeniedError,
    FunctionRefusedError,
    InstanceLostError,
    LedgerError,
    SessionClosedError,
    UnknownNameError,
    ZoneError,
)
from zones.labels import ARGUMENTS, classify, labels
from zones.ledger import Egress, Ledger
from zones.model import Decision, EgressRequest, Zone, canonical
from zones.obligations import Facts, Unmet, ends, unmet
from zones.policy import Policy
from zones.vault import Person

#: What one intent of small calls reserves: they draw from it without another fsync.
RESERVED_CALLS, RESERVED_BYTES = 1000, 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneServices:
    """What all sessions of a gateway share."""

    in_force: InForce
    ledger: Ledger
    opener: LeaseOpener
    #: What each GPU node was given of each data set.
    shares: Shares
    data_dir: Path
    #: Of the gateway: what of it one call may take is :func:`ray_gpu.staging.fits`.
    memory_bytes: int
    #: Degradations of the zone's own side, for example ``embedded-vault``.
    degradations: tuple[str, ...]
    #: Makes the other sessions give back the leases that they do not use.
    reclaim: Callable[[Session], None]
    #: Signs the ledger as it is.
    sign: Callable[[], None]
    #: Returns how many hosts of this zone are nodes of the cluster, as Ray says.
    zone_hosts: Callable[[], int] = lambda: 0

    @property
    def policy(self) -> Policy:
        """The policy in force now; a call keeps to the one that it began with."""
        return self.in_force.policy

    @property
    def zone(self) -> Zone:
        """The zone as that policy describes it."""
        return self.in_force.policy.zone


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """An allowed decision, written down."""

    #: The policy that allowed it.
    policy: Policy
    request: EgressRequest
    decision: Decision
    #: SHA-256 of the data set's file; ``""`` for data that comes from no catalog handle.
    dataset_digest: str
    #: Number of the ledger's decision entry.
    entry: int


class Session:
    """One attach. Thread-safe."""

    def __init__(self, services: ZoneServices, person: Person, purpose: str, versions: Mapping[str, str]) -> None:
        self.services = services
        #: Of the notebook's Python, of what data travels by, and of what functions import; empty when it does not say.
        self.versions = dict(versions)
        self.person = person
        self.purpose = purpose
        self.id = secrets.token_hex(8)
        self.secret = secrets.token_hex(16)
        self.began = datetime.now(UTC)
        self._lock = threading.Lock()
        self._allowed: dict[Any, Allowed] = {}
        self._terms: dict[tuple[int, int, int | None, str], LeaseTerms] = {}
        self._standing: dict[tuple[str, int], Spending] = {}
        #: Differences that the notebook was told of, by the environment's digest.
        self._told: set[tuple[str, str]] = set()
        #: Functions and broadcasts that were counted.
        self._seen: set[str] = set()
        self._small_bytes = 0
        self._closing = False
        self._over = threading.Event()
        self.leases = LeasePool(services.opener, reclaim=lambda: services.reclaim(self), ended=self._lease_ended)
        #: Those of each instance of a stateful class, by its id.
        self._instances: dict[str, InstancePool] = {}
        #: Values that its calls may name.
        self.broadcasts = Broadcasts()
        #: What its leases have open after a call.
        self.residents = Residents()
        #: Connections that joined; the gateway counts them.
        self.connections = 0
        self.receipts: list[dict[str, Any]] = []
        services.ledger.append({"kind": "session-start", "person": person.name, "session": self.id, "purpose": purpose})

    # -- decisions ------------------------------------------------------------------------------

    def decide(self, request: Request, source: Source | None) -> Allowed:
        """Ask policy and write its answer down, unless this session asked the same before.

        Raises:
            EgressDeniedError: Policy refuses.
            LedgerUnavailableError: The answer could not be written down.
        """
        self.leases.check_open()
        policy = self.services.policy
        zone = policy.zone
        pool = _pool(request, zone)
        if pool not in zone.pools:
            raise UnknownNameError.of("pool", pool, zone.pools)
        # Before anything is counted: a name that is none costs nothing.
        environment = _environment(request, zone)
        small = self._count_small_bytes(zone, request)
        what = None
        if source:
            origin = canonical(source.origin())
            what = source.dataset, source.digest, tuple(source.columns), source.filter_columns, source.segments, origin
        # The share is here since nodes are told it, and what they are told is written down before.
        options = request.work.options
        asked = (options.gpu_milli, options.categories, environment)
        key = (zone.policy_digest, request.work.digest, pool, small, what, asked)
        found = self._allowed.get(key)
        try:
            if found is None:
                found = self._allowed[key] = self._ask(policy, request, source, pool, small)
            self._fulfil(found, request, source)
        except BaseException:
            with self._lock:
                # Nothing leaves; the function stays counted, once, so that asking again is not cheaper.
                self._small_bytes -= len(request.arguments)
            raise
        return found

    def weigh(self, request: Request, source: Source) -> None:
        """Ask policy about a call as :meth:`decide` does, though it may never be made: its arguments do not count.

        Raises:
            EgressDeniedError: Policy refuses.
            LedgerUnavailableError: The answer could not be written down.
        """
        self.decide(request, source)
        with self._lock:
            self._small_bytes -= len(request.arguments)

    def _fulfil(self, allowed: Allowed, request: Request, source: Source | None) -> None:
        """Check what the decision demands of this very call."""
        obligations, options = allowed.decision.obligations, request.work.options
        call = Facts(
            purpose=self.purpose,
            now=datetime.now(UTC),
            began=self.began,
            function_reviewed=allowed.request.function_reviewed,
            gpu_milli=options.gpu_milli,
            resident=options.resident and source is not None,
            rows=source.rows if source else None,
            most_shards=1 if options.whole or source is None else max(1, -(-source.rows // obligations.block_rows)),
            environment=_environment(request, allowed.policy.zone),
        )
        if missed := unmet(obligations, call):
            raise self.refuse(allowed, missed)

    def refuse(self, allowed: Allowed, missed: list[Unmet]) -> EgressDeniedError:
        """Write down which obligations a call does not fulfil, and return its error."""
        self.services.ledger.append(
            {
                "kind": "refusal",
                "person": self.person.name,
                "session": self.id,
                "decision_entry": allowed.entry,
                "obligations": [one.key for one in missed],
                "reasons": [one.reason for one in missed],
            }
        )
        return allowed.policy.unfulfilled(allowed.request, missed)

    def _count_small_bytes(self, zone: Zone, request: Request) -> frozenset[str]:
        """Count function and broadcasts, once, and the arguments towards the session's cap; return their class."""
        broadcasts = {digest: len(self.broadcasts.get(digest)) for digest in request.broadcasts}
        with self._lock:
            sizes = {request.work.digest: len(request.work.function), **broadcasts}
            new = sum(size for digest, size in sizes.items() if digest not in self._seen)
            small = classify(
                zone,
                dataset="",
                columns=None,
                # The caps of function and arguments hold each time that they are asked for, not only the first time.
                function_bytes=len(request.work.function),
                argument_bytes=len(request.arguments) + sum(broadcasts.values()),
                session_bytes=self._small_bytes - (sum(sizes.values()) - new),
            )
            self._seen |= set(sizes)
            self._small_bytes += new + len(request.arguments)
        return small

    def _ask(
        self, policy: Policy, request: Request, source: Source | None, pool: str, small: frozenset[str]
    ) -> Allowed:
        """Ask policy, and write its answer down."""
        zone, question = policy.zone, self._question(policy, request, source, pool, small)
        decision = policy.decide(question)
        rows = source.rows if source else 0
        egress = Egress(
            request=question,
            session=self.id,
            policy_digest=decision.policy_digest,
            rows=rows,
            gpu_milli=request.work.options.gpu_milli,
            environment_digest=_environment(request, zone),
            dataset_digest=source.digest if source else "",
            lineage=source.origin() if source else {},
            categories=request.work.options.categories or (),
        )
        entry = self.services.ledger.decided(egress, decision)
        if not decision.allowed:
            raise policy.refusal(question, decision, labels(zone, source.dataset, source.columns) if source else None)
        digest = egress.dataset_digest
        return Allowed(policy=policy, request=question, decision=decision, dataset_digest=digest, entry=entry)

    def foresee(self, request: Request, about: Source) -> None:
        """Raise, and write down, what policy refuses of a call whose rows are not read yet; say nothing if it allows.

        Raises:
            EgressDeniedError: Policy refuses; the ledger has no rows of it, for nobody counted them.
            LedgerUnavailableError: The answer could not be written down.
        """
        policy = self.services.policy
        pool = _pool(request, policy.zone)
        small = self._count_small_bytes(policy.zone, request)
        with self._lock:
            # Counted when it is decided.
            self._small_bytes -= len(request.arguments)
        if pool in policy.zone.pools:
            question = self._question(policy, request, about, pool, small)
            if not policy.decide(question).allowed:
                self._ask(policy, request, about, pool, small)

    def _question(
        self, policy: Policy, request: Request, source: Source | None, pool: str, small: frozenset[str]
    ) -> EgressRequest:
        """Return what policy is asked: about every byte, what leaves, what was filtered on, function and arguments."""
        zone = policy.zone
        columns = {*source.columns, *source.filter_columns} if source else set()
        return EgressRequest(
            zone=zone.name,
            pool=pool,
            person=self.person.name,
            groups=self.person.groups,
            purpose=self.purpose,
            dataset=source.dataset if source else "",
            columns=frozenset(source.columns) if source else ARGUMENTS,
            classes=small | set(labels(zone, source.dataset, columns).values()) if source else small,
            segments=source.segments if source else frozenset(),
            function_digest=request.work.digest,
            function_reviewed=request.work.digest in zone.approved,
        )

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
            gpu_milli=lease.terms.gpu_milli,
            degradations=tuple(sorted({*lease.degradations, *self.services.degradations})),
            environment_digest=lease.grant.environment,
            dataset_digest=allowed.dataset_digest,
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

    def sharing(self, allowed: Allowed, source: Source) -> Sharing | None:
        """Return how a call's rows are given to nodes; ``None`` where policy does not bound a node's share.

        Raises:
            EgressDeniedError: The zone has more gateways than its policy divides the bound among.
        """
        obligations, expected = allowed.decision.obligations, allowed.policy.zone.gateways
        if obligations.max_node_share is None:
            return None
        found = self.services.zone_hosts()
        if found > expected:
            reason = (
                f"{expected} gateways divide a node's share of a data set, and the cluster has {found} hosts of this "
                "zone: more than the share could be given"
            )
            raise self.refuse(allowed, [Unmet("max_node_share", reason, f"set `gateways: {found}` in zone.yaml")])
        return Sharing(self.services.shares, source, obligations, obligations.max_node_share)

    # -- leases ---------------------------------------------------------------------------------

    def terms(self, allowed: Allowed, request: Request) -> LeaseTerms:
        """Return what leases a call needs."""
        obligations = allowed.decision.obligations
        over = ends(obligations, began=self.began, now=datetime.now(UTC))
        environment = _environment(request, allowed.policy.zone)
        key = (allowed.entry, request.work.options.gpu_milli, over, environment)
        found = self._terms.get(key)
        if found is None:
            found = self._terms[key] = LeaseTerms(
                pool=allowed.request.pool,
                gpu_milli=request.work.options.gpu_milli,
                accepted_degradations=tuple(sorted(obligations.accepted_degradations)),
                padding=obligations.padding,
                reviewed=allowed.request.function_reviewed,
                gpu_kinds=obligations.gpu_kinds,
                environments=obligations.environments,
                environment=environment,
                max_lease_s=obligations.max_lease_s,
                ends=over,
                python=minor(self.versions.get("python", "")),
            )
        return found

    def pools(self) -> list[LeasePool]:
        """Return the pools of all leases: the session's own first, then each instance's."""
        with self._lock:
            return [self.leases, *self._instances.values()]

    def pool(self, instance: str) -> LeasePool:
        """Return the leases that a call may run on: an instance's by its id, else the session's own.

        Raises:
            InstanceLostError: There is no such instance, or it is over.
        """
        if not instance:
            return self.leases
        with self._lock:
            found = self._instances.get(instance)
        if found is None:
            raise InstanceLostError(
                "the instance has ended; make another one with .remote(...)", node="", reason="ended"
            )
        found.check_open()
        return found

    def pool_of(self, lease: Lease) -> LeasePool:
        """Return the pool that a lease is of."""
        return next((pool for pool in self.pools() if lease in pool), self.leases)

    def begin_instance(self) -> tuple[str, InstancePool]:
        """Return the id of a new instance, and its leases, of which there are none yet."""
        self.leases.check_open()
        instance, pool = secrets.token_hex(8), InstancePool(self.leases)
        with self._lock:
            if self._closing:
                raise SessionClosedError("the session has ended; attach again with ray_gpu.attach(...)")
            self._instances[instance] = pool
        return instance, pool

    def end_instance(self, instance: str) -> None:
        """End an instance: its sandboxes are gone when this returns. One that is over already is none."""
        with self._lock:
            pool = self._instances.pop(instance, None)
        if pool is not None:
            pool.close()

    def _lease_ended(self, lease: Lease, receipt: dict[str, Any] | None) -> None:
        """Write down what a lease's budgets were used for and what its custodian attests."""
        self.residents.lost(lease.id)
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
                    "reason": "" if receipt else lease.lost,
                    "grant": lease.grant.document(),
                    "connection": list(lease.connection),
                    "controls": lease.controls,
                    "receipt": receipt,
                }
            )

    # -- the end --------------------------------------------------------------------------------

    def close(self) -> None:
        """End every lease, shred every key, write the session's end, and have the ledger signed. Running calls fail.

        Returns when all that is done, also to a second caller.
        """
        with self._lock:
            first, self._closing = not self._closing, True
        if not first:
            self._over.wait(FINISH_TIMEOUT_S)
            return
        try:
            for pool in self.pools():
                pool.close()
            with contextlib.suppress(ZoneError):
                self.services.ledger.append({"kind": "session-end", "person": self.person.name, "session": self.id})
            self.services.sign()
        finally:
            self._over.set()

    def check_imports(self, request: Request, lease: Lease) -> list[str]:
        """Raise if a lease lacks a module that a call's function imports: it would fail there, once it has the data.

        Returns:
            In what else, of its imports and of what data travels by, the environment differs from the notebook; each
            difference once in a session.

        Raises:
            FunctionRefusedError: It does.
        """
        work, there = request.work, lease.contents
        if work.digest in lease.functions:
            return []
        if missing := [module for module, _ in work.options.imports if module not in there.modules]:
            raise FunctionRefusedError(
                f"{work.name} imports {', '.join(missing)}, and {lease.node} has no such module in the environment "
                f"{there.digest[:12]}; nothing of the call left the zone. Use another with environment=..., or have "
                "the nodes' operator build one that has it (`ray-gpu env build`)",
                variable=missing[0],
            )
        with self._lock:
            self.versions |= dict(work.options.imports)
            new = [one for one in self._differs(there) if (there.digest, one) not in self._told]
            self._told |= {(there.digest, one) for one in new}
        return new

    def _differs(self, contents: Environment) -> list[str]:
        """Return in which versions an environment differs from the notebook."""
        there = contents.versions()
        # Published ones are for any Python of their minor version.
        here = {**self.versions, "python": _cut(self.versions.get("python", ""), like=contents.python)}
        both = [name for name in sorted(here.keys() & there.keys()) if here[name] and there[name]]
        return [f"{name} {here[name]} here, {there[name]} there" for name in both if here[name] != there[name]]

    def _environments(self) -> list[dict[str, Any]]:
        """Return what is known of environments, and in what they differ from the notebook: before anything leaves."""
        found = {one.digest: (name, one) for name, one in self.services.zone.environments.items()}
        nodes: dict[str, list[str]] = {}
        for (node, digest), one in sorted(self.services.opener.contents.items()):
            found.setdefault(digest, ("", one))
            nodes.setdefault(digest, []).append(node)
        return [
            {"name": name, "digest": digest, "nodes": nodes.get(digest, []), "differs": self._differs(one)}
            for digest, (name, one) in found.items()
        ]

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
            "policy_problem": self.services.in_force.problem,
            "leases": [
                {**lease, "differs": self._differs(contents)}
                for pool in self.pools()
                for lease, contents in pool.status()
            ],
            "environments": self._environments(),
            "lies": [lie for pool in self.pools() for lie in pool.lies],
            "receipts": list(self.receipts),
        }


def _cut(version: str, *, like: str) -> str:
    """Return ``3.11`` of ``3.11.7`` if the other version says no more."""
    return ".".join(version.split(".")[: len(like.split("."))])


def _environment(request: Request, zone: Zone) -> str:
    """Return the digest of the environment that a call asks for; ``""`` where it asks for none.

    Raises:
        UnknownNameError: The zone knows no such name.
    """
    name = request.work.options.environment
    if not name or DIGEST.fullmatch(name):
        return name
    if name not in zone.environments:
        raise UnknownNameError.of("environment", name, zone.environments)
    return zone.environments[name].digest


def _pool(request: Request, zone: Zone) -> str:
    """Return the pool that a call is for: the zone's first one unless it names another."""
    return request.work.options.pool or (zone.pools[0] if zone.pools else "")
