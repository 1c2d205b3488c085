"""What a function takes along when it is pickled, and whether that has changed since. Runs in the notebook.

Pickled by reference means that only a name is sent: a node has the same function, class or module under that name.
Everything of the user's own goes by value.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

#: Types that are no data, which make up most of a function.
PLAIN = frozenset(
    {
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        tuple,
        list,
        dict,
        set,
        frozenset,
        types.CodeType,
        types.FunctionType,
        types.BuiltinFunctionType,
        types.ModuleType,
        types.CellType,
    }
)
#: A value of exactly these types is the same value as long as it is the same object.
_UNCHANGING = frozenset(
    {type(None), bool, int, float, complex, str, bytes, types.CodeType, np.ufunc, np.bool_, np.int64, np.float32}
    | {np.float64, type(np.mean)}
)
#: The same for these: what they take along is looked at by itself (``reached``).
_LOOKED_INTO = (types.FunctionType, types.ModuleType)
#: What the import system keeps in a module, which is no part of what a function does.
_MODULE_MACHINERY = frozenset({"__builtins__", "__spec__", "__loader__", "__path__"})


# -- what goes by name -------------------------------------------------------------------------------


def travels(module: Any) -> bool:
    """Tell whether *module* is the user's own, which no node could import."""
    path = getattr(module, "__file__", None)
    name = getattr(module, "__name__", None)
    # A module under another name than its own cannot be registered, and is no module that a function names.
    return isinstance(path, str) and sys.modules.get(str(name)) is module and name != "__main__" and own(path)


def _installed() -> tuple[str, ...]:
    """Return the directories of what a node has too: Python, its packages, and ray_gpu itself."""
    packages = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [os.path.join(packages, name) for name in ("ray_gpu", "zones")]
    return tuple(dict.fromkeys(place + os.sep for path in places for place in (path, os.path.realpath(path))))


_INSTALLED = _installed()


@functools.lru_cache(maxsize=16384)
def own(path: str) -> bool:
    """Tell whether a file is the user's own, which no node has: of neither Python, its packages nor ray_gpu."""
    return not (path.startswith(_INSTALLED) or os.path.realpath(path).startswith(_INSTALLED))


def by_reference(value: Any) -> bool:
    """Tell whether only the name of a function, class or module is sent: a node has the same under that name."""
    is_module = isinstance(value, types.ModuleType)
    name = value.__name__ if is_module else value.__module__
    module = sys.modules.get(name or "")
    if module is None or name == "__main__" or travels(module):
        return False
    try:
        return (module if is_module else operator.attrgetter(value.__qualname__)(module)) is value
    except AttributeError:
        return False


# -- what goes along ---------------------------------------------------------------------------------


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, value)`` of what is pickled with *value*: variables of a function, attributes, items."""
    if isinstance(value, types.FunctionType):
        yield from _variables(value)
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), (value.__func__.__name__, value.__func__))
    elif isinstance(value, types.BuiltinFunctionType) and not isinstance(
        value.__self__, (types.ModuleType, type(None))
    ):
        yield "self", value.__self__
    elif isinstance(value, functools.partial):
        yield from (
            (_plain_name(value.func), value.func),
            *((f"argument {i}", arg) for i, arg in enumerate(value.args)),
            *value.keywords.items(),
        )
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__.__name__, value.__func__
    elif isinstance(value, property):
        parts = (value.fget, value.fset, value.fdel)
        yield from ((_plain_name(part), part) for part in parts if part is not None)
    elif isinstance(value, dict):
        yield from ((f"[{str(key)[:40]!r}]", item) for key, item in list(value.items()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif type(value) not in PLAIN or isinstance(value, types.ModuleType):
        yield from _attributes(value)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a class, a module or an instance, and an instance's class."""
    yield from (
        (name, item) for name, item in list(getattr(value, "__dict__", {}).items()) if name not in _MODULE_MACHINERY
    )
    if isinstance(value, (type, types.ModuleType)):
        return
    slots = [name for base in type(value).__mro__ for name in base.__dict__.get("__slots__", ()) if name != "__dict__"]
    yield from ((name, getattr(value, name)) for name in slots if hasattr(value, name))
    yield type(value).__name__, type(value)


def _plain_name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield a function's closure variables, the globals that it names, and its defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # the variable has no value yet
            continue
    for name in global_names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    if defaults := function.__defaults__:
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        for name, value in zip(names[len(names) - len(defaults) :], defaults, strict=True):
            yield f"default of {name}", value
    if function.__kwdefaults__:
        yield from ((f"default of {name}", value) for name, value in function.__kwdefaults__.items())
    yield from function.__dict__.items()


@functools.lru_cache(maxsize=1024)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names of globals and attributes in a function's code, and in the code of functions inside it."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(global_names(constant))
    return tuple(sorted(names))


# -- whether it changed -----------------------------------------------------------------------------


def reached(function: Any) -> list[Any]:
    """Return what goes along with a function: what it names now, and what functions and modules of that name."""
    found: list[Any] = []
    seen, waiting = {id(function)}, [function]
    while waiting:
        value = waiting.pop()
        if isinstance(value, types.FunctionType):
            # Tools that reload code give a function that exists another body.
            found.append(value.__code__)
        for _, child in children(value):
            found.append(child)
            if isinstance(child, _LOOKED_INTO) and id(child) not in seen and not by_reference(child):
                seen.add(id(child))
                waiting.append(child)
    return found


def unchanged(before: list[Any], now: list[Any]) -> bool:
    """Tell whether all are the same objects, of kinds that cannot change inside or are looked into."""
    return len(before) == len(now) and all(
        old is new and (type(new) in _UNCHANGING or isinstance(new, _LOOKED_INTO) or _stays(new))
        for old, new in zip(before, now, strict=True)
    )


def _stays(value: Any) -> bool:
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, types.ModuleType)
    return isinstance(value, type) and by_reference(value)
