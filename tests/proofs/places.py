"""Where canaries are looked for: all that Ray has, the nodes' custodians, Vault, the zone's own. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

from ray_gpu.vault_server import VaultServer
from tests.proofs.attacked import Attacked, all_powerful, command
from tests.proofs.canary import CHANNELS, canaries
from tests.proofs.memory_search import PROCESS_PLACES, Search, search
from zones.errors import ZoneError

NODES = ("gpu-1", "gpu-2")
#: What the processes of a cage can write to; Ray's session, with its logs, is in the first.
WRITABLE = ("s", "tmp", "dev/shm")
#: Every place that is searched for what Ray has.
PLACES = PROCESS_PLACES | set(WRITABLE)


def obstacle(attacked: Attacked) -> str:
    """Return why this machine's processes cannot be searched, or ``""``."""
    if not all_powerful():
        return "needs root with all capabilities: reads the memory of other uids' processes"
    if "uncaged-ray" in attacked.document["degradations"]:
        return "needs namespaces: without them a cage's processes cannot be told from others"
    return ""


def search_ray(
    attacked: Attacked,
    marks: str | Iterable[str],
    since: float,
    *,
    leave_out: str = "",
    places: Set[str] = PLACES,
) -> Search:
    """Search all that Ray has: the processes of every cage, what they map and have open, what they can write to."""
    cages = {name: pids for name, pids in attacked.caged().items() if pids}
    pids = [pid for pids in cages.values() for pid in pids if leave_out not in command(pid) or not leave_out]
    # One that has ended and is not collected yet has no root.
    roots = {
        name: next(root for pid in pids if (root := Path(f"/proc/{pid}/root")).exists()) for name, pids in cages.items()
    }
    # A relay in a cage of its own is no node and has no session.
    wanted = {name: [place for place in WRITABLE if (name, place) != ("relay", "s")] for name in roots}
    trees = [root / place for name, root in roots.items() for place in wanted[name] if place in places]
    return search(marks, pids, since=since, trees=trees, places=frozenset(places))


def search_trusted(attacked: Attacked, marks: str | Iterable[str], since: float) -> Search:
    """Search who is trusted and still has no need to know: custodians, Vault, their files, the log of everything.

    Also the environment and command line of every process of the machine, but for those that are older.
    """
    layout = attacked.layout
    server = VaultServer.find(layout.vault)
    assert server is not None
    others = [server.pid, *(pid for name, pid in attacked.document["processes"].items() if name == "forwarder")]
    pids = [pid for pid in (*map(attacked.custodian, NODES), *others) if command(pid)]
    done = search(marks, pids, since=since, trees=[layout.vault, *map(layout.node, NODES)])
    done.file(layout.log)
    shown = search(marks, _since_the_cluster(attacked), since=since, places=frozenset({"environ", "cmdline"}))
    done.hits += shown.hits
    return done


def _since_the_cluster(attacked: Attacked) -> list[int]:
    """Return every process of the machine, but for this one, that was started after the cluster."""
    first = _started(int(attacked.document["pid"]))
    everyone = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in everyone if pid != os.getpid() and _started(pid) >= first]


def _started(pid: int) -> int:
    """Return when a process was started, in clock ticks since the machine was; 0 when it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[19])
    return 0


@contextlib.contextmanager
def written(path: Path, text: str) -> Iterator[None]:
    """Have a text at the end of a file for a while; a file that was not there is removed again."""
    new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")
    try:
        yield
    finally:
        if new:
            path.unlink()


@contextlib.contextmanager
def shown(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Have a process that was started with something."""
    program = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(program, env={**os.environ, **environment}, stdin=pipe, stdout=pipe) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        yield
        process.stdin.close()


@contextlib.contextmanager
def asked_for(attacked: Attacked, name: str) -> Iterator[None]:
    """Ask Vault for something of that name; the path of a request is in the audit log as it is."""
    with attacked.vault("gateway") as vault, contextlib.suppress(ZoneError):
        vault.call("GET", f"cubbyhole/{name}")
    yield


#: What is planted for the search of the trusted to find, by a word of where it is found.
TRUSTED: Mapping[str, Callable[[Attacked, str], contextlib.AbstractContextManager[None]]] = {
    "nodes": lambda attacked, text: written(attacked.layout.node(NODES[1]) / "planted", text),
    "supervisor.log": lambda attacked, text: written(attacked.layout.log, text),
    "audit.log": asked_for,
    "vault": lambda attacked, text: written(attacked.layout.vault / "planted", text),
    "cmdline": lambda attacked, text: shown([text], {}),
    "environ": lambda attacked, text: shown([], {"PLANTED": text}),
}


@contextlib.contextmanager
def planted_for_the_trusted(attacked: Attacked, mark: str) -> Iterator[None]:
    """Have a canary in each place of the trusted for a while, each of another channel."""
    with contextlib.ExitStack() as stack:
        for plant, channel in zip(TRUSTED.values(), CHANNELS, strict=False):
            stack.enter_context(plant(attacked, canaries(mark)[channel]))
        yield


def found_of_the_trusted(found: Search, mark: str) -> set[str]:
    """Return the places whose canary was found, and there."""
    channels = dict(zip(TRUSTED, CHANNELS, strict=False))
    return {
        place for place, channel in channels.items() for hit in found.of(mark)
        if hit.channel == channel and place in hit.where
    }  # fmt: skip
