"""Notices that nobody waits for a call any more. This module does I/O: it looks at the callers' sockets."""

from __future__ import annotations

import select
import socket
import threading
import time

from ray_gpu import job
from zones.errors import CallCancelledError, CallTimeoutError

#: How often running calls are looked at, seconds.
WATCH_INTERVAL_S = 0.05


class Watchdog:
    """Notices that the caller of a running call cancels it, goes away, or waited long enough.

    One thread for all calls: a thread for each would cost more than a small call does.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[job.Cancel, tuple[socket.socket, float | None]] = {}

    def watch(self, sock: socket.socket, timeout_s: float | None, cancelled: job.Cancel) -> None:
        """Watch a call from now on."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._calls[cancelled] = (sock, deadline)

    def leave(self, cancelled: job.Cancel) -> None:
        """Watch a call no more: it is over."""
        with self._lock:
            del self._calls[cancelled]
        cancelled.finish()

    def run(self) -> None:
        """Look at every running call, for ever."""
        while True:
            time.sleep(WATCH_INTERVAL_S)
            with self._lock:
                calls = list(self._calls.items())
            for cancelled, (sock, deadline) in calls:
                self._look(cancelled, sock, deadline)

    @staticmethod
    def _look(cancelled: job.Cancel, sock: socket.socket, deadline: float | None) -> None:
        if deadline is not None and time.monotonic() > deadline:
            cancelled.cancel(
                CallTimeoutError(
                    "the call did not finish within its timeout and was stopped; "
                    "give it more time with .options(timeout_s=...)"
                )
            )
        # Not select(), which knows no descriptor above 1023.
        poller = select.poll()
        try:
            poller.register(sock, select.POLLIN)
            gone = bool(poller.poll(0))
        except (OSError, ValueError):
            gone = True
        if gone:
            cancelled.cancel(CallCancelledError("the call was cancelled"))
