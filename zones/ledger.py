"""Write the ledger: one SQLite file, one writer, append-only, hash-chained.

Does I/O: files, ``flock``, and the clock that :meth:`Ledger.open` is given. docs/ledger.md is the specification.

Rules:

1. What returns is on disk. Whatever cannot be written raises, and the caller sends nothing.
2. The chain in memory moves only after the commit: a failed write leaves no gap.
3. After a failure that leaves the file in doubt, every further write is refused until the ledger is opened again.
4. No byte leaves on a budget that the ledger does not hold; a budget ends, it is never enlarged.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from zones import audit, checkpoint
from zones.audit import Head, Report, copy_ledger, read, verify
from zones.budget import MAX_ENTRY_BYTES, Budget, Egress, check_entry, check_kind, recovered, repaired
from zones.checkpoint import Checkpoint
from zones.commitments import SALT_BYTES, entry_digest
from zones.errors import LedgerCorruptError, LedgerUnavailableError
from zones.merkle import Frontier, leaf_hash
from zones.model import Decision, canonical, check_id
from zones.obligations import duties
from zones.wal import lacks_wal, wal_path, whole_bytes

__all__ = ["MAX_ENTRY_BYTES", "Budget", "Egress", "Head", "Ledger", "Report", "copy_ledger", "read", "verify"]

#: How long a write waits for another program that holds the database, milliseconds.
BUSY_TIMEOUT_MS = 1000

_FORMAT = 2
#: In the name of a ``-wal`` that was kept, between the ledger's and the first digits of its SHA-256.
_TORN = "-torn-"
#: A file with more entries than this is archived at the next start: some hundred megabytes.
MOST_ENTRIES = 500_000
#: SQLite error name prefix: (what happened and what to do, whether a later write may be tried).
_CAUSES = {
    "SQLITE_FULL": ("the disk is full; free space, then call again", True),
    "SQLITE_BUSY": ("another program holds the database; end it, then call again", True),
    "SQLITE_READONLY": ("the file or its directory is read-only; make it writable, then restart the gateway", False),
    "SQLITE_CANTOPEN": ("its files cannot be created; check the directory, then restart the gateway", False),
    "SQLITE_NOTADB": ("it is no SQLite file; name another file or use a backup", False),
    "SQLITE_CORRUPT": ("its file is damaged; run `ray-gpu audit verify` and use a backup", False),
    "SQLITE_CONSTRAINT": ("another program wrote to it; run `ray-gpu audit verify`, then restart the gateway", False),
}
_INTERRUPTED = LedgerUnavailableError("the write of the ledger was interrupted, so nothing leaves; restart the gateway")
_OTHER_CAUSE = ("it could not be written; look at the disk and its file system, then restart the gateway", False)


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class _Pending:
    """Entries that one caller wants written together, and what became of them."""

    entries: Sequence[Mapping[str, Any]]
    last_seq: int = 0
    error: str = ""
    cause: BaseException | None = None


@dataclass(slots=True)
class _Chain:
    """Where the chain stands on disk."""

    seq: int = 0
    hash: bytes = b""
    #: Its tree, which has *seq* leaves.
    tree: Frontier = field(default_factory=Frontier)
    #: Intents of the previous run that have no completion.
    unfinished: list[dict[str, Any]] = field(default_factory=list)


class Ledger:
    """The one writer of a zone's ledger file. Thread-safe. Use as a context manager, or :meth:`close` it."""

    def __init__(self, path: Path, clock: Callable[[], datetime], database: sqlite3.Connection, lock: int) -> None:
        """Use :meth:`open`."""
        self._path = path
        self._clock = clock
        self._database = database
        self._lock = lock
        self._chain = _Chain()
        self._zone = ""
        #: What was left out at the start, as ``repaired`` entries say it.
        self.repairs: list[dict[str, Any]] = []
        #: Whether the file has no table yet.
        self._is_new = False
        self._files: dict[Path, tuple[int, int] | None] = {}
        self._allowed: set[int] = set()
        self._refusal = ""
        self._queue: list[_Pending] = []
        self._queue_guard = threading.Lock()
        self._commit_guard = threading.Lock()

    @classmethod
    def open(
        cls, path: Path, *, zone: str, clock: Callable[[], datetime] = _utc_now, most_entries: int = MOST_ENTRIES
    ) -> Self:
        """Open the ledger of *zone*, creating it with mode 0600, and write what the start found.

        That is an ``opened`` entry, ``recovered`` ones for what was under way, and ``repaired`` where the end of a
        ``-wal`` was unreadable, which was then kept beside it.

        A file with more than *most_entries* is archived first, and a new one continues it.

        Checks the chain since the last start; :func:`verify` checks all of it.

        Args:
            path: The database file. Its directory must exist and belong to the gateway.
            zone: Name of the zone, bound into the chain.
            clock: Returns an aware time; read once for each entry.

        Raises:
            LedgerUnavailableError: Another process writes it, it belongs to another zone, it is readable by
                others, or it cannot be created or written.
            LedgerCorruptError: The chain is broken since the last start.
        """
        check_id(zone, what="zone")
        with contextlib.ExitStack() as undo:
            try:
                lock = _lock(path)
                undo.callback(os.close, lock)
                # Before SQLite looks at it, which would drop what it cannot read without a word.
                _keep_torn(path)
                gone = lacks_wal(path)
                _finish_archiving(path)
                if _entries(path) > most_entries:
                    # Somebody who reads it keeps it from being folded: then at a later start.
                    with contextlib.suppress(*audit.UNREADABLE):
                        _archive(path)
                _create(path)
                database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                undo.callback(_fold, database)
                ledger = cls(path, clock, database, lock)
                ledger._start(zone, wal_gone=gone)
            except OSError as error:
                raise _unavailable(path, f"{error.strerror}; check disk and directory, then retry") from error
            except audit.UNREADABLE as error:
                raise _translate(path, error)[0] from error
            undo.pop_all()
        return ledger

    def append(self, entry: Mapping[str, Any]) -> int:
        """Write one entry and return its number. It is on disk when this returns.

        Args:
            entry: ``kind`` and the fields of docs/ledger.md, JSON types without floats.

        Raises:
            LedgerUnavailableError: It could not be written; nothing may leave.
            ValueError: The kind is none of ``REQUIRED_FIELDS``, a field is missing or reserved, or it is too large.
            TypeError: A value is a float or no JSON type.
        """
        check_kind(entry)
        seq = self._write([entry])
        if entry["kind"] == "decision" and entry["decision"] == "allowed":
            self._allowed.add(seq)
        return seq

    def decided(self, egress: Egress, decision: Decision) -> int:
        """Write a decision, allowed or refused, and return its entry's number. Raises like :meth:`append`."""
        answer = {
            "kind": "decision",
            "decision": "allowed" if decision.allowed else "refused",
            "rules": list(decision.rules),
            "reasons": list(decision.reasons),
            "obligations": duties(decision.obligations) if decision.allowed else {},
            "lineage": dict(egress.lineage),
            "categories": sorted(egress.categories),
        }
        return self.append(egress.fields() | answer | {"policy_digest": decision.policy_digest})

    def intend(self, egress: Egress, *, decision: int, calls: int, bytes_: int) -> Budget:
        """Write, before the first byte, that up to *calls* calls and *bytes_* padded bytes will leave.

        Args:
            egress: What leaves and where to; lease and node are known by now.
            decision: Number of the entry that allowed it.
            calls: Largest number of calls to reserve.
            bytes_: Largest number of bytes to reserve, padding included.

        Raises:
            LedgerUnavailableError: It could not be written; nothing may leave.
            ValueError: *decision* is not an allowed decision of this run, or nothing is reserved.
        """
        if decision not in self._allowed:
            raise ValueError(f"entry {decision} is not a decision that allowed something since the ledger was opened")
        if calls < 1 or bytes_ < 1:
            raise ValueError("an intent reserves at least one call and one byte")
        entry = egress.fields() | {"kind": "intent", "decision_entry": decision, "calls": calls, "bytes": bytes_}
        return Budget(self._write, intent=self._write([entry]), entry=entry)

    def find(self, kind: str) -> list[dict[str, Any]]:
        """Return all entries of one kind, oldest first, archives included. Older ones are not verified again.

        Raises:
            LedgerUnavailableError: They cannot be read.
        """
        self._check_archives()
        with self._commit_guard:
            try:
                return self._select(kind)
            except audit.UNREADABLE as error:
                raise _translate(self._path, error)[0] from error

    def _select(self, kind: str) -> list[dict[str, Any]]:
        query, wanted = "SELECT body FROM entries WHERE instr(body, ?) ORDER BY seq", (f'"kind":"{kind}"',)
        rows = []
        for older in audit.archives(self._path):
            with contextlib.closing(_read_only(older)) as archive:
                rows += archive.execute(query, wanted).fetchall()
        if not self._is_new:
            rows += self._database.execute(query, wanted).fetchall()
        return [entry for row in rows if (entry := audit.parse(row[0].encode()) or {}).get("kind") == kind]

    def _check_archives(self) -> None:
        """Refuse to go on without an archive: what it has would be forgotten."""
        following = 1
        for file in audit.archives(self._path):
            first, last = audit.archived(self._path, file)
            if first != following:
                break
            following = last + 1
        else:
            first = self._database.execute("SELECT min(seq) FROM entries").fetchone()[0]
        if first != following:
            missing = audit.archive_path(self._path, following, first - 1).name
            raise _unavailable(
                self._path, f"entries {following} to {first - 1} are in no file beside it; put {missing} there"
            )

    @property
    def head(self) -> Head:
        """Number and hash of the last entry on disk, to be noted outside the ledger."""
        chain = self._chain
        return Head(seq=chain.seq, hash=chain.hash.hex())

    @property
    def checkpoint(self) -> Checkpoint:
        """The state of the tree on disk, to be signed and written as a ``checkpoint`` entry."""
        tree = self._chain.tree
        return Checkpoint(origin=checkpoint.origin(self._zone), size=tree.size, root=tree.root())

    def close(self) -> None:
        """Fold the ``-wal`` into the file, which then says that it has none, and give the ledger back.

        Later writes raise. May be called twice.
        """
        with self._commit_guard:
            if self._lock < 0:
                return
            self._refusal = "it is closed; open it again"
            _fold(self._database)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, zone: str, *, wal_gone: bool) -> None:
        self._zone = zone
        self._database.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        self._database.execute("PRAGMA page_size = 4096")
        self._database.execute("PRAGMA auto_vacuum = NONE")
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        older = audit.archives(self._path)
        self._is_new = not self._database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if not self._is_new:
            self._chain = _resume(self._database, self._path, zone)
        elif older:
            with contextlib.closing(_read_only(older[-1])) as archive:
                self._chain = _resume(archive, self._path, zone)
        else:
            self._chain = _Chain(hash=audit.genesis(zone))
        opened = {"kind": "opened", "zone": zone, "format": _FORMAT, "frontier": audit.hashes(self._chain.tree)}
        # A new file has no -wal yet.
        self.repairs = [repaired(0, "", "")] if wal_gone and not self._is_new else []
        if torn := sorted(self._path.parent.glob(f"{glob.escape(self._path.name)}{_TORN}*")):
            # Also those of a start that came to nothing, or of an archiving.
            named = {entry["kept"] for entry in self._select("repaired")}
            self.repairs += [_named(kept) for kept in torn if kept.name not in named]
        self._write([opened, *self.repairs, *(recovered(intent) for intent in self._chain.unfinished)])
        self._files = {path: _identity(path) for path in (self._path, wal_path(self._path))}

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> int:
        """Write *entries* together, durably, and return the number of the last.

        Whoever holds the commit guard writes everything that queued up while the last commit was under way.
        """
        for entry in entries:
            check_entry(entry)
        pending = _Pending(entries)
        with self._queue_guard:
            self._queue.append(pending)
        with self._commit_guard:
            if not pending.last_seq and not pending.error:
                with self._queue_guard:
                    group, self._queue = self._queue, []
                self._commit(group)
        if not pending.last_seq:
            # A fresh exception for each caller: one shared by threads would collect all their tracebacks.
            raise LedgerUnavailableError(pending.error) from pending.cause
        return pending.last_seq

    def _commit(self, group: Sequence[_Pending]) -> None:
        failure, cause, in_doubt = _INTERRUPTED, None, True
        try:
            if self._refusal:
                raise _unavailable(self._path, self._refusal)
            self._commit_rows(group)
        except audit.UNREADABLE as error:
            cause = error
            failure, in_doubt = _translate(self._path, error)
        except LedgerUnavailableError as error:
            failure = error
        finally:
            # Also reached by an interrupt: nobody in the group may be left without an answer.
            failed = [pending for pending in group if not pending.last_seq]
            for pending in failed:
                pending.error, pending.cause = failure.message, cause
            if failed:
                self._refusal = self._refusal or (f"an earlier write failed: {failure.message}" if in_doubt else "")
                with contextlib.suppress(sqlite3.Error):
                    self._database.rollback()

    def _commit_rows(self, group: Sequence[_Pending]) -> None:
        self._check_files()
        seq, head, tree, rows, last = self._chain.seq, self._chain.hash, self._chain.tree.copy(), [], []
        for pending in group:
            for entry in pending.entries:
                seq += 1
                whole = {**entry, "seq": seq, "time": _iso(self._clock())}
                salt = secrets.token_bytes(SALT_BYTES)
                digest = entry_digest(salt, whole)
                head = audit.next_head(head, digest)
                tree.append(leaf_hash(digest))
                rows.append((seq, canonical(whole).decode("ascii"), salt.hex(), head.hex()))
            last.append(seq)
        self._database.execute("BEGIN IMMEDIATE")
        if self._is_new:
            self._database.execute(audit.SCHEMA)
        self._database.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", rows)
        self._database.execute("COMMIT")
        self._chain, self._is_new = _Chain(seq=seq, hash=head, tree=tree), False
        for pending, number in zip(group, last, strict=True):
            pending.last_seq = number

    def _check_files(self) -> None:
        """Refuse to write to files that nobody will find again: SQLite does not notice that a name is gone."""
        for path, identity in self._files.items():
            if _identity(path) != identity:
                raise _unavailable(path, "it was moved, replaced or deleted; put it back, then restart the gateway")


def _resume(database: sqlite3.Connection, path: Path, zone: str) -> _Chain:
    """Check the chain since the last ``opened`` entry and return where it stands.

    Earlier intents need no look: each start writes ``recovered`` for what was open, in the same commit.
    """
    rows = _rows_since_opened(database)
    if not rows:
        raise LedgerCorruptError("ledger entry 1 is missing: the file has no `opened` entry; use a backup", entry=1)
    first = rows[0][0]
    before = database.execute("SELECT hash FROM entries WHERE seq = ?", (first - 1,)).fetchone()
    try:
        if before is None and first > 1:
            before = _last_hash(path, first - 1)
        head = bytes.fromhex(before[0]) if before else audit.genesis(zone)
    except (TypeError, ValueError):
        raise LedgerCorruptError(f"ledger entry {first - 1} has no hash; use a backup", entry=first - 1) from None
    named = (audit.parse(rows[0][1]) or {}).get("zone")
    if named != zone:
        raise _unavailable(path, f"it belongs to zone {named!r}, not {zone!r}; give each zone a file of its own")
    tree, intents = _tree_before(rows[0]), {}
    for offset, row in enumerate(rows):
        checked = audit.check_row(row, seq=first + offset, previous=head)
        entry, head = checked.entry, checked.head
        tree.append(leaf_hash(checked.digest))
        if entry["kind"] == "intent":
            intents[entry["seq"]] = entry
        intents.pop(entry.get("intent", 0), None)
    return _Chain(seq=rows[-1][0], hash=head, tree=tree, unfinished=list(intents.values()))


def _last_hash(path: Path, seq: int) -> tuple[str]:
    """Return the hash of entry *seq*, the last one of the newest archive before a file."""
    for file in reversed(audit.archives(path)):
        with contextlib.closing(_read_only(file)) as archive:
            found: tuple[str] | None = archive.execute("SELECT hash FROM entries WHERE seq = ?", (seq,)).fetchone()
        if found is not None:
            return found
    raise _unavailable(path, f"it continues entry {seq}, which is in no archive beside it; put that archive there")


def _tree_before(row: tuple[int, bytes, bytes, bytes]) -> Frontier:
    """Return the tree of the entries before an ``opened`` entry, as it names it."""
    named = (audit.parse(row[1]) or {}).get("frontier")
    try:
        return Frontier(row[0] - 1, [bytes.fromhex(node) for node in named or ()])
    except (TypeError, ValueError):
        raise LedgerCorruptError(
            f"ledger entry {row[0]} names no tree of the entries before it; use a backup", entry=row[0]
        ) from None


def _rows_since_opened(database: sqlite3.Connection) -> list[tuple[int, bytes, bytes, bytes]]:
    """Return ``seq, body, salt, hash`` in order, from the last ``opened`` entry on; none if there is no such entry."""
    rows = []
    # As blobs, because damaged text must be compared, not decoded.
    blobs = ", ".join(f"CAST({column} AS BLOB)" for column in ("body", "salt", "hash"))
    newest_first = f"SELECT seq, {blobs} FROM entries ORDER BY seq DESC"
    for row in database.execute(newest_first):
        rows.append(row)
        if (audit.parse(row[1]) or {}).get("kind") == "opened":
            return rows[::-1]
    return []


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _keep_torn(path: Path) -> None:
    """Keep a ``-wal`` that SQLite would not read to its end, beside it, and leave the rest out; the lock is held."""
    wal = wal_path(path)
    content = wal.read_bytes() if wal.exists() else b""
    end, lost = whole_bytes(content)
    if not lost:
        return
    kept = path.with_name(f"{path.name}{_TORN}{hashlib.sha256(content).hexdigest()[:16]}")
    kept.unlink(missing_ok=True)
    with os.fdopen(audit.create_private(kept), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)
    # Or it would be found again after the next crash.
    os.truncate(wal, end)


def _named(kept: Path) -> dict[str, Any]:
    """Return the entry about a ``-wal`` that was kept."""
    content = kept.read_bytes()
    return repaired(whole_bytes(content)[1], kept.name, hashlib.sha256(content).hexdigest())


def _fold(database: sqlite3.Connection) -> None:
    """Close a database, with its ``-wal`` folded into the file, which then says that it has none."""
    with contextlib.suppress(sqlite3.Error):
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        # Refused while somebody reads: then the file is whole all the same.
        database.execute("PRAGMA journal_mode = DELETE")
    database.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)


def _entries(path: Path) -> int:
    """Return how many entries a ledger file has; 0 for one that is not there, or that says so when it is opened."""
    if not path.exists():
        return 0
    # Read-only: a connection that may write would take the -wal away as it closes.
    uri = f"{path.resolve().as_uri()}?mode=ro"
    with contextlib.suppress(*audit.UNREADABLE), contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
        return int(database.execute("SELECT count(*) FROM entries").fetchone()[0])
    return 0


def archive(path: Path) -> Path:
    """Move all entries of a ledger that no gateway writes to a file of their own, and return it. A gateway continues.

    Raises:
        LedgerUnavailableError: A gateway writes it, there is none, or it cannot be moved.
        LedgerCorruptError: It has no entries.
    """
    lock = None
    try:
        lock = _lock(path)
        if not path.is_file():
            raise LedgerUnavailableError(f"there is no ledger file {path}; check the path")
        _keep_torn(path)
        return _archive(path)
    except audit.UNREADABLE as error:
        raise LedgerUnavailableError(f"{path.name} cannot be archived ({error}); close what reads it") from error
    except OSError as error:
        raise LedgerUnavailableError(
            f"{path.name} cannot be archived ({error.strerror}); look at its directory"
        ) from error
    finally:
        if lock is not None:
            os.close(lock)


def _archive(path: Path) -> Path:
    """Rename a ledger file after its entries; the lock is held. A crash leaves it under one of the two names, whole."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode = DELETE")
        first, last = database.execute("SELECT min(seq), max(seq) FROM entries").fetchone()
    if first is None:
        raise LedgerCorruptError(f"{path.name} has no entries to archive", entry=1)
    target = audit.archive_path(path, first, last)
    os.link(path, target)
    _finish_archiving(path)
    return target


def _finish_archiving(path: Path) -> None:
    """Take the old name from a file that has its archive's name already."""
    older = audit.archives(path)
    if older and path.exists() and path.samefile(older[-1]):
        path.unlink()
        older[-1].chmod(0o400)
        _sync(path.parent)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _create(path: Path) -> None:
    """Create *path* with mode 0600, or check that nobody else can read it."""
    try:
        os.close(audit.create_private(path))
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            raise _unavailable(path, "others may read or write it; `chmod 600` it, then retry") from None
        return
    _sync(path.parent)


def _lock(path: Path) -> int:
    """Return a descriptor that holds the writer's lock until it is closed.

    Not a lock on the database itself: closing any other descriptor of that file would drop SQLite's own locks.
    """
    descriptor = os.open(audit.lock_path(path), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise _unavailable(path, "another gateway writes it; stop that one first") from None
    return descriptor


def _translate(path: Path, error: Exception) -> tuple[LedgerUnavailableError, bool]:
    """Return the error to raise, and whether the file is in doubt."""
    name = audit.sqlite_name(error)
    what, retry = next((cause for prefix, cause in _CAUSES.items() if name.startswith(prefix)), _OTHER_CAUSE)
    return _unavailable(path, f"{what} ({error})"), not retry


def _unavailable(path: Path, what: str) -> LedgerUnavailableError:
    return LedgerUnavailableError(f"nothing leaves, because the ledger {path.name} cannot be written: {what}")
