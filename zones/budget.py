"""What ledger entries say: their kinds, what leaves, and the budget that an intent reserves.

A budget lets many calls share one durable write. It is drawn on before bytes leave, so what the ledger reserves is
never less than what left. No I/O here: the ledger hands in what writes. docs/ledger.md is the specification.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zones.errors import BudgetSpentError
from zones.model import EgressRequest, canonical

#: Largest entry, bytes. A thousand long column names fit; a purpose that fills the disk does not.
MAX_ENTRY_BYTES = 256 * 1024
#: Largest entry that keeps a policy, bytes: a catalog may have many columns.
MAX_POLICY_BYTES = 16 << 20
_EGRESS_FIELDS = frozenset({"person", "session", "purpose", "dataset", "columns", "classes", "function", "pool"})
#: Kinds that :meth:`Ledger.append` takes, and the fields that each must have.
REQUIRED_FIELDS: Mapping[str, frozenset[str]] = {
    "session-start": frozenset({"person", "session"}),
    "session-end": frozenset({"person", "session"}),
    "lease-end": frozenset(
        {"person", "session", "lease", "node", "outcome", "grant", "connection", "controls", "receipt"}
    ),
    "checkpoint": frozenset({"note"}),
    "policy": frozenset({"policy_digest", "files"}),
    "share": frozenset(
        {
            *("dataset", "dataset_digest", "node", "window", "window_s"),
            *("system", "cells", "rows", "of_rows", "percent"),
        }
    ),
    "refusal": frozenset({"person", "session", "decision_entry", "obligations", "reasons"}),
    "decision": _EGRESS_FIELDS | {"decision", "rules", "reasons", "obligations", "policy_digest"},
}
_RESERVED = frozenset({"seq", "time"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Egress:
    """What leaves, for whom and where to: the fields that decision and intent entries share."""

    request: EgressRequest
    session: str
    policy_digest: str
    dataset_digest: str = ""
    #: What the data set comes from, and the digests of what lists its rounds: written with the decision.
    lineage: Mapping[str, Any] = field(default_factory=dict)
    #: Columns whose category values leave as well as their codes: written with the decision.
    categories: Sequence[str] = ()
    environment_digest: str = ""
    #: Rows asked for; 0 where no table is sent.
    rows: int = 0
    node: str = ""
    lease: str = ""
    #: Sandbox level that the keeper's hello gave, and the ids of what it lacks.
    level: str = ""
    degradations: Sequence[str] = ()
    #: Share of a GPU that each lease asks for, in thousandths: the one option of a call that nodes are told.
    gpu_milli: int = 0

    def fields(self) -> dict[str, Any]:
        """Return the entry fields, JSON types, sets sorted."""
        asked = self.request
        return {
            "person": asked.person,
            "groups": sorted(asked.groups),
            "session": self.session,
            "purpose": asked.purpose,
            "dataset": asked.dataset,
            "dataset_digest": self.dataset_digest,
            "columns": sorted(asked.columns),
            "classes": sorted(asked.classes),
            "segments": sorted(asked.segments),
            "rows": self.rows,
            "function": asked.function_digest,
            "function_reviewed": asked.function_reviewed,
            "environment_digest": self.environment_digest,
            "policy_digest": self.policy_digest,
            "pool": asked.pool,
            "node": self.node,
            "lease": self.lease,
            "level": self.level,
            "degradations": sorted(self.degradations),
            "gpu_milli": self.gpu_milli,
        }


class Budget:
    """What one intent entry allows to leave. Thread-safe; a draw costs about a microsecond."""

    def __init__(
        self, write: Callable[[Sequence[Mapping[str, Any]]], int], *, intent: int, entry: Mapping[str, Any]
    ) -> None:
        """Use :meth:`Ledger.intend`."""
        #: Number of the intent entry.
        self.intent = intent
        self._write = write
        self._entry = entry
        self._calls = 0
        self._bytes = 0
        self._ended = False
        self._completion = 0
        self._guard = threading.Lock()

    def draw(self, calls: int, bytes_: int) -> None:
        """Take *calls* and *bytes_* from the budget, before they leave. All or nothing; never given back.

        Raises:
            BudgetSpentError: They do not fit, or the budget is settled. Nothing may leave on it.
        """
        if calls < 0 or bytes_ < 0:
            raise ValueError("a draw is not negative")
        with self._guard:
            fits = self._calls + calls <= self._entry["calls"] and self._bytes + bytes_ <= self._entry["bytes"]
            if self._ended or not fits:
                raise BudgetSpentError(f"intent {self.intent} does not cover this call; write another intent")
            self._calls += calls
            self._bytes += bytes_

    @property
    def drawn(self) -> tuple[int, int]:
        """Calls and bytes drawn so far."""
        with self._guard:
            return self._calls, self._bytes

    def settle(self, *, outcome: str, rows: int = 0, receipt: Mapping[str, Any] | None = None) -> int:
        """End the budget and write what was drawn. It is on disk when this returns; writers share an fsync.

        Args:
            outcome: ``"done"``, or in one word why not (``"failed"``, ``"cancelled"``, ``"lost"``).
            rows: Rows that left.
            receipt: The custodian's signed receipt, JSON types; ``None`` when it gave none.

        Returns:
            Number of the completion entry; the same again when called again.

        Raises:
            LedgerUnavailableError: It could not be written. The budget has ended all the same; settle it again.
        """
        with self._guard:
            self._ended = True
            if not self._completion:
                self._completion = self._write([self._closing_entry(outcome, rows, receipt)])
            return self._completion

    def _closing_entry(self, outcome: str, rows: int, receipt: Mapping[str, Any] | None) -> dict[str, Any]:
        return {
            "kind": "completion",
            "intent": self.intent,
            "lease": self._entry["lease"],
            "node": self._entry["node"],
            "outcome": outcome,
            "calls": self._calls,
            "rows": rows,
            "bytes": self._bytes,
            "receipt": dict(receipt) if receipt is not None else None,
        }


def recovered(intent: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry that says what an intent without completion may have sent: at most all of it."""
    return {
        "kind": "recovered",
        "intent": intent["seq"],
        "lease": intent["lease"],
        "node": intent["node"],
        "at_most_calls": intent["calls"],
        "at_most_bytes": intent["bytes"],
    }


def repaired(dropped_bytes: int, kept: str, digest: str) -> dict[str, Any]:
    """Return the entry that names what a start could not read: so many bytes of the ``-wal``, kept in a file.

    Of a ``-wal`` that was not there nothing is known, and nothing kept.
    """
    return {"kind": "repaired", "dropped_bytes": dropped_bytes, "kept": kept, "kept_digest": digest}


def check_kind(entry: Mapping[str, Any]) -> None:
    """Refuse an entry that :meth:`zones.ledger.Ledger.append` does not take.

    Raises:
        ValueError: The kind is none of ``REQUIRED_FIELDS``, or a field is missing.
    """
    kind = entry.get("kind")
    required = REQUIRED_FIELDS.get(str(kind))
    if required is None:
        raise ValueError(f"kind {kind!r} is none of {sorted(REQUIRED_FIELDS)}; intents have a method of their own")
    if missing := required - entry.keys():
        raise ValueError(f'a {kind} entry needs {sorted(missing)}; use "" or [] for what is not known yet')


def check_entry(entry: Mapping[str, Any]) -> None:
    """Refuse an entry of any kind that cannot be written.

    Raises:
        ValueError: It sets a field that is the ledger's own, or is too large.
        TypeError: It has no canonical bytes.
    """
    if reserved := _RESERVED & entry.keys():
        raise ValueError(f"{sorted(reserved)} are set by the ledger")
    size = len(canonical(entry))
    most = MAX_POLICY_BYTES if entry.get("kind") == "policy" else MAX_ENTRY_BYTES
    if size > most:
        raise ValueError(f"the entry has {size} bytes, {most} are allowed; shorten purpose, column list or policy")
