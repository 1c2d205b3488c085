"""The control of every search for canaries: plain Ray, as anybody with the cluster's token can use it. Needs root.

A driver in a cage, the zone's where it has one, and an actor on a GPU node hold one canary of each channel, as plain
Ray has them, and one in each place that a search looks at.
"""

from __future__ import annotations

import base64
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_gpu.embedded import GPU_NODES
from tests.proofs.attacked import Attacked, raylet_of
from tests.proofs.canary import new_mark

#: The mark comes by standard input, so that no command line has it, and what is planted stays referenced. Then each
#: line of standard input is answered with all that the holder of the token can read of the GCS.
DRIVER = """
import base64, logging, sys, ray
import pyarrow as pa
mark = sys.stdin.readline().strip()
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], log_to_driver=False)
kinds = pa.array([mark + "-category"] * 10_000).dictionary_encode()
stored = ray.put(pa.table({"note": [mark + "-value"] * 10_000, "kind": kinds, mark + "-name": [1] * 10_000}))
captured = mark + "-closure"
GLOBAL = mark + "-global"
class Plain:
    def __init__(self, captured=captured):
        self.captured = (captured, GLOBAL)
    def show(self, argument, default=mark + "-default"):
        self.shown = argument + "-print", argument + "-logging", default
        print(self.shown[0], flush=True)
        logging.getLogger().warning(self.shown[1])
    def fail(self, argument):
        raise ValueError((argument + "-exception ") * 10_000)
    def give(self, argument):
        return (argument + "-result ") * 10_000
    def plant(self, argument):
        import ctypes, os, subprocess
        self.kept = bytearray((argument + "-memory").encode())
        script = "import time; time.sleep(600)"
        environment = {**os.environ, "PLANTED": argument + "-environ"}
        self.shows = [
            subprocess.Popen([sys.executable, "-c", script, argument + "-cmdline"]),
            subprocess.Popen([sys.executable, "-c", script], env=environment),
        ]
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
actor = ray.remote(num_cpus=0, label_selector={"ray-gpu-node": sys.argv[3]})(Plain).remote()
ray.get(actor.show.remote(mark))
failed = actor.fail.remote(mark)
ray.wait([failed])
given = actor.give.remote(mark)
ray.wait([given])
ray.get(actor.plant.remote(mark))

def flat(value):
    if isinstance(value, dict):
        return b" ".join(flat(key) + b" " + flat(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple, set)):
        return b" ".join(map(flat, value))
    return value if isinstance(value, bytes) else str(value).encode()

def readable():
    from ray._private import ray_constants, state
    from ray.experimental import internal_kv
    names = {getattr(ray_constants, name) for name in dir(ray_constants) if name.startswith("KV_NAMESPACE")}
    found = []
    for namespace in {None, b"fun", b"serve", b"collective", b"usage", *names}:
        for key in internal_kv._internal_kv_list(b"", namespace=namespace):
            found += [key, internal_kv._internal_kv_get(key, namespace=namespace) or b""]
    ray.nodes()  # connects
    tables = state.state._global_state_accessor
    for name in "job", "node", "worker", "placement_group":
        found.append(flat(getattr(tables, f"get_{name}_table")()))
    found += [flat(tables.get_actor_table(None, None)), flat(tables.get_task_events())]
    found += [flat(tables.get_all_resource_usage()), flat(tables.get_system_config())]
    return b"\\n".join(found)

print("planted", flush=True)
for line in sys.stdin:
    print("read", base64.b64encode(readable()).decode(), flush=True)
"""
#: What it plants in each place and nowhere else: the word that follows its mark. Whatever a process was started with
#: is in its memory as well.
PLANTED = {
    "memory": {"memory", "environ", "cmdline"},
    "environ": {"environ"},
    "cmdline": {"cmdline"},
    "map_files": {"mapped"},
    "fd": {"opened"},
    "s": {"session"},
    "tmp": {"tmp"},
    "dev/shm": {"shm"},
}


@dataclass(frozen=True, slots=True)
class PlainRay:
    """Plain Ray that runs."""

    mark: str
    driver: subprocess.Popen[str]

    def readable(self) -> bytes:
        """Return what the token's holder reads of the GCS now: its key-value store and its tables."""
        assert self.driver.stdin
        assert self.driver.stdout
        self.driver.stdin.write("read\n")
        self.driver.stdin.flush()
        for line in self.driver.stdout:
            word, _, text = line.partition(" ")
            if word == "read":
                return base64.b64decode(text)
        raise AssertionError("plain Ray's driver ended")


@contextlib.contextmanager
def run_plain_ray(attacked: Attacked, node: str) -> Iterator[PlainRay]:
    """Run it, its actor on *node*, from inside the zone's cage, or another node's where the zone has none."""
    mark, cages = new_mark(), attacked.caged()
    home = cages.get(f"zone-{attacked.zone}") or next(pids for name, pids in cages.items() if name in GPU_NODES)
    raylet, options = raylet_of(home)
    environment = Path(f"/proc/{raylet}/environ").read_text(encoding="utf-8").strip("\0").split("\0")
    uid = Path(f"/proc/{raylet}").stat().st_uid
    inside = ["nsenter", f"--target={raylet}", "--mount", "--pid", "--ipc", "--"]
    inside += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-c", DRIVER]
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(
        [*inside, options["gcs-address"], options["node_ip_address"], node],
        env=dict(line.split("=", 1) for line in environment), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
    ) as driver:  # fmt: skip
        assert driver.stdin
        assert driver.stdout
        driver.stdin.write(f"{mark}\n")
        driver.stdin.flush()
        if "planted\n" not in iter(driver.stdout.readline, ""):
            said.seek(0)
            raise AssertionError(f"plain Ray's driver ended: {said.read()[-1000:]}")
        yield PlainRay(mark, driver)
        driver.stdin.close()
