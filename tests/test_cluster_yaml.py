"""cluster.yaml is what Ray's launcher accepts, and closes what Ray leaves open."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
#: What must stand in every `ray start` line: each closes a way by which Ray writes down what passes it.
SWITCHES = (
    "RAY_USAGE_STATS_ENABLED=0",
    "RAY_enable_metrics_collection=0",
    "RAY_task_events_report_interval_ms=0",
    "RAY_LOG_TO_STDERR=1",
    "RAY_AUTH_MODE=token",
    "--include-log-monitor=false",
    "--object-spilling-directory=/dev/shm",
)


@pytest.fixture
def config() -> dict[str, Any]:
    """The file as it is."""
    text = (Path(__file__).parents[1] / "cluster.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def test_accepted(config: dict[str, Any]) -> None:
    """Ray's own check takes the file as its launcher completes it."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)

    assert prepared["max_workers"] == len(config["provider"]["worker_ips"])


def test_unknown_field_refused(config: dict[str, Any]) -> None:
    """The same check refuses a field that Ray does not know, so that it would notice a slip."""
    unknown = prepare_config(config | {"zone_nodes": ["clinic.example"]})

    with pytest.raises(Exception, match="zone_nodes"):
        validate_config(unknown)


@pytest.mark.parametrize("commands", COMMANDS)
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches(config: dict[str, Any], commands: str, switch: str) -> None:
    """Every node starts Ray with every switch that keeps it quiet."""
    (start,) = [line for line in config[commands] if "ray start" in line]

    assert switch in shlex.split(start)
