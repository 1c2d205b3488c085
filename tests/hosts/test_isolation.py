"""A host has its own processes, files, shared memory and name, and its programs end as their callers expect."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from testbed import Host, Testbed
from zones.errors import ClusterError

PYTHON = "python"
#: Makes a System V segment with a key, or says whether there is one.
SYSV = "import ctypes; print(ctypes.CDLL(None).shmget(4711, 4096, {flags}) >= 0)"
IPC_CREAT = 0o1000


@pytest.fixture
def pair(bed: Testbed) -> tuple[Host, Host]:
    """Two hosts of one role."""
    return bed["gpu-1"], bed["gpu-2"]


@pytest.mark.parametrize(
    "place", ["/tmp", "/dev/shm", "/run", "/var/lib/ray-gpu", "/etc", "/root", "/var/tmp", "/home"]
)
def test_files(pair: tuple[Host, Host], place: str) -> None:
    """What one host writes, it reads, and neither another host nor the machine does."""
    path = f"{place}/of-one-host"
    pair[0].write(path, "here")

    assert pair[0].read(path) == "here"
    assert pair[1].run(["test", "-e", path], check=False).returncode == 1
    assert not Path(path).exists()


def test_machine_files(bed: Testbed, tmp_path: Path) -> None:
    """A host sees this project, and nothing else of the machine's own files; it can change neither."""
    (tmp_path / "secret").write_text("x")
    host = bed["head"]

    assert host.run(["cat", tmp_path / "secret"], check=False).returncode == 1
    assert host.run(["head", "-1", __file__]).stdout.startswith('"""A host')
    assert "Read-only" in host.run(["touch", __file__], check=False).stderr
    assert "Read-only" in host.run(["touch", "/usr/bin/x"], check=False).stderr
    assert set(host.run(["ls", "/etc/ssh"]).stdout.split()) == {"host_key", "authorized_keys", "sshd_config"}


def test_processes(pair: tuple[Host, Host]) -> None:
    """A host sees its own processes alone; its first one is the bed's, and collects what nobody waits for."""
    with pair[0].popen(["sh", "-c", "echo up; exec sleep 4711"], stdout=subprocess.PIPE) as sleeper:
        assert sleeper.stdout is not None
        sleeper.stdout.readline()
        own, others = (host.run(["ps", "ax", "-o", "pid,args"]).stdout for host in pair)
        sleeper.kill()

    assert "4711" in own
    assert "4711" not in others
    assert re.search(r"^ *1 .*testbed/init.py$", own, re.MULTILINE)

    # The shell's child outlives it, and is the first process's then.
    orphan = pair[0].run(["sh", "-c", "sleep 0.1 & echo $!"]).stdout.strip()
    pair[0].run(["sh", "-c", f"while [ -e /proc/{orphan} ]; do sleep 0.01; done"], timeout_s=10.0)


def test_system_v_memory(pair: tuple[Host, Host]) -> None:
    """System V shared memory of one host is none of another's, nor of the machine's."""
    made = pair[0].run([PYTHON, "-c", SYSV.format(flags=IPC_CREAT | 0o600)]).stdout

    assert made.strip() == "True"
    assert pair[0].run([PYTHON, "-c", SYSV.format(flags=0)]).stdout.strip() == "True"
    assert pair[1].run([PYTHON, "-c", SYSV.format(flags=0)]).stdout.strip() == "False"
    assert ctypes.CDLL(None).shmget(4711, 4096, 0) < 0


def test_names(bed: Testbed) -> None:
    """A host knows its own name and everybody's address, and asks no name server."""
    host = bed["zone-clinic"]

    assert host.run(["hostname"]).stdout.strip() == "zone-clinic"
    for other in bed:
        assert host.run(["getent", "ahosts", other.name]).stdout.split()[0] == other.address
    assert "nameserver" not in host.read("/etc/resolv.conf")


def test_groups(pair: tuple[Host, Host]) -> None:
    """A host makes control groups where it expects them, and does not see another's."""
    find = "from ray_gpu.sandbox.cgroup import hierarchy; print((h := hierarchy()) and h.memory)"
    found = pair[0].run([PYTHON, "-c", find]).stdout.strip()
    if found == "None":
        pytest.skip("this machine has no control groups for memory that root can write to")
    pair[0].run(["mkdir", f"{found}/only-here"])

    assert pair[1].run(["test", "-e", f"{found}/only-here"], check=False).returncode == 1
    pair[0].run(["rmdir", f"{found}/only-here"])


def test_this_project_runs(bed: Testbed) -> None:
    """The project can be imported in a host, from the same files, by any uid."""
    code = "import ray_gpu; print(ray_gpu.__file__)"

    for uid in (None, 61100):
        assert bed["zone-clinic"].run([PYTHON, "-c", code], uid=uid).stdout.strip() == str(
            Path(__file__).parents[2] / "ray_gpu/__init__.py"
        )


def test_run_raises(bed: Testbed) -> None:
    """A program that fails, or takes too long, raises with the host's name and what it said."""
    with pytest.raises(ClusterError, match=r"vault: sh ended with status 3: oh"):
        bed["vault"].run(["sh", "-c", "echo oh >&2; exit 3"])
    with pytest.raises(ClusterError, match=r"vault: sleep did not end within 0.2 s"):
        bed["vault"].run(["sleep", "4712"], timeout_s=0.2)
    assert "4712" not in bed["vault"].run(["ps", "ax", "-o", "args"]).stdout


def test_signals_reach_the_program(bed: Testbed) -> None:
    """``terminate`` is seen by the program in the host, and its exit status is the process's."""
    script = "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done"
    with bed["vault"].popen(["sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()

        assert process.wait(10) == 7


def test_write_mode(bed: Testbed) -> None:
    """A file gets the mode and the owner asked for."""
    bed["head"].write("/run/secret/token", "x", mode=0o600, uid=61001)

    assert bed["head"].run(["stat", "-c", "%a %u", "/run/secret/token"]).stdout.strip() == "600 61001"
