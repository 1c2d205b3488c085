"""Where less can be had: the demo still runs, says what is missing before and after, and policy may refuse it first.

Each scenario is the command line in a process of its own that became somebody with less (``lesser.py``).
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pyarrow as pa
import pytest

from ray_gpu import gpu_remote
from ray_gpu.frames import SealedSocket
from ray_gpu.sandbox import boundary, memory, profile, seccomp
from ray_gpu.state import Layout
from ray_gpu.wire import recv_message, send_message
from zones.envelope import LeaseKey
from zones.errors import SandboxLevelError
from zones.ledger import read
from zones.model import Direction, Kind

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
DEMO = "from ray_gpu.cli import main; main()"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes somebody with less")
#: What the sandbox of a scenario lacks at least, and what the zone's side lacks.
SCENARIOS: dict[str, dict[str, Any]] = {
    "user": {
        "uid": 61990, "deny_userns": False, "container": False,
        "sandbox": {"shared-uid", "no-cgroup"}, "zone": {"embedded-vault", "self-enforced", "shared-network"},
    },
    "user-without-userns": {
        "uid": 61991, "deny_userns": True, "container": False,
        "sandbox": {"shared-uid", "no-cgroup", "no-namespaces"},
        "zone": {"embedded-vault", "self-enforced", "uncaged-ray", "shared-network"},
    },
    "root-in-a-container": {
        "uid": None, "deny_userns": True, "container": True,
        "sandbox": {"no-namespaces"}, "zone": {"embedded-vault", "uncaged-ray", "shared-network"},
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run of the demo left."""

    status: int
    output: str
    #: Ids on the first line that begins with ``degraded:``.
    ids: frozenset[str]
    entries: list[dict[str, Any]]
    #: Processes that outlived it.
    left: list[str]


def command_as(scenario: dict[str, Any], *command: str) -> list[str]:
    """Return *command* as somebody with less. A private home is opened to another user; a container's root keeps it."""
    show = []
    if scenario["uid"] is not None:
        places = [PROJECT, *profile.runtime_paths(), Path(sys.executable).resolve().parents[1]]
        show = [str(place) for place in dict.fromkeys(map(Path.resolve, places))]
    wanted = {name: scenario[name] for name in ("uid", "deny_userns", "container")}
    return [sys.executable, str(HERE / "lesser.py"), json.dumps({**wanted, "show": show}), *command]


def environment(home: Path) -> dict[str, str]:
    """Return all that somebody with less has in the environment."""
    return {
        "PATH": "/usr/bin:/bin", "HOME": str(home), "COLUMNS": "200", "PYTHONPATH": str(PROJECT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def demo(small_data: dict[str, Any]) -> Iterator[Callable[..., Run]]:
    """Return a function that runs the demo in a scenario, once for each set of arguments."""
    with tempfile.TemporaryDirectory(prefix="rg") as name:
        root = Path(name)
        root.chmod(0o711)

        @functools.cache
        def run(scenario: str, *arguments: str) -> Run:
            return _demo(SCENARIOS[scenario], root, small_data, arguments)

        yield run


def _demo(scenario: dict[str, Any], root: Path, tables: dict[str, Any], arguments: tuple[str, ...]) -> Run:
    home = Path(tempfile.mkdtemp(dir=root))
    layout = Layout(home / "s")
    layout.data("clinic").mkdir(mode=0o700, parents=True)
    for table_name, table in tables.items():
        target = str(layout.data("clinic") / f"{table_name}.arrow")
        with pa.OSFile(target, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    uid = scenario["uid"]
    if uid is None:
        home.chmod(0o711)
    else:
        for path in [home, *home.rglob("*")]:
            os.chown(path, uid, uid)
    command = command_as(scenario, sys.executable, "-c", DEMO, "demo", "--state", str(layout.root), *arguments)
    done = subprocess.run(
        command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=150,
        check=False,
    )  # fmt: skip
    first = next((line for line in done.stdout.splitlines() if line.startswith("degraded: ")), "")
    ids = first.removeprefix("degraded: ").partition(" (")[0]
    entries = list(read(layout.ledger("clinic"))) if layout.ledger("clinic").exists() else []
    left = _mentioning(home)
    return Run(status=done.returncode, output=done.stdout, ids=frozenset(ids.split(", ")), entries=entries, left=left)


def _mentioning(directory: Path) -> list[str]:
    """Return the commands of the processes that name *directory*."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if str(directory) in command:
            found.append(command)
    return found


def _private() -> bool:
    """Tell whether another uid cannot reach Python or this project."""
    places = [place.resolve() for place in (PROJECT, *profile.runtime_paths(), Path(sys.executable))]
    return any(not parent.stat().st_mode & 0o001 for place in places for parent in place.parents)


#: One of them when there is time.
NAMES = [pytest.param(name, marks=[pytest.mark.chaos] * (name != "user")) for name in SCENARIOS]


@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_demo_runs(name: str, demo: Callable[..., Run]) -> None:
    """The demo exits 0 with exact results, and nothing of it runs on."""
    run = demo(name)

    assert run.status == 0, run.output
    assert len(re.findall(r"^equal to ", run.output, re.MULTILINE)) == 5, run.output
    assert run.left == []


@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_demo_says_what_is_missing(name: str, demo: Callable[..., Run]) -> None:
    """The first and the last line name everything that is missing."""
    run, scenario = demo(name), SCENARIOS[name]
    lines = run.output.strip().splitlines()

    assert lines[0] == lines[-1]
    assert lines[0].startswith("degraded: ")
    assert scenario["sandbox"] | scenario["zone"] <= run.ids
    assert "(sandbox level: degraded)" in lines[0]
    assert ("file-capability" in run.ids) == (name == "root-in-a-container" and _private())


@needs_root
@pytest.mark.parametrize("name", NAMES)
def test_ledger_and_receipts_say_it(name: str, demo: Callable[..., Run]) -> None:
    """Every intent names all that the demo's line names; every receipt names what the sandbox lacked."""
    run, zone = demo(name), SCENARIOS[name]["zone"]
    intents = [entry for entry in run.entries if entry["kind"] == "intent"]
    receipts = [entry["receipt"]["receipt"] for entry in run.entries if entry["kind"] == "lease-end"]

    assert len(intents) >= 3
    assert all(set(intent["degradations"]) == run.ids for intent in intents)
    assert all(intent["level"].startswith("degraded: ") for intent in intents)
    assert len(receipts) >= 2
    assert all(set(receipt["degradations"]) == run.ids - zone for receipt in receipts)


@needs_root
@pytest.mark.heavy
def test_demo_is_refused_where_nothing_is_accepted(
    demo: Callable[..., Run], copy_policies: Callable[..., Path], small_data: dict[str, Any]
) -> None:
    """Where policy accepts nothing missing, the demo names each reason and no byte is even intended to leave."""
    policies = _strict(copy_policies)

    run = demo("user-without-userns", "--policies", str(policies))

    assert run.status == 1
    assert "SandboxLevelError" in run.output
    assert [name for name in run.ids if name not in run.output.split("SandboxLevelError")[1]] == []
    assert [entry["kind"] for entry in run.entries if entry["kind"] in ("intent", "completion")] == []
    assert [entry["decision"] for entry in run.entries if entry["kind"] == "decision"] == ["allowed"]
    assert run.left == []


@needs_root
def test_root_needs_no_user_namespaces() -> None:
    """Denying user namespaces takes nothing from root: bubblewrap works without, and no control is missing for it."""
    ask = "from ray_gpu.sandbox import boundary as b; print(b.survey().mode, *b.degradations())"
    found = []
    for denied in (False, True):
        scenario = {"uid": None, "deny_userns": denied, "container": False}
        command = command_as(scenario, sys.executable, "-c", ask)
        done = subprocess.run(command, env=environment(Path("/tmp")), capture_output=True, text=True, check=True)
        found.append(done.stdout)

    if boundary.survey().mode != "root":
        pytest.skip(f"bubblewrap does not work here even for root: {boundary.survey().reason}")
    assert found[0] == found[1]
    assert found[0].startswith("root")


ORPHAN = """
import os, subprocess, sys, time
from ray_gpu.sandbox import boundary, profile
code = '''
from ray_gpu.sandbox.harden import harden_self; harden_self(kind="sandbox")
import os, time
if os.fork() == 0:
    for leave in (os.setsid, lambda: os.setpgid(0, 0)):
        try: leave()
        except OSError: pass
    if os.fork() == 0:
        os.write(1, b"%d\\\\n" % os.getpid())
time.sleep(100)
'''
process = boundary.launch([sys.executable, "-c", code], profile.sandbox(
    "orphan", uid=61013, memory_bytes=None, keep_fds=()), stdout=subprocess.PIPE)
orphan = int(process.stdout.readline())
assert process.mode == "none"
assert os.path.exists(f"/proc/{orphan}")
process.end()
# Killed by now; on a busy machine it is still there for a moment.
deadline = time.monotonic() + 10
state = ""
while state not in ("Z", "X", "gone") and time.monotonic() < deadline:
    time.sleep(0.01)
    try:
        state = open(f"/proc/{orphan}/stat").read().rpartition(")")[2].split()[0]
    except OSError:
        state = "gone"
print(state)
"""


@needs_root
@pytest.mark.parametrize("name", ["user-without-userns", "root-in-a-container"])
def test_nothing_survives_without_namespaces(name: str) -> None:
    """A process of user code that would leave its group cannot, and so ends with the lease."""
    command = command_as(SCENARIOS[name], sys.executable, "-c", ORPHAN)

    done = subprocess.run(command, env=environment(Path("/tmp")), capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() in ("Z", "X", "gone"), done.stdout + done.stderr


# -- policy decides first ---------------------------------------------------------------------------


def _strict(copy_policies: Callable[..., Path], rules: str = "") -> Path:
    """Return policies under which zone clinic accepts nothing missing, with more obligations if given."""
    policies = copy_policies()
    path = policies / "clinic" / "zone.yaml"
    text = path.read_text(encoding="utf-8")
    start = text.index("accepted_degradations:\n")
    end = text.index("\n\n", start)
    text = text[:start] + "accepted_degradations: []" + text[end:]
    path.write_text(text.replace("obligations:\n", f"obligations:\n{rules}"), encoding="utf-8")
    return policies


@gpu_remote
def count(batch: Any) -> int:
    """Return the number of rows."""
    return len(batch)


@pytest.fixture(scope="module")
def strict_cluster(start_cluster: Any, copy_policies: Callable[..., Path]) -> Iterator[Any]:
    """A cluster whose zone accepts nothing missing, but for one data set everything, and for another all but one."""
    everything = _all_missing()
    rules = "".join(
        f"  - datasets: [{name}]\n    accepted_degradations: [{', '.join(accepted)}]\n"
        for name, accepted in (("breast_cancer", everything), ("breast_cancer_resampled", everything[1:]))
    )
    with start_cluster(policies=_strict(copy_policies, rules)) as running:
        yield running


def _all_missing() -> list[str]:
    surroundings = ["embedded-vault", "shared-network"]
    surroundings += [] if os.geteuid() == 0 else ["self-enforced"]
    surroundings += ["uncaged-ray"] if boundary.survey().mode == "none" else []
    return [*surroundings, *boundary.degradations(), *([] if boundary.gpu_devices() else ["numpy-stand-in"])]


@pytest.mark.parametrize(
    ("dataset", "refused"),
    [("randhie", _all_missing()), ("breast_cancer_resampled", _all_missing()[:1])],
    ids=["everything", "one"],
)
def test_refused_before_the_first_byte(strict_cluster: Any, dataset: str, refused: list[str]) -> None:
    """What policy does not accept refuses the lease with each reason; columns were allowed, and nothing left."""
    with strict_cluster.attach(f"refused {dataset}") as zone:
        session = zone.status()["session"]
        with pytest.raises(SandboxLevelError) as caught:
            count.map_reduce(zone.read(dataset, columns=["mdvis"] if dataset == "randhie" else ["mean_area"]), sum)
        leases = zone.status()["leases"]

    assert caught.value.reasons == sorted(refused)
    assert all(name in caught.value.message for name in refused)
    assert leases == []
    assert [entry["decision"] for entry in strict_cluster.entries("decision", session=session)] == ["allowed"]
    assert strict_cluster.entries("intent", session=session) == []


def test_accepted(strict_cluster: Any) -> None:
    """The same call runs where policy accepts all that is missing."""
    with strict_cluster.attach("accepted") as zone:
        session = zone.status()["session"]
        rows = count.map_reduce(zone.read("breast_cancer", columns=["mean_area"]), sum)

    assert rows == 569
    assert {tuple(entry["degradations"]) for entry in strict_cluster.entries("intent", session=session)} == {
        tuple(sorted(_all_missing()))
    }


# -- what a process finds missing in itself ---------------------------------------------------------


@pytest.mark.parametrize("missing", [True, False], ids=["without-seccomp", "with-everything"])
def test_hello_names_what_a_child_could_not_do(missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that keeper and sandbox could not put on is in the hello, whatever the custodian thought before."""
    if "no-seccomp" in boundary.degradations():
        pytest.skip("libseccomp is missing here, so the custodian knows it before")
    if missing:
        monkeypatch.setattr(seccomp, "compile_filter", lambda *_, **__: None)  # what the children are given
    with _Lease() as lease:
        hello = lease.hello()

    assert ("no-seccomp" in hello["degradations"]) == missing
    assert ("no-seccomp" in lease.ready["degradations"]) == missing
    assert "no-cgroup" in hello["degradations"]


@pytest.mark.parametrize("says", ["", "NVIDIA H100"], ids=["our sandbox", "control: one that claims a GPU"])
def test_hello_names_the_stand_in(says: str) -> None:
    """A node that only looks as if it had a GPU is found out by what computes in its sandbox, before the first byte.

    The custodian here did not miss a GPU. The control is a sandbox that is not ours, of which the keeper knows nothing.
    """
    if boundary.gpu_devices():
        pytest.skip("there is a GPU here, so nothing stands in for it")
    with _Lease(says) as lease:
        hello = lease.hello()

    assert ("numpy-stand-in" in hello["degradations"]) is not bool(says)
    assert ("numpy-stand-in" in lease.ready["degradations"]) is not bool(says)
    assert hello["device"].startswith(says or "numpy stand-in")


class _Lease:
    """A keeper and a sandbox, started as a custodian does; or, in place of the sandbox, one that claims a device."""

    def __init__(self, claimed: str = "") -> None:
        self._claimed = claimed

    def __enter__(self) -> _Lease:
        self._key = LeaseKey.from_bytes(os.urandom(32))
        self._control, keeper_control = socket.socketpair()
        keeper_side, sandbox_side = socket.socketpair()
        slots = memory.create()
        self._processes = [
            boundary.launch_keeper(
                uid=61015, name="hello", control_fd=keeper_control.fileno(), sandbox_fd=keeper_side.fileno(),
                memory_fd=slots,
            ),
        ]  # fmt: skip
        self._sandbox = sandbox_side.dup()
        if self._claimed:
            send_message(self._sandbox, {"op": "ready", "device": self._claimed, "missing": []})
        else:
            self._sandbox.close()
            self._processes.append(boundary.launch_sandbox(
                uid=61014, memory_bytes=1 << 30, name="hello", fds=(sandbox_side.fileno(), slots)
            ))  # fmt: skip
        for sock in (keeper_control, keeper_side, sandbox_side):
            sock.close()
        os.close(slots)
        self._control.settimeout(30)
        send_message(self._control, {
            "key": self._key.bytes, "lease": "hello", "grant_digest": "0" * 64, "node": "gpu-1", "pool": "shared",
            "degradations": ["no-cgroup"], "not_after": int(time.time()) + 60, "contents": {},
            "environment": "", "padding": "fine",
        })  # fmt: skip
        self.ready, _ = recv_message(self._control)
        return self

    def hello(self) -> dict[str, Any]:
        """Return the keeper's hello over a data connection."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        send_message(self._control, {"op": "connection"}, [theirs.fileno()])
        theirs.close()
        link = SealedSocket(ours, key=self._key, grant_digest="0" * 64, lease="hello", outgoing=Direction.OUT)
        link.settimeout(30)
        link.send(link.slot(Kind.HELLO, call=0), b"")
        header, payload = link.receive()
        link.close()
        assert header.kind is Kind.HELLO
        hello: dict[str, Any] = msgpack.unpackb(payload)
        return hello

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._sandbox.close()
        for process in self._processes:
            process.end()
