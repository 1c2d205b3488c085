"""Which machine and which versions a run was made on. Reads /proc and installed packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

_PACKAGES = ("ray", "numpy", "pyarrow", "cryptography", "msgpack")


def describe() -> dict[str, str]:
    """Return name and value of what the numbers depend on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{_model()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{memory / (1 << 30):.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "versions": f"Python {platform.python_version()}, {versions}",
        "load before the run": f"{os.getloadavg()[0]:.1f} (1 minute average; 0 on an idle machine)",
        "user": "root: strict sandboxes" if os.geteuid() == 0 else "not root",
    }


def _model() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.machine()
