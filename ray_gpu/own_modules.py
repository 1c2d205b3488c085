"""Modules that a function needs while it runs: which of them a node must have, and the source of the user's own.

Runs in the notebook.
"""

from __future__ import annotations

import dis
import importlib.util
import io
import sys
import tokenize
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_gpu.captured import by_reference, own, travels
from zones.errors import FunctionRefusedError

#: In every sandbox, whatever its environment.
_EVERYWHERE = frozenset({*sys.stdlib_module_names, "ray_gpu", "zones", "cloudpickle", "__main__"})
#: Directories of what is installed, for one user or by the distribution.
_PACKAGES = frozenset({"site-packages", "dist-packages"})
#: Instructions after which the rest of a function may not be reached.
_ENDS = frozenset({"RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE", "RETURN_GENERATOR"})
#: How deep calls of the user's own functions are followed.
_MAX_DEPTH = 8
#: What is no Python and has code all the same.
_COMPILED = frozenset({".so", ".pyd", ".pyx"})


def top(name: str) -> str:
    """Return the top-level module of a dotted name."""
    return name.partition(".")[0]


def imports(function: Any, named: Collection[str], sent: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the modules that a node must have, each with its version here; ``""`` where that is not known.

    Args:
        function: The function itself.
        named: Modules of what its pickle names.
        sent: Source of the top-level modules of the user's own that are sent with it.

    Raises:
        FunctionRefusedError: It imports a module of the user's own which is not sent with it.
    """
    inside = _imported(function)
    beside = {name for own_name, text in sent.items() for name in certain(compile(text, f"<{own_name}>", "exec"))}
    tops = {top(name) for name in sent}
    wanted = sorted({top(name) for name in (*named, *inside, *beside)} - _EVERYWHERE - tops - {""})
    for name in wanted:
        if name in inside | beside and _is_own(name):
            raise FunctionRefusedError(
                f"the function {'' if name in inside else 'or a module of it '}imports {name}, a module of your own, "
                f"which no node has: send it along with modules=[{name}], or import it outside of the function",
                variable=name,
            )
    return [(name, str(getattr(sys.modules.get(name), "__version__", ""))) for name in wanted]


def _imported(function: Any, depth: int = 0) -> set[str]:
    """Return the top-level modules that a function imports in any case, and those of the user's that it calls so."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType) or depth > _MAX_DEPTH:
        return set()
    variables = function.__globals__
    package = top(str(variables.get("__package__") or ""))
    found = {name or package for name in certain(code)}
    for name in certain(code, "LOAD_GLOBAL"):
        called = variables.get(name)
        if isinstance(called, types.FunctionType) and not by_reference(called):
            found |= _imported(called, depth + 1)
    return found


def certain(code: types.CodeType, what: str = "IMPORT_NAME") -> Iterator[str]:
    """Yield the top-level modules that running *code* imports in any case; ``""`` is its own package.

    What stands below ``try``, ``if`` or a loop may not be reached, and may fail without harm.

    Args:
        code: Of a function or a module.
        what: ``LOAD_GLOBAL``: yield the global names that it uses in any case instead.
    """
    instructions = dis.Bytecode(code)
    guarded = [range(entry.start, entry.end) for entry in instructions.exception_entries]  # type: ignore[attr-defined]  # not in typeshed
    landed, before = 0, [0, 0]
    for instruction in instructions:
        if instruction.opname in _ENDS:
            return
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            landed = max(landed, int(instruction.argval))
        free = instruction.offset >= landed and not any(instruction.offset in part for part in guarded)
        if instruction.opname == what and free:
            # Before an import are its level, how many dots it has, and what is taken from it.
            yield "" if before[0] and what == "IMPORT_NAME" else top(str(instruction.argval))
        before = [before[1], instruction.argval]


def _is_own(name: str) -> bool:
    """Tell whether a module is one that the user writes; what lies where packages are installed, a node may have."""
    module = sys.modules.get(name)
    if module is not None:
        return travels(module) and _written(str(module.__file__))
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    if spec is None or not spec.has_location or spec.origin is None:
        return False
    return _written(spec.origin)


def _written(path: str) -> bool:
    """Tell whether a file or directory is the user's own, and not where packages are installed."""
    return own(path) and not _PACKAGES & set(Path(path).parts)


# -- their source ------------------------------------------------------------------------------------


def sources(modules: Iterable[types.ModuleType]) -> dict[str, tuple[bool, str]]:
    """Return the source of modules and of all that their packages have, by name, and whether each is a package.

    Raises:
        FunctionRefusedError: One is not the user's own, or has parts that are no Python.
    """
    found: dict[str, tuple[bool, str]] = {}
    for name in sorted({top(module.__name__) for module in modules}):
        module = sys.modules.get(name)
        if module is None or name == "__main__":
            raise FunctionRefusedError(
                f"{name} is no module that can be sent; functions of the notebook itself go without modules=...",
                variable=name,
            )
        places = [Path(place) for place in getattr(module, "__path__", ())]
        file = Path(getattr(module, "__file__", None) or "")
        if not all(_written(str(place)) for place in places or [file]) or name in sys.stdlib_module_names:
            raise FunctionRefusedError(
                f"{name} is installed here, and no module of your own: nodes have it too, or get it by "
                "environment=...; leave it out of modules",
                variable=name,
            )
        for place in places:
            found |= dict(_package(name, place))
        if places:
            # A package need not have a file of its own.
            found.setdefault(name, (True, ""))
        else:
            found[name] = (False, _text(file))
    return found


def _package(name: str, place: Path) -> Iterator[tuple[str, tuple[bool, str]]]:
    for path in sorted(place.rglob("*")):
        parts = path.relative_to(place).with_suffix("").parts
        if "__pycache__" in parts:
            continue
        if path.suffix in _COMPILED:
            raise FunctionRefusedError(
                f"{name} has compiled code ({path.name}), which cannot be sent as source; have the nodes' operator "
                "build an environment with it (`ray-gpu env build`)",
                variable=name,
            )
        if not all(part.isidentifier() for part in parts):
            # Nothing that could be imported.
            continue
        if path.suffix == ".py":
            package = parts[-1] == "__init__"
            yield ".".join((name, *(parts[:-1] if package else parts))), (package, _text(path))
        elif path.is_dir():
            yield ".".join((name, *parts)), (True, "")


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise FunctionRefusedError(
            f"{path} cannot be sent: {error}; it must be Python's source", variable=None
        ) from None
