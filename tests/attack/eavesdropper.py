"""Somebody who recorded everything, and later gets everything that was kept: what of the traffic can he open?"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from zones.envelope import HEADER_BYTES, Header, LeaseKey, open_, sealed_size
from zones.errors import EnvelopeError
from zones.keys import derive_lease_key
from zones.model import Direction, Grant


@dataclass(slots=True)
class Recorder:
    """Stands between the two ends of a connection, passes everything on, and keeps a copy."""

    recorded: dict[Direction, bytearray] = field(
        default_factory=lambda: {Direction.OUT: bytearray(), Direction.BACK: bytearray()}
    )

    def between(self, keeper: socket.socket) -> socket.socket:
        """Return a connection to the keeper by way of this recorder; *keeper* leads there."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname(), timeout=10)
            theirs = listener.accept()[0]
        keeper.settimeout(None)
        for source, target, direction in ((theirs, keeper, Direction.OUT), (keeper, theirs, Direction.BACK)):
            threading.Thread(target=self._pass_on, args=(source, target, direction), daemon=True).start()
        return ours

    def _pass_on(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        with source:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    self.recorded[direction] += data
                    target.sendall(data)
            for sock in (source, target):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def messages(self) -> Iterator[tuple[Direction, bytes]]:
        """Yield every whole message: sizes stand in clear in the headers."""
        for direction, data in self.recorded.items():
            at = 0
            while at + HEADER_BYTES <= len(data):
                padded = Header.decode(bytes(data[at : at + HEADER_BYTES])).padded_bytes
                end = at + HEADER_BYTES + sealed_size(padded)
                if end <= len(data):
                    yield direction, bytes(data[at:end])
                at = end


def opened(recorder: Recorder, grant: Grant, keys: Iterable[bytes]) -> list[bytes]:
    """Return the payloads of all recorded messages that any of *keys*, 32 bytes each, opens as a lease's key."""
    found = []
    for raw in keys:
        key = LeaseKey.from_bytes(raw)
        for direction, message in recorder.messages():
            slot = Header.decode(message[:HEADER_BYTES]).slot(lease=grant.lease, direction=direction)
            with contextlib.suppress(EnvelopeError):
                found.append(bytes(open_(message, key=key, grant_digest=grant.digest(), slot=slot)))
    return found


def derivable(
    grant: Grant, offer: dict[str, Any], data_keys: Iterable[bytes], secrets: Iterable[bytes] = ()
) -> set[bytes]:
    """Return every lease key that can be made of what was recorded and kept.

    Args:
        grant: As the actor saw it.
        offer: The same.
        data_keys: What a Vault, or its backup, gave for the recorded message.
        secrets: Shared secrets of the exchange, if one leaked.
    """
    public = [bytes.fromhex(grant.exchange_key), bytes.fromhex(str(offer["exchange_key"]))]
    known = [bytes(32), bytes.fromhex(grant.digest()), *public, *data_keys]
    known += [hashlib.sha256(b"".join(pair)).digest() for pair in ((public[0], public[1]), (public[1], public[0]))]
    known += [bytes(a ^ b for a, b in zip(*public, strict=True)), *secrets]
    mixed = {derive_lease_key(one, other, grant.digest()).bytes for one in known for other in known}
    return {*known, *mixed}
