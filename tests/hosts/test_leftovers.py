"""Nothing of a bed is left when it ends, or when its builder is killed; and what is others' stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from testbed import Host, HostProcess, Testbed, workplace
from tests.signals import hear_ctrl_c

ROOT = Path(__file__).parents[2]
#: Builds a bed with a program in each host, says where it is, and waits.
BUILDER = """
import signal, subprocess
from testbed import Testbed
with Testbed() as bed:
    running = [host.popen(["sh", "-c", "echo up; exec sleep 4713"], stdout=subprocess.PIPE) for host in bed]
    assert all(process.stdout.readline() for process in running)
    print(bed.path, *(host.pid for host in [bed.router, *bed]), flush=True)
    signal.pause()
"""
TIMEOUT_S = 20.0


def namespaces() -> set[str]:
    """Return every network namespace that a process is in."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(path))
    return found


def networks_of(pids: Iterable[object]) -> set[str]:
    """Return the network namespaces of these processes."""
    return {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}


def sleeping(host: Host) -> HostProcess:
    """Start a program that sleeps, and return when it does."""
    process = host.popen(["sh", "-c", "echo up; exec sleep 4714"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.stdout.close()
    return process


def links() -> set[str]:
    """Return the machine's own network interfaces."""
    return set(os.listdir("/sys/class/net"))


def groups(bed: Path) -> list[Path]:
    """Return a bed's control groups."""
    return list(Path("/sys/fs/cgroup").glob(f"**/{bed.name}"))


def test_nothing_left(can_build: None) -> None:
    """After a bed has ended there is no process, namespace, link, mount, directory or control group of it."""
    before = links()
    with Testbed() as bed:
        path, pids = bed.path, [host.pid for host in [bed.router, *bed]]
        sleeper, networks = sleeping(bed["gpu-1"]), networks_of(pids)
        assert len(networks) == len(pids)
        assert networks <= namespaces()
        assert links() == before  # not even while it runs

    assert sleeper.wait(TIMEOUT_S) != 0
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    assert networks & namespaces() == set()
    assert links() == before
    assert str(path) not in Path("/proc/mounts").read_text()
    assert not path.exists()
    assert groups(path) == []


def test_builder_killed(can_build: None) -> None:
    """A killed builder takes every process and namespace along; the next bed removes its directory and its groups."""
    before = links()
    builder = subprocess.Popen(
        [sys.executable, "-c", BUILDER],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with builder:
        assert builder.stdout is not None
        path, *pids = builder.stdout.readline().split()
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        networks = networks_of(pids)
        assert Path(path).name not in workplace.sweep()  # it lives
        builder.kill()

    deadline = time.monotonic() + TIMEOUT_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids) or networks & namespaces():
        assert time.monotonic() < deadline, "processes outlived their builder"
        time.sleep(0.01)
    assert links() == before
    assert Path(path).exists()  # control: there is something to sweep

    with Testbed():
        assert not Path(path).exists()
        assert groups(Path(path)) == []


def test_host_killed(can_build: None) -> None:
    """A host that is killed is gone at once with all its processes, and the others go on."""
    with Testbed() as bed:
        sleeper = sleeping(bed["gpu-2"])
        bed["gpu-2"].kill()

        assert sleeper.wait(TIMEOUT_S) == -signal.SIGKILL
        assert not bed["gpu-2"].alive()
        assert bed["gpu-1"].run(["hostname"]).stdout == "gpu-1\n"


def test_others_stay(can_build: None) -> None:
    """A directory that merely looks like a bed's stays: another user's, a link, one that is about to be locked."""
    parent = Path(tempfile.gettempdir())
    fresh, theirs, link = (parent / f"ray-gpu-testbed-{name}" for name in ("fresh", "theirs", "link"))
    try:
        fresh.mkdir()
        theirs.mkdir()
        (theirs / "lock").touch()
        os.chown(theirs, 65534, 65534)
        link.symlink_to(theirs)

        workplace.sweep()
        assert link.is_symlink()
        assert fresh.exists()
        assert theirs.exists()
    finally:
        link.unlink(missing_ok=True)
        fresh.rmdir()
        (theirs / "lock").unlink()
        theirs.rmdir()


def test_command(can_build: None) -> None:
    """``python -m testbed`` says how to enter each host, the line works, and Ctrl-C takes all of it down."""
    command = [sys.executable, "-m", "testbed"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=hear_ctrl_c) as shown:
        assert shown.stdout is not None
        lines: list[str] = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(shown.stdout.readline())
            assert lines[-1], "it ended early"
        (at,) = [index for index, line in enumerate(lines) if line.startswith("gpu-1")]
        entered = subprocess.run(["sh", "-c", f"{lines[at + 1].strip()} -c hostname"], capture_output=True, text=True)
        shown.send_signal(signal.SIGINT)
        rest = shown.stdout.read()

    assert entered.stdout == "gpu-1\n", entered.stderr
    assert (shown.returncode, rest) == (0, "down\n")


def test_without_root() -> None:
    """Without root, it says what is missing and does nothing."""
    code = "import os, testbed; os.setuid(65534); print(testbed.lacking())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if os.geteuid() != 0:
        pytest.skip("needs root, to give it up")

    assert "needs root" in done.stdout, done.stderr
