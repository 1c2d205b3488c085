"""What a host's own set-up keeps off: memory on disks and in other processes, logins of others. Each attack runs twice.

Against the product, or a host where the control holds, it fails; where the control is off it succeeds. Controls that
the whole machine shares (crash handler, swap, page merging) are switched for a moment, and put back: heavy.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from ray_gpu.sandbox import boundary, cgroup
from zones.errors import ConfigError

ROOT = Path(__file__).parents[2]
#: Of nobody else: whoever attacks from another account, and whoever holds something.
STRANGER, OWNER = 61994, 61995
PATIENCE_S = 60.0
CORE_PATTERN, YAMA, KSM = (
    Path(path) for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/yama/ptrace_scope", "/sys/kernel/mm/ksm")
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes another user, mounts, switches controls")
#: Holds a canary in memory, says where, and crashes when it is told to.
HOLDER = """
import ctypes, os, sys
{}
canary = ctypes.create_string_buffer(bytes.fromhex(sys.stdin.readline()))
print(ctypes.addressof(canary), flush=True)
sys.stdin.readline()
os.kill(os.getpid(), 11)
"""
#: What supervisor, custodian and gateway begin with; and a program that one of them starts.
OURS = "from ray_gpu.sandbox.harden import keep_memory; keep_memory()"
STARTED = f"""
if len(sys.argv) < 2:
    {OURS}
    os.execv(sys.executable, [sys.executable, "-c", {HOLDER.format("")!r}, "again"])
"""
READ = "import sys; f = open(f'/proc/{sys.argv[1]}/mem', 'rb', 0); f.seek(int(sys.argv[2])); print(f.read(16).hex())"


class Holder:
    """A process with a canary in its memory."""

    def __init__(self, prepare: str, *, core: str, directory: Path, uid: int | None = None) -> None:
        self.canary = secrets.token_bytes(16)
        code = HOLDER.format(prepare)
        identity = [] if uid is None else _as(uid)
        self.process = subprocess.Popen(
            ["prlimit", f"--core={core}", *identity, sys.executable, "-c", code],
            env=environment(),
            cwd=directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(self.canary.hex().encode() + b"\n")
        self.process.stdin.flush()
        self.address = int(self.process.stdout.readline())

    def crash(self) -> None:
        """Make it end by SIGSEGV, and wait for that."""
        self.process.communicate(b"\n", timeout=PATIENCE_S)
        assert self.process.returncode == -11

    def end(self) -> None:
        """End it quietly."""
        self.process.kill()
        self.process.communicate()


def environment() -> dict[str, str]:
    """Return what a process of this project finds in its environment."""
    return {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def _as(uid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on a disk that other users can enter."""
    with TemporaryDirectory(prefix="rgc") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def hits(directory: Path, canary: bytes) -> list[str]:
    """Return which files below a directory contain a canary."""
    return [path.name for path in directory.rglob("*") if path.is_file() and canary in path.read_bytes()]


# -- core files ---------------------------------------------------------------------------------


@pytest.fixture
def core_files() -> None:
    """Skip where a crash writes no file beside the process."""
    pattern = CORE_PATTERN.read_text().strip()
    if "/" in pattern or pattern.startswith("|"):
        pytest.skip(
            f"core_pattern is {pattern!r}, so no core lies beside its process; test_crash_handler is about that"
        )
    if resource.getrlimit(resource.RLIMIT_CORE)[1] != resource.RLIM_INFINITY:
        pytest.skip("the hard core limit is not unlimited here, so no core can be had")


@pytest.mark.parametrize(
    ("prepare", "core", "found"),
    [("", "0", False), (OURS, "unlimited", False), (STARTED, "unlimited", False), ("", "unlimited", True)],
    ids=["limit 0", "ours, no limit", "started by ours", "control: no limit"],
)
def test_core_file(core_files: None, place: Path, prepare: str, core: str, found: bool) -> None:
    """A crash writes no memory to disk where the limit is 0, nor of our processes whatever their starter's limit is."""
    holder = Holder(prepare, core=core, directory=place)
    holder.crash()

    assert bool(hits(place, holder.canary)) is found


@contextlib.contextmanager
def switched(path: Path, value: str) -> Iterator[None]:
    """Change one setting of the machine's for a moment; nobody else who asks for it meanwhile gets it."""
    with path.open("r+", encoding="ascii") as setting:
        fcntl.flock(setting, fcntl.LOCK_EX)
        before = setting.read().strip()
        try:
            path.write_text(value, encoding="ascii")
            yield
        finally:
            path.write_text(before, encoding="ascii")


@needs_root
def test_crash_handler(place: Path) -> None:
    """A crash handler gets nothing of our processes, and of no other where there is none; a plain one's memory it gets.

    Though the core limit is 0: the kernel does not ask for it before it starts a handler.
    """
    handler = place / "handler"
    handler.write_text(f"#!/bin/sh\ncat >{place}/$1.part\nmv {place}/$1.part {place}/$1.core\n", encoding="ascii")
    handler.chmod(0o755)

    def crash(prepare: str) -> tuple[list[str], Path]:
        holder = Holder(prepare, core="0", directory=place)
        pid = holder.process.pid
        holder.crash()
        return hits(place, holder.canary), place / f"{pid}.core"

    def awaited(prepare: str) -> list[str]:
        holder = Holder(prepare, core="0", directory=place)
        path = place / f"{holder.process.pid}.core"
        holder.crash()
        await_that(path.exists)
        return hits(place, holder.canary)

    try:
        with switched(CORE_PATTERN, f"|{handler} %P"):
            assert awaited("") != []
            # A program that one of ours started is dumped, without its memory.
            assert awaited(STARTED) == []
            # One of ours is not dumped at all.
            found, core = crash(OURS)
            assert found == []
        assert crash("")[0] == []
        assert not core.exists()
    except OSError as error:
        pytest.skip(f"this machine's core_pattern cannot be changed: {error}")


def await_that(there: Callable[[], bool]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- another process's memory -------------------------------------------------------------------


@pytest.fixture
def ptrace_open() -> None:
    """Skip where the kernel keeps processes of one uid from each other anyway."""
    if YAMA.exists() and YAMA.read_text().strip() != "0":
        pytest.skip(f"ptrace_scope is {YAMA.read_text().strip()}: without it off there is no control")
    if not boundary.survey().python_readable:
        pytest.skip("Python cannot be read under another uid here")


def read_memory(pid: int, address: int, uid: int) -> str:
    """Read 16 bytes of a process's memory as a user; return them in hexadecimal, or what the kernel said."""
    command = [*_as(uid), sys.executable, "-S", "-c", READ, str(pid), str(address)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@needs_root
@pytest.mark.parametrize(
    ("prepare", "uid", "done"),
    [(OURS, OWNER, False), ("", STRANGER, False), ("", OWNER, True)],
    ids=["ours, by its uid", "plain, by another uid", "control: plain, by its uid"],
)
def test_memory_of_another(ptrace_open: None, place: Path, prepare: str, uid: int, done: bool) -> None:
    """Whoever shares the uid of custodian or gateway does not read it, though the kernel lets it read others."""
    place.chmod(0o777)
    holder = Holder(prepare, core="0", directory=place, uid=OWNER)
    try:
        read = read_memory(holder.process.pid, holder.address, uid)
    finally:
        holder.end()

    assert (read == holder.canary.hex()) is done
    assert done or "Permission denied" in read


@needs_root
def test_memory_of_the_gateway(ptrace_open: None, cluster: Any) -> None:
    """The gateway that runs, and the supervisor's other processes, give their memory to nobody."""
    pids = [int(pid) for pid in cluster.document["processes"].values()]
    gateway = innermost(int(cluster.document["processes"]["gateway"]))
    uid = int(Path(f"/proc/{gateway}/status").read_text().partition("Uid:\t")[2].split()[0])

    assert uid not in (0, os.geteuid())
    assert "Permission denied" in read_memory(gateway, 0, uid)
    for pid in (int(cluster.document["pid"]), gateway, *pids):
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert " ".join(limits.partition("Max core file size")[2].split()[:2]) == "0 0", pid
        assert int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) == 0, pid


def innermost(pid: int) -> int:
    """Return the process behind what confines it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return innermost(int(children[0])) if children else pid


# -- pages that the kernel merges ----------------------------------------------------------------

MERGEABLE = """
import mmap, sys
pages = mmap.mmap(-1, 256 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
pages.write(b"".join(number.to_bytes(4, "big") * 1024 for number in range(1, 257)))
pages.madvise(12)
print("ready", flush=True)
sys.stdin.readline()
"""


def merged(run: str) -> int:
    """Return how many pages of two processes with the same content the kernel merges within its usual time."""
    pipe = subprocess.PIPE
    both = [subprocess.Popen([sys.executable, "-c", MERGEABLE], stdin=pipe, stdout=pipe) for _ in range(2)]
    try:
        for process in both:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        (KSM / "run").write_text(run)
        counts = [Path(f"/proc/{process.pid}/ksm_merging_pages") for process in both]
        deadline = time.monotonic() + (PATIENCE_S if run == "1" else 2.0)
        while (found := sum(int(count.read_text()) for count in counts)) < 256 and time.monotonic() < deadline:
            time.sleep(0.01)
        return found
    finally:
        for process in both:
            process.kill()
            process.communicate()


@needs_root
def test_page_merging() -> None:
    """Equal pages of two processes stay apart where page merging is off, and become one where it is on."""
    if not (KSM / "run").exists():
        pytest.skip("this kernel merges no pages (CONFIG_KSM)")
    with switched(KSM / "pages_to_scan", "20000"), switched(KSM / "sleep_millisecs", "1"), switched(KSM / "run", "2"):
        assert merged("1") >= 256
        assert merged("2") == 0
        assert merged("0") == 0


# -- swap ---------------------------------------------------------------------------------------

FILL = """
import sys
canary = bytes.fromhex(sys.argv[1])
held = [bytearray(canary * 256) for _ in range(24 << 8)]
for _ in range(3):
    for page in held:
        page[0] ^= 0
print("held", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def swap_file(directory: Path) -> Iterator[Path]:
    """Have 64 MiB of swap in a file."""
    path = directory / "swap"
    path.touch(mode=0o600)
    try:
        with path.open("wb") as file:
            # Written, since blocks that were merely reserved read as zeros.
            file.write(bytes(64 << 20))
            os.fsync(file.fileno())
        subprocess.run(["mkswap", "-q", path], check=True, capture_output=True)
        subprocess.run(["swapon", "-p", "32000", path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no swap can be had here: {error}")
    try:
        yield path
    finally:
        subprocess.run(["swapoff", path], check=True, capture_output=True)


@pytest.mark.heavy
@needs_root
def test_swap(place: Path, request: pytest.FixtureRequest) -> None:
    """A lease that needs more memory than it has is not swapped out; in a group without our cap it is on the disk."""
    found = cgroup.hierarchy()
    if found is None or not found.swap_control:
        pytest.skip("no control group that can be kept out of swap (needs swap accounting); the doctor says swap-on")
    capped = cgroup.create(f"swap-{os.getpid()}", memory_bytes=16 << 20, processes=None)
    plain = cgroup.create(f"plain-{os.getpid()}", memory_bytes=None, processes=None)
    assert capped is not None
    assert plain is not None
    request.addfinalizer(capped.remove)
    request.addfinalizer(plain.remove)
    limit = "memory.max" if found.version == 2 else "memory.limit_in_bytes"
    (plain.directories[0] / limit).write_text(str(16 << 20))
    with swap_file(place) as swap:
        assert not swapped(capped, swap)
        assert swapped(plain, swap)


def swapped(group: cgroup.Cgroup, swap: Path) -> bool:
    """Fill more memory than a group may have; return whether it is in the swap file."""
    canary = secrets.token_bytes(16)
    enter = f'echo $$ >{group.entrances()[0]}; exec "$@"'
    command = ["sh", "-c", enter, "sh", sys.executable, "-c", FILL, canary.hex()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # Killed by the kernel, or all of it held somewhere.
        process.stdout.readline()
        with swap.open("rb", buffering=0) as raw:
            os.posix_fadvise(raw.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = any(canary * 4 in block for block in iter(lambda: raw.read(1 << 20), b""))
        process.kill()
    return found


# -- logins -------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize(("mode", "open_"), [(0o600, False), (0o644, True)], ids=["its owner's", "control: open"])
def test_login_of_another(place: Path, mode: int, open_: bool) -> None:
    """Another user of the host gets no login of mode 0600. One that is open it gets, so nothing starts with that."""
    from ray_gpu.host_file import VaultPart, read_login

    path, canary = place / "login.json", secrets.token_hex(16)
    path.write_text(json.dumps({"role_id": "r", "secret_id": canary}), encoding="ascii")
    path.chmod(mode)
    stolen = subprocess.run([*_as(STRANGER), "cat", path], capture_output=True, text=True, check=False)
    refused = pytest.raises(ConfigError, match="chmod 600") if open_ else contextlib.nullcontext()

    assert (canary in stolen.stdout) is open_
    with refused:
        assert read_login(VaultPart(address="https://v", credentials=str(path))) == ("r", canary)


# -- what Ray's files leave on a disk -------------------------------------------------------------

#: In a mount namespace of its own: a run directory on a disk, or in memory.
ON_DISK = """
import os, pathlib, shutil, subprocess, sys
from ray_gpu import node, node_identity
mode, image, canary, config = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
node.RUN_DIR.mkdir()
if mode != "tmpfs":
    subprocess.run(["mount", "-o", "loop", image, node.RUN_DIR], check=True)
if mode == "write":
    identity = node_identity.RayIdentity(
        certificate_pem="c", key_pem=canary, ca_pem="a", token=canary, not_after=0
    )
    node_identity.write(identity, node.RUN_DIR / "gpu-1/ray", uid=None)
    shutil.rmtree(node.RUN_DIR / "gpu-1")
else:
    done = subprocess.run(
        [sys.executable, "-c", "from ray_gpu.cli import main; main()", "node", "start", "--config", config],
        capture_output=True, text=True,
    )
    print(done.returncode, done.stderr)
if mode != "tmpfs":
    subprocess.run(["umount", node.RUN_DIR], check=True)
"""


@needs_root
def test_files_on_a_disk(place: Path) -> None:
    """A node does not start where its token would lie on a disk, which keeps what was deleted; in memory it does.

    The control is the token that was written there, deleted, and found in the disk's blocks.
    """
    image, canary = place / "disk", secrets.token_hex(32)
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True)
    config = place / "node.yaml"
    vault = f"{{address: 'https://127.0.0.1:1', credentials: {place}/login.json}}"
    config.write_text(
        f"node: head\nrole: head\naddress: 127.0.0.1\nhead: 127.0.0.1\nstate: {place}/state\n"
        f"cluster: [192.0.2.0/24]\nvault: {vault}\n"
    )
    (place / "login.json").write_text('{"role_id": "r", "secret_id": "s"}')
    (place / "login.json").chmod(0o600)

    def run(mode: str) -> str:
        command = ["unshare", "--mount", "--propagation=private", sys.executable, "-c", ON_DISK, mode]
        command += [str(image), canary, str(config)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90, check=False)
        if "failed to setup loop device" in done.stderr:
            pytest.skip("no loop device can be had here")
        assert done.returncode == 0, done.stderr
        return " ".join(done.stdout.split())

    refused, started = run("start"), run("tmpfs")

    assert "session-on-disk" in refused
    assert "is ext4" in refused
    assert "session-on-disk" not in started
    assert "no answer from Vault" in started
    assert canary.encode() not in image.read_bytes()
    run("write")
    assert canary.encode() in image.read_bytes()
