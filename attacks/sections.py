"""Which part of the suite a test belongs to, and whether it is an attack or a positive control. Reads files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ray_gpu.controls import CONTROLS

#: ``"check"``: it is run with the others, and shows neither that a control holds nor that an attack is real.
Kind = Literal["attack", "positive", "check"]

#: Everything in these is run, whether a control names it or not.
DIRECTORIES = ("tests/attack", "tests/proofs", "tests/sandbox", "tests/hosts")
#: The parts of the suite, and which files are theirs; the first that fits, and the last fits all.
SECTIONS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "Canaries": re.compile(r"canar|quiet|leak"),
        "Escape battery": re.compile(r"tests/sandbox/|escape|battery"),
        "Lateral movement": re.compile(
            r"lateral|rogue|client_relay|tests/hosts/|test_nodes|test_node_identity|test_ports"
        ),
        "Tenants": re.compile(r"tenant|tests/gpu/"),
        "Into the zone": re.compile(
            r"into|result|hostile_node|test_values|remote_error|test_frames|test_endpoints|lying"
        ),
        "Keys": re.compile(r"keys|vault|envelope|revo|lease|test_key"),
        "Out of the zone": re.compile(r"out_of|bypass|notebook|source|policy|ledger|labels|job/|shards|gateway"),
        "What a host lacks": re.compile(r""),
    }
)
_POSITIVE_NAME = re.compile(r"test_(control|positive|honest)_|_(without|outside|unconfined)(_|$)")
_POSITIVE_DOC = re.compile(r"(the )?(positive )?control( of|:| is|\b.*: the)", re.IGNORECASE)


def section_of(file: str) -> str:
    """Return the part of the suite that a test file belongs to."""
    return next(name for name, pattern in SECTIONS.items() if pattern.search(file))


def kind_of(test: str, doc: str) -> Kind:
    """Return what a test is: by the registry where that names it, and by its place and words elsewhere.

    A test that is both an attack and its control counts as an attack.

    Args:
        test: ``file::function``.
        doc: Its sentence.
    """
    if any(test in control.attacks for control in CONTROLS.values()):
        return "attack"
    if any(test in control.positives for control in CONTROLS.values()):
        return "positive"
    if not test.startswith("tests/attack/"):
        return "check"
    name = test.partition("::")[2]
    return "positive" if _POSITIVE_NAME.search(name) or _POSITIVE_DOC.match(doc) else "attack"


def selected(root: Path, controls: Iterable[str] = ()) -> dict[str, list[str]]:
    """Return what to run by section: files whole, or tests of them.

    Args:
        root: The checkout.
        controls: Ids; if any, only what they name is run.
    """
    wanted = [CONTROLS[name] for name in controls]
    named = [test for control in wanted or CONTROLS.values() for test in (*control.attacks, *control.positives)]
    whole = [] if wanted else list(_files(root))
    tests = [*whole, *(test for test in dict.fromkeys(named) if test.partition("::")[0] not in whole)]
    # By file, so that the fixtures of one are made once.
    return {
        section: found
        for section in SECTIONS
        if (found := sorted(test for test in tests if section_of(test.partition("::")[0]) == section))
    }


def _files(root: Path) -> Iterator[str]:
    for directory in DIRECTORIES:
        yield from (str(path.relative_to(root)) for path in sorted((root / directory).rglob("test_*.py")))
    yield from (str(path.relative_to(root)) for path in sorted((root / "tests/gpu").glob("test_sandbox*.py")))


def defined(path: Path) -> set[str]:
    """Return the names of the functions in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
