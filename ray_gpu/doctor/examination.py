"""Reads this host, checks it, and says which role needs which control. Starts bubblewrap for a moment, asks Vault.

Nothing is changed: no control group is made, no file written, no login used.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from ray_gpu import cage_net, zone_host
from ray_gpu import node as nodes
from ray_gpu.doctor import files, kernel, notebooks, software, vault
from ray_gpu.doctor.finding import Files, Finding, missing, unclear
from ray_gpu.host_file import VaultPart
from ray_gpu.node_identity import RayFiles
from ray_gpu.ports import GATEWAY_UID
from ray_gpu.sandbox import boundary, bubblewrap, landlock, seccomp
from ray_gpu.sandbox.survey import reach_python, try_bubblewrap
from ray_gpu.state import Layout
from zones.document import Document, read_text_file
from zones.keys import certificate_end

#: What a host is. ``"embedded"`` is everything on one machine, as ``ray-gpu up`` starts it.
Role = Literal["head", "gpu", "zone", "gateway", "embedded"]

GATEWAY_CONFIG = Path("/etc/ray-gpu/gateway.yaml")
#: For each control: the roles that need it, and those that it is shown to, but that run without.
ROLES: dict[str, tuple[str, str]] = {
    "shared-uid": ("gpu", "head zone embedded"),
    "no-namespaces": ("gpu", "head zone gateway embedded"),
    "file-capability": ("gpu", "head zone gateway embedded"),
    "no-seccomp": ("gpu head zone gateway", "embedded"),
    "no-landlock": ("gpu head zone gateway", "embedded"),
    "no-cgroup": ("gpu", "embedded"),
    "swap-on": ("gpu", "zone gateway embedded"),
    "numpy-stand-in": ("gpu", "embedded"),
    "embedded-vault": ("", "embedded"),
    "self-enforced": ("gateway", "embedded"),
    "uncaged-ray": ("gpu head zone", "embedded"),
    "shared-network": ("gpu head zone", "embedded"),
    "core-handler": ("gpu gateway", "head zone embedded"),
    "core-limit": ("", "gpu gateway embedded"),
    "ksm-on": ("gpu", "embedded"),
    "ptrace-open": ("gpu gateway", "head zone embedded"),
    "credentials-open": ("gpu head zone gateway", ""),
    "session-on-disk": ("gpu head zone", ""),
    "full-ray": ("gpu zone", "embedded"),
    "old-ray": ("gpu head zone embedded", ""),
    "certificate-ends": ("gpu head zone gateway", ""),
    "vault-unproven": ("gpu head zone gateway", ""),
    "clock-skew": ("gpu head zone gateway", ""),
    "ports-open": ("", "gpu head zone gateway"),
    "kernel-tcp": ("gateway", "zone embedded"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The host to examine."""

    roles: frozenset[Role]
    node: nodes.NodeFile | None = None
    gateway: zone_host.GatewayFile | None = None
    files: Files = field(default_factory=Files)

    def vaults(self) -> list[VaultPart]:
        """Return where Vault is, by each file of this host."""
        return [config.vault for config in (self.node, self.gateway) if config is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A finding, and whether a role of this host needs it to hold."""

    finding: Finding
    needed: bool

    @property
    def word(self) -> str:
        """``"ok"``; ``"missing"`` or ``"unclear"`` where it is needed; otherwise ``"weaker"``."""
        if self.finding.state == "holds":
            return "ok"
        return self.finding.state if self.needed else "weaker"


def subject(configs: Sequence[Path], role: Role | None) -> Subject:
    """Return what to examine.

    Args:
        configs: node.yaml, gateway.yaml, or both. By default those in /etc/ray-gpu that are there.
        role: What the host is to be, by default what its files say, and ``"embedded"`` where there are none.

    Raises:
        ConfigError: A file cannot be read or is wrong.
    """
    paths = list(configs) or [path for path in (nodes.DEFAULT_CONFIG, GATEWAY_CONFIG) if path.exists()]
    node, gateway = None, None
    for path in paths:
        document = Document(read_text_file(path), path)
        if isinstance(document.value, dict) and "node" not in document.value and "policies" in document.value:
            gateway = document.check(zone_host.GatewayFile)
        else:
            node = document.check(nodes.NodeFile)
    roles: set[Role] = {role} if role else set()
    if not role:
        roles |= {node.role} if node else set()
        roles |= {"gateway"} if gateway else set()
    return Subject(roles=frozenset(roles or {"embedded"}), node=node, gateway=gateway)


def examine(host: Subject) -> list[Line]:
    """Return a line for each check that concerns a role of this host."""
    found = [*_confinement(host), *_memory(host), *_ray(host), *_logins(host), *_vault(host), *_around(host)]
    return list(judge(found, host.roles))


def judge(found: Iterable[Finding], roles: Iterable[Role]) -> Iterator[Line]:
    """Yield what concerns these roles, and whether one of them needs it."""
    for finding in found:
        needing, shown = (set(words.split()) for words in ROLES[finding.control])
        if {*roles} & (needing | shown):
            yield Line(finding=finding, needed=bool({*roles} & needing))


def roles_table() -> str:
    """Return :data:`ROLES` as the table in docs/doctor.md."""
    roles = get_args(Role)
    rows = [f"| control | {' | '.join(roles)} |", f"|---|{'---|' * len(roles)}"]
    for control, (needing, shown) in ROLES.items():
        marks = ("●" if role in needing.split() else "○" if role in shown.split() else "" for role in roles)
        rows.append(f"| `{control}` | {' | '.join(marks)} |")
    return "\n".join([*rows, ""])


def _confinement(host: Subject) -> Iterator[Finding]:
    euid, read = os.geteuid(), host.files.text
    program = bubblewrap.find()
    mode, reason = try_bubblewrap(program, root=euid == 0)
    yield kernel.uids(euid)
    yield kernel.gateway_uid(euid)
    yield kernel.bubblewrap(str(program) if program else None)
    settings = (
        read(f"/proc/sys/{name}")
        for name in (
            "user/max_user_namespaces", "kernel/unprivileged_userns_clone",
            "kernel/apparmor_restrict_unprivileged_userns",
        )
    )  # fmt: skip
    yield kernel.user_namespaces(*settings, euid=euid)
    yield kernel.namespaces(mode, reason)
    yield kernel.namespaces(mode, reason, control="uncaged-ray")
    yield kernel.cage_network(mode, cage_net.lacking(), nodes=3 if "embedded" in host.roles else 1)
    readable, capability = (True, None) if mode != "none" or euid != 0 else reach_python()
    yield kernel.python_reach(mode, readable=readable, capability=capability)
    yield kernel.seccomp(
        kernel=host.files.at("/proc/sys/kernel/seccomp").exists(), library=seccomp.compile_filter("sandbox") is not None
    )
    yield kernel.landlock(landlock.abi())


def _memory(host: Subject) -> Iterator[Finding]:
    read = host.files.text
    groups = kernel.find_groups(host.files)
    yield kernel.memory_groups(groups)
    yield kernel.swap(read("/proc/swaps"), groups)
    yield kernel.ksm(read("/sys/kernel/mm/ksm/run"))
    yield kernel.core_pattern(read("/proc/sys/kernel/core_pattern"))
    yield kernel.core_limit(resource.getrlimit(resource.RLIMIT_CORE)[0])
    yield kernel.ptrace_scope(read("/proc/sys/kernel/yama/ptrace_scope"), euid=os.geteuid())
    mounts = read("/proc/mounts")
    yield files.tmpfs("Ray's files", str(nodes.RUN_DIR), mounts)
    yield files.tmpfs("shared memory", "/dev/shm", mounts)


def _ray(host: Subject) -> Iterator[Finding]:
    yield software.ray_version(software.version_of("ray"), software.own_requirements())
    yield software.plain_ray(software.modules_found(software.AGENT_MODULES))
    for ray in _ray_files(host):
        yield _certificate(host.files, ray.certificate)


def _ray_files(host: Subject) -> Iterator[RayFiles]:
    """Yield where certificate and token of this host's node, and of its client relay, lie."""
    if host.node is not None:
        yield RayFiles(directory=nodes.RUN_DIR / host.node.node / "ray")
    if host.gateway is not None and host.gateway.relay is not None:
        yield RayFiles(directory=zone_host.credentials_dir(host.gateway))


def _certificate(read: Files, path: Path) -> Finding:
    control, about = "certificate-ends", "Ray's certificate"
    try:
        there, text = read.facts(path), read.text(path)
        end = certificate_end(text) if text is not None else None
    except PermissionError:
        return unclear(control, about, f"{path} may not be read")
    except ValueError:
        return missing(control, about, f"{path} is no certificate")
    if there is not None and end is None:
        return unclear(control, about, f"{path} may not be read")
    return files.node_certificate(str(path), end, now=time.time())


def _logins(host: Subject) -> Iterator[Finding]:
    euid = os.geteuid()
    relay = host.gateway.relay if host.gateway else None
    for credentials in [*(part.credentials for part in host.vaults()), *([relay.credentials] if relay else [])]:
        yield _private(host.files, "login for Vault", Path(credentials), (euid, 0))
    for what, path, owner in _made(host, euid):
        # It comes and goes with what runs here.
        if not _absent(host.files, path):
            yield _private(host.files, what, path, (owner,))


def _made(host: Subject, euid: int) -> Iterator[tuple[str, Path, int]]:
    """Yield what this project writes that holds a login or a key: name, place and owner."""
    for ray in _ray_files(host):
        for what, path in (("Ray's directory", ray.directory), ("Ray's token", ray.token), ("Ray's key", ray.key)):
            yield what, path, nodes.CAGE_UID if euid == 0 else euid
    if host.node is not None:
        yield "custodian's settings", nodes.state_file(host.node).with_name("settings.json"), euid
    if host.gateway is not None:
        zone = Layout(Path(host.gateway.state)).zone(host.gateway.zone)
        yield "gateway's settings", zone / "settings.json", GATEWAY_UID if euid == 0 else euid


def _absent(read: Files, path: Path) -> bool:
    try:
        return read.facts(path) is None
    except PermissionError:
        return False


def _private(read: Files, what: str, path: Path, owners: tuple[int, ...]) -> Finding:
    try:
        return files.private_file(what, read.facts(path), read.above(path), owners=owners)
    except PermissionError:
        return unclear("credentials-open", what, f"{path} may not be looked at")


def _vault(host: Subject) -> Iterator[Finding]:
    for address, ca in dict.fromkeys((part.address, part.ca) for part in host.vaults()):
        answer = vault.ask(address, ca)
        yield vault.answers(answer)
        yield vault.certificate(answer)
        yield vault.clock(answer)
    if "embedded" in host.roles:
        yield missing("embedded-vault", "Vault", "ray-gpu up runs its own here")


def _around(host: Subject) -> Iterator[Finding]:
    yield software.firewall(software.rules_loaded())
    yield notebooks.kernels(notebooks.find(host.files))
    yield software.gpu(
        boundary.device_hint(), devices=len(boundary.gpu_devices()), cupy=bool(software.modules_found(["cupy"]))
    )
