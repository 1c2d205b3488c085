"""Values that people keep in their zone between sessions, such as a model's weights. This module does I/O.

Each is a file beside the ledger, sealed under a key that Vault wrapped for this person and name alone: whoever has the
disk has nothing, and neither has the gateway once Vault takes its login away.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zones import sealed_file
from zones.errors import EnvelopeError, GatewayError, UnknownNameError, ValueRefusedError
from zones.vault import Vault

#: Largest value, and longest name.
MAX_BYTES, MAX_NAME_CHARS = 1 << 30, 100


class Checkpoints:
    """Thread-safe.

    Args:
        vault: Logged in as the gateway.
        zone: Whose.
        directory: This gateway's alone; made when it is needed.
    """

    def __init__(self, vault: Vault, zone: str, directory: Path) -> None:
        self._vault, self._zone, self._directory = vault, zone, directory

    def save(self, person: str, name: str, encoded: memoryview) -> None:
        """Keep a value in place of the one of that name.

        Raises:
            ValueRefusedError: The name is none, or the value too large.
            GatewayError: The disk does not take it; the one before stays.
            VaultError: Vault does not answer, or refuses.
        """
        if not (0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
            raise ValueRefusedError(f"a checkpoint's name has 1 to {MAX_NAME_CHARS} characters, all printable")
        if len(encoded) > MAX_BYTES:
            raise ValueRefusedError(
                f"a checkpoint of {len(encoded)} bytes is over the limit of {MAX_BYTES}; save its parts"
            )
        key, wrapped = self._vault.checkpoint_key(self._zone, _context(person, name))
        header = {
            "person": person,
            "name": name,
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            "bytes": len(encoded),
            "key": wrapped,
        }
        path = self._path(person, name)
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                for part in sealed_file.seal(header, encoded, key):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise GatewayError(
                f"the checkpoint {name!r} could not be saved ({error.strerror}); the one before is still there. Have "
                "the zone's operator mend that disk"
            ) from None

    def load(self, person: str, name: str) -> bytes:
        """Return a value that this person saved.

        Raises:
            UnknownNameError: There is none of that name.
            GatewayError: Its file was changed.
            VaultError: Vault does not answer, or refuses.
        """
        try:
            with self._path(person, name).open("rb") as file:
                view = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        except (OSError, ValueError):
            raise UnknownNameError.of("checkpoint", name, [one["name"] for one in self.saved(person)]) from None
        try:
            wrapped = str(sealed_file.header_of(view).get("key"))
            return sealed_file.unseal(view, self._vault.unwrap_checkpoint(self._zone, _context(person, name), wrapped))
        except EnvelopeError:
            raise GatewayError(
                f"the checkpoint {name!r} does not open: its file was changed. Save it again, or have the zone's "
                "operator restore that file"
            ) from None

    def saved(self, person: str) -> list[dict[str, Any]]:
        """Return name, time and size of what a person saved, the newest first, as the files say."""
        found = []
        for path in self._directory.glob("*.sealed"):
            with contextlib.suppress(OSError, EnvelopeError), path.open("rb") as file:
                header = sealed_file.header_of(memoryview(file.read(1 << 17)))
                if header.get("person") == person:
                    found.append({key: header.get(key) for key in ("name", "saved", "bytes")})
        return sorted(found, key=lambda one: str(one["saved"]), reverse=True)

    def forget(self, person: str, name: str) -> None:
        """Remove a value. One that is not there is none."""
        self._path(person, name).unlink(missing_ok=True)

    def _path(self, person: str, name: str) -> Path:
        return self._directory / f"{_context(person, name)}.sealed"


def _context(person: str, name: str) -> str:
    """Return what Vault binds a key to, hexadecimal."""
    return hashlib.sha256(b"\0".join((b"ray-gpu checkpoint", person.encode(), name.encode()))).hexdigest()
