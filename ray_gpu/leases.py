"""The zone's side of leases: offer, grant, key, hello; and the link to the keeper. This module does I/O.

Rules:

1. Nothing is sealed for a node before its offer's signature verified against the node CA.
2. Nothing but a knock (no data) is sent before the keeper's hello opened and satisfied the decision.
3. Data connections go only where zone.yaml's ``endpoints`` allow, whatever the relay says.
4. A lease's key is shredded in Vault when it ends, however it ends.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import msgpack

from ray_gpu.frames import PlainBuffer, SealedSocket
from ray_gpu.lease_keys import LeaseKeys
from ray_gpu.relay_link import RelayLink
from ray_gpu.rooms import Rooms
from zones.config import endpoint_allowed
from zones.errors import (
    ClusterError,
    EnvelopeError,
    GrantRefusedError,
    LeaseLostError,
    PlacementError,
    SandboxLevelError,
    ZoneError,
)
from zones.keys import ExchangeKey, derive_lease_key, verify_node_signature
from zones.model import (
    Decision,
    Direction,
    Grant,
    Kind,
    Offer,
    Zone,
    canonical,
    check_id,
    digest,
    sandbox_level,
)
from zones.vault import lease_name

#: The keeper's hello must be there by then, seconds.
HELLO_TIMEOUT_S = 10.0
#: An idle lease gets a sealed heartbeat this often, seconds; the keeper gives up after 10.
HEARTBEAT_S = 3.0
#: A connection that takes no bytes, or acknowledges none, for so long is lost, seconds.
STALL_LIMIT_S = 20
#: Memory limit of keeper and sandbox together, bytes.
DEFAULT_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """What a session asks for. Leases with equal terms are interchangeable."""

    pool: str
    gpu_milli: int
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    accepted_degradations: tuple[str, ...]
    max_lease_s: int


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """One lease that the gateway holds. One call uses it at a time (:attr:`lock`)."""

    id: str
    node: str
    device: str
    degradations: tuple[str, ...]
    terms: LeaseTerms
    not_after: int
    link: SealedSocket
    lock: threading.Lock = field(default_factory=threading.Lock)
    #: Function digest to the number of the call that sent it.
    functions: dict[str, int] = field(default_factory=dict)
    plain: PlainBuffer = field(default_factory=PlainBuffer)
    idle_since: float = 0.0
    lost: str = ""
    _control_lock: threading.Lock = field(default_factory=threading.Lock)
    _calls: int = 0
    _controls: int = 0

    @property
    def level(self) -> str:
        """``"strict"``, or ``"degraded: ..."`` with the missing controls of the sandbox."""
        return sandbox_level(self.degradations)

    def next_call(self) -> int:
        """Return a fresh call number."""
        self._calls += 1
        return self._calls

    def control(self, message: dict[str, Any]) -> None:
        """Send a sealed control message: ``{}`` is a heartbeat."""
        # One lock for number and send: the keeper takes control messages in rising order only.
        with self._control_lock:
            self._controls += 1
            slot = self.link.slot(Kind.CONTROL, call=self._calls + 1, shard=self._controls)
            self.link.send(slot, msgpack.packb(message))

    def finish(self, call: int) -> None:
        """Tell the keeper that a call is over, and refuse its slots from now on."""
        self.control({"finish": call})
        self.link.finish_call(call)

    def error(self, reason: str) -> LeaseLostError:
        """Return the error that says that this lease is gone."""
        why = self.lost or reason
        return LeaseLostError(
            f"the lease on node {self.node} was lost ({why}); run the call again. If that ends the same way, look in "
            f"the function for an exit, a native crash, or more than {self.terms.memory_bytes >> 20} MiB of memory",
            node=self.node,
            reason=why,
        )


class LeaseOpener:
    """Opens and ends leases of one zone.

    Args:
        keys: Makes and shreds the leases' keys.
        node_ca: PEM certificate that node certificates are checked against.
        degradations: What the zone's own side lacks; the zone must accept it as it must a node's.
    """

    def __init__(
        self, zone: Zone, keys: LeaseKeys, relay: RelayLink, node_ca: str, degradations: tuple[str, ...] = ()
    ) -> None:
        self._zone = zone
        self._keys = keys
        self._relay = relay
        self._node_ca = node_ca
        self._degradations = degradations
        #: What the relay says of the nodes' room.
        self.rooms = Rooms(relay)

    def open(self, terms: LeaseTerms, decision: Decision, *, timeout_s: float, patient: bool = True) -> Lease:
        """Place an actor, grant it a lease, and return the lease once its hello satisfied *decision*.

        Nothing has left while a lease is opened, so a node that fails meanwhile is passed over for another.

        Args:
            timeout_s: Longest wait for room.
            patient: Whether to wait for room on the others when a node failed.

        Raises:
            PlacementError: No GPU node with room within *timeout_s*.
            SandboxLevelError: The node cannot give the level that policy asks for.
            GrantRefusedError: Node or custodian refused, or the node's signature did not verify.
            LeaseLostError, ClusterError: Node after node went away meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            avoid = self.rooms.passed_over(terms.pool)
            try:
                return self._open(terms, decision, max(0.0, deadline - time.monotonic()), avoid=sorted(avoid))
            except (ClusterError, LeaseLostError) as error:
                if not error.node or time.monotonic() > deadline:
                    raise
                self.rooms.failed(str(error.node), error.message)
                if patient and self.rooms.passed_over(terms.pool):
                    continue
                if patient or not self.rooms.has_room(terms.pool, terms.gpu_milli):
                    raise
            except PlacementError as error:
                if not avoid:
                    raise
                raise PlacementError(
                    f"{error.message}. Passed over: {'; '.join(avoid.values())}", pool=error.pool, reason=error.reason
                ) from None

    def _open(self, terms: LeaseTerms, decision: Decision, timeout_s: float, avoid: list[str]) -> Lease:
        not_after = int(time.time()) + terms.max_lease_s
        lease = lease_name(secrets.token_bytes(8), not_after)
        node = ""
        try:
            offer = self._place(lease, terms, timeout_s, avoid)
            node = offer.node
            return self._grant(lease, offer, terms, decision, not_after)
        except (OSError, EnvelopeError) as error:
            self._abandon(lease, node)
            raise LeaseLostError(
                f"node {node or 'unknown'} went away while a lease was opened; run the call again",
                node=node,
                reason=type(error).__name__,
            ) from None
        except BaseException:
            self._abandon(lease, node)
            raise

    def _place(self, lease: str, terms: LeaseTerms, timeout_s: float, avoid: list[str]) -> Offer:
        answer = self._relay.request(
            {
                "op": "place",
                "lease": lease,
                "pool": terms.pool,
                "gpus": terms.gpu_milli / 1000,
                "timeout_s": timeout_s,
                "labels": {"ray-gpu-node": f"!in({','.join(avoid)})"} if avoid else {},
            },
            timeout_s=timeout_s + 30,
        )
        offer = _parse_offer(answer.get("offer"))
        verify_node_signature(
            str(answer.get("certificate")),
            self._node_ca,
            node=offer.node,
            message=canonical({"lease": lease, **offer.document()}),
            signature_hex=str(answer.get("signature")),
            now=int(time.time()),
        )
        if offer.pool != terms.pool:
            raise GrantRefusedError(f"node {offer.node} is of pool {offer.pool}, not {terms.pool}; see cluster labels")
        _check_level(offer.node, (*self._degradations, *offer.degradations), terms)
        return offer

    def _grant(self, lease: str, offer: Offer, terms: LeaseTerms, decision: Decision, not_after: int) -> Lease:
        exchange = ExchangeKey()
        grant = Grant(
            zone=self._zone.name,
            lease=lease,
            node=offer.node,
            pool=offer.pool,
            offer_digest=digest(offer.document()),
            exchange_key=exchange.public_hex,
            accepted_degradations=terms.accepted_degradations,
            gpu_milli=terms.gpu_milli,
            memory_bytes=terms.memory_bytes,
            policy_digest=decision.policy_digest,
            not_after=not_after,
        )
        data_key, wrapped = self._keys.make(offer.node, lease, grant.digest())
        key = derive_lease_key(data_key, exchange.shared(offer.exchange_key), grant.digest())
        answer = self._relay.request({"op": "grant", "lease": lease, "grant": grant.document(), "wrapped": wrapped})
        link = SealedSocket(
            self._connect(answer.get("endpoint")),
            key=key,
            grant_digest=grant.digest(),
            lease=lease,
            outgoing=Direction.OUT,
        )
        hello = self._hello(link)
        _check_level(offer.node, tuple(hello["degradations"]), terms)
        if hello["node"] != offer.node or hello["pool"] != offer.pool:
            raise GrantRefusedError("the keeper's hello names another node; end the session and attach again")
        return Lease(
            id=lease,
            node=offer.node,
            device=str(hello["device"]),
            degradations=tuple(hello["degradations"]),
            terms=terms,
            not_after=not_after,
            link=link,
            idle_since=time.monotonic(),
        )

    def _connect(self, endpoint: Any) -> socket.socket:
        """Connect to where the relay says the actor listens, if zone.yaml allows that address and port."""
        try:
            host, port = ipaddress.ip_address(str(endpoint[0])), int(endpoint[1])
        except (TypeError, ValueError, LookupError):
            raise GrantRefusedError("the relay named no usable endpoint; see ray-gpu status") from None
        if not endpoint_allowed(self._zone.endpoints, str(host), port):
            raise GrantRefusedError(f"the relay named {host} port {port}, which zone.yaml's endpoints do not allow")
        sock = socket.create_connection((str(host), port), timeout=HELLO_TIMEOUT_S)
        # A node that vanishes, or takes nothing more, must not hold a call for ever.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_LIMIT_S * 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", STALL_LIMIT_S, 0))
        return sock

    def _hello(self, link: SealedSocket) -> dict[str, Any]:
        link.settimeout(HELLO_TIMEOUT_S)
        link.send(link.slot(Kind.HELLO, call=0), b"")
        header, payload = link.receive()
        if header.kind is not Kind.HELLO:
            raise EnvelopeError
        link.settimeout(None)
        hello = msgpack.unpackb(payload)
        if not isinstance(hello, dict):
            raise EnvelopeError
        return hello

    def close(self, lease: Lease) -> dict[str, Any] | None:
        """End a lease and return the custodian's verified receipt, or ``None`` when the lease was lost."""
        receipt = None
        if not lease.lost:
            with contextlib.suppress(OSError, ZoneError, ValueError, KeyError, TypeError):
                receipt = self._receipt(lease)
        lease.lost = lease.lost or "closed"
        lease.link.shutdown()
        lease.link.close()
        self._abandon(lease.id, lease.node)
        return receipt

    def _receipt(self, lease: Lease) -> dict[str, Any]:
        lease.link.settimeout(HELLO_TIMEOUT_S)
        lease.control({"close": True})
        while True:
            header, payload = lease.link.receive()
            if header.kind is Kind.CONTROL:
                break
        signed = msgpack.unpackb(payload)
        receipt = dict(signed["receipt"])
        verify_node_signature(
            str(signed["certificate"]),
            self._node_ca,
            node=lease.node,
            message=canonical(receipt),
            signature_hex=str(signed["signature"]),
            now=int(time.time()),
        )
        if receipt["lease"] != lease.id or receipt["node"] != lease.node:
            raise EnvelopeError
        return {"receipt": receipt, "signature": str(signed["signature"]), "certificate": str(signed["certificate"])}

    def _abandon(self, lease: str, node: str) -> None:
        """Take back whatever exists of a lease: the actor and the key."""
        with contextlib.suppress(ZoneError, OSError):
            self._relay.request({"op": "release", "lease": lease}, timeout_s=10)
        if node:
            self._keys.shred(node, lease)


def _parse_offer(document: Any) -> Offer:
    try:
        fields = dict(document)
        fields["degradations"] = tuple(str(item) for item in fields["degradations"])
        offer = Offer(**fields)
        check_id(offer.node, what="node")
        return offer
    except (TypeError, ValueError, KeyError):
        raise GrantRefusedError("the node's offer is malformed; gateway and node must be of the same version") from None


def _check_level(node: str, degradations: tuple[str, ...], terms: LeaseTerms) -> None:
    missing = sorted(set(degradations) - set(terms.accepted_degradations))
    if missing:
        raise SandboxLevelError(
            f"node {node} is degraded ({', '.join(missing)}) and the zone's policy does not accept "
            "that; nothing left the zone. Mend the node, or have the security officer add it to "
            "accepted_degradations in zone.yaml",
            node=node,
            reasons=missing,
        )
