"""The extra ``gpu`` installs from its lock, and imports on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROBE = "import cupy, pynvml; print(cupy.__file__); print(cupy.cuda.is_available())"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what constraints-gpu.txt names; about 130 MB to download the first time, then from pip's cache."""
    target = tmp_path_factory.mktemp("gpu")
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--root-user-action=ignore", "--disable-pip-version-check"]
    lock = ["--no-deps", "--require-hashes", "--requirement", str(ROOT / "constraints-gpu.txt")]

    done = subprocess.run([*pip, *lock, "--target", str(target)], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.timeout(600)
def test_imports_without_driver(packages: Path) -> None:
    """CuPy and the driver's Python interface import, and CuPy says whether there is a GPU, without a driver."""
    # -I keeps the checkout and the environment out: what imports is what the lock installed.
    probe = f"import sys; sys.path.insert(0, {str(packages)!r}); {PROBE}"

    done = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    where, available = done.stdout.split()
    assert where.startswith(str(packages))
    assert available in ("True", "False")
