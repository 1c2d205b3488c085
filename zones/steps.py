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
#: Who names one of these may use names that it does not write.
_ANY_NAME = frozenset({"globals", "vars", "locals", "eval", "exec", "__import__", "__builtins__"})

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
            if sum(statement.name in _stored(other) for other in module.body) > 1:
                _refuse(file, statement.lineno, f"{statement.name} has another meaning in this file as well")
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

    That is every statement but texts, and functions, imports and constants that neither it names nor what it uses.
    """
    left = [statement for statement in statements if statement is not function and not _is_text(statement)]
    used = [function, *(statement for statement in left if not _defines(statement))]
    for statement in used:
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        for other in left:
            # By such a name it may use any other.
            if other not in used and (names & _defines(other) or names & _ANY_NAME):
                used.append(other)
    texts = [ast.unparse(statement) for statement in statements if statement in used]
    return hashlib.sha256(_DIGEST_LABEL + "\n".join(texts).encode()).hexdigest()


def _stored(statement: ast.stmt) -> set[str]:
    """Return the names that a statement may give a meaning to, and those within it."""
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = {node.name for node in ast.walk(statement) if isinstance(node, named)}
    found |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and not _is_load(node)}
    return found | {
        (node.asname or node.name).partition(".")[0] for node in ast.walk(statement) if isinstance(node, ast.alias)
    }


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _defines(statement: ast.stmt) -> set[str]:
    """Return the names that a statement gives a meaning to, if that is all it does; else none."""
    match statement:
        case ast.FunctionDef(decorator_list=[]):
            return {statement.name}
        case ast.FunctionDef(decorator_list=[mark]) if _is_mark(mark):
            return {statement.name}
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            found = {(alias.asname or alias.name).partition(".")[0] for alias in names}
            return set() if "*" in found else found
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant()):
            return {name}
    return set()
