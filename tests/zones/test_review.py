"""zones.review and zones.golden: what an officer is told of a policy is what the policy decides."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from zones import golden, review
from zones.config import load_zone, zone_names
from zones.errors import ConfigError, UnknownNameError
from zones.labels import ARGUMENTS
from zones.model import EgressRequest
from zones.policy import Policy

SHIPPED = Path(__file__).parents[2] / "policies"


def load(policies: Path, zone: str) -> Policy:
    """Load a zone's policy."""
    return Policy.load(policies, load_zone(policies, zone))


CLINIC, TRADING, OPENLAB = (load(SHIPPED, zone) for zone in ("clinic", "trading", "openlab"))
ANYBODY = EgressRequest(zone="clinic", pool="shared", person=review.SOMEBODY)


def ask(policy: Policy, **fields: object) -> review.Explanation:
    """Explain a question in which only these fields differ from nobody's about nothing."""
    asked = replace(ANYBODY, zone=policy.zone.name, **fields)  # type: ignore[arg-type]  # fields of the request
    return review.explain(policy, review.completed(policy.zone, asked))


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Policy]:
    """Return what loads a zone from a copy of the shipped policies in which one text is replaced by another."""

    def edit(file: str, old: str, new: str, zone: str = "clinic") -> Policy:
        policies = tmp_path / "policies"
        shutil.copytree(SHIPPED, policies, dirs_exist_ok=True)
        text = (policies / file).read_text()
        assert text.count(old) == 1
        (policies / file).write_text(text.replace(old, new))
        return load(policies, zone)

    return edit


# -- explain ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "fields", "ways"),
    [
        (CLINIC, {"groups": {"research"}, "dataset": "randhie", "columns": {"mdvis"}}, None),
        (CLINIC, {"dataset": "randhie", "columns": {"mdvis"}}, ["by a member of team research"]),
        (
            CLINIC,
            {"groups": {"research"}, "dataset": "randhie", "columns": {"mdvis", "record_number"}},
            ["without column record_number"],
        ),
        (CLINIC, {"dataset": "randhie"}, ["by a member of team research and without column record_number"]),
        (CLINIC, {"groups": {"research"}, "dataset": "randhie", "columns": {"record_number"}}, []),
        (CLINIC, {"groups": {"research"}, "columns": {"age"}}, []),
        (TRADING, {"groups": {"quants"}, "dataset": "macrodata"}, ["for a stated purpose"]),
        (TRADING, {"groups": {"quants"}, "purpose": "p", "columns": {"x"}}, ["with a reviewed function"]),
        (
            TRADING,
            {"columns": {"x"}},
            ["by a member of team quants and for a stated purpose and with a reviewed function"],
        ),
    ],
)
def test_ways(policy: Policy, fields: dict[str, object], ways: list[str] | None) -> None:
    """A refusal comes with the smallest changes that would have it allowed, and none that would not."""
    frozen = {key: frozenset(value) if isinstance(value, set) else value for key, value in fields.items()}
    found = ask(policy, **frozen)

    assert found.decision.allowed is (ways is None)
    assert list(found.ways) == (ways or [])
    assert bool(found.owner) is (ways is not None)


def test_where_a_rule_stands() -> None:
    """A deciding rule is shown with its reason, file and line; the default has none."""
    allowed = ask(CLINIC, groups=frozenset({"research"}))
    refused = ask(CLINIC)

    name, reason, where = allowed.rules[0]
    file, _, line = where.rpartition(":")
    assert (name, reason) == ("research-may-send", "team research may send data up to confidential to the shared pool")
    assert Path(file).read_text().splitlines()[int(line) - 1] == '@id("research-may-send")'
    assert [(rule, where) for rule, _, where in refused.rules] == [("default", "")]


def test_owner(edited: Callable[..., Policy]) -> None:
    """Whoever refuses is who can allow: the zone's officer or the pool's operator."""
    closed = edited("pools/shared.cedar", '["clinic", "trading", ', '["trading", ')

    assert "policies/clinic/egress.cedar" in ask(CLINIC).owner
    assert "policies/pools/shared.cedar" in ask(closed, groups=frozenset({"research"})).owner


def test_completed() -> None:
    """A question without columns is about all of the data set's, without a data set about arguments alone."""
    assert review.completed(CLINIC.zone, ANYBODY).columns == ARGUMENTS
    whole = review.completed(CLINIC.zone, replace(ANYBODY, dataset="randhie"))
    assert whole.columns == set(CLINIC.zone.datasets["randhie"].columns)
    assert whole.classes == {"internal", "confidential", "direct-identifier"}
    with pytest.raises(UnknownNameError, match="randhie"):
        review.completed(CLINIC.zone, replace(ANYBODY, dataset="randhi"))


# -- diff ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "asked"), [(CLINIC, 904), (TRADING, 136), (OPENLAB, 1392)])
def test_no_difference(policy: Policy, asked: int) -> None:
    """A policy does not differ from itself."""
    found = review.difference(policy, policy)

    assert not found
    assert found.asked == asked


#: What a team of the clinic can send, with the number of columns.
DATA = {
    "<arguments>": 0, "randhie": 10, "breast_cancer": 31, "breast_cancer_resampled": 31, "randhie_clean": 5,
    "randhie_labelled": 5, "randhie_features": 5, "randhie_features (train)": 5, "randhie_features (test)": 5,
}  # fmt: skip


def all_of_it(team: str, when: str) -> set[tuple[str, str, int, str]]:
    """Return that a team gains or loses all of it, then."""
    return {(f"team {team}", data, columns, when) for data, columns in DATA.items()}


#: File, text, other text; what is gained; what is lost: team, data, columns, when.
CHANGES = {
    "another team": (
        ("clinic/egress.cedar", 'principal in Group::"research"', 'principal in Group::"nursing"'),
        all_of_it("nursing", "always"),
        all_of_it("research", "always"),
    ),
    "a column's class": (
        ("clinic/catalog.yaml", "hlthp: confidential ", "hlthp: direct-identifier "),
        set(),
        {("team research", "randhie", 1, "always")},
    ),
    "a purpose": (
        ("clinic/egress.cedar", ".containsAll(context.classes) };",
         '.containsAll(context.classes) && context.purpose == "cost study" };'),
        set(),
        all_of_it("research", "for no purpose or (some other purpose)"),
    ),
    "a forbid for all but reviewed functions": (
        ("clinic/egress.cedar", 'when { context.classes.contains("direct-identifier") };',
         'when { context.classes.contains("direct-identifier") || !context.function_reviewed };'),
        set(),
        all_of_it("research", "with a function not reviewed"),
    ),
    "two columns that may not leave together": (
        ("clinic/egress.cedar", 'when { context.classes.contains("direct-identifier") };',
         'when { context.classes.contains("direct-identifier") || context.columns.containsAll(["idp", "lpi"]) };'),
        set(),
        {("team research", "randhie", 2, "always")},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "gained", "lost"), CHANGES.values(), ids=CHANGES)
def test_difference(
    edited: Callable[..., Policy],
    edit: tuple[str, str, str],
    gained: set[tuple[str, str, int, str]],
    lost: set[tuple[str, str, int, str]],
) -> None:
    """Exactly who gained and who lost is said, the other way round when the versions are exchanged."""
    new = edited(*edit)
    forth, back = review.difference(CLINIC, new), review.difference(new, CLINIC)

    def summed(asked: object) -> set[tuple[str, str, int, str]]:
        groups = review.grouped(asked, forth.purposes)  # type: ignore[arg-type]  # a difference's
        return {(group.who, group.data, len(group.columns), group.when) for group in groups}

    assert (summed(forth.gained), summed(forth.lost)) == (gained, lost)
    assert (set(back.gained), set(back.lost)) == (set(forth.lost), set(forth.gained))


def test_different_obligations(edited: Callable[..., Policy]) -> None:
    """A condition that changes where something may leave is said with both values."""
    new = edited("trading/zone.yaml", "shuffle: rows", "shuffle: none", zone="trading")

    found = review.difference(TRADING, new)

    assert (found.gained, found.lost) == ([], [])
    assert set(found.obligations) == {
        ("shared", data, "shuffle", "rows", "none") for data in ("<arguments>", "<values>", "macrodata")
    }


# -- simulate -----------------------------------------------------------------------------------


def test_simulate() -> None:
    """A decision of a ledger is put to a policy as it was asked, with the zone that the ledger belongs to."""
    asked = {
        "kind": "decision", "person": "dana", "groups": ["research"], "purpose": "", "dataset": "randhie",
        "pool": "shared",
        "columns": ["mdvis", "record_number"], "classes": ["confidential", "direct-identifier", "internal"],
        "function": "0" * 64, "function_reviewed": False,
    }  # fmt: skip
    entries = [
        {"kind": "opened", "zone": "clinic", "seq": 1},
        {**asked, "seq": 2, "decision": "refused"},
        {**asked, "seq": 3, "decision": "refused", "columns": ["mdvis"], "classes": ["confidential", "internal"]},
    ]

    found = list(review.simulate(CLINIC, entries))

    assert [(one.seq, one.was_allowed, one.decision.allowed) for one in found] == [(2, False, False), (3, False, True)]
    assert found[0].decision.rules == ("no-direct-identifiers",)


# -- golden decisions ---------------------------------------------------------------------------


@pytest.mark.parametrize("zone", zone_names(SHIPPED))
def test_shipped_golden_decisions_hold(zone: str) -> None:
    """Each shipped zone has golden decisions, of both kinds, and its policy decides so."""
    policy = load(SHIPPED, zone)
    outcomes = golden.outcomes(policy, golden.read(golden.golden_path(SHIPPED, zone), policy.zone))

    assert {outcome.golden.allowed for outcome in outcomes} == {True, False}
    assert [outcome.golden.where for outcome in outcomes if not outcome.holds] == []


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("expect: refused\n    rules: [default]", "expect: allowed\n    rules: [default]", "other teams send nothing"),
        ("rules: [default]", "rules: [no-direct-identifiers]", "other teams send nothing"),
    ],
)
def test_golden_decision_that_differs(tmp_path: Path, old: str, new: str, name: str) -> None:
    """Another answer, or the same by another rule, is a golden decision that does not hold, named with its line."""
    text = golden.golden_path(SHIPPED, "clinic").read_text()
    file = tmp_path / "decisions.yaml"
    file.write_text(text.replace(old, new))
    wrong = [outcome for outcome in golden.outcomes(CLINIC, golden.read(file, CLINIC.zone)) if not outcome.holds]

    assert [outcome.golden.name for outcome in wrong] == [name]
    line = next(number for number, row in enumerate(text.splitlines(), 1) if name in row)
    assert wrong[0].golden.where == f"{file}:{line}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decisions:\n  - name: a\n    expect: allow", r"decisions.yaml:3: "),
        ("decisions:\n  - name: a\n    expect: allowed\n    dataset: randhi", r"decisions.yaml:4: .*mean.*randhie"),
        (
            "decisions:\n  - name: a\n    dataset: randhie\n    columns: [mdvs]\n    expect: allowed",
            r"decisions.yaml:4: .*mean.*mdvis",
        ),
        ("decisions:\n  - name: a\n    pool: shard\n    expect: allowed", r"decisions.yaml:3: .*mean.*shared"),
        ("decisions:\n  - name: a\n    teams: [a]\n    expect: allowed", r"decisions.yaml:3: .*unknown key 'teams'"),
        ("decisions: []", r"decisions.yaml:1: "),
        (None, "No such file"),
    ],
)
def test_golden_file_that_is_wrong(tmp_path: Path, text: str | None, message: str) -> None:
    """A file of golden decisions that asks about what does not exist is refused with file and line."""
    file = tmp_path / "decisions.yaml"
    if text is not None:
        file.write_text(text)

    with pytest.raises(ConfigError, match=message):
        golden.read(file, CLINIC.zone)
