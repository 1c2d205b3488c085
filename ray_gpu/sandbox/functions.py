"""Makes a function out of what was sent of it. Runs in the sandbox alone; the forms are ``ray_gpu.proposal``'s.

Modules of the user's own that were sent along are imported from memory.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.abc
import importlib.machinery
import json
import linecache
import operator
import sys
import types
import zlib
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

#: First byte of a function in a form that an officer can read. All others are pickled.
_STABLE = b"S"
#: First byte of a function with the source of modules before it, ``ray_gpu.functions.MODULES``.
_MODULES = b"M"
#: What stands before a value that is sent as a function is; its length keeps arrays aligned.
VALUE = b"V" + bytes(63)


def load(sent: bytes, unpickle: Callable[[bytes], Any]) -> Callable[..., Any]:
    """Return the function that was sent.

    Raises:
        ImportError: It is a distribution's, and not of the version that is installed here.
        Exception: Whatever its own code raises while it is loaded.
    """
    if sent[:1] == _MODULES:
        end = 9 + int.from_bytes(sent[1:9], "big")
        _sent.take(json.loads(zlib.decompress(sent[9:end])))
        sent = sent[end:]
    if sent[:1] != _STABLE:
        return unpickle(sent)  # type: ignore[no-any-return]  # the notebook pickled a function
    document = json.loads(sent[1:])
    return _named(document) if document["form"] == "named" else _compiled(document)


class _SentModules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads modules whose source was sent."""

    def __init__(self) -> None:
        #: Of each module, whether it is a package, and its source.
        self._sources: dict[str, tuple[bool, str]] = {}

    def take(self, sources: dict[str, tuple[bool, str]]) -> None:
        """Add *sources*. Modules that are there with another source are imported anew, with all of their packages."""
        tops = {name.partition(".")[0] for name in sources}
        known = {name: source for name, source in self._sources.items() if name.partition(".")[0] in tops}
        if known != sources:
            for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
                del sys.modules[name]
            self._sources = {name: source for name, source in self._sources.items() if name not in known} | sources
        if self not in sys.meta_path:
            # Before what is installed, as in the notebook.
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of a module that was sent."""
        if fullname not in self._sources:
            return None
        return importlib.machinery.ModuleSpec(
            fullname, self, origin=f"<{fullname}>", is_package=self._sources[fullname][0]
        )

    def get_source(self, fullname: str) -> str:
        """Return a module's source."""
        return self._sources[fullname][1]

    def get_code(self, fullname: str) -> types.CodeType:
        """Return a module's code, whose lines tracebacks then show."""
        source, file = self.get_source(fullname), f"<{fullname}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        return compile(source, file, "exec", dont_inherit=True)


_sent = _SentModules()


def decorator(function: Any = None, **options: Any) -> Any:
    """Return the function itself: what ``@gpu_remote`` is where an environment lacks what a notebook needs."""
    return (lambda wrapped: wrapped) if function is None else function


def _named(document: dict[str, Any]) -> Callable[..., Any]:
    name, wanted = document["distribution"], document["version"]
    try:
        here = metadata.version(name)
    except metadata.PackageNotFoundError:
        here = "none"
    if here != wanted:
        raise ImportError(f"this function is {name} {wanted}'s, and the GPU node has {here}; use the same version")
    return _attribute(document["module"], document["name"])  # type: ignore[no-any-return]  # what was approved


def _attribute(module: str, name: str) -> Any:
    found: Any = operator.attrgetter(name)(importlib.import_module(module))
    # What `@gpu_remote` made is, here, the function itself.
    return getattr(found, "__wrapped__", found) if type(found).__name__ == "RemoteFunction" else found


def _compiled(document: dict[str, Any]) -> Callable[..., Any]:
    name = document["name"]
    variables: dict[str, Any] = {"__builtins__": builtins, "__name__": "approved"}
    itself = []
    for variable, (how, *what) in document["bindings"].items():
        if how == "module":
            variables[variable] = importlib.import_module(what[0])
        elif how == "attribute":
            variables[variable] = _attribute(*what)
        elif how == "function":
            variables[variable] = _compiled(what[0])
        elif how == "literal":
            variables[variable] = ast.literal_eval(what[0])
        else:
            itself.append(variable)
    exec(compile(document["source"], f"<{name}>", "exec"), variables)
    function = variables[name]
    variables |= dict.fromkeys(itself, function)
    return function  # type: ignore[no-any-return]  # its source is a `def`
