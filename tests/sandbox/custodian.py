"""Stands in for a custodian of any identity: sets up targets, runs the probe plainly and confined.

``python custodian.py JSON`` with ``{"uid": int | null, "deny_userns": bool, "site": str}`` prints
``{"control": ..., "inside": ..., "degradations": ..., "written": [...], ...}``. As root, it
becomes *uid* first, in a child user namespace of its own where *deny_userns* asks for that limit:
the host's limit is never changed.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VICTIM = """
import ctypes, sys
secret = ctypes.create_string_buffer(b"host memory")
print(ctypes.addressof(secret), flush=True)
sys.stdin.read()
"""


def become(uid: int | None, *, deny_userns: bool) -> None:
    """Change to *uid*, without user namespaces if asked."""
    if deny_userns:
        _enter_userns()
        Path("/proc/sys/user/max_user_namespaces").write_text("0", encoding="ascii")
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _enter_userns() -> None:
    """Enter a user namespace that maps every id to itself; a parent must write the maps."""
    ready, go = os.pipe(), os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.read(ready[0], 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{parent}/{name}").write_text("0 0 65536\n", encoding="ascii")
        os.write(go[1], b"g")
        os._exit(0)
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    os.write(ready[1], b"r")
    os.read(go[0], 1)
    os.waitpid(pid, 0)


def main() -> None:
    """See the module."""
    wanted = json.loads(sys.argv[1])
    become(wanted["uid"], deny_userns=wanted["deny_userns"])
    from ray_gpu.sandbox import boundary, profile

    canary = secrets.token_hex(8)
    os.environ["LAUNCHER_CANARY"] = canary
    with tempfile.TemporaryDirectory(prefix="b") as directory:
        target, listeners, victim = _targets(Path(directory), canary)
        try:
            control = _control(target)
            written, control_arrived = _take_written(target), _arrived(listeners[1])
            reader, writer = os.pipe()
            os.write(writer, b"kept")
            inner = profile.Profile(
                name="battery", kind="sandbox", uid=61007, bind_ro=(HERE, Path(wanted["site"])), keep_fds=(reader,),
                tmpfs={"/tmp": 1 << 20}, memory_bytes=256 << 20, processes=64,
                env={**profile.python_env(), "PYTHONPATH": os.environ["PYTHONPATH"]},
            )  # fmt: skip
            inside = _confined(inner, {**target, "kept_fd": reader})
            # bubblewrap alone, without the layers that the child puts on itself.
            os.write(writer, b"kept")
            arrived = _arrived(listeners[1])
            bare = _confined(inner, {**target, "kept_fd": reader, "bare": boundary.survey().mode != "none"})
            bare_arrived = _arrived(listeners[1])
        finally:
            victim.kill()
            victim.wait()
        del listeners
        sys.stdout.write(json.dumps({
            "control": control, "inside": inside, "bare": bare, "written": _take_written(target),
            "control_written": written, "arrived": arrived, "control_arrived": control_arrived,
            "bare_arrived": bare_arrived, "degradations": boundary.degradations(),
        }))  # fmt: skip


def _targets(directory: Path, canary: str) -> tuple[dict[str, Any], list[socket.socket], subprocess.Popen[bytes]]:
    (directory / "d").mkdir()
    (directory / "m").mkdir()
    (directory / "secret").write_text("secret", encoding="ascii")
    listeners = []
    for family, kind, address in (
        (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        (socket.AF_UNIX, socket.SOCK_STREAM, str(directory / "s")),
        (socket.AF_UNIX, socket.SOCK_DGRAM, str(directory / "g")),
        (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{canary}"),
    ):
        listener = socket.socket(family, kind)
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen(8)
        listeners.append(listener)
    os.chmod(directory, 0o755)
    for name in ("d", "s", "g"):
        os.chmod(directory / name, 0o777)
    victim = subprocess.Popen([sys.executable, "-c", VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert victim.stdout is not None
    os.dup2(os.open("/dev/zero", os.O_RDONLY), 77)
    os.set_inheritable(77, True)
    return (
        {
            "file_name": f"escaped-{canary}", "directory": str(directory / "d"), "mount_point": str(directory / "m"),
            "secret_file": str(directory / "secret"), "tcp": listeners[0].getsockname()[1],
            "udp": listeners[1].getsockname()[1], "unix": str(directory / "s"), "unix_datagram": str(directory / "g"),
            "abstract": canary, "victim": victim.pid, "victim_address": int(victim.stdout.readline()),
            "canary": canary, "stray_fd": 77,
        },
        listeners,
        victim,
    )  # fmt: skip


def _confined(inner: Any, target: dict[str, Any]) -> dict[str, Any]:
    from ray_gpu.sandbox import boundary

    command = [sys.executable, str(HERE / "probe.py"), json.dumps(target)]
    process = boundary.launch(command, inner, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=60)
    process.end()
    result: dict[str, Any] = json.loads(output)
    return result


def _control(target: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "probe.py"), json.dumps(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, close_fds=False, timeout=60, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _arrived(datagrams: socket.socket) -> bool:
    """Return whether a datagram came, and take it."""
    try:
        return datagrams.recv(64, socket.MSG_DONTWAIT) == b"escaped"
    except BlockingIOError:
        return False


def _take_written(target: dict[str, Any]) -> list[str]:
    """Return, and remove, the escaped files that lie on the host."""
    found = []
    for directory in ("/", "/usr", "/var/tmp", "/dev/shm", "/tmp", target["directory"]):
        path = Path(directory) / target["file_name"]
        if path.exists():
            found.append(directory)
            path.unlink()
    return found


if __name__ == "__main__":
    main()
