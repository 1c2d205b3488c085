"""Every clause of the shipped policies matters to some golden decision: changed, the table notices.

A change is of one thing: a rule is left out or turned round, a condition, what its head asks for or a name of a list is
left out, or a comparison or a text is another. One that no question can tell from the shipped policy
(:func:`zones.review.difference`) is none.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from zones import golden, review
from zones.config import load_zone, zone_names
from zones.errors import ConfigError
from zones.policy import Policy, PoolPolicy

SHIPPED = Path(__file__).parents[2] / "policies"
ZONES = zone_names(SHIPPED)
POOL = "pools/shared.cedar"
#: Each comparison, and what it becomes.
OTHERS = {
    " > ": " >= ", " <= ": " < ", "!=": "==", "containsAll": "containsAny", "containsAny": "containsAll",
    "!context": "context", "&&": "||", "permit (": "forbid (", "forbid (": "permit (", "unless {": "when {",
    "when {": "unless {",
}  # fmt: skip
#: Zone, thousandths of a GPU, and bytes of leases that are asked for at the edges of what the pool allows.
LEASES = [
    *[(zone, 500, 1 << 30) for zone in (*ZONES, "elsewhere")],
    *[("clinic", gpus, 1 << 30) for gpus in (0, 1, 1000, 1001)],
    *[("clinic", 500, memory) for memory in (0, 1, 64 << 30, (64 << 30) + 1)],
]


def mutants(text: str) -> Iterator[tuple[str, str]]:
    """Yield what is changed, and the file with that change."""
    for rule in re.finditer(r'@id\("([^"]+)"\)\n@reason\("[^"]*"\)\n((?:permit|forbid) \(.*?\};\n)', text, re.DOTALL):
        name, (start, stop) = rule[1], rule.span(2)
        yield f"{name} left out", text[: rule.start()] + text[stop:]
        for begin, end, new in _changes(rule[2]):
            was = rule[2][begin:end]
            said = f"{name}: {was!r} becomes {new!r}" if new else f"{name}: without {was!r}"
            yield " ".join(said.split()), text[: start + begin] + new + text[start + end :]


def _changes(body: str) -> Iterator[tuple[int, int, str]]:
    """Yield spans of a rule's text, and what stands there instead."""
    for old, new in OTHERS.items():
        for found in re.finditer(re.escape(old), body):
            yield *found.span(), new
    for found in re.finditer(r' (?:in Group|== Pool|== Action)::"[^"]+"', body):
        yield *found.span(), ""
    for found in re.finditer(r'(?:contains\(|[=!]= )("[^"]+")', body):
        yield *found.span(1), '"another"'
    for found in re.finditer(r"\[([^\]]+)\]", body):
        names = found[1].split(", ")
        for name in names if len(names) > 1 else ():
            yield found.start(1), found.end(1), ", ".join(other for other in names if other != name)
    (condition,) = re.finditer(r"(?:when|unless) \{(.*)\};", body, re.DOTALL)
    clauses = condition[1].split("&&")
    for place in range(len(clauses)):
        left = "&&".join(clauses[:place] + clauses[place + 1 :])
        yield condition.start(1), condition.end(1), f" {left.strip() or 'true'} "


def changed(folder: Path, file: str, text: str, zone: str) -> Policy | None:
    """Load a zone's policy with another text of one file, or ``None`` where that is refused."""
    (folder / file).write_text(text)
    try:
        return Policy.load(folder, load_zone(folder, zone))
    except ConfigError:
        return None
    finally:
        shutil.copy(SHIPPED / file, folder / file)


CASES = [
    (zone, file, what, text)
    for zone in ZONES
    for file in (f"{zone}/egress.cedar", POOL)
    for what, text in mutants((SHIPPED / file).read_text())
    if "lease" not in what.partition(":")[0]
]


@functools.cache
def as_shipped(zone: str) -> tuple[Policy, Sequence[golden.Golden]]:
    """Return a zone's policy, and its golden decisions, which hold."""
    shipped = Policy.load(SHIPPED, load_zone(SHIPPED, zone))
    goldens = golden.read(golden.golden_path(SHIPPED, zone), shipped.zone)
    assert all(outcome.holds for outcome in golden.outcomes(shipped, goldens))
    return shipped, goldens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the shipped policies."""
    return Path(shutil.copytree(SHIPPED, tmp_path_factory.mktemp("mutants") / "policies"))


@pytest.mark.parametrize(("zone", "file", "what", "text"), CASES, ids=[f"{case[0]}, {case[2]}" for case in CASES])
def test_golden_decisions_notice(folder: Path, zone: str, file: str, what: str, text: str) -> None:
    """Some golden decision of the zone differs, unless no question does."""
    mutant = changed(folder, file, text, zone)
    if mutant is None:
        return
    shipped, goldens = as_shipped(zone)
    noticed = [outcome for outcome in golden.outcomes(mutant, goldens) if not outcome.holds]

    assert noticed or not review.difference(shipped, mutant), f"no golden decision of {zone} notices: {what}"


def test_there_are_mutants(folder: Path) -> None:
    """Most changes make a policy that is read, and that questions tell from the shipped one."""
    loaded = [changed(folder, file, text, zone) for zone, file, _, text in CASES]

    assert len(CASES) > 60
    assert sum(mutant is not None for mutant in loaded) > len(CASES) // 2


#: A pool's custodians ask about their own pool alone.
LEASE_CASES = [
    case
    for case in mutants((SHIPPED / POOL).read_text())
    if "lease" in case[0].partition(":")[0] and "== Pool::" not in case[0]
]


@pytest.mark.parametrize(("what", "text"), LEASE_CASES, ids=[case[0] for case in LEASE_CASES])
def test_leases_notice(folder: Path, what: str, text: str) -> None:
    """Of the pool's rules about leases, each clause decides at some edge."""

    def answers() -> list[bool]:
        policy = PoolPolicy.load(folder, "shared")
        return [
            policy.decide_lease(zone=zone, gpu_milli=gpus, memory_bytes=memory).allowed for zone, gpus, memory in LEASES
        ]

    before = answers()
    assert any(before)
    assert not all(before)
    (folder / POOL).write_text(text)
    try:
        after = answers()
    except ConfigError:
        return
    finally:
        shutil.copy(SHIPPED / POOL, folder / POOL)

    assert before != after, f"no lease notices: {what}"
