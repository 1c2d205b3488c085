"""Looks into a running cluster from outside, and breaks it: what serves leases, which keys live, what is left over.

Tests that kill what a cluster mends by itself take ``inside``; those that break its services take ``own_services``.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

#: Longest that anything may take to happen on a busy machine, seconds.
PATIENCE_S = 60.0
NODES = ("gpu-1", "gpu-2")
#: Room for the ledger of a cluster that tests break, several times what they write.
LEDGER_BYTES = 16 << 20
_PROGRAMS = {"sandbox": "ray_gpu.sandbox.child", "keeper": "ray_gpu.keeper"}


class Inside:
    """What a cluster is doing. Takes process ids from its supervisor and the rest from /proc and Vault."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self._root: Any = None

    # -- processes ------------------------------------------------------------------------------

    def lease(self, kind: str, node: str) -> list[int]:
        """Return the processes of a node's leases: ``"sandbox"`` or ``"keeper"``, without what confines them."""
        return [pid for pid in _below(self.custodian(node)) if _runs_module(pid, _PROGRAMS[kind])]

    def leases(self, kind: str = "sandbox") -> list[int]:
        """Return the processes of all nodes' leases."""
        return [pid for node in NODES for pid in self.lease(kind, node)]

    def actors(self, node: str) -> list[int]:
        """Return the Ray workers of a node that stand for leases."""
        return [pid for pid in _below(self.cluster.document["nodes"][node]) if "ray::GpuActor" in _command(pid)]

    def custodian(self, node: str) -> int:
        """Return a node's custodian."""
        return int(self.cluster.document["processes"][f"custodian-{node}"])

    def gateway(self) -> int:
        """Return the gateway, behind what confines it."""
        outside = int(self.cluster.document["processes"]["gateway"])
        return next(pid for pid in {outside} | _below(outside) if _runs_module(pid, "ray_gpu.gateway"))

    def relay(self) -> list[int]:
        """Return the zone's relay."""
        document = self.cluster.document
        if document["carrier"] == "client":
            # It is started again by itself, so not the one of the document.
            around = _below(document["pid"])
        else:
            around = _below(document["nodes"][f"zone-{self.cluster.zone}"])
        return [pid for pid in around if _runs_module(pid, "ray_gpu.relay")]

    def kill(self, pids: list[int]) -> None:
        """Kill processes, of which there must be some."""
        assert pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @staticmethod
    def cpu_ticks(pid: int) -> int:
        """Return the processor time that a process has used, in clock ticks; 0 when it is gone."""
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])
        return 0

    def busy_node(self, *nodes: str) -> str:
        """Wait until a sandbox that runs on one of *nodes*, all by default, computes; return its node."""
        before = {pid: (self.cpu_ticks(pid), node) for node in nodes or NODES for pid in self.lease("sandbox", node)}
        assert before
        busy: list[str] = []

        def one_is() -> bool:
            busy.extend(node for pid, (ticks, node) in before.items() if self.cpu_ticks(pid) > ticks + 5)
            return bool(busy)

        until(one_is, "a sandbox to compute")
        return busy[0]

    # -- keys and GPUs --------------------------------------------------------------------------

    def lease_keys(self) -> list[str]:
        """Return the names of all lease keys that Vault holds for the zone."""
        if self._root is None:
            self._root = self.vault().root_client()
        return list(self._root.lease_keys(self.cluster.zone))

    def vault(self) -> Any:
        """Return the embedded Vault server."""
        from ray_gpu.state import Layout
        from ray_gpu.vault_server import VaultServer

        server = VaultServer.find(Layout(self.cluster.state).vault)
        assert server is not None
        return server

    def gpus_taken(self) -> float:
        """Return how many GPUs Ray has given away."""
        with self.cluster.attach("look at the nodes") as zone:
            return float(sum(node["gpus"] - node["gpus_free"] for node in zone.status()["nodes"]))

    def nothing_left(self) -> None:
        """Wait until no lease has a process, a key or a GPU."""
        until(lambda: not self.leases("sandbox") and not self.leases("keeper"), "the end of all sandboxes and keepers")
        until(lambda: not self.lease_keys(), "the end of all lease keys")
        until(lambda: not self.gpus_taken(), "the return of all GPUs")

    def close(self) -> None:
        """Give the root token back."""
        root, self._root = self._root, None
        if root is not None:
            root.revoke()


def until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Wait for *condition*, asking often."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        select.select([], [], [], 0.02)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    return ""


def _runs_module(pid: int, module: str) -> bool:
    """Whether a process is Python itself with this module, not one of those that confine it."""
    words = _command(pid).split(" ")
    return Path(words[0]).name.startswith("python") and module in words


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text("ascii").split()]
    return []


def _below(root: int) -> set[int]:
    """Return every process below *root*, itself not."""
    children = _children(root)
    return {found for child in children for found in {child} | _below(child)}


class Background:
    """Runs one call in a thread, so that the test can do something to it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self.future: Future[Any] = self._pool.submit(call)
        self._pool.shutdown(wait=False)

    def result(self) -> Any:
        """Wait for what the call gives or raises."""
        return self.future.result(timeout=120)


class Services:
    """A cluster that tests may break, and start again."""

    def __init__(self, cluster: Any, look_inside: Callable[[Any], Any]) -> None:
        self.cluster = cluster
        self._look = look_inside
        self.inside = look_inside(cluster)

    def restart(self) -> None:
        """Stop what is left and start all of it again, on the same state."""
        from ray_gpu import embedded
        from zones.model import Carrier

        self.inside.close()
        embedded.down(self.layout)
        plan = embedded.Plan(
            state=str(self.cluster.state),
            zone=self.cluster.zone,
            policies=str(self.cluster.policies),
            data=False,
            carrier=Carrier(self.cluster.document["carrier"]),
        )
        self.cluster = dataclasses.replace(self.cluster, document=embedded.up(plan))
        self.inside = self._look(self.cluster)

    @property
    def layout(self) -> Any:
        """Paths of the cluster."""
        from ray_gpu.state import Layout

        return Layout(self.cluster.state)

    def works(self) -> bool:
        """Whether a new session makes a call."""
        from ray_gpu import gpu_remote

        with self.cluster.attach("does it work again") as zone:
            return bool(gpu_remote(session=zone)(lambda: 3).remote().result(timeout=90) == 3)

    @contextlib.contextmanager
    def vault_sealed(self) -> Iterator[None]:
        """Seal Vault for a while."""
        server = self.inside.vault()
        server.seal()
        try:
            yield
        finally:
            server.unseal()

    @contextlib.contextmanager
    def vault_frozen(self) -> Iterator[None]:
        """Stop Vault's process for a while: connections open and nothing answers."""
        pid = self.inside.vault().pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="session")
def look_inside() -> Iterator[Callable[[Any], Inside]]:
    """Return a function that looks into a cluster."""
    made: list[Inside] = []

    def look(cluster: Any) -> Inside:
        made.append(Inside(cluster))
        return made[-1]

    yield look
    for inside in made:
        with contextlib.suppress(Exception):  # the cluster may be gone with all its tokens
            inside.close()


@pytest.fixture
def inside(cluster: Any, look_inside: Callable[[Any], Inside]) -> Iterator[Inside]:
    """The shared cluster from inside; when the test is over, nothing of it may be left there."""
    looked = look_inside(cluster)
    yield looked
    looked.nothing_left()
    looked.close()


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Return a function that waits for a condition, for tests in other files."""
    return until


@pytest.fixture(scope="session")
def in_background() -> type[Background]:
    """Return what runs a call in a thread."""
    return Background


@pytest.fixture(scope="module")
def own_services(start_cluster: Callable[..., Any], look_inside: Callable[[Any], Any]) -> Iterator[Services]:
    """One cluster for this file. As root its ledger is on a small disk of its own."""
    mounted: list[Path] = []

    def small_disk(layout: Any) -> None:
        if os.geteuid() == 0:
            directory = layout.ledger("clinic").parent
            directory.mkdir(mode=0o700, parents=True)
            mounted.extend([directory] if _mount(directory) else [])

    with start_cluster(prepare=small_disk) as cluster:
        yield Services(cluster, look_inside)
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)
        shutil.rmtree(directory.parents[3], ignore_errors=True)


def _mount(directory: Path) -> bool:
    options = f"mode=0700,size={LEDGER_BYTES}".encode()
    failed = ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(directory), b"tmpfs", ctypes.c_ulong(0), options)
    return not failed
