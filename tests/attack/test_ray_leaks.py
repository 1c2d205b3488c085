"""P1: where Ray writes what passes it. A careless driver's canaries are all over stock Ray, and not where ours runs.

Payload never goes through Ray, see tests/proofs/test_canaries.py; this is the second line: what if some did.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ray_gpu import cage, services
from ray_gpu.nodes import Cluster, free_base_port
from ray_gpu.ports import NodePorts
from ray_gpu.raylet import NodeSpec
from tests.proofs.attacked import all_powerful, below, command
from tests.proofs.memory_search import search
from zones.errors import ClusterError

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(not all_powerful(), reason="needs root with all capabilities: enters a cage, reads memory"),
]
TIMEOUT_S = 90.0
#: What Ray's documentation shows, with a canary in each; it comes by standard input, so that no command line has it.
CARELESS = """
import contextlib, logging, sys
import numpy as np
import ray
mark = sys.stdin.readline().strip()
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=True)
@ray.remote(num_cpus=0)
def speak(mark):
    print(mark + "-print", flush=True)
    logging.getLogger().warning(mark + "-logging")
@ray.remote(num_cpus=0, max_retries=0)
def fail(mark):
    raise ValueError(mark + "-exception")
@ray.remote(num_cpus=0)
class Broken:
    def __init__(self, mark):
        raise ValueError(mark + "-constructor")
ray.get(speak.remote(mark))
failed = fail.options(name=mark + "-taskname").remote(mark)
ray.wait([failed])
broken = Broken.remote(mark)
ray.wait([broken.__ray_ready__.remote()])
with_variable = speak.options(runtime_env={"env_vars": {"CANARY": mark + "-variable"}}).remote("")
ray.wait([with_variable], timeout=60)
kept = []
with contextlib.suppress(Exception):
    for _ in range(8):
        kept.append(ray.put(np.frombuffer((mark + "-stored ").encode() * 600_000, np.uint8)))
print("careless", flush=True)
sys.stdin.read()
"""
#: Stock Ray, with its log monitor.
_STOCK = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]


@dataclass(slots=True, kw_only=True)
class Driven:
    """A Ray node that a careless driver used, seen by root of its host."""

    #: Its session directory.
    session: Path
    #: Its first process.
    root: int
    mark: str = field(default_factory=lambda: secrets.token_hex(12))
    since: float = field(default_factory=lambda: time.time() - 1.0)
    #: What the driver was shown.
    said: list[str] = field(default_factory=list)

    def pids(self) -> list[int]:
        """Return the processes of the node."""
        return [self.root, *below(self.root)]

    def in_files(self, word: str) -> bool:
        """Whether a file of the session has this canary."""
        return bool(search(f"{self.mark}-{word}", (), since=0, trees=[self.session]).hits)

    def in_gcs(self, word: str) -> bool:
        """Whether the control store's memory has this canary."""
        (gcs,) = [pid for pid in self.pids() if "gcs_server" in (command(pid) or [""])[0]]
        return bool(search(f"{self.mark}-{word}", [gcs], since=self.since, places=frozenset({"memory"})).hits)

    def on_disk(self) -> bool:
        """Whether a process of the node has a file open for writing, or mapped, that is on a disk, deleted or not."""
        disk = os.stat("/usr").st_dev, os.stat(tempfile.gettempdir()).st_dev
        for pid in self.pids():
            for link in [*Path(f"/proc/{pid}/fd").glob("*"), *Path(f"/proc/{pid}/map_files").glob("*")]:
                with contextlib.suppress(OSError):
                    found = link.stat()
                    writable = bool(link.lstat().st_mode & stat.S_IWUSR)
                    if stat.S_ISREG(found.st_mode) and found.st_dev in disk and writable:
                        return True
        return False

    def writes_cores(self) -> bool:
        """Whether the kernel may write a core of one of the processes."""
        limits = [Path(f"/proc/{pid}/limits").read_text(encoding="ascii") for pid in self.pids() if command(pid)]
        return any(not re.search(r"Max core file size +0 +0 ", text) for text in limits)

    def reports_usage(self) -> bool:
        """Whether one of Ray's own programs is not told to keep its usage statistics to itself."""
        told = [
            Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            for pid in self.pids()
            if any(word in " ".join(command(pid) or []) for word in ("/raylet", "gcs_server"))
        ]
        assert told
        return any(b"RAY_USAGE_STATS_ENABLED=0" not in variables for variables in told)

    def open_to_others(self) -> bool:
        """Whether another user of the host may list the session, by the modes of all that leads there."""
        inside = self.session / "session_latest"
        return all(path.stat().st_mode & stat.S_IXOTH for path in (self.session.parent, self.session, inside))


#: Row of Ray's leak map to whether it leaks on a node.
LEAKS: dict[str, Callable[[Driven], bool]] = {
    "prints in worker logs": lambda node: node.in_files("print"),
    "logging in worker logs": lambda node: node.in_files("logging"),
    "constructor's exception in logs": lambda node: node.in_files("constructor"),
    "prints at every driver": lambda node: any(node.mark + "-print" in line for line in node.said),
    "exception text in the control store": lambda node: node.in_gcs("exception"),
    "task names in the control store": lambda node: node.in_gcs("taskname"),
    "variables of a runtime_env in its agent's log": lambda node: node.in_files("variable"),
    "objects in spill files": lambda node: node.in_files("stored"),
    "files on a disk": Driven.on_disk,
    "core files": Driven.writes_cores,
    "session directory": Driven.open_to_others,
    "usage statistics": Driven.reports_usage,
}


@contextlib.contextmanager
def driving(node: Driven, prefix: list[str], address: str, own: str, environment: dict[str, str]) -> Iterator[None]:
    """Run the careless driver until it has left its canaries everywhere; it stays, so that all is still referenced."""
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", CARELESS, address, own],
        env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as driver:  # fmt: skip
        assert driver.stdin is not None
        assert driver.stdout is not None
        driver.stdin.write(f"{node.mark}\n")
        driver.stdin.flush()
        while not node.said or node.said[-1] != "careless\n":
            line = driver.stdout.readline()
            assert line, f"the driver ended: {node.said[-5:]}"
            node.said.append(line)
        yield
        driver.stdin.close()


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """Make a directory on the disk: short, for Ray's socket paths, and open to the cages' uids."""
    path = Path(tempfile.mkdtemp(prefix="rgl"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextlib.contextmanager
def cores_wanted() -> Iterator[None]:
    """Lift the limit on core files for what is started meanwhile, as Ray's cluster launcher does."""
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limit[1], limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limit)


@pytest.fixture(scope="module")
def product() -> Iterator[Driven]:
    """This product's node, with a driver in its cage."""
    with directory() as root:
        sockets = root / "d"
        sockets.mkdir(mode=0o755)
        spec = NodeSpec(name="head", address="127.0.61.1", role="head", labels={}, socket_dir=sockets)
        with cores_wanted():
            cluster = Cluster.start(root / "s", [spec], base_port=free_base_port())
        with contextlib.ExitStack() as stack:
            stack.callback(cluster.stop)
            first = cage.main_process(cluster.nodes[0].process)
            if first is None:
                pytest.skip("needs namespaces: without them a cage's processes cannot be told from others")
            uid = os.stat(f"/proc/{first}").st_uid
            prefix = ["nsenter", f"--target={first}", "--mount", "--pid", "--ipc", "--net", "--"]
            prefix += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
            lines = Path(f"/proc/{first}/environ").read_text(encoding="utf-8").strip("\0").split("\0")
            node = Driven(session=Path(f"/proc/{first}/root", "s/ray/ray"), root=first)
            environment = dict(line.split("=", 1) for line in lines)
            stack.enter_context(driving(node, prefix, cluster.address, spec.address, environment))
            yield node


@pytest.fixture(scope="module")
def stock() -> Iterator[Driven]:
    """Stock Ray as its documentation starts it, but for ports, and a store that the driver can fill."""
    ports, address = NodePorts.of(free_base_port(), 0), "127.0.62.1"
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    # Where it would report to, does not answer.
    environment |= {"RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/"}
    with directory() as root, contextlib.ExitStack() as stack:
        command = [*_STOCK, *ports.flags(), f"--port={ports.gcs}", f"--node-ip-address={address}"]
        command += [f"--temp-dir={root}/r", "--object-store-memory=80000000"]
        null = subprocess.DEVNULL
        with cores_wanted():
            process = subprocess.Popen(
                command, env=environment, stdin=null, stdout=null, stderr=null, start_new_session=True
            )
        node = Driven(session=root / "r", root=process.pid)
        stack.callback(end, process)
        services.await_until(
            lambda: answers(address, ports.last_to_open),
            check=lambda: None,
            timeout_s=TIMEOUT_S,
            failure=ClusterError("stock Ray did not start", node="", reason="timed out"),
        )
        stack.enter_context(driving(node, [], f"{address}:{ports.gcs}", address, environment))
        yield node


def answers(address: str, port: int) -> bool:
    """Whether a port accepts connections."""
    with contextlib.suppress(OSError):
        socket.create_connection((address, port), timeout=1).close()
        return True
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    """End stock Ray: its processes leave the process group, and each is below the first."""
    family = [process.pid, *below(process.pid)]
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    process.wait()


@pytest.mark.parametrize("leak", LEAKS)
def test_stock_ray_leaks(stock: Driven, leak: str) -> None:
    """Control: where stock Ray runs, the same look at the same driver's doings finds it."""
    assert LEAKS[leak](stock)


@pytest.mark.parametrize("leak", LEAKS)
def test_closed(product: Driven, leak: str) -> None:
    """Not so where this product's Ray runs."""
    assert not LEAKS[leak](product)


def test_the_driver_was_careless(product: Driven, stock: Driven) -> None:
    """On both, every canary went into Ray: the driver came to its end, and Ray's processes have what it stored."""
    for node in (product, stock):
        for word in ("constructor", "stored", "variable"):
            found = search(f"{node.mark}-{word}", node.pids(), since=node.since)

            assert found.hits, word
