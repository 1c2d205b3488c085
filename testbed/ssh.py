"""SSH in the test bed: keys, and an sshd in the hosts that ``ray up`` launches. Starts processes; needs root.

Keys are made for one bed, kept below its directory, and gone with it. The launcher's key opens the head and the GPU
hosts, and no others: zones and the vault have no sshd, so no key of the pool's opens them.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from testbed.host import HOME, Host, HostProcess
from zones.errors import ClusterError

#: Where the operator and the head find the launcher's private key, as cluster.yaml names it.
LAUNCHER_KEY = f"{HOME}/.ssh/launcher"
KNOWN_HOSTS = f"{HOME}/.ssh/known_hosts"
_SERVER_KEY = "/etc/ssh/host_key"
_START_TIMEOUT_S = 20.0
#: Keys alone, root alone, and no forwarding: ``ray up`` needs commands, and files by rsync.
_CONFIGURATION = f"""\
HostKey {_SERVER_KEY}
AuthorizedKeysFile /etc/ssh/authorized_keys
AuthenticationMethods publickey
PermitRootLogin prohibit-password
AllowUsers root
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowTcpForwarding no
AllowAgentForwarding no
X11Forwarding no
PrintMotd no
PrintLastLog no
PidFile none
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPair:
    """One SSH key."""

    #: File of the private half, on the machine; mode 0600.
    path: Path
    #: The public half, one line.
    public: str

    @classmethod
    def make(cls, path: Path, comment: str) -> KeyPair:
        """Make a key in a new file."""
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
        subprocess.run(command, check=True, capture_output=True)
        return cls(path=path, public=path.with_name(f"{path.name}.pub").read_text(encoding="ascii").strip())


def serve(host: Host, server: KeyPair, launcher: KeyPair, *, log: Path) -> HostProcess:
    """Start an sshd that lets root in by the launcher's key; :func:`await_service` waits for it."""
    host.write(_SERVER_KEY, server.path.read_text(encoding="ascii"), mode=0o600)
    host.write("/etc/ssh/authorized_keys", f"{launcher.public}\n")
    host.write("/etc/ssh/sshd_config", _CONFIGURATION)
    host.run(["mkdir", "-p", "-m", "0755", "/run/sshd"])
    with log.open("w", encoding="utf-8") as file:
        return host.popen(["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config"], stderr=file, stdout=file)


def await_service(host: Host, sshd: HostProcess, *, log: Path) -> None:
    """Return when the host's sshd listens.

    Raises:
        ClusterError: It ended, or took too long.
    """
    deadline = time.monotonic() + _START_TIMEOUT_S
    while "Server listening" not in (said := log.read_text("utf-8", "replace")):
        if sshd.poll() is not None or time.monotonic() > deadline:
            reason = said.strip().splitlines()[-1:] or ["nothing said"]
            raise ClusterError(
                f"host {host.name}: sshd does not serve: {reason[0]}; look at {log}", node=host.name, reason=reason[0]
            )
        time.sleep(0.01)


def equip_operator(host: Host, launcher: KeyPair, servers: dict[str, KeyPair]) -> None:
    """Give the operator the launcher's key, and the host keys to expect: one line for each name of a host."""
    host.write(LAUNCHER_KEY, launcher.path.read_text(encoding="ascii"), mode=0o600)
    known = [f"{names} {' '.join(key.public.split()[:2])}\n" for names, key in servers.items()]
    host.write(KNOWN_HOSTS, "".join(known))
    host.run(["chmod", "0700", f"{HOME}/.ssh"])
