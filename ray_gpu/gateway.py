"""The zone's one way out: a process that scientists do not control. This module does I/O.

It alone holds the zone's Vault identity, policy, ledger, shuffle order and data connections. People
connect by Unix socket, prove who they are with a Vault token that is checked with Vault, and hand work
over as bytes and sealed memory files; it unpickles nothing and never speaks Ray. One thread per
connection; a session may have many connections.

================  ===============================================================================
request           reply
================  ===============================================================================
ready             -> whether a relay is there, so that GPU nodes can be reached; asks for no session
attach            token, purpose -> session, secret, and what a session card shows
join              session, secret -> ok: a further connection of the same session
catalog           -> data sets with columns and classes
read              handle -> rows, columns, and a memory file with the rows, inside the zone
call              request (see ``ray_gpu.request``) -> events, then the result
weigh             the same on a handle -> rows, bytes, whether they can be read, and the first of them, inside the zone;
                  what policy refuses of the call is refused, and nothing leaves
save              name, a memory file -> ok: the value in it is kept, sealed, for this person
load              name -> a memory file with what was kept
saved             -> names, times and sizes of what this person keeps
forget            name -> ok
broadcast         a memory file -> digest, bytes: calls may name the value in it by its digest
hold              instance -> ok: it lives as long as this connection, or until it is released
release           instance -> ok, when its sandboxes are gone
status            -> session, leases, receipts, nodes
close             -> ok, when every lease has ended and every key is shredded
================  ===============================================================================
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hmac
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_gpu import job, source, staging
from ray_gpu.checkpoints import Checkpoints
from ray_gpu.handover import take_secret
from ray_gpu.in_force import InForce
from ray_gpu.lease_keys import LeaseKeys
from ray_gpu.leases import HEARTBEAT_S, LeaseOpener
from ray_gpu.relay_link import RelayLink
from ray_gpu.request import Mode, Request, parse
from ray_gpu.sandbox import boundary, harden
from ray_gpu.session import Session, ZoneServices
from ray_gpu.share import INLINE_BYTES, open_sealed, share_encoded, share_table, share_value
from ray_gpu.shares import Shares
from ray_gpu.watchdog import Watchdog
from ray_gpu.wire import Inbox, MalformedMessageError, close_fds, error_reply, send_message, unix_listen
from zones import replaying
from zones.errors import GatewayError, ResultTooLargeError, SessionClosedError, VaultDeniedError, ZoneError
from zones.ledger import Ledger
from zones.policy import Policy
from zones.segments import names
from zones.signing import Signer
from zones.vault import Vault

#: Connections that one session may have at once.
MAX_CONNECTIONS = 64
#: The relay starts beside a raylet, which takes several seconds more on a busy machine.
RELAY_TIMEOUT_S = 60.0
#: Most rows that a call which is weighed shows of its data.
MOST_SHOWN_ROWS = 1 << 16
#: How often keys are looked for that outlived their lease, seconds.
SWEEP_INTERVAL_S = 5.0
#: How often it is looked whether the policy's files changed, seconds.
POLICY_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a gateway is started with. Paths are the gateway's own."""

    zone: str
    policies: Path
    data_dir: Path
    #: Of this process.
    memory_bytes: int
    #: How the zone reaches Ray: ``edge`` or ``client``.
    carrier: str
    ledger: Path
    socket_path: Path
    relay_socket: Path
    #: Uid that the relay connects with.
    relay_uid: int
    vault: str
    vault_ca: str | None
    role_id: str
    secret_id: str = field(repr=False)
    #: Degradations of the zone's own side that whoever starts the gateway knows of.
    degradations: tuple[str, ...]

    @classmethod
    def read(cls, path: Path, secret_id: str) -> Settings:
        """Read settings from a JSON file, which has everything but the secret id."""
        document = json.loads(path.read_text(encoding="utf-8"))
        for name in ("policies", "data_dir", "ledger", "socket_path", "relay_socket"):
            document[name] = Path(document[name])
        return cls(**{**document, "degradations": tuple(document["degradations"])}, secret_id=secret_id)


class Gateway:
    """One zone's gateway."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        in_force = InForce(settings.policies, settings.zone)
        zone = in_force.policy.zone
        self._vault = Vault(settings.vault, ca_file=settings.vault_ca)
        self._vault.login_approle(settings.role_id, settings.secret_id)
        self._vault.check_clock()
        self._check_login()
        self._relay = RelayLink(self._on_lost, self._on_draining)
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()
        self.watchdog = Watchdog()
        self._signer = Signer(self._vault, zone.name)
        ledger = Ledger.open(settings.ledger, zone=zone.name)
        for repair in ledger.repairs:
            print(f"the ledger was repaired: {json.dumps(repair)}", file=sys.stderr)  # noqa: T201 - its log
        ledger.append(replaying.entry(in_force.policy))
        # After the ledger, whose lock says that no other gateway uses these directories.
        self.checkpoints = Checkpoints(self._vault, zone.name, settings.ledger.parent / "checkpoints")
        self._keys = LeaseKeys(self._vault, zone.name, settings.ledger.parent / "lease-keys")
        self._services = ZoneServices(
            in_force=in_force,
            ledger=ledger,
            shares=Shares(ledger, settings.ledger, int(time.time())),
            opener=LeaseOpener(zone, self._keys, self._relay, self._vault.node_ca(), settings.degradations),
            data_dir=settings.data_dir,
            memory_bytes=settings.memory_bytes,
            degradations=settings.degradations,
            reclaim=self.reclaim,
            sign=self._sign,
            zone_hosts=self._zone_hosts,
        )
        self._keys.sweep(int(time.time()))
        # What the last gateway left without one, above all after a crash.
        self._signer.sign(ledger)

    def _check_login(self) -> None:
        """Ask for what Vault shows to this zone's gateway alone: a wrong login shall be known before anybody attaches.

        Raises:
            VaultDeniedError: The login is a node's, or another zone's.
        """
        zone = self._settings.zone
        try:
            self._vault.lease_keys(zone)
        except VaultDeniedError:
            raise VaultDeniedError(
                f"this login is not that of the gateway of zone {zone}; write one with `ray-gpu vault issue {zone}`"
            ) from None

    def serve(self) -> None:
        """Serve people and the relay until the process is told to end."""
        relay_listener = unix_listen(str(self._settings.relay_socket), mode=0o666)
        threading.Thread(target=self._accept_relay, args=(relay_listener,), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()
        threading.Thread(target=self._sweep, daemon=True).start()
        threading.Thread(target=self._follow_policy, daemon=True).start()
        threading.Thread(target=self.watchdog.run, daemon=True).start()
        # Whoever finds this socket finds GPU nodes behind it; without a relay people are told so.
        self._relay.wait(RELAY_TIMEOUT_S)
        listener = unix_listen(str(self._settings.socket_path), mode=0o666)
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=Connection(self, sock).serve, daemon=True).start()

    def _accept_relay(self, listener: socket.socket) -> None:
        while True:
            sock, _ = listener.accept()
            if boundary.peer_uid(sock) not in {os.geteuid(), self._settings.relay_uid}:
                sock.close()
                continue
            threading.Thread(target=self._relay.attach, args=(sock,), daemon=True).start()

    def _beat(self) -> None:
        while True:
            time.sleep(HEARTBEAT_S)
            for session in list(self._sessions.values()):
                try:
                    for pool in session.pools():
                        pool.heartbeat()
                except Exception:  # noqa: BLE001 - one session's trouble must not end the leases of all others
                    traceback.print_exc()

    def _sweep(self) -> None:
        while True:
            time.sleep(SWEEP_INTERVAL_S)
            self._keys.sweep(int(time.time()))

    def _follow_policy(self) -> None:
        while True:
            time.sleep(POLICY_INTERVAL_S)
            try:
                self._services.in_force.refresh(self._adopt)
            except Exception:  # noqa: BLE001 - a file system's trouble must not be the last look
                traceback.print_exc()

    def _adopt(self, policy: Policy) -> None:
        """Write a new version of the policy down, before anything is decided by it."""
        self._services.ledger.append(replaying.entry(policy))
        self._services.opener.zone = policy.zone

    def _on_lost(self, lease: str, reason: str) -> None:
        for session in list(self._sessions.values()):
            for pool in session.pools():
                pool.lose(lease, reason)

    def _on_draining(self, nodes: frozenset[str]) -> None:
        self._services.opener.rooms.draining = nodes
        for session in list(self._sessions.values()):
            for pool in session.pools():
                pool.drop_unusable()

    # -- sessions -------------------------------------------------------------------------------

    def attach(self, token: str, purpose: str, versions: dict[str, str]) -> Session:
        """Open a session for whoever *token* belongs to.

        Raises:
            VaultDeniedError: Vault does not know the token, or its owner is not of this zone.
        """
        person = self._vault.whoami(token, self._services.zone.name)
        session = Session(self._services, person, purpose[:500], versions)
        with self._lock:
            self._sessions[session.id] = session
        return session

    def reclaim(self, needy: Session) -> None:
        """Make every session but *needy* give back the leases that it does not use."""
        for session in list(self._sessions.values()):
            if session is not needy:
                session.leases.yield_idle()

    def join(self, identifier: str, secret: str) -> Session:
        """Return an open session for a further connection of it.

        Raises:
            SessionClosedError: No such session, or another secret.
        """
        session = self._sessions.get(identifier)
        if session is None or not hmac.compare_digest(session.secret.encode(), secret.encode()):
            raise SessionClosedError("the session has ended; attach again with ray_gpu.attach(...)")
        with self._lock:
            if session.connections >= MAX_CONNECTIONS:
                raise GatewayError(f"this session has {MAX_CONNECTIONS} connections already; wait for a call to finish")
            session.connections += 1
        return session

    def leave(self, session: Session, *, owner: bool) -> None:
        """Count a connection of a session off; with the one that attached, the session ends."""
        if owner:
            self.detach(session)
            return
        with self._lock:
            session.connections -= 1

    def detach(self, session: Session) -> None:
        """Close a session. Known until it is closed: the gateway's own end must wait for it."""
        session.close()
        with self._lock:
            self._sessions.pop(session.id, None)

    def _sign(self) -> None:
        """Sign the ledger as it is. Without Vault nothing leaves anyway, and the next signature covers this as well."""
        try:
            self._signer.sign(self._services.ledger)
        except ZoneError as error:
            print(f"the ledger's checkpoint was not signed: {error.message}", file=sys.stderr)  # noqa: T201 - its log

    def close(self) -> None:
        """Close every session and the ledger."""
        ending = [threading.Thread(target=self.detach, args=(session,)) for session in list(self._sessions.values())]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()
        self._services.ledger.close()

    def card(self, session: Session) -> dict[str, Any]:
        """Return what a session card shows."""
        zone = self._services.zone
        degradations = sorted({*self._services.degradations})
        return {
            **session.status(),
            "pools": list(zone.pools),
            "datasets": self.catalog(),
            "approved": sorted(zone.approved),
            "zone_degradations": degradations,
            "ledger_key": str(self._signer.key),
            "relay": self._relay.connected,
            "carrier": self._settings.carrier,
        }

    @property
    def ready(self) -> bool:
        """Whether a relay is connected now."""
        return self._relay.connected

    def catalog(self) -> dict[str, Any]:
        """Return the catalog: data set to description and column classes."""
        return {
            name: {
                "description": item.description,
                "columns": dict(item.columns),
                "segments": list(names(item.segments)) if item.segments else [],
            }
            for name, item in self._services.zone.datasets.items()
        }

    def nodes(self) -> list[dict[str, Any]]:
        """Return the cluster's nodes as the relay reports them; none while no relay is connected."""
        if not self._relay.connected:
            return []
        answer = self._relay.request({"op": "nodes"}, timeout_s=10)
        return list(answer.get("nodes") or [])

    def _zone_hosts(self) -> int:
        zone = self._services.zone.name
        labels = [node["labels"] for node in self.nodes() if node["alive"]]
        return sum(one.get("ray-gpu-zone") == zone for one in labels)

    @property
    def services(self) -> ZoneServices:
        """What all sessions share."""
        return self._services


class Connection:
    """One connection of a notebook."""

    def __init__(self, gateway: Gateway, sock: socket.socket) -> None:
        self._gateway = gateway
        self._sock = sock
        self._session: Session | None = None
        self._owner = False
        #: Instances that live as long as this connection.
        self._held: list[str] = []
        self._send_lock = threading.Lock()
        self._inbox = Inbox(sock, max_fds=1)

    def serve(self) -> None:
        """Answer requests until the notebook is gone; if it attached here, its session ends with it."""
        try:
            while True:
                message, fds = self._inbox.receive()
                self._answer(message, fds)
                if message.get("op") == "close":
                    return
        except (OSError, MalformedMessageError):
            return
        finally:
            if self._session:
                for instance in self._held:
                    self._session.end_instance(instance)
                self._gateway.leave(self._session, owner=self._owner)
            self._sock.close()

    def _answer(self, message: dict[str, Any], fds: list[int]) -> None:
        operation: Callable[[dict[str, Any], list[int]], None] | None = getattr(self, f"_on_{message.get('op')}", None)
        try:
            if operation is None:
                raise GatewayError(f"the gateway knows no request {str(message.get('op'))[:40]!r}; use one version")
            operation(message, fds)
        except ZoneError as error:
            self._send(error_reply(error))
        except (ValueError, TypeError, KeyError) as error:
            self._send(error_reply(GatewayError(f"the request is malformed: {error}")))
        except OSError as error:
            self._send(error_reply(GatewayError(f"the gateway could not do that: {error.strerror or error}")))
        except Exception as error:  # noqa: BLE001 - whatever a notebook's words cause, it gets an answer
            self._send(error_reply(error))
        finally:
            if fds:
                close_fds(fds)

    def _send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        with self._send_lock:
            try:
                send_message(self._sock, message, fds)
            except ValueError:
                too_large = GatewayError("the answer does not fit one message; return, print or raise less")
                with contextlib.suppress(OSError):
                    send_message(self._sock, error_reply(too_large))
            except OSError:
                return  # the notebook is gone, as serve() finds out

    def _need_no_session(self) -> None:
        if self._session is not None:
            raise GatewayError("this connection has a session already; open another connection for another one")

    def _need_session(self) -> Session:
        if self._session is None:
            raise SessionClosedError("no session on this connection; attach first")
        return self._session

    def _on_ready(self, _: dict[str, Any], __: list[int]) -> None:
        self._send({"ok": True, "ready": self._gateway.ready})

    def _on_nodes(self, _: dict[str, Any], __: list[int]) -> None:
        """Show the cluster's nodes to whoever runs this gateway, who has no session; they say nothing of the zone."""
        if boundary.peer_uid(self._sock) not in {0, os.geteuid()}:
            raise GatewayError("without a session only root of this host sees the nodes; attach first")
        self._send({"ok": True, "nodes": self._gateway.nodes()})

    def _on_attach(self, message: dict[str, Any], _: list[int]) -> None:
        if self._session is not None:
            raise GatewayError("this connection has a session already; open another connection for another session")
        self._need_no_session()
        said = message.get("versions")
        versions = {str(name)[:20]: str(one)[:20] for name, one in said.items()} if isinstance(said, dict) else {}
        self._session = self._gateway.attach(str(message.get("token")), str(message.get("purpose", "")), versions)
        self._owner = True
        self._send({"ok": True, "secret": self._session.secret, **self._gateway.card(self._session)})

    def _on_join(self, message: dict[str, Any], _: list[int]) -> None:
        self._need_no_session()
        self._session = self._gateway.join(str(message.get("session")), str(message.get("secret")))
        self._send({"ok": True})

    def _on_catalog(self, _: dict[str, Any], __: list[int]) -> None:
        self._need_session()
        self._send({"ok": True, "datasets": self._gateway.catalog()})

    def _on_status(self, _: dict[str, Any], __: list[int]) -> None:
        session = self._need_session()
        self._send({"ok": True, **self._gateway.card(session), "nodes": self._gateway.nodes()})

    def _on_read(self, message: dict[str, Any], _: list[int]) -> None:
        """Hand rows to a person of the zone; they do not leave it."""
        self._need_session()
        services = self._gateway.services
        data = dict(message.get("data") or {})
        memory = services.memory_bytes
        found = source.from_catalog(services.zone, services.data_dir, data, None, memory_bytes=memory)
        reply = {"ok": True, "rows": found.rows, "columns": found.columns}
        if not message.get("rows", True):
            self._send(reply)
            return
        if not staging.fits(found.table.nbytes, services.memory_bytes):
            size = found.table.nbytes
            raise ResultTooLargeError(
                f"these rows take {size >> 20} MiB, more than the gateway has room to hand out at once; read fewer "
                "columns, filter, or split the handle and take its parts",
                size_bytes=size,
                limit_bytes=services.memory_bytes // 4,
            )
        fd = share_table(found.table)
        try:
            self._send(reply, (fd,))
        finally:
            os.close(fd)

    def _on_close(self, _: dict[str, Any], __: list[int]) -> None:
        session = self._need_session()
        self._gateway.detach(session)
        self._send({"ok": True, "receipts": session.receipts})

    def _on_save(self, message: dict[str, Any], fds: list[int]) -> None:
        """Keep a value for this person, sealed, in the zone."""
        session = self._need_session()
        encoded = open_sealed(_memory_file(fds, "value"))
        if not staging.fits(len(encoded), self._gateway.services.memory_bytes):
            raise ResultTooLargeError(
                f"a checkpoint of {len(encoded) >> 20} MiB is more than the gateway has room for; save its parts",
                size_bytes=len(encoded),
                limit_bytes=self._gateway.services.memory_bytes // 4,
            )
        self._gateway.checkpoints.save(session.person.name, str(message.get("name")), encoded)
        self._send({"ok": True})

    def _on_load(self, message: dict[str, Any], _: list[int]) -> None:
        """Hand out what this person saved."""
        session = self._need_session()
        found = self._gateway.checkpoints.load(session.person.name, str(message.get("name")))
        fd, places = share_encoded([memoryview(found)])
        try:
            self._send({"ok": True, "places": places}, (fd,))
        finally:
            os.close(fd)

    def _on_saved(self, _: dict[str, Any], __: list[int]) -> None:
        self._send({"ok": True, "saved": self._gateway.checkpoints.saved(self._need_session().person.name)})

    def _on_forget(self, message: dict[str, Any], _: list[int]) -> None:
        self._gateway.checkpoints.forget(self._need_session().person.name, str(message.get("name")))
        self._send({"ok": True})

    def _on_broadcast(self, _: dict[str, Any], fds: list[int]) -> None:
        """Keep a value that calls of this session may name by its digest."""
        session = self._need_session()
        encoded = open_sealed(_memory_file(fds, "value"))
        self._send({"ok": True, "digest": session.broadcasts.add(encoded), "bytes": len(encoded)})

    def _on_hold(self, message: dict[str, Any], _: list[int]) -> None:
        """Keep an instance for as long as this connection is open."""
        session, instance = self._need_session(), str(message.get("instance"))
        session.pool(instance)
        self._held.append(instance)
        self._send({"ok": True})

    def _on_release(self, message: dict[str, Any], _: list[int]) -> None:
        """End an instance; it is gone when the answer comes."""
        session, instance = self._need_session(), str(message.get("instance"))
        if instance in self._held:
            self._held.remove(instance)
            session.end_instance(instance)
        self._send({"ok": True})

    def _on_call(self, message: dict[str, Any], fds: list[int]) -> None:
        session = self._need_session()
        request = parse(message)
        cancelled = job.Cancel()
        watchdog = self._gateway.watchdog
        started, opened = time.monotonic(), session.leases.opened
        watchdog.watch(self._sock, request.work.options.timeout_s, cancelled)
        try:
            found = self._source(session, request, fds, cancelled)
            result = job.run(session, request, found, self._send, cancelled)
        finally:
            watchdog.leave(cancelled)
        result.report["seconds"] = time.monotonic() - started
        result.report["leases_opened"] = session.leases.opened - opened
        self._reply(request, result)

    def _on_weigh(self, message: dict[str, Any], fds: list[int]) -> None:
        """Say what a call on a handle would send, if policy lets it, and show its first rows to the person."""
        session = self._need_session()
        request = parse(message)
        if request.data is None or request.data.get("memory"):
            raise ValueError("weigh takes a call on a handle")
        found = self._source(session, request, fds, job.Cancel())
        assert found is not None
        session.weigh(request, found)
        size = found.table.nbytes
        readable = staging.fits(size, self._gateway.services.memory_bytes)
        reply = {"ok": True, "rows": found.rows, "bytes": size, "readable": readable}
        first = found.table.slice(0, min(max(0, int(message.get("first", 0))), MOST_SHOWN_ROWS))
        fd = share_table(first if staging.fits(first.nbytes, self._gateway.services.memory_bytes) else first[:0])
        try:
            self._send(reply, (fd,))
        finally:
            os.close(fd)

    def _source(
        self, session: Session, request: Request, fds: list[int], cancelled: job.Cancel
    ) -> source.Source | None:
        if request.data is None:
            return None
        services, options = self._gateway.services, request.work.options
        if request.data.get("memory"):
            return source.from_memory(_memory_file(fds, "data"), options.columns, keep_together=options.keep_together)
        handle, columns, together = request.data, options.columns, options.keep_together
        where = services.zone, services.data_dir

        @functools.cache
        def foreseen() -> None:
            session.foresee(request, source.described(*where, handle, columns, keep_together=together))

        def check() -> None:
            cancelled.check()
            # Before the first byte of large data is put on the zone's disk: for what policy refuses, none is.
            foreseen()

        with staging.watched(check):
            memory = services.memory_bytes
            return source.from_catalog(*where, handle, columns, keep_together=together, memory_bytes=memory)

    def _reply(self, request: Request, result: job.Result) -> None:
        head = {"ok": True, "printed": result.printed, "report": result.report}
        if request.mode in (Mode.CALL, Mode.MAKE) and len(result.encoded[0]) <= INLINE_BYTES:
            self._send({**head, "inline": bytes(result.encoded[0])})
            return
        if request.mode is Mode.STREAM:
            self._send(head)
            return
        if request.mode is Mode.MAP:
            fd, places = share_value(result.value), None
        else:
            fd, places = share_encoded(result.encoded)
        try:
            self._send({**head, "places": places}, (fd,))
        finally:
            os.close(fd)


def _memory_file(fds: list[int], what: str) -> int:
    """Take the memory file that came with a request.

    Raises:
        GatewayError: None did.
    """
    if not fds:
        raise GatewayError(f"the {what}'s memory file did not come with the request; use ray_gpu's client")
    return fds.pop()


def main(argv: list[str]) -> None:
    """Run a gateway. ``argv``: path of its JSON settings file. Its secret id comes by standard input."""
    harden.keep_memory()
    try:
        gateway = Gateway(Settings.read(Path(argv[0]), take_secret()))
    except ZoneError as error:
        sys.exit(f"the gateway did not start: {type(error).__name__}: {error.message}")

    def stop(*_: object) -> None:
        gateway.close()
        os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What was imported is never garbage; looking at it again and again would only trash the caches.
    gc.freeze()
    gateway.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
