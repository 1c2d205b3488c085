"""Makes a function out of what was sent of it. Runs in the sandbox alone; the forms are ``ray_gpu.proposal``'s."""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import operator
from collections.abc import Callable
from importlib import metadata
from typing import Any

#: First byte of a function in a form that an officer can read. All others are pickled.
_STABLE = b"S"
#: What stands before a value that is sent as a function is; its length keeps arrays aligned.
VALUE = b"V" + bytes(63)


def load(sent: bytes, unpickle: Callable[[bytes], Any]) -> Callable[..., Any]:
    """Return the function that was sent.

    Raises:
        ImportError: It is a distribution's, and not of the version that is installed here.
        Exception: Whatever its own code raises while it is loaded.
    """
    if sent[:1] != _STABLE:
        return unpickle(sent)  # type: ignore[no-any-return]  # the notebook pickled a function
    document = json.loads(sent[1:])
    return _named(document) if document["form"] == "named" else _compiled(document)


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
