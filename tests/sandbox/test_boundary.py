"""What a sandbox cannot do, as root, as another user, and where user namespaces are denied.

Every attempt is also made outside, where it succeeds: as root for all, and by the same uid for
those that need no privilege.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox import probe

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
SITE = Path(pytest.__file__).resolve().parents[1]
#: Attempts that succeed outside for root alone; all others do for any uid, so that it is the boundary that refuses.
PRIVILEGED = {
    "write /", "write /usr", "write /proc/1", "open core_pattern", "open_by_handle_at", "make a device", "raw socket",
    "packet socket", "mount namespace", "join a namespace", "mount", "new mount", "chroot", "bpf", "perf_event_open",
    "capabilities", "become root",
}  # fmt: skip
#: What bubblewrap alone leaves open, and the next layers close. The datagrams go to nobody; the processes whose memory
#: can be read, and the first one, are the sandbox's own.
BEYOND_NAMESPACES = {
    "udp", "udp over IPv6", "listen", "any process's memory", "write /proc/1", "user namespace", "clone user namespace",
    "clone3 user namespace", "keyctl", "add_key", "io_uring", "userfaultfd", "become dumpable", "raise core limit",
    "unmask core", "unmask core by a program", "leave a core",
}  # fmt: skip
#: What a weaker mode cannot hold, and what it says of itself then, all of it.
WEAKER = {
    "memory bomb": {"no-cgroup"}, "memory bomb in a file": {"no-cgroup"}, "fork bomb": {"no-cgroup", "no-namespaces"},
}  # fmt: skip
#: What is not there to be reached on every host.
UNMADE = {
    "open_by_handle_at": "this host's root file system has no handles",
    "tcp over IPv6": "no IPv6 here", "udp over IPv6": "no IPv6 here",
}  # fmt: skip
IDENTITIES: dict[str, dict[str, Any]] = {
    "root": {"uid": None, "deny_userns": False},
    "user": {"uid": 61998, "deny_userns": False},
    "user-without-userns": {"uid": 61999, "deny_userns": True},
}
#: Made in a cluster alone, in tests/proofs.
NEEDS_CLUSTER = {name for name, (needed, _) in probe.ATTEMPTS.items() if needed in probe.CLUSTER}
#: Takes a minute: see :func:`test_own_ray`.
OWN_RAY = "ray.init()"
ATTEMPTS = [name for name in probe.ATTEMPTS if name not in {*NEEDS_CLUSTER, OWN_RAY}]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the probe's system call numbers are x86_64's")


def battery(identity: str) -> dict[str, Any]:
    """Return the outcomes of one identity's battery, which runs once."""
    if os.geteuid() != 0:
        pytest.skip("needs root: becomes another uid, and root is the positive control")
    done = _run(identity)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@functools.cache
def _run(identity: str, *, ray: bool = False) -> subprocess.CompletedProcess[str]:
    settings = IDENTITIES[identity]
    python = sys.executable if settings["uid"] is None else python_for_others()
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{PROJECT}:{SITE}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, str(HERE / "custodian.py"), json.dumps({**settings, "site": str(SITE), "ray": ray})]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


@functools.cache
def python_for_others() -> str:
    """Return a Python that an unprivileged uid can run with this project and its libraries."""
    minor = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # A Python whose own library is out of reach may quietly take another's, hence the look at the executable.
    trial = (
        f"import os, sys; sys.path[:0] = {[str(PROJECT), str(SITE)]!r}; import pyseccomp, ray_gpu.sandbox.boundary;"
        "os.stat(os.path.realpath(sys.executable))"
    )
    for python in (sys.executable, f"/usr/bin/{minor}", f"/usr/local/bin/{minor}"):
        command = ["setpriv", "--reuid=61998", "--regid=61998", "--clear-groups", python, "-c", trial]
        if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0:
            return python
    pytest.skip(f"no {minor} that another uid can run: this one, or the project, lies in a private home")


def outcome(identity: str, where: str, attempt: str) -> str:
    """Return what became of one attempt, or skip where there is nothing to attempt."""
    outcomes: dict[str, str] = battery(identity)[where]["outcomes"]
    if attempt not in outcomes:
        pytest.skip(UNMADE[attempt])
    return outcomes[attempt]


@pytest.mark.parametrize(
    ("attempt", "identity"),
    [(attempt, who) for attempt in ATTEMPTS for who in IDENTITIES if attempt not in WEAKER or who == "root"],
)
def test_escape_is_refused(attempt: str, identity: str) -> None:
    """User code cannot do it inside; the same code outside, as root, can."""
    assert outcome("root", "control", attempt) == "done"
    if declared(attempt, identity):
        pytest.skip("nothing caps it here, and the sandbox says so: test_declared_weakness")
    assert outcome(identity, "inside", attempt).startswith("refused")


def declared(attempt: str, identity: str) -> bool:
    """Whether a sandbox says of itself that it does not hold this."""
    return WEAKER.get(attempt, {""}) <= set(battery(identity)["degradations"])


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("attempt", WEAKER)
def test_declared_weakness(attempt: str, identity: str) -> None:
    """Control: where the kernel caps nothing for us these work, and the sandbox says so; elsewhere they do not."""
    inside = outcome(identity, "inside", attempt)

    assert inside == "done" if declared(attempt, identity) else inside.startswith("refused")


@pytest.mark.parametrize("attempt", [name for name in ATTEMPTS if name not in PRIVILEGED])
def test_same_uid_can_do_it_outside(attempt: str) -> None:
    """An unprivileged custodian's own processes can do it, so it is the sandbox that refuses."""
    assert outcome("user", "control", attempt) == "done"


@pytest.mark.heavy
@pytest.mark.timeout(400)
@pytest.mark.parametrize("identity", IDENTITIES)
def test_own_ray(identity: str) -> None:
    """``import ray; ray.init()`` starts no Ray inside; outside, the same uid gets one."""
    done = _run(identity, ray=True)
    assert done.returncode == 0, done.stderr
    outcomes = {where: json.loads(done.stdout)[where]["outcomes"][OWN_RAY] for where in ("control", "inside")}

    assert outcomes["control"] == "done"
    assert outcomes["inside"].startswith("refused")
    assert outcomes["inside"] != "refused: killed", "it ran into the limit"


@pytest.mark.parametrize("identity", IDENTITIES)
def test_nothing_is_written_on_the_host(identity: str) -> None:
    """No file that the probe tried to write is on the host; outside, the same probe leaves its files."""
    result = battery(identity)

    assert len(result["control_written"]) >= 3
    assert result["written"] == []


@pytest.mark.parametrize("identity", IDENTITIES)
def test_no_datagram_arrives(identity: str) -> None:
    """A datagram sent inside does not reach the host's listener; one sent outside does."""
    result = battery(identity)

    assert result["control_arrived"]
    assert not result["arrived"]
    assert not result["bare_arrived"]


@pytest.mark.parametrize("identity", ["root", "user"])
def test_bubblewrap_alone(identity: str) -> None:
    """Without seccomp and Landlock, namespaces still refuse everything but what is known to be beyond them."""
    outcomes = battery(identity)["bare"]["outcomes"]

    assert {name for name, outcome in outcomes.items() if outcome == "done"} <= BEYOND_NAMESPACES


@pytest.mark.parametrize("identity", IDENTITIES)
def test_named_descriptor_survives(identity: str) -> None:
    """A descriptor of the profile reaches the program."""
    assert battery(identity)["inside"]["kept"] == "kept"


@pytest.mark.parametrize("identity", IDENTITIES)
def test_never_uid_0(identity: str) -> None:
    """The program's own uid is not 0."""
    assert battery(identity)["inside"]["uid"] != 0


def test_degradations_are_named() -> None:
    """Each identity says what it lacks, before anything is launched."""
    assert "no-namespaces" not in battery("root")["degradations"]
    assert "shared-uid" not in battery("root")["degradations"]
    assert "shared-uid" in battery("user")["degradations"]
    assert {"shared-uid", "no-namespaces"} <= set(battery("user-without-userns")["degradations"])
