"""What a sandbox on this host can import: Python and the installed distributions.

Zones name environments by digest (``environments`` in zone.yaml); offers, hellos, receipts and the ledger carry it.
Metadata of distributions is read; nothing is imported.
"""

from __future__ import annotations

import platform
import re
import site
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from zones.environments import Environment

#: What data and functions travel by. Every environment has them; a notebook says its own when it attaches.
TRAVEL = ("numpy", "pyarrow")


def versions() -> dict[str, str]:
    """Return the versions that decide whether a notebook and a node understand each other."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in TRAVEL}}


def current() -> Environment:
    """Return the environment of this Python. Its sandboxes have the same, unless another is asked for.

    Only this Python's own directories count. What a process adds to its path, as setuptools does where it is imported,
    its sandboxes do not have.
    """
    return found(site.getsitepackages(), python=platform.python_version())


def found(directories: Iterable[str | Path], *, python: str) -> Environment:
    """Return the environment of a Python that imports from *directories*."""
    packages: dict[str, str] = {}
    modules: dict[str, str] = {}
    for distribution in metadata.distributions(path=list(map(str, directories))):
        name = normalised(distribution.name)
        # The first of a name is the one that an import finds.
        if packages.setdefault(name, distribution.version) == distribution.version:
            for module in _modules(distribution):
                modules.setdefault(module, name)
    return Environment(python=python, platform=sysconfig.get_platform(), packages=packages, modules=modules)


def normalised(name: str) -> str:
    """Return a distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _modules(distribution: metadata.Distribution) -> set[str]:
    """Return the top-level modules of a distribution."""
    listed = {path.parts[0].partition(".")[0] for path in distribution.files or () if _is_code(path)}
    # An editable one lists what finds its modules, and names them here.
    listed |= set((distribution.read_text("top_level.txt") or "").split())
    return {name for name in listed if name.isidentifier() and not name.startswith("__")}


def _is_code(path: metadata.PackagePath) -> bool:
    return path.suffix in (".py", ".so") and not path.parts[0].endswith((".dist-info", ".data"))
