"""What each GPU node was given of each data set, where policy bounds that. This module does I/O.

Counted over all sessions of the gateway, in windows of time, and written to the ledger before it is sent: a gateway
that starts again goes on counting where the last one was. How cells are made and given is :mod:`zones.spread`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import os
import secrets
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from zones import spread
from zones.errors import ConfigError
from zones.ledger import Ledger
from zones.model import NodeShare, Obligations, Shuffle
from zones.plan import Index

_KEY_BYTES = 32


@dataclass(slots=True, kw_only=True)
class _Window:
    """One data set in one window of time."""

    #: SHA-256 of all of it, hexadecimal.
    identity: str
    #: When it begins, UTC seconds since the epoch.
    begins: int
    #: How long it is, seconds.
    length_s: int
    #: Names that it had in the catalog.
    names: set[str] = field(default_factory=set)
    #: Node to system of cells to the cells that it was given, and to how much of all rows those are, in percent.
    held: dict[str, dict[str, set[int]]] = field(default_factory=dict)
    percents: dict[str, dict[str, float]] = field(default_factory=dict)
    #: Those made last, by what they were made of: calls over one data set are often alike.
    cells: dict[tuple[str, str], Cells] = field(default_factory=dict)


class Shares:
    """Thread-safe.

    Args:
        ledger: Where shares are written.
        path: The ledger's file. Beside it lies the key that cells are made with.
        now: UTC seconds since the epoch.
    """

    def __init__(self, ledger: Ledger, path: Path, now: int) -> None:
        self._ledger = ledger
        self._key = _key(path.with_name("cells.key"))
        self._lock = threading.Lock()
        #: Held by whoever looks what was given and gives more.
        self._giving = threading.Lock()
        self._windows: dict[tuple[str, int, int], _Window] = {}
        for entry in ledger.find("share"):
            if entry["window"] + entry["window_s"] > now:
                where = (entry["dataset_digest"], entry["window"], entry["window_s"])
                window = self._window(*where, entry["dataset"])
                cells = window.held.setdefault(entry["node"], {}).setdefault(entry["system"], set())
                cells |= _cells(entry["cells"])
                share = 100 * entry["rows"] / max(1, entry["of_rows"])
                window.percents.setdefault(entry["node"], {})[entry["system"]] = share

    def _window(self, identity: str, begins: int, length_s: int, name: str) -> _Window:
        made = _Window(identity=identity, begins=begins, length_s=length_s)
        found = self._windows.setdefault((identity, begins, length_s), made)
        found.names |= {name} if name else set()
        return found

    def _versions(self, window: _Window) -> list[_Window]:
        """Return the windows of what had one of a window's names at another time: its file was changed meanwhile."""
        with self._lock:
            return [
                other
                for other in self._windows.values()
                if other is not window
                and (other.begins, other.length_s) == (window.begins, window.length_s)
                and other.names & window.names
            ]

    def book(
        self, dataset: str, identity: str, share: NodeShare, obligations: Obligations, of_row: Index, now: int
    ) -> Book:
        """Return what nodes were given of a data set in the window that *now* is in.

        Args:
            dataset: Its name, for people.
            identity: SHA-256 of all of it, hexadecimal.
            share: The policy's bound.
            obligations: Whether neighbours are kept.
            of_row: Unit of each row of the whole.
            now: UTC seconds since the epoch.
        """
        begins = now - now % share.window_s
        with self._lock:
            over = [where for where in self._windows if where[1] + where[2] <= now]
            for where in over:
                del self._windows[where]
            window = self._window(identity, begins, share.window_s, dataset)
        ordered = obligations.shuffle is Shuffle.NONE
        told = f"{identity} {begins} {share.window_s} {ordered} {hashlib.sha256(of_row.data).hexdigest()}"
        cells = window.cells.get((dataset, told))
        if cells is None:
            key = hmac.digest(self._key, told.encode(), "sha256")
            cells = _made(dataset, hashlib.sha256(key).hexdigest()[:16], key, of_row, ordered=ordered)
            window.cells = {(dataset, told): cells}
        return Book(
            self._ledger, window, cells, share.percent, versions=lambda: self._versions(window), lock=self._giving
        )


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The cells of a data set."""

    #: The data set's name, for people.
    dataset: str
    #: Names how they were made. Others, of an older key or for another shuffle, count in full.
    system: str
    #: Cell of each unit of the whole.
    of_unit: Index
    #: Rows of the whole in each cell.
    rows: Index


class Book:
    """One data set in one window, cut into cells in one way. Use it as a context manager to be alone with it."""

    def __init__(
        self,
        ledger: Ledger,
        window: _Window,
        cells: Cells,
        percent: int,
        *,
        versions: Callable[[], list[_Window]],
        lock: threading.Lock,
    ) -> None:
        """Use :meth:`Shares.book`."""
        self._ledger, self._window, self._percent = ledger, window, percent
        self._versions, self._lock = versions, lock
        self.cells = cells

    def __enter__(self) -> Book:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def over(self) -> int:
        """When counting begins anew, UTC seconds since the epoch."""
        return self._window.begins + self._window.length_s

    def nodes_needed(self) -> int:
        """Return how many nodes can hold all of it, if they were given nothing yet."""
        return math.ceil(len(self.cells.rows) / max(1, spread.most_cells(self.cells.rows, self._percent)))

    def held(self, node: str) -> set[int]:
        """Return the cells that a node was given."""
        return self._window.held.get(node, {}).get(self.cells.system, set())

    def most(self, node: str) -> int:
        """Return how many cells a node may hold."""
        left = self._percent - self._elsewhere(node)
        return spread.most_cells(self.cells.rows, left) if left > 0 else 0

    def _elsewhere(self, node: str) -> float:
        """Return how much of all rows a node was given by other systems of cells, and of other versions, in percent."""
        percents = self._window.percents.get(node, {})
        others = sum(percent for system, percent in percents.items() if system != self.cells.system)
        return others + sum(sum(other.percents.get(node, {}).values()) for other in self._versions())

    def assign(self, wanted: Collection[int], nodes: Collection[str]) -> tuple[dict[str, list[int]], list[int]]:
        """Give each cell to one of *nodes*, and return those that none may have; nothing is noted yet."""
        held = {node: self.held(node) for node in nodes}
        return spread.assign(wanted, held, {node: self.most(node) for node in nodes})

    def fits(self, node: str, cells: Collection[int]) -> bool:
        """Say whether a node may be given these cells too."""
        return len(self.held(node) | set(cells)) <= self.most(node)

    def give(self, given: Mapping[str, Collection[int]]) -> None:
        """Note what nodes are given, before it is sent.

        Raises:
            LedgerUnavailableError: It could not be written down; nothing may be sent.
        """
        for node, cells in given.items():
            new = set(cells) - self.held(node)
            if not new:
                continue
            self._ledger.append(
                {
                    "kind": "share",
                    "dataset": self.cells.dataset,
                    "dataset_digest": self._window.identity,
                    "node": node,
                    "window": self._window.begins,
                    "window_s": self._window.length_s,
                    "system": self.cells.system,
                    "cells": _bits(new),
                    "rows": self._rows(node, new),
                    "of_rows": int(self.cells.rows.sum()),
                    "percent": math.ceil(self.percent(node, new)),
                }
            )
            percents = self._window.percents.setdefault(node, {})
            percents[self.cells.system] = self.percent(node, new) - self._elsewhere(node)
            self._window.held.setdefault(node, {}).setdefault(self.cells.system, set()).update(new)

    def percent(self, node: str, more: Collection[int] = ()) -> float:
        """Return how much of all rows a node holds, with *more* cells, in percent, whichever system they are of."""
        return 100 * self._rows(node, more) / max(1, int(self.cells.rows.sum())) + self._elsewhere(node)

    def _rows(self, node: str, more: Collection[int]) -> int:
        return int(self.cells.rows[sorted(self.held(node) | set(more))].sum())


def _made(dataset: str, system: str, key: bytes, of_row: Index, *, ordered: bool) -> Cells:
    unit_rows = np.bincount(of_row, minlength=1) if len(of_row) else np.zeros(0, np.int64)
    unit_cells = spread.cells(len(unit_rows), key, ordered=ordered)
    rows = np.bincount(unit_cells, weights=unit_rows, minlength=spread.count(len(unit_rows))).astype(np.int64)
    return Cells(dataset, system, unit_cells, rows)


def _key(path: Path) -> bytes:
    """Return the key in a file, which is made if it is not there. The ledger's lock is held: nobody else makes it.

    Raises:
        ConfigError: The file holds none.
    """
    with contextlib.suppress(FileNotFoundError):
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            what = f"{path} holds no key; remove it: what nodes were given is counted all the same"
            raise ConfigError(what, file=str(path))
        return key
    key, partial = secrets.token_bytes(_KEY_BYTES), path.with_name(f"{path.name}.new")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return key


def _bits(cells: Collection[int]) -> str:
    """Return cells as a number in hexadecimal: bit *n* is cell *n*."""
    return f"{sum(1 << cell for cell in cells):x}"


def _cells(bits: str) -> set[int]:
    number = int(bits, 16)
    return {cell for cell in range(number.bit_length()) if number >> cell & 1}
