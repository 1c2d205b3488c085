"""The cluster under attack, as an attacker with root on its one machine sees it: processes, logins, ledger."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray_gpu
from ray_gpu.state import Layout
from ray_gpu.vault_server import VaultServer
from zones.ledger import read
from zones.vault import Vault

#: Columns of the data set ``visits`` with their classes; one more has a canary for a name.
COLUMNS = {
    "note": "confidential",
    "kind": "confidential",
    "cost": "internal",
    "count": "confidential",
    "share": "confidential",
    "patient": "direct-identifier",
}
#: The one purpose for which tables that come from no data set may leave.
NOTEBOOK_TABLES = "tables of a notebook"
#: Above these a function, a call's arguments, or their sum over a session count as the highest class, bytes.
SMALL_BYTES, SESSION_BYTES = 16_384, 262_144
#: CAP_SYS_PTRACE and CAP_SYS_ADMIN.
_NEEDED = (19, 21)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """A running cluster."""

    state: Path
    document: dict[str, Any]
    #: Of :mod:`tests.proofs.canary`.
    mark: str
    zone: str = "clinic"

    @property
    def layout(self) -> Layout:
        """Where its files are."""
        return Layout(self.state)

    def attach(self, purpose: str = "proof") -> ray_gpu.Session:
        """Open a session as the shipped person."""
        return ray_gpu.attach(self.zone, purpose=purpose, state_dir=self.state)

    def entries(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the ledger's entries of one kind with these values, oldest first."""
        found = [entry for entry in read(self.layout.ledger(self.zone)) if entry["kind"] == kind]
        return [entry for entry in found if all(entry.get(name) == value for name, value in fields.items())]

    # -- processes ------------------------------------------------------------------------------

    def caged(self) -> dict[str, list[int]]:
        """Return each living cage's processes: all that share the PID namespace of its first one inside.

        That is each Ray node's, and a relay's that has a cage of its own.
        """
        cages = dict(self.document["nodes"])
        if self.document["carrier"] == "client":
            cages["relay"] = self.document["processes"]["relay"]
        inside = {name: below(pid)[:1] for name, pid in cages.items()}
        spaces = {name: _space(first) for name, firsts in inside.items() for first in firsts}
        everything = [(pid, _space(pid)) for pid in _all()]
        return {name: [pid for pid, space in everything if space == wanted] for name, wanted in spaces.items()}

    def node_processes(self, node: str) -> list[int]:
        """Return what runs below a Ray node's first process, caged or not, parents first."""
        return below(int(self.document["nodes"][node]))

    def custodian(self, node: str) -> int:
        """Return a node's custodian."""
        return int(self.document["processes"][f"custodian-{node}"])

    def gateway(self) -> int:
        """Return the gateway: behind bubblewrap it is the innermost process."""
        outermost = int(self.document["processes"]["gateway"])
        return [outermost, *below(outermost)][-1]

    def leases(self, node: str, program: str = "") -> list[int]:
        """Return what runs below a node's custodian, such as its leases' ``"ray_gpu.keeper"``, innermost last."""
        return [pid for pid in below(self.custodian(node)) if not program or program in command(pid)]

    # -- logins ---------------------------------------------------------------------------------

    def settings(self, who: str) -> dict[str, Any]:
        """Return what the gateway (``"gateway"``) or a node's custodian was started with, but for its secret id."""
        directory = self.layout.zone(self.zone) if who == "gateway" else self.layout.node(who)
        document: dict[str, Any] = json.loads((directory / "settings.json").read_text(encoding="utf-8"))
        return document

    def secret_id(self, who: str) -> str:
        """Return one more secret id of the gateway's or a custodian's, as whoever has an embedded Vault's disk can."""
        return another_secret(VaultServer.find(self.layout.vault), self.role(who))

    def role(self, who: str) -> str:
        """Return the name of the gateway's or a custodian's AppRole."""
        return f"gateway-{self.zone}" if who == "gateway" else f"custodian-{who}"

    @contextlib.contextmanager
    def vault(self, who: str) -> Iterator[Vault]:
        """Log in to Vault as the gateway, or as a node's custodian."""
        settings = self.settings(who)
        client = Vault(settings["vault"], ca_file=settings["vault_ca"])
        try:
            yield client.login_approle(settings["role_id"], self.secret_id(who))
        finally:
            client.close()


def another_secret(server: VaultServer | None, role: str) -> str:
    """Return one more secret id of an AppRole of a running server. The older ones stay good."""
    assert server is not None
    root = server.root_client()
    try:
        return str(root.call("POST", f"auth/approle/role/{role}/secret-id")["data"]["secret_id"])
    finally:
        root.revoke()


def all_powerful() -> bool:
    """Say whether this process may look into every other: as root, and not in a container that takes that away."""
    capabilities = re.search(r"CapEff:\t(\w+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert capabilities
    return os.geteuid() == 0 and all(int(capabilities[1], 16) >> number & 1 for number in _NEEDED)


def command(pid: int) -> list[str]:
    """Return a process's command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").strip("\0").split("\0")
    except OSError:
        return []


def raylet_of(pids: Iterable[int]) -> tuple[int, dict[str, str]]:
    """Return the one raylet among processes, and the options that it was started with."""
    (pid,) = (pid for pid in pids if command(pid) and command(pid)[0].endswith("/raylet"))
    words = (word.removeprefix("--").split("=", 1) for word in command(pid) if word.startswith("--") and "=" in word)
    return pid, dict(words)


def _all() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _space(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""


def below(pid: int) -> list[int]:
    """Return every process below *pid*, parents first; what ends meanwhile is left out."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text(encoding="ascii").split():
                found += [int(child), *below(int(child))]
    return found
