"""What a sandbox can import, as one document with one digest: it proves itself, whoever hands it on. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from zones.model import digest

#: How an environment is named.
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A Python with its packages: a node's own, or one that its operator published there."""

    #: ``3.11.7``: this very Python. ``3.11``: any of that minor version, which is what published packages are for.
    python: str
    #: As in ``linux-x86_64``.
    platform: str
    #: Distribution to version; names normalised as on package indexes.
    packages: Mapping[str, str]
    #: Top-level module to the distribution that it is of.
    modules: Mapping[str, str]
    #: SHA-256 over every file of a published one, hexadecimal; ``""`` for a node's own.
    files: str = ""

    def document(self) -> dict[str, Any]:
        """Return what the digest is over."""
        return {name: dict(sorted(value.items())) if isinstance(value, Mapping) else value
                for name, value in asdict(self).items()}  # fmt: skip

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical document, 64 hexadecimal digits."""
        return digest(self.document())

    @classmethod
    def parse(cls, document: Any) -> Self:
        """Return the environment of a document.

        Raises:
            ValueError: It is none.
        """
        texts, tables = ("python", "platform", "files"), ("packages", "modules")
        if not isinstance(document, dict) or set(document) != {*texts, *tables}:
            raise ValueError("an environment's document has python, platform, packages, modules and files")
        if not all(isinstance(document[name], str) for name in texts) or not all(
            isinstance(document[name], dict)
            and all(type(text) is str for pair in document[name].items() for text in pair)
            for name in tables
        ):
            raise ValueError("an environment's document is of text alone")
        return cls(**document)

    def versions(self) -> dict[str, str]:
        """Return the version of Python, and of each top-level module the version of its package."""
        return {"python": self.python, **{name: self.packages.get(of, "") for name, of in self.modules.items()}}


def minor(python: str) -> str:
    """Return ``3.11`` of ``3.11.7``: functions travel as bytecode, which is one minor version's."""
    return ".".join(python.split(".")[:2])
