"""The catalogue of mutations fits the tree, covers the registry, and its runner tells a catch from a crash."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from attacks import cases, mutants
from attacks.cases import Case
from attacks.catalogue import MUTATIONS
from attacks.catalogue.mutation import Edit, Mutation
from attacks.sections import defined
from ray_gpu.controls import CONTROLS

ROOT = Path(__file__).parents[1]
#: Cheap ones that are really made here; `make attack` makes all.
SMOKE = ("core-handler", "ledger-first")
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="needs git and a checkout: copies what git knows",
)
REASON = r"== \('missing'"


def smoke(control: str) -> Mutation:
    """Return a control's first mutation."""
    return next(mutation for mutation in MUTATIONS if mutation.control == control)


# -- the catalogue ----------------------------------------------------------------------------------


def test_every_control_has_a_mutation() -> None:
    """Each control of the registry is removed at least once, and nothing else is."""
    assert {mutation.control for mutation in MUTATIONS} == set(CONTROLS)


def test_texts_are_there_once() -> None:
    """Each text that a mutation removes is in its file exactly once, and what takes its place is another."""
    wrong = [
        (mutation.control, edit.old)
        for mutation in MUTATIONS
        for edit in mutation.edits
        if (ROOT / edit.file).read_text(encoding="utf-8").count(edit.old) != 1 or edit.old == edit.new
    ]

    assert wrong == []


def test_python_stays_python(tmp_path: Path) -> None:
    """Each mutant of a Python file can be compiled: it is the control that is gone, not the file."""
    for mutation in MUTATIONS:
        for number, edit in enumerate(mutation.edits):
            copy = tmp_path / edit.file
            copy.parent.mkdir(parents=True, exist_ok=True)
            if number == 0 or not copy.exists():
                copy.write_bytes((ROOT / edit.file).read_bytes())
            mutants.apply(edit, tmp_path)
            if edit.file.endswith(".py"):
                compile(copy.read_text(encoding="utf-8"), mutation.control, "exec")


def test_named_tests_exist() -> None:
    """Each test that must notice is in its file, and the reason that is expected is a regular expression."""
    wrong = []
    for mutation in MUTATIONS:
        re.compile(mutation.reason)
        for test in mutation.tests:
            file, _, name = test.partition("::")
            if name.partition("[")[0] not in defined(ROOT / file):
                wrong.append((mutation.control, test))

    assert wrong == []


# -- the judge --------------------------------------------------------------------------------------

ONE = Mutation(control="x", what="x", edits=(), tests=("t.py::test_a",), reason="DID NOT RAISE")


@pytest.mark.parametrize(
    ("did", "caught", "why"),
    [
        ([("t.py::test_a", "failed", "Failed: DID NOT RAISE X")], True, "DID NOT RAISE"),
        (
            [("t.py::test_a[1]", "passed", ""), ("t.py::test_a[2]", "failed", "Failed: DID NOT RAISE X")],
            True,
            "DID NOT",
        ),
        ([("t.py::test_a", "passed", "")], False, "every case passed"),
        ([("t.py::test_a", "failed", "NameError: name 'x' is not defined")], False, "failed: NameError"),
        ([("t.py::test_a", "error", "Failed: DID NOT RAISE X")], False, "error: "),
        ([("t.py", "error", "it cannot be collected")], False, "every case passed"),
        ([("t.py::test_ab", "failed", "Failed: DID NOT RAISE X")], False, "every case passed"),
        ([], False, "every case passed"),
    ],
    ids=["caught", "one case", "escaped", "crash", "fixture", "uncollected", "another test", "nothing"],
)
def test_judge(did: list[tuple[str, str, str]], caught: bool, why: str) -> None:
    """Only a failure of the named test itself, for the named reason, is a catch."""
    found = mutants.judge(ONE, [Case(id=i, outcome=o, message=m) for i, o, m in did])  # type: ignore[arg-type]  # words

    assert (found.caught, why in found.why) == (caught, True), found


def test_judge_wants_every_named_test() -> None:
    """Where two tests must notice, one alone is no catch."""
    two = replace(ONE, tests=("t.py::test_a", "t.py::test_b"))
    noticed = Case(id="t.py::test_a", outcome="failed", message="DID NOT RAISE")

    assert not mutants.judge(two, [noticed, replace(noticed, id="t.py::test_b", outcome="passed")]).caught
    assert mutants.judge(two, [noticed, replace(noticed, id="t.py::test_b")]).caught


# -- real mutants -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """A copy of this checkout, of which every mutant is a copy."""
    with mutants.copied() as made:
        yield made


@pytest.fixture(scope="module")
def unchanged(tree: Path) -> list[Case]:
    """What the tests of the mutants below do without a change."""
    return mutants.baseline([smoke(control) for control in SMOKE], tree)


@needs_git
@pytest.mark.parametrize("control", SMOKE)
def test_mutant_is_caught(tree: Path, unchanged: list[Case], control: str) -> None:
    """A control that is removed in a copy is missed, in the copy alone."""
    verdict = mutants.attempt(smoke(control), tree, unchanged)

    assert verdict.caught, verdict


@needs_git
def test_crash_is_no_catch(tree: Path, unchanged: list[Case]) -> None:
    """Control: a mutant that dies, for which the same test fails as well, counts as not caught."""
    honest = smoke("core-handler")
    dying = replace(honest, edits=(replace(honest.edits[0], new="    if not_a_name:"),))
    verdict = mutants.attempt(dying, tree, unchanged)

    assert (verdict.caught, verdict.skipped) == (False, False)
    assert "failed: NameError" in verdict.why


@needs_git
def test_broken_tree_is_no_baseline(tree: Path, unchanged: list[Case]) -> None:
    """A test that fails without the change as well proves nothing, nor does one that is skipped."""
    mutation = smoke("core-handler")
    (test,) = mutation.tests
    failing = [replace(case, outcome="failed", message="anyway") for case in unchanged if case.id == test]
    skipped = [replace(case, outcome="skipped", message="needs root") for case in unchanged if case.id == test]

    assert "without the change too: anyway" in mutants.attempt(mutation, tree, failing).why
    assert mutants.attempt(mutation, tree, skipped).skipped
    assert not mutants.attempt(mutation, tree, []).caught


def test_edit_must_fit() -> None:
    """A text that is not there, or there twice, is refused before anything is written."""
    for old in ("no such text in it", "import"):
        with pytest.raises(ValueError, match="times; see attacks/catalogue"):
            mutants.apply(Edit(file="zones/labels.py", old=old, new=""), ROOT)


# -- the runner -------------------------------------------------------------------------------------

HANGS = """
import os

def test_before() -> None:
    '''It passes.'''

def test_ends_the_process() -> None:
    '''It takes pytest along.'''
    os._exit(1)

def test_after() -> None:
    '''It has its turn.'''

def test_fails() -> None:
    '''It fails.'''
    assert [1] == [], "why"
"""


@needs_git
def test_a_process_that_ends_takes_no_other_test_along(tree: Path) -> None:
    """The test that ended pytest is an error, those after it run, and each comes with its sentence."""
    (tree / "tests/zones/test_hangs.py").write_text(HANGS)

    found = cases.run(tree, ["tests/zones/test_hangs.py"], timeout_s=120)

    assert {case.id.partition("::")[2]: (case.outcome, case.doc) for case in found} == {
        "test_before": ("passed", "It passes."),
        "test_ends_the_process": ("error", ""),
        "test_after": ("passed", "It has its turn."),
        "test_fails": ("failed", "It fails."),
    }
    assert [case.outcome for case in cases.run(tree, ["tests/zones/no_such.py"], timeout_s=120)] == ["error"]


@needs_git
def test_tests_of_another_tree_are_refused(tree: Path, tmp_path: Path) -> None:
    """A tree whose product is not its own is not tested as if it were."""
    (tmp_path / "attacks").symlink_to(tree / "attacks")
    (tmp_path / "test_x.py").write_text("def test_x() -> None: ...")

    with pytest.raises(cases.WrongTreeError, match="elsewhere"):
        cases.run(tmp_path, ["test_x.py"], timeout_s=120)
