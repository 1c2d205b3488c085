"""A call with a canary in each channel ends in every way there is, and no place outside its lease has any of it.

Beside each end plain Ray runs, on the node that is not hit, with canaries of its own: the same search of the same
places finds those, or proves nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.attack.canary_call import ENDINGS, LEAVING
from tests.proofs.attacked import Attacked, command
from tests.proofs.attacked_zone import run_attacked
from tests.proofs.canary import ARGUMENT, CHANNELS, PLACE_WORDS, canaries, new_mark
from tests.proofs.memory_search import Search, search
from tests.proofs.places import (
    NODES,
    TRUSTED,
    found_of_the_trusted,
    obstacle,
    planted_for_the_trusted,
    search_ray,
    search_trusted,
)
from tests.proofs.plain_ray import DRIVER, run_plain_ray

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PATIENCE_S = 150.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call in flight: every canary is in its sandbox, which waits."""

    notebook: subprocess.Popen[str]
    node: str
    sandbox: int
    #: Keeper and sandbox, and what confines them.
    lease: list[int]


@pytest.fixture(scope="module")
def attacked(
    start_cluster: Callable[..., AbstractContextManager[Any]], copy_policies: Callable[..., Path]
) -> Iterator[Attacked]:
    """A cluster of this file's own: it is broken in the end."""
    with run_attacked(start_cluster, copy_policies) as world:
        if reason := obstacle(world):
            pytest.skip(reason)
        yield world


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition, asking often."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {what}"
        select.select([], [], [], 0.02)


@contextlib.contextmanager
def notebook(attacked: Attacked, how: str) -> Iterator[subprocess.Popen[str]]:
    """Run a notebook that calls."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.attack.canary_call", str(attacked.state)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_GPU_PROGRESS": "0"},
        stdin=pipe, stdout=pipe, text=True, process_group=0,
    )  # fmt: skip
    try:
        assert process.stdin
        process.stdin.write(f"{how}\n{attacked.mark}\n")
        process.stdin.flush()
        says(process, "calling")
        yield process
    finally:
        process.kill()
        process.communicate()


def says(process: subprocess.Popen[str], word: str) -> None:
    """Read what a notebook says up to a line with that word."""
    assert process.stdout
    said = []
    patience = threading.Timer(PATIENCE_S, process.kill)
    patience.start()
    try:
        for line in process.stdout:
            said.append(line.strip())
            if said[-1] == word:
                return
    finally:
        patience.cancel()
    pytest.fail(f"the notebook ended, and said {said}")


def in_flight(attacked: Attacked, process: subprocess.Popen[str], nodes: Sequence[str] = NODES) -> Call:
    """Wait until a sandbox of one of the nodes holds all canaries, from what it prints to what it will return."""
    found: list[Call] = []

    def one_has() -> bool:
        for node in nodes:
            for sandbox in attacked.leases(node, "ray_gpu.sandbox.child")[-1:]:
                seen = search(attacked.mark, [sandbox], since=time.time())
                if seen.channels() == LEAVING:
                    found.append(Call(notebook=process, node=node, sandbox=sandbox, lease=attacked.leases(node)))
        return bool(found)

    until(one_has, "the call to be in flight")
    return found[0]


def end(attacked: Attacked, call: Call, how: str) -> None:
    """End a call in one of the ways."""
    if how.startswith("kill"):
        victim = {
            "sandbox": lambda: call.sandbox,
            "keeper": lambda: attacked.leases(call.node, "ray_gpu.keeper")[-1],
            "actor": lambda: caged(attacked, call.node, "ray::GpuActor"),
            "raylet": lambda: caged(attacked, call.node, "raylet/raylet"),
            "custodian": lambda: attacked.custodian(call.node),
        }[how.removeprefix("kill ")]()
        os.kill(victim, signal.SIGKILL)
    elif how == "cancel":
        os.killpg(call.notebook.pid, signal.SIGINT)
    elif how != "timeout":
        os.kill(call.sandbox, signal.SIGUSR1)
    if ENDINGS[how]:
        says(call.notebook, ENDINGS[how])


def caged(attacked: Attacked, node: str, words: str) -> int:
    """Return a process of a node's cage by its command line."""
    return next(pid for pid in attacked.caged()[node] if words in " ".join(command(pid)))


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not collected has no command line any more."""
    return any(command(pid))


@pytest.fixture(scope="module")
def since() -> float:
    """When the first call of this file began, UTC seconds."""
    return time.time() - 1.0


def test_swap(attacked: Attacked, since: float, tmp_path: Path) -> None:
    """Nothing of a lease is in swap, nor can be; and no swap device of the machine has a canary."""
    devices = [Path(line.split()[0]) for line in Path("/proc/swaps").read_text().splitlines()[1:]]
    control = tmp_path / "swap"
    control.write_bytes(bytes(1 << 20) + canaries(mark := new_mark())["closure"].encode() + bytes(1 << 20))
    found = Search(texts=(attacked.mark, mark), since=since)
    with notebook(attacked, "returns") as process:
        call = in_flight(attacked, process)
        swapped = {pid: swapped_kib(pid) for pid in call.lease}
        caps = {pid: swap_caps(pid) for pid in call.lease}
    for device in (control, *devices):
        with device.open("rb") as file:
            found.device(device, file.seek(0, os.SEEK_END))

    assert found.of(attacked.mark) == []
    assert found.channels(mark) == {"closure"}
    assert set(swapped.values()) == {0}
    if not any(caps.values()):
        assert devices == [], "swap is on, and this kernel does not count it by group: swapoff -a"
        pytest.skip("no swap device here, and this kernel's groups do not count swap: the cap itself was not tried")
    # None at all in the lease's groups; in the group above them, as much as there is.
    assert {own for own, _ in filter(None, caps.values())} == {0}
    assert all(above > 0 for _, above in filter(None, caps.values()))


def swapped_kib(pid: int) -> int:
    """Return how much of a process is in swap, KiB."""
    match = re.search(r"VmSwap:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    assert match
    return int(match[1])


def swap_caps(pid: int) -> tuple[int, int] | None:
    """Return how much swap the process's group may use and the one above it, bytes; ``None`` where nobody counts."""
    for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            own = Path(f"/sys/fs/cgroup/memory{path}")
            if (own / "memory.memsw.limit_in_bytes").exists():
                return swap_of_version_1(own), swap_of_version_1(own.parent)
        elif not controllers:
            own = Path(f"/sys/fs/cgroup{path}")
            if (own / "memory.swap.max").exists():
                return number(own / "memory.swap.max"), number(own.parent / "memory.swap.max")
    return None


def swap_of_version_1(group: Path) -> int:
    """Return what memory and swap together may be above memory alone; without limits, what both may be."""
    memory, both = number(group / "memory.limit_in_bytes"), number(group / "memory.memsw.limit_in_bytes")
    return both if both > 1 << 60 else both - memory


def number(path: Path) -> int:
    """Return a limit, bytes."""
    text = path.read_text(encoding="ascii").strip()
    return 1 << 62 if text == "max" else int(text)


@pytest.mark.parametrize("how", ENDINGS)
def test_ending(attacked: Attacked, since: float, how: str) -> None:
    """Keeper, sandbox, gateway and notebook hold the canaries; when the call has ended so, no other place has one."""
    with ExitStack() as stack:
        # The first node is Ray's head: without it there is no cluster to search.
        nodes = NODES[1:] if how == "kill raylet" else NODES
        call = in_flight(attacked, stack.enter_context(notebook(attacked, how)), nodes)
        for pid in (attacked.leases(call.node, "ray_gpu.keeper")[-1], attacked.gateway()):
            assert search(attacked.mark, [pid], since=since).channels() >= {"value", "closure", ARGUMENT}, command(pid)
        # The notebook has a handle of the data, and the data not.
        assert search(attacked.mark, [call.notebook.pid], since=since).channels() >= {"closure", ARGUMENT}
        spared = call.node if how == "kill custodian" else next(node for node in NODES if node != call.node)
        # The time that a timeout has is not spent on its control; nor is the one that a lost lease is missed for.
        if how != "timeout":
            plain = stack.enter_context(run_plain_ray(attacked, spared))
        end(attacked, call, how)
        if how == "timeout":
            plain = stack.enter_context(run_plain_ray(attacked, spared))
        if how not in ("returns", "raises"):
            until(lambda: not any(map(lives, call.lease)), "the end of keeper and sandbox")
        if how == "kill raylet":
            until(lambda: not attacked.caged().get(call.node), "the end of the node's cage")
        marks = (attacked.mark, plain.mark)
        ray = search_ray(attacked, marks, since, leave_out=DRIVER)
        gcs = Search(texts=marks, since=since)
        gcs.data(plain.readable(), "GCS")
        stack.enter_context(planted_for_the_trusted(attacked, plain.mark))
        trusted = search_trusted(attacked, marks, since)

        assert ray.of(attacked.mark) == gcs.of(attacked.mark) == trusted.of(attacked.mark) == []
        assert ray.channels(plain.mark) >= {*CHANNELS, *PLACE_WORDS}
        assert gcs.channels(plain.mark) >= {"closure", "global", "default"}
        assert found_of_the_trusted(trusted, plain.mark) == set(TRUSTED)
    until(lambda: not any(map(lives, call.lease)), "the end of keeper and sandbox")
    until(lambda: not any(attacked.leases(node, "ray_gpu.keeper") for node in NODES), "the end of all leases")


def test_core_files(attacked: Attacked, since: float, tmp_path: Path) -> None:
    """No core file of any of these ends has a canary; one of a process that may write cores does."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text(encoding="utf-8").strip()
    if pattern.startswith("|") or "/" in pattern:
        pytest.skip(f"cores go to {pattern}, not to where a process runs (ray-gpu doctor: core-handler)")
    mark = new_mark()
    crash = "import os, sys; kept = sys.stdin.read() + '-memory'; os.kill(os.getpid(), 11)"
    limit = ["sh", "-c", 'ulimit -c unlimited && exec "$@"', "sh"]
    subprocess.run([*limit, sys.executable, "-c", crash], input=mark, text=True, cwd=tmp_path, check=False)
    cores = core_files(since)
    found = Search(texts=(attacked.mark, mark), since=since)
    for path in cores:
        found.file(path)

    assert found.of(attacked.mark) == []
    assert {Path(hit.where).parent for hit in found.of(mark)} == {tmp_path}


def core_files(since: float) -> list[Path]:
    """Return the core files on this machine's disks that were written since then, whatever they are called."""
    roots = ["/", "/tmp", "/var/tmp", "/dev/shm", "/run"]
    command = ["find", *roots, "-xdev", "-type", "f", "-newerct", f"@{since}", "-print0"]
    names = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout
    return [path for path in {Path(os.fsdecode(name)) for name in names.split(b"\0") if name} if is_core(path)]


def is_core(path: Path) -> bool:
    """Whether a file is an ELF core: type 4."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(18)
        return head[:4] == b"\x7fELF" and head[16:18] == b"\x04\x00"
    return False
