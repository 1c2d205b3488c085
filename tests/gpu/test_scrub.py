"""What one process leaves in GPU memory the next does not find once it was scrubbed. Needs a GPU and CuPy."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from ray_gpu.sandbox import boundary, profile
from ray_gpu.sandbox.scrub import scrub

UID = 61014
#: Takes pieces of all memory that is free, and fills them with a word, or counts the pieces that have it.
PROGRAM = """
import json, sys
from ray_gpu.sandbox.harden import harden_self
harden_self(kind="sandbox")
import cupy
action, word = sys.argv[1], int(sys.argv[2])
runtime, kept, found = cupy.cuda.runtime, [], 0
while True:
    try:
        memory = cupy.cuda.Memory(256 << 20)
    except runtime.CUDARuntimeError:
        break
    except cupy.cuda.memory.OutOfMemoryError:
        break
    kept.append(memory)
    words = cupy.ndarray((memory.size // 8,), cupy.uint64, cupy.cuda.MemoryPointer(memory, 0))
    if action == "fill":
        # Element by element, so that filling needs no memory of its own.
        words[:] = word
    else:
        found += any(int(words[at].get()) == word for at in range(0, words.size, 1 << 17))
runtime.deviceSynchronize()
print(json.dumps({"pieces": len(kept), "found": found}))
"""
WORD = 0x5CA1AB1EDEFACED5


def _run(action: str) -> dict[str, int]:
    """Run the program in a sandbox with the GPU, as a lease's function would run."""
    wanted = profile.sandbox(
        "leftover", uid=UID, memory_bytes=4 << 30, keep_fds=(), devices=tuple(boundary.gpu_devices())
    )
    process = boundary.launch([sys.executable, "-P", "-c", PROGRAM, action, str(WORD)], wanted, stdout=subprocess.PIPE)
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.end()
    result: dict[str, int] = json.loads(output)
    return result


@pytest.mark.timeout(900)
def test_leftovers_are_scrubbed() -> None:
    """After a scrub nothing is left of what a process had filled all memory with. Control: without one, it is."""
    if not boundary.gpu_devices():
        pytest.skip("no NVIDIA driver here: no /dev/nvidia*; that the scrub clears GPU memory is unproven here")
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("a GPU is here but CuPy is not installed (make gpu); the scrub is unproven here")
    assert _run("fill")["pieces"] > 0
    left = _run("look")["found"]
    assert _run("fill")["pieces"] > 0
    scrubbed = scrub(UID, boundary.gpu_devices())

    assert scrubbed is not None
    assert scrubbed > 256 << 20
    looked = _run("look")
    assert looked["pieces"] > 0
    assert looked["found"] == 0
    if not left:
        pytest.skip("this driver clears GPU memory itself between processes: with and without scrub nothing was left")
