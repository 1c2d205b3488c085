"""One test bed for all tests here: it takes half a second, and tests that break one build their own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import Testbed, lacking

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def can_build() -> None:
    """Skip, with the reason, where no test bed can be built. CI installs what it lacks; a person is told."""
    if lacking() and os.geteuid() == 0 and os.environ.get("CI"):
        subprocess.run([ROOT / "scripts/testbed.sh"], check=False, stdin=subprocess.DEVNULL, timeout=150)
    if reason := lacking():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def bed(can_build: None) -> Iterator[Testbed]:
    """A running bed. Whoever changes its rules loads them again."""
    with Testbed() as running:
        yield running
