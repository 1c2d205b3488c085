"""A zone's steps: reviewed functions that make one data set out of others, in ``policies/<zone>/steps.py``.

::

    from zones.steps import step

    @step(version=2)
    def adults(visits: pa.Table) -> pa.Table:
        return visits.filter(pc.field("age") >= 18)

``ray-gpu data derive`` runs them, for whoever keeps the zone's data. A gateway reads their text alone, here, and runs
none of it: a step is known by its name, its version and the digest of all in the file that it may use.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from zones.errors import ConfigError

STEPS_FILE = "steps.py"
#: Column that a step gets of a data set that carries others, with the number of each row: it has to return it.
ROW_COLUMN = "row"
#: Labels the digest, so that no other one is equal.
_DIGEST_LABEL = b"ray-gpu step v1\n"

_F = TypeVar("_F", bound=Callable[..., Any])


def step(*, version: int) -> Callable[[_F], _F]:
    """Mark a function of ``steps.py`` as a step: it takes one ``pyarrow.Table`` for each data set, and returns one.

    Where the catalog has columns carried past it, the table of that data set has a column ``row`` with the number of
    each row, and so has the one that it returns.

    Args:
        version: To be raised with every change of what it does; a catalog names it.
    """
    if version < 1:
        raise ValueError("versions of steps begin with 1")
    return lambda function: function


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step, as its text describes it."""

    version: int
    #: Names of its parameters, in order: one for each data set.
    parameters: tuple[str, ...]
    #: SHA-256 over the text of the function, without comments and layout, and of all in its file that it may use.
    digest: str


def parse(text: str, file: str) -> dict[str, Step]:
    """Return the steps that a file's text defines, by name. Runs nothing.

    Args:
        text: Python.
        file: For messages.

    Raises:
        ConfigError: It is not Python, or a step is not one.
    """
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError) as problem:
        _refuse(file, getattr(problem, "lineno", None) or 1, "this is not Python")
    found = {}
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef) and (marks := [*filter(_is_mark, statement.decorator_list)]):
            if len(statement.decorator_list) > 1:
                _refuse(file, statement.lineno, f"step {statement.name} has further decorators; take them away")
            found[statement.name] = Step(
                version=_version(marks[0], file),
                parameters=_parameters(statement, file),
                digest=_digest(statement, module.body),
            )
    return found


def _refuse(file: str, line: int, message: str) -> NoReturn:
    raise ConfigError(f"{file}:{line}: {message}; correct the file", file=file, line=line)


def _is_mark(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(called, ast.Name) and called.id == step.__name__


def _version(mark: ast.expr, file: str) -> int:
    match mark:
        case ast.Call(args=[], keywords=[ast.keyword(arg="version", value=ast.Constant(value=int(version)))]):
            if version >= 1 and not isinstance(version, bool):
                return version
    _refuse(file, mark.lineno, "a step is marked with its version, from 1, as in @step(version=1)")


def _parameters(function: ast.FunctionDef, file: str) -> tuple[str, ...]:
    taken = function.args
    if taken.vararg or taken.kwarg or taken.kwonlyargs or taken.defaults or not (taken.posonlyargs + taken.args):
        _refuse(file, function.lineno, f"step {function.name} takes one table for each data set, and nothing else")
    return tuple(parameter.arg for parameter in taken.posonlyargs + taken.args)


def _digest(function: ast.FunctionDef, statements: Sequence[ast.stmt]) -> str:
    """Hash a function's text with that of all that it may use of its file.

    That are statements which give a meaning to one of its names, or of theirs in turn, and those that give none to any,
    whose effect is unknown: but for texts, which have none.
    """
    bound = {place: _bound(statement) for place, statement in enumerate(statements)}
    used = {place for place, names in bound.items() if not names and not _is_text(statements[place])}
    used.add(statements.index(function))
    while more := {
        place
        for place, names in bound.items()
        if place not in used and any(names & _names(statements[known]) for known in used)
    }:
        used |= more
    joined = "\n".join(ast.unparse(statements[place]) for place in sorted(used))
    return hashlib.sha256(_DIGEST_LABEL + joined.encode()).hexdigest()


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _bound(statement: ast.stmt) -> set[str]:
    """Return the names that a statement of the file may give a meaning to; those of a function's own are too many."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            # Of a star nobody knows what: then the statement counts as one that gives a meaning to none.
            found |= set() if node.name == "*" else {(node.asname or node.name).partition(".")[0]}
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


def _names(statement: ast.stmt) -> set[str]:
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
