"""Two weeks of a clinic's ledger, made up: the shapes of real entries, for what reads many of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

ZONE = "classes: [public, internal, confidential, direct-identifier]\n"
BEGIN = datetime(2026, 3, 2, 8, tzinfo=UTC)
#: Data set, its highest class, usual rows and bytes of a row.
DATASETS = (
    ("randhie", "confidential", 20_190, 90),
    ("breast_cancer", "confidential", 569, 250),
    ("wards", "internal", 400_000, 40),
    ("", "internal", 0, 0),
)
NODES = (("shared", "gpu-1"), ("shared", "gpu-2"), ("shared", "gpu-3"), ("oncology", "onc-1"))
PEOPLE = ("dana", "eli", "noor")
REFUSALS = (
    ("no-direct-identifiers", "direct identifiers never leave the clinic"),
    ("default", "no rule of egress.cedar permits it"),
)


def entries(days: int = 14, seed: int = 1) -> list[dict[str, Any]]:
    """Return the entries of so many days, in order."""
    drawn = random.Random(seed)
    found: list[dict[str, Any]] = []
    for entry in _entries(days, drawn):
        time = entry.pop("at").strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        seq = len(found) + 1
        # An entry names another one by how many stand between.
        named: dict[str, Any] = {name: seq - entry.pop(name) for name in ("intent", "decision_entry") if name in entry}
        found.append({**entry, **named, "seq": seq, "time": time})
    return found


def _entries(days: int, drawn: random.Random) -> Iterator[dict[str, Any]]:
    yield {"kind": "opened", "zone": "clinic", "at": BEGIN}
    yield {"kind": "policy", "policy_digest": "a" * 64, "files": {"clinic/zone.yaml": ZONE}, "at": BEGIN}
    for day in range(days):
        at = BEGIN + timedelta(days=day)
        if at.weekday() > 4:
            continue
        for number in range(drawn.randint(3, 9)):
            at += timedelta(minutes=drawn.randint(5, 60))
            person = drawn.choice(PEOPLE)
            session = f"s{day}-{number}"
            yield {"kind": "session-start", "person": person, "session": session, "purpose": "triage", "at": at}
            yield from _session(person, session, at, drawn)
            yield {"kind": "session-end", "person": person, "session": session, "at": at}


def _session(person: str, session: str, at: datetime, drawn: random.Random) -> Iterator[dict[str, Any]]:
    dataset, classification, rows, row_bytes = drawn.choices(DATASETS, (3, 2, 1, 2))[0]
    pool, node = drawn.choices(NODES, (4, 4, 2, 1))[0]
    asked = {
        "person": person, "session": session, "purpose": "triage", "dataset": dataset, "pool": pool,
        "classes": sorted({"internal", classification}), "at": at,
    }  # fmt: skip
    if drawn.random() < 0.12:
        rule, reason = drawn.choice(REFUSALS)
        yield {**asked, "kind": "decision", "decision": "refused", "rules": [rule], "reasons": [reason]}
        return
    yield {**asked, "kind": "decision", "decision": "allowed", "rules": ["research-may-send"], "reasons": [""]}
    if drawn.random() < 0.05:
        yield {
            "kind": "refusal", "person": person, "session": session, "decision_entry": 1, "obligations": ["max_rows"],
            "reasons": ["a call sends 20,000 rows at most, and this one has 20,190"], "at": at,
        }  # fmt: skip
        return
    yield {**asked, "kind": "intent", "node": node}
    size = rows * row_bytes + 4096 * drawn.randint(1, 40)
    lost = drawn.random() < 0.04
    yield {
        "kind": "completion", "intent": 1, "node": node, "bytes": size, "calls": drawn.randint(1, 30),
        "rows": rows, "at": at, "outcome": "lost" if lost else "done",
    }  # fmt: skip
    lacking = ["swap-on"] if node == "gpu-3" else []
    receipt = {
        "device": "NVIDIA H100", "degradations": lacking, "controls": ["no-seccomp"] * (10 - len(lacking)),
        "started": 0, "ended": drawn.randint(20, 900),
    }  # fmt: skip
    yield {
        "kind": "lease-end", "lease": f"l-{session}", "node": node, "outcome": "lost" if lost else "done", "at": at,
        "reason": "connection lost" if lost else "", "receipt": None if lost else {"receipt": receipt},
    }  # fmt: skip
    if dataset == "randhie" and not lost:
        share = {"dataset": dataset, "node": node, "percent": drawn.randint(20, 58)}
        yield {"kind": "share", **share, "at": at}
