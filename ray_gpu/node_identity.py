"""What a node of the Ray cluster proves itself with: a TLS certificate from Vault, and the cluster's token.

Asks Vault and writes files. Ray reads both at start only: to renew them is to write them again and to
restart the node when it is idle.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zones.errors import ConfigError, VaultDeniedError, VaultError
from zones.keys import tls_request
from zones.model import check_id
from zones.vault import Vault

#: Where Ray's certificates come from: a root of their own, so that no other certificate opens Ray's ports.
RAY_PKI = "pki-ray"
#: KV version 2 mount with the cluster's token, and the token's name in it.
RAY_KV, RAY_TOKEN = "kv-ray", "token"
#: What the head's certificate names besides the head's own addresses, and no other node's does. There Ray Client's
#: server speaks to itself, and there a relay without a network finds the head at the end of its tunnel.
HEAD_LOOPBACK = "127.0.0.1"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class RayIdentity:
    """What lets one node into the cluster. Key and token are secrets."""

    certificate_pem: str
    #: P-256, PKCS #8, PEM, not encrypted.
    key_pem: str = field(repr=False)
    #: The root that every node's certificate chains to.
    ca_pem: str
    #: The same for the whole cluster.
    token: str = field(repr=False)
    #: When the certificate ends, UTC seconds since the epoch.
    not_after: int

    def __reduce__(self) -> str:
        raise TypeError("a RayIdentity is never pickled")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayFiles:
    """Where :func:`write` put an identity."""

    directory: Path

    @property
    def certificate(self) -> Path:
        """The node's certificate, PEM."""
        return self.directory / "ray-node.pem"

    @property
    def key(self) -> Path:
        """The certificate's private key, PEM."""
        return self.directory / "ray-node.key"

    @property
    def ca(self) -> Path:
        """The root certificate of the cluster's nodes, PEM."""
        return self.directory / "ray-ca.pem"

    @property
    def token(self) -> Path:
        """The cluster's token."""
        return self.directory / "ray-token"

    def paths(self) -> tuple[Path, ...]:
        """Return all of them."""
        return self.certificate, self.key, self.ca, self.token

    def environment(self) -> dict[str, str]:
        """Return what makes Ray's processes use the files: mutual TLS and the token. Paths only, no secret."""
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_SERVER_CERT": str(self.certificate),
            "RAY_TLS_SERVER_KEY": str(self.key),
            "RAY_TLS_CA_CERT": str(self.ca),
            # Without the mode Ray ignores the path.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
        }


def certified_addresses(addresses: Sequence[str], *, head: bool) -> tuple[str, ...]:
    """Return what a node's certificate names: its own addresses, and for Ray's head ``HEAD_LOOPBACK``."""
    return (*addresses, *((HEAD_LOOPBACK,) if head else ()))


def joined_addresses(addresses: Iterable[str]) -> str:
    """Return IP addresses in the one spelling and order that Vault's policies and a node's requests share.

    Raises:
        ValueError: One is no IP address or has a zone index, or there is none.
    """
    given = list(addresses)
    if any("%" in address for address in given):
        raise ValueError("an address with a zone index (%) cannot stand in a certificate; use a global one")
    parsed = {ipaddress.ip_address(address) for address in given}
    if not parsed:
        raise ValueError("a node of the Ray cluster has at least one address")
    return ",".join(sorted(map(str, parsed)))


def fetch(vault: Vault, *, node: str, addresses: Sequence[str]) -> RayIdentity:
    """Return a new certificate for a node, and the cluster's token. The private key is made here.

    Args:
        vault: Logged in with the node's own AppRole.
        node: Node id.
        addresses: The node's IP addresses: exactly those that ``ray-gpu vault setup`` was given.

    Raises:
        ValueError: *node* is no id, or an address is none.
        VaultDeniedError: The login is not this node's, the addresses are not exactly its own, or nothing is set up.
        VaultError: Vault cannot be asked, or answers something else.
    """
    request, joined = tls_request(check_id(node, what="node")), joined_addresses(addresses)
    try:
        signed = vault.call("POST", f"{RAY_PKI}/sign/{node}", common_name=node, ip_sans=joined, csr=request.csr_pem)
    except VaultDeniedError:
        raise VaultDeniedError(
            f"Vault gives this login no certificate for node {node} at {joined}; log in as that node, and compare its "
            "addresses with those that `ray-gpu vault setup` was given: they must be all of them and no others"
        ) from None
    try:
        stored = vault.call("GET", f"{RAY_KV}/data/{RAY_TOKEN}")
    except VaultDeniedError:
        raise VaultDeniedError(
            "Vault has no Ray token for this login; run `ray-gpu vault setup` again, which makes it where it is missing"
        ) from None
    return _identity(signed, stored, request.key_pem)


def obtain(vault: Vault, role_id: str, secret_id: str, *, node: str, addresses: Sequence[str]) -> RayIdentity:
    """Log in as a node, :func:`fetch` its identity, and log out; closes *vault*.

    Raises:
        VaultError: The clocks differ; otherwise as :func:`fetch`.
    """
    try:
        vault.login_approle(role_id, secret_id)
        vault.check_clock()
        identity = fetch(vault, node=node, addresses=addresses)
        vault.revoke()
    finally:
        vault.close()
    return identity


def _identity(signed: dict[str, Any], stored: dict[str, Any], key_pem: str) -> RayIdentity:
    try:
        return RayIdentity(
            certificate_pem=str(signed["data"]["certificate"]) + "\n",
            key_pem=key_pem,
            ca_pem=str(signed["data"]["issuing_ca"]) + "\n",
            token=str(stored["data"]["data"]["token"]),
            not_after=int(signed["data"]["expiration"]),
        )
    except (KeyError, TypeError, ValueError):
        # No cause: its text could hold part of the answer.
        raise VaultError(
            "the answer is not what Vault would say of a Ray node; check what runs at its address"
        ) from None


def write(identity: RayIdentity, directory: Path, *, uid: int | None) -> RayFiles:
    """Write an identity for one node's processes, and nobody else, to read. Each file is whole or not there.

    A node that runs keeps working while its files are replaced: its new processes read new ones of the same root.

    Args:
        directory: Made if missing, mode 0700. Put it on a tmpfs: the files need not outlive the host.
        uid: Whose processes read the files; ``None`` for our own. Another than our own takes root.

    Raises:
        ConfigError: The directory or a file cannot be written, or *directory* is a link.
    """
    files = RayFiles(directory=directory)
    contents = {
        files.ca: identity.ca_pem,
        files.certificate: identity.certificate_pem,
        files.key: identity.key_pem,
        files.token: identity.token,
    }
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(directory, _DIRECTORY)
        try:
            os.fchmod(handle, 0o700)
            _give(handle, uid)
            for path, content in contents.items():
                _write(handle, path.name, content, uid)
        finally:
            os.close(handle)
    except OSError as error:
        raise ConfigError(
            f"{directory}: {error.strerror}; name a directory that this process may write and give away",
            file=str(directory),
        ) from error
    return files


def _write(directory: int, name: str, content: str, uid: int | None) -> None:
    """Write a file of mode 0600 below an open directory, which another uid may own: follow no link of its making."""
    draft = f".{name}.{secrets.token_hex(8)}"
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
            _give(handle, uid)
        os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=directory)
        raise


def _give(handle: int, uid: int | None) -> None:
    if uid is not None and uid != os.geteuid():
        os.fchown(handle, uid, uid)
