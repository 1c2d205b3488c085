"""A call that is on its way to a GPU node, as a notebook holds it. This module does I/O.

Nothing that comes back is unpickled: values are rebuilt from plain data, and errors from a built-in's name and text.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.dataset as pad

from ray_gpu import cards, progress
from ray_gpu.advice import Advice
from ray_gpu.arrays import ARRAY_COLUMN, column_of, is_array
from ray_gpu.handle import Handle, column_names
from ray_gpu.progress import Progress
from ray_gpu.remote_error import rebuild
from ray_gpu.share import open_sealed, share_table
from ray_gpu.wire import Inbox, MalformedMessageError, close_fds, raise_for_error, send_message
from zones import values
from zones.errors import (
    CallCancelledError,
    GatewayUnavailableError,
    RemoteFunctionError,
    ValueRefusedError,
    from_wire,
)

if TYPE_CHECKING:
    from ray_gpu.client import Session

R = TypeVar("R")


class ArrowStream(Protocol):
    """What pandas, polars and others hand tables over by."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """Return a capsule, as Arrow's PyCapsule interface says."""


#: Tables that stand for a batch when they come first.
Data: TypeAlias = Handle | pa.Table | pad.Dataset | ArrowStream


class Call(Generic[R]):
    """One call on its way, as :meth:`RemoteFunction.remote` returns it; :meth:`result` or ``await`` waits for it.

    A call that nobody holds any more is stopped: it could leave nothing behind that somebody might find.

    Args:
        request: The message for the gateway.
        data: A handle, a table for a memory file, or ``None``.
        show: Where progress goes.
        one: The function is called once, so there is one value.
        ended: Told the report of the call once it is done, unless it failed.
    """

    def __init__(
        self,
        session: Session,
        request: dict[str, Any],
        data: Any,
        *,
        show: Progress | None,
        one: bool,
        ended: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._session = session
        self._prepare(show)
        self._one = one
        self._ended = ended
        started = time.monotonic()
        message, fds = _with_data(request, data)
        try:
            self._connection = session.begin(self)
            try:
                send_message(self._connection.sock, message, fds)
            except ValueError:
                self._close(reusable=True)
                raise ValueRefusedError(
                    "the call's arguments do not fit one message; pass large values as data"
                ) from None
            except OSError:
                self._close(reusable=False)
                raise gone() from None
        finally:
            if fds:
                close_fds(fds)
        #: Handing the data over is a part of the call, which the gateway does not see.
        self._handed_s = time.monotonic() - started

    def _prepare(self, show: Progress | None) -> None:
        self._show = show
        self._lock = threading.RLock()
        self._done = self._cancelled = False
        self._value: Any = None
        #: Values that came before the call was done, each with its shard's number.
        self._parts: deque[tuple[int, Any]] = deque()
        self._error: BaseException | None = None
        #: Once done: shards by node, rows, bytes sent, seconds, leases opened.
        self.report: dict[str, Any] = {}
        #: With ``where="auto"`` or ``"local"``: what was predicted, and where it runs.
        self.advice: Advice | None = None

    def done(self) -> bool:
        """Tell whether :meth:`result` would return, or raise, at once."""
        if not self._lock.acquire(blocking=False):
            return self._done  # another thread waits for the result
        try:
            return self._advance(0)
        finally:
            self._lock.release()

    def result(self, timeout: float | None = None) -> R:
        """Wait for the call and return its value.

        Args:
            timeout: Seconds to wait; the call goes on when they are over.

        Raises:
            TimeoutError: Not done within *timeout*.
            Exception: What the function raised, as its own built-in type where there is one, with the
                remote traceback as its cause.
            ZoneError: What kept the call from being made.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._lock.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            raise _not_yet(timeout)
        try:
            if not self._advance(deadline):
                raise _not_yet(timeout)
        except KeyboardInterrupt:
            self._interrupted()
            raise
        finally:
            self._lock.release()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[no-any-return]  # plain data; the function's annotation says which

    def next_part(self) -> tuple[int, Any] | None:
        """Wait for the next value of a call that gives them one by one; ``None`` once there are no more.

        Raises:
            Exception: As :meth:`result`, after the values that came before it.
        """
        with self._lock:
            try:
                while not self._parts and not self._done:
                    self._receive()
            except KeyboardInterrupt:
                self._interrupted()
                raise
            if self._parts:
                return self._parts.popleft()
        self.result()
        return None

    def cancel(self) -> None:
        """Stop the call; its sandbox is killed. Waiting for its result raises :class:`CallCancelledError`."""
        if not self._done:
            self._cancelled = True
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_WR)

    def __await__(self) -> Generator[Any, None, R]:
        """Wait for the call in a coroutine. A task that is cancelled meanwhile stops the call."""
        return self._awaited().__await__()

    async def _awaited(self) -> R:
        try:
            return await asyncio.to_thread(self.result)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _advance(self, deadline: float | None) -> bool:
        """Take what the gateway said, up to *deadline* (``None``: however long it takes); tell whether that is all."""
        while not self._done and (deadline is None or self._connection.wait(deadline)):
            self._receive()
        return self._done

    def _receive(self) -> None:
        """Take the next thing that the gateway says."""
        try:
            reply, fds = self._connection.receive()
        except (OSError, MalformedMessageError):
            self._end(ended_by_us() if self._cancelled else gone(), reusable=False)
            return
        if reply.get("event") == "part":
            self._parts.append((int(reply["shard"]), _part(reply, fds)))
        elif "event" in reply:
            self._event(reply)
        else:
            self._take(reply, fds)

    def _take(self, reply: dict[str, Any], fds: list[int]) -> None:
        """Take the final reply."""
        error: BaseException | None = None
        try:
            raise_for_error(reply)
            self.report = dict(reply.get("report") or {})
            self._value = value_of(reply, fds, one=self._one)
            self.report["seconds"] = self.report.get("seconds", 0.0) + self._handed_s
            if self._ended:
                self._ended(self.report)
        except RemoteFunctionError as remote:
            reply = remote.fields
            error = rebuild(remote)
        except Exception as other:  # noqa: BLE001 - whatever it is, it is this call's result
            error = other
        self._end(error, reusable=not self._cancelled)
        _show_printed(reply.get("printed"))

    def _end(self, error: BaseException | None, *, reusable: bool) -> None:
        self._error = error
        self._done = True
        if self._show:
            self._show.end()
        self._close(reusable=reusable)

    def _close(self, *, reusable: bool) -> None:
        self._done = True
        self._session.end(self, self._connection, reusable=reusable)

    def _interrupted(self) -> None:
        """Ctrl-C: closing the connection ends the call, its sandbox is killed."""
        if not self._done:
            self._end(ended_by_us(), reusable=False)

    def _event(self, event: dict[str, Any]) -> None:
        if event["event"] == "printed":
            if self._show:
                self._show.clear()
            _show_printed(event.get("text"))
        elif event["event"] == "differs":
            if progress.wanted():
                progress.tell(str(event["node"]), "; ".join(map(str, event["differs"])))
        elif self._show:
            self._show.update(event)

    def __del__(self) -> None:
        connection = getattr(self, "_connection", None)
        if connection is not None and not self._done:
            connection.sock.close()

    def _repr_html_(self) -> str:
        return cards.call(done=self._done, error=self._error, report=self.report)

    def __repr__(self) -> str:
        return f"<Call {'done' if self._done else 'running'}>"


def _not_yet(timeout: float | None) -> TimeoutError:
    return TimeoutError(f"the call is not done after {timeout} s; wait longer, or stop it with .cancel()")


def ended_by_us() -> CallCancelledError:
    """Return the error of a call that the caller stopped."""
    return CallCancelledError("the call was stopped and its sandbox with it; run it again if you need its result")


def value_of(reply: dict[str, Any], fds: list[int], *, one: bool) -> Any:
    """Return the value, or the values, that a reply of the gateway's brings; ``None`` where it brings none."""
    if "inline" in reply:
        return values.decode(reply["inline"])
    if "places" not in reply:
        # What a stream ends with: its values came before.
        return None
    # Sealed, so nobody can change it any more; and private, so that arrays can be written to as any others.
    view = open_sealed(fds[0], private=True)
    places = reply["places"]
    if places is None:
        return values.decode(view, zero_copy=True)
    found = [values.decode(view[start:stop], zero_copy=True) for start, stop in places]
    return found[0] if one else found


def _part(reply: dict[str, Any], fds: list[int]) -> Any:
    """Return a shard's value, or what the function raised for it."""
    if "failed" not in reply:
        return value_of(reply, fds, one=True)
    failed = from_wire(reply["failed"])
    return rebuild(failed) if isinstance(failed, RemoteFunctionError) else failed


def _with_data(request: dict[str, Any], data: Any) -> tuple[dict[str, Any], list[int]]:
    if data is None:
        return request, []
    if isinstance(data, Handle):
        return {**request, "data": data.document()}, []
    return {**request, "data": {"memory": True}}, [share_table(data)]


def as_table(data: Any, columns: tuple[str, ...] | None = None) -> Handle | pa.Table:
    """Return data of a call as a :class:`Handle` or an Arrow table, zero-copy where its format allows.

    Args:
        data: What the caller passed. An array (NumPy's, or on the CPU with DLPack) is a table of one column ``array``.
        columns: Columns that the call wants; ``None`` for all.

    Raises:
        TypeError: *data* is none of the kinds that a call takes.
        ValueRefusedError: It is a reader that has no rows left.
        UnknownNameError: It has no such column.
    """
    if isinstance(data, Handle):
        return data if columns is None else data.select(columns)
    if isinstance(data, pad.Dataset):
        return data.to_table(columns=None if columns is None else list(column_names(columns, data.schema.names)))
    table = data if isinstance(data, pa.Table) else _of_arrays(data) or _stream(data)
    chosen = table if columns is None else table.select(list(column_names(columns, table.column_names)))
    # Metadata, such as pandas', describes columns that may not leave; the gateway would refuse it.
    return chosen.replace_schema_metadata(None)


def _of_arrays(data: Any) -> pa.Table | None:
    """Return an array, or arrays by name, as a table; ``None`` for all else. See :func:`ray_gpu.arrays.column_of`."""
    named = data if isinstance(data, dict) else {ARRAY_COLUMN: data}
    if not named or not all(isinstance(name, str) and is_array(one) for name, one in named.items()):
        return None
    return pa.table({name: column_of(one) for name, one in named.items()})


def is_data(value: Any) -> bool:
    """Tell whether *value* is a table that a call takes as its data."""
    return isinstance(value, (Handle, pa.Table, pad.Dataset)) or hasattr(value, "__arrow_c_stream__")


def _stream(data: Any) -> pa.Table:
    try:
        if hasattr(data, "__arrow_c_stream__"):
            return _not_read_before(data, pa.table(data))
    except (TypeError, ValueError, pa.ArrowException):
        raise TypeError(
            f"data must have named columns, which this {type(data).__name__} has not; "
            'make it a table, as in pyarrow.table({"x": data})'
        ) from None
    raise TypeError(
        f"data must be a zone.read(...) handle, a pyarrow Dataset, an array or a dict of arrays, or have "
        f"__arrow_c_stream__ (pyarrow, pandas and polars tables do), not {type(data).__name__}"
    )


def _not_read_before(data: Any, table: pa.Table) -> pa.Table:
    """Return *table* unless it is what a reader gives that somebody has read to its end."""
    if isinstance(data, pa.RecordBatchReader) and not table.num_rows:
        raise ValueRefusedError(
            "the RecordBatchReader has no rows, or they were read before: it gives its rows once; "
            "pass a table, as reader.read_all() returns"
        )
    return table


def _show_printed(text: Any) -> None:
    if text:
        sys.stdout.write(str(text))
        sys.stdout.flush()


def advance_any(calls: list[tuple[Call[Any], Inbox]]) -> None:
    """Wait a moment until the gateway said something to one of *calls*, and take it."""
    poller = select.poll()
    by_fd = {}
    for call, connection in calls:
        fd = connection.sock.fileno()
        if fd >= 0:
            by_fd[fd] = call
            poller.register(fd, select.POLLIN)
    # Not for ever: a call may end in another thread meanwhile.
    for fd, _ in poller.poll(100):
        by_fd[fd].done()


def gone() -> GatewayUnavailableError:
    """Return the error for a connection that the gateway ended."""
    return GatewayUnavailableError("the gateway ended the connection; see `ray-gpu status` and attach again")
