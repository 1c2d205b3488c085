"""A lock file of a small environment: what every sandbox needs, and one package that this one's Python has not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ray_gpu.environment_store import NEEDED

ROOT = Path(__file__).parents[1]
#: Not among this project's own dependencies.
EXTRA = "toolz"
_EXTRA_LINE = "toolz==1.0.0 --hash=sha256:292c8f1c4e7516bf9086f8850935c799a874039c8bcf959d47b600e4c44a6236\n"


def lock(path: Path, names: Iterable[str] = NEEDED) -> Path:
    """Write the lock file, of other packages if need be."""
    locked = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^([a-z0-9-]+)(==.*?)(?=^\S|\Z)", locked, re.MULTILINE | re.DOTALL))
    path.write_text("".join(name + parts[name] for name in names) + _EXTRA_LINE, encoding="utf-8")
    return path
