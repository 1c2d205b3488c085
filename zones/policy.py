"""Policy: may these columns leave, may this lease be?

``load`` reads files; deciding is pure. Rules:

1. Allow only if Cedar says Allow **and** no rule failed **and** the request fits the
   schema **and** it names columns and known classes **and** the classes are no lower
   than the catalog's. Everything else denies, an exception too.
2. The zone's policy and the pool's policy must both allow.
3. A file that does not hold (:mod:`zones.rules`) stops the start.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zones import segments
from zones.config import SCHEMA_FILE, egress_path, files_digest, pool_path, read_policy_files, zone_paths
from zones.errors import ConfigError, EgressDeniedError, UnknownNameError
from zones.labels import ARGUMENTS, labels
from zones.lineage import chain
from zones.model import Dataset, Decision, EgressRequest, Grant, Obligations, Zone
from zones.obligations import Unmet, strictest
from zones.rules import DEFAULT_RULE, Answer, RuleFile, no, read_schema

#: A refusal looks for the columns that caused it among at most this many: each costs a question to Cedar.
_MAX_BLAMED = 200
#: And names at most this many.
_MAX_NAMED = 8


class PoolPolicy:
    """The policy of one pool's operator. The custodian has this alone."""

    def __init__(self, pool: str, rules: RuleFile, policy_digest: str) -> None:
        self.pool = pool
        #: SHA-256 over the schema and the pool's file, hexadecimal.
        self.policy_digest = policy_digest
        self._rules = rules

    @classmethod
    def load(cls, policies_dir: Path, pool: str) -> PoolPolicy:
        """Read and check ``pools/<pool>.cedar``.

        Raises:
            ConfigError: A file is missing or wrong; file and line say where.
        """
        files = read_policy_files(policies_dir, [SCHEMA_FILE, pool_path(pool)])
        return cls(pool, _pool_rules(policies_dir, pool, files), files_digest(files))

    def decide_lease(self, *, zone: str, gpu_milli: int, memory_bytes: int) -> Decision:
        """Decide on the terms of a grant, for *zone*. Never raises; what cannot be decided is denied."""
        return _decision(_ask_lease(self._rules, zone, self.pool, gpu_milli, memory_bytes), self.policy_digest)

    def refusal(self, grant: Grant) -> str | None:
        """Return the rule and the reason for which the pool refuses *grant*, or ``None`` when it does not."""
        if grant.pool != self.pool:
            return f"this is the policy of pool {self.pool}"
        decision = self.decide_lease(zone=grant.zone, gpu_milli=grant.gpu_milli, memory_bytes=grant.memory_bytes)
        return None if decision.allowed else _because(decision)


class Policy:
    """The policy of one zone, and of the pools it may use."""

    def __init__(
        self, zone: Zone, rules: RuleFile, pools: Mapping[str, RuleFile], folder: str, files: Mapping[str, bytes]
    ) -> None:
        self.zone = zone
        self._rules = rules
        self._pools = pools
        #: Every file that the policy's digest is over, by its path in the policies directory.
        self.files = files
        #: Name of the policies directory, for messages.
        self._folder = folder

    @classmethod
    def load(cls, policies_dir: Path, zone: Zone) -> Policy:
        """Read and check ``<zone>/egress.cedar`` and the policy of each pool.

        Raises:
            ConfigError: A file is missing or wrong (file and line say where), or the
                files are no longer those that *zone* was read from.
        """
        path = egress_path(zone.name)
        files = read_policy_files(policies_dir, [*zone_paths(policies_dir, zone.name), *map(pool_path, zone.pools)])
        if files_digest(files) != zone.policy_digest:
            folder = str(policies_dir)
            raise ConfigError(f"{folder}: policy files changed while they were read; start again", file=folder)
        schema = read_schema(policies_dir / SCHEMA_FILE, files[SCHEMA_FILE])
        known: dict[str, Collection[str]] = {
            "Pool": zone.pools,
            "classes": zone.classes,
            "segments": {name for dataset in zone.datasets.values() for name in _segments(dataset)},
            "dataset": {"", *zone.datasets},
            "zone": {zone.name},
        }
        pools = {pool: _pool_rules(policies_dir, pool, files) for pool in zone.pools}
        return cls(zone, RuleFile(policies_dir / path, files[path], schema, known), pools, policies_dir.name, files)

    def decide(self, request: EgressRequest) -> Decision:
        """Decide whether *request* may leave. Never raises; what cannot be decided is denied.

        Returns:
            The decision with the rules that made it. When allowed, those are the permits of
            the zone and then of the pool, and the obligations are to be enforced; when denied,
            the rules of whichever refused.
        """
        try:
            problem = _unacceptable(self.zone, request)
            answer = no(problem) if problem else _both(*self._answers(request))
            demanded = (_obligations(self.zone, asked) for asked in chain(self.zone, request))
            return _decision(answer, self.zone.policy_digest, functools.reduce(strictest, demanded))
        except Exception as failure:  # noqa: BLE001 - rule 1: whatever goes wrong denies
            answer = no(f"the request could not be decided ({type(failure).__name__})")
            return _decision(answer, self.zone.policy_digest)

    def decide_lease(self, pool: str, *, gpu_milli: int, memory_bytes: int) -> Decision:
        """Ask the policy of *pool* what its custodian will ask it, before a grant is made."""
        if pool in self._pools:
            answer = _ask_lease(self._pools[pool], self.zone.name, pool, gpu_milli, memory_bytes)
        else:
            answer = no(f"zone {self.zone.name} has no such pool")
        return _decision(answer, self.zone.policy_digest)

    @property
    def rule_ids(self) -> frozenset[str]:
        """Ids of the rules of zone and pools."""
        return frozenset(name for file in (self._rules, *self._pools.values()) for name in file.lines)

    def names(self, kind: str) -> frozenset[str]:
        """Return the names that rules of zone or pools compare with an entity type or a part of the context."""
        files = [self._rules, *self._pools.values()]
        return frozenset(name for file in files for of, name in file.names if of == kind)

    def where(self, rule: str) -> str:
        """Return ``file:line`` of each rule with this id, the zone's first; ``""`` for none."""
        files = [self._rules, *self._pools.values()]
        return ", ".join(f"{file.path}:{file.lines[rule]}" for file in files if rule in file.lines)

    def refusal(
        self, request: EgressRequest, decision: Decision, column_classes: Mapping[str, str] | None = None
    ) -> EgressDeniedError:
        """Return the error for a denied *request*: what was refused, by which rule, and what to do.

        Args:
            request: The request that was denied.
            decision: What :meth:`decide` returned for it.
            column_classes: Class of each column; by default what the catalog says.

        Raises:
            ValueError: *decision* allows.
        """
        if decision.allowed:
            raise ValueError("an allowed request has no refusal")
        problem = _unacceptable(self.zone, request)
        subject, advice = ("this", "correct the request") if problem else self._blame(request, column_classes)
        message = f"zone {self.zone.name} refuses {subject} for pool {request.pool}: {_because(decision)}; {advice}"
        return EgressDeniedError(
            message if problem else f"{message}, or ask {self.owner(request)}",
            zone=self.zone.name,
            rules=list(decision.rules),
            reasons=list(decision.reasons),
        )

    def unfulfilled(self, request: EgressRequest, missed: Sequence[Unmet]) -> EgressDeniedError:
        """Return the error for an allowed *request* whose call does not fulfil these obligations."""
        first = missed[0]
        return EgressDeniedError(
            f"zone {self.zone.name} refuses this call for pool {request.pool}: {first.reason} (obligation "
            f"{first.key}); {first.advice}, or ask the zone's security officer to change "
            f"{self._folder}/{self.zone.name}/zone.yaml",
            zone=self.zone.name,
            rules=[one.key for one in missed],
            reasons=[one.reason for one in missed],
        )

    def _answers(self, request: EgressRequest) -> tuple[Answer, Answer]:
        """Return what the zone's policy says, and the pool's: of the data set, and of all that it comes from."""
        asked = chain(self.zone, request)
        mine, theirs = (
            _all([(one, rules.ask(*_egress(one))) for one in asked])
            for rules in (self._rules, self._pools[request.pool])
        )
        return mine, theirs

    def _would_allow(self, request: EgressRequest, column: str, classification: str) -> bool:
        part = replace(request, columns=frozenset({column}), classes=frozenset({classification}))
        return all(answer.allowed for answer in self._answers(part))

    def _blame(self, request: EgressRequest, column_classes: Mapping[str, str] | None) -> tuple[str, str]:
        """Return what was refused, and what to do: asks again with one part of the request at a time."""
        data = f"data set {request.dataset}" if request.dataset else "these values"
        if all(rules.ask(*_egress(request)).allowed for rules in (self._rules, self._pools[request.pool])):
            return data, "derive it from what may leave"
        (argument,) = ARGUMENTS
        if not self._would_allow(request, argument, self.zone.classes[0]):
            # Even the lowest class is refused: the columns are not why.
            return data, "check pool, purpose and your team"
        columns = sorted(request.columns - ARGUMENTS)
        if len(columns) > _MAX_BLAMED:
            return f"{len(columns)} columns", "ask for fewer columns"
        classes = labels(self.zone, request.dataset, columns) if column_classes is None else column_classes
        refused = [
            column
            for column in columns
            if not self._would_allow(request, column, classes.get(column, self.zone.default_class))
        ]
        if refused:
            return _columns(refused), "drop the column" if len(refused) == 1 else "drop these columns"
        for classification in reversed(self.zone.classes):
            if classification in request.classes and not self._would_allow(request, argument, classification):
                return f"function, arguments or filter, which count as {classification},", (
                    "filter on other columns, make function and arguments smaller (zone.yaml: small_bytes)"
                )
        return data, "ask for other columns"

    def owner(self, request: EgressRequest) -> str:
        """Return who could have a refused *request* allowed, and in which file; ``""`` if it can never be."""
        if _unacceptable(self.zone, request):
            return ""
        mine, _ = self._answers(request)
        if mine.allowed:
            return f"the pool's operator to change {self._folder}/{pool_path(request.pool)}"
        return f"the zone's security officer to change {self._folder}/{egress_path(self.zone.name)}"


def _decision(answer: Answer, policy_digest: str, obligations: Obligations | None = None) -> Decision:
    return Decision(
        allowed=answer.allowed,
        rules=answer.rules,
        reasons=answer.reasons,
        policy_digest=policy_digest,
        obligations=obligations or Obligations(),
    )


def _because(decision: Decision) -> str:
    rules = zip(decision.rules, decision.reasons, strict=True)
    return " and ".join(f"rule {rule} ({reason})" for rule, reason in rules)


def _columns(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"column{'s' if len(names) > 1 else ''} {', '.join(names[:_MAX_NAMED])}{more}"


def _all(answers: Sequence[tuple[EgressRequest, Answer]]) -> Answer:
    """Return one file's answer about a data set, the first, and those that it comes from: allowed if all are."""
    (request, own), *others = answers
    refused = [(asked, answer) for asked, answer in others if not answer.allowed]
    if not own.allowed:
        return own
    if not refused:
        rules = {rule: reason for _, one in answers for rule, reason in zip(one.rules, one.reasons, strict=True)}
        return Answer(allowed=True, rules=tuple(rules), reasons=tuple(rules.values()))
    asked, answer = refused[0]
    reasons = tuple(f"{reason}: {asked.dataset}, which {request.dataset} comes from" for reason in answer.reasons)
    return Answer(allowed=False, rules=answer.rules, reasons=reasons)


def _both(mine: Answer, theirs: Answer) -> Answer:
    """Return the answer of both policies: allowed if both allow, and the rules of whichever decided."""
    deciding = [mine, theirs] if mine.allowed == theirs.allowed else [theirs if mine.allowed else mine]
    if mine.rules == theirs.rules == (DEFAULT_RULE,):
        deciding = [mine]
    rules = [rule for answer in deciding for rule in answer.rules]
    reasons = [reason for answer in deciding for reason in answer.reasons]
    return Answer(allowed=mine.allowed and theirs.allowed, rules=tuple(rules), reasons=tuple(reasons))


def _unacceptable(zone: Zone, request: EgressRequest) -> str | None:
    """Return why *request* cannot be put to Cedar, or ``None``."""
    if request.zone != zone.name:
        return f"this is the policy of zone {zone.name}"
    if request.pool not in zone.pools:
        return f"zone {zone.name} has no such pool"
    if not request.columns:
        return "the request names no columns"
    divided = frozenset(_segments(zone.datasets[request.dataset])) if request.dataset in zone.datasets else frozenset()
    if not request.segments <= divided or bool(request.segments) != bool(divided):
        return "the request names other segments than the data set has, or none of them"
    if not request.classes or not request.classes <= set(zone.classes):
        return f"the classes of a request are some of {', '.join(zone.classes)}"
    try:
        columns = request.columns if request.dataset else request.columns - ARGUMENTS
        needed = set(labels(zone, request.dataset, columns).values())
    except UnknownNameError as problem:
        return f"the catalog has no such {problem.kind}"
    # A caller's bug must not send a column under another class than the catalog's.
    return None if needed <= request.classes else "the request leaves out a class that the catalog names"


def _segments(dataset: Dataset) -> list[str]:
    return [] if dataset.segments is None else list(segments.names(dataset.segments))


def _obligations(zone: Zone, request: EgressRequest) -> Obligations:
    for rule in zone.obligation_rules:
        if (rule.pools is None or request.pool in rule.pools) and (
            rule.datasets is None or request.dataset in rule.datasets
        ):
            return rule.obligations
    return zone.obligations


def _pool_rules(policies_dir: Path, pool: str, files: Mapping[str, bytes]) -> RuleFile:
    path = pool_path(pool)
    schema = read_schema(policies_dir / SCHEMA_FILE, files[SCHEMA_FILE])
    return RuleFile(policies_dir / path, files[path], schema, {"Pool": {pool}})


def _ask_lease(rules: RuleFile, zone: str, pool: str, gpu_milli: int, memory_bytes: int) -> Answer:
    terms = {"gpu_milli": gpu_milli, "memory_bytes": memory_bytes}
    return rules.ask(_request("lease", ("Zone", zone), pool, terms), [])


def _egress(request: EgressRequest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return Cedar's request and entities for *request*."""
    context = {
        "zone": request.zone,
        "dataset": request.dataset,
        "columns": sorted(request.columns),
        "classes": sorted(request.classes),
        "segments": sorted(request.segments),
        "purpose": request.purpose.strip(),
        "function_reviewed": request.function_reviewed,
    }
    person = {
        "uid": {"type": "Person", "id": request.person},
        "attrs": {},
        "parents": [{"type": "Group", "id": group} for group in sorted(request.groups)],
    }
    return _request("egress", ("Person", request.person), request.pool, context), [person]


def _request(action: str, principal: tuple[str, str], pool: str, context: dict[str, Any]) -> dict[str, Any]:
    # The {type, id} form: an id is never parsed as Cedar text, so no name can escape from it.
    return {
        "principal": {"type": principal[0], "id": principal[1]},
        "action": {"type": "Action", "id": action},
        "resource": {"type": "Pool", "id": pool},
        "context": context,
    }
