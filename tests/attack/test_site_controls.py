"""What lies between hosts: Vault's proof, its clock and its disk; logins; a notebook's outputs. Each attack runs twice.

Vault is a real OpenBao server. What it cannot be made to do is said where a stand-in does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from ray_gpu import handover, node_identity, services
from ray_gpu.sandbox import boundary
from ray_gpu.state import Layout
from ray_gpu.vault_declaration import Declaration, NodeSpec
from ray_gpu.vault_server import VaultServer
from ray_gpu.vault_setup import AppRole, setup
from zones.errors import VaultError, VaultUnreachableError
from zones.keys import loopback_tls
from zones.vault import Vault

ROOT = Path(__file__).parents[2]
STRANGER = 61994
PATIENCE_S = 60.0
ADDRESS = "127.0.78.2"
CANARY = "6f1e8a52-canary-of-a-secret-id"


class Site:
    """A real Vault, set up, and the login of a node's custodian."""

    def __init__(self, server: VaultServer, role: AppRole) -> None:
        self.server = server
        self.role = role

    def login(self) -> Vault:
        """Return a client that is logged in as the custodian."""
        return self.server.client().login_approle(self.role.role_id, self.role.secret_id)

    def services_login(self, **changes: Any) -> services.VaultLogin:
        """Return what a custodian is started with."""
        fields = {"address": self.server.address, "ca": str(self.server.ca_file)}
        return services.VaultLogin(**{**fields, "role_id": self.role.role_id, "secret_id": CANARY, **changes})


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """One Vault for this file."""
    with TemporaryDirectory(prefix="rgs") as directory:
        server = VaultServer.start(Path(directory) / "vault")
        try:
            root = server.root_client()
            nodes = (NodeSpec(name="gpu-1", role="gpu", addresses=(ADDRESS,)),)
            made = setup(root, Declaration(zones=("clinic",), nodes=nodes), policies=ROOT / "policies/vault")
            root.revoke()
            yield Site(server, made.nodes["gpu-1"])
        finally:
            server.stop()


def environment() -> dict[str, str]:
    """Return what a process of this project finds in its environment."""
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


# -- whoever answers at Vault's address ------------------------------------------------------------


@contextlib.contextmanager
def impostor(directory: Path) -> Iterator[tuple[str, Path, list[bytes]]]:
    """Answer at an address as Vault, with a certificate of another CA; yield address, that CA, and what was sent."""
    tls, heard = loopback_tls(datetime.now(UTC), 1), []
    paths = [directory / name for name in ("tls.pem", "tls.key", "ca.pem")]
    for path, content in zip(paths, (tls.certificate_pem, tls.key_pem, tls.ca_pem), strict=True):
        path.write_bytes(content)

    class Handler(BaseHTTPRequestHandler):
        """Keeps what it hears."""

        def do_POST(self) -> None:
            """Listen, and grant anything."""
            heard.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"auth": {"client_token": "t"}}')

        def log_message(self, *_: object) -> None:
            """Keep still."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(paths[0], paths[1])
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}", paths[2], heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_impostor(site: Site, tmp_path: Path) -> None:
    """Who answers at Vault's address without its certificate hears no login; if our file had its CA it would."""
    with impostor(tmp_path) as (address, its_ca, heard):
        with pytest.raises(VaultUnreachableError, match=r"self-signed certificate|unable to get local issuer"):
            Vault(address, ca_file=str(site.server.ca_file)).login_approle("r", CANARY)
        assert heard == []
        Vault(address, ca_file=str(its_ca)).login_approle("r", CANARY)

    assert CANARY in heard[0].decode()


# -- clocks ---------------------------------------------------------------------------------------

SHIFTED = """
import sys, time
real, shift = time.time, float(sys.argv.pop(1))
time.time = lambda: real() + shift
from ray_gpu import custodian
custodian.main(sys.argv[1:])
"""


@pytest.mark.parametrize(("shift_s", "said"), [(-90, "(89|90|91) s behind"), (90, "(89|90|91) s ahead of"), (0, "")])
def test_clock(site: Site, monkeypatch: pytest.MonkeyPatch, shift_s: int, said: str) -> None:
    """A node gets nothing while its clock and Vault's differ; without the check, a certificate of another time.

    The clock is this process's alone; Vault's, and its header ``Date``, are real.
    """
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift_s)
    with contextlib.closing(site.login()) as unchecked:
        identity = node_identity.fetch(unchecked, node="gpu-1", addresses=[ADDRESS])
    # A month of validity, as this host counts it.
    assert abs(identity.not_after - time.time() - 30 * 86400 + shift_s) < 60
    refused = pytest.raises(VaultError, match=f"clock is {said} Vault's") if said else contextlib.nullcontext()

    with refused:
        node_identity.obtain(
            site.server.client(), site.role.role_id, site.role.secret_id, node="gpu-1", addresses=[ADDRESS]
        )


def test_custodian_of_another_time(site: Site, tmp_path: Path) -> None:
    """A custodian whose clock is behind does not start: it would hold leases longer than they were granted."""
    settings = tmp_path / "settings.json"
    login = site.services_login().settings()
    settings.write_text(json.dumps({"node": "gpu-1", "pool": "shared", "policies": str(ROOT / "policies"), **login}))
    command = [sys.executable, "-c", SHIFTED, "-90", str(settings)]
    done = subprocess.run(
        command, env=environment(), input=site.role.secret_id, capture_output=True, text=True, timeout=90, check=False
    )

    assert done.returncode == 1
    assert re.search(r"did not start: VaultError: this host's clock is (89|90|91) s behind Vault's", done.stderr)


# -- Vault's disk -----------------------------------------------------------------------------------


def test_disk_of_an_embedded_vault(tmp_path: Path) -> None:
    """Who copies Vault's disk has its keys where the unseal key lies beside them, and nothing where it does not.

    The thief's machine has the copy where the disk was: the server's storage knows the path of its audit log.
    """
    place, token = tmp_path / "vault", secrets.token_hex(16)
    server = VaultServer.start(place)
    try:
        with contextlib.closing(server.root_client()) as root:
            root.call("POST", "sys/mounts/kv", type="kv")
            root.call("PUT", "kv/key", key=token)
    finally:
        server.stop()
    stolen = shutil.copytree(place, tmp_path / "stolen")
    (place / "unseal.key").unlink()

    assert not [path for path in place.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    with pytest.raises(VaultError, match=r"unseal\.key is missing"):
        VaultServer.start(place)
    shutil.rmtree(place)
    thief = VaultServer.start(shutil.copytree(stolen, place))
    try:
        with contextlib.closing(thief.root_client()) as root:
            assert root.call("GET", "kv/key")["data"]["key"] == token
    finally:
        thief.stop()


# -- logins that are handed over --------------------------------------------------------------------


def test_login_is_in_no_file(site: Site, tmp_path: Path) -> None:
    """What a custodian logs in with is in no file, command line or environment; the role's id is, by the same search.

    It did get it: with the right one it gets further, to what else is missing.
    """
    layout = Layout(tmp_path)
    log = tmp_path / "log"

    def start(**changes: Any) -> tuple[set[str], str]:
        login = site.services_login(**changes)
        process = services.start_custodian(
            layout, "gpu-1", login, log=log, pool="shared", policies=str(tmp_path / "nowhere")
        )
        proc = Path(f"/proc/{process.pid}")
        seen = b"".join((proc / name).read_bytes() for name in ("cmdline", "environ"))
        process.wait(PATIENCE_S)
        seen += b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        wanted = {"secret id": login.secret_id, "role id": login.role_id}
        return {name for name, text in wanted.items() if text.encode() in seen}, log.read_text()

    wrong, right = start(), start(secret_id=site.role.secret_id)

    assert wrong[0] == right[0] == {"role id"}
    assert "VaultDeniedError" in wrong[1]
    assert "nowhere" in right[1].rpartition("did not start")[2]


def test_taken_login_is_let_go() -> None:
    """Once a process has its login, neither its own standard input nor a program that it starts has it any more."""
    code = (
        "import os, subprocess; from ray_gpu.handover import take_secret; own = take_secret()\n"
        "left = os.read(0, 99) + subprocess.run(['cat', '/proc/self/fd/0'], stdout=-1).stdout\n"
        "print(own, left, os.readlink('/proc/self/fd/0'))"
    )
    with contextlib.ExitStack() as closing:
        fd = handover.secret_file(CANARY)
        closing.callback(os.close, fd)
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, stdin=fd, env=environment(), capture_output=True, text=True, check=True)
        # Control: what is not let go is there to be read again.
        assert os.pread(fd, 99, 0).decode() == CANARY

    assert done.stdout.split() == [CANARY, "b''", "/dev/null"]


# -- what a notebook shows ----------------------------------------------------------------------------

#: A person's notebook: prints its canary again and again, for who connects late misses what was before.
NOTEBOOK = """
import select, subprocess, sys
from jupyter_client import KernelManager
transport, directory, canary = sys.argv[1:]
manager = KernelManager(transport=transport, connection_file=f"{directory}/kernel.json")
if transport == "ipc":
    manager.ip = f"{directory}/kernel"
manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=60)
separator = ":" if transport == "tcp" else "-"
print(f"{transport}://{manager.ip}{separator}{manager.iopub_port}", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    client.execute_interactive(f"print({canary!r})", timeout=60, output_hook=lambda _: None)
client.stop_channels()
manager.shutdown_kernel(now=True)
"""
#: Listens to what a kernel publishes, as whoever may connect; says what it heard, once there is a canary, or nothing.
EAVESDROP = """
import sys, zmq
address, canary, patience_s = sys.argv[1:]
socket = zmq.Context().socket(zmq.SUB)
socket.setsockopt(zmq.SUBSCRIBE, b"")
socket.setsockopt(zmq.RCVTIMEO, int(float(patience_s) * 1000))
socket.connect(address)
try:
    while canary not in (heard := b"".join(socket.recv_multipart()).decode("utf-8", "replace")):
        pass
    print(heard)
except zmq.Again:
    print("nothing")
"""


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_eavesdropper(transport: str) -> None:
    """Another user reads what a notebook prints where its kernel has TCP ports, not where it has Unix sockets."""
    pytest.importorskip("jupyter_client", reason="needs jupyter_client, of the extra dev")
    if os.geteuid() != 0 or not boundary.survey().python_readable:
        pytest.skip("needs root, to become another user, and a Python that this user can read")
    stranger = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", "--", sys.executable, "-c"]
    pipe = subprocess.PIPE
    # A directory of its owner's alone, as Jupyter's runtime directory is.
    with TemporaryDirectory(prefix="rgk") as directory:
        command = [sys.executable, "-c", NOTEBOOK, transport, directory, CANARY]
        with subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True) as notebook:
            assert notebook.stdout is not None
            listen = [*stranger, EAVESDROP, notebook.stdout.readline().strip(), CANARY]
            listen.append(str(PATIENCE_S) if transport == "tcp" else "1")
            heard = subprocess.run(listen, env=environment(), capture_output=True, text=True, check=True).stdout
            notebook.communicate("enough", timeout=PATIENCE_S)

    assert (CANARY in heard) is (transport == "tcp")
