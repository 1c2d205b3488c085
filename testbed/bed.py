"""Builds the hosts of a test bed and takes them down. Starts processes; needs root.

::

    with Testbed() as bed:
        bed["gpu-1"].run(["ray-gpu", "doctor"])

The router is a host too, with one link to each of the others; no two hosts share a network.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from ray_gpu.ports import FirewallHost, Role, host_rules, router_rules
from testbed import disk, ssh, workplace
from testbed.host import ROOT, Host, HostProcess, search_path
from testbed.init import Plan
from testbed.network import Link
from zones.errors import ClusterError

#: Who is who by default: one zone of each kind.
HOSTS: Mapping[str, Role] = {
    "head": Role.HEAD,
    "gpu-1": Role.GPU,
    "gpu-2": Role.GPU,
    "zone-clinic": Role.EDGE_ZONE,
    "zone-trading": Role.CLIENT_ZONE,
    "vault": Role.VAULT,
    "operator": Role.OPERATOR,
}
#: Roles whose hosts have an sshd. Never a zone: no key of the pool's may open one.
_SSH_ROLES = (Role.HEAD, Role.GPU)
#: Programs that a bed needs, and the Debian packages that have them.
_PROGRAMS = {
    "ip": "iproute2",
    "nft": "nftables",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",  # ray up copies files by it
}
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
#: What a host shows of the machine, where it is there. Never /etc as a whole: it has the machine's own secrets.
_SHOWN = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_SHOWN_ETC = (
    "alternatives",
    "bash.bashrc",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "protocols",
    "services",
    "ssl/certs",
    "ssl/openssl.cnf",
)


def lacking() -> str:
    """Return what this machine lacks for a test bed, as one sentence, or ``""``."""
    if os.geteuid() != 0:
        return "a test bed needs root: it makes network namespaces and mounts file systems"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_SYSTEM_PATH) is None]
    if missing:
        packages = ", ".join(_PROGRAMS[name] for name in missing)
        return f"a test bed needs {', '.join(missing)}: run scripts/testbed.sh, which installs {packages}"
    return ""


class Testbed:
    """Hosts by name, from ``with`` to its end.

    Attributes:
        hosts: Every host but the router.
        router: What passes packets between them.
        path: The bed's directory on the machine: keys and logs.
        launcher: The key that opens the head and the GPU hosts.
    """

    __test__: ClassVar[bool] = False  # pytest: not a class of tests

    def __init__(self, roles: Mapping[str, Role] = HOSTS, *, disks: Mapping[str, Path] | None = None) -> None:
        """Nothing is built yet.

        Args:
            roles: Who is who.
            disks: Hosts whose root, /tmp and /var are on a disk of :mod:`testbed.disk`, and its file.
        """
        self.roles = dict(roles)
        self._disks = dict(disks or {})
        self._attached: list[str] = []
        self.hosts: dict[str, Host] = {}
        self._services: list[HostProcess] = []

    def __enter__(self) -> Self:
        reason = lacking()
        if reason:
            raise ClusterError(reason, node="", reason=reason)
        workplace.sweep()
        self._workplace = workplace.Workplace()
        self.path = self._workplace.path
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    def firewall_hosts(self) -> list[FirewallHost]:
        """Return the hosts as ``ray-gpu firewall`` reads them from a file."""
        return [
            FirewallHost(
                name=host.name,
                role=self.roles[host.name],
                addresses=(host.address, host.address6),
                zone=zone_of(host.name) if self.roles[host.name].is_zone() else "",
            )
            for host in self
        ]

    def load_firewalls(self) -> None:
        """Load the declared rules into the router and into every host."""
        known = self.firewall_hosts()
        self.router.load_rules(router_rules(known))
        for host in self:
            host.load_rules(host_rules(self.roles[host.name], known))

    def close(self) -> None:
        """Remove everything. Idempotent."""
        everyone = [*self.hosts.values(), *([self.router] if hasattr(self, "router") else [])]
        for host in everyone:
            host.stop()
        while self._services:
            self._services.pop().wait()
        self.hosts.clear()
        self._workplace.remove()

    def _build(self) -> None:
        try:
            self._start_hosts()
        finally:
            # The hosts have mounted them. Nothing else holds them, so that they go with the hosts.
            while self._attached:
                disk.release(self._attached.pop())
        self.router.configure_network("".join(host.link.router_batch(host.pid) for host in self))
        for host in self:
            host.configure_network(host.link.host_batch())
        # Before anything serves: no host is ever open to another.
        self.load_firewalls()
        self._start_ssh()

    def _start_hosts(self) -> None:
        self.router = self._host("router", Link(index=0), forwards=True)
        for index, name in enumerate(self.roles, start=1):
            self.hosts[name] = self._host(name, Link(index=index))
        everyone = [self.router, *self.hosts.values()]
        for host in everyone:
            host.start()
        for host in everyone:
            host.await_start()

    def _start_ssh(self) -> None:
        keys = self.path / "keys"
        keys.mkdir(mode=0o700)
        self.launcher = ssh.KeyPair.make(keys / "launcher", "launcher of one test bed")
        servers: dict[str, ssh.KeyPair] = {}
        started: list[tuple[Host, HostProcess, Path]] = []
        for host in self:
            if self.roles[host.name] in _SSH_ROLES:
                key = ssh.KeyPair.make(keys / host.name, host.name)
                log = self.path / f"{host.name}-sshd.log"
                self._services.append(ssh.serve(host, key, self.launcher, log=log))
                started.append((host, self._services[-1], log))
                servers[f"{host.name},ip6-{host.name},{host.address},{host.address6}"] = key
        for host, process, log in started:
            ssh.await_service(host, process, log=log)
        for host in self:
            if self.roles[host.name] is Role.OPERATOR:
                ssh.equip_operator(host, self.launcher, servers)

    def _host(self, name: str, link: Link, *, forwards: bool = False) -> Host:
        device = disk.attach(self._disks[name]) if name in self._disks else ""
        self._attached += [device] if device else []
        plan = Plan(
            name=name,
            root=str(self.path / "root"),
            disk=device,
            shown=_shown_paths(),
            devices=[str(path) for path in Path("/dev").glob("nvidia*") if self.roles.get(name) is Role.GPU],
            groups=self._workplace.groups(name),
            files=self._files(name),
            forwards=forwards,
        )
        return Host(plan, link, log=self.path / f"{name}.log")

    def _files(self, name: str) -> dict[str, str]:
        """Return what a host's /etc begins with. Nothing of it says anything about the machine."""
        links = [(host, Link(index=index)) for index, host in enumerate(self.roles, start=1)]
        # Names lead to IPv4: one address per name, as Ray expects. IPv6 has names of its own.
        known = [line for host, link in links for line in (f"{link.address} {host}", f"{link.address6} ip6-{host}")]
        return {
            "/etc/hostname": f"{name}\n",
            "/etc/hosts": "\n".join(["127.0.0.1 localhost", "::1 ip6-localhost", *known, ""]),
            "/etc/resolv.conf": "# No name server: hosts of a test bed know each other by /etc/hosts.\n",
            "/etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
            "/etc/passwd": "root:x:0:0:root:/root:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
            "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
            "/var/log/lastlog": "",
            "/etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
            "/etc/profile": f'export PATH="{search_path()}" PYTHONPATH="{ROOT}" PYTHONDONTWRITEBYTECODE=1\n',
        }


def zone_of(host: str) -> str:
    """Return the zone of a zone's host: ``zone-clinic`` and ``zone-clinic-2`` are both the clinic's."""
    return re.sub(r"-\d+$", "", host.removeprefix("zone-"))


def _shown_paths() -> list[str]:
    """Return what every host sees of the machine: its programs, this Python and this project."""
    python = [Path(sys.prefix), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    wanted = [*map(Path, _SHOWN), *(Path("/etc") / name for name in _SHOWN_ETC), ROOT, *python]
    shown: list[str] = []
    for path in sorted(path for path in set(wanted) if path.exists() or path.is_symlink()):
        if not any(path.is_relative_to(other) for other in shown):
            shown.append(str(path))
    return shown
