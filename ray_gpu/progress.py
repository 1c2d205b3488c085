"""One quiet progress line, in a terminal or a notebook. Writes to standard error; off with RAY_GPU_PROGRESS=0.

A stream that keeps what it is given, such as a log file, gets the finished line alone.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

#: Jobs shorter than this show nothing, seconds.
QUIET_S = 0.5
#: Of the bar, and of the function's name at most: the whole line fits a terminal of 80 columns, or it would not redraw.
_WIDTH = 14


class Progress:
    """Shows rows done, percent and throughput of one call on one line that ends at 100 %."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self._name = name[:_WIDTH]
        self._stream = stream or sys.stderr
        self._live = _redraws(self._stream)
        self._started = time.monotonic()
        self._last = 0.0
        self._shown = ""
        self._event: dict[str, Any] = {}

    def update(self, event: dict[str, Any]) -> None:
        """Take a ``progress`` event: rows done, of how many, bytes sent."""
        if event.get("event") == "lost":
            self.clear()
            node, reason = event.get("node"), str(event.get("reason"))
            what = (
                f"asking another node than {node}"
                if reason.startswith("its answer was refused")
                else f"lost node {node}"
            )
            self._stream.write(f"{self._name}: {what} ({reason}); its shards go to another lease\n")
            return
        if event.get("event") != "progress":
            return
        self._event = event
        now = time.monotonic()
        if now - self._started > QUIET_S and now - self._last > 0.1:
            self._last = now
            if self._live:
                self._write()

    def end(self) -> None:
        """Finish the line, if the job was long enough for one."""
        if self._last:
            self._write()
            self._stream.write("\n")
            self._stream.flush()

    def _write(self) -> None:
        rows, total, size = (int(self._event.get(name, 0)) for name in ("rows", "of", "bytes"))
        share = rows / total if total else 1.0
        elapsed = max(1e-9, time.monotonic() - self._started)
        bar = "#" * round(share * _WIDTH)
        rate = size / elapsed / 1e6
        text = f"{self._name} [{bar:<{_WIDTH}}] {share:4.0%}  {rows:,} of {total:,} rows  {rate:,.0f} MB/s"
        # Spaces go over what a longer text left behind.
        self._stream.write(f"\r{text:<{len(self._shown)}}" if self._live else text)
        self._stream.flush()
        self._shown = text

    def clear(self) -> None:
        """Take the line away for a moment, so that something else can be written; the next update shows it again."""
        if self._live and self._shown:
            self._stream.write(f"\r{'':<{len(self._shown)}}\r")
            self._shown = ""


def tell(name: str, text: str, stream: TextIO | None = None) -> None:
    """Write one line about a function."""
    stream = stream or sys.stderr
    stream.write(f"{name[:_WIDTH]}: {text}\n")
    stream.flush()


def _redraws(stream: TextIO) -> bool:
    """Tell whether a carriage return goes over the line, as in terminals and in Jupyter's output, or is kept."""
    return stream.isatty() or type(stream).__module__.partition(".")[0] == "ipykernel"


def wanted() -> bool:
    """Tell whether the user wants progress lines."""
    return os.environ.get("RAY_GPU_PROGRESS", "1") not in ("0", "off", "no")
