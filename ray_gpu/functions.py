"""Turns a user's function into bytes, after looking at everything it takes along. Runs in the notebook.

Closures, globals, defaults, attributes of captured objects and bodies of captured classes leave the zone with
the function. The pickler shows each object before it is written: tables and arrays are refused, whatever they hang
on, and the error names the variable. The gateway enforces the size cap again, on bytes that it never unpickles.
"""

from __future__ import annotations

import array
import functools
import io
import operator
import os
import sys
import sysconfig
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np

from ray_gpu.request import MAX_FUNCTION_BYTES
from zones.errors import FunctionRefusedError

#: How deep a refusal is traced to the attribute or item that is its cause.
_MAX_DEPTH = 8
#: Attributes that tables and arrays have, whatever library they come from.
_DATA_PROTOCOLS = (
    "__arrow_c_stream__",
    "__arrow_c_array__",
    "__array_interface__",
    "__cuda_array_interface__",
    "__array__",
    "__dataframe__",
    "__dlpack__",
)
#: Types without such attributes, which make up most of a function.
_PLAIN = frozenset(
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
#: The same for these: what they take along is looked at by itself (``_reached``).
_LOOKED_INTO = (types.FunctionType, types.ModuleType)
#: What the import system keeps in a module, which is no part of what a function does.
_MODULE_MACHINERY = frozenset({"__builtins__", "__spec__", "__loader__", "__path__"})
#: ``cloudpickle`` keeps the modules that it sends by value in one list for the whole process.
_registering = threading.Lock()


class PackedFunction:
    """A function with its bytes, which are made anew when what the function captures has changed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._captured: list[Any] | None = None
        self._bytes = b""

    def __bytes__(self) -> bytes:
        captured = _reached(self._function)
        if self._captured is None or not _unchanged(self._captured, captured):
            self._bytes, self._captured = pack(self._function), captured
        return self._bytes


def pack(function: Callable[..., Any]) -> bytes:
    """Return the pickled function, with everything it needs that is not an installed module.

    Raises:
        FunctionRefusedError: It captures a table or an array, captures something that cannot be pickled,
            or is larger than ``MAX_FUNCTION_BYTES``; ``variable`` names the cause.
        TypeError: *function* is no Python function, method or ``functools.partial`` of one.
    """
    check_function(function)
    with _by_value():
        try:
            packed = _dumps(function)
        except _DataFoundError as found:
            raise _holds_data(function, found) from None
        except Exception as error:  # noqa: BLE001 - objects raise what they like when they are pickled
            raise _cannot_pickle(function, error) from None
        if len(packed) > MAX_FUNCTION_BYTES:
            raise _too_large(function, len(packed))
    return packed


def check_function(function: Any) -> None:
    """Raise unless *function* can be the body of a remote call.

    Raises:
        TypeError: It cannot.
    """
    if isinstance(function, type) or not isinstance(_inner(function), (types.FunctionType, types.BuiltinFunctionType)):
        raise TypeError(
            f"gpu_remote takes a function, not {_kind(function)}; write `@gpu_remote` above a `def`, and "
            "options by name, as in `@gpu_remote(num_gpus=0.5)`"
        )


def name_of(function: Callable[..., Any]) -> str:
    """Return a function's qualified name; that of the inner function for a method or a partial."""
    return str(getattr(_inner(function), "__qualname__", "function"))


def _inner(function: Any) -> Any:
    while isinstance(function, (functools.partial, types.MethodType)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    return function


# -- pickling ---------------------------------------------------------------------------------------


class _DataFoundError(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__(_kind(value))
        self.kind = _kind(value)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no annotations
    def persistent_id(self, value: Any) -> None:
        """Look at *value*, which is about to be written; always says that it has no other name."""
        if type(value) not in _PLAIN and _is_data(value):
            raise _DataFoundError(value)


def _is_data(value: Any) -> bool:
    if isinstance(value, type):
        return False
    if isinstance(value, (array.array, memoryview)):
        return True
    # The type is asked: an object that answers to every name is not a table.
    if not any(hasattr(type(value), protocol) for protocol in _DATA_PROTOCOLS):
        return False
    # One number is a parameter, not data: NumPy's scalars have all that its arrays have.
    return getattr(value, "shape", None) != ()


def _dumps(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(value)
    return file.getvalue()


class _by_value:  # noqa: N801 - reads as what it does: `with _by_value():`
    """Inside, functions and classes of the user's own modules are sent by value: no node could import them."""

    def __enter__(self) -> None:
        _registering.acquire()
        self._modules = [module for module in list(sys.modules.values()) if _travels(module)]
        for module in self._modules:
            cloudpickle.register_pickle_by_value(module)

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            cloudpickle.unregister_pickle_by_value(module)
        _registering.release()


def _travels(module: Any) -> bool:
    path = getattr(module, "__file__", None)
    name = getattr(module, "__name__", None)
    # A module under another name than its own cannot be registered, and is no module that a function names.
    return isinstance(path, str) and sys.modules.get(str(name)) is module and name != "__main__" and _own(path)


def _installed() -> tuple[str, ...]:
    """Return the directories of what a node has too: Python, its packages, and ray_gpu itself."""
    packages = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [os.path.join(packages, name) for name in ("ray_gpu", "zones")]
    return tuple(dict.fromkeys(place + os.sep for path in places for place in (path, os.path.realpath(path))))


_INSTALLED = _installed()


@functools.lru_cache(maxsize=16384)
def _own(path: str) -> bool:
    return not (path.startswith(_INSTALLED) or os.path.realpath(path).startswith(_INSTALLED))


# -- what is the cause ------------------------------------------------------------------------------


def _holds_data(function: Callable[..., Any], found: _DataFoundError) -> FunctionRefusedError:
    place = _find(function, lambda value: isinstance(_error(value), _DataFoundError))
    return FunctionRefusedError(
        f"{name_of(function)} captures {place or 'a value'}, which is or holds a {found.kind}. Data does not travel "
        "inside a function, where no catalog classifies it: pass it as an argument, or as the call's data",
        variable=_variable(place),
    )


def _cannot_pickle(function: Callable[..., Any], cause: Exception) -> FunctionRefusedError:
    place = _find(function, lambda value: _error(value) is not None)
    what = f"because the variable {place} cannot be pickled" if place else "because it cannot be pickled"
    return FunctionRefusedError(
        f"{name_of(function)} cannot be sent, {what}: {cause}. Create what it needs inside the function, "
        "or pass it as an argument",
        variable=_variable(place),
    )


def _too_large(function: Callable[..., Any], size: int) -> FunctionRefusedError:
    sizes = {name: len(_dumps(value)) for name, value in _children(_inner(function))}
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    blame = f"; the largest part is {largest} with {sizes[largest]} bytes" if largest else ""
    return FunctionRefusedError(
        f"{name_of(function)} with what it captures has {size} bytes, over the cap of {MAX_FUNCTION_BYTES}{blame}. "
        "Pass large values as arguments, or read them from a data set",
        variable=_variable(largest),
    )


def _variable(place: str | None) -> str | None:
    """Return the variable in a place such as ``model.coef_`` or ``table (in prepare)``."""
    return place.partition(" (in ")[0].partition(".")[0].partition("[")[0] if place else None


def _error(value: Any) -> Exception | None:
    try:
        _dumps(value)
    except Exception as error:  # noqa: BLE001 - objects raise what they like when they are pickled
        return error
    return None


def _find(value: Any, guilty: Callable[[Any], bool], depth: int = 0, seen: frozenset[int] = frozenset()) -> str | None:
    """Return where below *value* the cause is, such as ``model.coef_`` or ``default of alpha``."""
    for name, child in _children(value):
        if depth >= _MAX_DEPTH or id(child) in seen or not guilty(child):
            continue
        below = _find(child, guilty, depth + 1, seen | {id(value)})
        if below is None:
            return name
        if " (in " in below:
            return below
        return f"{below} (in {name})" if isinstance(child, types.FunctionType) else _join(name, below)
    return None


def _join(name: str, below: str) -> str:
    return f"{name}{below}" if below.startswith(("[", ".")) else f"{name}.{below}"


def _children(value: Any) -> Iterator[tuple[str, Any]]:
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
    elif type(value) not in _PLAIN or isinstance(value, types.ModuleType):
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
    for name in _global_names(function.__code__):
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
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_global_names(constant))
    return tuple(sorted(names))


# -- whether it changed -----------------------------------------------------------------------------


def _reached(function: Any) -> list[Any]:
    """Return what goes along with a function: what it names now, and what functions and modules of that name."""
    found: list[Any] = []
    seen, waiting = {id(function)}, [function]
    while waiting:
        value = waiting.pop()
        if isinstance(value, types.FunctionType):
            # Tools that reload code give a function that exists another body.
            found.append(value.__code__)
        for _, child in _children(value):
            found.append(child)
            if isinstance(child, _LOOKED_INTO) and id(child) not in seen and not _by_reference(child):
                seen.add(id(child))
                waiting.append(child)
    return found


def _by_reference(value: Any) -> bool:
    """Tell whether only the name of a function, class or module is sent: a node has the same under that name."""
    is_module = isinstance(value, types.ModuleType)
    name = value.__name__ if is_module else value.__module__
    module = sys.modules.get(name or "")
    if module is None or name == "__main__" or _travels(module):
        return False
    try:
        return (module if is_module else operator.attrgetter(value.__qualname__)(module)) is value
    except AttributeError:
        return False


def _unchanged(before: list[Any], now: list[Any]) -> bool:
    """Tell whether all are the same objects, of kinds that cannot change inside or are looked into."""
    return len(before) == len(now) and all(
        old is new and (type(new) in _UNCHANGING or isinstance(new, _LOOKED_INTO) or _stays(new))
        for old, new in zip(before, now, strict=True)
    )


def _stays(value: Any) -> bool:
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, types.ModuleType)
    return isinstance(value, type) and _by_reference(value)


def _kind(value: Any) -> str:
    module = type(value).__module__.partition(".")[0]
    return type(value).__name__ if module == "builtins" else f"{module} {type(value).__name__}"
