"""Type checkers know what decorated functions take and return; and say so when they are called otherwise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TYPED = Path(__file__).with_name("typed.py")
WRONG = """
from ray_gpu import gpu_remote

@gpu_remote
def add(a: int, b: int) -> float:
    return a + b

add("1", 2)
add.remote(1, "2")
x: str = add.remote(1, 2).result()
"""
CHECKERS = {
    "mypy": ["mypy", "--no-incremental", "--cache-dir=/dev/null"],
    "pyright": ["basedpyright", "--level", "error"],
}


def check(checker: str, file: Path) -> tuple[int, str]:
    """Run a type checker on one file; return its exit status and what it says."""
    command = [sys.executable, "-m", *CHECKERS[checker], str(file)]
    done = subprocess.run(command, cwd=TYPED.parents[1], capture_output=True, text=True, timeout=150, check=False)
    return done.returncode, done.stdout + done.stderr


def test_types_are_kept() -> None:
    """Parameters and results of functions, classes, calls and streams are what they were; to mypy, `make lint` says."""
    status, said = check("pyright", TYPED)

    assert status == 0, said


@pytest.mark.parametrize("checker", CHECKERS)
def test_wrong_calls_are_found(checker: str, tmp_path: Path) -> None:
    """Each wrong argument, and a result taken for something else, is an error in its line."""
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    status, said = check(checker, file)

    assert status == 1
    assert [line for line in (8, 9, 10) if f"wrong.py:{line}:" not in said] == [], said
