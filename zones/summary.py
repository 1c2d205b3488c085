"""What a ledger says in sum: how much of what went where, what was refused, how weak it was. Pure.

Bytes, calls and rows are those of completions, which say what was drawn; of a crash they are the most that can have
left. Each belongs to its intent, which says of whom, of which data set and classes, for which pool and node.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

#: Stands for what comes from no data set: functions and arguments alone, or a notebook's own values.
NO_DATASET = "(no data set)"


@dataclass(slots=True)
class Amount:
    """Something that left, in sum."""

    bytes: int = 0
    calls: int = 0
    rows: int = 0

    def add(self, bytes_: int, calls: int, rows: int) -> None:
        """Add to it."""
        self.bytes += bytes_
        self.calls += calls
        self.rows += rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What is added up together."""

    day: str
    dataset: str
    #: The most sensitive class among what left.
    classification: str
    pool: str
    node: str
    person: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """One refusal, of policy or of an obligation."""

    seq: int
    time: str
    person: str
    purpose: str
    dataset: str
    #: Rule of Cedar, or key of zone.yaml.
    rules: str
    reasons: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """One lease that ended."""

    lease: str
    node: str
    outcome: str
    reason: str
    device: str
    #: What it lacked.
    degradations: tuple[str, ...]
    #: How many of the node's controls held.
    held: int
    seconds: int


@dataclass(slots=True)
class Summary:
    """A whole ledger, or a part of it."""

    zone: str = ""
    first: str = ""
    last: str = ""
    entries: int = 0
    sessions: int = 0
    people: set[str] = field(default_factory=set)
    purposes: Counter[str] = field(default_factory=Counter)
    policies: list[str] = field(default_factory=list)
    flows: dict[Flow, Amount] = field(default_factory=lambda: defaultdict(Amount))
    refused: list[Refused] = field(default_factory=list)
    leases: list[Leased] = field(default_factory=list)
    #: Data set and node to percent of the data set that the node was given, at most, where policy bounds that.
    shares: dict[tuple[str, str], int] = field(default_factory=dict)
    #: Each class and its place in the newest policy, least sensitive first.
    ranks: dict[str, int] = field(default_factory=dict)
    #: Bytes that may have left at most when a gateway ended without saying so.
    at_most: int = 0

    def total(self, **fields: str) -> Amount:
        """Return the sum of the flows with these fields."""
        found = Amount()
        for flow, amount in self.flows.items():
            if all(getattr(flow, name) == value for name, value in fields.items()):
                found.add(amount.bytes, amount.calls, amount.rows)
        return found

    def names(self, name: str) -> list[str]:
        """Return the values of a field of the flows, ascending."""
        return sorted({getattr(flow, name) for flow in self.flows})


def summarise(entries: Iterable[Mapping[str, Any]], *, since: str = "", until: str = "~") -> Summary:
    """Sum a ledger up.

    Args:
        entries: All of it, in order: an intent may stand long before its completion.
        since: Entries before this UTC time, as entries have it, are read and not counted.
        until: Nor are those from this one on.
    """
    found = Summary()
    intents: dict[int, Mapping[str, Any]] = {}
    decisions: dict[int, Mapping[str, Any]] = {}
    for entry in entries:
        kind = entry["kind"]
        if kind == "opened":
            found.zone = str(entry["zone"])
        elif kind == "policy":
            found.ranks = _ranks(entry) or found.ranks
        elif kind == "intent":
            intents[entry["seq"]] = entry
        elif kind == "decision":
            decisions[entry["seq"]] = entry
        if since <= entry["time"] < until:
            found.first, found.last = found.first or entry["time"], entry["time"]
            found.entries += 1
            _count(found, entry, intents, decisions)
    return found


def _ranks(policy: Mapping[str, Any]) -> dict[str, int]:
    """Return each class and its place, least sensitive first, as the zone.yaml of a policy has them."""
    for path, text in policy["files"].items():
        if path.endswith("/zone.yaml"):
            return {name: place for place, name in enumerate(yaml.safe_load(text)["classes"])}
    return {}


def _count(
    found: Summary,
    entry: Mapping[str, Any],
    intents: Mapping[int, Mapping[str, Any]],
    decisions: Mapping[int, Mapping[str, Any]],
) -> None:
    kind = entry["kind"]
    if kind == "session-start":
        found.sessions += 1
        found.people.add(entry["person"])
        found.purposes[str(entry.get("purpose", ""))] += 1
    elif kind == "policy":
        found.policies.append(entry["policy_digest"])
    elif kind in ("completion", "recovered"):
        intent = intents[entry["intent"]]
        bytes_, calls = (entry.get(name, entry.get(f"at_most_{name}", 0)) for name in ("bytes", "calls"))
        found.at_most += bytes_ if kind == "recovered" else 0
        highest = max(intent["classes"], key=lambda name: found.ranks.get(name, -1), default="")
        flow = Flow(
            day=entry["time"][:10],
            dataset=intent["dataset"] or NO_DATASET,
            classification=highest,
            pool=intent["pool"],
            node=entry["node"],
            person=intent["person"],
        )
        found.flows[flow].add(bytes_, calls, entry.get("rows", 0))
    elif kind == "decision" and entry["decision"] == "refused":
        found.refused.append(_refused(entry, entry, entry["rules"]))
    elif kind == "refusal":
        found.refused.append(_refused(entry, decisions[entry["decision_entry"]], entry["obligations"]))
    elif kind == "lease-end":
        found.leases.append(_leased(entry))
    elif kind == "share":
        key = (entry["dataset"] or NO_DATASET, entry["node"])
        found.shares[key] = max(found.shares.get(key, 0), entry["percent"])


def _refused(entry: Mapping[str, Any], asked: Mapping[str, Any], rules: Iterable[str]) -> Refused:
    return Refused(
        seq=entry["seq"],
        time=entry["time"],
        person=entry["person"],
        purpose=asked["purpose"],
        dataset=asked["dataset"] or NO_DATASET,
        rules=", ".join(rules),
        reasons="; ".join(entry["reasons"]),
    )


def _leased(entry: Mapping[str, Any]) -> Leased:
    receipt = entry["receipt"]["receipt"] if entry["receipt"] else {}
    return Leased(
        lease=entry["lease"],
        node=entry["node"],
        outcome=entry["outcome"],
        reason=entry["reason"],
        device=str(receipt.get("device", "")),
        degradations=tuple(receipt.get("degradations", ())),
        held=len(receipt.get("controls", ())),
        seconds=int(receipt.get("ended", 0)) - int(receipt.get("started", 0)),
    )
