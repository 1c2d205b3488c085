"""zones.policy: deny by default, both policies must allow, and a refusal says why."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zones.config import load_zone
from zones.errors import ConfigError
from zones.labels import ARGUMENTS
from zones.model import EgressRequest, Grant, Padding, Shuffle
from zones.policy import Policy, PoolPolicy

SHIPPED = Path(__file__).parents[2] / "policies"
CLINIC = load_zone(SHIPPED, "clinic")
POLICY = Policy.load(SHIPPED, CLINIC)

REQUEST = EgressRequest(
    zone="clinic",
    pool="shared",
    person="alice",
    groups=frozenset({"research"}),
    purpose="cost study",
    dataset="randhie",
    columns=frozenset({"mdvis", "lpi"}),
    classes=frozenset({"confidential", "internal"}),
)
IDENTIFIER: dict[str, Any] = {
    "columns": frozenset({"mdvis", "record_number"}),
    "classes": frozenset({"confidential", "direct-identifier"}),
}
ALLOWED = ("research-may-send", "shared-admits-zones")
DEFAULT = ("default",)


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """A copy of the shipped policies that a test may change."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "policies"))


def load(policies: Path, zone: str = "clinic") -> Policy:
    """Load zone and policy from changed files."""
    return Policy.load(policies, load_zone(policies, zone))


def append(path: Path, text: str) -> int:
    """Append *text* to *path* and return the line it begins on."""
    before = path.read_text()
    path.write_text(before + text)
    return before.count("\n") + 1


@pytest.mark.parametrize(
    ("change", "allowed", "rules"),
    [
        ({}, True, ALLOWED),
        ({"function_reviewed": True}, True, ALLOWED),
        ({"dataset": "breast_cancer", "columns": frozenset({"target"})}, True, ALLOWED),
        ({"dataset": "", "columns": ARGUMENTS, "classes": frozenset({"internal"})}, True, ALLOWED),
        (IDENTIFIER, False, ("no-direct-identifiers",)),
        ({"classes": frozenset({"confidential", "internal", "direct-identifier"})}, False, ("no-direct-identifiers",)),
        ({"purpose": ""}, True, ALLOWED),
        ({"groups": frozenset()}, False, DEFAULT),
        ({"groups": frozenset({"quants"})}, False, DEFAULT),
        ({"person": "research", "groups": frozenset()}, False, DEFAULT),
    ],
    ids=[
        "columns",
        "reviewed",
        "another data set",
        "arguments",
        "identifier",
        "identifier's class",
        "no purpose",
        "no team",
        "another team",
        "a person named like the team",
    ],
)
def test_clinic(change: dict[str, Any], allowed: bool, rules: tuple[str, ...]) -> None:
    """The shipped clinic decides as its security officer means it to."""
    decision = POLICY.decide(replace(REQUEST, **change))

    assert (decision.allowed, decision.rules) == (allowed, rules)
    assert len(decision.reasons) == len(decision.rules)
    assert decision.policy_digest == CLINIC.policy_digest


@pytest.mark.parametrize(
    ("columns", "classes", "reviewed", "allowed"),
    [
        ("realgdp", {"public", "internal"}, False, True),
        ("realgdp", {"public", "confidential"}, False, False),
        ("realgdp", {"public", "confidential"}, True, True),
    ],
)
def test_trading(columns: str, classes: set[str], reviewed: bool, allowed: bool) -> None:
    """The shipped trading zone lets confidential data out to reviewed code alone."""
    policy = load(SHIPPED, "trading")
    request = replace(
        REQUEST,
        zone="trading",
        groups=frozenset({"quants"}),
        dataset="macrodata",
        columns=frozenset({columns}),
        classes=frozenset(classes),
        function_reviewed=reviewed,
    )

    assert policy.decide(request).allowed is allowed


@pytest.mark.parametrize(
    "change",
    [
        {"columns": frozenset()},
        {"classes": frozenset()},
        {"pool": "other"},
        {"pool": ""},
        {"zone": "trading"},
        {"dataset": "other"},
        {"columns": frozenset({"mdvis", "other"})},
        {"classes": frozenset({"confidential", "secret"})},
        {"classes": frozenset({"internal"})},
        {"dataset": "", "columns": frozenset({"age"}), "classes": frozenset({"internal"})},
        {"purpose": 7},
        {"purpose": None},
        {"function_reviewed": "yes"},
        {"person": None},
        {"person": "\ud800"},
        {"columns": frozenset({1})},
        {"groups": frozenset({7})},
    ],
    ids=[
        "no columns",
        "no classes",
        "unknown pool",
        "no pool",
        "another zone",
        "unknown data set",
        "unknown column",
        "unknown class",
        "class below the catalog's",
        "own table below the highest class",
        "number as purpose",
        "no purpose",
        "text as flag",
        "nobody",
        "lone surrogate",
        "number as column",
        "number as group",
    ],
)
def test_deny_by_default(change: dict[str, Any]) -> None:
    """What cannot be decided is denied, and nothing raises."""
    assert POLICY.decide(REQUEST).allowed

    decision = POLICY.decide(replace(REQUEST, **change))

    assert (decision.allowed, decision.rules) == (False, DEFAULT)
    assert all(decision.reasons)


@pytest.mark.parametrize("name", ['alice", Group::"research', "al\nice", "", "ünï", "a" * 10000])
def test_names_are_not_parsed(name: str) -> None:
    """No person's or group's name is read as Cedar text."""
    assert POLICY.decide(replace(REQUEST, person=name)).allowed
    assert not POLICY.decide(replace(REQUEST, person=name, groups=frozenset({f'{name}", "research'}))).allowed


FAILING = (
    '@id("fails")\n@reason("never shown")\n{effect} (principal, action == Action::"egress", resource)\n'
    'when {{ context.purpose == "overflow" && 9223372036854775807 + 1 > 0 }};\n'
)


@pytest.mark.parametrize("effect", ["forbid", "permit"])
@pytest.mark.parametrize("file", ["clinic/egress.cedar", "pools/shared.cedar"])
def test_a_rule_that_fails_denies(policies: Path, file: str, effect: str) -> None:
    """Cedar skips a rule that fails while it is evaluated; here that denies."""
    append(policies / file, FAILING.format(effect=effect))
    policy = load(policies)

    decision = policy.decide(replace(REQUEST, purpose="overflow"))

    assert policy.decide(REQUEST).allowed
    assert (decision.allowed, decision.rules, decision.reasons) == (False, DEFAULT, ("rule fails failed",))


@pytest.mark.parametrize("file", ["clinic/egress.cedar", "pools/shared.cedar"])
def test_an_empty_policy_denies(policies: Path, file: str) -> None:
    """A file without rules permits nothing, whatever the other file says."""
    (policies / file).write_text("// nothing\n")

    assert load(policies).decide(REQUEST).rules == DEFAULT
    assert not load(policies).decide(REQUEST).allowed


def test_the_pool_forbids(policies: Path) -> None:
    """What the zone permits and the pool forbids is refused by the pool's rule."""
    append(
        policies / "pools" / "shared.cedar",
        '@id("closed") @reason("closed today") forbid (principal, action, resource);',
    )
    policy = load(policies)

    decision = policy.decide(REQUEST)

    assert (decision.allowed, decision.rules, decision.reasons) == (False, ("closed",), ("closed today",))
    assert "ask the pool's operator to change policies/pools/shared.cedar" in str(policy.refusal(REQUEST, decision))


def test_both_refuse(policies: Path) -> None:
    """When zone and pool both refuse, both rules are named, the zone's first."""
    append(
        policies / "pools" / "shared.cedar",
        '@id("closed") @reason("closed today") forbid (principal, action, resource);',
    )

    assert load(policies).decide(replace(REQUEST, **IDENTIFIER)).rules == ("no-direct-identifiers", "closed")


def test_obligations_come_with_the_decision() -> None:
    """The first rule about the data set holds, otherwise the zone's own obligations."""
    resampled = POLICY.decide(replace(REQUEST, dataset="breast_cancer_resampled", columns=frozenset({"target"})))
    other = POLICY.decide(REQUEST)

    assert (resampled.obligations.shuffle, resampled.obligations.block_rows) == (Shuffle.BLOCKS, 16)
    assert other.obligations == CLINIC.obligations


@pytest.mark.parametrize(
    ("zone", "gpu_milli", "memory_bytes", "rules"),
    [
        ("clinic", 500, 1 << 30, ("shared-leases",)),
        ("trading", 1000, 64 << 30, ("shared-leases",)),
        ("clinic", 1001, 1 << 30, ("shared-lease-size",)),
        ("clinic", 0, 1 << 30, ("shared-lease-size",)),
        ("clinic", 500, (64 << 30) + 1, ("shared-lease-size",)),
        ("clinic", 500, -1, ("shared-lease-size",)),
        ("other", 500, 1 << 30, DEFAULT),
        ("clinic", 1 << 70, 1 << 30, DEFAULT),
        ("clinic", 0.5, 1 << 30, DEFAULT),
        ("clinic", True, 1 << 30, DEFAULT),
        ("clinic", None, 1 << 30, DEFAULT),
        (None, 500, 1 << 30, DEFAULT),
    ],
)
def test_lease(zone: str, gpu_milli: int, memory_bytes: int, rules: tuple[str, ...]) -> None:
    """The custodian decides on a grant's terms with the pool's policy alone."""
    decision = PoolPolicy.load(SHIPPED, "shared").decide_lease(
        zone=zone, gpu_milli=gpu_milli, memory_bytes=memory_bytes
    )

    assert (decision.allowed, decision.rules) == (rules == ("shared-leases",), rules)


GRANT = Grant(
    zone="clinic",
    lease="l1",
    node="gpu-1",
    pool="shared",
    offer_digest="",
    exchange_key="",
    accepted_degradations=(),
    padding=Padding.FINE,
    environment="",
    gpu_milli=500,
    memory_bytes=1 << 30,
    policy_digest="",
    not_after=0,
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        (
            {"gpu_milli": 1001},
            "rule shared-lease-size (a lease holds more than nothing, and at most one GPU and 64 GiB of memory)",
        ),
        ({"zone": "other"}, "rule default (no rule of shared.cedar permits it)"),
        ({"pool": "other"}, "this is the policy of pool shared"),
    ],
)
def test_refusal_of_a_grant(change: dict[str, Any], reason: str | None) -> None:
    """A custodian learns why its pool refuses a grant, and nothing when it does not."""
    assert PoolPolicy.load(SHIPPED, "shared").refusal(replace(GRANT, **change)) == reason


def test_the_gateway_asks_what_the_custodian_will() -> None:
    """The gateway's answer on a lease is the custodian's; an unknown pool is denied."""
    assert POLICY.decide_lease("shared", gpu_milli=500, memory_bytes=1).allowed
    assert POLICY.decide_lease("shared", gpu_milli=1001, memory_bytes=1).rules == ("shared-lease-size",)
    assert POLICY.decide_lease("other", gpu_milli=500, memory_bytes=1).rules == DEFAULT


def test_the_custodian_needs_no_zone(policies: Path) -> None:
    """A custodian's policy loads where no zone's files are."""
    shutil.rmtree(policies / "clinic")
    shutil.rmtree(policies / "trading")

    assert PoolPolicy.load(policies, "shared").decide_lease(zone="clinic", gpu_milli=1, memory_bytes=1).allowed


def test_refusal_names_the_column() -> None:
    """A refusal names the column that caused it, the rule, its reason, and what to do."""
    request = replace(REQUEST, **IDENTIFIER)

    error = POLICY.refusal(request, POLICY.decide(request))

    assert str(error) == (
        "zone clinic refuses column record_number for pool shared: rule no-direct-identifiers "
        "(direct identifiers never leave the clinic); drop the column, "
        "or ask the zone's security officer to change policies/clinic/egress.cedar"
    )
    assert (error.zone, error.rules) == ("clinic", ["no-direct-identifiers"])
    assert error.reasons == ["direct identifiers never leave the clinic"]


@pytest.mark.parametrize(
    ("change", "subject", "advice"),
    [
        ({"groups": frozenset()}, "data set randhie", "check pool, purpose and your team"),
        (
            {"dataset": "", "columns": ARGUMENTS, "classes": frozenset({"direct-identifier"})},
            "function, arguments or filter, which count as direct-identifier,",
            "filter on other columns, make function",
        ),
        (
            {"classes": frozenset({"confidential", "internal", "direct-identifier"})},
            "function, arguments or filter, which count as direct-identifier,",
            "filter on other columns, make function",
        ),
        (
            {"dataset": "", "columns": frozenset({"age", "name"}), "classes": frozenset({"direct-identifier"})},
            "columns age, name",
            "drop these columns",
        ),
        (
            {
                "dataset": "",
                "columns": frozenset(f"c{i:02}" for i in range(20)),
                "classes": frozenset({"direct-identifier"}),
            },
            "columns c00, c01, c02, c03, c04, c05, c06, c07 and 12 more",
            "drop these columns",
        ),
        (
            {
                "dataset": "",
                "columns": frozenset(f"c{i}" for i in range(999)),
                "classes": frozenset({"direct-identifier"}),
            },
            "999 columns",
            "ask for fewer columns",
        ),
        ({"pool": "other"}, "this", "correct the request"),
        ({"classes": frozenset({"unheard-of"})}, "this", "correct the request"),
    ],
)
def test_refusal_names_the_cause(change: dict[str, Any], subject: str, advice: str) -> None:
    """A refusal names what was refused, and no column that is not the cause."""
    request = replace(REQUEST, **change)

    message = str(POLICY.refusal(request, POLICY.decide(request)))

    assert message.startswith(f"zone clinic refuses {subject} for pool {request.pool}: rule ")
    assert f"; {advice}" in message


def test_refusal_of_an_allowed_request() -> None:
    """Asking for the refusal of an allowed request is the caller's bug."""
    with pytest.raises(ValueError, match="allowed"):
        POLICY.refusal(REQUEST, POLICY.decide(REQUEST))


RULE = '@id("x") @reason("y")\nforbid (principal, action == Action::"egress", resource)\nwhen {{ {} }};\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("forbid (principal,\n", "unexpected end"),
        ("nonsense;\n", "not a Cedar rule"),
        ("forbid (principal, action, resource);\n", "a rule has @id"),
        ('@id("x") forbid (principal, action, resource);\n', "a rule has @id"),
        ('@id("default") @reason("y") forbid (principal, action, resource);\n', "a rule has @id"),
        ('@id("x") @reason("y") forbid (principal == ?principal, action, resource);\n', "a template decides nothing"),
        (RULE.format('context.nope == "x"'), "attribute `nope`"),
        (RULE.format("context.purpose > 3"), "expected Long"),
        (
            RULE.format('context.classes.contains("direct-identifer")'),
            r"no classes 'direct-identifer' \(did you mean 'direct-identifier'\?\)",
        ),
        (RULE.format('["secret"].containsAny(context.classes)'), "no classes 'secret'"),
        (RULE.format('context.dataset == "randhi"'), "no dataset 'randhi'"),
        (RULE.format('context.zone != "clinics"'), "no zone 'clinics'"),
        (RULE.format('resource == Pool::"shard"'), r"no Pool 'shard' \(did you mean 'shared'\?\)"),
        ('@id("x") @reason("y") forbid (principal in Team::"a", action, resource);\n', "Team"),
        ('@id("x") @reason("y") forbid (principal, action == Action::"egres", resource);\n', "egres"),
        ('@id("no-direct-identifiers") @reason("y") forbid (principal, action, resource);\n', "stands here twice"),
    ],
)
def test_broken_rule(policies: Path, text: str, message: str) -> None:
    """A rule that does not fit stops the start, with the file and the line the rule begins on."""
    path = policies / "clinic" / "egress.cedar"
    load(policies)
    line = append(path, '// "; not the end of a rule\n' + text) + 1

    with pytest.raises(ConfigError, match=message) as caught:
        load(policies)

    assert (caught.value.file, caught.value.line) == (str(path), line)


def test_strings_do_not_end_a_rule(policies: Path) -> None:
    """Semicolons, quotes and comment marks inside a string belong to it."""
    append(
        policies / "clinic" / "egress.cedar",
        RULE.replace('"y"', r'"a; \"b\" // c"').format('context.purpose == "; // \\" x"'),
    )

    decision = load(policies).decide(replace(REQUEST, purpose='; // " x'))

    assert (decision.rules, decision.reasons) == (("x",), ('a; "b" // c',))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("entity Person in [Group];", "entity Person in [Grup];", "Grup"),
        ('action "lease" appliesTo', 'actoin "lease" appliesTo', "actoin"),
    ],
)
def test_broken_schema(policies: Path, old: str, new: str, message: str) -> None:
    """A schema that cannot be read stops the start of gateway and custodian, with file and line."""
    path = policies / "schema.cedarschema"
    text = path.read_text()
    path.write_text(text.replace(old, new))

    for start in (lambda: load(policies), lambda: PoolPolicy.load(policies, "shared")):
        with pytest.raises(ConfigError, match=message) as caught:
            start()

        assert (caught.value.file, caught.value.line) == (str(path), text[: text.index(old)].count("\n") + 1)


def test_a_pool_rule_about_another_pool(policies: Path) -> None:
    """A pool's file decides about its own pool alone."""
    path = policies / "pools" / "shared.cedar"
    line = append(path, '@id("x") @reason("y") permit (principal, action, resource == Pool::"other");\n')

    with pytest.raises(ConfigError, match="no Pool 'other'") as caught:
        PoolPolicy.load(policies, "shared")

    assert (caught.value.file, caught.value.line) == (str(path), line)


def test_files_that_changed(policies: Path) -> None:
    """A policy is not loaded from other files than its zone was."""
    zone = load_zone(policies, "clinic")
    append(policies / "clinic" / "egress.cedar", "// reviewed by nobody\n")

    with pytest.raises(ConfigError, match="changed while they were read"):
        Policy.load(policies, zone)


CONDITIONS = st.sampled_from(
    [
        'context.classes.contains("confidential")',
        'context.columns.contains("mdvis")',
        'context.purpose == "audit"',
        "context.function_reviewed",
        'principal in Group::"research"',
        'context.dataset == ""',
        "true",
        "false",
        "9223372036854775807 + 1 > 0",
    ]
)
FORBIDS = st.lists(st.tuples(st.sampled_from(["when", "unless"]), CONDITIONS), min_size=1, max_size=3)
REQUESTS = st.builds(
    replace,
    st.just(REQUEST),
    dataset=st.sampled_from(["randhie", ""]),
    purpose=st.sampled_from(["", "audit", "x"]),
    columns=st.frozensets(st.sampled_from(["mdvis", "lpi", "record_number", "<arguments>"])),
    classes=st.frozensets(st.sampled_from(CLINIC.classes)),
    groups=st.frozensets(st.sampled_from(["research", "x"])),
    function_reviewed=st.booleans(),
)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """One copy of the policies that every example writes its forbids into."""
    with TemporaryDirectory() as folder:
        yield Path(shutil.copytree(SHIPPED, Path(folder) / "policies"))


@settings(max_examples=60, deadline=None)
@given(
    forbids=FORBIDS,
    file=st.sampled_from(["clinic/egress.cedar", "pools/shared.cedar"]),
    requests=st.lists(st.one_of(st.just(REQUEST), REQUESTS), min_size=1, max_size=5),
)
def test_a_forbid_never_widens(
    scratch: Path, forbids: list[tuple[str, str]], file: str, requests: list[EgressRequest]
) -> None:
    """Whatever forbid is added to either file, nothing leaves that did not leave before."""
    text = "".join(
        f'@id("x{n}") @reason("y") forbid (principal, action == Action::"egress", resource) {word} {{ {condition} }};\n'
        for n, (word, condition) in enumerate(forbids)
    )
    (scratch / file).write_text((SHIPPED / file).read_text() + text)
    try:
        narrower = load(scratch)
    finally:
        shutil.copy(SHIPPED / file, scratch / file)

    for request in requests:
        assert POLICY.decide(request).allowed or not narrower.decide(request).allowed
