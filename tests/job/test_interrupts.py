"""Ctrl-C and ``kill -9``: whatever a process started is gone afterwards, and its lease keys are shredded."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.signals import hear_ctrl_c

ROOT = Path(__file__).resolve().parents[2]

#: A notebook that computes for ever, in the way that its first argument says.
NOTEBOOK = """
import sys
import ray_gpu

@ray_gpu.gpu_remote(columns=["mdvis"])
def warm(batch):
    return batch["mdvis"]

@ray_gpu.gpu_remote(columns=["mdvis"])
def loop_on_rows(batch):
    while True:
        pass

@ray_gpu.gpu_remote
def loop():
    while True:
        pass

def run(zone, how):
    warm.map(zone.read("randhie", columns=["mdvis"]))
    print("session", zone.status()["session"], flush=True)
    if how == "map":
        loop_on_rows.map(zone.read("randhie", columns=["mdvis"]))
    calls = [loop.remote() for _ in range(2)]
    calls[0].result()

how, state = sys.argv[1:]
zone = ray_gpu.attach("clinic", purpose="interrupted", state_dir=state)
if how == "bare":
    run(zone, "remote")
with zone:
    run(zone, how)
"""


def _start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a program in a process group of its own, as a terminal would."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, "RAY_GPU_PROGRESS": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
        preexec_fn=hear_ctrl_c,
    )


@contextlib.contextmanager
def _busy_notebook(inside: Any, how: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a notebook until a sandbox computes for it; gives its process and session."""
    notebook = _start(["-c", NOTEBOOK, how, str(inside.cluster.state)])
    try:
        assert notebook.stdout is not None
        word, session = notebook.stdout.readline().split()
        assert word == "session"
        inside.busy_node()
        yield notebook, session
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(notebook.pid, signal.SIGKILL)
        notebook.wait()
        assert notebook.stdout is not None
        notebook.stdout.close()


@pytest.mark.parametrize("how", ["map", "remote", "bare"])
def test_ctrl_c_in_a_notebook(inside: Any, how: str) -> None:
    """Ctrl-C ends call and process soon; when the process is gone, so are leases, keys and GPUs."""
    with _busy_notebook(inside, how) as (notebook, session):
        os.killpg(notebook.pid, signal.SIGINT)
        said, _ = notebook.communicate(timeout=60)

        assert notebook.returncode != 0
        assert said.rstrip().endswith("KeyboardInterrupt")
        if how != "bare":
            # The context manager returned only when everything was over.
            assert not inside.leases("sandbox")
            assert not inside.lease_keys()
    inside.nothing_left()
    assert len(inside.cluster.entries("session-end", session=session)) == 1


def test_killed_notebook(inside: Any, wait_until: Callable[..., None]) -> None:
    """A notebook that is killed ends its session all the same, and the next one works."""
    from ray_gpu import gpu_remote

    with _busy_notebook(inside, "remote") as (notebook, session):
        notebook.kill()
        notebook.wait(60)

        wait_until(lambda: inside.cluster.entries("session-end", session=session), "the end of the session")
    inside.nothing_left()

    @gpu_remote
    def works() -> bool:
        return True

    with inside.cluster.attach("after a killed one") as zone:
        assert works.options(session=zone).remote().result(timeout=60)


# -- the demo ---------------------------------------------------------------------------------------


@pytest.fixture
def state(small_state: Callable[[], AbstractContextManager[Path]]) -> Iterator[Path]:
    """A state directory for a demo of its own, small data already in it."""
    with small_state() as directory:
        yield directory
        for pid in _mentioning(directory.parent):
            os.kill(pid, signal.SIGKILL)


def _mentioning(root: Path) -> list[int]:
    """Return processes that name a path below *root* in their command, or have it open."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            files = [os.readlink(fd) for fd in (entry / "fd").iterdir()]
            if int(entry.name) != os.getpid() and (
                os.fsencode(f"{root}/") in command or any(name.startswith(f"{root}/") for name in files)
            ):
                found.append(int(entry.name))
    return found


def _lease_keys(state: Path) -> list[str]:
    """Start the Vault of a state directory alone, and return the names of all lease keys in it."""
    from ray_gpu.state import Layout
    from ray_gpu.vault_server import VaultServer

    server = VaultServer.start(Layout(state).vault)
    try:
        root = server.root_client()
        keys = list(root.lease_keys("clinic"))
        root.revoke()
        return keys
    finally:
        server.stop()


@pytest.mark.parametrize(
    "when", ["Vault", *(pytest.param(later, marks=pytest.mark.chaos) for later in ("nodes", "attached"))]
)
def test_ctrl_c_in_the_demo(state: Path, when: str, wait_until: Callable[..., None]) -> None:
    """Ctrl-C while the demo starts or runs: it stops all that it started, and its keys are shredded."""
    from ray_gpu.state import Layout

    layout = Layout(state)
    reached: dict[str, Callable[[], bool]] = {
        "Vault": lambda: (layout.vault / "server.json").exists(),
        "nodes": lambda: layout.gateway_socket("clinic").parent.exists(),
        "attached": lambda: layout.ledger("clinic").exists() and _intents(layout.ledger("clinic")) > 0,
    }
    demo = _start(["-c", "from ray_gpu.cli import main; main()", "demo"], RAY_GPU_STATE=str(state))
    try:
        wait_until(lambda: reached[when]() or demo.poll() is not None, f"the demo to reach {when}", timeout_s=120)
        os.killpg(demo.pid, signal.SIGINT)
        started = time.monotonic()
        said, _ = demo.communicate(timeout=90)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)
        demo.wait()

    assert demo.returncode != 0, said
    assert "Traceback" not in said
    assert time.monotonic() - started < 60
    wait_until(lambda: not _mentioning(state.parent), "the end of everything that the demo started")
    if (layout.vault / "unseal.key").exists() and when != "Vault":
        assert _lease_keys(state) == []


@pytest.mark.chaos
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda how: how.name)
def test_demo_that_is_ended(state: Path, how: signal.Signals, wait_until: Callable[..., None]) -> None:
    """A closed terminal or a kill ends what the demo started as well: the cluster's life is tied to its."""
    from ray_gpu.state import Layout

    layout = Layout(state)
    demo = _start(["-c", "from ray_gpu.cli import main; main()", "demo"], RAY_GPU_STATE=str(state))
    try:
        wait_until(
            lambda: (
                (layout.ledger("clinic").exists() and _intents(layout.ledger("clinic")) > 0) or demo.poll() is not None
            ),
            "the demo to send something",
            timeout_s=120,
        )
        demo.send_signal(how)
        demo.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)
        demo.wait()

    assert demo.returncode == -how
    wait_until(lambda: not _mentioning(state.parent), "the end of everything that the demo started")
    assert _lease_keys(state) == []


def _intents(ledger: Path) -> int:
    from zones.ledger import read

    with contextlib.suppress(Exception):  # it is only being made
        return sum(entry["kind"] == "intent" for entry in read(ledger))
    return 0
