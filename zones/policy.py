"""Cedar policy: may these columns leave, may this lease be? Owns ``cedarpy``.

``load`` reads files; deciding is pure. Rules:

1. Allow only if Cedar says Allow **and** no rule failed **and** the request fits the
   schema **and** it names columns and known classes **and** the classes are no lower
   than the catalog's. Everything else denies, an exception too.
2. The zone's policy and the pool's policy must both allow.
3. Cedar skips a rule that fails while it is evaluated, a forbid as well: so a failed
   rule denies here.
4. A file that does not fit the schema, names what does not exist, or holds a rule
   without ``@id`` and ``@reason`` stops the start.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import cedarpy
from cedarpy import pst

from zones.config import SCHEMA_FILE, egress_path, files_digest, pool_path, read_policy_files, zone_paths
from zones.errors import ConfigError, EgressDeniedError, UnknownNameError, did_you_mean
from zones.labels import ARGUMENTS, labels
from zones.model import Decision, EgressRequest, Grant, Obligations, Zone

#: What decides where no rule does. No rule may take this id.
DEFAULT_RULE = "default"
#: A refusal looks for the columns that caused it among at most this many: each costs a question to Cedar.
_MAX_BLAMED = 200
#: And names at most this many.
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What one policy file says."""

    allowed: bool
    rules: tuple[str, ...]
    reasons: tuple[str, ...]

    def decision(self, policy_digest: str, obligations: Obligations | None = None) -> Decision:
        return Decision(
            allowed=self.allowed,
            rules=self.rules,
            reasons=self.reasons,
            policy_digest=policy_digest,
            obligations=obligations or Obligations(),
        )


def _no(reason: str) -> _Answer:
    return _Answer(allowed=False, rules=(DEFAULT_RULE,), reasons=(reason,))


class PoolPolicy:
    """The policy of one pool's operator. The custodian has this alone."""

    def __init__(self, pool: str, rules: _RuleFile, policy_digest: str) -> None:
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
        return _ask_lease(self._rules, zone, self.pool, gpu_milli, memory_bytes).decision(self.policy_digest)

    def refusal(self, grant: Grant) -> str | None:
        """Return the rule and the reason for which the pool refuses *grant*, or ``None`` when it does not."""
        if grant.pool != self.pool:
            return f"this is the policy of pool {self.pool}"
        decision = self.decide_lease(zone=grant.zone, gpu_milli=grant.gpu_milli, memory_bytes=grant.memory_bytes)
        return None if decision.allowed else _because(decision)


class Policy:
    """The policy of one zone, and of the pools it may use."""

    def __init__(self, zone: Zone, rules: _RuleFile, pools: Mapping[str, _RuleFile], folder: str) -> None:
        self._zone = zone
        self._rules = rules
        self._pools = pools
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
        files = read_policy_files(policies_dir, [*zone_paths(zone.name), *map(pool_path, zone.pools)])
        if files_digest(files) != zone.policy_digest:
            folder = str(policies_dir)
            raise ConfigError(f"{folder}: policy files changed while they were read; start again", file=folder)
        schema = _schema(policies_dir / SCHEMA_FILE, files[SCHEMA_FILE])
        known: dict[str, Collection[str]] = {
            "Pool": zone.pools,
            "classes": zone.classes,
            "dataset": {"", *zone.datasets},
            "zone": {zone.name},
        }
        pools = {pool: _pool_rules(policies_dir, pool, files) for pool in zone.pools}
        return cls(zone, _RuleFile(policies_dir / path, files[path], schema, known), pools, policies_dir.name)

    def decide(self, request: EgressRequest) -> Decision:
        """Decide whether *request* may leave. Never raises; what cannot be decided is denied.

        Returns:
            The decision with the rules that made it. When allowed, those are the permits of
            the zone and then of the pool, and the obligations are to be enforced; when denied,
            the rules of whichever refused.
        """
        try:
            problem = _unacceptable(self._zone, request)
            answer = _no(problem) if problem else _both(*self._answers(request))
            return answer.decision(self._zone.policy_digest, _obligations(self._zone, request))
        except Exception as failure:  # noqa: BLE001 - rule 1: whatever goes wrong denies
            answer = _no(f"the request could not be decided ({type(failure).__name__})")
            return answer.decision(self._zone.policy_digest)

    def decide_lease(self, pool: str, *, gpu_milli: int, memory_bytes: int) -> Decision:
        """Ask the policy of *pool* what its custodian will ask it, before a grant is made."""
        if pool in self._pools:
            answer = _ask_lease(self._pools[pool], self._zone.name, pool, gpu_milli, memory_bytes)
        else:
            answer = _no(f"zone {self._zone.name} has no such pool")
        return answer.decision(self._zone.policy_digest)

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
        problem = _unacceptable(self._zone, request)
        subject, advice = ("this", "correct the request") if problem else self._blame(request, column_classes)
        message = f"zone {self._zone.name} refuses {subject} for pool {request.pool}: {_because(decision)}; {advice}"
        return EgressDeniedError(
            message if problem else f"{message}, or ask {self._owner(request)}",
            zone=self._zone.name,
            rules=list(decision.rules),
            reasons=list(decision.reasons),
        )

    def _answers(self, request: EgressRequest) -> tuple[_Answer, _Answer]:
        """Return what the zone's policy says, and the pool's."""
        question = _egress(request)
        return self._rules.ask(*question), self._pools[request.pool].ask(*question)

    def _would_allow(self, request: EgressRequest, column: str, classification: str) -> bool:
        part = replace(request, columns=frozenset({column}), classes=frozenset({classification}))
        return all(answer.allowed for answer in self._answers(part))

    def _blame(self, request: EgressRequest, column_classes: Mapping[str, str] | None) -> tuple[str, str]:
        """Return what was refused, and what to do: asks again with one part of the request at a time."""
        data = f"data set {request.dataset}" if request.dataset else "these values"
        (argument,) = ARGUMENTS
        if not self._would_allow(request, argument, self._zone.classes[0]):
            # Even the lowest class is refused: the columns are not why.
            return data, "check pool, purpose and your team"
        columns = sorted(request.columns - ARGUMENTS)
        if len(columns) > _MAX_BLAMED:
            return f"{len(columns)} columns", "ask for fewer columns"
        classes = labels(self._zone, request.dataset, columns) if column_classes is None else column_classes
        refused = [
            column
            for column in columns
            if not self._would_allow(request, column, classes.get(column, self._zone.default_class))
        ]
        if refused:
            return _columns(refused), "drop the column" if len(refused) == 1 else "drop these columns"
        for classification in reversed(self._zone.classes):
            if classification in request.classes and not self._would_allow(request, argument, classification):
                return f"function, arguments or filter, which count as {classification},", (
                    "filter on other columns, make function and arguments smaller (zone.yaml: small_bytes)"
                )
        return data, "ask for other columns"

    def _owner(self, request: EgressRequest) -> str:
        mine, _ = self._answers(request)
        if mine.allowed:
            return f"the pool's operator to change {self._folder}/{pool_path(request.pool)}"
        return f"the zone's security officer to change {self._folder}/{egress_path(self._zone.name)}"


def _because(decision: Decision) -> str:
    rules = zip(decision.rules, decision.reasons, strict=True)
    return " and ".join(f"rule {rule} ({reason})" for rule, reason in rules)


def _columns(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"column{'s' if len(names) > 1 else ''} {', '.join(names[:_MAX_NAMED])}{more}"


def _both(mine: _Answer, theirs: _Answer) -> _Answer:
    """Return the answer of both policies: allowed if both allow, and the rules of whichever decided."""
    deciding = [mine, theirs] if mine.allowed == theirs.allowed else [theirs if mine.allowed else mine]
    if mine.rules == theirs.rules == (DEFAULT_RULE,):
        deciding = [mine]
    rules = [rule for answer in deciding for rule in answer.rules]
    reasons = [reason for answer in deciding for reason in answer.reasons]
    return _Answer(allowed=mine.allowed and theirs.allowed, rules=tuple(rules), reasons=tuple(reasons))


def _unacceptable(zone: Zone, request: EgressRequest) -> str | None:
    """Return why *request* cannot be put to Cedar, or ``None``."""
    if request.zone != zone.name:
        return f"this is the policy of zone {zone.name}"
    if request.pool not in zone.pools:
        return f"zone {zone.name} has no such pool"
    if not request.columns:
        return "the request names no columns"
    if not request.classes or not request.classes <= set(zone.classes):
        return f"the classes of a request are some of {', '.join(zone.classes)}"
    try:
        columns = request.columns if request.dataset else request.columns - ARGUMENTS
        needed = set(labels(zone, request.dataset, columns).values())
    except UnknownNameError as problem:
        return f"the catalog has no such {problem.kind}"
    # A caller's bug must not send a column under another class than the catalog's.
    return None if needed <= request.classes else "the request leaves out a class that the catalog names"


def _obligations(zone: Zone, request: EgressRequest) -> Obligations:
    for rule in zone.obligation_rules:
        if (rule.pools is None or request.pool in rule.pools) and (
            rule.datasets is None or request.dataset in rule.datasets
        ):
            return rule.obligations
    return zone.obligations


def _pool_rules(policies_dir: Path, pool: str, files: Mapping[str, bytes]) -> _RuleFile:
    path = pool_path(pool)
    schema = _schema(policies_dir / SCHEMA_FILE, files[SCHEMA_FILE])
    return _RuleFile(policies_dir / path, files[path], schema, {"Pool": {pool}})


def _ask_lease(rules: _RuleFile, zone: str, pool: str, gpu_milli: int, memory_bytes: int) -> _Answer:
    terms = {"gpu_milli": gpu_milli, "memory_bytes": memory_bytes}
    return rules.ask(_request("lease", ("Zone", zone), pool, terms), [])


def _egress(request: EgressRequest) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return Cedar's request and entities for *request*."""
    context = {
        "zone": request.zone,
        "dataset": request.dataset,
        "columns": sorted(request.columns),
        "classes": sorted(request.classes),
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


class _RuleFile:
    """One Cedar file, checked and parsed once."""

    def __init__(
        self, path: Path, content: bytes, schema: cedarpy.Schema, known: Mapping[str, Collection[str]]
    ) -> None:
        self._path = path
        self._schema = schema
        text = content.decode("utf-8")
        lines: dict[str, int] = {}
        for line, statement in _statements(text):
            name = self._checked(statement, line, known)
            if name in lines:
                self._fail(line, f"rule {name} stands here twice (line {lines[name]}); give it another @id")
            lines[name] = line
        self._policies = cedarpy.PolicySet.from_str(text)
        #: Cedar's own id of a rule (``policy0``, by position) to its ``@id`` and ``@reason``.
        self._rules = {
            own: (rule.annotations["id"], rule.annotations["reason"])
            for own, rule in self._policies.to_pst().static_policies.items()
        }

    def ask(self, request: dict[str, Any], entities: list[dict[str, Any]]) -> _Answer:
        """Put *request* to the rules. Never raises."""
        try:
            result = cedarpy.is_authorized(request, self._policies, entities, self._schema)
            failed = result.diagnostics.errors
            if not failed:
                allowed = result.decision is cedarpy.Decision.Allow
                return self._answer(allowed, result.diagnostics.reasons)
        except Exception as problem:  # noqa: BLE001 - whatever goes wrong denies
            return _no(f"{self._path.name} could not be evaluated ({type(problem).__name__})")
        # Cedar's own text can quote the request; rule ids cannot.
        named = re.findall(r"`(policy\d+)`", " ".join(failed))
        ids = sorted({self._rules[own][0] for own in named if own in self._rules})
        return _no(f"rule {', '.join(ids)} failed" if ids else "the request does not fit the policy schema")

    def _answer(self, allowed: bool, deciding: Iterable[str]) -> _Answer:
        found = [self._rules[own] for own in sorted(deciding, key=lambda own: int(own.removeprefix("policy")))]
        if not found:
            return _no(f"no rule of {self._path.name} permits it")
        return _Answer(allowed=allowed, rules=tuple(name for name, _ in found), reasons=tuple(why for _, why in found))

    def _checked(self, statement: str, line: int, known: Mapping[str, Collection[str]]) -> str:
        """Check one rule, which begins on *line*, and return its ``@id``."""
        try:
            nodes = cedarpy.policies_to_pst(statement)
        except ValueError as problem:
            self._fail(line, f"not a Cedar rule: {problem}")
        if len(nodes.static_policies) != 1:
            self._fail(line, "a template decides nothing until it is linked; write the rule out")
        found = cedarpy.validate_policies(statement, self._schema)
        if not found.validation_passed:
            self._fail(line, found.errors[0].error if found.errors else "does not fit the schema")
        (rule,) = nodes.static_policies.values()
        name, reason = rule.annotations.get("id", ""), rule.annotations.get("reason", "")
        if not name or not reason or name == DEFAULT_RULE:
            self._fail(line, f'a rule has @id("...") and @reason("..."), and its id is not "{DEFAULT_RULE}"')
        for kind, value in _named(rule):
            if kind in known and value not in known[kind]:
                self._fail(
                    line,
                    f"rule {name}: no {kind} {value!r}{did_you_mean(value, known[kind])}; "
                    f"known: {', '.join(sorted(known[kind]))}",
                )
        return name

    def _fail(self, line: int, message: str) -> NoReturn:
        raise ConfigError(f"{self._path}:{line}: {message}; correct the file", file=str(self._path), line=line)


#: A comment, a string, or the end of a statement: Cedar has no other place for a semicolon.
_TOKEN = re.compile(r'//[^\n]*|"(?:[^"\\]|\\.)*"|;|[^\s;/"]+|[/"]', re.DOTALL)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield each statement of Cedar text with the 1-based line it begins on."""
    start = None
    end = 0
    for token in _TOKEN.finditer(text):
        if token[0].startswith("//"):
            continue
        start = token.start() if start is None else start
        end = token.end()
        if token[0] == ";":
            yield text.count("\n", 0, start) + 1, text[start:end]
            start = None
    if start is not None:
        yield text.count("\n", 0, start) + 1, text[start:end]


def _named(rule: pst.Template) -> Iterator[tuple[str, str]]:
    """Yield ``(kind, name)`` for each pool, and each literal that the rule compares with a part of the context.

    A forbid about a class that does not exist never holds, which no reviewer sees.
    """
    for uid in pst.entity_uids(rule):
        yield uid.type.basename, uid.id
    stack: list[Any] = [clause.expr for clause in rule.clauses]
    while stack:
        node = stack.pop()
        if isinstance(node, pst.BinaryOp):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if isinstance(one, pst.GetAttr):
                    elements = other.elements if isinstance(other, pst.Set) else (other,)
                    yield from ((one.attr, item.value) for item in elements if isinstance(item, pst.StringLit))
        if isinstance(node, tuple):
            stack.extend(node)
        elif hasattr(node, "__dataclass_fields__"):
            stack.extend(getattr(node, name) for name in node.__dataclass_fields__)


def _schema(path: Path, content: bytes) -> cedarpy.Schema:
    text = content.decode("utf-8")
    try:
        return cedarpy.Schema.from_str(text)
    except ValueError as problem:
        # Cedar names no line: the one that is meant mentions the last word of its message.
        word = str(problem).split()[-1].strip("`")
        line = next((n for n, row in enumerate(text.splitlines(), 1) if word in row.partition("//")[0]), 1)
        raise ConfigError(f"{path}:{line}: {problem}; correct the file", file=str(path), line=line) from problem
