"""A lock file of a small environment: what every sandbox needs, and one package that this one's Python has not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray_gpu.environment_store import NEEDED, Store
from ray_gpu.state import Layout
from zones.environments import Environment

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


def publish(built: Path, cluster: Any) -> Environment:
    """Publish what was built on a cluster's nodes, as an operator copies it to further ones; return what it is."""
    shutil.copytree(built, Layout(cluster.state).environments, dirs_exist_ok=True)
    store = Store(built)
    return store.environment(*store.digests())
