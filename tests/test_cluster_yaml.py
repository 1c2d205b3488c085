"""cluster.yaml is what Ray's launcher accepts, and starts nothing but our own nodes."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_gpu import hosts_file
from ray_gpu.cli.node import start_node

ROOT = Path(__file__).parents[1]
COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture
def config() -> dict[str, Any]:
    """The file as it is."""
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
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


def test_every_host_is_started(config: dict[str, Any]) -> None:
    """The autoscaler starts every GPU host, whatever it has to do, and never gives one back for being idle."""
    prepared = prepare_config(copy.deepcopy(config))
    (kind,) = prepared["available_node_types"].values()

    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("commands", COMMANDS)
def test_commands(config: dict[str, Any], commands: str) -> None:
    """Every host runs our own commands alone, with options that they have: a plain `ray start` has no cage, no TLS."""
    lines = [shlex.split(line) for line in config[commands]]

    assert [line[:3] for line in lines] == [["ray-gpu", "node", "stop"], ["ray-gpu", "node", "start"]]
    options = {item for item in lines[1][3:] if item.startswith("--")}
    assert options == ({"--autoscaling-config", "--autoscaling-key"} if "head" in commands else set())
    assert options <= {name for option in start_node.params for name in option.opts}


def test_names_no_zone(config: dict[str, Any]) -> None:
    """No host of a zone is launched: Ray copies the key to the head, and checks no host's key."""
    zones = {host.addresses[0] for host in hosts_file.read(ROOT / "examples/hosts.yaml") if host.role.is_zone()}
    provider = config["provider"]

    assert zones
    assert not zones & {provider["head_ip"], *provider["worker_ips"]}
