"""P3: people of the zone's host reach its data through the gateway alone, which runs under a uid of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ray_gpu.ports import GATEWAY_UID
from ray_gpu.state import Layout

PERSON_UID = 61990
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives the gateway a uid, and becomes a person")


def as_uid(uid: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as somebody without privileges."""
    words = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def zone_files(cluster: Any) -> list[Path]:
    """Return a data set's file and the ledger."""
    return [next(Layout(cluster.state).data(cluster.zone).glob("*.arrow")), cluster.ledger]


def test_person_reads_no_data(cluster: Any) -> None:
    """A person of the host opens neither a data set's file nor the ledger."""
    for path in zone_files(cluster):
        done = as_uid(PERSON_UID, "dd", f"if={path}", "of=/dev/null", "count=1")

        assert done.returncode != 0
        assert "Permission denied" in done.stderr


def test_gateway_reads_them(cluster: Any) -> None:
    """Control: the gateway's uid opens both with the same command."""
    for path in zone_files(cluster):
        assert as_uid(GATEWAY_UID, "dd", f"if={path}", "of=/dev/null", "count=1").returncode == 0
