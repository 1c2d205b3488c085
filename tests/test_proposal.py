"""ray_gpu.proposal: forms of a function that stay the same, that an officer can read, and that run as the function."""

from __future__ import annotations

import ast
import functools
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from statsmodels.tools.eval_measures import rmse

from ray_gpu import gpu_remote, proposal
from ray_gpu.functions import PackedFunction, pack
from ray_gpu.proposal import UnstableError, digest, named, packed, proposals, readable, source
from ray_gpu.sandbox.functions import load
from zones.errors import FunctionRefusedError

RATE, NAMES, TABLE = 0.25, {"a": (1, b"x", None)}, np.zeros(3)


def helper(x: Any) -> Any:
    """Return twice."""
    return 2 * x


@gpu_remote(num_gpus=0.5)
def decorated(x: float, scale: float = 3.0, *, shift: int = -1) -> float:
    """Return something of everything.

    The docstring, annotations and this comment are no part of what it does.
    """

    def inner(y: float) -> float:
        """Add."""
        return y + shift

    # A comment.
    total = sum(inner(helper(value)) for value in (x, scale))
    return float(np.sqrt(total) + math.floor(RATE * len(NAMES)))


def factorial(n: int) -> int:
    """Return n!."""
    return 1 if n == 0 else n * factorial(n - 1)


def counting(base: int) -> Callable[[int], int]:
    """Return a function with a closure."""
    offset = base * 10

    def count(x: int) -> int:
        return offset + x

    return count


def with_table() -> Any:
    """Return data."""
    return TABLE.sum()


def test_source_runs_as_the_function() -> None:
    """What a sandbox makes of the form computes what the function computes: globals, closures, defaults, recursion."""
    for function, arguments in ((decorated, (7.0,)), (factorial, (6,)), (counting(4), (2,)), (rmse, (np.ones(3), 0))):
        plain = getattr(function, "__wrapped__", function)
        sent = packed(source(plain))

        assert load(sent, cloudpickle.loads)(*arguments) == plain(*arguments)


def test_named_runs_as_the_function() -> None:
    """A function of an installed distribution goes by name and version."""
    document = named(rmse)

    assert (document["distribution"], document["module"]) == ("statsmodels", "statsmodels.tools.eval_measures")
    assert load(packed(document), cloudpickle.loads) is rmse


def test_another_version() -> None:
    """A sandbox with another version of the distribution, or without it, refuses, saying both."""
    for change, here in (({"version": "0.0.1"}, r"has \d"), ({"distribution": "nothing-of-this"}, "has none")):
        with pytest.raises(ImportError, match=here):
            load(packed({**named(rmse), **change}), cloudpickle.loads)


def test_pickled_functions_are_told_apart() -> None:
    """What no form begins is a pickle, as before."""
    assert load(pack(counting(1)), cloudpickle.loads)(1) == 11
    assert pack(counting(1))[:1] != proposal.STABLE


_ELSEWHERE = """
import sys
sys.path.insert(0, {root!r})
import tests.test_proposal as here
from ray_gpu.proposal import digest, source, named
print(digest(source(here.decorated.__wrapped__)), digest(source(here.counting(4))), digest(named(here.rmse)))
"""


def test_same_in_every_process() -> None:
    """Another process, with another hash seed, finds the same digests; those of pickles differ already by line."""
    code = _ELSEWHERE.format(root=str(Path(__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )

    here = [digest(source(decorated.__wrapped__)), digest(source(counting(4))), digest(named(rmse))]
    assert done.stdout.split() == here


def made(text: str, **values: Any) -> Any:
    """Return the function ``f`` that a text defines, with its source where inspect finds it."""
    import linecache

    text = textwrap.dedent(text)
    name = f"<made {hash(text)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    variables = {"__name__": "made", **values}
    exec(compile(text, name, "exec"), variables)
    return variables["f"]


ONE = """
def f(x, y=2):
    return x * rate + y
"""
#: The same, laid out otherwise.
LAID_OUT = """
import typing

@staticmethod
def f(x: int, y: 'int' = 2) -> int:
  '''Doc.'''
  return (x*rate) + y # c
"""


@pytest.mark.parametrize(
    ("text", "rate", "same"),
    [
        (ONE, 0.5, True),
        (
            LAID_OUT,
            0.5,
            True,
        ),
        (ONE, 0.25, False),
        (ONE, 1, False),
        (ONE.replace("y=2", "y=3"), 0.5, False),
        (ONE.replace("y=2", "y=2.0"), 0.5, False),
        (ONE.replace("+ y", "- y"), 0.5, False),
        (ONE.replace("f(x, y=2)", "f(z, y=2)").replace("x *", "z *"), 0.5, False),
    ],
    ids=["itself", "layout", "value", "type", "default", "type of default", "operator", "name"],
)
def test_what_counts(text: str, rate: Any, same: bool) -> None:
    """Layout, comments, annotations and decorators do not change the digest; whatever changes a result does."""
    first = made(ONE, rate=0.5)
    second = made(text, rate=rate)
    second = second.__func__ if isinstance(second, staticmethod) else second

    assert (digest(source(first)) == digest(source(second))) is same


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (with_table, "names TABLE, a ndarray"),
        (lambda x: x, "is no `def`"),
        (functools.partial(helper, 1), "no function of its own source"),
        (made("def f(x, y=float('nan')):\n    return y"), "a float as default"),
        (made("def f():\n    return table", table={1, 2}), "names table, a set"),
        (eval("lambda: 1"), "no source that can be read"),
    ],
)
def test_no_form(function: Any, why: str) -> None:
    """What cannot be written down says why, and nothing of it is guessed."""
    with pytest.raises(UnstableError, match=why):
        source(function)


def test_changed_closure() -> None:
    """A function that changes variables around it has no such form: its state would be lost."""

    def outer() -> Any:
        count = 0

        def f() -> int:
            nonlocal count
            count += 1
            return count

        return f

    with pytest.raises(UnstableError, match="changes variables"):
        source(outer())


def test_named_is_the_function_itself() -> None:
    """A function that only calls itself like one of a distribution's is none of it."""

    def impostor(x: Any) -> Any:
        return x

    impostor.__module__, impostor.__qualname__ = rmse.__module__, rmse.__qualname__

    with pytest.raises(UnstableError, match="is not what its module"):
        named(impostor)
    assert [form["form"] for form in proposals(rmse)] == ["named", "source"]


def test_read_again() -> None:
    """What is proposed as JSON is read as the same form, and shown with all that its names stand for."""
    document = proposal.parse(decorated.proposal())

    assert digest(document) == digest(source(decorated.__wrapped__))
    shown = readable(document)
    assert ast.unparse(ast.parse("math.floor(RATE * len(NAMES))")) in shown
    assert "where RATE is 0.25" in shown
    assert "where np is numpy" in shown
    assert "    def helper(x):\n        return 2 * x" in shown
    assert readable(named(rmse)).startswith("statsmodels.tools.eval_measures.rmse of statsmodels ")


@pytest.mark.parametrize(
    "change",
    [
        {"form": "pickled"},
        {"source": None},
        {"more": ""},
        {"bindings": {"x": ["module"]}},
        {"bindings": {"x": ["call", "os.system"]}},
        {"bindings": {"x": ["function", {"form": "source"}]}},
        {"bindings": {"x": ["literal", 1.5]}},
        {"source": "def decorated(x):\n    return x\ndef evil(x):\n    return 0"},
        {"source": "def decorated(x):\n    return x", "name": "evil"},
        {"source": "def decorated(x):\n    return x  # \x1b[8m"},
        {"source": "def decorated( x ):\n    return x"},
        {"source": "import os\ndef decorated(x):\n    return x"},
        {"source": "decorated = print"},
        {"source": "def decorated(x:"},
    ],
)
def test_no_proposal(change: dict[str, Any]) -> None:
    """Anything else than a form is refused."""
    document = {**json.loads(decorated.proposal()), **change}

    with pytest.raises(ValueError, match="this is no proposal"):
        proposal.parse(json.dumps(document))


def test_cannot_be_approved() -> None:
    """Asking for a proposal of what has none says what it captures."""
    with pytest.raises(FunctionRefusedError, match=r"with_table cannot be approved: with_table names TABLE, a ndarray"):
        gpu_remote(with_table).proposal()


def test_approved_form_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that is approved is sent, as long as the function is what was approved."""
    function = PackedFunction(counting(4))
    form = source(counting(4))

    assert function.approved({digest(form)}) == packed(form)
    assert function.approved({"0" * 64}) is None
    assert PackedFunction(counting(5)).approved({digest(form)}) is None
    rated = PackedFunction(decorated.__wrapped__)
    wanted = {digest(source(decorated.__wrapped__))}
    assert rated.approved(wanted) is not None
    monkeypatch.setattr(sys.modules[__name__], "RATE", 0.5)
    assert rated.approved(wanted) is None


def test_nothing_is_hidden_from_a_reader() -> None:
    """What a terminal would not show as it is, is written out: escapes, and characters that turn text around."""
    document = {"form": "source", "name": "f", "source": "def f():\n    return y", "bindings": {}}
    document["bindings"] = {"y": ["literal", "'\x1b[8m\u202e'"]}
    shown = readable(proposal.parse(json.dumps(document)))

    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\\u001b[8m\\u202e" in shown
    assert shown.startswith("the function f\n")
    named_ = {"form": "named", "distribution": "d\x1b", "version": "1", "module": "m", "name": "f"}
    assert "\x1b" not in readable(named_)


def doubled(function: Any) -> Any:
    """Return a function that calls another one twice."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) * 100

    return wrapper


@doubled
def wrapped(a: int, b: int = 2) -> int:
    """Add."""
    return a + b


def test_wrapped_functions_have_no_form() -> None:
    """A function that a decorator wrapped does what its source does not say: it cannot be approved as that."""
    with pytest.raises(UnstableError, match="no function of its own source"):
        source(wrapped)
    assert [form["form"] for form in proposals(wrapped)] in ([], ["named"])


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


def with_endless() -> Any:
    """Return what holds itself."""
    return ENDLESS


def test_values_that_cannot_be_written_down() -> None:
    """A value that holds itself is no reason to fail: the function just has no form."""
    assert proposals(with_endless) == []
    with pytest.raises(FunctionRefusedError, match="cannot be approved"):
        gpu_remote(with_endless).proposal()
