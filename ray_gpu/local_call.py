"""A call that runs here, in the person's own process, and gives what it would give on GPU nodes. This module does I/O.

Rows are stripped and cut as the gateway does it, arguments and answers take the same way through ``zones.values``, and
errors the same through text: so values, types, refusals and exceptions are those of a call on GPU nodes. What differs:
rows are not shuffled and shards are as many as without a policy's demands; the function can reach this process and may
change it; what runs cannot be killed, so that a call that is given up ends when its function returns.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from ray_gpu.advice import Advice
from ray_gpu.answers import write_outcome
from ray_gpu.arrays import Batch, to_host
from ray_gpu.broadcast import Broadcast
from ray_gpu.call import Call, ended_by_us
from ray_gpu.handle import Handle
from ray_gpu.outcome import RowsExpected, open_outcome
from ray_gpu.remote_error import rebuild
from ray_gpu.request import Mode, payload_bytes
from ray_gpu.sandbox.memory import SLOT_BYTES
from ray_gpu.sandbox.raised import describe
from zones import plan, shards, values
from zones.errors import CallTimeoutError, RemoteFunctionError, UnknownNameError, ValueRefusedError
from zones.model import Obligations, Shuffle

if TYPE_CHECKING:
    from ray_gpu.options import FunctionOptions

R = TypeVar("R")
#: Calls that run here at once; further ones wait.
MAX_RUNNING = 32
#: Values of a stream that wait for somebody to take them.
_MOST_PARTS = 2
_room = threading.BoundedSemaphore(MAX_RUNNING)
#: Threads that run a call now.
_running: set[int] = set()
#: More than what is written before a value, or of an error.
_META_BYTES = 1 << 20
_order = plan.SEED_BYTES * b"\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWork:
    """What is to run here."""

    function: Callable[..., Any]
    mode: Mode
    #: All rows at once.
    whole: bool
    options: FunctionOptions
    #: A handle, a table, or ``None`` without data.
    data: Any
    #: Encoded, as a node gets them, without broadcasts; and those by position or name.
    arguments: bytes
    broadcasts: dict[int | str, Broadcast]
    #: Whether what the function raises for a shard stands in for its value.
    return_exceptions: bool = False

    def rows(self) -> tuple[pa.Table, plan.Index | None]:
        """Return the rows as a node sees them, and which of them stay together; reads those of a handle.

        Raises:
            ResultTooLargeError: The gateway has no room to hand them out.
            UnknownNameError: There is no such column.
        """
        table, groups, together = self.data, None, self.options.keep_together
        if isinstance(table, Handle):
            names = table.columns
            if together is not None and together not in names:
                table = replace(table, columns=(*names, together))
            table = table.to_arrow()
        else:
            names = tuple(table.column_names)
        if together is not None:
            if together not in table.column_names:
                raise UnknownNameError.of("column", together, table.column_names)
            groups = plan.groups_of(table.column(together))
            table = table.select(list(names))
        return table, groups

    def answers(self, shown: pa.Table, order: plan.Plan) -> Iterator[Any]:
        """Yield the function's answer for each shard, as they would come back from nodes."""
        args, kwargs = self.arguments_of()
        for index in range(len(order)):
            batch = Batch.of_shard(shards.shard_table(shown, order, index))
            expected = RowsExpected(order.shard_rows(index)) if self.mode is Mode.MAP else None
            try:
                yield answer(lambda batch=batch: self.function(batch, *args, **kwargs), expected)  # type: ignore[misc]  # bound
            except RemoteFunctionError as raised:
                if not self.return_exceptions:
                    raise
                yield rebuild(raised)

    def cut(self, table: pa.Table, groups: plan.Index | None) -> plan.Plan:
        """Return the cut of a stripped table: shards as large, and as many, as the gateway makes them."""
        kept = Obligations(shuffle=Shuffle.NONE)
        most = sys.maxsize if self.whole else payload_bytes(self.options.shard_bytes)
        least = 1 if self.whole else 2 * self.options.concurrency
        width = plan.row_bytes(table)
        if groups is None:
            return plan.make_plan(
                table.num_rows, width, obligations=kept, seed=_order, shard_bytes=most, min_shards=least
            )
        return plan.plan_of_groups(groups, width, obligations=kept, seed=_order, shard_bytes=most, min_shards=least)

    def arguments_of(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments as a node gets them: copies, and of broadcasts such as cannot be written to."""
        args, kwargs = values.decode(self.arguments)[:2]
        for where, one in self.broadcasts.items():
            value = values.decode(bytes(values.encode(to_host(one.value))), zero_copy=True)
            if isinstance(where, int):
                args[where] = value
            else:
                kwargs[where] = value
        return args, kwargs


def answer(run: Callable[[], Any], expected: RowsExpected | None = None) -> Any:
    """Return what *run* returns, by the way that a sandbox's answer takes into the zone.

    Raises:
        RemoteFunctionError: It raised.
        ValueRefusedError, ResultTooLargeError, RowCountError: As of a call on GPU nodes.
    """
    value, outcome = None, {"status": "ok"}
    try:
        value = to_host(run())
    except BaseException as error:  # noqa: BLE001 - user code may raise anything; it is the answer
        outcome = describe(error)
    try:
        ready = values.prepare(value)
    except ValueRefusedError:
        raise
    except Exception as error:  # noqa: BLE001 - objects of the user's own may raise anything while they are read
        ready, outcome = values.prepare(None), describe(error)
    # A node has a slot for the answer, and refuses what does not fit; of this only what is written to is ever there.
    view = np.empty(min(ready.size_bytes + _META_BYTES, SLOT_BYTES), np.uint8).data
    used = write_outcome(view, outcome, None, lambda _, out: ready.write_into(out))
    return open_outcome(view[:used], expected=expected).value


def seconds_of(work: LocalWork, rows: pa.Table) -> tuple[int, float]:
    """Run the function here on a few rows, as one batch, and forget what it returns; return their bytes and seconds.

    Raises:
        RemoteFunctionError: It raised.
        ValueRefusedError: It returned something that is not data.
    """
    started = time.perf_counter()
    shown = shards.strip(rows, keep_categories=work.options.categories or ())
    one = replace(work, whole=True, mode=Mode.SHARDS)
    for _ in one.answers(shown, one.cut(shown, None)):
        pass
    return rows.nbytes, time.perf_counter() - started


class _Running:
    """What the thread that runs a call shares with whoever waits for it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.parts: deque[tuple[int, Any]] = deque()
        self.done = self.stopped = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.report: dict[str, Any] = {}

    def add(self, part: tuple[int, Any]) -> None:
        """Add a stream's value; wait while nobody takes those that are there."""
        with self.changed:
            self.parts.append(part)
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(self.parts) < _MOST_PARTS or self.stopped)

    def end(self) -> None:
        """Say that there is nothing more to come."""
        with self.changed:
            self.done = True
            self.changed.notify_all()

    def stop(self) -> None:
        """Ask for no further shard."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


#: Told of a finished call: bytes of its data, seconds of reading them, seconds of the rest, whether others ran beside.
Took = Callable[[int, float, float, bool], None]


class LocalCall(Call[R]):
    """One call that runs here, with the methods of any other.

    Args:
        work: What to run.
        advice: Why here.
        took: Told how long it took.
    """

    def __init__(self, work: LocalWork, *, advice: Advice, took: Took) -> None:  # the base's would send it
        self._prepare(show=None)
        self.advice = advice
        self._running = _Running()
        limit = work.options.timeout_s
        self._limit_s = limit
        self._over = None if limit is None else time.monotonic() + limit
        given = self._running, work, took, time.perf_counter()
        thread = threading.Thread(target=_run, args=given, daemon=True, name="ray-gpu-local")
        thread.start()

    def next_part(self) -> tuple[int, Any] | None:
        """Wait for the next value of a call that gives them one by one; ``None`` once there are no more."""
        running = self._running
        with running.changed:
            running.changed.wait_for(lambda: running.parts or running.done or self._cancelled, self._left(None))
            if running.parts and not self._cancelled:
                running.changed.notify_all()
                return running.parts.popleft()
        self.result()
        return None

    def cancel(self) -> None:
        """Give the call up: no further shard is begun. Waiting for its result raises :class:`CallCancelledError`."""
        if not self._done:
            self._cancelled = True
            self._running.stop()

    def _advance(self, deadline: float | None) -> bool:
        running = self._running
        with running.changed:
            running.changed.wait_for(lambda: running.done or self._cancelled, self._left(deadline))
        if self._done:
            return True
        if self._cancelled:
            self._error = ended_by_us()
        elif running.done:
            self._value, self._error, self.report = running.value, running.error, running.report
        elif self._over is not None and time.monotonic() >= self._over:
            running.stop()
            self._error = CallTimeoutError(
                f"the call ran longer than its timeout_s of {self._limit_s:g} s; give it more, or less to do"
            )
        else:
            return False
        self._done = True
        return True

    def _left(self, deadline: float | None) -> float | None:
        """Return the seconds until *deadline* or the call's own, whichever is first."""
        both = [one for one in (deadline, self._over) if one is not None]
        return max(0.0, min(both) - time.monotonic()) if both else None

    def _interrupted(self) -> None:
        self.cancel()
        self._advance(0)

    def __del__(self) -> None:
        running = getattr(self, "_running", None)
        if running is not None:
            running.stop()


def _run(running: _Running, work: LocalWork, took: Took, started: float) -> None:
    """Carry a call out, in a thread of its own."""
    own = threading.get_ident()
    with _room:
        _running.add(own)
        beside = len(_running) > 1
        try:
            size, read_s, run_s = _carry_out(running, work, started)
            running.report |= {"nodes": {"here": running.report["shards"]}, "sent_bytes": 0, "seconds": read_s + run_s}
            if not running.stopped:
                took(size, read_s, run_s, beside or len(_running) > 1)
        except RemoteFunctionError as raised:
            running.error = rebuild(raised)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is this call's result
            running.error = error
        finally:
            _running.discard(own)
            running.end()


def _carry_out(running: _Running, work: LocalWork, started: float) -> tuple[int, float, float]:
    """Run the function on all that it gets; return bytes, and seconds of reading and, from the start, of the rest."""
    if work.mode is Mode.CALL:
        args, kwargs = work.arguments_of()
        running.value = answer(lambda: work.function(*args, **kwargs))
        running.report = {"shards": 1}
        return len(work.arguments), 0.0, time.perf_counter() - started
    reading = time.perf_counter()
    table, groups = work.rows()
    read_s = time.perf_counter() - reading if isinstance(work.data, Handle) else 0.0
    found: list[Any] = []
    waited = 0.0
    shown = shards.strip(table, keep_categories=work.options.categories or ())
    order = work.cut(shown, groups)
    for number, value in enumerate(work.answers(shown, order)):
        if work.mode is Mode.STREAM:
            before = time.perf_counter()
            running.add((number, value))
            waited += time.perf_counter() - before
        found.append(None if work.mode is Mode.STREAM else value)
        if running.stopped:
            break
    if work.mode is Mode.MAP and not running.stopped:
        running.value = shards.reassemble(dict(enumerate(found)), order)
    elif work.mode is Mode.SHARDS and not running.stopped:
        running.value = found[0] if work.whole else found
    running.report = {"shards": len(found), "rows": table.num_rows}
    return table.nbytes, read_s, time.perf_counter() - started - read_s - waited
