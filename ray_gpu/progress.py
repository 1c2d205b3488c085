"""One quiet progress line, in a terminal or a notebook. Writes to standard error; off with RAY_GPU_PROGRESS=0."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

#: Jobs shorter than this show nothing, seconds.
_QUIET_S = 0.5
_WIDTH = 24


class Progress:
    """Shows rows done, percent and throughput of one call on one line that ends at 100 %."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name = name
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._last = 0.0
        self._shown = False
        self._event: dict[str, Any] = {}

    def update(self, event: dict[str, Any]) -> None:
        """Take a ``progress`` event: rows done, of how many, bytes sent."""
        if event.get("event") == "lost":
            self._stream.write(f"\r{self._name}: lost node {event.get('node')} ({event.get('reason')}); its shards go "
                               "to another lease\n")
            return
        if event.get("event") != "progress":
            return
        self._event = event
        now = time.monotonic()
        if now - self._started > _QUIET_S and now - self._last > 0.1:
            self._last = now
            self._write()

    def end(self) -> None:
        """Finish the line, if it was ever shown."""
        if self._shown:
            self._write()
            self._stream.write("\n")
            self._stream.flush()

    def _write(self) -> None:
        rows, total, size = (int(self._event.get(name, 0)) for name in ("rows", "of", "bytes"))
        share = rows / total if total else 1.0
        elapsed = max(1e-9, time.monotonic() - self._started)
        bar = "#" * round(share * _WIDTH)
        self._stream.write(f"\r{self._name} [{bar:<{_WIDTH}}] {share:4.0%}  {rows:,} of {total:,} rows  "
                           f"{size / elapsed / 1e6:,.0f} MB/s sealed")
        self._stream.flush()
        self._shown = True


def wanted() -> bool:
    """Tell whether the user wants progress lines."""
    return os.environ.get("RAY_GPU_PROGRESS", "1") not in ("0", "off", "no")
