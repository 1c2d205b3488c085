"""A person's session with a zone's gateway, as a notebook holds it. This module does I/O.

The notebook is not trusted by the gateway and holds no key. It packs functions, hands data over in sealed
memory files, and rebuilds results from plain data; it never unpickles anything that came from outside.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from ray_gpu import cards
from ray_gpu.advice import Advisor
from ray_gpu.broadcast import Broadcast
from ray_gpu.call import Call, advance_any, gone, value_of
from ray_gpu.environment import versions
from ray_gpu.handle import Handle
from ray_gpu.share import share_value
from ray_gpu.wire import Inbox, MalformedMessageError, raise_for_error, recv_message, send_message, unix_connect
from zones.errors import GatewayUnavailableError, SessionClosedError, UnknownNameError, ZoneError

#: Idle connections that a session keeps for its next calls.
_KEPT_CONNECTIONS = 8
#: Calls that a session has open at once; the next one waits until one of them is done.
MAX_OPEN_CALLS = 32


class Receipts(list[dict[str, Any]]):
    """What the nodes' custodians signed of a session's leases."""

    def _repr_html_(self) -> str:
        return cards.receipts(self)

    def __repr__(self) -> str:
        said = (dict(signed["receipt"]) for signed in self)
        return "\n".join(f"{one['node']}: {one['shards']} shards, {one['exit']}" for one in said) or "no receipts"


class Nodes(list[dict[str, Any]]):
    """The cluster's nodes."""

    def _repr_html_(self) -> str:
        return cards.nodes(self)

    def __repr__(self) -> str:
        return "\n".join(f"{node['name']}: {node['gpus_free']:g} of {node['gpus']:g} GPUs free" for node in self)


class Session:
    """A person's session with one zone; use it as a context manager.

    Leases, keys and GPU actors that it holds end with it.
    """

    def __init__(self, socket_path: Path, token: str, purpose: str) -> None:
        self._path = socket_path
        self._lock = threading.Lock()
        self._idle: list[Inbox] = []
        self._closed = False
        self._calls: weakref.WeakKeyDictionary[Call[Any], Inbox] = weakref.WeakKeyDictionary()
        self._main = _connect(socket_path)
        self._card = self._attach(token, purpose)
        self._secret = self._card.pop("secret")
        #: Digests of the functions that the zone's officer approved, as of now.
        self.approved = frozenset(self._card["approved"])
        self.receipts = Receipts()
        #: What ``where="auto"`` knows of this session's links and functions.
        self.advisor = Advisor()

    def _attach(self, token: str, purpose: str) -> dict[str, Any]:
        try:
            send_message(self._main, {"op": "attach", "token": token, "purpose": purpose, "versions": versions()})
            reply, _ = recv_message(self._main)
            return raise_for_error(reply)
        except (OSError, MalformedMessageError):
            self._main.close()
            raise gone() from None
        except BaseException:
            self._main.close()
            raise

    # -- what there is --------------------------------------------------------------------------

    @property
    def zone(self) -> str:
        """Name of the zone."""
        return str(self._card["zone"])

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._closed

    @property
    def person(self) -> str:
        """Name of the person in Vault's identity store."""
        return str(self._card["person"])

    @property
    def datasets(self) -> dict[str, dict[str, str]]:
        """Data sets of the zone's catalog, each with its columns and their classes."""
        return {name: dict(item["columns"]) for name, item in self._card["datasets"].items()}

    def segments(self, dataset: str) -> list[str]:
        """Return the names of a data set's segments, each before its parts.

        Raises:
            UnknownNameError: No such data set.
        """
        if dataset not in self._card["datasets"]:
            raise UnknownNameError.of("dataset", dataset, self.datasets)
        return list(self._card["datasets"][dataset]["segments"])

    def read(self, dataset: str, columns: Iterable[str] | None = None, filter: Any = None) -> Handle:  # noqa: A002 - as in pyarrow.dataset
        """Return a handle on a catalog data set.

        Args:
            dataset: Name in the zone's catalog.
            columns: Columns, all by default.
            filter: For example ``["age", ">", 60]`` or ``["and", [...], [...]]``.

        Raises:
            UnknownNameError: No such data set or column.
            ValueError: *filter* is no filter.
        """
        if dataset not in self.datasets:
            raise UnknownNameError.of("dataset", dataset, self.datasets)
        whole = Handle(session=self, dataset=dataset, columns=tuple(self.datasets[dataset]))
        chosen = whole if columns is None else whole.select(columns)
        return chosen if filter is None else chosen.filter(filter)

    def status(self) -> dict[str, Any]:
        """Return the session's leases with their levels, its receipts, and the cluster's nodes."""
        reply, _ = self.ask({"op": "status"})
        reply.pop("ok", None)
        return reply

    def broadcast(self, value: Any) -> Broadcast:
        """Return a value as an argument of many calls: each lease is sent it once, whichever calls take it there.

        Policy is asked about it with each call, as about any argument of its size.

        Raises:
            ValueRefusedError: It is no plain data, or larger than what fits a lease's memory.
        """
        return Broadcast(self, value)

    def save(self, name: str, value: Any) -> None:
        """Keep a value in the zone between sessions, sealed, in place of the one of that name: a model's weights, say.

        It is this person's alone, and no GPU node sees it.

        Raises:
            ValueRefusedError: It is no plain data, or too large, or *name* is none.
            VaultError: Vault does not answer.
        """
        fd = share_value(value, what="the value to save")
        try:
            self.ask({"op": "save", "name": name}, (fd,))
        finally:
            os.close(fd)

    def load(self, name: str) -> Any:
        """Return what :meth:`save` kept.

        Raises:
            UnknownNameError: There is none of that name.
        """
        reply, fds = self.ask({"op": "load", "name": name})
        return value_of(reply, fds, one=True)

    def saved(self) -> list[dict[str, Any]]:
        """Return name, time and size of what this person keeps in the zone, the newest first."""
        reply, _ = self.ask({"op": "saved"})
        return list(reply["saved"])

    def forget(self, name: str) -> None:
        """Remove what :meth:`save` kept, if it is there."""
        self.ask({"op": "forget", "name": name})

    def __getattr__(self, name: str) -> Any:
        # Asked only for what a session has not.
        meant = {"put": "broadcast or .save", "store": "save", "write": "save", "dump": "save", "get": "load"}
        hint = f"; use .{meant[name]}" if name in meant else ""
        raise AttributeError(f"a session has no attribute {name!r}{hint}")

    def nodes(self) -> Nodes:
        """Return the cluster's nodes, with their labels and GPUs."""
        return Nodes(self.status()["nodes"])

    @property
    def degradations(self) -> list[str]:
        """Controls that are missing now, of the zone's side and of the leases held."""
        card = self.status()
        found = set(card["zone_degradations"])
        for lease in card["leases"]:
            found |= set(lease["degradations"])
        return sorted(found)

    # -- talking to the gateway -----------------------------------------------------------------

    def ask(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> tuple[dict[str, Any], list[int]]:
        """Send one request on a connection of its own and return the reply with its descriptors.

        Raises:
            GatewayUnavailableError: The gateway is gone.
            SessionClosedError: The session has ended.
        """
        with self.connection() as connection:
            send_message(connection.sock, message, fds)
            reply, received = connection.receive()
            return raise_for_error(reply), received

    @contextlib.contextmanager
    def connection(self) -> Iterator[Inbox]:
        """Lend a connection of this session for one exchange; after an error it is not used again."""
        connection = self.take_connection()
        try:
            yield connection
        except (OSError, MalformedMessageError):
            connection.sock.close()
            raise gone() from None
        except BaseException:
            connection.sock.close()
            raise
        self.give_connection(connection)

    def take_connection(self) -> Inbox:
        """Return a connection that joined this session; hand it back with :meth:`give_connection`."""
        with self._lock:
            if self._closed:
                raise SessionClosedError("the session has ended; attach again with ray_gpu.attach(...)")
            if self._idle:
                return self._idle.pop()
        connection = Inbox(_connect(self._path), max_fds=1)
        try:
            send_message(connection.sock, {"op": "join", "session": self._card["session"], "secret": self._secret})
            reply, _ = connection.receive()
            raise_for_error(reply)
        except (OSError, MalformedMessageError):
            connection.sock.close()
            raise gone() from None
        return connection

    def give_connection(self, connection: Inbox) -> None:
        """Keep a connection for the next call."""
        with self._lock:
            if not self._closed and len(self._idle) < _KEPT_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.sock.close()

    # -- calls ----------------------------------------------------------------------------------

    @property
    def open_calls(self) -> int:
        """How many calls are on their way to GPU nodes."""
        return len(self._calls)

    def begin(self, call: Call[Any]) -> Inbox:
        """Return a connection for *call*; while too many calls are open, first wait until one of them is done.

        Raises:
            GatewayUnavailableError, SessionClosedError: As :meth:`take_connection`.
        """
        while len(self._calls) >= MAX_OPEN_CALLS:
            with self._lock:
                waiting = list(self._calls.items())
            advance_any(waiting)
        connection = self.take_connection()
        with self._lock:
            self._calls[call] = connection
        return connection

    def end(self, call: Call[Any], connection: Inbox, *, reusable: bool) -> None:
        """Take back the connection of *call*."""
        with self._lock:
            self._calls.pop(call, None)
        if reusable:
            self.give_connection(connection)
        else:
            connection.sock.close()

    def close(self) -> Receipts:
        """End the session: leases, GPU actors and keys are gone when this returns. Returns the receipts."""
        with self._lock:
            if self._closed:
                return self.receipts
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.sock.close()
        with contextlib.suppress(OSError, MalformedMessageError):
            send_message(self._main, {"op": "close"})
            reply, _ = recv_message(self._main)
            self.receipts = Receipts(reply.get("receipts") or [])
        self._main.close()
        return self.receipts

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a session does not leave its process; attach again where you need one")

    def _repr_html_(self) -> str:
        card = self._card if self._closed else {**self._card, **self.status()}
        return cards.session(card, level="" if self._closed else self._level(), closed=self._closed)

    def __repr__(self) -> str:
        card = self._card
        return (
            f"Session(zone={card['zone']!r}, person={card['person']!r}, pools={card['pools']}, "
            f"{'closed' if self._closed else self._level()})"
        )

    def _level(self) -> str:
        """Say how far the zone's side and the leases held now are from ``strict``."""
        try:
            missing = self.degradations
        except ZoneError as error:
            return f"level unknown: {type(error).__name__}"
        return f"degraded: {', '.join(missing)}" if missing else "strict"


def _connect(path: Path) -> socket.socket:
    try:
        return unix_connect(str(path))
    except OSError:
        raise GatewayUnavailableError(
            f"no gateway answers at {path}; start one with `ray-gpu up`, or ask the zone's operator"
        ) from None
