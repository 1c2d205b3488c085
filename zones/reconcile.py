"""Does the ledger say all that the kernel counted? Pure: both sides are handed in. docs/ledger.md.

Everything that leaves on a lease's connection is a sealed message. The ledger counts functions, arguments, calls and
shards, padded and framed. What it does not count is documented framing, of one size each: the knock that asks for the
keeper's hello, and control messages, whose number is in the ``lease-end`` entry. So the kernel's count of a connection
is known to the byte, and one byte more is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from zones.header import HEADER_BYTES, MIN_PADDED_BYTES, sealed_size

#: Bytes of a knock, and of a control message.
SMALL_BYTES = HEADER_BYTES + sealed_size(MIN_PADDED_BYTES)
#: Knocks that a keeper may leave without an answer, where strangers crowd it out: the gateway tries for 3 s.
MOST_KNOCKS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A connection that ended, as the kernel counted it."""

    #: ``address:port`` of the end that opened it, and of the other.
    local: str
    remote: str
    #: Bytes of data that were sent from there, without those sent again.
    sent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One connection, on both sides."""

    local: str
    remote: str
    #: Lease, and its node; ``""`` where the ledger knows of none.
    lease: str
    node: str
    #: By the ledger: calls, and what is framing.
    ledger_bytes: int
    framing_bytes: int
    #: By the kernel; ``None`` where it counted no such connection.
    kernel_bytes: int | None
    #: Whether the lease ended as it should; of one that was lost some of what the ledger has did not leave.
    whole: bool

    @property
    def problem(self) -> str:
        """What does not fit; ``""`` when all does."""
        known = self.ledger_bytes + self.framing_bytes
        if self.kernel_bytes is None:
            return "the kernel counted no such connection: was the count running all the time?"
        if self.kernel_bytes > known:
            return f"{self.kernel_bytes - known} bytes left that the ledger does not have"
        if self.whole and self.kernel_bytes < known:
            return f"{known - self.kernel_bytes} bytes are in the ledger that did not leave"
        return ""


def reconcile(entries: Iterable[Mapping[str, Any]], counted: Iterable[Counted], *, since: str = "") -> Iterator[Line]:
    """Yield each connection of a ledger's leases, and each that went to one of their endpoints and is in no entry.

    Args:
        entries: All of a ledger, in order.
        counted: What the kernel counted.
        since: Leases that ended before this UTC time, as entries have it, are left out.
    """
    calls: dict[str, int] = {}
    leases: dict[tuple[str, str], list[tuple[Mapping[str, Any], int]]] = {}
    for entry in entries:
        kind = entry["kind"]
        if kind == "completion":
            calls[entry["lease"]] = calls.get(entry["lease"], 0) + entry["bytes"]
        elif kind == "recovered":
            calls[entry["lease"]] = calls.get(entry["lease"], 0) + entry["at_most_bytes"]
        elif kind == "lease-end" and entry["time"] >= since:
            local, remote = entry["connection"]
            leases.setdefault((local, remote), []).append((entry, calls.get(entry["lease"], 0)))
    endpoints = {remote for _, remote in leases}
    unknown, knocks = [], Counter[str]()
    for one in counted:
        # Two leases may have had the same two ends, one after the other.
        found = leases.get((one.local, one.remote))
        if found:
            yield _line((one.local, one.remote), *found.pop(0), one.sent)
        elif one.remote in endpoints and one.sent:
            knocks[one.remote] += one.sent == SMALL_BYTES
            if one.sent != SMALL_BYTES or knocks[one.remote] > MOST_KNOCKS:
                unknown.append(one)
    for names, some in leases.items():
        for entry, sent in some:
            yield _line(names, entry, sent, None)
    for one in unknown:
        yield Line(
            local=one.local,
            remote=one.remote,
            lease="",
            node="",
            ledger_bytes=0,
            framing_bytes=0,
            kernel_bytes=one.sent,
            whole=True,
        )


def framing_bytes(entry: Mapping[str, Any]) -> int:
    """Return the bytes of the knock and the control messages of a lease, by its ``lease-end`` entry."""
    return SMALL_BYTES * (1 + int(entry["controls"]))


def _line(names: tuple[str, str], entry: Mapping[str, Any], calls: int, kernel: int | None) -> Line:
    return Line(
        local=names[0],
        remote=names[1],
        lease=entry["lease"],
        node=entry["node"],
        ledger_bytes=calls,
        framing_bytes=framing_bytes(entry),
        kernel_bytes=kernel,
        whole=entry["outcome"] == "done",
    )
