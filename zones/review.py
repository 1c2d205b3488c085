"""What an officer asks of policies: why was this decided, what would change it, and whom does a new version concern?

Pure: it asks :class:`zones.policy.Policy` and reads nothing. The space of questions is what rules can tell apart:

* who: nobody's team, each team that a rule names, each person whom a rule names;
* what: arguments, values of no data set, each data set's columns one by one and all together, and each pair of columns
  that rules name;
* each pool; each purpose that a rule names, none and some other one; a function that was reviewed, or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zones.errors import UnknownNameError
from zones.labels import ARGUMENTS, classify
from zones.model import Decision, EgressRequest, Obligations, Zone
from zones.obligations import duties
from zones.policy import Policy
from zones.segments import names as segment_names
from zones.segments import touched

#: Stands for a purpose that no rule names, and for a person of no name in particular.
SOME_PURPOSE, SOMEBODY = "(some other purpose)", "(anybody)"
#: Stands for what an obligation demands that is not there.
_UNBOUND = "anything"
#: Changes that are tried together before it is said that nothing simple helps.
_MOST_CHANGES = 3


def completed(zone: Zone, asked: EgressRequest) -> EgressRequest:
    """Return a question with the classes that the gateway would put, for a small function and small arguments.

    Without ``columns`` it is about all of its data set's, without ``segments`` about all rows; without a data set
    either, about arguments alone.

    Raises:
        UnknownNameError: The catalog has no such data set, column or segment.
    """
    columns: frozenset[str] | None = asked.columns or None
    if columns is None and asked.dataset:
        if asked.dataset not in zone.datasets:
            raise UnknownNameError.of("dataset", asked.dataset, zone.datasets)
        columns = frozenset(zone.datasets[asked.dataset].columns)
    classes = classify(
        zone, dataset=asked.dataset, columns=columns, function_bytes=1, argument_bytes=0, session_bytes=0
    )
    divided = zone.datasets[asked.dataset].segments if asked.dataset else None
    chosen = touched(divided, asked.segments or divided.parts) if divided else frozenset()
    columns = ARGUMENTS if columns is None else columns
    return replace(asked, columns=columns, classes=classes, segments=chosen)


# -- explain ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a question was answered as it was."""

    request: EgressRequest
    decision: Decision
    #: Each deciding rule, its reason, and ``file:line`` where it stands; ``""`` where no rule does.
    rules: Sequence[tuple[str, str, str]]
    #: What would have to change for it to be allowed: each is a whole way, of as few changes as any.
    ways: Sequence[str]
    #: Whom to ask for another policy; ``""`` when it is allowed.
    owner: str


def explain(policy: Policy, request: EgressRequest) -> Explanation:
    """Say which rules decide on *request*, and for a refusal what would have to change. Never raises for a name."""
    decision = policy.decide(request)
    rules = [(rule, reason, policy.where(rule)) for rule, reason in zip(decision.rules, decision.reasons, strict=True)]
    ways = [] if decision.allowed else _ways(policy, request)
    owner = "" if decision.allowed else policy.owner(request)
    return Explanation(request=request, decision=decision, rules=rules, ways=ways, owner=owner)


#: In words, and the fields of the request that it changes. Changes that begin with the same word exclude one another.
_Change = tuple[str, Mapping[str, Any]]


def _ways(policy: Policy, request: EgressRequest) -> list[str]:
    """Return the smallest combinations of changes after which *request* would be allowed."""
    changes = list(_changes(policy, request))
    for count in range(1, _MOST_CHANGES + 1):
        found = []
        for several in itertools.combinations(changes, count):
            fields = {key: value for _, change in several for key, value in change.items()}
            distinct = len({said.split()[0] for said, _ in several}) == count
            if distinct and policy.decide(replace(request, **fields)).allowed:
                found.append(" and ".join(said for said, _ in several))
        if found:
            return found
    return []


def _changes(policy: Policy, request: EgressRequest) -> Iterator[_Change]:
    for group in sorted(policy.names("Group") - request.groups):
        yield f"by a member of team {group}", {"groups": request.groups | {group}}
    for purpose in sorted(policy.names("purpose") - {"", request.purpose}):
        yield f"for the purpose {purpose!r}", {"purpose": purpose}
    if not request.purpose:
        yield "for a stated purpose", {"purpose": SOME_PURPOSE}
    if not request.function_reviewed:
        yield "with a reviewed function", {"function_reviewed": True}
    for pool in sorted(set(policy.zone.pools) - {request.pool}):
        yield f"to pool {pool}", {"pool": pool}
    divided = policy.zone.datasets[request.dataset].segments if request.dataset in policy.zone.datasets else None
    if divided is not None:
        for segment in divided.parts:
            yield f"from segment {segment} alone", {"segments": touched(divided, [segment])}
    if columns := _harmful(policy, request):
        left = completed(policy.zone, replace(request, columns=request.columns - set(columns)))
        named = f"column{'s' if len(columns) > 1 else ''} {', '.join(columns)}"
        yield f"without {named}", {"columns": left.columns, "classes": left.classes}


def _harmful(policy: Policy, request: EgressRequest) -> list[str]:
    """Return the columns of the highest class, if others are left without them; none where there is no data set."""
    try:
        classes = policy.zone.datasets[request.dataset].columns
        ranked = sorted(request.columns, key=lambda column: (-policy.zone.rank(classes[column]), column))
    except KeyError:
        return []
    highest = classes[ranked[0]]
    found = sorted(column for column in ranked if classes[column] == highest)
    return found if len(found) < len(ranked) else []


# -- diff ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question, in words that two policies share."""

    who: str
    pool: str
    purpose: str
    reviewed: bool
    #: Data set and columns, arguments, or values of no data set.
    what: tuple[str, tuple[str, ...]]
    #: Segment of the data set; ``""`` for all of it.
    segment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How a new version of a zone's policy differs from the old one."""

    #: Number of questions that both were asked.
    asked: int = 0
    #: Every purpose that was tried.
    purposes: Sequence[str] = ()
    gained: Sequence[Asked] = ()
    lost: Sequence[Asked] = ()
    #: ``pool, data set, key, old value, new value`` of obligations that differ where something may leave.
    obligations: Sequence[tuple[str, str, str, str, str]] = field(default=())

    def __bool__(self) -> bool:
        return bool(self.gained or self.lost or self.obligations)


def difference(old: Policy, new: Policy) -> Difference:
    """Ask both policies every question that either of them can tell apart, and return who gained and who lost."""
    gained, lost, count = [], [], 0
    changed: dict[tuple[str, str, str, str, str], None] = {}
    for asked in _questions(old, new):
        count += 1
        before, after = (_answer(policy, asked) for policy in (old, new))
        if after is not None and before is None:
            gained.append(asked)
        elif before is not None and after is None:
            lost.append(asked)
        elif before is not None and after is not None:
            were, are = duties(before), duties(after)
            for key in {**were, **are}:
                old_value, new_value = were.get(key, _UNBOUND), are.get(key, _UNBOUND)
                if old_value != new_value:
                    changed[asked.pool, asked.what[0], key, old_value, new_value] = None
    return Difference(asked=count, purposes=_purposes(old, new), gained=gained, lost=lost, obligations=list(changed))


def _questions(old: Policy, new: Policy) -> Iterator[Asked]:
    def named(kind: str) -> list[str]:
        return sorted(old.names(kind) | new.names(kind))

    who = ["", *(f"team {group}" for group in named("Group")), *(f"person {name}" for name in named("Person"))]
    pools = sorted({*old.zone.pools, *new.zone.pools})
    purposes = _purposes(old, new)
    for one, pool, what, purpose, reviewed in itertools.product(who, pools, _data(old, new), purposes, (False, True)):
        for segment in _divided(what[0], old, new):
            yield Asked(who=one, pool=pool, purpose=purpose, reviewed=reviewed, what=what, segment=segment)


def _divided(dataset: str, *policies: Policy) -> list[str]:
    """Return the segments to ask about: all rows, and each that one of *policies* has."""
    found = {"": None}
    for policy in policies:
        known = policy.zone.datasets.get(dataset)
        if known is not None and known.segments is not None:
            found |= dict.fromkeys(segment_names(known.segments))
    return list(found)


def _purposes(old: Policy, new: Policy) -> list[str]:
    named = old.names("purpose") | new.names("purpose")
    return list(dict.fromkeys(["", SOME_PURPOSE, *sorted(named)]))


def _data(old: Policy, new: Policy) -> list[tuple[str, tuple[str, ...]]]:
    found: dict[tuple[str, tuple[str, ...]], None] = {("<arguments>", ()): None, ("<values>", ("value",)): None}
    named = old.names("columns") | new.names("columns")
    for zone in (old.zone, new.zone):
        for dataset in zone.datasets.values():
            columns = list(dataset.columns)
            pairs = itertools.combinations([column for column in columns if column in named], 2)
            for some in ([column] for column in columns):
                found[dataset.name, tuple(some)] = None
            for both in pairs:
                found[dataset.name, both] = None
            found[dataset.name, tuple(columns)] = None
    return list(found)


def _answer(policy: Policy, asked: Asked) -> Obligations | None:
    """Return what is to be observed where the question is allowed, and ``None`` where it is not."""
    kind, _, name = asked.who.partition(" ")
    dataset, columns = asked.what
    request = EgressRequest(
        zone=policy.zone.name,
        pool=asked.pool,
        person=name if kind == "person" else SOMEBODY,
        groups=frozenset([name] if kind == "team" else []),
        purpose=asked.purpose,
        dataset="" if dataset.startswith("<") else dataset,
        columns=frozenset(columns),
        segments=frozenset({asked.segment} if asked.segment else ()),
        function_reviewed=asked.reviewed,
    )
    try:
        decision = policy.decide(completed(policy.zone, request))
    except UnknownNameError:
        return None
    return decision.obligations if decision.allowed else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Questions that differ in nothing but columns, purpose and review, in words."""

    who: str
    pool: str
    #: Data set with its segment, ``<arguments>`` or ``<values>``.
    data: str
    columns: Sequence[str]
    #: When: ``"always"``, or for which purposes and functions.
    when: str


def grouped(asked: Iterable[Asked], purposes: Sequence[str]) -> list[Group]:
    """Sum up questions of a :class:`Difference` for people; columns together only where none of them stands alone.

    Args:
        asked: ``gained`` or ``lost``.
        purposes: Every purpose that was tried.
    """
    conditions: dict[tuple[str, str, str, tuple[str, ...]], set[tuple[str, bool]]] = {}
    for one in asked:
        data, columns = one.what
        data = f"{data} ({one.segment})" if one.segment else data
        conditions.setdefault((one.who, one.pool, data, columns), set()).add((one.purpose, one.reviewed))
    together: dict[tuple[str, str, str, str], list[str]] = {}
    for (who, pool, data, columns), when in conditions.items():
        listed = together.setdefault((who, pool, data, _when(when, purposes)), [])
        if len(columns) == 1 or not set(columns) & set(listed):
            listed += [column for column in columns if column not in listed]
    return [
        Group(who=who or "everybody", pool=pool, data=data, columns=columns, when=when)
        for (who, pool, data, when), columns in together.items()
    ]


def _when(conditions: set[tuple[str, bool]], purposes: Sequence[str]) -> str:
    """Say for which purposes and functions, as shortly as these conditions allow."""
    functions = {False: " with a function not reviewed", True: " with a reviewed function"}
    by_kind = {kind: {purpose for purpose, reviewed in conditions if reviewed is kind} for kind in functions}
    if by_kind[False] == by_kind[True]:
        return _for(by_kind[True], purposes) or "always"
    parts = [(_for(found, purposes) + said).strip() for kind, said in functions.items() if (found := by_kind[kind])]
    return "; ".join(parts)


def _for(some: set[str], purposes: Sequence[str]) -> str:
    if some == set(purposes):
        return ""
    if some == set(purposes[1:]):
        return "for any stated purpose"
    return "for " + " or ".join(purpose or "no purpose" for purpose in purposes if purpose in some)


# -- simulate -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A decision of the past under another policy."""

    #: Number of the ledger's entry.
    seq: int
    request: EgressRequest
    was_allowed: bool
    decision: Decision


def simulate(policy: Policy, entries: Iterable[Mapping[str, Any]]) -> Iterator[Replayed]:
    """Ask *policy* what a ledger's decisions were asked; yield each, whether the answer differs or not."""
    zone = ""
    for entry in entries:
        zone = str(entry.get("zone", zone))
        if entry["kind"] == "decision":
            request = asked_of(zone, entry)
            yield Replayed(
                seq=entry["seq"],
                request=request,
                was_allowed=entry["decision"] == "allowed",
                decision=policy.decide(request),
            )


def asked_of(zone: str, entry: Mapping[str, Any]) -> EgressRequest:
    """Return the question that a ``decision`` entry of a zone's ledger was about."""

    def names(key: str) -> frozenset[str]:
        value = entry.get(key, ())
        return frozenset(map(str, value)) if isinstance(value, Collection) else frozenset()

    return EgressRequest(
        zone=zone,
        pool=str(entry["pool"]),
        person=str(entry["person"]),
        groups=names("groups"),
        purpose=str(entry["purpose"]),
        dataset=str(entry["dataset"]),
        columns=names("columns"),
        classes=names("classes"),
        segments=names("segments"),
        function_digest=str(entry.get("function", "")),
        function_reviewed=bool(entry.get("function_reviewed", False)),
    )
