"""SSH goes from the operator and the head to the pool, by the launcher's key alone, and never to a zone."""

from __future__ import annotations

import subprocess

import pytest

from testbed import Host, Testbed
from testbed.host import HOME
from testbed.ssh import KNOWN_HOSTS, LAUNCHER_KEY

OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=2", "-o", "IdentitiesOnly=yes")


def ssh(host: Host, target: str, *command: str, key: str = LAUNCHER_KEY) -> subprocess.CompletedProcess[str]:
    """Run a command by SSH from *host*, with the host keys that it knows."""
    return host.run(["ssh", *OPTIONS, "-i", key, f"root@{target}", *command], check=False)


@pytest.mark.parametrize("target", ["head", "gpu-1", "gpu-2"])
def test_operator_gets_in(bed: Testbed, target: str) -> None:
    """The operator runs commands on each host of the pool, and knows the host by its key."""
    done = ssh(bed["operator"], target, "hostname")

    assert (done.returncode, done.stdout.strip()) == (0, target), done.stderr


def test_login_shell(bed: Testbed) -> None:
    """A login shell on a terminal, which is how Ray's launcher runs commands, finds this Python's programs."""
    command = ("-tt", *OPTIONS, "-i", LAUNCHER_KEY, "root@gpu-1", "bash --login -c -i 'command -v ray'")
    done = bed["operator"].run(["ssh", *command], check=False)

    assert (done.returncode, done.stdout.strip()[-8:]) == (0, "/bin/ray"), done.stderr


def test_zone_is_refused(bed: Testbed) -> None:
    """A zone that has the launcher's key gets no connection; control: by the same means it gets in without rules."""
    zone = bed["zone-clinic"]
    for path in (LAUNCHER_KEY, KNOWN_HOSTS):
        zone.write(path, bed["operator"].read(path), mode=0o600)
    try:
        refused = ssh(zone, "gpu-1", "hostname")
        for host in (zone, bed.router, bed["gpu-1"]):
            host.flush_rules()
        control = ssh(zone, "gpu-1", "hostname")
    finally:
        bed.load_firewalls()
        zone.run(["rm", "-r", f"{HOME}/.ssh"])

    assert refused.returncode == 255
    assert "timed out" in refused.stderr
    assert control.stdout.strip() == "gpu-1", control.stderr


def test_only_the_launchers_key(bed: Testbed) -> None:
    """Another key does not open a host of the pool."""
    operator = bed["operator"]
    operator.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{HOME}/other"])
    done = ssh(operator, "gpu-1", "hostname", key=f"{HOME}/other")

    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr


@pytest.mark.parametrize("name", ["zone-clinic", "zone-trading", "vault", "operator"])
def test_no_sshd_elsewhere(bed: Testbed, name: str) -> None:
    """Zones, the vault and the operator have no sshd, and no key that opens them exists."""
    assert "sshd" not in bed[name].run(["ps", "ax", "-o", "args"]).stdout
    assert bed[name].run(["test", "-e", "/etc/ssh/authorized_keys"], check=False).returncode == 1


def test_keys_are_private(bed: Testbed) -> None:
    """Private keys lie where only root can read them, on the machine and in the hosts."""
    assert bed.launcher.path.stat().st_mode & 0o777 == 0o600
    assert bed.launcher.path.parent.stat().st_mode & 0o777 == 0o700
    assert bed["operator"].run(["stat", "-c", "%a", LAUNCHER_KEY]).stdout.strip() == "600"
