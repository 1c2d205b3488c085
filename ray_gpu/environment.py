"""What a sandbox on this host can import: Python and the installed distributions, and one digest of it.

Zones name environments by digest (``environments`` in zone.yaml); offers, hellos, receipts and the ledger carry it.
Metadata of distributions is read; nothing is imported.
"""

from __future__ import annotations

import platform
import re
import site
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from zones import model


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A Python with its packages."""

    #: Version of Python, such as ``3.11.7``.
    python: str
    #: Distribution to version; names normalised as on package indexes.
    packages: Mapping[str, str]

    def document(self) -> dict[str, Any]:
        """Return what the digest is over."""
        return {"python": self.python, "packages": dict(sorted(self.packages.items()))}

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical document, 64 hexadecimal digits."""
        return model.digest(self.document())


def versions() -> dict[str, str]:
    """Return the versions that decide whether a notebook and a node understand each other."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in ("numpy", "pyarrow")}}


def minor(python: str) -> str:
    """Return ``3.11`` of ``3.11.7``: functions travel as bytecode, which is one minor version's."""
    return ".".join(python.split(".")[:2])


def current() -> Environment:
    """Return the environment of this Python. Its sandboxes have the same.

    Only this Python's own directories count. What a process adds to its path, as setuptools does where it is imported,
    its sandboxes do not have.
    """
    found: dict[str, str] = {}
    for distribution in metadata.distributions(path=site.getsitepackages()):
        # The first of a name is the one that an import finds.
        found.setdefault(re.sub(r"[-_.]+", "-", distribution.name).lower(), distribution.version)
    return Environment(python=platform.python_version(), packages=found)
