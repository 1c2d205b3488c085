"""Predicts how long a call takes on GPU nodes and here, from what calls took before. Pure: no clock, no I/O.

What is predicted of a call, in seconds::

    remote = round trip + bytes · (link and sealing) + work / GPU actors
             + opening a lease, if one is missing + sending the function, the first time
    local  = reading the rows, if the gateway has them + work here

*Work* is a line over the data's bytes, fitted to what the function took; for calls on arguments alone over theirs.
Where it was seen in one place only, the other's is that by a node's speed, as a reference shows that ran in both.
A function that was called on the same arguments before is predicted by these calls, and else by all that it took.
Nothing else is known of it: one whose work does not grow with its rows, or depends on the values of new arguments, is
predicted badly until it was seen at that size and with these. Calls that run at the same time, and shards that are open
still (``resident``), are not looked at.
"""

from __future__ import annotations

import dataclasses
import statistics
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

Place = Literal["remote", "local"]
#: What leases are opened for: pool, share of a GPU, environment.
Terms = tuple[str, float, str]
K = TypeVar("K")
#: What is kept of each function: its last runs in each place.
_KEPT_RUNS = 8
#: Functions that are remembered, and pairs of function and arguments.
_KEPT_FUNCTIONS = 256
#: Rows of fewer bytes say nothing of what a byte costs.
_TELLING_BYTES = 1 << 20
#: A lease that no call used for so long is taken to be gone, seconds; gateways give them back after 60, or sooner to
#: whoever has no room.
WARM_S = 55.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What calls take besides computing, as it was measured; seconds."""

    #: A call on arguments alone whose function does nothing.
    trip_s: float = 0.0
    #: The same on data; ``None``: no such call was seen yet, and it counts as ``trip_s``.
    shards_s: float | None = None
    #: Opening a lease.
    open_s: float = 0.0
    #: A function's first call: policy's decision, the ledger's entry of it, sending and loading the function.
    fresh_s: float = 0.0
    #: Gathering, sealing, sending and opening, for each byte of data.
    sent_s_per_byte: float = 0.0
    #: Getting rows from the gateway: what any read takes, and each byte of them.
    read_s: float = 0.0
    read_s_per_byte: float = 0.0
    #: Seconds of a node for each second of the same work here.
    node_s_per_local_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is known of a call before it runs."""

    #: Of the rows that the function gets, or of the arguments where there are none.
    size_bytes: int
    #: GPU actors that share the work.
    actors: int = 1
    #: Whether there are rows.
    rows: bool = True
    #: Whether the gateway has them, not this process.
    in_gateway: bool = False
    #: Whether a lease has to be opened first.
    opens: bool = False
    #: Whether it is the function's first call to a node.
    fresh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """Where a call is faster, and why.

    Attributes:
        predicted_remote_s: Seconds on GPU nodes; ``None`` where nothing is known yet.
        predicted_local_s: Seconds here; ``None`` where nothing is known yet, or it cannot run here.
        chosen: Where ``where="auto"`` runs it.
        reason: In words, such as ``local is faster: 12 ms against 31 ms``.
    """

    predicted_remote_s: float | None
    predicted_local_s: float | None
    chosen: Place
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Work:
    """A line: seconds by bytes. Neither is below 0, so more bytes never take less."""

    fixed_s: float
    s_per_byte: float

    def at(self, size_bytes: int) -> float:
        """Return the seconds for so many bytes."""
        return self.fixed_s + self.s_per_byte * size_bytes

    def times(self, factor: float) -> Work:
        """Return the same at another speed."""
        return Work(self.fixed_s * factor, self.s_per_byte * factor)


def fit(runs: Iterable[tuple[Load, float]]) -> Work:
    """Return the line through *runs*, pairs of load and seconds of work, that is best in proportion to the seconds.

    Sizes within a factor of 2 of each other say nothing about what does not grow with the bytes. Then all of it does
    where there are rows, and nothing where there are arguments alone.

    Raises:
        ValueError: There are none.
    """
    loads, took = zip(*runs, strict=True)
    sizes = np.array([load.size_bytes for load in loads], dtype=float)
    seconds = np.maximum(np.array(took, dtype=float), 1e-9)
    if sizes.max() >= 2 * max(1.0, sizes.min()):
        slope, fixed = np.polyfit(sizes, seconds, 1, w=1 / seconds)
        if slope >= 0 and fixed >= 0:
            return Work(float(fixed), float(slope))
        if slope < 0:
            return Work(float(np.median(seconds)), 0.0)
    elif not loads[-1].rows:
        return Work(float(np.median(seconds)), 0.0)
    return Work(0.0, float(np.median(seconds / np.maximum(sizes, 1.0))))


def overhead_s(link: Link, load: Load) -> float:
    """Return what a call takes on GPU nodes besides computing."""
    trip = max(link.trip_s, link.shards_s or 0.0) if load.rows else link.trip_s
    once = (link.open_s if load.opens else 0.0) + (link.fresh_s if load.fresh else 0.0)
    return trip + link.sent_s_per_byte * load.size_bytes + once


def remote_s(link: Link, work: Work, load: Load) -> float:
    """Return what a call takes on GPU nodes."""
    return overhead_s(link, load) + work.at(load.size_bytes) / load.actors


def local_s(link: Link, work: Work, load: Load) -> float:
    """Return what a call takes here."""
    reading = link.read_s + link.read_s_per_byte * load.size_bytes if load.in_gateway else 0.0
    return reading + work.at(load.size_bytes)


def decide(remote: float | None, local: float | None, *, refused: str = "") -> Advice:
    """Return where to run, by predicted seconds.

    Args:
        remote: On GPU nodes; ``None``: not known.
        local: Here; ``None``: not known.
        refused: Why it cannot run here, if so.
    """
    if refused:
        return Advice(predicted_remote_s=remote, predicted_local_s=None, chosen="remote", reason=refused)
    if remote is None or local is None:
        known = f"{_shown(local)} here" if local is not None else f"{_shown(remote)} there" if remote else "nothing"
        reason = f"remote, to measure it: {known} is known so far"
        return Advice(predicted_remote_s=remote, predicted_local_s=local, chosen="remote", reason=reason)
    # What is as fast here does not leave.
    chosen: Place = "local" if local <= remote else "remote"
    low, high = sorted((remote, local))
    reason = f"{chosen} is faster: {_shown(low)} against {_shown(high)}"
    return Advice(predicted_remote_s=remote, predicted_local_s=local, chosen=chosen, reason=reason)


def _shown(seconds: float) -> str:
    """Return seconds in words, in two digits."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit * 0.995:
            amount = seconds / unit
            return f"{amount:.0f} {name}" if amount >= 9.95 else f"{amount:.1f} {name}"
    return f"{seconds * 1e6:.0f} µs"


@dataclass(slots=True)
class Runs:
    """What a function took before, on some arguments or on any."""

    #: Loads with nothing to open, and seconds.
    remote: deque[tuple[Load, float]] = field(default_factory=lambda: deque(maxlen=_KEPT_RUNS))
    #: Loads, and seconds without reading.
    local: deque[tuple[Load, float]] = field(default_factory=lambda: deque(maxlen=_KEPT_RUNS))
    #: What it raised when it was tried here on a few rows.
    raised: str = ""
    #: Where it was last said to run.
    said: Place | None = None
    #: Whether it was called on a node.
    sent: bool = False


#: Digest of a function with its options, and a hash of the arguments that it is called on besides data.
Key = tuple[str, int]


class Advisor:
    """What a session knows of its links and functions. Thread-safe."""

    def __init__(self) -> None:
        #: What calls to a pool take, by its name; ``""``: the zone's first one. Not there before it was measured.
        self.links: dict[str, Link] = {}
        #: Why a pool could not be measured, and when that was.
        self.unmeasured: dict[str, tuple[str, float]] = {}
        #: Whether anybody asked for advice: before that nothing is remembered, so that small calls stay small.
        self.asked = False
        #: What was last seen of a part of a link, by pool and name of the part: medians count.
        self._seen: dict[tuple[str, str], deque[float]] = {}
        self._functions: dict[str, Runs] = {}
        self._calls: dict[Key, Runs] = {}
        #: Leases that are open, by what was asked for, and when they were last used.
        self._warm: dict[Terms, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def runs(self, key: Key) -> Runs:
        """Return what a function took, on any arguments."""
        with self._lock:
            return _of(self._functions, key[0])

    def exact(self, key: Key) -> Runs:
        """Return what it took on just these arguments."""
        with self._lock:
            return _of(self._calls, key)

    def _both(self, key: Key) -> tuple[Runs, Runs]:
        return _of(self._functions, key[0]), _of(self._calls, key)

    def _nearest(self, key: Key) -> Runs:
        """Return what it took on these arguments, or else on any."""
        exact = self._calls.get(key)
        return exact if exact and (exact.local or exact.remote) else _of(self._functions, key[0])

    def leases(self, terms: Terms, now: float) -> int:
        """Return how many leases are open for a pool and a share of a GPU; *now* in seconds of any clock."""
        count, last = self._warm.get(terms, (0, now))
        return count if now - last < WARM_S else 0

    def saw_leases(self, terms: Terms, opened: int, now: float) -> None:
        """Take what a call used: how many leases it opened, besides those that were open."""
        with self._lock:
            self._warm[terms] = (max(1, self.leases(terms, now) + opened), now)

    def saw_local(self, key: Key, load: Load, seconds: float) -> None:
        """Take what a function took here, without reading its rows."""
        with self._lock:
            for runs in self._both(key):
                runs.local.append((load, seconds))

    def saw_asking(self, pool: str, seconds: float) -> None:
        """Take what it took to ask the gateway about rows, as long as none were read."""
        with self._lock:
            link = self.links.get(pool)
            if link is not None and not link.read_s:
                self.links[pool] = dataclasses.replace(link, read_s=seconds)

    def saw_read(self, pool: str, size_bytes: int, seconds: float) -> None:
        """Take what it took to get rows from the gateway."""
        with self._lock:
            link = self.links.get(pool)
            if link is None:
                return
            if size_bytes >= _TELLING_BYTES:
                self._set(pool, "read_s_per_byte", max(0.0, seconds - link.read_s) / size_bytes)
            else:
                self._set(pool, "read_s", max(0.0, seconds - link.read_s_per_byte * size_bytes))

    def _set(self, pool: str, part: str, seconds: float) -> None:
        """Take what was seen of a part of a link; with the lock held."""
        seen = self._seen.setdefault((pool, part), deque(maxlen=_KEPT_RUNS))
        seen.append(seconds)
        self.links[pool] = dataclasses.replace(self.links[pool], **{part: statistics.median(seen)})

    def saw_opening(self, key: Key, pool: str, load: Load, seconds: float) -> None:
        """Take what a call took on GPU nodes, for which leases were opened: so much longer than without."""
        with self._lock:
            _of(self._functions, key[0]).sent = True
            link = self.links.get(pool)
            if link is not None:
                work = self._remote_work(self._nearest(key), link) or Work(0.0, 0.0)
                opening = max(0.0, seconds - remote_s(link, work, load))
                self._set(pool, "open_s", opening)

    def saw_remote(self, key: Key, pool: str, load: Load, seconds: float) -> None:
        """Take what a call took on GPU nodes, of which nothing was opening a lease."""
        with self._lock:
            link = self.links.get(pool)
            if link is not None and load.rows:
                self._correct(pool, link, self._remote_work(self._nearest(key), link), load, seconds)
            for runs in self._both(key):
                runs.remote.append((load, seconds))
                runs.sent = True

    def _correct(self, pool: str, link: Link, work: Work | None, load: Load, seconds: float) -> None:
        """Take what a call on data shows of the link; with the lock held.

        Args:
            work: What computing was expected to take, if anything was.
        """
        seconds = max(0.0, seconds - (link.fresh_s if load.fresh else 0.0))
        if link.trip_s + link.sent_s_per_byte * load.size_bytes > seconds:
            # It took no longer than this, so no part of it does.
            per_byte = max(0.0, seconds - link.trip_s) / max(1, load.size_bytes)
            self.links[pool] = link = dataclasses.replace(link, sent_s_per_byte=per_byte)
        # Where other things take most of the time, what is left is the error of their prediction.
        if work is not None and load.size_bytes < _TELLING_BYTES:
            left = seconds - link.sent_s_per_byte * load.size_bytes - work.at(load.size_bytes) / load.actors
            if left > seconds / 2:
                self._set(pool, "shards_s", left)

    def predict(self, key: Key, pool: str, load: Load, *, refused: str = "") -> Advice:
        """Return where a call is faster.

        Args:
            key: Of its function and arguments.
            pool: Where it would go.
            load: What is known of it.
            refused: Why it cannot run here, if so.
        """
        with self._lock:
            link, runs = self.links.get(pool), self._nearest(key)
            there, here = self._remote_work(runs, link), self._local_work(runs, link)
        known = link or Link()
        remote = None if there is None else remote_s(known, there, load)
        local = None if here is None else local_s(known, here, load)
        return decide(remote, local, refused=refused)

    def _remote_work(self, runs: Runs, link: Link | None) -> Work | None:
        if runs.remote:
            known = link or Link()
            return fit(
                (load, max(0.0, seconds - overhead_s(known, load)) * load.actors) for load, seconds in runs.remote
            )
        if link is None or not runs.local:
            return None
        return fit(runs.local).times(link.node_s_per_local_s)

    def _local_work(self, runs: Runs, link: Link | None) -> Work | None:
        if runs.local:
            return fit(runs.local)
        there = self._remote_work(runs, link)
        if link is None or there is None:
            return None
        return there.times(1 / max(link.node_s_per_local_s, 1e-9))


def _of(kept: dict[K, Runs], key: K) -> Runs:
    """Return what is kept by a key, from now on if it was not; the oldest makes room."""
    while key not in kept and len(kept) >= _KEPT_FUNCTIONS:
        del kept[next(iter(kept))]
    return kept.setdefault(key, Runs())
