"""The demo's functions inside the strict sandbox, without Ray: on a GPU where there is one, with NumPy everywhere.

Whether it ran on a GPU is printed, or named among the tests that did not run. What CUDA asks of the system when it
starts is tried on every machine, by a program that stands in for it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_gpu.sandbox import boundary, profile
from ray_gpu.sandbox.survey import survey

HERE = Path(__file__).resolve().parent
#: Any device node stands in for a GPU's: it makes the profile one with a GPU.
STAND_IN = (Path("/dev/full"),)
needs_namespaces = pytest.mark.skipif(survey().mode == "none", reason="needs a bubblewrap that works here")
needs_layers = pytest.mark.skipif(
    not survey().seccomp or survey().landlock_abi < 3, reason="needs libseccomp and Landlock"
)
#: What CUDA does when it starts, in words of Python; each line of its own is tried by itself.
STARTS = {
    "listen on an abstract socket": "s = socket.socket(1, 5); s.bind('\\0cuda-uvmfd-test'); s.listen(1)",
    "name a thread": "open(f'/proc/self/task/{threading.get_native_id()}/comm', 'w').write('cuda-worker')",
    "write /dev/shm": "open('/dev/shm/cuda.shm.0', 'w').write('x')",
}
#: What must stay refused although the system calls of CUDA's start are near it.
REFUSED = {
    "connect": "s = socket.socket(1, 5); s.connect('\\0cuda-uvmfd-test')",
    "accept": "s = socket.socket(1, 5); s.bind('\\0b'); s.listen(1); s.setblocking(False); s.accept()",
    "stream socket": "socket.socket(1, 1)",
    "datagram socket": "socket.socket(1, 2)",
    "tcp socket": "socket.socket(2, 1)",
    "tcp socket by another type": "socket.socket(2, 5)",
    "core mask": "open('/proc/self/coredump_filter', 'w').write('7f')",
    "another process": "open('/proc/1/comm', 'w').write('x')",
    "own memory by its file": "open('/proc/self/mem', 'r+b')",
}
#: Runs a program as if Ray were not installed: importing it fails.
WITHOUT_RAY = (
    "import runpy, sys; sys.modules['ray'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
)
PROBE = """
from ray_gpu.sandbox.harden import harden_self
assert harden_self(kind="sandbox") == ()
import json, socket, sys, threading
out = {}
for name, code in json.loads(sys.argv[1]).items():
    try:
        exec(code, globals())
        out[name] = "done"
    except PermissionError as error:
        out[name] = "refused"
    except OSError as error:
        out[name] = f"error {error.errno}"
print(json.dumps(out))
"""


def _run(*, gpu: bool) -> dict[str, Any]:
    command = [sys.executable, "-c", WITHOUT_RAY, str(HERE / "sandboxed.py"), json.dumps({"gpu": gpu})]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(HERE.parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _check(result: dict[str, Any]) -> None:
    assert result["fit"] < 1e-8
    assert result["score"] < 1e-9
    assert result["rows"] == 569
    assert result["ray"] == []
    assert result["missing"] == []


def test_stand_in() -> None:
    """Without a GPU in the sandbox NumPy computes there, exactly; nothing needs Ray."""
    result = _run(gpu=False)

    _check(result)
    assert result["array"].startswith("numpy.")
    assert result["device"].startswith("numpy stand-in")
    if os.geteuid() == 0 and not boundary.degradations():
        assert result["level"] == "strict"


@pytest.mark.timeout(600)
def test_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """With ``batch.xp`` = CuPy the same functions give the same results as NumPy, inside the strict sandbox."""
    if not boundary.gpu_devices():
        pytest.skip("no NVIDIA driver here: no /dev/nvidia*; the same functions ran with NumPy only")
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("a GPU is here but CuPy is not installed (make gpu)")
    result = _run(gpu=True)

    _check(result)
    assert result["array"].startswith("cupy.")
    with capsys.disabled():
        sys.stdout.write(f"\nthe demo's functions ran on {result['device']}, sandbox level {result['level']}\n")


@functools.cache
def _probe(devices: tuple[Path, ...]) -> dict[str, str]:
    """Return what became of every attempt in a sandbox that has these devices."""
    wanted = profile.sandbox("gpu-probe", uid=61012, memory_bytes=256 << 20, keep_fds=(), devices=devices)
    command = [sys.executable, "-P", "-c", PROBE, json.dumps({**STARTS, **REFUSED})]
    process = boundary.launch(command, wanted, stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.end()
    result: dict[str, str] = json.loads(output)
    return result


@needs_namespaces
@needs_layers
@pytest.mark.parametrize("name", STARTS)
def test_what_cuda_needs(name: str) -> None:
    """A sandbox with a GPU lets CUDA start; one without refuses the same."""
    assert _probe(STAND_IN)[name] == "done"
    assert _probe(())[name] != "done"


@needs_namespaces
@needs_layers
@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_refused(name: str) -> None:
    """What lies next to CUDA's start is refused with a GPU as without."""
    assert _probe(STAND_IN)[name] == "refused"
    assert _probe(())[name] == "refused"


def test_what_cuda_reads_is_no_more() -> None:
    """Of /sys a sandbox with a GPU sees what CUDA reads: no control groups, which name other leases, and no network."""
    shown = profile.sandbox("t", uid=1, memory_bytes=None, keep_fds=(), devices=STAND_IN).bind_ro

    assert Path("/sys/devices/system/cpu") in shown
    assert all(path.is_relative_to("/sys") for path in shown)
    assert not any(Path(place).is_relative_to(path) for path in shown for place in ("/sys/fs/cgroup", "/sys/class/net"))
    assert profile.sandbox("t", uid=1, memory_bytes=None, keep_fds=()).bind_ro == ()
