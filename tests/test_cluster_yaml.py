"""cluster.yaml is what Ray's launcher accepts, and starts nothing but our own nodes."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_gpu import cluster_file, hosts_file
from ray_gpu.cli.main import cli
from ray_gpu.cli.node import start_node
from zones.errors import ConfigError

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


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("192.0.2.12]", "192.0.2.11]", "worker_ips:", "192.0.2.11 stands here twice: it is a GPU host already"),
        ("192.0.2.12]", "192.0.2.10]", "worker_ips:", "192.0.2.10 stands here twice: it is the head already"),
        ("192.0.2.12]", "gpu-2]", "worker_ips:", "'gpu-2' is no IPv4 address"),
        ("192.0.2.12]", "192.0.2.13]", "worker_ips:", "no host of the hosts file"),
        ("192.0.2.12]", "198.51.100.5]", "worker_ips:", "zone-clinic, a zone's: no key of the pool's opens it"),
        ("192.0.2.12]", "198.51.100.9]", "worker_ips:", "vault, whose role is vault, not gpu"),
        ("head_ip: 192.0.2.10", "head_ip: 192.0.2.12", "head_ip:", "gpu-2, whose role is gpu, not head"),
        ("head_ip: 192.0.2.10", "head_ip: 192.0.2.99", "head_ip:", "operator, whose role is operator, not head"),
        ("  type: local", "  type: aws", "type: aws", "'aws' is not checked here"),
        (
            "  head_ip: 192.0.2.10",
            "  head: 192.0.2.10",
            "provider:",
            "provider.head_ip must be the head's IPv4 address",
        ),
        ("provider:", "provide:", "# A pool", "provider must be a mapping"),
        ("  ssh_private_key: ~/.ssh/launcher", "", "auth:", "auth.ssh_private_key must be"),
        (
            "  - ray-gpu node stop\n  - ray-gpu node start\n",
            "  - ray start\n",
            "worker_start",
            "has no `ray-gpu node start`",
        ),
        ("  - ray-gpu node stop\n  - ray-gpu", "  - ray start --head\n  - ray-gpu", "- ray start", "no cage"),
        ("cluster_name: ray-gpu\n", "cluster_name: ray-gpu\ncluster_name: b\n", "cluster_name: b", "stands here twice"),
    ],
)
def test_wrong_file(tmp_path: Path, old: str, new: str, line: str, message: str) -> None:
    """What is wrong is named with file and line before anything is started; the file as it is passes."""
    hosts = hosts_file.read(ROOT / "examples/hosts.yaml")
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert text.count(old) == 1
    file = tmp_path / "cluster.yaml"
    file.write_text(text, encoding="utf-8")
    cluster_file.check(file, hosts)
    file.write_text(text.replace(old, new), encoding="utf-8")

    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        cluster_file.check(file, hosts)

    lines = file.read_text(encoding="utf-8").splitlines()
    assert caught.value.line is not None
    assert line in lines[caught.value.line - 1]
    assert f"{file}:{caught.value.line}: " in str(caught.value)


def test_check_command(tmp_path: Path) -> None:
    """`ray-gpu check` says that the shipped file is good, and of a wrong one what `ray up` does not: file and line."""
    file = tmp_path / "cluster.yaml"
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    file.write_text(text.replace("192.0.2.12]", "192.0.2.11]"), encoding="utf-8")
    good, bad = (CliRunner().invoke(cli, ["check", str(path)]) for path in (ROOT / "cluster.yaml", file))

    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert good.stdout.startswith("ok: ")
    # Ray's own check sees nothing wrong.
    validate_config(prepare_config(yaml.safe_load(file.read_text(encoding="utf-8"))))


def test_names_no_zone(config: dict[str, Any]) -> None:
    """No host of a zone is launched: Ray copies the key to the head, and checks no host's key."""
    zones = {host.addresses[0] for host in hosts_file.read(ROOT / "examples/hosts.yaml") if host.role.is_zone()}
    provider = config["provider"]

    assert zones
    assert not zones & {provider["head_ip"], *provider["worker_ips"]}
