"""A function in a form that stays the same from process to process, so that an officer can approve it. Pure.

Pickled functions differ between processes, and say nothing to whoever reads them. Two forms do neither:

* **named**: a function of an installed distribution, by distribution, version, module and qualified name. A sandbox
  imports it, from that version or not at all.
* **source**: the function's source, without docstrings, annotations, decorators, comments and layout, and what it names
  outside of itself: modules and things in modules of Python and its packages by name, plain values as literals, and
  functions of the same kind. A sandbox compiles it.

What is sent is :func:`packed`, what is approved its SHA-256.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import operator
import sys
import textwrap
import types
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from ray_gpu.captured import by_reference, global_names
from zones.model import canonical

#: First byte of what is sent in these forms. No pickle begins with it.
STABLE = b"S"
#: Functions that a function calls, and theirs; deeper, nobody reads them.
_MAX_DEPTH = 8


class UnstableError(Exception):
    """A function has no such form; the message says why."""


def packed(document: Mapping[str, Any]) -> bytes:
    """Return what is sent of a function in one of these forms."""
    return STABLE + canonical(document)


def digest(document: Mapping[str, Any]) -> str:
    """Return what an officer approves, hexadecimal."""
    return hashlib.sha256(packed(document)).hexdigest()


def parse(text: str) -> dict[str, Any]:
    """Return the form that somebody wrote down as JSON, checked part by part.

    Raises:
        ValueError: It is none.
    """
    try:
        document = json.loads(text)
        _check(document, 0)
        canonical(document)
    except (ValueError, TypeError, KeyError, RecursionError, SyntaxError, MemoryError):
        raise ValueError("this is no proposal; write it down as f.proposal() returns it") from None
    return dict(document)


def _check(document: Any, depth: int) -> None:
    form = {"named": {"distribution", "version", "module", "name"}, "source": {"name", "source", "bindings"}}
    if depth > _MAX_DEPTH + 1 or set(document) != form[document["form"]] | {"form"}:
        raise ValueError
    if any(type(document[key]) is not str for key in document.keys() - {"bindings"}):
        raise ValueError
    if document["form"] == "source":
        (definition,) = ast.parse(document["source"]).body
        if not isinstance(definition, ast.FunctionDef) or definition.name != document["name"]:
            raise ValueError
        # Read as it is compiled: no comment, no layout and no character that is not there in the function itself.
        if ast.unparse(definition) != document["source"]:
            raise ValueError
    for how, *what in document.get("bindings", {}).values():
        if len(what) != {"self": 0, "module": 1, "attribute": 2, "function": 1, "literal": 1}[how]:
            raise ValueError
        if how == "function":
            _check(what[0], depth + 1)
        elif any(type(item) is not str for item in what):
            raise ValueError


def readable(document: Mapping[str, Any]) -> str:
    """Return a form for people to read: its source, and what each name in it stands for.

    What a terminal would not show as it is, is written out.
    """
    if document["form"] == "named":
        text = "{module}.{name} of {distribution} {version}".format_map(document)
    else:
        text = f"the function {document['name']}\n\n{_lines(document)}"
    return "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text)


def _lines(document: Mapping[str, Any], indent: str = "") -> str:
    if document["form"] == "named":
        return indent + readable(document)
    lines = textwrap.indent(str(document["source"]), indent).splitlines()
    for name, (how, *what) in document["bindings"].items():
        if how == "function":
            lines += ["", f"{indent}where {name} is", _lines(what[0], f"{indent}    ")]
        else:
            lines += ["", f"{indent}where {name} is {'the function itself' if how == 'self' else '.'.join(what)}"]
    return "\n".join(lines)


def proposals(function: Callable[..., Any]) -> list[dict[str, Any]]:
    """Return the forms that *function* has: named, source, both or none."""
    found = []
    for form in (named, source):
        try:
            found.append(form(function))
        except (UnstableError, ValueError, RecursionError):
            # The last two come of values that cannot be written down: endless, or holding themselves.
            continue
    return found


def named(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function of an installed distribution by its name.

    Raises:
        UnstableError: It is none.
    """
    name = str(getattr(function, "__qualname__", function))
    module = str(getattr(function, "__module__", None))
    found = _attribute(module, name)
    if found is not function and getattr(found, "__wrapped__", None) is not function:
        raise UnstableError(f"{name} is not what its module {module} has under that name")
    distributions = _distributions().get(module.partition(".")[0], ())
    if len(distributions) != 1:
        raise UnstableError(f"module {module} belongs to no installed distribution, or to several")
    version = metadata.version(distributions[0])
    return {"form": "named", "distribution": distributions[0], "version": version, "module": module, "name": name}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Return each top-level module's distributions."""
    return {module: sorted(set(names)) for module, names in metadata.packages_distributions().items()}


def _attribute(module: str, name: str) -> Any:
    try:
        return operator.attrgetter(name)(sys.modules[module])
    except (AttributeError, KeyError):
        return None


def source(function: Callable[..., Any], depth: int = 0) -> dict[str, Any]:
    """Return a function as source and bindings.

    Raises:
        UnstableError: It has no source here, is none of ``def``, or names what is neither a module, nor something in
            one of Python's or an installed package's, nor a plain value, nor such a function.
    """
    if not isinstance(function, types.FunctionType) or depth > _MAX_DEPTH or hasattr(function, "__wrapped__"):
        raise UnstableError(f"{function!r} is no function of its own source")
    tree = _definition(function)
    outer = _outer_values(function, {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
    bindings = {name: _binding(name, value, function, depth) for name, value in sorted(outer.items())}
    return {"form": "source", "name": tree.name, "source": ast.unparse(tree), "bindings": bindings}


def _definition(function: types.FunctionType) -> ast.FunctionDef:
    """Return a function's ``def``, without what does not change what it does."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        raise UnstableError(f"{function.__qualname__} has no source that can be read here") from None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise UnstableError(f"{function.__qualname__} is no `def`")
    definition.decorator_list = []
    arguments, defaults = definition.args, function.__kwdefaults__ or {}
    arguments.defaults = [_literal(function, value) for value in function.__defaults__ or ()]
    arguments.kw_defaults = [
        _literal(function, defaults[one.arg]) if one.arg in defaults else None for one in arguments.kwonlyargs
    ]
    for node in ast.walk(definition):
        if isinstance(node, ast.Nonlocal) and set(node.names) & set(function.__code__.co_freevars):
            raise UnstableError(f"{function.__qualname__} changes variables of the function around it")
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node, False):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.arg):
            node.annotation = None
    return definition


def _literal(function: types.FunctionType, value: Any) -> ast.expr:
    if not _is_literal(value):
        raise UnstableError(f"{function.__qualname__} has a {type(value).__name__} as default, which has no such form")
    return ast.parse(repr(value), mode="eval").body


def _outer_values(function: types.FunctionType, names: set[str]) -> dict[str, Any]:
    """Return what those of *names* stand for that the function has from outside: its closure's and its globals."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
    for name in global_names(function.__code__):
        # The code's names are also those of attributes.
        if name in names and name in function.__globals__:
            found[name] = function.__globals__[name]
    return found


def _binding(name: str, value: Any, function: types.FunctionType, depth: int) -> list[Any]:
    """Return how a sandbox gets what a name stands for: ``[how, ...]``."""
    value = getattr(value, "__wrapped__", value) if type(value).__name__ == "RemoteFunction" else value
    if value is function:
        return ["self"]
    if isinstance(value, types.ModuleType) and by_reference(value):
        return ["module", value.__name__]
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) and by_reference(value):
        return ["attribute", value.__module__, value.__qualname__]
    if isinstance(value, types.FunctionType):
        return ["function", source(value, depth + 1)]
    if _is_literal(value):
        return ["literal", repr(value)]
    raise UnstableError(f"{function.__qualname__} names {name}, a {type(value).__name__}, which has no such form")


def _is_literal(value: Any) -> bool:
    """Say whether ``ast.literal_eval(repr(value))`` is the same value of the same types, in any process."""
    if type(value) in (type(None), bool, int, float, complex, str, bytes):
        return value == value and abs(value) != float("inf") if isinstance(value, (float, complex)) else True
    if type(value) in (tuple, list):
        return all(map(_is_literal, value))
    return type(value) is dict and all(_is_literal(key) and _is_literal(item) for key, item in value.items())
