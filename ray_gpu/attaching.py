"""``attach``: how a data scientist begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray_gpu.client import Session
from ray_gpu.state import default_state_dir
from zones.errors import GatewayUnavailableError, SessionClosedError, UnknownNameError
from zones.vault import Vault

#: The session that functions use when they are not given one: the one attached last.
_sessions: list[Session] = []


def attach(zone: str, *, purpose: str = "", state_dir: Path | str | None = None, token: str | None = None) -> Session:
    """Open a session with a zone's gateway on this host; use it as a context manager.

    Args:
        zone: Name of the zone.
        purpose: What the work is for; policy may ask for it, and the ledger records it.
        state_dir: Where the zone's gateway has its socket; ``RAY_GPU_STATE`` or the default of ``ray-gpu up``.
        token: Vault token of the person; by default the login that ``ray-gpu up`` left for its user.

    Raises:
        UnknownNameError: No such zone on this host.
        GatewayUnavailableError: Its gateway does not run.
        VaultError: Vault is unreachable or sealed, or refuses the login.
    """
    state = Path(state_dir) if state_dir else default_state_dir()
    zones_here = sorted(path.parent.name for path in state.glob("zones/*/zone.json"))
    if zone not in zones_here:
        if not zones_here:
            raise GatewayUnavailableError(
                f"no gateway runs on this host (looked in {state}); start one with `ray-gpu up`"
            )
        raise UnknownNameError.of("zone", zone, zones_here)
    public = json.loads((state / "zones" / zone / "zone.json").read_text(encoding="utf-8"))
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
