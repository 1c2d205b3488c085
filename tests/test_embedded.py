"""What an embedded cluster refuses or says before it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ray_gpu import embedded
from ray_gpu.nodes import Cluster, free_base_port
from ray_gpu.raylet import NodeSpec
from zones.errors import ClusterError

ASK = "from ray_gpu.nodes import free_base_port; print(free_base_port())"


def test_long_state_path(tmp_path: Path) -> None:
    """A state directory whose sockets would not fit says so, and by how much, before anything starts."""
    plan = embedded.Plan(state=str(tmp_path / ("x" * 107)), policies=str(embedded.shipped_policies()))

    with pytest.raises(ClusterError, match=r"bytes too long.*shorter one with --state"):
        embedded.up(plan)

    assert list(tmp_path.iterdir()) == []


def test_port_range_has_one_owner() -> None:
    """Two processes that ask at the same time get different ranges, though neither has opened a port yet."""
    ours = free_base_port()

    other = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)

    assert int(other.stdout) != ours


def test_node_that_does_not_start_says_why(tmp_path: Path) -> None:
    """What Ray says when it refuses to start is in the error."""
    spec = NodeSpec(name="gpu-1", address="127.0.45.1", role="gpu", labels={"no/label/at": "all"}, socket_dir=tmp_path)

    with pytest.raises(ClusterError, match=r"ended while starting \(exit status \d+\), and said: Error"):
        Cluster.start(tmp_path / "state", [spec], base_port=free_base_port())
