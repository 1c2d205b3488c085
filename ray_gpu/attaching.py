"""``attach``: how a data scientist begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_gpu.client import Session
from ray_gpu.state import default_state_dir
from zones.errors import ConfigError, GatewayUnavailableError, SessionClosedError, UnknownNameError
from zones.vault import Vault

#: The session that functions use when they are not given one: the one attached last.
_sessions: list[Session] = []


def attach(
    zone: str,
    *,
    purpose: str = "",
    state_dir: Path | str | None = None,
    token: str | None = None,
    login: Path | str | None = None,
) -> Session:
    """Open a session with a zone's gateway on this host; use it as a context manager.

    Args:
        zone: Name of the zone.
        purpose: What the work is for; policy may ask for it, and the ledger records it.
        state_dir: Where the zone's gateway has its socket; ``RAY_GPU_STATE`` or the default of ``ray-gpu up``.
        token: Vault token of the person; by default the login that ``ray-gpu up`` left for its user.
        login: File on this host with the person's login instead, which nobody else may read (mode 0600): what
            ``ray-gpu vault issue`` wrote, or a Vault token, as ``bao login`` leaves it in ``~/.vault-token``. So a
            program on several hosts takes along where the login is, and not the login.

    Raises:
        ConfigError: The file *login* is missing, holds no login, or others can read it.
        ValueError: Both *token* and *login* are given.
        UnknownNameError: No such zone on this host.
        GatewayUnavailableError: Its gateway does not run.
        VaultError: Vault is unreachable or sealed, or refuses the login.
    """
    if token is not None and login is not None:
        raise ValueError("attach takes token or login, not both")
    state = Path(state_dir) if state_dir else default_state_dir()
    zones_here = sorted(path.parent.name for path in state.glob("zones/*/zone.json"))
    if zone not in zones_here:
        if not zones_here:
            raise GatewayUnavailableError(
                f"no gateway runs on this host (looked in {state}); start one with `ray-gpu up`"
            )
        raise UnknownNameError.of("zone", zone, zones_here)
    public = json.loads((state / "zones" / zone / "zone.json").read_text(encoding="utf-8"))
    if login is not None:
        token = _logged_in(Path(login).expanduser(), public)
    session = Session(Path(public["socket"]), token or _login(state, public), purpose)
    _sessions.append(session)
    return session


def _login(state: Path, public: dict[str, Any]) -> str:
    """Log in to Vault as the person that ``ray-gpu up`` made for whoever started it."""
    path = state / "person.json"
    try:
        person = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise GatewayUnavailableError(f"no login at {path}; pass token=..., from a Vault login of your own") from None
    return _by_password(person, public)


def _logged_in(path: Path, public: dict[str, Any]) -> str:
    """Return a Vault token by a person's file: the token itself, or a login by password."""
    from ray_gpu.vault_declaration import read_secret  # noqa: PLC0415 - imports what only this needs

    secret = read_secret(path)
    if not secret.startswith("{"):
        return secret
    try:
        person = json.loads(secret)
        return _by_password({name: str(person[name]) for name in ("user", "password")}, public)
    except (ValueError, KeyError):
        # No cause: its text could quote the secret.
        raise ConfigError(
            f"{path} is neither a Vault token nor what `ray-gpu vault issue` writes for a person; write it anew",
            file=str(path),
        ) from None


def _by_password(person: dict[str, str], public: dict[str, Any]) -> str:
    vault = Vault(public["vault"], ca_file=public.get("vault_ca"))
    vault.login_userpass(person["user"], person["password"])
    return vault.token


def current_session() -> Session:
    """Return the session attached last that is still open.

    Raises:
        SessionClosedError: There is none.
    """
    while _sessions and _sessions[-1].closed:
        _sessions.pop()
    if not _sessions:
        raise SessionClosedError('no session is open; use `with ray_gpu.attach("<zone>") as zone:`')
    return _sessions[-1]
