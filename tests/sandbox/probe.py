"""Escape attempts, one for each word of the attack suite's list. Made inside a sandbox and, as control, outside.

``python probe.py JSON`` prints ``{"outcomes": {"name": "done" | "refused: ..."}, ...}``, each attempt made in a process
of its own. It confines itself first when a launcher prepared it. :func:`packed` is what does the same for a function
that a sandbox of the product runs. x86_64 only.

The target says what is there to be reached; attempts that need something that it lacks are not made.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.sandbox import kernel, reach
from tests.sandbox.reach import TARGET, Attempt

#: An attempt that hangs is given up, seconds, unless its target says otherwise.
LIMIT_S = 45
ATTEMPTS: dict[str, Attempt] = {**reach.ATTEMPTS, **kernel.ATTEMPTS}
#: What only a running cluster has of what attempts need.
CLUSTER = {
    "custodian_socket", "gateway_socket", "relay_socket", "raylet_socket", "plasma_socket", "cluster_name", "gcs",
    "raylet", "endpoint", "vault", "custodian", "keeper", "other_sandbox",
}  # fmt: skip


def packed() -> bytes:
    """Return this module and those that it needs as a program that defines ``run``, compressed with zlib."""
    text = "import sys, types\n"
    for name in ("tests", "tests.sandbox", "tests.sandbox.reach", "tests.sandbox.kernel", "tests.sandbox.probe"):
        path = Path(__file__).resolve().with_name(f"{name.rpartition('.')[2]}.py")
        source = path.read_text(encoding="utf-8") if path.exists() else "__path__ = []"
        text += f"module = sys.modules[{name!r}] = types.ModuleType({name!r})\n"
        text += f"exec({source!r}, module.__dict__)\n"
        text += "parent, _, name = module.__name__.rpartition('.')\n"
        text += "if parent: setattr(sys.modules[parent], name, module)\n"
    return zlib.compress(f"{text}run = module.run\n".encode(), 9)


def run(target: dict[str, Any]) -> dict[str, str]:
    """Make every attempt for which *target* has what it needs, or those of its ``only``; return the outcomes."""
    TARGET.clear()
    TARGET.update(target)
    return {
        name: _in_child(attempt)
        for name, (needed, attempt) in ATTEMPTS.items()
        if (not needed or needed in target) and name in target.get("only", ATTEMPTS)
    }


def _in_child(attempt: Callable[[], object]) -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TARGET.get("limit_s", LIMIT_S))
        try:
            attempt()
            text = "done"
        except BaseException as error:  # noqa: BLE001 - every failure is an outcome
            text = f"refused: {error!r}"
        with contextlib.suppress(OSError):
            os.write(writer, text[:1000].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode()
    os.waitpid(pid, 0)
    return text or "refused: killed"


def _take_off(layers: Iterable[str]) -> None:
    """Make these layers of :func:`harden_self` do nothing."""
    from ray_gpu.sandbox import harden, landlock, seccomp

    def promise_alone(_: object) -> None:
        # Of the limits, what seccomp and Landlock need of an unprivileged process.
        assert ctypes.CDLL(None).prctl(38, ctypes.c_ulong(1), 0, 0, 0) == 0

    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731 - stands in for several
    places: dict[str, tuple[Any, str, Callable[..., None]]] = {
        "landlock": (landlock, "restrict", nothing),
        "seccomp": (seccomp, "load", nothing),
        "descriptors": (harden, "_close_others", nothing),
        "limits": (harden, "_limit", promise_alone),
    }
    for layer in layers:
        module, name, stand_in = places[layer]
        setattr(module, name, stand_in)


def main() -> None:
    """Confine this process if a launcher prepared it, try everything, print the outcomes."""
    target = json.loads(sys.argv[1])
    missing: tuple[str, ...] = ()
    if "RAY_GPU_BOUNDARY" in os.environ and not target.get("bare"):
        from ray_gpu.sandbox.harden import harden_self

        _take_off(target.get("off", ()))
        # As a sandbox does, which has mapped one of the descriptors that it started with.
        missing = harden_self(kind="sandbox", keep_fds=(target["kept_fd"],))
    outcomes = run(target)
    kept = os.read(target["kept_fd"], 4).decode() if "kept_fd" in target else ""
    print(json.dumps({"outcomes": outcomes, "missing": missing, "kept": kept, "uid": os.getuid()}))  # noqa: T201 - the output


if __name__ == "__main__":
    main()
