"""Steps as a gateway reads them: by their text alone, with a version, and with a digest of all that they may use."""

from __future__ import annotations

import pytest

from zones.errors import ConfigError
from zones.steps import parse, step

TEXT = '''
import pyarrow.compute as pc
from zones.steps import step

LIMIT = 5
OTHER = 7

def capped(column):
    return pc.min_element_wise(column, LIMIT)

@step(version=3)
def clean(visits):
    """Cap."""
    return visits.append_column("capped", capped(visits["visits"]))

@step(version=1)
def join(left, right):
    return left

raise SystemExit("nobody may run this")
'''


def digest(text: str, name: str = "clean") -> str:
    """Return the digest of a step."""
    return parse(text, "steps.py")[name].digest


def test_parse() -> None:
    """Marked functions are steps, with version and parameters; nothing of the file runs."""
    found = parse(TEXT, "steps.py")

    assert {name: (one.version, one.parameters) for name, one in found.items()} == {
        "clean": (3, ("visits",)),
        "join": (1, ("left", "right")),
    }
    assert parse("", "steps.py") == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 5", "LIMIT = 6"),
        ("pc.min_element_wise", "pc.max_element_wise"),
        ('"capped", ', '"caped", '),
        ("import pyarrow.compute as pc", "import numpy as pc"),
        ("version=3", "version=4"),
        ("LIMIT = 5", "LIMIT = 4\nLIMIT = 5"),
    ],
)
def test_digest_covers(old: str, new: str) -> None:
    """A change of the step, or of whatever it may use, is another digest; the other step's stays."""
    changed = TEXT.replace(old, new)

    assert changed != TEXT
    assert digest(changed) != digest(TEXT)
    assert digest(changed, "join") == digest(TEXT, "join")


@pytest.mark.parametrize(
    "new",
    [
        "from limits import *",
        "pc.min_element_wise = None",
        "setattr(pc, 'x', 1)",
        "import limits\nlimits.x = 1",
        "LIMIT += 1",
        "@print\ndef capped_too(column): ...",
        "_ = LIMITS.append(1)",
        "class K:\n    LIMITS['a'] = 1",
        "for i in range(3):\n    LIMITS[i] = 1",
        "with open('f') as file:\n    LIMITS.append(1)",
        "match 1:\n    case LIMITS:\n        pass",
        "try:\n    from a import *\nexcept ImportError:\n    q = 1",
        "if True:\n    len = 1",
    ],
)
def test_what_may_do_anything(new: str) -> None:
    """A statement whose effect on the step is unknown is in every step's digest."""
    changed = TEXT.replace("OTHER = 7", new)

    assert {name for name in ("clean", "join") if digest(changed, name) != digest(TEXT, name)} == {"clean", "join"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("OTHER = 7", "OTHER = 8"),
        ("LIMIT = 5", "LIMIT  =  5  # visits"),
        ("def capped(column):\n    return", "def capped(column):\n\n    return"),
    ],
)
def test_digest_leaves_out(old: str, new: str) -> None:
    """Layout, comments, and what the step cannot name change nothing."""
    changed = TEXT.replace(old, new)

    assert changed != TEXT
    assert digest(changed) == digest(TEXT)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("def f(:\n", 1, "not Python"),
        ("\0", 1, "not Python"),
        ("@step\ndef f(a): ...\n", 1, "marked with its version"),
        ("@step()\ndef f(a): ...\n", 1, "marked with its version"),
        ("x = 1\n@step(version=x)\ndef f(a): ...\n", 2, "marked with its version"),
        ("@step(version=0)\ndef f(a): ...\n", 1, "marked with its version"),
        ("@step(version=True)\ndef f(a): ...\n", 1, "marked with its version"),
        ("@step(version=1)\n@other\ndef f(a): ...\n", 3, "further decorators"),
        ("@step(version=1)\ndef f(a): ...\ndef f(a): ...\n", 2, "another meaning"),
        ("@step(version=1)\ndef f(a): ...\nf = lambda t: t\n", 2, "another meaning"),
        ("@step(version=1)\ndef f(a): ...\nimport f\n", 2, "another meaning"),
        ("@step(version=1)\ndef f(): ...\n", 2, "one table for each data set"),
        ("@step(version=1)\ndef f(*a): ...\n", 2, "one table for each data set"),
        ("@step(version=1)\ndef f(a, b=1): ...\n", 2, "one table for each data set"),
    ],
)
def test_refused(text: str, line: int, message: str) -> None:
    """What is no step is refused with file and line."""
    with pytest.raises(ConfigError, match=message) as caught:
        parse(text, "steps.py")

    assert (caught.value.file, caught.value.line) == ("steps.py", line)


def test_any_name() -> None:
    """A step that may use any name has all of the file in its digest."""
    text = TEXT.replace("return left", "return globals()['OTHER']")

    assert digest(text, "join") != digest(text.replace("OTHER = 7", "OTHER = 8"), "join")
    assert digest(TEXT, "join") == digest(TEXT.replace("OTHER = 7", "OTHER = 8"), "join")


def test_mark() -> None:
    """The mark leaves the function as it is, and has a version from 1."""

    def function(table: object) -> object:
        return table

    assert step(version=1)(function) is function
    with pytest.raises(ValueError, match="begin with 1"):
        step(version=0)
