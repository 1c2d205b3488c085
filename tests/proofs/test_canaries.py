"""P1 and P2: no process of Ray ever holds plaintext, and outside the zone nobody does but a lease's keeper and sandbox.

Canaries stand in every kind of plaintext. The same search finds those that plain Ray was given in the same cage.
"""

from __future__ import annotations

import base64
import contextlib
import io
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import ray_gpu
from tests.proofs.attacked import Attacked, all_powerful, command
from tests.proofs.memory_search import PROCESS_PLACES, Search, search

NODES = ("gpu-1", "gpu-2")
#: What the processes of a cage can write to.
WRITABLE = ("s", "tmp", "dev/shm")
#: Every place that is searched for what Ray has.
PLACES = PROCESS_PLACES | set(WRITABLE)
#: What the control plants in each of them and nowhere else: the word that follows its canary.
PLANTED = {
    "memory": "memory",
    "map_files": "mapped",
    "fd": "opened",
    "s": "session",
    "tmp": "tmp",
    "dev/shm": "shm",
}
#: The custodian learns of a session's end from the keeper or the actor, whichever is first; seconds.
GONE_TIMEOUT_S = 5.0
#: What must be among the processes that were searched, or the search proves nothing.
RAY = {"raylet": 3, "gcs_server": 1, "ray::RuntimeEnvAgent": 3, "ray::GpuActor": 2, "ray_gpu.relay": 1}
#: Plain Ray as anybody with the cluster's token can use it. The canary comes by standard input, so that no command
#: line has it, and what it plants stays referenced.
PLAIN_RAY = """
import sys, ray
mark = sys.stdin.readline().strip()
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False)
stored = ray.put((mark + "-object ") * 10_000)
captured = mark + "-closure"
class Plain:
    def __init__(self):
        self.captured = captured
    def show(self, argument):
        self.shown = argument + "-print"
        print(self.shown, flush=True)
    def fail(self, argument):
        raise ValueError((argument + "-exception ") * 10_000)
    def give(self, argument):
        return (argument + "-result ") * 10_000
    def plant(self, argument):
        import ctypes, os
        self.kept = bytearray((argument + "-memory").encode())
        def written(path, word):
            fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
            # In two parts, so that both together are in the file and not in this memory.
            os.write(fd, argument.encode())
            os.write(fd, word)
            return fd
        for directory, word in ("/s/ray", b"-session"), ("/tmp", b"-tmp"), ("/dev/shm", b"-shm"):
            os.close(written(directory + "/planted", word))
        self.opened = written("/tmp/opened", b"-opened")
        mapped = written("/tmp/mapped", b"-mapped")
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        # Mapped and never touched: no page of it is in this process's memory. mmap.mmap() would keep it open, too.
        self.mapped = libc.mmap(None, ctypes.c_size_t(4096), 1, 1, mapped, ctypes.c_long(0))
        os.close(mapped)
        for name in "opened", "mapped":
            os.unlink("/tmp/" + name)
actor = ray.remote(num_cpus=0, label_selector={"ray-gpu-node": "gpu-1"})(Plain).remote()
ray.get(actor.show.remote(mark))
failed = actor.fail.remote(mark)
ray.wait([failed])
given = actor.give.remote(mark)
ray.wait([given])
ray.get(actor.plant.remote(mark))
print("planted", flush=True)
sys.stdin.read()
"""

#: A global of a function that is sent.
GLOBAL = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A session that sent canaries in every way there is, and what was found while it lasted and after it."""

    result: pa.Table
    printed: str
    error: str
    nodes: list[str]
    #: Command lines of the processes that were searched, in one text.
    searched: str
    ray: Search
    custodians: Search
    leases: Search
    #: Of keepers and sandboxes that were there, those that outlived the session.
    left: list[int]
    ray_after: Search
    custodians_after: Search


@pytest.fixture(scope="module")
def run(attacked: Attacked) -> Run:
    """Plant, search, end the session, search again."""
    if not all_powerful():
        pytest.skip("needs root with all capabilities: reads the memory of other uids' processes")
    if "uncaged-ray" in attacked.document["degradations"]:
        pytest.skip("needs namespaces: without them a cage's processes cannot be told from others")
    since, mark = time.time() - 1.0, attacked.mark
    with pytest.MonkeyPatch.context() as patch, attacked.attach() as session:
        patch.setattr(sys.modules[__name__], "GLOBAL", f"{mark}-global")
        came_back = plant(session, mark)
        pids = [pid for node in NODES for pid in attacked.leases(node)]
        found: dict[str, Any] = {
            "nodes": [lease["node"] for lease in session.status()["leases"]],
            "searched": "\n".join(" ".join(command(pid)) for pids in attacked.caged().values() for pid in pids),
            "ray": search_ray(attacked, mark, since),
            "custodians": search_custodians(attacked, mark, since),
            "leases": search(mark, pids, since=since),
        }
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while any(command(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    return Run(
        **came_back,
        **found,
        left=[pid for pid in pids if command(pid)],
        ray_after=search_ray(attacked, mark, since),
        custodians_after=search_custodians(attacked, mark, since),
    )


def plant(session: ray_gpu.Session, mark: str) -> dict[str, Any]:
    """Send canaries out in every way and bring others back, on both nodes; return what came back."""
    captured = f"{mark}-closure"

    def show(batch: Any, argument: str, default: str = f"{mark}-default") -> Any:
        print(argument.replace("argument", "print"))  # noqa: T201 - it is what is tested
        kept = (captured, GLOBAL, default)
        return pa.table({"result": [argument.replace("argument", "result") + str(len(kept))] * len(batch)})

    def fail(argument: str) -> None:
        raise KeyError(argument.replace("argument", "exception"))

    columns = ["note", "kind", "cost", f"{mark}-name"]
    options = {"session": session, "columns": columns, "shard_bytes": 1 << 16}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = ray_gpu.gpu_remote(**options)(show).map(session.read("visits"), f"{mark}-argument")
        with pytest.raises(KeyError) as error:
            ray_gpu.gpu_remote(session=session)(fail).remote(f"{mark}-argument").result()
    return {"result": result, "printed": printed.getvalue(), "error": str(error.value)}


def search_ray(
    attacked: Attacked, mark: str, since: float, *, leave_out: str = "", places: Set[str] = PLACES
) -> Search:
    """Search all that Ray has: the processes of every cage, what they map and have open, what they can write to."""
    cages = attacked.caged()
    pids = [pid for pids in cages.values() for pid in pids if leave_out not in command(pid) or not leave_out]
    trees = [Path(f"/proc/{pids[0]}/root", place) for pids in cages.values() for place in WRITABLE if place in places]
    return search(mark, pids, since=since, trees=trees, places=frozenset(places))


def search_custodians(attacked: Attacked, mark: str, since: float) -> Search:
    """Search the custodians, their nodes' directories and the log that everything of ours writes to."""
    trees = [attacked.layout.node(node) for node in NODES]
    done = search(mark, [attacked.custodian(node) for node in NODES], since=since, trees=trees)
    done.file(attacked.layout.log)
    return done


def test_the_job_ran(run: Run, attacked: Attacked) -> None:
    """Result, prints and the exception came back with their canaries, from both nodes."""
    assert set(run.result["result"].to_pylist()) == {f"{attacked.mark}-result3"}
    assert f"{attacked.mark}-print" in run.printed
    assert f"{attacked.mark}-exception" in run.error
    assert sorted(run.nodes) == list(NODES)


def test_ray_sees_nothing(run: Run) -> None:
    """No canary in any form, in the memory, files, shared memory or session directories of any Ray process."""
    assert run.ray.hits == []
    assert run.ray_after.hits == []
    assert {name: run.searched.count(name) >= least for name, least in RAY.items()} == dict.fromkeys(RAY, True)
    assert run.ray.searched_bytes > 256 << 20


def test_custodians_see_nothing(run: Run) -> None:
    """The node's own trusted process, its directory and the log hold no plaintext either."""
    assert run.custodians.hits == []
    assert run.custodians_after.hits == []


def test_keeper_and_sandbox_hold_it(run: Run) -> None:
    """The search finds every canary where it must be while the lease lives."""
    planted = {"string", "name", "closure", "argument", "default", "global", "print", "exception", "result"}

    assert run.leases.kinds() == planted


def test_category_values_stay(run: Run, attacked: Attacked) -> None:
    """Values of a category column never leave the zone: not even the sandbox has them, only their codes."""
    zone_has = pa.ipc.open_file(pa.memory_map(str(attacked.layout.data(attacked.zone) / "visits.arrow"))).read_all()

    assert f"{attacked.mark}-category" in zone_has["kind"].to_pylist()
    assert "category" not in run.leases.kinds()


def test_gone_with_the_lease(run: Run) -> None:
    """Once the session ended there is soon no keeper and no sandbox any more."""
    assert run.left == []


@pytest.fixture(scope="module")
def plain_ray(run: Run, attacked: Attacked) -> Iterator[str]:
    """Use plain Ray from inside the zone's cage, beside the relay, and keep it there; return its canary."""
    mark = secrets.token_hex(12)
    relay = next(pid for pids in attacked.caged().values() for pid in pids if "ray_gpu.relay" in command(pid)[:3])
    environment = Path(f"/proc/{relay}/environ").read_text(encoding="utf-8").strip("\0").split("\0")
    uid = Path(f"/proc/{relay}").stat().st_uid
    options = dict(word.split("=", 1) for word in command(relay) if word.startswith("--"))
    inside = ["nsenter", f"--target={relay}", "--mount", "--pid", "--ipc", "--"]
    inside += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-c", PLAIN_RAY]
    with subprocess.Popen(
        [*inside, options["--address"], options["--node-address"]],
        env=dict(line.split("=", 1) for line in environment), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as driver:  # fmt: skip
        assert driver.stdin
        assert driver.stdout
        driver.stdin.write(f"{mark}\n")
        driver.stdin.flush()
        assert "planted\n" in iter(driver.stdout.readline, "")
        yield mark
        driver.stdin.close()


def test_plain_ray_is_found(plain_ray: str, attacked: Attacked) -> None:
    """The same search of the same cages finds what plain Ray was given: object, closure, print, exception, result."""
    found = search_ray(attacked, plain_ray, time.time() - 60.0, leave_out=PLAIN_RAY)

    assert found.kinds() >= {"object", "closure", "print", "exception", "result"}


def test_each_place_is_searched(plain_ray: str, attacked: Attacked) -> None:
    """What lies in one place is found by the search of that place alone: were it left out, this would fail."""
    since = time.time() - 60.0
    found = {
        place: search_ray(attacked, plain_ray, since, leave_out=PLAIN_RAY, places={place}).kinds() for place in PLACES
    }

    words = set(PLANTED.values())
    assert {place: kinds & words for place, kinds in found.items()} == {
        place: {word} for place, word in PLANTED.items()
    }


@pytest.mark.parametrize("place", ["directory", "log"])
def test_each_file_of_the_custodians_is_searched(run: Run, attacked: Attacked, place: str) -> None:
    """The search of the custodians finds what is written to a node's directory, and to the log."""
    mark, since = secrets.token_hex(12), time.time() - 60.0
    assert search_custodians(attacked, mark, since).hits == []
    path = attacked.layout.log if place == "log" else attacked.layout.node(NODES[1]) / "planted"
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{mark}-{place}\n")

    try:
        assert str(path) in [hit.where for hit in search_custodians(attacked, mark, since).hits]
    finally:
        if place == "directory":
            path.unlink()


@pytest.mark.parametrize("node", NODES)
def test_memory_of_the_custodians_is_searched(run: Run, attacked: Attacked, node: str) -> None:
    """It finds what a custodian must know: the role that it logs in to Vault with."""
    found = search_custodians(attacked, attacked.settings(node)["role_id"], time.time())

    assert f"[{attacked.custodian(node)}] memory" in " ".join(hit.where for hit in found.hits)


@pytest.mark.parametrize("form", ["raw", "utf-16", "hex", "base64"])
def test_forms(tmp_path: Path, form: str) -> None:
    """The search finds a text in every form, wherever base64's groups of three begin, and finds nothing else."""
    mark = secrets.token_hex(12)
    for shift in range(3):
        text = "x" * shift + mark + "-word"
        raw = text.encode()
        written = {"raw": raw, "utf-16": text.encode("utf-16-le"), "hex": raw.hex().upper().encode()}
        written["base64"] = base64.b64encode(raw)
        (tmp_path / str(shift)).write_bytes(bytes(5000) + written[form] + bytes(5000))

    assert [hit.form for hit in search(mark, (), since=0, trees=[tmp_path]).hits] == [form] * 3
    assert search(secrets.token_hex(12), (), since=0, trees=[tmp_path]).hits == []
