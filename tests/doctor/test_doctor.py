"""``ray-gpu doctor`` on this machine: as root, as another user, without user namespaces; against Vaults."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ray_gpu.controls import CONTROLS
from ray_gpu.doctor import vault
from ray_gpu.sandbox import boundary, profile
from ray_gpu.vault_server import VaultServer
from zones.keys import LoopbackTls, loopback_tls

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMAND = [sys.executable, "-c", "from ray_gpu.cli import main; main()", "doctor"]
#: Controls that a sandbox or cage may lack, which the doctor must see as a launch would.
OF_A_LAUNCH = {"shared-uid", "no-namespaces", "file-capability", "no-seccomp", "no-landlock", "no-cgroup", "swap-on"}
HEALTHY = {"initialized": True, "sealed": False}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes another user")


def environment(**more: str) -> dict[str, str]:
    """Return what the command finds in its environment."""
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def run(*arguments: str | Path, as_: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the doctor, as somebody with less where given: see tests/job/lesser.py."""
    command = [*COMMAND, *map(str, arguments)]
    if as_ is not None:
        places = [ROOT, *profile.runtime_paths(), Path(sys.executable).resolve().parents[1]]
        show = [str(place) for place in dict.fromkeys(map(Path.resolve, places))] if as_["uid"] else []
        lesser = {"container": False, **as_, "show": show}
        command = [sys.executable, str(ROOT / "tests/job/lesser.py"), json.dumps(lesser), *command]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)


def results(done: subprocess.CompletedProcess[str]) -> dict[str, set[str]]:
    """Return the ids of controls by the words that the doctor has for them."""
    assert done.stdout, done.stderr
    found: dict[str, set[str]] = {}
    for check in json.loads(done.stdout)["checks"]:
        found.setdefault(check["result"], set()).add(check["control"])
    return found


# -- this machine -------------------------------------------------------------------------------


def test_sees_what_a_launch_would() -> None:
    """As this user, what the doctor misses of a sandbox is what a custodian would say in its offer."""
    found = results(run("--role", "gpu", "--json"))

    assert found.get("missing", set()) & OF_A_LAUNCH == set(boundary.degradations())
    assert found["ok"]


@needs_root
@pytest.mark.parametrize("deny_userns", [False, True], ids=["user", "user without namespaces"])
def test_as_another_user(deny_userns: bool) -> None:
    """A user without privileges lacks uids and groups; without user namespaces, sandbox and cage too."""
    done = run("--role", "gpu", "--json", as_={"uid": 61993, "deny_userns": deny_userns})
    missing = results(done)["missing"]

    assert done.returncode == 1
    assert {"shared-uid", "no-cgroup"} <= missing
    assert ({"no-namespaces", "uncaged-ray"} <= missing) == deny_userns
    assert {"no-namespaces", "uncaged-ray"}.isdisjoint(missing) or deny_userns


@needs_root
def test_as_root_in_a_container() -> None:
    """Root whom a container lets make no namespaces misses them, and is told why."""
    done = run("--role", "gpu", "--json", as_={"uid": None, "deny_userns": True, "container": True})
    said = next(c for c in json.loads(done.stdout)["checks"] if c["about"] == "namespaces")

    assert (said["result"], done.returncode) == ("missing", 1)
    assert said["found"].startswith("bubblewrap failed: ")
    assert len(said["found"]) > len("bubblewrap failed: ")


def test_a_line_each() -> None:
    """People get a line about the host, and one for each check with word, control, look, finding and repair."""
    done = run("--role", "gpu")
    first, *rest = done.stdout.splitlines()

    assert first.startswith("doctor: a host of role gpu: ")
    assert len(rest) == len(json.loads(run("--role", "gpu", "--json").stdout)["checks"])
    for line in rest:
        word, control = re.match(r"  (ok|missing|weaker|unclear) +(\S+)  ", line).groups()  # type: ignore[union-attr]
        assert control in CONTROLS
        assert (word == "ok") or line.endswith(".")
    failing = {line.split()[1] for line in rest if line.split()[0] in ("missing", "unclear")}
    assert done.returncode == (1 if failing else 0)
    assert all(control in first for control in failing)


def test_embedded_default() -> None:
    """For one machine it looks at what ``ray-gpu up`` would find, which runs anywhere."""
    done = run("--role", "embedded", "--json")

    assert json.loads(done.stdout)["roles"] == ["embedded"]
    assert "embedded-vault" in results(done)["weaker"]
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node: gpu-1\nrole: cpu\n", r"node.yaml:2: role: .*correct the file"),
        ("zone: clinic\npolicies: not/absolute\n", r"node.yaml:\d: .*"),
        (None, r"node.yaml"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str | None, told: str) -> None:
    """A file that is wrong is an error that names it, and its line."""
    path = tmp_path / "node.yaml"
    if text is not None:
        path.write_text(text)

    done = run("--config", path)

    assert done.returncode == 1
    assert re.search(told, done.stderr)
    assert "Traceback" not in done.stderr


# -- Vault --------------------------------------------------------------------------------------


def files_of(tls: LoopbackTls, directory: Path) -> tuple[Path, Path, Path]:
    """Write a server's certificate and key and its CA; return where."""
    paths = directory / "tls.pem", directory / "tls.key", directory / "ca.pem"
    for path, content in zip(paths, (tls.certificate_pem, tls.key_pem, tls.ca_pem), strict=True):
        path.write_bytes(content)
    return paths


@contextmanager
def vault_like(
    directory: Path, *, advance_s: float = 0, document: object = HEALTHY, tls: LoopbackTls | None = None
) -> Iterator[tuple[str, str]]:
    """Run a server that says what it is told to; yield its address and CA file."""
    certificate, key, ca = files_of(tls or loopback_tls(datetime.now(UTC), 90), directory)
    files = [str(path) for path in (HERE / "tls_vault.py", certificate, key)]
    command = [sys.executable, *files, str(advance_s), json.dumps(document)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        try:
            assert server.stdout is not None
            yield f"https://127.0.0.1:{server.stdout.readline().strip()}", str(ca)
        finally:
            server.kill()


def verdicts(answer: vault.Answer) -> tuple[str, str, str]:
    """Return the states of all three checks of Vault."""
    return vault.answers(answer).state, vault.certificate(answer).state, vault.clock(answer).state


def test_real_vault(tmp_path: Path) -> None:
    """OpenBao answers, proves itself and has the time; once stopped it is missing, and so it is with another's CA."""
    server = VaultServer.start(tmp_path / "vault")
    try:
        good = vault.ask(server.address, str(server.ca_file))
        other = tmp_path / "other.pem"
        other.write_bytes(loopback_tls(datetime.now(UTC), 90).ca_pem)
        stranger = vault.ask(server.address, str(other))
    finally:
        server.stop()
    gone = vault.ask(server.address, str(server.ca_file))

    assert verdicts(good) == ("holds", "holds", "holds")
    assert verdicts(stranger) == ("missing", "unclear", "unclear")
    assert "certificate does not hold" in stranger.failure
    assert verdicts(gone) == ("missing", "unclear", "unclear")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("holds", "holds", "holds")),
        ({"advance_s": 120}, ("holds", "holds", "missing")),
        ({"advance_s": -120}, ("holds", "holds", "missing")),
        ({"document": {**HEALTHY, "sealed": True}}, ("missing", "holds", "holds")),
        ({"document": {"initialized": False, "sealed": True}}, ("missing", "holds", "holds")),
        ({"document": ["no", "vault"]}, ("missing", "unclear", "unclear")),
    ],
    ids=["good", "ahead", "behind", "sealed", "empty", "no vault"],
)
def test_other_vaults(tmp_path: Path, options: dict[str, Any], expected: tuple[str, str, str]) -> None:
    """A clock that differs, a sealed Vault and a stranger are each seen, and a healthy one is."""
    with vault_like(tmp_path, **options) as (address, ca):
        assert verdicts(vault.ask(address, ca)) == expected


@pytest.mark.parametrize(
    ("start", "days", "expected"),
    [(timedelta(), 3, ("holds", "missing", "holds")), (timedelta(days=-9), 3, ("missing", "unclear", "unclear"))],
    ids=["ends soon", "ended"],
)
def test_vaults_certificate(tmp_path: Path, start: timedelta, days: int, expected: tuple[str, str, str]) -> None:
    """A certificate that ends soon is said before it is too late; one that ended, by its name."""
    with vault_like(tmp_path, tls=loopback_tls(datetime.now(UTC) + start, days)) as (address, ca):
        answer = vault.ask(address, ca)

    assert verdicts(answer) == expected
    assert ("expired" in answer.failure) == (expected[0] == "missing")


@pytest.mark.parametrize("ca", ["missing.pem", "empty.pem"])
def test_ca_file_that_is_none(tmp_path: Path, ca: str) -> None:
    """A CA file that is missing, or holds no certificate, is said and does not end the doctor."""
    (tmp_path / "empty.pem").write_text("")

    assert vault.ask("https://127.0.0.1:1", str(tmp_path / ca)).failure


# -- notebooks, and what the project itself does -------------------------------------------------


@pytest.fixture
def start_kernel(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Return what starts a real kernel with a transport, and returns its process id."""
    pytest.importorskip("ipykernel", reason="needs ipykernel, of the extra dev")
    started: list[subprocess.Popen[bytes]] = []

    def start(transport: str) -> int:
        ports = {f"{name}_port": 0 for name in ("shell", "iopub", "stdin", "control", "hb")}
        ip = "127.0.0.1" if transport == "tcp" else str(tmp_path / "kernel")
        connection = {"transport": transport, "ip": ip, "key": "k", "signature_scheme": "hmac-sha256", **ports}
        path = tmp_path / f"kernel-{transport}.json"
        path.write_text(json.dumps(connection))
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", str(path)]
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("transport", "seen"), [("tcp", True), ("ipc", False)])
def test_kernel_over_tcp(start_kernel: Callable[[str], int], transport: str, seen: bool) -> None:
    """A real kernel that uses TCP is found by its process; one that uses Unix sockets is none."""
    pid = start_kernel(transport)
    said = next(
        c for c in json.loads(run("--role", "gateway", "--json").stdout)["checks"] if c["control"] == "kernel-tcp"
    )

    assert (str(pid) in re.findall(r"\d+", said["found"])) == seen
    assert (said["result"] == "missing") or not seen


SERVICE = """
import resource, sys
from pathlib import Path
from ray_gpu import background

resource.setrlimit(resource.RLIMIT_CORE, (4096, resource.getrlimit(resource.RLIMIT_CORE)[1]))

class Service:
    state_file = Path(sys.argv[1]) / "state.json"
    def start(self): return {"cores": resource.getrlimit(resource.RLIMIT_CORE)}
    def check(self): raise RuntimeError("enough")
    def stop(self): pass

print(resource.getrlimit(resource.RLIMIT_CORE)[0], flush=True)
background.serve(lambda say: Service(), "1")
"""


@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: this user's hard core limit may be 0, and then there is nothing to see"
)
def test_services_leave_no_core(tmp_path: Path) -> None:
    """A service, and so the custodian that it starts, writes no core, though its starter would."""
    command = ["prlimit", "--core=unlimited", sys.executable, "-c", SERVICE, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    before, ready, *_ = done.stdout.splitlines()

    assert before == "4096"
    assert json.loads(ready)["ready"]["cores"] == [0, 0]
