"""Signs a ledger's checkpoints with the zone's key, which Vault keeps and never gives out.

Does I/O: asks Vault, and appends to the ledger that it is given.
"""

from __future__ import annotations

import base64
import binascii
import threading

from zones.checkpoint import VerifierKey, opened, origin
from zones.errors import VaultDeniedError, VaultError
from zones.ledger import Ledger
from zones.model import check_id
from zones.vault import Vault

#: Transit mount with one Ed25519 key for each zone; ``ray_gpu.vault_setup`` makes both.
MOUNT = "ledger"


class Signer:
    """The gateway's way to its zone's key.

    Raises:
        VaultDeniedError: Vault has no such key, or this login may not use it.
        VaultError: Vault cannot be asked, or answers with no Ed25519 key.
    """

    def __init__(self, vault: Vault, zone: str) -> None:
        self._vault, self._zone = vault, check_id(zone, what="zone")
        self._guard = threading.Lock()
        try:
            found = vault.call("GET", f"{MOUNT}/keys/{zone}").get("data", {})
        except VaultDeniedError:
            raise VaultDeniedError(
                f"Vault shows this login no ledger key of zone {zone}; run `ray-gpu vault setup` again, which makes it"
            ) from None
        try:
            # The newest version for as long as this process lives, whatever is rotated meanwhile.
            self._version = int(found["latest_version"])
            public = base64.b64decode(found["keys"][str(self._version)]["public_key"], validate=True)
            if found["type"] != "ed25519" or len(public) != 32:
                raise ValueError("no Ed25519 key")
        except (KeyError, TypeError, ValueError, binascii.Error):
            raise VaultError(f"{MOUNT}/keys/{zone} in Vault is no Ed25519 key; run `ray-gpu vault setup`") from None
        #: What checkpoints verify with.
        self.key = VerifierKey(origin(zone), public)

    def sign(self, ledger: Ledger) -> str:
        """Write a signed checkpoint of all that is in the ledger now, and return it.

        Raises:
            VaultError: Vault did not sign.
            LedgerUnavailableError: It could not be written.
        """
        # One at a time: the newest checkpoint is then of the most entries.
        with self._guard:
            return self._sign(ledger)

    def _sign(self, ledger: Ledger) -> str:
        state = ledger.checkpoint
        text = base64.b64encode(state.text().encode()).decode("ascii")
        answer = self._vault.call("POST", f"{MOUNT}/sign/{self._zone}", input=text, key_version=self._version)
        signature = str(answer.get("data", {}).get("signature")).rpartition(":")[2]
        try:
            note = state.note(self.key, base64.b64decode(signature, validate=True))
            opened(note, self.key)
        except (ValueError, binascii.Error):
            raise VaultError("Vault's signature of the ledger does not hold; check what runs at its address") from None
        ledger.append({"kind": "checkpoint", "note": note})
        return note
