"""Layers back each other up, so each is tried alone: what it is for fails with it, and goes through with none."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
from pathlib import Path

import pytest

from ray_gpu.sandbox import cgroup, profile, survey
from tests.sandbox.test_boundary import HERE, PROJECT, SITE, python_for_others

USER_UID = 61996
#: For each control what it alone refuses: (the layer's name in layers.py, attempts). Tried without privilege.
BY_ANYBODY: dict[str, tuple[str, list[str]]] = {
    "no-namespaces": ("namespaces", [
        "write /var/tmp", "write /dev/shm", "write host directory", "read host file", "read POSIX shared memory",
        "read /proc/1", "program in memory reads", "tcp", "tcp over IPv6", "169.254.169.254", "unix socket",
        "abstract socket", "datagram by socketpair", "list the host's sockets", "read process memory", "ptrace",
        "process_vm_readv", "signal", "System V shared memory", "System V semaphore", "POSIX message queue",
    ]),
    "no-seccomp": ("seccomp", [
        "tcp", "udp", "tcp over IPv6", "udp over IPv6", "listen", "netlink", "169.254.169.254", "unix socket",
        "abstract socket", "datagram by socketpair", "ptrace", "process_vm_readv", "process_vm_writev",
        "descriptor of another process", "user namespace", "clone user namespace", "clone3 user namespace", "keyctl",
        "add_key", "io_uring", "userfaultfd", "System V shared memory", "System V semaphore", "System V message queue",
        "POSIX message queue", "become dumpable",
    ]),
    "no-landlock": ("landlock", [
        "write /var/tmp", "write /dev/shm", "write host directory", "read host file", "read /etc/passwd",
        "read POSIX shared memory", "read /proc/1", "program in memory reads", "program in memory writes", "fill /tmp",
        "tcp", "tcp over IPv6", "listen", "169.254.169.254", "abstract socket", "read process memory",
        "write process memory", "read process environment", "ptrace", "process_vm_readv", "signal",
    ]),
    "no-core": ("limits", ["raise core limit", "unmask core", "leave a core"]),
    "no-descriptors": ("descriptors", ["inherited descriptor"]),
}  # fmt: skip
#: The same for what only root has to give.
BY_ROOT: dict[str, tuple[str, list[str]]] = {
    "no-cgroup": ("cgroup", ["memory bomb", "memory bomb in a file", "fork bomb"]),
    "shared-uid": ("uid", [
        "read process memory", "write process memory", "read process environment", "process_vm_readv", "ptrace",
        "signal", "signal by pidfd", "descriptor of another process",
    ]),
}  # fmt: skip
CASES = [
    pytest.param(who, layer, attempt, id=f"{control}-{attempt}")
    for who, table in (("anybody", BY_ANYBODY), ("root", BY_ROOT))
    for control, (layer, attempts) in table.items()
    for attempt in attempts
]

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the probe's system call numbers are x86_64's"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes another uid"),
]


@functools.cache
def _outcomes(who: str) -> dict[str, dict[str, str]]:
    """Return what became of every attempt, for each layer alone."""
    table = BY_ANYBODY if who == "anybody" else BY_ROOT
    wanted = {"uid": USER_UID if who == "anybody" else None, "site": str(SITE), "layers": dict(table.values())}
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{PROJECT}:{SITE}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python_for_others(), str(HERE / "layers.py"), json.dumps(wanted)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, str]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(("who", "layer", "attempt"), CASES)
def test_layer_alone_holds(who: str, layer: str, attempt: str) -> None:
    """One layer refuses what it is for when all others are off; with it off too, the attempt goes through."""
    if layer == "cgroup" and cgroup.hierarchy() is None:
        pytest.skip("needs a writable memory cgroup")
    outcomes = _outcomes(who)
    if attempt not in outcomes["none"]:
        pytest.skip("no IPv6 here")

    assert outcomes["none"][attempt] == "done"
    assert outcomes[layer][attempt].startswith("refused")


def test_capability_past_file_permissions(tmp_path: Path) -> None:
    """Without the capability a sandbox's uid cannot read a file of root's alone; with it, the same process can."""
    secret = tmp_path / "secret"
    secret.write_text("secret", encoding="ascii")
    secret.chmod(0o600)
    wanted = profile.Profile(name="reader", kind="sandbox", uid=61007)

    def read(capability: str | None) -> str:
        command = [*survey.drop(wanted, capability), "/bin/cat", str(secret)]
        return subprocess.run(command, env={}, capture_output=True, text=True, timeout=60, check=False).stdout

    assert read("dac_read_search") == "secret"
    assert read(None) == ""
