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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

import msgpack

from ray_gpu.frames import PlainBuffer, SealedSocket
from ray_gpu.lease_keys import LeaseKeys
from ray_gpu.relay_link import RelayLink
from ray_gpu.rooms import Rooms
from zones.config import endpoint_allowed
from zones.envelope import HEADER_BYTES, LeaseKey, padded_size, sealed_size
from zones.environments import DIGEST, Environment, minor
from zones.errors import (
    ClusterError,
    EnvelopeError,
    EnvironmentRefusedError,
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
    Padding,
    Zone,
    canonical,
    check_id,
    controls_held,
    digest,
    sandbox_level,
)
from zones.vault import lease_name

#: The keeper's hello must be there by then, seconds.
HELLO_TIMEOUT_S = 10.0
#: A keeper that hangs up before its hello is asked again for so long, and after this pause, seconds.
HELLO_AGAIN_S, HELLO_PAUSE_S = 3.0, 0.1
#: An idle lease gets a sealed heartbeat this often, seconds; the keeper gives up after 9.
HEARTBEAT_S = 3.0
#: So long one waits for room while nodes are passed over, before looking again at which, seconds.
LOOK_AGAIN_S = 2.0
#: How long a relay may be told to wait for room, seconds.
PLACEMENT_TIMES_S = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0, 300.0, 3600.0)
#: Answers that nobody waits for any more, and that may still come before a receipt.
MAX_LEFT_OVER = 8
#: What a custodian states of a lease at least, and of which type.
RECEIPT_FIELDS = {
    **dict.fromkeys(("lease", "grant", "node", "device", "environment", "exit"), str),
    **dict.fromkeys(("started", "ended", "calls", "shards", "received_bytes", "sent_bytes"), int),
    "degradations": list,
    "controls": list,
}
#: A connection that takes no bytes, or acknowledges none, for so long is lost, seconds.
STALL_LIMIT_S = 20
#: The fields of an offer that are no text.
_LISTS = ("degradations", "environments")
#: What a keeper says of itself, and a custodian's receipt, have no more bytes.
MAX_DOCUMENT_BYTES = 64 << 10
#: Memory limit of keeper and sandbox together, bytes.
DEFAULT_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """What a session asks for. Leases with equal terms are interchangeable."""

    pool: str
    gpu_milli: int
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    accepted_degradations: tuple[str, ...]
    padding: Padding = Padding.FINE
    #: Whether its functions are approved: what another function left behind in a sandbox shall not touch one that is.
    reviewed: bool = False
    #: See :class:`zones.model.Obligations`.
    gpu_kinds: tuple[str, ...] | None = None
    environments: frozenset[str] | None = None
    #: Digest of the environment that the function asks for; ``""``: whichever fits.
    environment: str = ""
    max_lease_s: int
    #: By then it must end in any case, UTC seconds since the epoch.
    ends: int | None = None
    #: Minor version of the Python whose functions it runs; ``""``: unknown.
    python: str = ""

    def choice(self, environments: Sequence[str]) -> str:
        """Return which of a node's environments to take; ``""`` where none will do."""
        fits = (one for one in environments if self.environments is None or one in self.environments)
        return next((one for one in fits if self.environment in ("", one)), "")

    def unfit(self, device: str, environments: Sequence[str], python: str = "") -> str:
        """Return why a node cannot have the lease; ``""`` when it can.

        Args:
            device: What it computes with.
            environments: Digests of what it can import.
            python: Its version of Python, once that is known.
        """
        if python and self.python and minor(python) != self.python:
            return (
                f"its Python is {python} and this notebook's {self.python}, whose functions it cannot run; use "
                f"Python {minor(python)} here, or have its operator give it {self.python}"
            )
        if self.gpu_kinds is not None and not any(fnmatchcase(device, kind) for kind in self.gpu_kinds):
            return f"its device is {device}, and policy asks for {' or '.join(self.gpu_kinds)}"
        if self.choice(environments):
            return ""
        if self.environment in ("", *environments):
            return f"its environment {', '.join(one[:12] for one in environments)} is none that policy names"
        return (
            f"it does not have the environment {self.environment[:12]}; its operator publishes it there with "
            "`ray-gpu env build`"
        )


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
    plain: PlainBuffer
    grant: Grant
    #: The connection, as the kernel names it: our address and port, and the node's.
    connection: tuple[str, str]
    #: What its functions can import, as its keeper says; its digest is the grant's.
    contents: Environment
    idle_since: float = 0.0
    lost: str = ""
    #: Whether its node or its sandbox sent what none of ours sends; :attr:`lost` says what.
    lied: bool = False
    _control_lock: threading.Lock = field(default_factory=threading.Lock)
    _calls: int = 0
    _controls: int = 0

    @property
    def level(self) -> str:
        """``"strict"``, or ``"degraded: ..."`` with the missing controls of the sandbox."""
        return sandbox_level(self.degradations)

    def wire_bytes(self, payload_bytes: int) -> int:
        """Return how many bytes a payload takes on the connection, padding and header included."""
        return HEADER_BYTES + sealed_size(padded_size(payload_bytes, self.terms.padding))

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

    @property
    def controls(self) -> int:
        """Control messages sent so far."""
        return self._controls

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
        #: As the policy in force describes it.
        self.zone = zone
        self._keys = keys
        self._relay = relay
        self._node_ca = node_ca
        self._degradations = degradations
        #: What nodes said of environments, by node and digest.
        self.contents: dict[tuple[str, str], Environment] = {}
        #: What the relay says of the nodes' room.
        self.rooms = Rooms(relay)

    def open(
        self,
        terms: LeaseTerms,
        decision: Decision,
        *,
        timeout_s: float,
        patient: Callable[[], bool] = lambda: True,
        distrusted: Mapping[str, str] = MappingProxyType({}),
    ) -> Lease:
        """Place an actor, grant it a lease, and return the lease once its hello satisfied *decision*.

        Nothing has left while a lease is opened, so a node that fails meanwhile is passed over for another.

        Args:
            timeout_s: Longest wait for room.
            patient: Whether to wait for room on the others when a node failed. Asked every few seconds.
            distrusted: Nodes to pass over as well while there are others, and why.

        Raises:
            PlacementError: No GPU node with room within *timeout_s*.
            SandboxLevelError: The node cannot give the level that policy asks for.
            GrantRefusedError: Node or custodian refused, or the node's signature did not verify.
            LeaseLostError, ClusterError: Node after node went away meanwhile.
        """
        if terms.ends is not None and terms.ends <= time.time():
            raise PlacementError(
                "this session, or the zone's working hours, just ended; attach again", pool=terms.pool, reason="over"
            )
        deadline = time.monotonic() + timeout_s
        unfit: dict[str, str] = {}
        while True:
            avoid = self.rooms.passed_over(terms.pool, {**distrusted, **unfit})
            if unfit and not unfit.keys() <= avoid.keys():
                raise PlacementError(
                    f"no node of pool {terms.pool} has what this call needs: {'; '.join(unfit.values())}; "
                    "ask the pool's operator for such a node, or the security officer to change zone.yaml",
                    pool=terms.pool,
                    reason="unfit",
                )
            try:
                left_s = max(0.0, deadline - time.monotonic())
                # Nodes that are passed over may work again, and this call may be served otherwise meanwhile.
                return self._open(terms, decision, min(left_s, LOOK_AGAIN_S) if avoid else left_s, avoid=sorted(avoid))
            except _UnfitError as error:
                unfit[error.node] = f"{error.node}: {error}"
            except EnvironmentRefusedError as error:
                unfit[error.node] = error.message
            except (ClusterError, LeaseLostError) as error:
                if not error.node or time.monotonic() > deadline:
                    raise
                self.rooms.failed(str(error.node), error.message)
                if patient() and self.rooms.passed_over(terms.pool, distrusted):
                    continue
                if patient() or not self.rooms.has_room(terms.pool, terms.gpu_milli, distrusted=distrusted):
                    raise
            except PlacementError as error:
                if not avoid:
                    raise
                if time.monotonic() < deadline and patient():
                    continue
                raise PlacementError(
                    f"{error.message}. Passed over: {'; '.join(avoid.values())}", pool=error.pool, reason=error.reason
                ) from None

    def _open(self, terms: LeaseTerms, decision: Decision, timeout_s: float, avoid: list[str]) -> Lease:
        not_after = int(time.time()) + terms.max_lease_s
        not_after = not_after if terms.ends is None else min(not_after, terms.ends)
        lease = lease_name(secrets.token_bytes(8), not_after)
        node = ""
        try:
            offer = self._place(lease, terms, timeout_s, avoid)
            node = offer.node
            return self._grant(lease, offer, terms, decision, not_after)
        except (OSError, EnvelopeError) as error:
            self._abandon(lease, node)
            what = "went away" if isinstance(error, OSError) else "sent what is no hello"
            raise LeaseLostError(
                f"node {node or 'unknown'} {what} while lease {lease} was opened; run the call again",
                node=node,
                reason=type(error).__name__,
            ) from None
        except BaseException:
            self._abandon(lease, node)
            raise

    def _place(self, lease: str, terms: LeaseTerms, timeout_s: float, avoid: list[str]) -> Offer:
        timeout_s = _coarse(timeout_s)
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
        offer = self._believed_offer(lease, answer)
        if offer.pool != terms.pool:
            raise GrantRefusedError(f"node {offer.node} is of pool {offer.pool}, not {terms.pool}; see cluster labels")
        _check_level(offer.node, (*self._degradations, *offer.degradations), terms)
        _check_fit(offer.node, offer.device, offer.environments, terms)
        return offer

    def _believed_offer(self, lease: str, answer: dict[str, Any]) -> Offer:
        """Return the offer in the relay's answer.

        Raises:
            LeaseLostError: It is malformed, or not signed by the node that it names. Others may do better.
        """
        try:
            offer = _parse_offer(answer.get("offer"))
            verify_node_signature(
                str(answer.get("certificate")),
                self._node_ca,
                node=offer.node,
                message=canonical({"lease": lease, **offer.document()}),
                signature_hex=str(answer.get("signature")),
                now=int(time.time()),
            )
        except GrantRefusedError as error:
            node = str(answer.get("node"))[:40]
            raise LeaseLostError(
                f"node {node} made an offer for lease {lease} that is not to be believed: {error.message}",
                node=node,
                reason="offer",
            ) from None
        return offer

    def _grant(self, lease: str, offer: Offer, terms: LeaseTerms, decision: Decision, not_after: int) -> Lease:
        exchange = ExchangeKey()
        grant = Grant(
            zone=self.zone.name,
            lease=lease,
            node=offer.node,
            pool=offer.pool,
            offer_digest=digest(offer.document()),
            exchange_key=exchange.public_hex,
            accepted_degradations=terms.accepted_degradations,
            padding=terms.padding,
            environment=terms.choice(offer.environments),
            gpu_milli=terms.gpu_milli,
            memory_bytes=terms.memory_bytes,
            policy_digest=decision.policy_digest,
            not_after=not_after,
        )
        try:
            shared = exchange.shared(offer.exchange_key)
        except GrantRefusedError:
            raise EnvelopeError from None
        data_key, wrapped = self._keys.make(offer.node, lease, grant.digest())
        key = derive_lease_key(data_key, shared, grant.digest())
        answer = self._relay.request({"op": "grant", "lease": lease, "grant": grant.document(), "wrapped": wrapped})
        link, device, degradations, contents = self._introduce(answer.get("endpoint"), key, grant)
        self.contents = {**self.contents, (offer.node, grant.environment): contents}
        connection = link.names()
        _check_level(offer.node, degradations, terms)
        _check_fit(offer.node, device, offer.environments, terms, contents.python)
        return Lease(
            id=lease,
            node=offer.node,
            device=device,
            degradations=degradations,
            terms=terms,
            not_after=not_after,
            link=link,
            plain=PlainBuffer(terms.padding),
            grant=grant,
            contents=contents,
            connection=connection,
            idle_since=time.monotonic(),
        )

    def _introduce(
        self, endpoint: Any, key: LeaseKey, grant: Grant
    ) -> tuple[SealedSocket, str, tuple[str, ...], Environment]:
        """Connect to the keeper and prove that we hold the key; return the link and what the keeper says of itself.

        Strangers who crowd the endpoint may push a connection out before it has said its word: then we try again.
        """
        deadline = time.monotonic() + HELLO_AGAIN_S
        while True:
            sock = self._connect(endpoint)
            link = SealedSocket(
                sock,
                key=key,
                grant_digest=grant.digest(),
                lease=grant.lease,
                outgoing=Direction.OUT,
                padding=grant.padding,
            )
            try:
                return link, *self._hello(link, grant)
            except ConnectionError:
                link.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(HELLO_PAUSE_S)
            except BaseException:
                link.close()
                raise

    def _connect(self, endpoint: Any) -> socket.socket:
        """Connect to where the relay says the actor listens, if zone.yaml allows that address and port."""
        try:
            host, port = ipaddress.ip_address(str(endpoint[0])), int(endpoint[1])
        except (TypeError, ArithmeticError, ValueError, LookupError):
            raise GrantRefusedError("the relay named no usable endpoint; see ray-gpu status") from None
        if not endpoint_allowed(self.zone.endpoints, str(host), port):
            raise GrantRefusedError(f"the relay named {host} port {port}, which zone.yaml's endpoints do not allow")
        sock = socket.create_connection((str(host), port), timeout=HELLO_TIMEOUT_S)
        # A node that vanishes, or takes nothing more, must not hold a call for ever.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_LIMIT_S * 1000)
        return sock

    def _hello(self, link: SealedSocket, grant: Grant) -> tuple[str, tuple[str, ...], Environment]:
        """Return what the keeper says of itself: its device, the ids of the controls that it lacks, and its contents.

        Raises:
            EnvelopeError: It is no hello of the granted node.
        """
        link.settimeout(HELLO_TIMEOUT_S)
        link.send(link.slot(Kind.HELLO, call=0), b"")
        header, payload = link.receive(most_bytes=MAX_DOCUMENT_BYTES)
        if header.kind is not Kind.HELLO:
            raise EnvelopeError
        link.settimeout(None)
        hello = _document(payload)
        degradations = hello.get("degradations")
        said = tuple(hello.get(name) for name in ("node", "pool", "environment"))
        if not isinstance(degradations, list) or said != (grant.node, grant.pool, grant.environment):
            raise EnvelopeError
        try:
            contents = Environment.parse(hello.get("contents"))
        except ValueError:
            raise EnvelopeError from None
        # The digest is of the granted terms: what it was granted for cannot be described as something else.
        if contents.digest != grant.environment:
            raise EnvelopeError
        return str(hello.get("device"))[:80], tuple(str(name)[:40] for name in degradations), contents

    def close(self, lease: Lease) -> dict[str, Any] | None:
        """End a lease and return the custodian's verified receipt, or ``None`` when the lease was lost."""
        receipt = None
        if not lease.lost:
            with contextlib.suppress(OSError, ZoneError):
                receipt = self._receipt(lease)
        lease.lost = lease.lost or "closed"
        lease.link.shutdown()
        lease.link.close()
        self._abandon(lease.id, lease.node)
        return receipt

    def _receipt(self, lease: Lease) -> dict[str, Any]:
        lease.link.settimeout(HELLO_TIMEOUT_S)
        lease.control({"close": True})
        for _ in range(MAX_LEFT_OVER):
            header, payload = lease.link.receive()
            if header.kind is Kind.CONTROL:
                break
        if header.kind is not Kind.CONTROL or len(payload) > MAX_DOCUMENT_BYTES:
            raise EnvelopeError
        signed = _document(payload)
        receipt = _checked_receipt(signed.get("receipt"))
        verify_node_signature(
            str(signed.get("certificate")),
            self._node_ca,
            node=lease.node,
            message=canonical(receipt),
            signature_hex=str(signed.get("signature")),
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


def _coarse(timeout_s: float) -> float:
    """Return the next longer of a few times, seconds: the digits of a time that a notebook chose could carry data."""
    return next((time_s for time_s in PLACEMENT_TIMES_S if time_s >= timeout_s), PLACEMENT_TIMES_S[-1])


def _document(payload: memoryview) -> dict[str, Any]:
    """Return the map that a keeper sent.

    Raises:
        EnvelopeError: It is none.
    """
    try:
        document = msgpack.unpackb(payload, ext_hook=_no_extension)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise EnvelopeError
    return document


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError("extension types are refused")


def _checked_receipt(document: Any) -> dict[str, Any]:
    """Return a receipt, which holds plain values alone: it goes into the ledger as it is.

    Raises:
        EnvelopeError: It is none.
    """
    if not isinstance(document, dict) or not all(map(_is_plain, document.values())):
        raise EnvelopeError
    if any(type(document.get(name)) is not kind for name, kind in RECEIPT_FIELDS.items()):
        raise EnvelopeError
    if document["controls"] != controls_held(document["degradations"]):
        raise EnvelopeError
    return document


def _is_plain(value: Any) -> bool:
    return type(value) in (str, int) or (type(value) is list and all(type(item) is str for item in value))


def _parse_offer(document: Any) -> Offer:
    try:
        fields = dict(document)
        fields["degradations"] = tuple(str(item)[:40] for item in fields["degradations"])
        fields["environments"] = tuple(map(str, fields["environments"]))
        if not all(DIGEST.fullmatch(digest) for digest in fields["environments"]):
            raise ValueError("environments are digests")
        if any(type(value) is not str for name, value in fields.items() if name not in _LISTS):
            raise TypeError("an offer's fields are text")
        offer = Offer(**fields)
        check_id(offer.node, what="node")
        return offer
    except (TypeError, ValueError, KeyError):
        raise GrantRefusedError("the node's offer is malformed; gateway and node must be of the same version") from None


class _UnfitError(Exception):
    """A node cannot have a lease, for what it is and not for what it lacks: another may."""

    def __init__(self, node: str, why: str) -> None:
        super().__init__(why)
        self.node = node


def _check_fit(node: str, device: str, environments: Sequence[str], terms: LeaseTerms, python: str = "") -> None:
    if why := terms.unfit(device, environments, python):
        raise _UnfitError(node, why)


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
