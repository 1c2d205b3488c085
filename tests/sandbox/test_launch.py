"""What a launch gives and takes: uid, memory, files, environment, and the end of it all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ray_gpu import controls
from ray_gpu.sandbox import boundary, cgroup, profile
from ray_gpu.sandbox.boundary import Confined

HARDEN = "from ray_gpu.sandbox.harden import harden_self; harden_self(kind='sandbox');"
UID = 61009
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: uids of their own")
needs_cgroup = pytest.mark.skipif(cgroup.hierarchy() is None, reason="needs a writable memory cgroup")
needs_namespaces = pytest.mark.skipif(boundary.survey().mode == "none", reason="needs a bubblewrap that works here")


def _wait_for(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> bool:
    """Return whether *condition* came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _sandbox(memory_bytes: int | None = 256 << 20, keep_fds: tuple[int, ...] = ()) -> profile.Profile:
    return profile.sandbox("test", uid=UID, memory_bytes=memory_bytes, keep_fds=keep_fds)


@pytest.fixture
def start() -> Iterator[Callable[..., Confined]]:
    """Launch Python code in a profile; whatever is left is ended."""
    started: list[Confined] = []

    def _start(code: str, wanted: profile.Profile) -> Confined:
        command = [sys.executable, "-P", "-c", code]
        process = boundary.launch(command, wanted, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        return process

    yield _start
    for process in started:
        process.end()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def _line(process: Confined) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def _inside(process: Confined) -> list[int]:
    """Return the host's ids of what runs below *process*."""
    found, queue = [], [process.pid]
    while queue:
        pid = queue.pop()
        children = Path(f"/proc/{pid}/task/{pid}/children")
        queue += [int(word) for word in children.read_text(encoding="ascii").split()] if children.exists() else []
        found.append(pid)
    return found[1:]


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _alive(pid: int) -> bool:
    """Return whether *pid* runs; one that ended but was not yet collected does not."""
    try:
        return not _status(pid)["State"].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_root
@needs_namespaces
def test_uid_as_the_host_sees_it(start: Callable[..., Confined]) -> None:
    """User code has its profile's uid and no capability; uid 0 is bubblewrap's reaper alone, without any either."""
    process = start(HARDEN + "print('ready', flush=True); input()", _sandbox())
    assert _line(process) == "ready"

    statuses = [_status(pid) for pid in _inside(process)]

    uids = {status["Name"]: set(status["Uid"].split()) for status in statuses}
    assert uids == {"bwrap": {"0"}, statuses[-1]["Name"]: {str(UID)}}
    assert all(int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0 for status in statuses)
    assert (statuses[-1]["NoNewPrivs"], statuses[-1]["Seccomp"]) == ("1", "2")
    assert int(statuses[-1]["CapBnd"], 16) == 0


def test_environment(start: Callable[..., Confined], monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the launcher comes through, not even by /proc/1, and no trace of the launcher's message."""
    monkeypatch.setenv("RAY_GPU_TEST_SECRET", "canary")
    code = HARDEN + "import os; print('canary' in str(os.environ), 'RAY_GPU_BOUNDARY' in os.environ)"

    assert _line(start(code, _sandbox())) == "False False"
    assert _line(start("import os; print('canary' in str(dict(os.environ)))", _sandbox())) == "False"
    assert "canary" in subprocess.run(["env"], capture_output=True, text=True, check=True).stdout


@needs_namespaces
def test_options_are_not_readable_inside(start: Callable[..., Confined]) -> None:
    """The launcher's command line, which the sandbox can read, names no mount and no host path of one."""
    code = "print(open('/proc/1/cmdline').read().split('\\0')[1:3], flush=True)"

    option, _ = _line(start(code, _sandbox())).strip("[]").replace("'", "").split(", ")

    assert option == "--args"


@needs_cgroup
def test_memory_cap_kills_the_sandbox(start: Callable[..., Confined]) -> None:
    """A sandbox over its cap is killed, and counted as such; below it the same code runs."""
    code = HARDEN + "x = bytearray({} << 20); print('held', flush=True)"
    greedy, modest = start(code.format(400), _sandbox()), start(code.format(50), _sandbox())

    assert _line(modest) == "held"
    assert modest.wait(timeout=20) == 0
    assert _line(greedy) == ""
    assert greedy.wait(timeout=20) != 0
    assert greedy.cgroup is not None
    assert modest.cgroup is not None
    assert greedy.cgroup.oom_kills() >= 1
    assert modest.cgroup.oom_kills() == 0


def _swap_bytes(directory: Path) -> int:
    """Return how much of a group's memory may lie in swap, in bytes."""
    if (directory / "memory.swap.max").exists():
        text = (directory / "memory.swap.max").read_text(encoding="ascii").strip()
        return 1 << 62 if text == "max" else int(text)
    both, memory = (int((directory / name).read_text(encoding="ascii")) for name in _WITH_SWAP_AND_WITHOUT)
    return both - memory


#: Limits of version 1.
_WITH_SWAP_AND_WITHOUT = ("memory.memsw.limit_in_bytes", "memory.limit_in_bytes")


@needs_cgroup
@pytest.mark.parametrize("control", [True, False], ids=["kept out", "not kept out"])
def test_memory_cap_leaves_no_swap(monkeypatch: pytest.MonkeyPatch, control: bool) -> None:
    """A lease's group has none of its memory in swap; where the host cannot keep it out, it could have all."""
    found = cgroup.hierarchy()
    assert found is not None
    if not found.swap_control:
        pytest.skip("needs swap accounting of control groups: boot with swapaccount=1")
    monkeypatch.setattr(cgroup, "hierarchy", lambda: replace(found, swap_control=control))
    group = cgroup.create(f"swap-{os.getpid()}", memory_bytes=256 << 20, processes=None)
    assert group is not None
    try:
        swap_bytes = _swap_bytes(group.directories[0])
    finally:
        group.remove()

    if control:
        assert swap_bytes == 0
    else:
        assert swap_bytes >= 1 << 30


@needs_cgroup
def test_groups_left_behind_are_swept(start: Callable[..., Confined]) -> None:
    """An empty group of a launcher that was killed goes away; one in use stays."""
    process = start(HARDEN + "print('ready', flush=True); input()", _sandbox())
    assert _line(process) == "ready"
    left = cgroup.create(f"left-{os.getpid()}", memory_bytes=None, processes=None)
    assert process.cgroup is not None
    assert left is not None
    parent = left.directories[0].parent

    cgroup.sweep(parent, older_than_s=3600)
    assert left.directories[0].exists()
    os.utime(left.directories[0], (0, 0))
    os.utime(process.cgroup.directories[0], (0, 0))
    cgroup.sweep(parent, older_than_s=3600)

    assert not left.directories[0].exists()
    assert process.cgroup.directories[0].exists()


@needs_namespaces
def test_tmpfs_is_sized(start: Callable[..., Confined]) -> None:
    """/tmp inside takes what its size allows and no more."""
    small = profile.Profile(name="t", kind="sandbox", uid=UID, tmpfs={"/tmp": 1 << 20}, env=profile.python_env())
    code = HARDEN + "f = open('/tmp/filled-by-test', 'wb'); f.write(bytes({})); f.flush(); print('written', flush=True)"

    assert _line(start(code.format(512 << 10), small)) == "written"
    assert _line(start(code.format(2 << 20) + "", small)) == ""


@needs_namespaces
def test_dies_with_its_custodian() -> None:
    """When the launcher is killed, everything inside is gone."""
    code = (
        "import sys; from ray_gpu.sandbox import boundary, profile\n"
        f"p = profile.sandbox('test', uid={UID}, memory_bytes=None, keep_fds=())\n"
        "x = boundary.launch([sys.executable, '-c', 'print(1, flush=True); import time; time.sleep(600)'], p)\n"
        "print(x.pid, flush=True); x.wait()"
    )
    custodian = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert custodian.stdout is not None
    lines = {custodian.stdout.readline().strip() for _ in range(2)}
    (pid,) = (int(line) for line in lines if line != "1")
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    assert below

    custodian.kill()
    custodian.wait()
    custodian.stdout.close()

    assert _wait_for(lambda: not any(_alive(int(child)) for child in below))


def test_survives_the_thread_that_asked_for_it(start: Callable[..., Confined]) -> None:
    """A launch from a short-lived thread does not die with that thread."""
    found: list[Confined] = []
    code = HARDEN + "print('ready', flush=True); input(); print('still here', flush=True)"
    thread = threading.Thread(target=lambda: found.append(start(code, _sandbox())))
    thread.start()
    thread.join()
    assert _line(found[0]) == "ready"

    assert found[0].stdin is not None
    found[0].stdin.write(b"\n")
    found[0].stdin.flush()

    assert _line(found[0]) == "still here"


def test_end_leaves_nothing(start: Callable[..., Confined]) -> None:
    """Ending a launch ends what it started, and removes its control group; ending it twice is fine."""
    code = HARDEN + "import os; os.fork(); os.setsid() if os.getpid() > 9 else 0; print('ready', flush=True); input()"
    process = start(code, _sandbox())
    assert _line(process) == "ready"
    below = _inside(process)

    process.end()
    process.end()

    assert not any(_alive(pid) for pid in below)
    if process.cgroup is not None:
        assert not any(directory.exists() for directory in process.cgroup.directories)


def test_descriptors(start: Callable[..., Confined]) -> None:
    """A socket named in the profile works inside, and its end is noticed outside."""
    ours, theirs = socket.socketpair()
    code = HARDEN + f"import socket; socket.socket(fileno={theirs.fileno()}).send(b'hello')"
    start(code, _sandbox(keep_fds=(theirs.fileno(),)))
    theirs.close()

    with ours:
        assert ours.recv(16) == b"hello"
        assert ours.recv(16) == b""


def test_libraries_work_inside(start: Callable[..., Confined]) -> None:
    """NumPy and Arrow compute under every layer."""
    code = HARDEN + "import numpy as n, pyarrow as a; print(a.array((n.ones((300, 300)) @ n.ones((300, 1)))[:, 0])[7])"

    assert _line(start(code, _sandbox(1 << 30))) == "300.0"


def test_keeper_starts_no_program(start: Callable[..., Confined]) -> None:
    """A keeper cannot execute anything; a sandbox can, without gaining anything by it."""
    code = (
        "from ray_gpu.sandbox.harden import harden_self; harden_self(kind='{}')\nimport os\n"
        "try: os.execv('/bin/echo', ['echo', 'ran'])\nexcept OSError as e: print(e.errno, flush=True)"
    )
    keeper = profile.keeper("test", uid=UID, memory_bytes=None, keep_fds=())

    assert _line(start(code.format("keeper"), keeper)) == "1"
    assert _line(start(code.format("sandbox"), _sandbox())) == "ran"


@needs_root
@needs_namespaces
def test_cage(start: Callable[..., Confined]) -> None:
    """A cage has the network and its own shared memory, and not the host's files."""
    code = (
        "import os, socket; s = socket.create_server(('127.0.0.1', 0)); open('/dev/shm/x', 'w').write('x')\n"
        "print(os.getuid(), os.path.exists('/etc/passwd'), os.listdir('/dev/shm'), flush=True)"
    )
    caged = profile.cage("test", uid=UID, tmpfs={"/tmp": 1 << 20, "/dev/shm": 1 << 20}, env={}, network=True)

    assert _line(start(code, caged)) == f"{UID} False ['x']"
    assert Path("/etc/passwd").exists()


@needs_root
@pytest.mark.parametrize("uid", [None, 0])
def test_root_must_name_a_uid(uid: int | None) -> None:
    """As root, no launch without a uid other than 0."""
    with pytest.raises(ValueError, match="uid other than 0"):
        boundary.launch(["/bin/true"], profile.Profile(name="t", kind="sandbox", uid=uid))


THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True).start();"


@pytest.mark.parametrize(("before", "reason"), [("", "uid 0"), (THREAD, "first thread")], ids=["root", "threads"])
def test_harden_refuses(before: str, reason: str) -> None:
    """A process with uid 0, or with threads, cannot be hardened."""
    if not before and os.geteuid() != 0:
        pytest.skip("needs root: hardening as uid 0")
    done = subprocess.run([sys.executable, "-c", before + HARDEN], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert reason in done.stderr


def test_every_degradation_is_explained() -> None:
    """Whatever the survey may report has a meaning and a fix."""
    for kind in ("sandbox", "keeper", "cage"):
        assert set(boundary.degradations(kind)) <= set(controls.CONTROLS)
    assert all(control.meaning.endswith(".") and control.fix.endswith(".") for control in controls.CONTROLS.values())
    assert controls.describe(["swap-on", "unheard-of"]).count("\n") == 1
