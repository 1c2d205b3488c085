"""Turns a user's function into bytes, after looking at everything it takes along. Runs in the notebook.

Closures, globals, defaults, attributes of captured objects and bodies of captured classes leave the zone with
the function. The pickler shows each object before it is written: tables and arrays are refused, whatever they hang
on, and the error names the variable. The gateway enforces the size cap again, on bytes that it never unpickles.
"""

from __future__ import annotations

import array
import functools
import io
import sys
import threading
import types
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_gpu import own_modules, proposal
from ray_gpu.captured import PLAIN, by_reference, children, reached, travels, unchanged
from ray_gpu.request import MAX_FUNCTION_BYTES
from zones.errors import FunctionRefusedError
from zones.model import canonical

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
#: Types of data without such attributes. An expression may hold the values that it looks for.
_HOLDERS = (array.array, memoryview, pa.Buffer, pc.Expression)
#: First byte of a function with the source of modules before it. No pickle begins with it.
MODULES = b"M"
#: Types of what a pickle may name.
_NAMED = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
#: ``cloudpickle`` keeps the modules that it sends by value in one list for the whole process.
_registering = threading.Lock()


class PackedFunction:
    """A function with its bytes, which are made anew when what the function captures has changed.

    Args:
        function: The function.
        modules: Modules of the user's own that are sent with it, see :mod:`ray_gpu.own_modules`.
        body: Function of the user's that runs in the end, if it is another.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        modules: Sequence[types.ModuleType] = (),
        body: Callable[..., Any] | None = None,
    ) -> None:
        self._function, self._modules, self._body = function, modules, body
        self._captured: list[Any] | None = None
        self._sources: dict[str, tuple[bool, str]] = {}
        self._made: Packed | None = None
        self._stable: dict[str, bytes] | None = None

    def __bytes__(self) -> bytes:
        return self.packed().sent

    def packed(self) -> Packed:
        """Return the function's bytes, and which modules a node must have for it.

        Raises:
            FunctionRefusedError: See :func:`pack`.
        """
        self._look()
        if self._modules:
            # As they are now: what was written into a file since is wanted.
            found = own_modules.sources(self._modules)
            if found != self._sources:
                self._sources, self._made = found, None
        if self._made is None:
            self._made = pack_with(self._function, self._sources, self._body)
        return self._made

    def approved(self, digests: Collection[str]) -> bytes | None:
        """Return what is sent of the function if that is approved: if one of *digests* is its SHA-256."""
        if self._modules:
            # Nobody has read these.
            return None
        self._look()
        if self._stable is None:
            self._stable = {proposal.digest(form): proposal.packed(form) for form in proposal.proposals(self._function)}
        return next((sent for digest, sent in self._stable.items() if digest in digests), None)

    def _look(self) -> None:
        """Forget what was made of the function if what it captures has changed."""
        captured = reached(self._function)
        if self._captured is None or not unchanged(self._captured, captured):
            self._made, self._stable, self._captured = None, None, captured


class Packed(NamedTuple):
    """What is sent of a function."""

    sent: bytes
    #: Modules that a node must have, each with its version here; ``""`` where that is not known.
    imports: list[tuple[str, str]]


def pack(function: Callable[..., Any]) -> bytes:
    """Return the pickled function, with everything it needs that is not an installed module; see :func:`pack_with`."""
    return pack_with(function, {}).sent


def pack_with(
    function: Callable[..., Any], sources: Mapping[str, tuple[bool, str]], body: Callable[..., Any] | None = None
) -> Packed:
    """Return the pickled function, with everything it needs that is not an installed module.

    Args:
        function: The function.
        sources: Modules that go along as source, so that they can be imported; others that it names go by value.
        body: Whose imports count, if not the function's own.

    Raises:
        FunctionRefusedError: It captures a table or an array, captures something that cannot be pickled,
            or is larger than ``MAX_FUNCTION_BYTES``; ``variable`` names the cause.
        TypeError: *function* is no Python function, method or ``functools.partial`` of one.
    """
    check_function(function)
    named: set[str] = set()
    sent = {own_modules.top(name) for name in sources}
    with _by_value(sent):
        try:
            packed = _dumps(function, named)
        except _DataFoundError as found:
            raise _holds_data(function, found) from None
        except Exception as error:  # noqa: BLE001 - objects raise what they like when they are pickled
            raise _cannot_pickle(function, error) from None
        if sources:
            texts = zlib.compress(canonical(sources))
            packed = b"".join((MODULES, len(texts).to_bytes(8, "big"), texts, packed))
        if len(packed) > MAX_FUNCTION_BYTES:
            raise _too_large(function, len(packed), sources)
    texts_of = {name: text for name, (_, text) in sources.items() if name in sent}
    return Packed(packed, own_modules.imports(_inner(function) if body is None else body, named, texts_of))


def check_function(function: Any) -> None:
    """Raise unless *function* can be the body of a remote call.

    Raises:
        TypeError: It cannot.
    """
    if isinstance(function, type) or not isinstance(_inner(function), (types.FunctionType, types.BuiltinFunctionType)):
        raise TypeError(
            f"gpu_remote takes a function or a class of your own, not {_kind(function)}; write `@gpu_remote` above it, "
            "and options by name, as in `@gpu_remote(num_gpus=0.5)`"
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
    def __init__(self, file: io.BytesIO, named: set[str]) -> None:
        super().__init__(file)
        #: Modules that the pickle names.
        self._named = named

    def persistent_id(self, value: Any) -> None:
        """Look at *value*, which is about to be written; always says that it has no other name."""
        if type(value) not in PLAIN and _is_data(value):
            raise _DataFoundError(value)
        if isinstance(value, _NAMED) and by_reference(value):
            module = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
            self._named.add(own_modules.top(str(module)))

    def reducer_override(self, value: Any) -> Any:
        """Write what *value* is on a node, where it says so: a remote function is the function itself there."""
        on_node = getattr(type(value), "__on_node__", None)
        return super().reducer_override(value) if on_node is None else on_node(value)


def _is_data(value: Any) -> bool:
    if isinstance(value, type):
        return False
    if isinstance(value, io.IOBase):
        # A file is pickled with its content. These two are sent by name.
        return value not in (sys.stdout, sys.stderr)
    if isinstance(value, _HOLDERS):
        return True
    if isinstance(value, pa.Scalar):
        return not pa.types.is_primitive(value.type)
    # The type is asked: an object that answers to every name is not a table.
    if not any(hasattr(type(value), protocol) for protocol in _DATA_PROTOCOLS):
        return False
    return not _is_one_number(value)


def _is_one_number(value: Any) -> bool:
    """Tell whether *value* is a parameter, not data: NumPy's scalars have all that its arrays have."""
    dtype = getattr(value, "dtype", None)
    # A record is a row, and an object may be anything. Tensors of other libraries take along what they are a part of.
    return getattr(value, "shape", None) == () and isinstance(dtype, np.dtype) and dtype.kind not in "OV"


def _dumps(value: Any, named: set[str] | None = None) -> bytes:
    file = io.BytesIO()
    _Pickler(file, set() if named is None else named).dump(value)
    return file.getvalue()


class _by_value:  # noqa: N801 - reads as what it does: `with _by_value():`
    """Inside, functions and classes of the user's own modules are sent by value: no node could import them.

    Those of *sent*, top-level modules whose source goes along, are sent by name.
    """

    def __init__(self, sent: Collection[str]) -> None:
        self._sent = sent

    def __enter__(self) -> None:
        _registering.acquire()
        found = [module for module in list(sys.modules.values()) if travels(module)]
        self._modules = [module for module in found if own_modules.top(module.__name__) not in self._sent]
        for module in self._modules:
            cloudpickle.register_pickle_by_value(module)

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            cloudpickle.unregister_pickle_by_value(module)
        _registering.release()


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


def _too_large(function: Callable[..., Any], size: int, sources: Mapping[str, Any]) -> FunctionRefusedError:
    sizes = {name: len(_dumps(value)) for name, value in children(_inner(function))}
    sizes |= {name: len(zlib.compress(canonical(source))) for name, source in sources.items()}
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
    for name, child in children(value):
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


def _kind(value: Any) -> str:
    if isinstance(value, io.IOBase):
        return "file object"
    module = type(value).__module__.partition(".")[0]
    return type(value).__name__ if module == "builtins" else f"{module} {type(value).__name__}"
