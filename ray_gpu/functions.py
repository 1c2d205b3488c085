"""Turns a user's function into bytes, after looking at what it captures. Runs in the notebook.

Closures, globals and defaults leave the zone with the function, so they are looked at one by one: tables
and arrays are refused by name, and so is whatever cannot be pickled. The gateway enforces the size cap
again, on bytes that it never unpickles.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle

from ray_gpu.request import MAX_FUNCTION_BYTES
from zones.errors import FunctionRefusedError

_MAX_DEPTH = 4
#: Attributes that tables and arrays have, whatever library they come from.
_DATA_PROTOCOLS = ("__arrow_c_stream__", "__arrow_c_array__", "__array_interface__", "__cuda_array_interface__",
                   "__dataframe__", "__dlpack__")


def pack(function: Callable[..., Any]) -> bytes:
    """Return the pickled function, with everything it needs that is not an installed module.

    Raises:
        FunctionRefusedError: It captures a table or an array, captures something that cannot be pickled,
            or is larger than ``MAX_FUNCTION_BYTES``; ``variable`` names the cause.
        TypeError: *function* is no Python function.
    """
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"@gpu_remote takes a function, not {type(function).__name__}")
    captured = dict(_captured(function))
    for name, value in captured.items():
        _refuse_data(name, value)
    try:
        packed = _dumps(function)
    except Exception as error:
        raise _cannot_pickle(function, captured, error) from None
    if len(packed) > MAX_FUNCTION_BYTES:
        raise _too_large(function, captured, len(packed))
    return packed


def _captured(function: types.FunctionType, depth: int = 0, seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield ``(how to name it, value)`` for closure variables, globals and defaults, also of functions among them."""
    seen = set() if seen is None else seen
    if id(function) in seen or depth > _MAX_DEPTH:
        return
    seen.add(id(function))
    for name, value in _variables(function):
        yield name, value
        if isinstance(value, types.FunctionType) and _travels(value.__module__):
            yield from _captured(value, depth + 1, seen)


def _variables(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):
            yield name, cell.cell_contents
    for name in sorted(_global_names(code)):
        if name in function.__globals__ and not hasattr(builtins, name):
            yield name, function.__globals__[name]
    positional = [parameter for parameter in inspect.signature(function).parameters.values()
                  if parameter.default is not inspect.Parameter.empty]
    for parameter in positional:
        yield f"default of {parameter.name}", parameter.default


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _refuse_data(name: str, value: Any, depth: int = 0) -> None:
    if isinstance(value, (type, types.ModuleType, types.FunctionType)) or depth > _MAX_DEPTH:
        return
    if any(hasattr(value, protocol) for protocol in _DATA_PROTOCOLS) and getattr(value, "shape", None) != ():
        kind = f"{type(value).__module__.partition('.')[0]} {type(value).__name__}"
        raise FunctionRefusedError(
            f"the function captures {name}, a {kind}. Data does not travel inside a function, where no catalog "
            f"classifies it: pass it as an argument, or as the call's data", variable=name)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    for item in items:
        _refuse_data(name, item, depth + 1)


def _travels(module: str | None) -> bool:
    """Tell whether a module's functions are sent by value: it is not installed where the sandbox could import it."""
    loaded = sys.modules.get(module or "")
    path = getattr(loaded, "__file__", None)
    if loaded is None or path is None:
        return False
    installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    own = [Path(__file__).resolve().parent]
    return not any(Path(path).resolve().is_relative_to(place) for place in [*installed, *own])


def _dumps(function: types.FunctionType) -> bytes:
    """Pickle *function*, sending functions and classes of its own module by value."""
    module = sys.modules.get(function.__module__)
    if module is None or module.__name__ == "__main__" or not _travels(module.__name__):
        return bytes(cloudpickle.dumps(function))
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(function))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _cannot_pickle(function: types.FunctionType, captured: dict[str, Any], cause: Exception) -> FunctionRefusedError:
    for name, value in captured.items():
        try:
            cloudpickle.dumps(value)
        except Exception as error:
            return FunctionRefusedError(
                f"{function.__qualname__} cannot be sent, because the variable {name!r} ({type(value).__name__}) cannot "
                f"be pickled: {error}. Create it inside the function", variable=name)
    return FunctionRefusedError(f"{function.__qualname__} cannot be pickled ({cause}); define it at the top level and "
                                "create what it needs inside it", variable=None)


def _too_large(function: types.FunctionType, captured: dict[str, Any], size: int) -> FunctionRefusedError:
    sizes = {}
    for name, value in captured.items():
        with contextlib.suppress(Exception):
            sizes[name] = len(cloudpickle.dumps(value))
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    blame = f"; the largest part is {largest!r} with {sizes[largest]} bytes" if largest else ""
    return FunctionRefusedError(
        f"{function.__qualname__} with what it captures has {size} bytes, over the cap of {MAX_FUNCTION_BYTES}{blame}. "
        "Pass large values as arguments, or read them from a data set", variable=largest)
