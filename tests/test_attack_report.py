"""What `make attack` makes of what tests did: kinds, totals, the report, and when it says that all is well."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from attacks.cases import Case
from attacks.catalogue import MUTATIONS
from attacks.mutants import Verdict
from attacks.outcome import Outcome, count
from attacks.report import markdown
from attacks.screen import Screen
from attacks.sections import DIRECTORIES, SECTIONS, kind_of, section_of, selected
from ray_gpu.controls import CONTROLS

ROOT = Path(__file__).parents[1]
#: One with an attack and a positive control of its own.
NAME = "sealed-memory"
CONTROL = CONTROLS[NAME]
MUTATION = next(mutation for mutation in MUTATIONS if mutation.control == NAME)
VERDICT = Verdict(
    mutation=MUTATION, caught=True, by="tests/sandbox/test_launch.py::test_a[address]", why="DID NOT | RAISE"
)


def outcome(attack: Any = "passed", positive: Any = "passed", **changes: Any) -> Outcome:
    """Return a run of one control: what its attack's test and its positive control's did, and its mutant."""
    found = [
        Case(id=f"{CONTROL.attacks[0]}[address]", outcome=attack, doc="A lie.", message="says why"),
        Case(id=CONTROL.positives[0], outcome=positive, doc="Control.", message="says why"),
    ]
    return Outcome(**{"cases": {"Into the zone": found}, "verdicts": [VERDICT], "controls": (NAME,), **changes})


@pytest.mark.parametrize(
    ("run", "perfect"),
    [
        (outcome(), True),
        (outcome(attack="failed"), False),
        (outcome(positive="failed"), False),
        (outcome(attack="error"), False),
        (outcome(attack="skipped"), False),
        (outcome(positive="skipped"), False),
        (outcome(verdicts=[Verdict(mutation=MUTATION, caught=False, by="x", why="every case passed")]), False),
        (outcome(verdicts=[Verdict(mutation=MUTATION, caught=False, by="x", why="needs root", skipped=True)]), False),
        (outcome(controls=(NAME, "labels")), False),
        (outcome(verdicts=[]), True),
        (outcome(cases={}), True),
    ],
    ids=["all", "attack succeeded", "not real", "no fixture", "no attack", "no positive control", "escaped", "no try",
         "control forgotten", "attacks alone", "mutants alone"],
)  # fmt: skip
def test_perfect(run: Outcome, perfect: bool) -> None:
    """All is well only when each control that was asked for was shown by all three, and nothing went wrong."""
    assert run.perfect() is perfect


def test_unproven_without_a_gpu() -> None:
    """What only a GPU can show is said to be unproven, and spoils nothing; another attack skipped does."""
    scrub = CONTROLS["gpu-scrub"]
    on_gpu = Case(id=scrub.positives[0], outcome="skipped", doc="", message="no GPU")
    attack = next(test for test in scrub.attacks if not test.startswith("tests/gpu/"))

    def run(outcome: Any) -> Outcome:
        cases = {"Tenants": [on_gpu, Case(id=attack, outcome=outcome, doc="", message="")]}
        return Outcome(cases=cases, verdicts=[], controls=("gpu-scrub",))

    assert run("passed").unproven() == {"gpu-scrub": ["positive control"]}
    assert run("passed").perfect()
    assert "`gpu-scrub`: positive control unproven here" in markdown(run("passed"), {}, minutes=1.0)
    assert run("skipped").not_shown() == {"gpu-scrub": ["attack"]}
    assert not run("skipped").perfect()


def test_counts() -> None:
    """An attack that succeeds is counted as such, and one that could not be made is not counted as made."""
    attacks = count(outcome(attack="failed").of_kind("attack"))
    unmade = count(outcome(attack="error").of_kind("attack"))

    assert (attacks.made, attacks.wrong) == (1, 1)
    assert (unmade.made, unmade.errors, unmade.perfect) == (0, 1, False)
    assert count(outcome().positives()).right == 1


@pytest.mark.parametrize(
    ("test", "doc", "kind"),
    [
        (CONTROL.attacks[0], "Control: but the registry knows better.", "attack"),
        (CONTROL.positives[0], "", "positive"),
        ("tests/attack/test_x.py::test_mount", "Nobody mounts.", "attack"),
        ("tests/attack/test_x.py::test_mount_outside", "It works.", "positive"),
        ("tests/attack/test_x.py::test_mount_again", "Control: it works.", "positive"),
        ("tests/hosts/test_x.py::test_mount", "Nobody mounts.", "check"),
    ],
)
def test_kind(test: str, doc: str, kind: str) -> None:
    """The registry says what a test is; of others in tests/attack their name and sentence do."""
    assert kind_of(test, doc) == kind


def test_everything_is_selected() -> None:
    """Each test that the registry names is run, once, and so is each file of the suite's directories."""
    chosen = [test for tests in selected(ROOT).values() for test in tests]
    files = {str(path.relative_to(ROOT)) for directory in DIRECTORIES for path in (ROOT / directory).rglob("test_*.py")}
    named = {test for control in CONTROLS.values() for test in (*control.attacks, *control.positives)}

    assert len(chosen) == len(set(chosen))
    assert files <= set(chosen)
    assert [test for test in named if test not in chosen and test.partition("::")[0] not in chosen] == []
    assert {test for tests in selected(ROOT, [NAME]).values() for test in tests} == {
        *CONTROL.attacks,
        *CONTROL.positives,
    }


def test_sections() -> None:
    """The issue's sections have the files of that name, and every file has one."""
    places = {
        "tests/proofs/test_canaries.py": "Canaries",
        "tests/sandbox/test_boundary.py": "Escape battery",
        "tests/hosts/test_matrix.py": "Lateral movement",
        "tests/attack/test_into_zone.py": "Into the zone",
        "tests/attack/test_out_of_zone.py": "Out of the zone",
        "tests/attack/test_tenants.py": "Tenants",
        "tests/proofs/test_keys.py": "Keys",
        "tests/attack/test_host_controls.py": "What a host lacks",
    }

    assert {file: section_of(file) for file in places} == places
    assert set(places.values()) == set(SECTIONS)


def test_report() -> None:
    """The report has the totals, what went wrong, each test with its sentence, and no path of this machine."""
    wrong = outcome(attack="failed", cases=outcome(attack="failed").cases)
    text = markdown(wrong, {"date": "today"}, minutes=3.2)

    assert "**attacks: 1 made, 1 succeeded**" in text
    assert "**mutations: 1 made, 1 caught (100 %)**" in text
    assert "## What is not as it must be" in text
    assert "| A lie. |" in text
    assert "DID NOT / RAISE" in text
    assert "What is not as it must be" not in markdown(outcome(), {}, minutes=1)
    assert [place for place in re.findall(r"\]\(\.\./([^)]+)\)", text) if not (ROOT / place).exists()] == []


def test_report_names_no_place() -> None:
    """A path of the machine in a failure's text is left out."""
    secret = Case(
        id=CONTROL.attacks[0], outcome="failed", doc="A lie.", message=f"no file {Path('/tmp')}/abc/ray-token"
    )

    text = markdown(Outcome(cases={"Into the zone": [secret]}, controls=(NAME,)), {}, minutes=1)

    assert "no file …" in text
    assert "ray-token" not in text


def test_screen() -> None:
    """Whoever watches sees each test's outcome in its own word, the failing case by name, and the three totals."""
    stream = io.StringIO()
    screen = Screen(Console(file=stream, width=200))
    run = outcome(positive="failed")
    screen.section("Into the zone")
    for case in run.all_cases():
        screen.case(case)
    screen.verdict(VERDICT)
    screen.controls(run)
    screen.totals(run)
    shown = stream.getvalue()

    assert re.search(r"attack +fails +A lie\.", shown)
    assert re.search(r"positive +NOT REAL +Control\.", shown)
    assert f"{CONTROL.positives[0]}: says why" in shown
    assert re.search(r"caught +sealed-memory", shown)
    assert re.search(r"positive controls +1 made, 0 succeeded", shown)
