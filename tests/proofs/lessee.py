"""An attacker with the logins of gateway and nodes, who speaks to custodians as the zone's gateway and actors would."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack

from ray_gpu import raylet
from ray_gpu.frames import SealedSocket
from ray_gpu.wire import call, unix_connect
from tests.proofs.attacked import Attacked
from zones.envelope import LeaseKey
from zones.errors import ZoneError
from zones.keys import ExchangeKey, derive_lease_key
from zones.model import Direction, Grant, Kind, Offer, Padding, digest
from zones.vault import Vault, lease_name


class Lessee:
    """One lease on one node, from the zone's end, step by step. Use it as a context manager: the lease ends with it."""

    def __init__(self, attacked: Attacked, node: str, *, custodian: Path | None = None, lease_s: int = 300) -> None:
        self._attacked = attacked
        self.node = node
        self.not_after = int(time.time()) + lease_s
        self.lease = lease_name(secrets.token_bytes(8), self.not_after)
        self._exchange = ExchangeKey()
        self._closing = contextlib.ExitStack()
        self.vault: Vault = self._closing.enter_context(attacked.vault("gateway"))
        self._path = custodian or attacked.layout.custodian_dir(node) / raylet.CUSTODIAN_SOCKET
        self.actor = self.another_actor()
        self.data_key = b""
        #: After :meth:`hello`: what the two ends alone know, the connection, the same as a socket, and the lease's key.
        self.shared = b""
        self.link: SealedSocket
        self.ours: socket.socket
        self.key: LeaseKey
        #: The message that an actor hands to its custodian, as whoever sits in a cage can record it.
        self.message: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(ZoneError):
            self.shred()
        self._closing.close()

    def another_actor(self, custodian: Path | None = None) -> socket.socket:
        """Connect to a custodian, as one more actor."""
        return self._closing.enter_context(unix_connect(str(custodian or self._path)))

    def offer(self, actor: socket.socket | None = None) -> Offer:
        """Ask for an offer."""
        document = call(actor or self.actor, {"op": "offer", "lease": self.lease})["offer"]
        lists = {name: tuple(document[name]) for name in ("degradations", "environments")}
        return Offer(**{**document, **lists})

    def terms(self, offer: Offer, **changes: Any) -> Grant:
        """Return the terms that answer an offer."""
        fields = {
            "zone": self._attacked.zone, "lease": self.lease, "node": offer.node, "pool": offer.pool,
            "offer_digest": digest(offer.document()), "exchange_key": self._exchange.public_hex,
            "accepted_degradations": offer.degradations, "padding": Padding.FINE,
            "environment": offer.environments[0], "gpu_milli": 1, "memory_bytes": 1 << 30,
            "policy_digest": "0" * 64, "not_after": self.not_after,
        }  # fmt: skip
        return Grant(**{**fields, **changes})

    def wrap(self, grant: Grant) -> str:
        """Make the lease's key in Vault and return a data key wrapped for these terms."""
        self.vault.create_lease_key(grant.zone, self.node, self.lease)
        self.data_key, wrapped = self.vault.data_key(grant.zone, self.node, self.lease, grant.digest())
        return wrapped

    def hand_over(self, grant: Grant, wrapped: str) -> dict[str, Any]:
        """Hand terms and wrapped key to the custodian and return its answer, or raise its error."""
        self.message = {"op": "grant", "lease": self.lease, "grant": grant.document(), "wrapped": wrapped}
        answer = self.replay(self.actor)
        self._endpoint = tuple(answer["endpoint"])
        return answer

    def replay(self, actor: socket.socket) -> dict[str, Any]:
        """Hand over the recorded message, on any connection."""
        return call(actor, self.message)

    def open(self) -> tuple[Offer, Grant]:
        """Go the honest way until keeper and sandbox run."""
        offer = self.offer()
        grant = self.terms(offer)
        self.hand_over(grant, self.wrap(grant))
        return offer, grant

    def hello(self, offer: Offer, grant: Grant) -> dict[str, Any]:
        """Connect to the keeper, prove that we hold the lease's key, and return what it says.

        Raises:
            OSError: The keeper hung up: the key is another.
        """
        self.shared = self._exchange.shared(offer.exchange_key)
        key = derive_lease_key(self.data_key, self.shared, grant.digest())
        link = SealedSocket(
            self.connect(), key=key, grant_digest=grant.digest(), lease=self.lease, outgoing=Direction.OUT
        )
        self._closing.callback(link.close)
        link.send(link.slot(Kind.HELLO, call=0), b"")
        header, payload = link.receive()
        assert header.kind is Kind.HELLO
        self.link, self.key = link, key
        said: dict[str, Any] = msgpack.unpackb(payload)
        return said

    def connect(self) -> socket.socket:
        """Return a connection to the lease's endpoint, whose other end the keeper has."""
        self.ours = socket.create_connection(self._endpoint, timeout=10)
        return self.ours

    def shred(self) -> None:
        """Destroy the lease's key in Vault."""
        self.vault.shred(self._attacked.zone, self.node, self.lease)
