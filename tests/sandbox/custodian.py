"""Stands in for a custodian of any identity: sets up targets, runs the probe plainly and confined.

``python custodian.py JSON`` with ``{"uid": int | null, "deny_userns": bool, "site": str, "ray": bool}`` prints
``{"control": ..., "inside": ..., "degradations": ..., "written": [...], ...}``, with Ray started too where *ray*
asks for it. As root, it becomes *uid* first, in a child user namespace of its own where *deny_userns* asks for that
limit: the host's limit is never changed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.sandbox.bait import Bait, own_network

HERE = Path(__file__).resolve().parent
#: Attempts that would end their sandbox, and what a probe for them alone is told. More than the profile below allows.
BOMBS = {"fork bomb", "memory bomb", "memory bomb in a file"}
BOMB = {"bomb_processes": 600, "bomb_bytes": 300 << 20}


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
    own_network()
    become(wanted["uid"], deny_userns=wanted["deny_userns"])
    from ray_gpu.sandbox import boundary

    canary = secrets.token_hex(8)
    os.environ["LAUNCHER_CANARY"] = canary
    with tempfile.TemporaryDirectory(prefix="b") as directory, Bait(Path(directory), canary) as bait:
        ray = {"ray_directory": f"{directory}/r"} if wanted["ray"] else {}
        control = plain({**bait.target, **BOMB, **ray, "limit_s": 150})
        result = {"control": control, "control_written": bait.written(), "control_arrived": bait.heard()}
        inner = battery_profile(Path(wanted["site"]))
        inside = confined(inner, {**bait.target, **ray, **({"limit_s": 100} if ray else {})})
        for bomb in sorted(BOMBS):
            inside["outcomes"] |= confined(inner, {**bait.target, **BOMB, "only": [bomb]})["outcomes"]
        result |= {"inside": inside, "arrived": bait.heard()}
        # bubblewrap alone, without the layers that the child puts on itself.
        bare = confined(inner, {**bait.target, "bare": boundary.survey().mode != "none"})
        result |= {"bare": bare, "bare_arrived": bait.heard(), "written": bait.written()}
    sys.stdout.write(json.dumps({**result, "degradations": boundary.degradations()}))


def battery_profile(site: Path, keep_fds: tuple[int, ...] = ()) -> Any:
    """Return a sandbox's profile whose caps are small enough to be tried."""
    from ray_gpu.sandbox import profile

    return profile.Profile(
        name="battery", kind="sandbox", uid=61007, bind_ro=(HERE, site), tmpfs={"/tmp": 1 << 20}, keep_fds=keep_fds,
        memory_bytes=256 << 20, processes=64,
        env={**profile.python_env(), "PYTHONPATH": os.environ["PYTHONPATH"]},
    )  # fmt: skip


def confined(inner: Any, target: dict[str, Any]) -> dict[str, Any]:
    """Run the probe inside; what kills it all is the refusal of the one attempt that it was to make."""
    from ray_gpu.sandbox import boundary

    reader, writer = os.pipe()
    os.write(writer, b"kept")
    inner = dataclasses.replace(inner, keep_fds=(*inner.keep_fds, reader))
    command = [sys.executable, str(HERE / "probe.py"), json.dumps({**target, "kept_fd": reader})]
    process = boundary.launch(command, inner, stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=120)
    process.end()
    os.close(reader)
    os.close(writer)
    if not output and len(target.get("only", ())) == 1:
        return {"outcomes": {target["only"][0]: "refused: killed with its sandbox"}}
    result: dict[str, Any] = json.loads(output)
    return result


def plain(target: dict[str, Any]) -> dict[str, Any]:
    """Run the probe as it is."""
    command = [sys.executable, str(HERE / "probe.py"), json.dumps(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, close_fds=False, timeout=180, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
