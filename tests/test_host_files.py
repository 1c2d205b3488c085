"""The files of a host: the shipped examples are what is read, and whatever is wrong is named with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_gpu import hosts_file, node, vault_declaration, zone_host
from ray_gpu.host_file import VaultPart, read_login
from zones.errors import ConfigError

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
READERS: dict[str, Callable[[Path], Any]] = {
    "node-head.yaml": node.read_config,
    "node-gpu.yaml": node.read_config,
    "node-zone.yaml": node.read_config,
    "gateway.yaml": zone_host.read_config,
    "gateway-client.yaml": zone_host.read_config,
    "vault.yaml": vault_declaration.read,
    "hosts.yaml": hosts_file.read,
}


@pytest.mark.parametrize("name", READERS)
def test_example(name: str) -> None:
    """Every shipped example is read by what reads it in earnest."""
    READERS[name](EXAMPLES / name)


def test_every_example_is_read() -> None:
    """No example is left out above."""
    assert {path.name for path in EXAMPLES.glob("*.yaml")} == set(READERS)


def test_examples_agree() -> None:
    """A host has one address in all examples, and in cluster.yaml."""
    hosts = {host.name: host.addresses[0] for host in hosts_file.read(EXAMPLES / "hosts.yaml")}
    declared = {item.name: item.addresses[0] for item in vault_declaration.read(EXAMPLES / "vault.yaml").nodes}
    files = [node.read_config(EXAMPLES / f"node-{role}.yaml") for role in ("head", "gpu", "zone")]
    relay = zone_host.read_config(EXAMPLES / "gateway-client.yaml").relay
    provider = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["provider"]

    assert declared == {name: hosts[name] for name in declared}
    assert {item.node: item.address for item in files}.items() <= hosts.items()
    assert relay is not None
    assert (relay.address, relay.head) == (hosts[relay.node], hosts["head"])
    assert {item.head for item in files} == {hosts["head"]} == {provider["head_ip"]}
    assert provider["worker_ips"] == [hosts["gpu-1"], hosts["gpu-2"]]


@pytest.mark.parametrize(
    ("example", "changed", "message"),
    [
        ("node-gpu.yaml", {"role": "gpux"}, r"file.yaml:3: role"),
        ("node-gpu.yaml", {"pool": None}, r"file.yaml:\d+: .*role gpu needs pool"),
        ("node-gpu.yaml", {"zone": "clinic"}, r"file.yaml:\d+: .*role gpu has no zone"),
        ("node-gpu.yaml", {"gpus": 1}, r"file.yaml:\d+: gpus"),
        ("node-gpu.yaml", {"address": "192.0.2"}, r"file.yaml:\d+: address"),
        ("node-gpu.yaml", {"head": "192.0.2.11"}, r"file.yaml:\d+: .*the head's address is its own"),
        ("node-head.yaml", {"head": "192.0.2.11"}, r"file.yaml:\d+: .*the head's address is its own"),
        ("node-gpu.yaml", {"cluster": None}, r"file.yaml:\d+: Field required: cluster"),
        ("node-gpu.yaml", {"cluster": []}, r"file.yaml:6: cluster.*at least 1 item"),
        ("node-gpu.yaml", {"cluster": ["192.0.2.10", "192.0.2.1/24"]}, r"file.yaml:8: .*written like 192.0.2.0/24"),
        ("node-gpu.yaml", {"cluster": ["192.0.2.10", "0.0.0.0/0"]}, r"file.yaml:8: .*name the cluster's"),
        ("node-gpu.yaml", {"cluster": ["192.0.2.10", "127.0.0.0/8"]}, r"file.yaml:8: .*no host of a cluster"),
        ("node-gpu.yaml", {"cluster": ["192.0.2.10", "head"]}, r"file.yaml:8: .*written like 192.0.2.0/24"),
        ("node-gpu.yaml", {"cluster": ["198.51.100.0/24"]}, r"file.yaml:\d+: .*cluster lacks the head's address"),
        ("node-gpu.yaml", {"policies": "policies"}, r"file.yaml:\d+: policies.*absolute"),
        ("node-zone.yaml", {"zone": "Clinic!"}, r"file.yaml:\d+: zone"),
        ("gateway-client.yaml", {"relay": {"node": "zone-trading"}}, r"file.yaml:\d+: relay: Field required: address"),
        ("gateway.yaml", {"policies": None}, r"file.yaml:\d+: Field required: policies"),
        ("gateway.yaml", {"memory_mib": 100}, r"file.yaml:\d+: memory_mib.*greater than or equal to 512"),
        ("gateway.yaml", {"vault": {"address": "http://v", "credentials": "/c"}}, r"file.yaml:\d+: vault.*address"),
    ],
)
def test_refused(tmp_path: Path, example: str, changed: dict[str, Any], message: str) -> None:
    """What a file of a host says wrong is named with file and line."""
    document = yaml.safe_load((EXAMPLES / example).read_text(encoding="utf-8")) | changed
    file = tmp_path / "file.yaml"
    kept = {key: value for key, value in document.items() if value is not None}
    file.write_text("# a comment\n" + yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")

    with pytest.raises(ConfigError, match=message):
        READERS[example](file)


@pytest.mark.parametrize(
    ("example", "carrier", "message"),
    [
        ("gateway.yaml", "client", r"file.yaml:\d+: .*`carrier: client` needs a part `relay`"),
        ("gateway-client.yaml", "edge", r"file.yaml:\d+: relay: .*`carrier: edge` has no part `relay`"),
        ("gateway-client.yaml", None, r"file.yaml:\d+: relay: .*`carrier: edge` has no part `relay`"),
        ("gateway.yaml", None, None),
        ("gateway-client.yaml", "client", None),
    ],
)
def test_carrier(
    tmp_path: Path, copy_policies: Callable[..., Path], example: str, carrier: str | None, message: str | None
) -> None:
    """A gateway.yaml has a relay exactly where the zone's own zone.yaml says that its carrier is client."""
    document = yaml.safe_load((EXAMPLES / example).read_text(encoding="utf-8"))
    policies = copy_policies()
    with (policies / document["zone"] / "zone.yaml").open("a", encoding="utf-8") as zone_file:
        zone_file.write(f"\ncarrier: {carrier}\n" if carrier else "")
    file = tmp_path / "file.yaml"
    state = str(tmp_path / "state")
    file.write_text(yaml.safe_dump(document | {"policies": str(policies), "state": state}), encoding="utf-8")

    if message is None:
        zone_host.Service(file, lambda _: None)
    else:
        with pytest.raises(ConfigError, match=message):
            zone_host.Service(file, lambda _: None)


@pytest.mark.parametrize(
    ("example", "old", "new", "message"),
    [
        ("hosts.yaml", "name: gpu-2,  ", "name: gpu-1,  ", "two hosts are called gpu-1"),
        ("hosts.yaml", "192.0.2.12", "192.0.2.11", "192.0.2.11 is gpu-1's already"),
        ("hosts.yaml", "role: vault", "role: valut", "role"),
        (
            "hosts.yaml",
            "name: operator,     role: operator",
            "name: operator,     role: head",
            "head is the head already",
        ),
        ("hosts.yaml", "198.51.100.9", "vault.example", "not an IP address"),
        ("vault.yaml", "name: gpu-2,  ", "name: gpu-1,  ", "gpu-1"),
        ("vault.yaml", "192.0.2.12", "192.0.2.11", "192.0.2.11"),
        ("vault.yaml", "role: head,", "role: haed,", "role"),
        ("vault.yaml", "zone: trading,", "zone: tradng,", "tradng"),
    ],
)
def test_wrong_site(tmp_path: Path, example: str, old: str, new: str, message: str) -> None:
    """A wrong role, a host or an address that stands twice, in the site's own files, is named with file and line."""
    text = (EXAMPLES / example).read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "file.yaml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")

    with pytest.raises(ConfigError, match=message) as caught:
        READERS[example](file)

    changed = text[: text.index(old)].count("\n") + 1
    assert f"file.yaml:{changed}: " in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("role: [", r"file.yaml:\d+"), ("", "file.yaml"), ("- a", "file.yaml")])
@pytest.mark.parametrize("read", [node.read_config, zone_host.read_config])
def test_no_document(tmp_path: Path, read: Callable[[Path], Any], text: str, message: str) -> None:
    """A file that is no YAML, empty or a list is refused, by name."""
    file = tmp_path / "file.yaml"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match=message):
        read(file)


LOGIN = json.dumps({"role_id": "r", "secret_id": "s"})


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (LOGIN, 0o644, "chmod 600"),
        ("", 0o600, "not what `ray-gpu vault issue` writes"),
        (json.dumps({"user": "dana", "password": "hunter2"}), 0o600, "not what `ray-gpu vault issue` writes"),
        (None, 0o600, "write it with `ray-gpu vault issue`"),
    ],
    ids=["open to others", "empty", "a person's", "missing"],
)
def test_login_refused(tmp_path: Path, text: str | None, mode: int, message: str) -> None:
    """A login that is missing, open to others or something else is refused, and the message does not quote it."""
    file = tmp_path / "login.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
        file.chmod(mode)

    with pytest.raises(ConfigError, match=message) as caught:
        read_login(VaultPart(address="https://v", credentials=str(file)))

    assert "hunter2" not in str(caught.value)


def test_no_ca(tmp_path: Path) -> None:
    """A CA file that is not there is named before anybody is asked; control: without one the login is read."""
    file = tmp_path / "login.json"
    file.write_text(LOGIN, encoding="utf-8")
    file.chmod(0o600)

    assert read_login(VaultPart(address="https://v", credentials=str(file))) == ("r", "s")
    with pytest.raises(ConfigError, match=r"ca\.pem: no such file"):
        read_login(VaultPart(address="https://v", credentials=str(file), ca=str(tmp_path / "ca.pem")))
