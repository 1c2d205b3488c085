"""What a notebook holds: a session with its zone's gateway. This module does I/O.

The notebook is not trusted by the gateway and holds no key. It packs functions, hands data over in sealed
memory files, and rebuilds results from plain data; it never unpickles anything that came from outside.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pad

from ray_gpu.progress import Progress
from ray_gpu.remote_error import rebuild
from ray_gpu.share import open_sealed, open_table, share_table
from ray_gpu.wire import MalformedMessageError, raise_for_error, recv_message, send_message, unix_connect
from zones import values
from zones.errors import (
    CallCancelledError,
    GatewayUnavailableError,
    RemoteFunctionError,
    SessionClosedError,
    UnknownNameError,
)

#: Idle connections that a session keeps for its next calls.
_KEPT_CONNECTIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """Rows of a catalog data set that the gateway reads. Nothing is read until a call needs it.

    Labels follow ``select``, ``filter`` and ``split``: the gateway resolves them again, by name.
    """

    session: Session
    dataset: str
    columns: tuple[str, ...]
    condition: Any = None
    part: tuple[Any, ...] | None = None

    def select(self, columns: list[str]) -> Handle:
        """Return a handle on some of the columns.

        Raises:
            UnknownNameError: The handle has no such column.
        """
        for name in columns:
            if name not in self.columns:
                raise UnknownNameError.of("column", name, self.columns)
        return replace(self, columns=tuple(columns))

    def filter(self, condition: Any) -> Handle:
        """Return a handle on the rows that meet *condition*, for example ``["age", ">", 60]``."""
        return replace(self, condition=condition if self.condition is None else ["and", self.condition, condition])

    def split(self, *fractions: float, seed: int = 0) -> tuple[Handle, ...]:
        """Return handles on disjoint random parts: ``split(0.8)`` gives two, ``split(0.6, 0.2)`` three.

        The same seed gives the same parts.

        Raises:
            ValueError: Fractions are not above 0 or sum to more than 1, or the handle is a part already.
        """
        if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
            raise ValueError("split takes fractions above 0 that sum to at most 1, as in split(0.8)")
        if self.part is not None:
            raise ValueError("this handle is one part of a split; split the whole into more parts instead")
        parts = len(fractions) + (sum(fractions) < 1 - 1e-9)
        return tuple(replace(self, part=(fractions, seed, index)) for index in range(parts))

    def document(self) -> dict[str, Any]:
        """Return what the gateway resolves."""
        return {"dataset": self.dataset, "columns": list(self.columns), "filter": self.condition,
                "split": self._split()}

    def _split(self) -> dict[str, Any] | None:
        if self.part is None:
            return None
        fractions, seed, part = self.part
        return {"fractions": list(fractions), "seed": seed, "part": part}

    def to_arrow(self) -> pa.Table:
        """Return the rows, inside the zone."""
        reply, fds = self.session.ask({"op": "read", "data": self.document()}, max_fds=1)
        return open_table(fds[0], trusted=True)

    def __len__(self) -> int:
        reply, _ = self.session.ask({"op": "read", "data": self.document(), "rows": False})
        return int(reply["rows"])

    def __repr__(self) -> str:
        where = "" if self.condition is None else f", filter={self.condition!r}"
        return f"Handle({self.dataset!r}, columns={list(self.columns)}{where})"


class Session:
    """A person's session with one zone; use it as a context manager.

    Leases, keys and GPU actors that it holds end with it.
    """

    def __init__(self, socket_path: Path, token: str, purpose: str) -> None:
        self._path = socket_path
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._closed = False
        self._main = _connect(socket_path)
        self._card = self._attach(token, purpose)
        self._secret = self._card.pop("secret")
        self.receipts: list[dict[str, Any]] = []

    def _attach(self, token: str, purpose: str) -> dict[str, Any]:
        try:
            send_message(self._main, {"op": "attach", "token": token, "purpose": purpose})
            reply, _ = recv_message(self._main)
            return raise_for_error(reply)
        except (OSError, MalformedMessageError):
            raise _gone() from None

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

    def read(self, dataset: str, columns: list[str] | None = None, filter: Any = None) -> Handle:
        """Return a handle on a catalog data set.

        Args:
            dataset: Name in the zone's catalog.
            columns: Columns, all by default.
            filter: For example ``["age", ">", 60]`` or ``["and", [...], [...]]``.

        Raises:
            UnknownNameError: No such data set or column.
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

    @property
    def degradations(self) -> list[str]:
        """Controls that are missing now, of the zone's side and of the leases held."""
        card = self.status()
        found = set(card["zone_degradations"])
        for lease in card["leases"]:
            found |= set(lease["degradations"])
        return sorted(found)

    # -- talking to the gateway -----------------------------------------------------------------

    def ask(self, message: dict[str, Any], *, max_fds: int = 0) -> tuple[dict[str, Any], list[int]]:
        """Send one request on a connection of its own and return the reply with its descriptors.

        Raises:
            GatewayUnavailableError: The gateway is gone.
            SessionClosedError: The session has ended.
        """
        with self.connection() as sock:
            send_message(sock, message)
            reply, fds = recv_message(sock, max_fds=max_fds)
            return raise_for_error(reply), fds

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """Lend a connection of this session for one exchange; after an error it is not used again."""
        sock = self.take_connection()
        try:
            yield sock
        except (OSError, MalformedMessageError):
            sock.close()
            raise _gone() from None
        except BaseException:
            sock.close()
            raise
        self.give_connection(sock)

    def take_connection(self) -> socket.socket:
        """Return a connection that joined this session; hand it back with :meth:`give_connection`."""
        with self._lock:
            if self._closed:
                raise SessionClosedError("the session has ended; attach again with ray_gpu.attach(...)")
            if self._idle:
                return self._idle.pop()
        sock = _connect(self._path)
        try:
            send_message(sock, {"op": "join", "session": self._card["session"], "secret": self._secret})
            reply, _ = recv_message(sock)
            raise_for_error(reply)
        except (OSError, MalformedMessageError):
            sock.close()
            raise _gone() from None
        return sock

    def give_connection(self, sock: socket.socket) -> None:
        """Keep a connection for the next call."""
        with self._lock:
            if not self._closed and len(self._idle) < _KEPT_CONNECTIONS:
                self._idle.append(sock)
                return
        sock.close()

    def close(self) -> list[dict[str, Any]]:
        """End the session: leases, GPU actors and keys are gone when this returns. Returns the receipts."""
        with self._lock:
            if self._closed:
                return self.receipts
            self._closed = True
            idle, self._idle = self._idle, []
        for sock in idle:
            sock.close()
        with contextlib.suppress(OSError, MalformedMessageError):
            send_message(self._main, {"op": "close"})
            reply, _ = recv_message(self._main)
            self.receipts = list(reply.get("receipts") or [])
        self._main.close()
        return self.receipts

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        card = self._card
        return (f"Session(zone={card['zone']!r}, person={card['person']!r}, pools={card['pools']}, "
                f"degraded={card['zone_degradations'] or 'no'})")


def _connect(path: Path) -> socket.socket:
    try:
        return unix_connect(str(path))
    except OSError:
        raise GatewayUnavailableError(
            f"no gateway answers at {path}; start one with `ray-gpu up`, or ask the zone's operator") from None


def _gone() -> GatewayUnavailableError:
    return GatewayUnavailableError("the gateway ended the connection; see `ray-gpu status` and attach again")


class Call:
    """One call on its way. The request is sent on creation; :meth:`result` waits for the answer.

    Args:
        request: The message for the gateway.
        data: A handle, a table for a memory file, or ``None``.
        show: Where progress goes.
    """

    def __init__(self, session: Session, request: dict[str, Any], data: Any, *, show: Progress | None) -> None:
        self._session = session
        self._show = show
        self._lock = threading.Lock()
        self._done = False
        self._value: Any = None
        self._error: BaseException | None = None
        self.report: dict[str, Any] = {}
        message, fds = _with_data(request, data)
        self._sock = session.take_connection()
        try:
            send_message(self._sock, message, fds)
        except OSError:
            self._sock.close()
            raise _gone() from None
        finally:
            for fd in fds:
                os.close(fd)

    def done(self) -> bool:
        """Tell whether :meth:`result` would return at once."""
        return self._done or _readable(self._sock)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the call and return its value.

        Args:
            timeout: Seconds to wait; the call goes on when they are over.

        Raises:
            TimeoutError: Not done within *timeout*.
            Exception: What the function raised, as its own built-in type where there is one, with the
                remote traceback as its cause.
            ZoneError: What kept the call from being made.
        """
        with self._lock:
            if not self._done:
                self._wait(timeout)
            if self._error is not None:
                raise self._error
            return self._value

    def cancel(self) -> None:
        """Stop the call; its sandbox is killed. Waiting for its result raises :class:`CallCancelledError`."""
        if not self._done:
            with contextlib.suppress(OSError):
                send_message(self._sock, {"op": "cancel"})

    def _wait(self, timeout: float | None) -> None:
        self._sock.settimeout(timeout)
        try:
            self._value = self._receive()
        except TimeoutError:
            raise TimeoutError(f"the call is not done after {timeout} s; wait longer, or stop it with .cancel()") from None
        except KeyboardInterrupt:
            self._interrupted()
            raise
        except (OSError, MalformedMessageError):
            self._error = _gone()
        except Exception as error:
            self._error = error
            self._finish(reusable=self._clean_error)
            return
        self._finish(reusable=self._error is None)

    _clean_error = False

    def _finish(self, *, reusable: bool) -> None:
        self._done = True
        if self._show:
            self._show.end()
        if reusable:
            self._sock.settimeout(None)
            self._session.give_connection(self._sock)
        else:
            self._sock.close()

    def _interrupted(self) -> None:
        """Ctrl-C: closing the connection ends the call, its sandbox is killed."""
        self._error = CallCancelledError("the call was interrupted; its sandbox was stopped")
        self._finish(reusable=False)

    def _receive(self) -> Any:
        while True:
            reply, fds = recv_message(self._sock, max_fds=1)
            if "event" not in reply:
                break
            self._event(reply)
        self._clean_error = reply.get("ok") is False
        try:
            raise_for_error(reply)
        except RemoteFunctionError as error:
            _show_printed(error.fields.get("printed"))
            raise rebuild(error) from None
        self.report = dict(reply.get("report") or {})
        _show_printed(reply.get("printed"))
        return _value(reply, fds)

    def _event(self, event: dict[str, Any]) -> None:
        if event["event"] == "printed":
            _show_printed(event.get("text"))
        elif self._show:
            self._show.update(event)

    def __repr__(self) -> str:
        return f"<Call {'done' if self._done else 'running'}>"


def _value(reply: dict[str, Any], fds: list[int]) -> Any:
    if "inline" in reply:
        return values.decode(reply["inline"])
    view = open_sealed(fds[0])
    places = reply.get("places")
    if places is None:
        return values.decode(view)
    decoded = [values.decode(view[start:stop]) for start, stop in places]
    return decoded


def _with_data(request: dict[str, Any], data: Any) -> tuple[dict[str, Any], list[int]]:
    if data is None:
        return request, []
    if isinstance(data, Handle):
        return {**request, "data": data.document()}, []
    return {**request, "data": {"memory": True}}, [share_table(data)]


def as_table(data: Any) -> Any:
    """Return data of a call as a :class:`Handle` or an Arrow table, zero-copy where its format allows.

    Raises:
        TypeError: *data* is none of the kinds that a call takes.
    """
    if isinstance(data, (Handle, pa.Table)):
        return data
    if isinstance(data, pad.Dataset):
        return data.to_table()
    if hasattr(data, "__arrow_c_stream__"):
        return pa.table(data)
    raise TypeError(f"data must be a zone.read(...) handle, a pyarrow Dataset, or have __arrow_c_stream__ (pyarrow, pandas, "
                    f"polars tables do), not {type(data).__name__}")


def _show_printed(text: Any) -> None:
    if text:
        sys.stdout.write(str(text))
        sys.stdout.flush()


def _readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])
