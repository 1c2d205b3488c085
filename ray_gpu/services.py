"""Custodian and gateway as processes: how each is started, with what, and ended. This module does I/O.

Run these on the main thread: whatever they start dies with the thread that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_gpu import staging
from ray_gpu.background import STOP_TIMEOUT_S, plain_environment, write_private
from ray_gpu.handover import secret_file
from ray_gpu.ports import GATEWAY_UID
from ray_gpu.raylet import CUSTODIAN_SOCKET, RELAY_SOCKET
from ray_gpu.sandbox import boundary
from ray_gpu.sandbox import profile as profiles
from ray_gpu.state import Layout
from ray_gpu.wire import MalformedMessageError, recv_message, send_message, unix_connect
from zones.errors import ClusterError

_PR_SET_PDEATHSIG = 1


def spawn(command: Sequence[str], *, log: Path, secret: str | None = None) -> subprocess.Popen[bytes]:
    """Start one of our own unconfined processes, with a secret that it takes by standard input; it ends with us."""
    with log.open("ab") as output, _standard_input(secret) as stdin:
        return subprocess.Popen(
            list(command),
            stdin=stdin,
            stdout=output,
            stderr=output,
            cwd="/",
            env=plain_environment(),
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VaultLogin:
    """Where Vault is, and an AppRole's login for it."""

    address: str
    #: PEM file; ``None`` for the system's CAs.
    ca: str | None
    role_id: str
    secret_id: str = field(repr=False)

    def settings(self) -> dict[str, Any]:
        """Return what custodian and gateway read of it in a file. The secret they get by standard input."""
        return {"vault": self.address, "vault_ca": self.ca, "role_id": self.role_id}


def start_custodian(
    layout: Layout, node: str, login: VaultLogin, *, log: Path, **settings: Any
) -> subprocess.Popen[bytes]:
    """Start a node's custodian; its socket's directory is made.

    Args:
        layout: Where the node's directory is.
        node: Node id.
        login: The node's own.
        log: Where its output goes.
        settings: What :func:`ray_gpu.custodian.main` reads besides, JSON types.
    """
    socket_dir, settings_file = layout.custodian_dir(node), layout.node(node) / "settings.json"
    socket_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    own = {"node": node, "socket": str(socket_dir / CUSTODIAN_SOCKET), "environments": str(layout.environments)}
    write_private(settings_file, {**own, **login.settings(), **settings})
    return spawn([sys.executable, "-m", "ray_gpu.custodian", str(settings_file)], log=log, secret=login.secret_id)


def start_gateway(
    layout: Layout,
    zone: str,
    login: VaultLogin,
    *,
    log: Path,
    data_dir: str | None = None,
    memory_bytes: int | None = None,
    **settings: Any,
) -> boundary.Confined:
    """Start a gateway, under its own uid when root: it alone can then read the zone's data and ledger.

    Args:
        layout: Where the zone's directories are. They are made, and belong to the gateway.
        zone: Name of the zone.
        login: The gateway's own.
        log: Where its output goes.
        data_dir: The zone's data sets, if not in *layout*.
        memory_bytes: What the gateway may use of memory; ``None``: as much as the machine has.
        settings: What :class:`ray_gpu.gateway.Settings` holds besides, JSON types.
    """
    if memory_bytes is not None and boundary.survey().cgroup is None:
        raise ClusterError(
            "the gateway's memory cannot be capped: this host has no control groups with a memory controller that "
            "this user may use; leave memory_mib out, or make them available",
            node="",
            reason="no control group",
        )
    uid = GATEWAY_UID if os.geteuid() == 0 else None
    data, settings_file = Path(data_dir or layout.data(zone)), layout.zone(zone) / "settings.json"
    own = {
        "zone": zone,
        "data_dir": str(data),
        "memory_bytes": memory_bytes or staging.machine_bytes(),
        "ledger": str(layout.ledger(zone)),
        "socket_path": str(layout.gateway_socket(zone)),
        "relay_socket": str(layout.relay_dir(zone) / RELAY_SOCKET),
    }
    modes = {
        data: 0o700,
        layout.ledger(zone).parent: 0o700,
        layout.gateway_socket(zone).parent: 0o711,
        layout.relay_dir(zone): 0o711,
    }
    for path, mode in modes.items():
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        # Whoever made it before us may have left it open: people of the host read data through the gateway alone.
        path.chmod(mode)
        _give(path, uid)
    write_private(settings_file, {**own, **login.settings(), **settings})
    _give(settings_file, uid)
    readable = [settings_file, Path(settings["policies"]), *([Path(login.ca)] if login.ca else [])]
    profile = profiles.gateway(
        f"gateway-{zone}",
        uid=uid,
        bind_ro=tuple(readable),
        bind_rw=tuple((path, path) for path in modes),
        caged=boundary.survey().namespaces,
        memory_bytes=memory_bytes,
    )
    command = [sys.executable, "-P", "-m", "ray_gpu.gateway", str(settings_file)]
    with log.open("ab") as output, _standard_input(login.secret_id) as stdin:
        return boundary.launch(command, profile, stdin=stdin, stdout=output, stderr=output)


def publish(layout: Layout, zone: str, login: VaultLogin) -> None:
    """Write what notebooks on this host may know of a zone whose gateway runs."""
    public = {
        "socket": str(layout.gateway_socket(zone)),
        "vault": login.address,
        "vault_ca": login.ca,
        "ledger": str(layout.ledger(zone)),
    }
    path = layout.public(zone)
    path.write_text(json.dumps(public), encoding="utf-8")
    path.chmod(0o644)


def await_until(
    there: Callable[[], bool], *, check: Callable[[], None], timeout_s: float, failure: ClusterError
) -> None:
    """Wait until something is there.

    Args:
        there: Whether it is.
        check: Raises when it cannot come any more.
        timeout_s: Longest wait, seconds.
        failure: Raised after that.
    """
    deadline = time.monotonic() + timeout_s
    while not there():
        check()
        if time.monotonic() > deadline:
            raise failure
        time.sleep(0.02)


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


def gateway_is_ready(path: Path) -> bool:
    """Whether a gateway serves people: its relay has joined."""
    return ask_gateway(path, "ready").get("ready") is True


def ask_gateway(path: Path, op: str) -> dict[str, Any]:
    """Ask a gateway a question that needs no session; nothing is the answer of one that does not answer."""
    try:
        with unix_connect(str(path)) as sock:
            send_message(sock, {"op": op})
            return recv_message(sock)[0]
    except (OSError, MalformedMessageError):
        return {}


def _descendants(pid: int) -> list[int]:
    """Return the innermost processes below *pid*, or itself."""
    try:
        children = [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]
    except OSError:
        children = []
    return [found for child in children for found in _descendants(child)] or [pid]


@contextlib.contextmanager
def _standard_input(secret: str | None) -> Iterator[int]:
    """Yield what a process is started with as its standard input."""
    fd = subprocess.DEVNULL if secret is None else secret_file(secret)
    try:
        yield fd
    finally:
        if secret is not None:
            os.close(fd)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _give(path: Path, uid: int | None) -> None:
    if uid is None:
        return
    for item in [path, *(path.iterdir() if path.is_dir() else ())]:
        os.chown(item, uid, uid)
