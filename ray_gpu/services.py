"""Custodian and gateway as processes: how each is started, with what, and ended. This module does I/O.

Run these on the main thread: whatever they start dies with the thread that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_gpu.background import STOP_TIMEOUT_S, plain_environment, write_private
from ray_gpu.ports import GATEWAY_UID
from ray_gpu.sandbox import boundary
from ray_gpu.sandbox import profile as profiles

_PR_SET_PDEATHSIG = 1


def spawn(command: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
    """Start one of our own unconfined processes; it ends with us."""
    with log.open("ab") as output:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=plain_environment(),
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def start_custodian(settings: dict[str, Any], settings_file: Path, *, log: Path) -> subprocess.Popen[bytes]:
    """Start a custodian with what :func:`ray_gpu.custodian.main` reads; its socket's directory is made."""
    Path(settings["socket"]).parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    write_private(settings_file, settings)
    return spawn([sys.executable, "-m", "ray_gpu.custodian", str(settings_file)], log=log)


def start_gateway(settings: dict[str, Any], settings_file: Path, *, log: Path) -> boundary.Confined:
    """Start a gateway, under its own uid when root: it alone can then read the zone's data and ledger.

    Args:
        settings: What :class:`ray_gpu.gateway.Settings` holds, JSON types. The directories that it names are made, and
            belong to the gateway.
        settings_file: Where to leave them for the gateway to read.
        log: Where its output goes.
    """
    uid = GATEWAY_UID if os.geteuid() == 0 else None
    modes = {
        Path(settings["data_dir"]): 0o700,
        Path(settings["ledger"]).parent: 0o700,
        Path(settings["socket_path"]).parent: 0o711,
        Path(settings["relay_socket"]).parent: 0o711,
    }
    for path, mode in modes.items():
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        # Whoever made it before us may have left it open: people of the host read data through the gateway alone.
        path.chmod(mode)
        _give(path, uid)
    write_private(settings_file, settings)
    _give(settings_file, uid)
    readable = [settings_file, Path(settings["policies"])]
    profile = profiles.gateway(
        f"gateway-{settings['zone']}",
        uid=uid,
        bind_ro=(*readable, *([Path(settings["vault_ca"])] if settings["vault_ca"] else [])),
        bind_rw=tuple((path, path) for path in modes),
        caged=boundary.survey().mode != "none",
    )
    command = [sys.executable, "-P", "-m", "ray_gpu.gateway", str(settings_file)]
    with log.open("ab") as output:
        return boundary.launch(command, profile, stdout=output, stderr=output)


def end(process: subprocess.Popen[bytes], *, first_child: bool = False) -> None:
    """Ask a process to end, then make it. Behind bubblewrap the program is its child's child."""
    for pid in _descendants(process.pid) if first_child else [process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S / 2)
    boundary.kill(process)


def last_words(log: Path, start: int = 0) -> str:
    """Return why a process says in a log, from byte *start* on, that it did not start; ``""`` if none says so."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read(1 << 20).decode("utf-8", "replace").splitlines()
    return next((f": {line}" for line in reversed(lines) if " did not start: " in line), "")


def listens(path: Path) -> bool:
    """Whether something accepts connections on a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def _descendants(pid: int) -> list[int]:
    """Return the innermost processes below *pid*, or itself."""
    try:
        children = [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    except OSError:
        children = []
    return [found for child in children for found in _descendants(child)] or [pid]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _give(path: Path, uid: int | None) -> None:
    if uid is None:
        return
    for item in [path, *(path.iterdir() if path.is_dir() else ())]:
        os.chown(item, uid, uid)
