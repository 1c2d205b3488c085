"""The registry of controls agrees with the code that speaks of them, the documents, and the tests that it names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from attacks.catalogue import caught_by
from ray_gpu.controls import CONTROLS, Control, markdown_table
from ray_gpu.doctor.examination import ROLES, Role, roles_table
from zones.config import load_zone
from zones.model import RECEIPT_IDS, SURROUNDINGS

ROOT = Path(__file__).parents[1]
#: By id, the tests that notice when the control is removed in a copy.
MUTATIONS = caught_by()
IDS = re.compile(r"[a-z]+(-[a-z]+)+")
#: Names that hold, or functions that return, ids of missing controls.
SPEAKING = re.compile(r"degradation|missing|stand_in|SURROUNDINGS", re.IGNORECASE)


def constants(node: ast.AST) -> Iterator[str]:
    """Yield the texts in a piece of code that have the form of an id."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and IDS.fullmatch(inner.value):
            yield inner.value


def spoken(tree: ast.Module) -> Iterator[str]:
    """Yield the ids that a module says are missing: in what it assigns, passes, appends, and returns."""
    for node in ast.walk(tree):
        names: list[str] = []
        values: list[ast.AST] = []
        if isinstance(node, ast.FunctionDef):
            names, values = [node.name], [*node.body]
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names, values = [ast.unparse(target) for target in targets], [node.value] if node.value else []
        elif isinstance(node, ast.keyword):
            names, values = [node.arg or ""], [node.value]
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and SPEAKING.search(str(key.value)):
                    yield from constants(value)
        elif isinstance(node, ast.Call):
            names, values = [ast.unparse(node.func)], [*node.args]
        if any(SPEAKING.search(name) for name in names):
            yield from (name for value in values for name in constants(value))


def trees(*packages: str) -> Iterator[tuple[Path, ast.Module]]:
    """Yield the modules of packages, the registry aside."""
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "controls.py":
                yield path, ast.parse(path.read_text(encoding="utf-8"))


def told_by(*kinds: str) -> set[str]:
    """Return the ids of controls that somebody tells of."""
    return {control.id for control in CONTROLS.values() if control.told in kinds}


def test_code_and_registry_agree() -> None:
    """Each id that the code says is missing is in the registry; each that a receipt may say, some code says."""
    said = {name for _, tree in trees("ray_gpu", "zones") for name in spoken(tree)}

    assert said <= set(CONTROLS)
    assert told_by("receipt") <= said


def test_an_unheard_of_id_would_be_found() -> None:
    """Control: the same look finds ids in each place where code tells them."""
    code = """
        def degradations(): return ("one-id",)
        missing = {"two-id": True}
        missing.append("three-id")
        x = dict(degradations=["four-id"])
        y = {"sandbox_degradations": ["five-id"]}
        missing("six-id", "about")
        other = "no-matter"
    """
    tree = ast.parse("\n".join(line.strip() for line in code.strip().splitlines()))

    assert set(spoken(tree)) == {"one-id", "two-id", "three-id", "four-id", "five-id", "six-id"}


def test_surroundings() -> None:
    """What the zone's side takes for no matter of the sandbox is what the registry places outside it."""
    assert {control.id for control in CONTROLS.values() if control.told == "receipt"} >= SURROUNDINGS
    assert all(CONTROLS[name].where != "sandbox" for name in SURROUNDINGS)


def test_what_a_zone_may_accept() -> None:
    """What zone.yaml may accept is what a receipt may say, on both sides."""
    assert told_by("receipt") == RECEIPT_IDS


@pytest.mark.parametrize("zone", ["clinic", "openlab", "trading"])
def test_policies_name_controls(zone: str) -> None:
    """Each degradation that a shipped zone accepts is one that a receipt may say."""
    accepted = load_zone(ROOT / "policies", zone).obligations.accepted_degradations

    assert accepted
    assert accepted <= told_by("receipt")


def test_doctor_checks_all_that_can_be_missing() -> None:
    """Each control that a host may lack has a check, and each check a control; roles are spelled right."""
    roles = {word for needing, shown in ROLES.values() for word in f"{needing} {shown}".split()}

    assert set(ROLES) == told_by("receipt", "doctor")
    assert roles == set(get_args(Role))
    assert all(not set(needing.split()) & set(shown.split()) for needing, shown in ROLES.values())


@pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)
def test_entry(control: Control) -> None:
    """An entry is whole sentences, and what carries the control out exists."""
    for text in (control.keeps_off, control.meaning, control.fix):
        assert text[0].isupper() or text.startswith(("bubblewrap", "ray[default]"))
        assert text.endswith(".")
    file, _, name = control.code.partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    assert name in (defined(source) if file.endswith(".py") else source)
    # What cannot be missing has no repair; what can, says how.
    assert ("vulnerability" in control.fix) == (control.told == "built in")


def defined(source: str) -> set[str]:
    """Return the names of a module's functions and classes, wherever they are in it."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}


def named(control: Control) -> list[str]:
    """Return every test that a control names."""
    return [*control.attacks, *control.positives]


def evidence(control: Control) -> dict[str, tuple[str, ...]]:
    """Return the tests of each kind that stand for a control."""
    return {"attacks": control.attacks, "positives": control.positives, "mutations": MUTATIONS.get(control.id, ())}


def test_named_tests_exist() -> None:
    """Each test that the registry names is in its file, found without running it."""
    known: dict[str, set[str]] = {}
    wrong = []
    for control in CONTROLS.values():
        for test in named(control):
            file, _, name = test.partition("::")
            if file not in known:
                path = ROOT / file
                known[file] = defined(path.read_text(encoding="utf-8")) if path.exists() else set()
            if name not in known[file] or not name.startswith("test_"):
                wrong.append((control.id, test))

    assert wrong == []


@pytest.mark.parametrize("kind", ["attacks", "positives", "mutations"])
def test_evidence(kind: str) -> None:
    """Every control has an attack, a positive control, and a mutation that a test notices."""
    assert [control.id for control in CONTROLS.values() if not evidence(control)[kind]] == []


def quick(test: str) -> bool:
    """Return whether `make test` runs a test: neither it nor its file is marked heavy, or chaos."""
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    marks: list[ast.expr] = []
    for line in tree.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "pytestmark":
            marks += line.value.elts if isinstance(line.value, ast.List) else [line.value]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            marks += node.decorator_list
    return not {"pytest.mark.heavy", "pytest.mark.chaos"} & set(map(ast.unparse, marks))


@pytest.mark.parametrize("kind", ["attacks", "positives"])
def test_smoke_subset(kind: str) -> None:
    """`make test` attacks every control once, and once without it."""
    assert [control.id for control in CONTROLS.values() if not any(map(quick, evidence(control)[kind]))] == []


def test_a_heavy_test_is_not_quick() -> None:
    """Control: what is marked heavy, itself or with its file, is told from what is not."""
    assert quick("tests/test_controls.py::test_smoke_subset")
    assert not quick("tests/attack/test_tenants.py::test_at_the_same_time")
    assert not quick("tests/proofs/test_sandbox_escape.py::test_own_ray")
    assert quick("tests/proofs/test_sandbox_escape.py::test_refused")


@pytest.mark.parametrize(
    ("document", "mark", "table"),
    [("controls.md", "controls", markdown_table(MUTATIONS)), ("doctor.md", "roles", roles_table())],
    ids=["controls.md", "doctor.md"],
)
def test_table_in_the_documentation(document: str, mark: str, table: str) -> None:
    """The documents have the registry's table and the roles', word for word."""
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")

    assert text.partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- /{mark} -->")[0] == table
