"""Vault (or OpenBao) as this project uses it: a thin client and nothing else. Owns ``hvac``.

Talks to one server over HTTPS. Reads no environment variable, token file or proxy
setting: the address, the CA file and the credentials are what the caller passed.

Rules this module keeps:

* Every failure is a :class:`~zones.errors.VaultError`; no foreign exception leaves.
* No message carries a token, a password, a key or the body of a request.
* Lease keys never leave Vault. What travels is a data key, wrapped under the lease
  key with the grant's digest as derivation context, so another grant cannot open it.
"""

from __future__ import annotations

import base64
import binascii
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import hvac.adapters  # type: ignore[import-untyped]  # hvac ships no annotations
import hvac.exceptions  # type: ignore[import-untyped]
import requests

from zones.errors import ConfigError, VaultDeniedError, VaultError, VaultSealedError, VaultUnreachableError
from zones.model import check_id

#: Where node signing certificates come from; ``ray_gpu.vault_setup`` mounts it.
NODE_PKI = "pki-nodes"
#: Seconds to wait for a connection and for an answer. A call takes milliseconds; a dead host must not hang a job.
_TIMEOUT_S = (3.0, 10.0)
#: Clocks that differ by more are set before leases are lost by it, seconds. A lease lives without heartbeat for 9.
MOST_SKEW_S = 5.0
#: ``<random>-<not_after>``: what :func:`lease_name` makes.
_LEASE_PATTERN = re.compile(r"[0-9a-f]{16,24}-([0-9]{1,12})")
#: Key of what a zone's people keep; every other one of a zone's mount is a lease's.
_CHECKPOINTS = "checkpoints"
#: Policy that a person's login carries, one per zone.
_PERSON_POLICY = "person-{zone}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Who a token belongs to, as Vault's identity store says."""

    name: str
    groups: frozenset[str]
    entity_id: str


def zone_mount(zone: str) -> str:
    """Return the transit mount of a zone, without slashes."""
    return f"zone-{check_id(zone, what='zone')}"


def lease_name(random: bytes, not_after: int) -> str:
    """Return a lease id that carries its own expiry, so that leftovers can be told from live leases.

    Args:
        random: 8 to 12 random bytes.
        not_after: UTC seconds since the epoch.
    """
    lease = f"{random.hex()}-{not_after}"
    if not _LEASE_PATTERN.fullmatch(lease):
        raise ValueError("a lease name takes 8 to 12 random bytes and a time in seconds")
    return lease


def lease_expiry(lease: str) -> int | None:
    """Return when a lease ends in UTC seconds, or ``None`` for a name that :func:`lease_name` did not make."""
    match = _LEASE_PATTERN.fullmatch(lease)
    return int(match.group(1)) if match else None


class Vault:
    """One server and at most one login. Safe to share between threads."""

    def __init__(self, address: str, *, ca_file: str | None = None) -> None:
        """Name the server; nothing is sent yet.

        Args:
            address: ``https://host:port``.
            ca_file: PEM file that the server's certificate must chain to; ``None`` for the system's CAs.

        Raises:
            ConfigError: *address* is not HTTPS: logins and data keys would travel in clear.
        """
        if not address.startswith("https://"):
            raise ConfigError(f"Vault's address {address!r} must start with https://; correct it", file=None)
        self.address = address
        self._token = ""
        self._session = requests.Session()
        # Neither a proxy nor a netrc file from the environment may see or change these requests.
        self._session.trust_env = False
        self._session.verify = ca_file or True
        self._session.hooks["response"].append(self._note_time)
        self._ahead_s: float | None = None
        self._relogin: Callable[[], None] | None = None
        self._login_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Vault({self.address!r}, token=<redacted>)"

    def close(self) -> None:
        """Close the connections. The token stays valid; see :meth:`revoke`."""
        self._session.close()

    # -- who we are -----------------------------------------------------------------------------

    def login_approle(self, role_id: str, secret_id: str) -> Vault:
        """Log in as a gateway or custodian; the credentials are kept to log in again when the token ends.

        Raises:
            VaultDeniedError: Wrong or destroyed credentials.
        """

        def login() -> None:
            self._login("auth/approle/login", role_id=role_id, secret_id=secret_id)

        login()
        self._relogin = login
        return self

    def login_userpass(self, user: str, password: str) -> Vault:
        """Log in as a person.

        Raises:
            VaultDeniedError: Wrong name or password.
        """
        self._login(f"auth/userpass/login/{check_id(user, what='user')}", password=password)
        return self

    def with_token(self, token: str) -> Vault:
        """Use a token that was issued elsewhere. It is not checked until the first call."""
        self._token = token
        return self

    @property
    def token(self) -> str:
        """The token in use: a secret."""
        return self._token

    def check_clock(self) -> None:
        """Compare this host's clock with Vault's, by its last answer.

        Raises:
            VaultError: They differ by more than :data:`MOST_SKEW_S`, or the answer had no date.
        """
        ahead_s = self._ahead_s
        if ahead_s is None:
            raise VaultError(f"Vault at {self.address} has not said what time it is; check what runs at its address")
        if abs(ahead_s) > MOST_SKEW_S:
            raise VaultError(
                f"this host's clock is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} Vault's, and "
                "certificates and leases end by it; set it, and start a time service (chrony, systemd-timesyncd)"
            )

    def _note_time(self, answer: requests.Response, **_: Any) -> None:
        try:
            theirs = parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
        except (TypeError, ValueError):
            self._ahead_s = None
        else:
            # The header counts whole seconds, so their clock was half a second further on average.
            self._ahead_s = time.time() - theirs - 0.5

    def revoke(self) -> None:
        """Revoke the token in use and forget the login."""
        self._relogin = None
        self.call("POST", "auth/token/revoke-self")
        self._token = ""

    def _login(self, path: str, **credentials: str) -> None:
        self._token = str(_at(self._send("POST", path, credentials, token=""), "auth", "client_token"))

    # -- requests -------------------------------------------------------------------------------

    def call(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        """Send one request and return the JSON answer, ``{}`` when there is none.

        A refusal is tried once more after a new AppRole login, if the token has ended meanwhile.

        Args:
            method: ``GET``, ``POST``, ``PUT``, ``LIST`` or ``DELETE``.
            path: Below ``/v1/``.

        Raises:
            VaultUnreachableError: No answer, an answer without TLS, or a server still starting.
            VaultSealedError: The server is sealed.
            VaultDeniedError: It refused the token or the request.
            VaultError: Any other failure.
        """
        return self._retried(lambda token: self._send(method, path, body, token=token))

    def find(self, path: str, *, method: str = "GET") -> dict[str, Any] | None:
        """Return what stands at *path*, or ``None`` where nothing does.

        Args:
            method: ``GET`` or ``LIST``.

        Raises:
            VaultDeniedError: The token may not know. Otherwise as :meth:`call`.
        """
        return self._retried(lambda token: self._send(method, path, {}, token=token, absent_ok=True)) or None

    def _retried(self, send: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """Send with the token in use; after a refusal once more, if the token has ended meanwhile."""
        token = self._token
        try:
            return send(token)
        except VaultDeniedError:
            if not self._renewed(token):
                raise
        return send(self._token)

    def _renewed(self, token: str) -> bool:
        """Log in again if *token* no longer works. ``False`` means that the refusal stands."""
        if self._relogin is None:
            return False
        with self._login_lock:
            if self._token != token:
                return True  # Another thread was here first.
            try:
                self._send("GET", "auth/token/lookup-self", {}, token=token)
                return False
            except VaultDeniedError:
                self._relogin()
                return True

    def _send(
        self, method: str, path: str, body: Mapping[str, Any], *, token: str, absent_ok: bool = False
    ) -> dict[str, Any]:
        # One adapter per request: hvac keeps the token in it, and threads and other people's tokens share this object.
        adapter = hvac.adapters.JSONAdapter(
            self.address, token=token, session=self._session, verify=self._session.verify, timeout=_TIMEOUT_S
        )
        try:
            answer = adapter.request(method, f"/v1/{path}", json=dict(body) or None)
        except OSError as error:  # The base of every exception of requests, and what it raises for a missing CA file.
            raise VaultUnreachableError(
                f"no answer from Vault at {self.address} ({_reason(error)}); "
                "check that it runs, the address and the CA file"
            ) from None
        except hvac.exceptions.VaultError as error:
            empty_list = method == "LIST" and not error.errors  # Vault's way to say that a list is empty.
            if isinstance(error, hvac.exceptions.InvalidPath) and (absent_ok or empty_list):
                return {}
            # The cause is dropped on purpose: its text holds the server's answer.
            raise _translated(error, self.address, f"{method} {path}") from None
        return answer if isinstance(answer, dict) else {}

    # -- lease keys (transit) -------------------------------------------------------------------

    def create_lease_key(self, zone: str, node: str, lease: str) -> None:
        """Make the key of one lease. It is 256 bits, derived per grant, and cannot be exported.

        Making one that exists changes nothing: lease names are random and used once.

        Raises:
            VaultDeniedError: Not this zone's gateway.
        """
        self.call("POST", f"{zone_mount(zone)}/keys/{_key(node, lease)}", type="aes256-gcm96", derived=True)

    def data_key(self, zone: str, node: str, lease: str, grant_digest: str) -> tuple[bytes, str]:
        """Return 32 fresh bytes and the same bytes wrapped under the lease key for exactly this grant.

        Args:
            grant_digest: :meth:`zones.model.Grant.digest`, 64 hexadecimal digits.

        Raises:
            VaultDeniedError: Not this zone's gateway, or there is no such key (any more).
        """
        path = f"{zone_mount(zone)}/datakey/plaintext/{_key(node, lease)}"
        answer = self.call("POST", path, context=_context(grant_digest), bits=256)
        return _key_bytes(_at(answer, "data", "plaintext")), str(_at(answer, "data", "ciphertext"))

    def unwrap(self, zone: str, node: str, lease: str, grant_digest: str, wrapped: str) -> bytes:
        """Return the 32 bytes that :meth:`data_key` wrapped.

        Raises:
            VaultDeniedError: Another node's lease, another grant, changed bytes, or a shredded key.
        """
        path = f"{zone_mount(zone)}/decrypt/{_key(node, lease)}"
        answer = self.call("POST", path, context=_context(grant_digest), ciphertext=wrapped)
        return _key_bytes(_at(answer, "data", "plaintext"))

    def checkpoint_key(self, zone: str, context: str) -> tuple[bytes, str]:
        """Return 32 fresh bytes and the same bytes wrapped under the zone's key for checkpoints, made if need be.

        Args:
            context: What they are for, 64 hexadecimal digits; it takes the same to unwrap them.

        Raises:
            VaultDeniedError: Not this zone's gateway.
        """
        mount = zone_mount(zone)
        self.call("POST", f"{mount}/keys/{_CHECKPOINTS}", type="aes256-gcm96", derived=True)
        answer = self.call("POST", f"{mount}/datakey/plaintext/{_CHECKPOINTS}", context=_context(context), bits=256)
        return _key_bytes(_at(answer, "data", "plaintext")), str(_at(answer, "data", "ciphertext"))

    def unwrap_checkpoint(self, zone: str, context: str, wrapped: str) -> bytes:
        """Return the 32 bytes that :meth:`checkpoint_key` wrapped.

        Raises:
            VaultDeniedError: Another context, changed bytes, or not this zone's gateway.
        """
        path = f"{zone_mount(zone)}/decrypt/{_CHECKPOINTS}"
        answer = self.call("POST", path, context=_context(context), ciphertext=wrapped)
        return _key_bytes(_at(answer, "data", "plaintext"))

    def shred(self, zone: str, node: str, lease: str) -> None:
        """Destroy a lease key. A key that is gone already is no error.

        Raises:
            VaultDeniedError: Not this zone's gateway.
        """
        self._shred(zone, _key(node, lease))

    def _shred(self, zone: str, name: str) -> None:
        path = f"{zone_mount(zone)}/keys/{name}"
        try:
            self.call("POST", f"{path}/config", deletion_allowed=True)
            self.call("DELETE", path)
        except VaultDeniedError:
            # Vault says the same to a stranger and about a key that is gone; a stranger may not list either.
            if name in self.lease_keys(zone):
                raise

    def lease_keys(self, zone: str) -> list[str]:
        """Return the names ``<node>.<lease>`` of every lease key of a zone.

        Raises:
            VaultDeniedError: Not this zone's gateway.
        """
        answer = self.call("LIST", f"{zone_mount(zone)}/keys")
        return [str(name) for name in answer.get("data", {}).get("keys", []) if name != _CHECKPOINTS]

    def prune(self, zone: str, now: int) -> list[str]:
        """Shred every key whose lease has expired; return their names. Keys not named by this project stay.

        Args:
            now: UTC seconds since the epoch.
        """
        expired = [name for name in self.lease_keys(zone) if _expired(name, now)]
        for name in expired:
            self._shred(zone, name)
        return expired

    # -- people and nodes -----------------------------------------------------------------------

    def whoami(self, token: str, zone: str) -> Person:
        """Return who presented *token*, which must be a person's and of this zone.

        Asked by a gateway: the token is looked up with itself, the names with the gateway's own login.
        A node's or gateway's token has a name too, so the policy ``person-<zone>`` is what counts.

        Raises:
            VaultDeniedError: The token is wrong, ended, not a person's, or of another zone.
        """
        found = _at(self._send("GET", "auth/token/lookup-self", {}, token=token), "data")
        held = {*(found.get("policies") or ()), *(found.get("identity_policies") or ())}
        entity_id = found.get("entity_id")
        if _PERSON_POLICY.format(zone=check_id(zone, what="zone")) not in held or not entity_id:
            raise VaultDeniedError(f"this token belongs to no person of zone {zone}; log in to Vault as one")
        entity = _at(self.call("GET", f"identity/entity/id/{entity_id}"), "data")
        groups = (self.call("GET", f"identity/group/id/{group}") for group in entity.get("group_ids") or ())
        names = frozenset(str(_at(group, "data", "name")) for group in groups)
        return Person(name=str(_at(entity, "name")), groups=names, entity_id=str(entity_id))

    def sign_node_certificate(self, node: str, csr_pem: str) -> tuple[str, str]:
        """Return the certificate for a node's signing key and its CA, both PEM.

        Raises:
            VaultDeniedError: The login is another node's, or the request names another node.
        """
        path = f"{NODE_PKI}/sign/node"
        answer = self.call("POST", path, common_name=check_id(node, what="node"), csr=csr_pem)
        return str(_at(answer, "data", "certificate")), str(_at(answer, "data", "issuing_ca"))

    def node_ca(self) -> str:
        """Return the CA certificate of all nodes, PEM."""
        return str(_at(self.call("GET", f"{NODE_PKI}/cert/ca"), "data", "certificate"))


def _at(answer: Mapping[str, Any], *path: str) -> Any:
    found: Any = answer
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    if found is None:
        raise VaultError("the answer is not what Vault would say; check what runs at its address")
    return found


def _key(node: str, lease: str) -> str:
    return f"{check_id(node, what='node')}.{check_id(lease, what='lease')}"


def _expired(name: str, now: int) -> bool:
    expiry = lease_expiry(name.rpartition(".")[2])
    return expiry is not None and expiry < now


def _context(grant_digest: str) -> str:
    digest = bytes.fromhex(grant_digest)
    if len(digest) != 32:
        raise ValueError("a grant digest is 64 hexadecimal digits")
    return base64.b64encode(digest).decode("ascii")


def _key_bytes(encoded: str) -> bytes:
    try:
        key = base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError):
        key = b""
    if len(key) != 32:
        raise VaultError("Vault answered with something that is no 256-bit key; check what runs at its address")
    return key


def _reason(error: BaseException) -> str:
    """Return what is wrong with Vault's certificate, or what kind of error it was."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__


def _translated(error: hvac.exceptions.VaultError, address: str, request: str) -> VaultError:
    """Return this project's error for hvac's. Vault answers 503 both when sealed and while no node leads."""
    text = " ".join(error.errors or ()) if isinstance(error.errors, (list, tuple)) else ""
    if isinstance(error, hvac.exceptions.VaultDown) and "sealed" in text:
        return VaultSealedError(f"Vault at {address} is sealed; unseal it and try again")
    if isinstance(error, (hvac.exceptions.VaultDown, hvac.exceptions.BadGateway)):
        return VaultUnreachableError(f"Vault at {address} is not ready; wait for it to start or check its log")
    if isinstance(error, hvac.exceptions.VaultNotInitialized):
        return VaultSealedError(f"Vault at {address} is not initialised; initialise it and run ray-gpu vault setup")
    refused = (hvac.exceptions.InvalidRequest, hvac.exceptions.Unauthorized, hvac.exceptions.Forbidden)
    if isinstance(error, (*refused, hvac.exceptions.InvalidPath)):
        return VaultDeniedError(f"Vault refused {request}; check the login, its policies and that the key still lives")
    return VaultError(f"Vault failed on {request} ({type(error).__name__}); check its log")
