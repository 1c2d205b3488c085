"""The escape battery on a cluster of somebody who is not root, with and without user namespaces (attack suite, 2).

What such a cluster cannot hold is what its degradations say, and nothing else.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.job.test_degraded import PROJECT, command_as, environment
from tests.proofs.test_sandbox_escape import HEARD, UNMADE
from tests.sandbox import probe
from tests.sandbox.test_boundary import PRIVILEGED

#: Who runs the cluster, and what the sandbox lacks for it.
WHO: dict[str, dict[str, Any]] = {
    "user": {"uid": 61980, "deny_userns": False, "container": False, "lacks": {"shared-uid", "no-cgroup"}},
    "user-without-userns": {
        "uid": 61981, "deny_userns": True, "container": False, "lacks": {"shared-uid", "no-cgroup", "no-namespaces"},
    },
}  # fmt: skip
#: What a cluster does not hold, if it says that it lacks all of these.
ALLOWED = {"fork bomb": {"no-cgroup", "no-namespaces"}}
#: Filling 4 GiB where nothing caps it could take the machine: test_boundary.py does both with a small cap.
NOT_HERE = {"memory bomb", "memory bomb in a file"}
#: Refused outside too, to anybody but root: these processes are not open to their own uid. The host's root reaches them
#: in tests/proofs.
CLOSED = {
    "custodian's memory", "custodian's environment", "keeper's memory", "keeper's environment", "keeper's socket",
    "other lease's memory",
}  # fmt: skip
#: What denying user namespaces denies to everybody.
DENIED = {"user namespace", "clone user namespace", "clone3 user namespace"}
ATTEMPTS = [name for name in probe.ATTEMPTS if name not in NOT_HERE]
#: More processes than a sandbox may have.
BOMB_PROCESSES = 1100

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(600),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the probe's system call numbers are x86_64's"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes somebody with less"),
]


def _fought(who: str) -> dict[str, Any]:
    """Return what the battery found on one cluster."""
    done = _run(who)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@functools.cache
def _run(who: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="rg") as name:
        home = Path(name)
        os.chown(home, WHO[who]["uid"], WHO[who]["uid"])
        wanted = {"state": str(home / "s"), "mark": secrets.token_hex(12), "bomb_processes": BOMB_PROCESSES}
        script = str(Path(__file__).with_name("nonroot.py"))
        return subprocess.run(
            command_as(WHO[who], sys.executable, script, json.dumps(wanted)), env=environment(home), cwd=PROJECT,
            capture_output=True, text=True, timeout=540, check=False,
        )  # fmt: skip


@pytest.mark.parametrize("who", WHO)
def test_who_runs_it(who: str) -> None:
    """It is somebody else's cluster, and it says what it lacks."""
    found = _fought(who)

    assert found["uid"] == WHO[who]["uid"]
    assert WHO[who]["lacks"] <= set(found["degradations"])
    assert "no-namespaces" in WHO[who]["lacks"] or "no-namespaces" not in found["degradations"]


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_refused(attempt: str, who: str) -> None:
    """Nothing works from inside that the degradations do not speak of."""
    found = _fought(who)
    if attempt not in found["inside"]:
        pytest.skip(UNMADE[attempt])
    if ALLOWED.get(attempt, {""}) <= set(found["degradations"]):
        pytest.skip("nothing caps it here, and the sandbox says so: test_declared_weakness")
    assert found["inside"][attempt].startswith("refused")


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("attempt", ALLOWED)
def test_declared_weakness(attempt: str, who: str) -> None:
    """Control: what a weaker cluster does not hold works there, and its sandbox says so; elsewhere it does not."""
    found = _fought(who)
    inside = found["inside"][attempt]

    assert inside == "done" if ALLOWED[attempt] <= set(found["degradations"]) else inside.startswith("refused")


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("attempt", [name for name in ATTEMPTS if name not in PRIVILEGED | CLOSED])
def test_same_uid_can_do_it_outside(attempt: str, who: str) -> None:
    """The same program does it outside the sandbox, run by the one who runs the cluster."""
    found = _fought(who)
    if attempt not in found["outside"]:
        pytest.skip(UNMADE[attempt])
    if WHO[who]["deny_userns"] and attempt in DENIED:
        assert found["outside"][attempt].startswith("refused")
        return
    assert found["outside"][attempt] == "done"


@pytest.mark.parametrize("who", WHO)
def test_nothing_reached_the_host(who: str) -> None:
    """No file and no message came out of the sandbox; both did from outside."""
    found = _fought(who)

    assert found["files_inside"] == []
    assert found["heard_inside"] == 0
    assert len(found["files_outside"]) >= 2
    assert found["heard_outside"] == len(HEARD & found["outside"].keys())
