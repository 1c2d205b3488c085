"""What a Vault lacks of what it shall hold, as a list of changes. Reads Vault; writes only when a change is applied.

Dry run and real run are one code: the list is made by comparing, and applying it is a second step. So what is
printed is what would be done, and a second run has an empty list.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from zones.errors import ConfigError, VaultDeniedError
from zones.vault import Vault

#: A versioned KV mount that was just made refuses requests for a moment, seconds at most.
_KV_READY_S = 10.0
Action = Literal["make", "change", "remove"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing that differs, and what makes it as it shall be."""

    action: Action
    #: Such as ``"policy gateway-clinic"``.
    what: str
    #: Names of the settings that differ, never their values: some are secrets.
    settings: tuple[str, ...] = ()
    apply: Callable[[], object] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.action} {self.what}" + (f" ({', '.join(self.settings)})" if self.settings else "")


class Planner:
    """Compares and collects; changes are applied in the order in which they were found.

    Attributes:
        vault: Logged in with a token that may read all that is compared.
        changes: What was found to differ so far.
    """

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self.changes: list[Change] = []
        self._mounts = vault.call("GET", "sys/mounts")["data"]
        self._auth = vault.call("GET", "sys/auth")["data"]

    def add(self, action: Action, what: str, apply: Callable[[], object], settings: tuple[str, ...] = ()) -> None:
        """Note a change."""
        self.changes.append(Change(action=action, what=what, settings=settings, apply=apply))

    def want(
        self,
        what: str,
        path: str,
        body: Mapping[str, Any],
        *,
        new: Mapping[str, Any] | None = None,
        unread: Mapping[str, Any] | None = None,
        again: bool = False,
    ) -> None:
        """Want *body* to stand at *path*.

        Args:
            what: Words for the plan.
            body: Compared with what Vault says, setting by setting; others are left alone.
            new: Sent besides when nothing stands there yet.
            unread: Sent besides each time: Vault forgets it when the rest is written, and never shows it.
            again: Write it although nothing differs, for the sake of *unread*.
        """
        found = self.vault.find(path)
        sent = {**body, **(unread or {})}
        if found is None:
            self.add("make", what, partial(self._post, path, {**sent, **(new or {})}))
            return
        held = found.get("data") or {}
        differ = tuple(name for name, value in body.items() if not _same(held.get(name), value))
        if differ or again:
            self.add("change", what, partial(self._post, path, sent), differ or tuple(unread or ()))

    def want_mount(
        self, path: str, kind: str, *, options: Mapping[str, str] | None = None, longest_s: int | None = None
    ) -> None:
        """Want a secrets engine.

        Args:
            longest_s: Longest life of what it issues, seconds; ``None`` for the server's own.

        Raises:
            ConfigError: Another kind is mounted there.
        """
        held = self._mounts.get(f"{path}/")
        config = {} if longest_s is None else {"max_lease_ttl": longest_s}
        if held is None:
            body = {"type": kind, "config": config, "options": dict(options or {})}
            self.add("make", f"mount {path} ({kind})", partial(self._mount, path, body))
        elif held["type"] != kind or any((held["options"] or {}).get(k) != v for k, v in (options or {}).items()):
            raise ConfigError(
                f"Vault has something else at {path}/ ({held['type']} {held['options'] or ''}); move it away and run "
                "set-up again",
                file=None,
            )
        elif any(held["config"].get(name) != value for name, value in config.items()):
            self.add("change", f"mount {path}", partial(self._post, f"sys/mounts/{path}/tune", config), tuple(config))

    def _mount(self, path: str, body: Mapping[str, Any]) -> None:
        self._post(f"sys/mounts/{path}", body)
        deadline = time.monotonic() + _KV_READY_S
        while body["type"] == "kv":
            try:
                self.vault.call("GET", f"{path}/config")
                return
            except VaultDeniedError:
                # What it says while it prepares itself for versions.
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def want_auth(self, kind: str) -> None:
        """Want an authentication method under its usual name."""
        if f"{kind}/" not in self._auth:
            self.add("make", f"authentication by {kind}", lambda: self._post(f"sys/auth/{kind}", {"type": kind}))

    def unwanted(self, what: str, path: str) -> None:
        """Want nothing to stand at *path*."""
        if self.vault.find(path) is not None:
            self.add("remove", what, lambda: self.vault.call("DELETE", path))

    def want_identity(self, name: str, aliases: Mapping[str, Callable[[], str | None]]) -> None:
        """Want one entity that stands for *name*, whichever way it logs in.

        Args:
            aliases: By authentication method: what that method calls *name*; ``None`` as long as it does not know it.
        """
        found = self.vault.find(f"identity/entity/name/{name}")
        held = {
            alias["mount_accessor"]: alias["name"] for alias in (found or {"data": {}})["data"].get("aliases") or ()
        }
        wrong = [kind for kind, alias in aliases.items() if held.get(self._accessor(kind), "") != alias()]
        if found is None or wrong:
            self.add("make" if found is None else "change", f"identity {name}", lambda: self._identify(name, aliases))

    def _accessor(self, kind: str) -> str | None:
        accessor = self._auth.get(f"{kind}/", {}).get("accessor")
        return None if accessor is None else str(accessor)

    def _identify(self, name: str, aliases: Mapping[str, Callable[[], str | None]]) -> None:
        self._auth = self.vault.call("GET", "sys/auth")["data"]
        self._post(f"identity/entity/name/{name}", {})
        entity = self.vault.call("GET", f"identity/entity/name/{name}")["data"]
        older = {alias["mount_accessor"]: alias["id"] for alias in entity.get("aliases") or ()}
        for kind, alias in aliases.items():
            accessor = self._accessor(kind)
            # One entity has one alias for each method, so an older one is rewritten.
            body = {"name": alias(), "canonical_id": entity["id"], "mount_accessor": accessor}
            self._post(f"identity/entity-alias{f'/id/{older[accessor]}' if accessor in older else ''}", body)

    def want_group(self, name: str, members: list[str]) -> None:
        """Want a group of exactly these entities."""
        found = self.vault.find(f"identity/group/name/{name}")
        ids = [self._entity_id(member) for member in members]
        held = None if found is None else sorted(found["data"].get("member_entity_ids") or ())
        if held is None or None in ids or held != sorted(str(i) for i in ids):
            self.add("make" if held is None else "change", f"group {name}", lambda: self._group(name, members))

    def _group(self, name: str, members: list[str]) -> None:
        # Asked again, since the entities may have been made meanwhile.
        ids = [self._entity_id(member) for member in members]
        self._post(f"identity/group/name/{name}", {"member_entity_ids": ids})

    def _entity_id(self, name: str) -> str | None:
        found = self.vault.find(f"identity/entity/name/{name}")
        return None if found is None else str(found["data"]["id"])

    def _post(self, path: str, body: Mapping[str, Any]) -> None:
        self.vault.call("POST", path, **body)


def _same(held: object, wanted: object) -> bool:
    """Whether Vault's answer means what was wanted. Lists are sets to Vault."""
    if isinstance(held, list) and isinstance(wanted, list):
        return sorted(map(str, held)) == sorted(map(str, wanted))
    if isinstance(held, dict) and isinstance(wanted, dict):
        return held.keys() == wanted.keys() and all(_same(held[name], wanted[name]) for name in wanted)
    return held == wanted
