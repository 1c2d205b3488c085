"""Lease keys of one zone in Vault, and that none of them outlives its lease. This module does I/O.

Each key is noted on disk, as an empty file, from before it is made until after it is shredded. So a gateway
that was killed, or ended while Vault did not answer, leaves word of every key that the next one must shred.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from zones.errors import GatewayError, VaultError
from zones.vault import Vault


class LeaseKeys:
    """Makes and shreds lease keys. Thread-safe.

    Args:
        vault: Logged in as the gateway.
        zone: Whose keys.
        directory: For the notes, this gateway's alone; what is noted there already is shredded by the first
            :meth:`sweep`.

    Raises:
        OSError: The directory cannot be made or read.
    """

    def __init__(self, vault: Vault, zone: str, directory: Path) -> None:
        self._vault = vault
        self._zone = zone
        self._directory = directory
        directory.mkdir(mode=0o700, exist_ok=True)
        #: Node and lease of keys to shred.
        self._ended = {(path.stem, path.suffix[1:]) for path in directory.iterdir()}

    def make(self, node: str, lease: str, grant_digest: str) -> tuple[bytes, str]:
        """Make the key of one lease; return a data key for exactly one grant, in clear and wrapped.

        Raises:
            GatewayError: It could not be noted.
            VaultError: Vault does not answer, or refuses.
        """
        try:
            self._note(node, lease).touch(mode=0o600)
        except OSError as error:
            raise GatewayError(
                f"a lease key cannot be noted in {self._directory} ({error.strerror}), so none is made; mend that disk"
            ) from None
        self._vault.create_lease_key(self._zone, node, lease)
        return self._vault.data_key(self._zone, node, lease, grant_digest)

    def shred(self, node: str, lease: str) -> None:
        """Shred a key; when Vault does not do it now, a later :meth:`sweep` does."""
        try:
            self._vault.shred(self._zone, node, lease)
        except VaultError:
            self._ended.add((node, lease))
            return
        self._ended.discard((node, lease))
        with contextlib.suppress(OSError):
            self._note(node, lease).unlink()

    def sweep(self, now: int) -> None:
        """Shred what could not be shredded before, and every key that outlived its lease.

        Args:
            now: UTC seconds since the epoch.
        """
        for node, lease in list(self._ended):
            self.shred(node, lease)
        with contextlib.suppress(VaultError):
            self._vault.prune(self._zone, now)

    def _note(self, node: str, lease: str) -> Path:
        return self._directory / f"{node}.{lease}"
