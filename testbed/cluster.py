"""A real cluster on a test bed, brought up as its operator and its zones' people would. Starts processes; needs root.

::

    with Testbed(HOSTS) as bed, BedCluster(bed) as cluster:
        cluster.up()                  # `ray up` on the operator's host
        cluster.join("clinic")        # on the zone's own host
        cluster.call("clinic", "print(attach().status()['nodes'])")

Everything is done by the commands that a person types, with the files of ``examples/`` and the repository's
cluster.yaml; only addresses, names and the launcher's key are this bed's.
"""

from __future__ import annotations

import json
import subprocess
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from ray_gpu.ports import PORTS, VAULT, End, Role, flows
from testbed.bed import Testbed, zone_of
from testbed.host import HOME, ROOT, Host, HostProcess
from testbed.ssh import LAUNCHER_KEY

#: Zone to its person: those of examples/vault.yaml.
PEOPLE: Mapping[str, str] = {"clinic": "dana", "trading": "teo"}
#: Who runs a person's notebook on a zone's host.
PERSON_UID = 1000
NODE_FILE, GATEWAY_FILE = "/etc/ray-gpu/node.yaml", "/etc/ray-gpu/gateway.yaml"
NODE_CREDENTIALS, GATEWAY_CREDENTIALS = "/etc/ray-gpu/node-credentials.json", "/etc/ray-gpu/gateway-credentials.json"
VAULT_CA = "/etc/ray-gpu/vault-ca.pem"
CLUSTER_FILE, DECLARATION = f"{HOME}/cluster.yaml", f"{HOME}/vault.yaml"
STATE = "/var/lib/ray-gpu"
_TOKEN, _POLICIES = f"{HOME}/vault-token", "/etc/ray-gpu/policies"
#: The launcher asks for both; no host of a bed reaches the internet, and its output goes to a log.
_LAUNCHER_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "TERM": "dumb"}
_LAUNCH_TIMEOUT_S, _START_TIMEOUT_S = 150.0, 190.0

_START_VAULT = """
import sys
from pathlib import Path
from ray_gpu.vault_server import VaultServer
server = VaultServer.start(Path(sys.argv[1]), host=sys.argv[2], port=int(sys.argv[3]))
print(server.root_client().token)
"""
_REVOKE = """
import sys
from zones.vault import Vault
Vault(sys.argv[1], ca_file=sys.argv[2]).with_token(open(sys.argv[3]).read()).revoke()
"""
#: What a person's script begins with: ``attach()``, logged in to Vault.
_PERSON = """
import json, sys
import numpy as np
import ray_gpu
from zones.vault import Vault
_login = json.loads(sys.stdin.readline())
vault = Vault(_login["vault"], ca_file=_login["ca"])
vault.login_userpass(_login["user"], _login["password"])
def attach():
    return ray_gpu.attach(_login["zone"], token=vault.token, purpose="test", state_dir=_login["state"])
"""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What ``ray-gpu vault issue`` wrote for one name."""

    name: str
    text: str

    def __repr__(self) -> str:
        return f"Credentials({self.name!r}, ...)"


class BedCluster:
    """Vault, head, GPU hosts and zones of one bed. Hosts are equipped inside ``with``; nothing of Ray runs yet.

    Attributes:
        bed: Its hosts.
        vault: Vault's address.

    Args:
        bed: It runs.
        head_packages: Directory of Python packages that the head's environment has, and no other host's.
    """

    def __init__(self, bed: Testbed, *, head_packages: Path | None = None) -> None:
        self.bed = bed
        self._head_packages = head_packages
        self.vault = f"https://{bed['vault'].address}:{VAULT}"
        self._issued: dict[str, Credentials] = {}

    def __enter__(self) -> Self:
        self._start_vault()
        self._set_up_vault()
        if self._head_packages is not None:
            self._install(self.bed["head"], self._head_packages)
        names = [name for name, role in self.bed.roles.items() if role in (Role.HEAD, Role.GPU) or role.is_zone()]
        with ThreadPoolExecutor(4) as several:
            list(several.map(self.equip, names))
        self._write_cluster_file()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing: the hosts, and all that runs in them, end with the bed."""

    # -- Vault ----------------------------------------------------------------------------------

    def _start_vault(self) -> None:
        host, operator = self.bed["vault"], self.bed["operator"]
        started = host.run(["python", "-c", _START_VAULT, f"{STATE}/vault", host.address, str(VAULT)])
        operator.write(_TOKEN, started.stdout.strip(), mode=0o600)
        self._ca = host.read(f"{STATE}/vault/ca.pem")
        operator.write(VAULT_CA, self._ca)

    def _set_up_vault(self) -> None:
        """Declare everybody, hand out their credentials, and end the administrator's token."""
        operator = self.bed["operator"]
        declared = example("vault.yaml")
        declared["nodes"] = [
            {"name": name, "role": "zone" if role.is_zone() else role.value, "addresses": [self.bed[name].address]}
            for name, role in self.bed.roles.items()
            if role in (Role.HEAD, Role.GPU) or role.is_zone()
        ]
        operator.write(DECLARATION, yaml.safe_dump(declared))
        self.administer("setup", DECLARATION)
        names = [node["name"] for node in declared["nodes"]] + [person["name"] for person in declared["people"]]
        with ThreadPoolExecutor(4) as several:
            list(several.map(self.issue, [*names, *declared["zones"]]))

    def administer(self, *command: str) -> str:
        """Run ``ray-gpu vault`` on the operator's host with the administrator's token; return what it says."""
        where = ["--address", self.vault, "--ca", VAULT_CA, "--token-file", _TOKEN]
        return self.bed["operator"].run(["ray-gpu", "vault", *command, *where]).stdout

    def issue(self, name: str) -> Credentials:
        """Make new credentials of a node, person, or zone's gateway; its older ones end."""
        operator, file = self.bed["operator"], f"{HOME}/{name}.json"
        self.administer("issue", name, "--out", file)
        made = self._issued[name] = Credentials(name, operator.read(file))
        operator.run(["rm", file])
        return made

    def credentials(self, name: str) -> Credentials:
        """Return the credentials of a node, person, or zone's gateway."""
        return self._issued[name]

    def end_administration(self) -> None:
        """Revoke the administrator's token, as an operator does once all is set up."""
        operator = self.bed["operator"]
        operator.run(["python", "-c", _REVOKE, self.vault, VAULT_CA, _TOKEN])
        operator.run(["rm", _TOKEN])

    # -- hosts ----------------------------------------------------------------------------------

    @staticmethod
    def _install(host: Host, packages: Path) -> None:
        """Add packages to the environment that hosts share, for this host alone."""
        site = sysconfig.get_path("purelib")
        host.run(["mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={packages}:{site}", site])

    def equip(self, name: str) -> None:
        """Write everything that a host of the cluster needs below /etc, as if newly installed."""
        host, role = self.bed[name], self.bed.roles[name]
        host.write(VAULT_CA, self._ca)
        host.write(NODE_CREDENTIALS, self._issued[name].text, mode=0o600)
        if role is not Role.CLIENT_ZONE:
            host.write(NODE_FILE, yaml.safe_dump(self.node_file(name)))
        if role is not Role.HEAD:
            host.run(["cp", "-rT", ROOT / "policies", _POLICIES])
        if role.is_zone():
            self._equip_zone(host, zone_of(name), role)

    def node_file(self, name: str, **changed: Any) -> dict[str, Any]:
        """Return a host's node.yaml, with *changed* fields; a field that is changed to ``None`` is left out."""
        role = self.bed.roles[name]
        document = example(f"node-{'zone' if role.is_zone() else role.value}.yaml")
        document |= {"node": name, "address": self.bed[name].address, "head": self.bed["head"].address}
        document |= {"zone": zone_of(name)} if role.is_zone() else {}
        document["cluster"] = [
            f"{host.address}/32" for host in self.bed if self._are_peers(role, self.bed.roles[host.name])
        ]
        document["vault"]["address"] = self.vault
        return {key: value for key, value in (document | changed).items() if value is not None}

    @staticmethod
    def _are_peers(one: Role, other: Role) -> bool:
        """Whether hosts of these roles speak Ray to one another: no zone does with a zone."""
        return any({flow.source, flow.destination} == {one, other} and flow.taken_by is End.CAGE for flow in flows())

    def _equip_zone(self, host: Host, zone: str, role: Role) -> None:
        client = role is Role.CLIENT_ZONE
        gateway = example("gateway-client.yaml" if client else "gateway.yaml") | {"zone": zone}
        if client:
            gateway["relay"] |= {"node": host.name, "address": host.address, "head": self.bed["head"].address}
        gateway["vault"]["address"] = self.vault
        host.write(GATEWAY_CREDENTIALS, self._issued[zone].text, mode=0o600)
        host.write(GATEWAY_FILE, yaml.safe_dump(gateway))
        path = f"{_POLICIES}/{zone}/zone.yaml"
        pool = [host.address for host in self.bed if self.bed.roles[host.name] is Role.GPU]
        policy = yaml.safe_load(host.read(path))
        policy["carrier"] = "client" if client else "edge"
        policy["endpoints"] = [f"{address}/32:{PORTS.endpoints}" for address in pool]
        host.write(path, yaml.safe_dump(policy))
        data = f"{STATE}/zones/{zone}/data"
        host.run(["mkdir", "-p", data])
        host.run(["python", "-m", "ray_gpu.demo_data", zone, data])

    # -- the cluster ----------------------------------------------------------------------------

    def _write_cluster_file(self) -> None:
        document = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
        pool = [host.address for host in self.bed if self.bed.roles[host.name] is Role.GPU]
        document["provider"] |= {"head_ip": self.bed["head"].address, "worker_ips": pool}
        document["auth"]["ssh_private_key"] = LAUNCHER_KEY
        self.bed["operator"].write(CLUSTER_FILE, yaml.safe_dump(document))

    def up(self) -> str:
        """Run ``ray up``, which returns when every host has joined or was waited for; return what it says."""
        return self._ray("up", "--no-config-cache")

    def down(self) -> str:
        """Run ``ray down``; return what it says."""
        return self._ray("down")

    def _ray(self, command: str, *options: str) -> str:
        done = self.bed["operator"].run(
            ["ray", command, "--yes", *options, CLUSTER_FILE],
            env=_LAUNCHER_ENVIRONMENT,
            timeout_s=_LAUNCH_TIMEOUT_S,
        )
        return done.stdout + done.stderr

    def start_node(self, name: str, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``ray-gpu node start`` on a host."""
        return self.bed[name].run(["ray-gpu", "node", "start", *options], check=check, timeout_s=_START_TIMEOUT_S)

    def status(self, name: str) -> dict[str, Any] | None:
        """Return what ``ray-gpu node status --json`` says on a host, or ``None`` when nothing runs."""
        done = self.bed[name].run(["ray-gpu", "node", "status", "--json"], check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    # -- zones ----------------------------------------------------------------------------------

    def join(self, zone: str) -> None:
        """Start a zone's gateway, and its node if it has one, on the zone's host, as the zone's people do.

        Args:
            zone: Its name, or ``"clinic-2"`` for its second host; as everywhere below.
        """
        self.bed[f"zone-{zone}"].run(["ray-gpu", "gateway", "start"], timeout_s=_START_TIMEOUT_S)
        if self._has_node(zone):
            self.start_node(f"zone-{zone}")

    def _has_node(self, zone: str) -> bool:
        return self.bed.roles[f"zone-{zone}"] is Role.EDGE_ZONE

    def leave(self, zone: str) -> None:
        """Stop them again."""
        for part in ("node", "gateway") if self._has_node(zone) else ("gateway",):
            self.bed[f"zone-{zone}"].run(["ray-gpu", part, "stop"], timeout_s=_START_TIMEOUT_S)

    def call(self, zone: str, script: str, *, timeout_s: float = 60.0) -> str:
        """Run Python as the zone's person, with ``attach()`` and ``np`` at hand; return what it prints."""
        command = ["python", "-c", _PERSON + script]
        host = self.bed[f"zone-{zone}"]
        return host.run(command, uid=PERSON_UID, text=self._login(zone), timeout_s=timeout_s).stdout

    def begin_call(self, zone: str, script: str) -> HostProcess:
        """Start such a script with pipes; it ends when it likes."""
        pipe = subprocess.PIPE
        start = partial(self.bed[f"zone-{zone}"].popen, uid=PERSON_UID, stdin=pipe, stdout=pipe, stderr=pipe)
        process = start(["python", "-c", _PERSON + script])
        assert process.stdin is not None
        process.stdin.write(self._login(zone))
        process.stdin.flush()
        return process

    def _login(self, zone: str) -> str:
        """Return what a script reads first: by standard input, for it has a password."""
        name = zone_of(f"zone-{zone}")
        made = json.loads(self._issued[PEOPLE[name]].text)
        return json.dumps({"zone": name, "vault": self.vault, "ca": VAULT_CA, "state": STATE, **made}) + "\n"


def example(name: str) -> Any:
    """Return one of the shipped examples."""
    return yaml.safe_load((ROOT / "examples" / name).read_text(encoding="utf-8"))
