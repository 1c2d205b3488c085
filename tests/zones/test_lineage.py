"""A derived data set is allowed no more than what it comes from: by policy, by classes, under all obligations."""

from __future__ import annotations

import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.zones.test_config import SHIPPED, edit
from zones import lineage
from zones.config import load_zone
from zones.errors import ConfigError
from zones.hours import Hours
from zones.model import EgressRequest, NodeShare, Obligations, Padding, Reading, Shuffle
from zones.obligations import Facts, strictest, unmet
from zones.policy import Policy
from zones.review import completed

CLINIC = load_zone(SHIPPED, "clinic")
POLICY = Policy.load(SHIPPED, CLINIC)
REQUEST = completed(
    CLINIC,
    EgressRequest(
        zone="clinic",
        pool="shared",
        person="alice",
        groups=frozenset({"research"}),
        dataset="randhie_features",
        columns=frozenset({"lpi", "many_visits"}),
        segments=frozenset({"train"}),
    ),
)
FORBID = """
@id("no-visits")
@reason("visits stay")
forbid (principal, action == Action::"egress", resource)
when { context.dataset == "randhie" && context.columns.contains("mdvis") };
"""


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """A copy of the shipped policies that a test may change."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "policies"))


def test_chain() -> None:
    """A question about a derived data set is one about each that it comes from, with all that its step reads."""
    asked = lineage.chain(CLINIC, REQUEST)

    assert [one.dataset for one in asked] == ["randhie_features", "randhie_labelled", "randhie_clean", "randhie"]
    assert [len(one.columns) for one in asked] == [2, 5, 5, 5]
    assert "mdvis" in asked[-1].columns
    assert asked[0].segments == {"train"}
    assert all("record_number" not in one.columns for one in asked)
    assert lineage.chain(CLINIC, asked[-1]) == [asked[-1]]


def test_what_is_carried_counts_where_it_leaves() -> None:
    """A column that is carried past the steps is asked about in each data set as soon as it is to leave itself."""
    with_number = replace(REQUEST, columns=REQUEST.columns | {"record_number"})

    assert all("record_number" in one.columns for one in lineage.chain(CLINIC, with_number))
    assert POLICY.decide(REQUEST).allowed
    assert POLICY.decide(completed(CLINIC, with_number)).rules == ("no-direct-identifiers",)


def test_refused_with_its_parent(policies: Path) -> None:
    """A rule about the first data set holds for the third that comes from it, and the refusal says which it was."""
    path = policies / "clinic" / "egress.cedar"
    path.write_text(path.read_text() + FORBID)
    policy = Policy.load(policies, load_zone(policies, "clinic"))
    request = replace(REQUEST, zone="clinic")
    decision = policy.decide(request)
    other = completed(policy.zone, replace(request, dataset="breast_cancer", columns=frozenset(), segments=frozenset()))

    assert (decision.allowed, decision.rules) == (False, ("no-visits",))
    assert decision.reasons == ("visits stay: randhie, which randhie_features comes from",)
    message = policy.refusal(request, decision).message
    assert "data set randhie_features" in message
    assert "derive it from what may leave" in message
    # The control: the rule is about nothing else.
    assert policy.decide(other).allowed
    assert POLICY.decide(request).allowed


def test_control_without_parents(policies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were policy not asked about what it comes from, it would leave."""
    path = policies / "clinic" / "egress.cedar"
    path.write_text(path.read_text() + FORBID)
    policy = Policy.load(policies, load_zone(policies, "clinic"))
    assert not policy.decide(REQUEST).allowed
    monkeypatch.setattr("zones.policy.chain", lambda zone, request: [request])

    assert policy.decide(REQUEST).allowed


def test_segment_of_the_parent_that_stays(policies: Path) -> None:
    """What comes from a segment that never leaves does not leave; what comes from the others does."""
    catalog = policies / "openlab" / "catalog.yaml"
    (policies / "openlab" / "steps.py").write_text(
        "from zones.steps import step\n\n@step(version=1)\ndef inverted(digits):\n    return digits\n"
    )
    text = catalog.read_text()
    results = {}
    for segments in ("", ", segments: [test]", ", segments: [train]", ", segments: [train/fold-1]"):
        catalog.write_text(
            f"{text}\n  inverted:\n    path: inverted.arrow\n    columns: {{label: public}}\n    derived:\n"
            f"      step: inverted\n      version: 1\n      reads: {{digits: {{columns: [label]{segments}}}}}\n"
        )
        policy = Policy.load(policies, load_zone(policies, "openlab"))
        asked = EgressRequest(
            zone="openlab", pool="shared", person="x", groups=frozenset({"students"}), dataset="inverted"
        )
        results[segments] = policy.decide(completed(policy.zone, asked)).rules[0]

    assert results == {
        "": "test-stays",
        ", segments: [test]": "test-stays",
        ", segments: [train]": "students-send-public",
        ", segments: [train/fold-1]": "students-send-public",
    }


def test_what_comes_together_again(policies: Path) -> None:
    """Two columns that may not leave together do not, when each comes by a data set of its own and a third has both."""
    edit(
        policies / "clinic" / "egress.cedar",
        'when { context.classes.contains("direct-identifier") };',
        'when { context.classes.contains("direct-identifier") || (context.dataset == "randhie" &&\n'
        '  context.columns.containsAll(["mdvis", "idp"])) };',
    )
    steps = policies / "clinic" / "steps.py"
    steps.write_text(
        f"{steps.read_text()}\n\n@step(version=1)\ndef same(a):\n    return a\n"
        "\n\n@step(version=1)\ndef join(a, b):\n    return a\n"
    )
    catalog = policies / "clinic" / "catalog.yaml"
    reads = {"visits": "randhie: {columns: [mdvis]}", "plans": "randhie: {columns: [idp]}"}
    reads["joined"] = "visits: {columns: [x]}, plans: {columns: [x]}"
    catalog.write_text(
        catalog.read_text()
        + "".join(
            f"\n  {name}:\n    path: {name}.arrow\n    columns: {{x: confidential}}\n    derived:\n"
            f"      step: {'join' if name == 'joined' else 'same'}\n      version: 1\n      reads: {{{read}}}\n"
            for name, read in reads.items()
        )
    )
    policy = Policy.load(policies, load_zone(policies, "clinic"))
    answers = {}
    for name in reads:
        request = replace(REQUEST, dataset=name, columns=frozenset(), segments=frozenset())
        answers[name] = policy.decide(completed(policy.zone, request)).allowed

    assert answers == {"visits": True, "plans": True, "joined": False}


def test_obligations_of_the_parent(policies: Path) -> None:
    """What is demanded of a parent's rows is demanded of what comes from them."""
    path = policies / "clinic" / "zone.yaml"
    edit(
        path, "obligations:\n  #", "obligations:\n  - datasets: [randhie]\n    max_rows: 100\n    padding: coarse\n  #"
    )
    policy = Policy.load(policies, load_zone(policies, "clinic"))
    found = policy.decide(REQUEST).obligations

    assert (found.max_rows, found.padding) == (100, Padding.COARSE)
    assert POLICY.decide(REQUEST).obligations.max_rows is None


OBLIGATIONS = st.builds(
    Obligations,
    shuffle=st.sampled_from(Shuffle),
    block_rows=st.integers(1, 4),
    shuffle_window=st.none() | st.integers(1, 9),
    padding=st.sampled_from(Padding),
    max_rows=st.none() | st.integers(1, 9),
    min_shards=st.integers(1, 4),
    max_node_share=st.none() | st.builds(NodeShare, percent=st.integers(1, 99), window_s=st.integers(60, 90)),
    accepted_degradations=st.frozensets(st.sampled_from(["swap-on", "no-cgroup"])),
    exclusive_gpu=st.booleans(),
    gpu_kinds=st.none() | st.sampled_from([("H100*",), ("H200*", "H100*")]),
    environments=st.none() | st.frozensets(st.sampled_from("ab"), min_size=1),
    resident_shards=st.booleans(),
    max_lease_s=st.integers(1, 9),
    max_session_s=st.none() | st.integers(1, 9),
    hours=st.none() | st.sampled_from([Hours.parse(f"mon-fri 0{hour}:00-12:00 UTC") for hour in (7, 8, 9)]),
    purposes=st.none() | st.frozensets(st.sampled_from(["care", "study"]), min_size=1),
    reviewed_functions_only=st.booleans(),
)
FACTS = st.builds(
    Facts,
    purpose=st.sampled_from(["care", "study"]),
    now=st.datetimes(datetime(2026, 11, 27), datetime(2026, 11, 30)).map(lambda time: time.replace(tzinfo=UTC)),
    began=st.just(datetime(2026, 11, 28, tzinfo=UTC)),
    function_reviewed=st.booleans(),
    gpu_milli=st.sampled_from([500, 1000]),
    resident=st.booleans(),
    rows=st.none() | st.integers(0, 12),
    most_shards=st.integers(0, 5),
)


@given(first=OBLIGATIONS, second=OBLIGATIONS, call=FACTS)
def test_strictest(first: Obligations, second: Obligations, call: Facts) -> None:
    """A call fulfils both if and only if it fulfils the strictest of the two, whichever comes first."""
    both = {one.key for obligations in (first, second) for one in unmet(obligations, call)}

    assert {one.key for one in unmet(strictest(first, second), call)} >= both
    if first.purposes is None or second.purposes is None or first.purposes & second.purposes:
        assert {one.key for one in unmet(strictest(first, second), call)} == both
    assert strictest(first, first) == first


@given(first=OBLIGATIONS, second=OBLIGATIONS)
def test_strictest_of_what_nodes_show(first: Obligations, second: Obligations) -> None:
    """What is checked elsewhere is no looser than in either: shuffle, padding, shares, what is accepted of nodes."""
    found = strictest(first, second)
    for one in (first, second):
        assert found.accepted_degradations <= one.accepted_degradations
        assert found.max_lease_s <= one.max_lease_s
        assert found.padding in (one.padding, Padding.COARSE)
        assert one.environments is None or (found.environments or frozenset()) <= one.environments
        assert one.gpu_kinds is None or set(found.gpu_kinds or ()) <= set(one.gpu_kinds)
        assert found.shuffle is Shuffle.ROWS or one.shuffle is not Shuffle.ROWS
        if found.shuffle is one.shuffle is Shuffle.BLOCKS:
            assert found.block_rows <= one.block_rows
        if found.shuffle_window is not None:
            assert one.shuffle_window is not None
            assert found.shuffle_window >= one.shuffle_window
        if one.max_node_share is not None:
            assert found.max_node_share is not None
            assert found.max_node_share.percent <= one.max_node_share.percent
            assert found.max_node_share.window_s % one.max_node_share.window_s == 0


@given(minutes=st.integers(0, 10 * 24 * 60))
def test_hours_within(minutes: int) -> None:
    """Hours within others are those that are both, and end with whichever ends first."""
    now = datetime(2026, 11, 23, tzinfo=UTC) + timedelta(minutes=minutes)
    one, other = Hours.parse("mon-fri 07:00-19:00 Europe/Berlin"), Hours.parse("tue-sat 10:00-20:00 UTC")
    third = Hours.parse("wed 00:00-24:00 UTC")
    ends = [hours.end(now) for hours in (one, other, third)]
    found = one.within(other).within(third)

    assert found.end(now) == (min(end for end in ends if end) if all(ends) else None)
    assert str(found) == f"{one} and {other} and {third}"
    assert one.within(one) is one


BROKEN = [
    ("      step: clean\n", "      step: clear\n", r"no step 'clear' \(did you mean 'clean'"),
    ("      step: clean\n      version: 1", "      step: clean\n      version: 2", "has version 1, not 2"),
    ("        randhie:\n", "        randhy:\n", r"no data set 'randhy' \(did you mean 'randhie'"),
    ("columns: [mdvis, lncoins, lpi, physlm, disea]\n          carries: [record_number]\n    columns:\n      mdvis",
     "columns: [mdvis, lncoin, lpi, physlm, disea]\n          carries: [record_number]\n    columns:\n      mdvis",
     r"no column 'lncoin' \(did you mean"),
    ("        randhie:\n", "        randhie_clean:\n", "randhie_clean comes from randhie_clean itself"),
    ("    path: randhie_clean.arrow", "    path: ./randhie.arrow", "is the file of randhie already"),
    ("        randhie:\n", "        randhie_features:\n", "randhie_features comes from randhie_clean itself"),
    ("        randhie:\n", "        fair: {columns: [age]}\n        randhie:\n", "takes 1 data sets: years"),
    ("        randhie:\n", "        randhie:\n          segments: [train]\n", "no segment 'train'"),
    ("    columns:\n      mdvis: confidential\n", "    columns:\n      mdvis: internal\n", "no lower class than"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), BROKEN, ids=[row[2] for row in BROKEN])
def test_broken_catalog(policies: Path, old: str, new: str, message: str) -> None:
    """A derivation that does not hold is refused, with file and line."""
    path = policies / "clinic" / "catalog.yaml"
    first = edit(path, old, new)
    with pytest.raises(ConfigError, match=message) as caught:
        load_zone(policies, "clinic")

    assert caught.value.file == str(path)
    assert caught.value.line is not None
    assert first - 1 <= caught.value.line <= first + new.count("\n") + 1


CARRIES = "          columns: [lncoins, lpi, physlm, disea, many_visits]\n          carries: [record_number]\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (CARRIES, CARRIES.replace("[record_number]", "[mdvis]"), "no column 'mdvis'"),
        (CARRIES, CARRIES.replace("many_visits]", "record_number]"), "is read, so it is not carried"),
        (
            "      record_number: direct-identifier\n    segments:",
            "      record_number: confidential\n    segments:",
            "record_number is confidential, and was direct-identifier",
        ),
    ],
)
def test_broken_carries(policies: Path, old: str, new: str, message: str) -> None:
    """What is carried is in both data sets, not read, and keeps its class."""
    edit(policies / "clinic" / "catalog.yaml", old, new)
    with pytest.raises(ConfigError, match=message):
        load_zone(policies, "clinic")


def test_steps_are_policy(policies: Path) -> None:
    """A step that does something else is another policy, even where its version was not raised."""
    edit(policies / "clinic" / "steps.py", "MANY_VISITS = 5", "MANY_VISITS = 6")
    changed = load_zone(policies, "clinic")

    assert changed.policy_digest != CLINIC.policy_digest
    old, new = (zone.datasets["randhie_labelled"].derived for zone in (CLINIC, changed))
    assert old is not None
    assert new is not None
    assert old.digest != new.digest
    assert CLINIC.datasets["randhie_clean"] == changed.datasets["randhie_clean"]


CLEAN = CLINIC.datasets["randhie_clean"]
DIGESTS = {"randhie": "1" * 64, "randhie_clean": "2" * 64}


def written(of_parent: Any = MappingProxyType({}), **changes: Any) -> dict[str, Any]:
    """Return what stands beside a derived data set, with changes to it, and to what it says of its parent."""
    assert CLEAN.derived is not None
    reading = CLEAN.derived.reads["randhie"]
    parent = lineage.parent(CLINIC.datasets["randhie"], reading, digest="1" * 64, rows=9, lineage=None, listed={})
    return lineage.document(CLEAN, digest="2" * 64, rows=9, time="", parents=[parent | of_parent]) | changes


def test_no_problem() -> None:
    """What is as the catalog, the step and the files say has no problem."""
    assert lineage.problem(CLINIC.datasets, CLEAN, written(), DIGESTS) is None


@pytest.mark.parametrize(
    ("found", "digests", "message"),
    [
        (None, {}, "not written beside it"),
        ([], {}, "not written beside it"),
        (written(format="2"), {}, "not written beside it"),
        (written(dataset="randhie"), {}, "not written beside it"),
        (written(parents=None), {}, "not written beside it"),
        (written(parents=[{}]), {}, "not written beside it"),
        (written(), {"randhie_clean": "3" * 64}, "its file was changed"),
        (written(), {"randhie": "3" * 64}, "randhie, which it was derived from, was changed"),
        (written({"listed": {"labelled": "4" * 64}}), {"labelled": "5" * 64}, "labelled, which it was derived from"),
        (written({"divided": "4" * 64}), {}, "divides what it was derived from in another way"),
        (written({"listed": None}), {}, "not written beside it"),
        (written(version=2), {}, "another step"),
        (written(step="label"), {}, "another step"),
        (written(step_digest=""), {}, "step clean was changed since, but not its version"),
        (written(parents=[]), {}, "other columns or segments"),
    ],
)
def test_problem(found: Any, digests: dict[str, str], message: str) -> None:
    """Whatever was changed since is named."""
    assert message in str(lineage.problem(CLINIC.datasets, CLEAN, found, DIGESTS | digests))


def test_other_reading() -> None:
    """What read other columns, or rows, or carried others, is not what the catalog says."""
    assert CLEAN.derived is not None
    for reading in (Reading(columns=("mdvis",)), replace(CLEAN.derived.reads["randhie"], carries=())):
        one = lineage.parent(CLINIC.datasets["randhie"], reading, digest="1" * 64, rows=9, lineage=None, listed={})
        assert "other columns" in str(lineage.problem(CLINIC.datasets, CLEAN, written(parents=[one]), DIGESTS))
