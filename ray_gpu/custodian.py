"""The custodian of one GPU node: its identity, its offers and grants, its leases. This module does I/O.

Trusted by the zone as far as its promise goes: it opens each lease's key once, for exactly the granted
terms, starts keeper and sandbox, listens for the lease's data, ends all of it, and signs what happened.
It trusts nothing that an actor says: an actor can ask for offers, hand over grants, and die.

Rules:

1. An offer is signed, made for one lease, and used at most once.
2. A grant is refused when its offer is unknown, used or from another boot; when it names another node
   or pool; when this node is weaker than the grant accepts; when the pool's policy forbids its terms;
   when its GPU share is not free; or when Vault does not open its key for exactly these terms.
3. A lease ends, keeper and sandbox killed, when any of actor, keeper or sandbox is gone or its time is over.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_gpu import environment
from ray_gpu.endpoint import Endpoint
from ray_gpu.environment_store import Store
from ray_gpu.handover import take_secret
from ray_gpu.sandbox import boundary, harden, memory
from ray_gpu.sandbox.scrub import Tenancy
from ray_gpu.wire import error_reply, recv_message, send_message, unix_listen
from zones.envelope import LeaseKey
from zones.errors import ConfigError, EnvironmentRefusedError, GrantRefusedError, SandboxLevelError, ZoneError
from zones.keys import ExchangeKey, NodeIdentity, derive_lease_key
from zones.model import Grant, Offer, Padding, canonical, check_id, controls_held, digest
from zones.policy import PoolPolicy
from zones.vault import Vault

#: A sandbox that has not come up by then is given up, seconds.
START_TIMEOUT_S = 30.0
#: How long a lease may wait for what is left of another one to end, seconds.
FREE_TIMEOUT_S = 15.0
#: Longest lease any custodian accepts, seconds.
MAX_LEASE_S = 24 * 3600
#: Offers without a grant that are kept; the oldest goes first.
MAX_OFFERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What a custodian is started with."""

    node: str
    pool: str
    #: Whole GPUs of this node, in thousandths.
    gpu_milli: int
    socket_path: Path
    #: First uid of this node's keepers and sandboxes, and how many are theirs; unused without root.
    uid_base: int
    uid_count: int
    #: Uid allowed to connect besides our own: the caged actors'.
    actor_uid: int
    #: The node's own address, and the ports there for data.
    address: str
    endpoint_ports: range
    #: Where its operator published environments (:mod:`ray_gpu.environment_store`).
    environments: Path
    #: Ids of the controls that this node lacks around its sandboxes.
    degradations: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Lease:
    """One lease that runs."""

    grant: Grant
    keeper: subprocess.Popen[bytes]
    sandbox: subprocess.Popen[bytes]
    control: socket.socket
    endpoint: Endpoint
    device: str = ""
    #: What was done against another zone's leftovers in GPU memory before it started.
    scrub: str
    #: Ids of the controls that it lacks, those included that keeper and sandbox found missing themselves.
    degradations: tuple[str, ...] = ()
    started: int = field(default_factory=lambda: int(time.time()))
    ended: threading.Event = field(default_factory=threading.Event)


class Custodian:
    """Serves the actors of one node."""

    def __init__(self, settings: NodeSettings, *, identity: NodeIdentity, vault: Vault, policy: PoolPolicy) -> None:
        self._settings = settings
        self._identity = identity
        self._vault = vault
        self._policy = policy
        self._boot = secrets.token_hex(16)
        self._own = environment.current()
        self._published = Store(settings.environments)
        self._tenancy = Tenancy(boundary.gpu_devices())
        stand_in = () if boundary.gpu_devices() else ("numpy-stand-in",)
        self._degradations = (*boundary.degradations(), *stand_in, *settings.degradations)
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._offers: dict[str, tuple[Offer, ExchangeKey]] = {}
        self._used: set[str] = set()
        self._leases: dict[str, Lease] = {}
        self._reserved_milli = 0
        self._started = itertools.count()

    def serve(self) -> None:
        """Accept actors, for ever; one thread each."""
        listener = unix_listen(str(self._settings.socket_path), mode=0o666)
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=self._serve_actor, args=(sock,), daemon=True).start()

    def _serve_actor(self, sock: socket.socket) -> None:
        """Answer one actor until it is gone; then end the lease that it stood for."""
        leases: set[str] = set()
        try:
            if boundary.peer_uid(sock) not in {0, os.geteuid(), self._settings.actor_uid}:
                return
            while True:
                request, _ = recv_message(sock, max_bytes=64 << 10)
                send_message(sock, self._answer(request, leases))
        except (OSError, ZoneError):
            return
        finally:
            sock.close()
            for lease in leases:
                self._end(lease)

    def _answer(self, request: dict[str, Any], leases: set[str]) -> dict[str, Any]:
        try:
            lease = check_id(str(request.get("lease")), what="lease")
            if request.get("op") == "offer":
                offered = self.offer(lease)
                leases.add(lease)
                return {"ok": True, **offered}
            # A lease ends with the actor that asked for its offer; no other may name it.
            if lease not in leases:
                raise GrantRefusedError("this actor has no offer for the lease; ask for a new lease")
            if request.get("op") == "grant":
                return {"ok": True, **self.grant(lease, request)}
            raise GrantRefusedError(f"custodian knows no request {request.get('op')!r}")
        except Exception as error:  # noqa: BLE001 - whatever an actor's words cause, it gets an answer
            return error_reply(error)

    def offer(self, lease: str) -> dict[str, Any]:
        """Return a signed offer for *lease*: document, signature and certificate.

        Raises:
            GrantRefusedError: The lease id was used before.
        """
        key = ExchangeKey()
        settings = self._settings
        offer = Offer(
            node=settings.node,
            pool=settings.pool,
            boot=self._boot,
            exchange_key=key.public_hex,
            degradations=self._degradations,
            device=boundary.device_hint(),
            environments=self._environments(),
        )
        with self._lock:
            if lease in self._used or lease in self._offers:
                raise GrantRefusedError("this lease id was used before; ask for a new lease")
            self._offers[lease] = (offer, key)
            while len(self._offers) > MAX_OFFERS:
                del self._offers[next(iter(self._offers))]
        signature = self._identity.sign(canonical({"lease": lease, **offer.document()}))
        return {"offer": offer.document(), "signature": signature, "certificate": self._identity.certificate_pem}

    def grant(self, lease: str, request: dict[str, Any]) -> dict[str, Any]:
        """Check a grant, open its key, start keeper and sandbox, and listen for the lease's data.

        Raises:
            GrantRefusedError: See the module's rules; or no data port is free.
            SandboxLevelError: This node is weaker than the grant accepts.
            VaultError: Vault did not open the key.
        """
        grant = _parse_grant(request.get("grant"))
        with self._lock:
            offer, exchange = self._take_offer(lease, grant)
            self._check_terms(grant)
            self._reserve(grant)
        try:
            data_key = self._vault.unwrap(grant.zone, grant.node, lease, grant.digest(), str(request.get("wrapped")))
            key = derive_lease_key(data_key, exchange.shared(grant.exchange_key), grant.digest())
            running = self._start(grant, key)
        except BaseException:
            self._release(grant)
            raise
        self._leases[lease] = running
        for process in (running.keeper, running.sandbox):
            threading.Thread(target=self._watch, args=(lease, process), daemon=True).start()
        threading.Thread(target=self._serve_keeper, args=(lease, running), daemon=True).start()
        running.endpoint.serve(lambda fd: send_message(running.control, {"op": "connection"}, [fd]))
        return {"device": running.device, "offer": offer.document(), "endpoint": running.endpoint.address}

    def _environments(self) -> tuple[str, ...]:
        return (self._own.digest, *self._published.digests())

    def _take_offer(self, lease: str, grant: Grant) -> tuple[Offer, ExchangeKey]:
        """Use up the offer of *lease*; whatever follows, it cannot be used again."""
        found = self._offers.pop(lease, None)
        if found is None or lease in self._used:
            raise GrantRefusedError("this lease has no open offer on this node; ask for a new lease")
        self._used.add(lease)
        if grant.lease != lease or grant.offer_digest != digest(found[0].document()):
            raise GrantRefusedError("the grant does not answer this node's offer; ask for a new lease")
        return found

    def _check_terms(self, grant: Grant) -> None:
        settings, now = self._settings, int(time.time())
        if grant.node != settings.node or grant.pool != settings.pool:
            raise GrantRefusedError("the grant names another node or pool; ask for a new lease")
        if grant.environment not in self._environments():
            raise GrantRefusedError("the grant names an environment that this node does not have; ask for a new lease")
        if not now < grant.not_after <= now + MAX_LEASE_S:
            raise GrantRefusedError("the grant's time is over or too long; check both hosts' clocks")
        missing = set(self._degradations) - set(grant.accepted_degradations)
        if missing:
            raise SandboxLevelError(
                f"node {settings.node} is degraded: {', '.join(sorted(missing))}; "
                "mend the node (`ray-gpu status` there says how) or let the zone's policy accept it",
                node=settings.node,
                reasons=sorted(missing),
            )
        refusal = self._policy.refusal(grant)
        if refusal:
            raise GrantRefusedError(f"pool {settings.pool} refuses the grant: {refusal}; ask the pool's operator")

    def _reserve(self, grant: Grant) -> None:
        """Take a share of the node's GPUs. Ray may place a lease while what is left of the last one is still ending."""
        room = self._settings.gpu_milli - grant.gpu_milli
        if not self._freed.wait_for(lambda: self._reserved_milli <= room, FREE_TIMEOUT_S):
            raise GrantRefusedError(
                f"node {self._settings.node} has no free GPU share of {grant.gpu_milli / 1000}; ask for a new lease"
            )
        self._reserved_milli += grant.gpu_milli

    def _start(self, grant: Grant, key: LeaseKey) -> Lease:
        """Start keeper and sandbox; return when both are ready."""
        with contextlib.ExitStack() as undo:
            endpoint = Endpoint(self._settings.address, self._settings.endpoint_ports)
            undo.callback(endpoint.close)
            uid = self._settings.uid_base + 2 * (next(self._started) % (self._settings.uid_count // 2))
            scrubbed = self._tenancy.enter(grant.zone, uid)
            undo.callback(self._tenancy.leave, grant.zone)
            lease = self._launch(grant, uid, endpoint, scrubbed)
            try:
                lease.device = self._introduce(lease, key)
            except (OSError, ZoneError) as error:
                _kill(lease)
                raise GrantRefusedError(
                    f"node {self._settings.node} could not start a sandbox ({type(error).__name__}); "
                    "see the custodian's log"
                ) from None
            undo.pop_all()
        return lease

    def _launch(self, grant: Grant, uid: int, endpoint: Endpoint, scrubbed: str) -> Lease:
        site = self._site(grant.environment)
        control, keeper_control = socket.socketpair()
        keeper_side, sandbox_side = socket.socketpair()
        slots = memory.create()
        sandbox = boundary.launch_sandbox(
            uid=uid,
            memory_bytes=grant.memory_bytes,
            name=grant.lease,
            fds=(sandbox_side.fileno(), slots),
            site=site,
        )
        keeper = boundary.launch_keeper(
            uid=uid + 1,
            control_fd=keeper_control.fileno(),
            name=grant.lease,
            sandbox_fd=keeper_side.fileno(),
            memory_fd=slots,
        )
        for sock in (keeper_control, keeper_side, sandbox_side):
            sock.close()
        os.close(slots)
        return Lease(grant=grant, keeper=keeper, sandbox=sandbox, control=control, endpoint=endpoint, scrub=scrubbed)

    def _site(self, digest: str) -> Path | None:
        """Return where a published environment's packages are, compared with what was built; ``None`` for the own.

        Raises:
            GrantRefusedError: They were changed, or are gone.
        """
        try:
            return None if digest == self._own.digest else self._published.site(digest)
        except ConfigError as error:
            sys.stderr.write(f"environment {digest} is not served: {error.message}\n")
            sys.stderr.flush()
            raise EnvironmentRefusedError(
                f"node {self._settings.node} does not serve the environment {digest[:12]}: it is not as it was built; "
                "ask the pool's operator (`ray-gpu env list` there says why)",
                node=self._settings.node,
            ) from None

    def _introduce(self, lease: Lease, key: LeaseKey) -> str:
        """Give the keeper its key and wait until it and the sandbox are ready; return the device's name."""
        grant = lease.grant
        own = grant.environment == self._own.digest
        contents = self._own if own else self._published.environment(grant.environment)
        lease.control.settimeout(START_TIMEOUT_S)
        send_message(
            lease.control,
            {
                "key": key.bytes,
                "lease": grant.lease,
                "grant_digest": grant.digest(),
                "memory_bytes": grant.memory_bytes,
                "node": grant.node,
                "pool": grant.pool,
                "degradations": list(self._degradations),
                "environment": grant.environment,
                "padding": grant.padding.value,
                "not_after": grant.not_after,
                "contents": contents.document(),
            },
        )
        ready, _ = recv_message(lease.control)
        lease.control.settimeout(None)
        lease.degradations = tuple(str(name) for name in ready["degradations"])
        return str(ready["device"])

    def _serve_keeper(self, lease: str, running: Lease) -> None:
        """Sign a receipt when the keeper reports the lease's statistics."""
        with contextlib.suppress(OSError, ZoneError):
            while True:
                message, _ = recv_message(running.control, max_bytes=4096)
                send_message(running.control, {"op": "receipt", **self._receipt(running, message)})
        self._end(lease)

    def _receipt(self, running: Lease, statistics: dict[str, Any]) -> dict[str, Any]:
        counted = {name: int(statistics[name]) for name in ("calls", "shards", "received_bytes", "sent_bytes")}
        document = {
            "lease": running.grant.lease,
            "grant": running.grant.digest(),
            "node": self._settings.node,
            "device": running.device,
            "environment": running.grant.environment,
            "scrub": running.scrub,
            "degradations": list(running.degradations),
            "controls": controls_held(running.degradations),
            "exit": "closed by the zone",
            "started": running.started,
            "ended": int(time.time()),
            **counted,
        }
        return {
            "receipt": document,
            "signature": self._identity.sign(canonical(document)),
            "certificate": self._identity.certificate_pem,
        }

    def _watch(self, lease: str, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._end(lease)

    def _end(self, lease: str) -> None:
        """Kill what is left of a lease, once."""
        with self._lock:
            self._offers.pop(lease, None)
            running = self._leases.pop(lease, None)
        if running is None:
            return
        _kill(running)
        self._tenancy.leave(running.grant.zone)
        self._release(running.grant)
        running.ended.set()

    def _release(self, grant: Grant) -> None:
        with self._freed:
            self._reserved_milli -= grant.gpu_milli
            self._freed.notify_all()

    def close(self) -> None:
        """End every lease."""
        for lease in list(self._leases):
            self._end(lease)


def _kill(lease: Lease) -> None:
    lease.endpoint.close()
    lease.control.close()
    for process in (lease.sandbox, lease.keeper):
        boundary.kill(process)


def _parse_grant(document: Any) -> Grant:
    """Build a grant from an actor's words.

    Raises:
        GrantRefusedError: Fields are missing, superfluous or of another type.
    """
    try:
        fields = dict(document)
        fields["accepted_degradations"] = tuple(str(item) for item in fields["accepted_degradations"])
        fields["padding"] = Padding(fields["padding"])
        grant = Grant(**fields)
        for name in ("zone", "lease", "node", "pool"):
            check_id(getattr(grant, name), what=name)
        if not (type(grant.gpu_milli) is type(grant.memory_bytes) is type(grant.not_after) is int):
            raise TypeError("numbers must be integers")
        if grant.gpu_milli <= 0 or grant.memory_bytes <= 0:
            raise ValueError("shares must be positive")
        return grant
    except (TypeError, ValueError, KeyError, AttributeError):
        raise GrantRefusedError("the grant is malformed; gateway and custodian must be of the same version") from None


def main(argv: list[str]) -> None:
    """Run a custodian. ``argv``: path of its JSON settings file. Its secret id comes by standard input."""
    import json  # noqa: PLC0415 - only the entry point reads files

    harden.keep_memory()
    document = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    try:
        vault = Vault(document["vault"], ca_file=document.get("vault_ca"))
        vault.login_approle(document["role_id"], take_secret())
        vault.check_clock()
        identity = NodeIdentity.enrol(document["node"], vault)
        policy = PoolPolicy.load(Path(document["policies"]), document["pool"])
    except ZoneError as error:
        sys.exit(f"the custodian of {document['node']} did not start: {type(error).__name__}: {error.message}")
    lowest, highest = map(int, document["endpoint_ports"].split("-"))
    settings = NodeSettings(
        node=document["node"],
        pool=document["pool"],
        gpu_milli=document["gpu_milli"],
        socket_path=Path(document["socket"]),
        uid_base=document["uid_base"],
        uid_count=document["uid_count"],
        actor_uid=document["actor_uid"],
        address=document["address"],
        endpoint_ports=range(lowest, highest + 1),
        environments=Path(document["environments"]),
        degradations=tuple(document.get("degradations", ())),
    )
    custodian = Custodian(settings, identity=identity, vault=vault, policy=policy)

    def stop(*_: object) -> None:
        custodian.close()
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    custodian.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
