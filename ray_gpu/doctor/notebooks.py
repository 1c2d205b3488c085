"""The check of running Jupyter kernels: do they publish what notebooks show on TCP ports? :func:`find` reads /proc."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ray_gpu.doctor.finding import Files, Finding, holds, missing, unclear

#: ``"unknown"``: the connection file may not be read.
Transport = Literal["tcp", "ipc", "unknown"]

#: Modules that ``python -m`` runs, programs, and what R evaluates.
_MODULES, _PROGRAMS, _EXPRESSION = ("ipykernel_launcher", "ipykernel"), ("xpython", "xr"), "IRkernel::main()"
_SCRIPT = "/ipykernel_launcher.py"
_NAMED = re.compile(r"--(?:\w+\.)?transport=[\"']?(tcp|ipc)")
_CONNECTION = re.compile(r"(?:--f=|--IPKernelApp\.connection_file=)?(\S+\.json)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A running kernel."""

    pid: int
    transport: Transport


def kernels(found: Sequence[Kernel]) -> Finding:
    """Check that no kernel that runs uses TCP."""
    control, about = "kernel-tcp", "Jupyter kernels"
    if plain := [str(kernel.pid) for kernel in found if kernel.transport == "tcp"]:
        return missing(control, about, f"transport: tcp, process {', '.join(plain)}")
    if hidden := [str(kernel.pid) for kernel in found if kernel.transport == "unknown"]:
        return unclear(control, about, f"the connection file of process {', '.join(hidden)} cannot be read")
    return holds(control, about, f"{len(found)} running, by Unix sockets" if found else "none runs")


def find(files: Files) -> list[Kernel]:
    """Return the kernels of this host that this user may see."""
    return list(_find(files))


def _find(files: Files) -> Iterator[Kernel]:
    for directory in sorted(files.at("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            words = (directory / "cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
            if is_kernel(words):
                yield Kernel(pid=int(directory.name), transport=_transport(files, words))


def is_kernel(words: Sequence[str]) -> bool:
    """Whether a command line is a kernel's."""
    pairs = itertools.pairwise(words)
    runs = any(
        (option == "-m" and word in _MODULES) or (option == "-e" and word == _EXPRESSION) for option, word in pairs
    )
    return runs or os.path.basename(words[0]) in _PROGRAMS or any(word.endswith(_SCRIPT) for word in words[1:2])


def _transport(files: Files, words: Sequence[str]) -> Transport:
    """Return what a kernel's command line says or, as with Jupyter, its connection file."""
    for word in words:
        if named := _NAMED.match(word):
            return "ipc" if named[1] == "ipc" else "tcp"
    paths = [match[1] for word in words if (match := _CONNECTION.fullmatch(word))]
    if not paths:
        return "tcp"  # what a kernel uses that was told nothing
    text = files.text(paths[-1])
    if text is None:
        return "unknown"
    try:
        return "ipc" if json.loads(text).get("transport") == "ipc" else "tcp"
    except (ValueError, AttributeError):
        return "unknown"
