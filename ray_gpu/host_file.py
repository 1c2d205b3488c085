"""What the files of a host have in common: where Vault is, and the login for it. Reads files; nothing else."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from zones.document import FileModel
from zones.errors import ConfigError


def _address(text: str) -> str:
    ipaddress.IPv4Address(text)
    return text


def _network(text: str) -> str:
    try:
        found = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise ValueError(f"a network is written like 192.0.2.0/24, or an address for one host: {error}") from None
    if found.prefixlen == 0:
        raise ValueError("0.0.0.0/0 is every host there is; name the cluster's")
    if found.is_loopback or found.is_link_local or found.is_multicast:
        raise ValueError(f"{text} has no host of a cluster in it")
    return str(found)


def _absolute(text: str) -> str:
    if not Path(text).is_absolute():
        raise ValueError(f"a path is absolute, not {text!r}")
    return text


Address = Annotated[str, AfterValidator(_address)]
#: Of IPv4.
Network = Annotated[str, AfterValidator(_network)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]


class VaultPart(FileModel):
    """Where Vault is, and what this host logs in with."""

    address: str = Field(pattern="^https://")
    #: PEM file that Vault's certificate must chain to; by default the system's CAs.
    ca: AbsolutePath | None = None
    #: What ``ray-gpu vault issue`` wrote, mode 0600.
    credentials: AbsolutePath


def read_login(vault: VaultPart) -> tuple[str, str]:
    """Return role and secret id from the file that ``ray-gpu vault issue`` wrote.

    Raises:
        ConfigError: It is missing, others can read it, or it holds something else; or the CA's file is missing.
    """
    if vault.ca is not None and not Path(vault.ca).is_file():
        raise ConfigError(
            f"{vault.ca}: no such file; copy the certificate of Vault's CA there, or name its file under vault, ca",
            file=vault.ca,
        )
    path = Path(vault.credentials)
    try:
        mode = path.stat().st_mode
        document = json.loads(path.read_text(encoding="utf-8"))
        found = str(document["role_id"]), str(document["secret_id"])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; write it with `ray-gpu vault issue`", file=str(path)) from None
    except (ValueError, KeyError, TypeError):
        # No cause: its text could quote the secret.
        raise ConfigError(f"{path} is not what `ray-gpu vault issue` writes; write it anew", file=str(path)) from None
    if mode & 0o077:
        raise ConfigError(f"others can read {path}, which holds a secret; chmod 600 {path}", file=str(path))
    return found
