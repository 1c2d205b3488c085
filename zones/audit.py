"""Read, verify and copy a ledger file. docs/ledger.md is the specification.

Does I/O: reads a SQLite file and its ``-wal`` (``zones.wal``), and never writes to either. The chain itself
(:func:`genesis`, :func:`next_head`) is a matter of arguments alone.

Rules:

1. A row is believed only after its hash matched; nothing unverified is handed out.
2. The first row that does not verify ends the reading, and its number is in the error.
3. Bytes that SQLite would skip silently (a damaged ``-wal`` frame) are damage, not the end of the ledger.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zones import checkpoint
from zones.checkpoint import Checkpoint, VerifierKey
from zones.commitments import digest_of_body
from zones.errors import LedgerCorruptError, LedgerUnavailableError
from zones.merkle import Frontier, leaf_hash
from zones.wal import lacks_wal, wal_path, whole_bytes

SCHEMA = "CREATE TABLE entries (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, salt TEXT NOT NULL, hash TEXT NOT NULL)"

_GENESIS_LABEL = b"ray-gpu ledger v2 genesis\n"
_HEAD_LABEL = b"ray-gpu ledger v2 head\n"
_COLUMNS = "seq, typeof(body), body, typeof(salt), salt, typeof(hash), hash"
_SALT = re.compile(rb"[0-9a-f]{64}")
#: What reading a damaged file raises: sqlite3 quotes damaged names in its messages, and then fails to decode them.
UNREADABLE = (sqlite3.Error, UnicodeDecodeError)

_HEAD = re.compile(r"([1-9][0-9]{0,18}):([0-9a-f]{64})")


def genesis(zone: str) -> bytes:
    """Return head(0), 32 bytes, which binds the chain to *zone*."""
    return hashlib.sha256(_GENESIS_LABEL + zone.encode()).digest()


def next_head(previous: bytes, digest: bytes) -> bytes:
    """Return head(n), 32 bytes, from head(n-1) and the digest of entry n (:mod:`zones.commitments`), 32 bytes each."""
    return hashlib.sha256(_HEAD_LABEL + previous + digest).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The state of a chain, to be noted outside the ledger: ``str(head)`` and :meth:`parse`."""

    seq: int
    #: Hash of entry *seq*, 64 hexadecimal digits.
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read what ``str(head)`` wrote.

        Raises:
            ValueError: *text* is not a number, a colon and 64 lower-case hexadecimal digits.
        """
        match = _HEAD.fullmatch(text.strip())
        if match is None:
            raise ValueError("a head is written as number:hash, for example 142:9f3c... with 64 hexadecimal digits")
        return cls(seq=int(match[1]), hash=match[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A ledger that verified."""

    zone: str
    entries: int
    #: Time of the first entry, as the entry gives it.
    first: str
    #: Time of the last entry.
    last: str
    #: Hash of the last entry, 64 hexadecimal digits.
    head_hash: str
    #: The state of its tree, as a checkpoint says it.
    checkpoint: Checkpoint
    #: Entries up to which a signed checkpoint in the ledger covers it; 0 where no key was named, or none is there.
    signed: int = 0
    #: The file was copied from a running gateway without its -wal: later entries may be missing.
    without_wal: bool = False
    #: The ``repaired`` entries: what was lost before each, at the gateway's start.
    repairs: tuple[int, ...] = ()

    @property
    def head(self) -> Head:
        """The head to note outside the ledger."""
        return Head(seq=self.entries, hash=self.head_hash)


@dataclass(frozen=True, slots=True)
class _Row:
    """One row as SQLite gave it; ``None`` where the type is not text."""

    seq: int
    body: bytes | None
    salt: bytes | None
    hash: bytes | None

    def entry(self) -> dict[str, Any] | None:
        return parse(self.body or b"")

    def follows(self, previous: bytes) -> bool:
        """Whether it was chained to this head, with the body, salt and hash that it has."""
        decoded = _decoded(self.body or b"", self.salt or b"")
        return decoded is not None and next_head(previous, decoded[1]).hex().encode() == self.hash


@dataclass(frozen=True, slots=True)
class Verified:
    """One entry that verified."""

    entry: dict[str, Any]
    #: What stands for it in chain and tree, 32 bytes.
    digest: bytes
    #: Salt of its commitments, 32 bytes.
    salt: bytes
    #: head(n), 32 bytes.
    head: bytes


def _decoded(body: bytes, salt: bytes) -> tuple[dict[str, Any], bytes] | None:
    """Return an entry and its digest, 32 bytes, or ``None`` if *body* is none in canonical form, or *salt* no salt."""
    entry = parse(body)
    if entry is None or not _SALT.fullmatch(salt):
        return None
    try:
        digest = digest_of_body(bytes.fromhex(salt.decode("ascii")), entry, body)
    except (ValueError, TypeError, RecursionError):
        # A number without an end, or nested too deep.
        return None
    return None if digest is None else (entry, digest)


def parse(body: bytes) -> dict[str, Any] | None:
    """Return *body* as a JSON object without floats, or ``None`` if it is none."""
    try:
        document = _DECODER.decode(body.decode("ascii"))
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _no_float(text: str) -> Any:
    raise ValueError(f"entries hold no {text}")


#: No entry holds a float, so there is but one way to write it.
_DECODER = json.JSONDecoder(parse_float=_no_float, parse_constant=_no_float)


def verify(
    path: Path, *, expected_head: Head | None = None, key: VerifierKey | None = None, noted: Checkpoint | None = None
) -> Report:
    """Check every entry of the ledger at *path*, running or copied, its tree, and the checkpoints in it.

    Args:
        path: The database file. A ``-wal`` file beside it is part of it.
        expected_head: A head noted earlier.
        key: The zone's; checkpoints in the ledger must be signed by it. Without it their signatures are not checked.
        noted: A checkpoint that was kept outside, already opened (:func:`zones.checkpoint.opened`). Without it and
            *expected_head*, entries cut off at the end are not found.

    Raises:
        LedgerCorruptError: An entry does not verify, is missing, or cannot be read; or a checkpoint does not hold.
        LedgerUnavailableError: There is no such file, or it may not be read.
    """
    first = last = zone = ""
    without_wal = lacks_wal(path)
    head = Head(seq=0, hash="")
    tree, repairs = _Tree(key=key, noted=noted), list[int]()
    for row in _walk(path, tree.want):
        entry = row.entry
        head = Head(seq=entry["seq"], hash=row.head.hex())
        first, last, zone = first or entry["time"], entry["time"], zone or entry["zone"]
        if expected_head is not None and head.seq == expected_head.seq and head != expected_head:
            raise _corrupt(head.seq, "it is not the entry whose head was noted; the ledger was rewritten")
        tree.grow(zone, row)
        if entry["kind"] == "repaired":
            repairs.append(head.seq)
    for noted_size in ([] if expected_head is None else [expected_head.seq]) + ([] if noted is None else [noted.size]):
        if head.seq < noted_size:
            raise _corrupt(head.seq + 1, f"missing: the ledger ends at entry {head.seq}, one of {noted_size} was noted")
    return Report(
        zone=zone,
        entries=head.seq,
        first=first,
        last=last,
        head_hash=head.hash,
        checkpoint=Checkpoint(origin=checkpoint.origin(zone), size=head.seq, root=tree.frontier.root()),
        signed=tree.signed,
        without_wal=without_wal,
        repairs=tuple(repairs),
    )


@dataclass(slots=True, kw_only=True)
class _Tree:
    """The tree of a ledger that is being verified, beside what its entries and a noted checkpoint say of it."""

    key: VerifierKey | None
    noted: Checkpoint | None
    frontier: Frontier = field(default_factory=Frontier)
    #: Root at each size that a checkpoint is about.
    roots: dict[int, bytes] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)
    signed: int = 0

    def want(self, database: sqlite3.Connection) -> None:
        """Learn beforehand which sizes the checkpoints are about: roots are not kept for all."""
        self.wanted |= {0 if self.noted is None else self.noted.size}
        for (body,) in database.execute('SELECT body FROM entries WHERE body LIKE \'%"kind":"checkpoint"%\''):
            entry = parse(body if isinstance(body, bytes) else b"")
            with contextlib.suppress(ValueError):
                self.wanted.add(checkpoint.unsigned(str((entry or {}).get("note"))).size)

    def grow(self, zone: str, row: Verified) -> None:
        """Take the next entry; check what it says of those before it."""
        entry = row.entry
        if entry["kind"] == "opened" and entry.get("frontier") != hashes(self.frontier):
            raise _corrupt(
                entry["seq"], "its hash matches, but the tree that it names is not that of the entries before"
            )
        if entry["kind"] == "checkpoint":
            self._check(zone, entry)
        self.frontier.append(leaf_hash(row.digest))
        size, noted = self.frontier.size, self.noted
        if size in self.wanted:
            self.roots[size] = self.frontier.root()
        if (
            noted is not None
            and noted.size == size
            and (noted.origin, noted.root) != (checkpoint.origin(zone), self.roots[size])
        ):
            raise _corrupt(size, "up to it the ledger is not the one whose checkpoint was noted; it was rewritten")

    def _check(self, zone: str, entry: dict[str, Any]) -> None:
        note = str(entry.get("note"))
        try:
            found = checkpoint.unsigned(note) if self.key is None else checkpoint.opened(note, self.key)
        except ValueError as error:
            raise _corrupt(entry["seq"], f"its checkpoint does not hold: {error}") from None
        if (found.origin, found.root) != (checkpoint.origin(zone), self.roots.get(found.size)):
            raise _corrupt(entry["seq"], f"its checkpoint is not of the first {found.size} entries")
        self.signed = 0 if self.key is None else max(self.signed, found.size)


def hashes(frontier: Frontier) -> list[str]:
    """Return a tree as an ``opened`` entry names it: the hashes of its frontier, hexadecimal."""
    return [node.hex() for node in frontier.nodes]


def copy_ledger(path: Path, target: Path) -> None:
    """Copy the ledger at *path*, running or not, to a new file: complete without a ``-wal``, mode 0600.

    Its archives are copied beside it.

    Raises:
        LedgerUnavailableError: There is no such file or it may not be read, or *target* exists or cannot be written.
        LedgerCorruptError: It is no SQLite file, or a damaged one.
    """
    try:
        if torn := _torn(path):
            raise LedgerCorruptError(f"{path.name} is not copied, or the copy would not say so: {torn}")
        for older in archives(path):
            named = archive_path(target, *archived(path, older))
            with older.open("rb") as source, os.fdopen(create_private(named), "wb") as copied:
                shutil.copyfileobj(source, copied)
        with closing(_open_to_read(path)) as database:
            database.execute("SELECT count(*) FROM sqlite_schema")
            os.close(create_private(target))
            with closing(sqlite3.connect(target)) as made:
                database.backup(made)
                made.execute("PRAGMA journal_mode = DELETE")
    except OSError as error:
        raise LedgerUnavailableError(
            f"{target} cannot be written ({error.strerror}); name a new file in a directory that you can write"
        ) from error
    except UNREADABLE as error:
        raise _unreadable(path, 0, error) from error


def create_private(path: Path) -> int:
    """Create a file that only its owner may read or write, and return its descriptor; it must not exist."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of the ledger at *path* in order, each after it verified.

    Raises:
        LedgerCorruptError: When the first entry that does not verify is reached.
        LedgerUnavailableError: There is no such file, or it may not be read.
    """
    return (row.entry for row in _walk(path))


def read_verified(path: Path) -> Iterator[Verified]:
    """Yield the same with digests, salts and heads. Raises as :func:`read`."""
    return _walk(path)


def archives(path: Path) -> list[Path]:
    """Return the files that older entries of the ledger at *path* were moved to, oldest first: ``ledger.1-99.db``."""
    form = re.compile(rf"{re.escape(path.stem)}\.([1-9][0-9]{{0,18}})-[1-9][0-9]{{0,18}}{re.escape(path.suffix)}")
    found = [(int(match[1]), file) for file in path.parent.glob("*") if (match := form.fullmatch(file.name))]
    return [file for _, file in sorted(found)]


def archived(path: Path, archive: Path) -> tuple[int, int]:
    """Return the first and the last entry of an archive of the ledger at *path*, as its name says."""
    first, _, last = archive.name[len(path.stem) + 1 :].removesuffix(path.suffix).partition("-")
    return int(first), int(last)


def archive_path(path: Path, first: int, last: int) -> Path:
    """Return where entries *first* to *last* of the ledger at *path* belong once they are old."""
    return path.with_name(f"{path.stem}.{first}-{last}{path.suffix}")


def _parts(path: Path) -> list[Path]:
    """Return all files of a ledger, oldest first; right after a rotation the newest is not there yet."""
    older = archives(path)
    # Right after archiving, the file may still have both names, or be a new one without entries.
    unfinished = older and (not path.is_file() or path.samefile(older[-1]) or not path.stat().st_size)
    return older if unfinished else [*older, path]


def _walk(path: Path, prepare: Callable[[sqlite3.Connection], None] | None = None) -> Iterator[Verified]:
    """Yield the entries of one snapshot; the caller's last entry is not the end until this returns."""
    seq, file = 0, path
    try:
        with contextlib.ExitStack() as opened:
            parts = []
            for file in _parts(path):
                database = opened.enter_context(closing(_open_to_read(file)))
                database.execute("BEGIN")
                _check_schema(database, file)
                parts.append((file, database))
            # Of all of them before the first entry: a checkpoint may be about entries of an older file.
            for _, database in parts if prepare is not None else ():
                assert prepare is not None
                prepare(database)
            previous: bytes | None = None
            for file, database in parts:
                began = seq
                for row in _rows(database, "ORDER BY seq"):
                    if seq == began:
                        _check_continues(row, seq, file)
                    checked = _check(database, row, seq + 1, previous)
                    previous = checked.head
                    seq += 1
                    yield checked
                if seq == began:
                    raise _corrupt(seq + 1, "missing: the ledger is empty")
                _check_surroundings(database, file, seq)
    except UNREADABLE as error:
        raise _unreadable(file, seq, error) from error


def _check_continues(row: _Row, seq: int, file: Path) -> None:
    """Refuse a file whose first entry is not the next: what stands between is in an archive, or nowhere."""
    if row.seq > seq + 1 and (row.entry() or {}).get("kind") == "opened" and (row.entry() or {}).get("seq") == row.seq:
        raise LedgerUnavailableError(
            f"{file.name} begins with entry {row.seq}, and entries {seq + 1} to {row.seq - 1} are in no file beside "
            f"it; put the archive with them there (named like {archive_path(file, seq + 1, row.seq - 1).name})"
        )


def _unreadable(path: Path, seq: int, error: Exception) -> LedgerUnavailableError | LedgerCorruptError:
    if sqlite_name(error).startswith(("SQLITE_CANTOPEN", "SQLITE_BUSY", "SQLITE_READONLY")):
        return LedgerUnavailableError(
            f"{path.name} cannot be read ({error}); copy it, with its -wal file if there is one, "
            "to a directory that you can write, and verify the copy"
        )
    return _corrupt(seq + 1, f"not readable: SQLite stops at or after this entry ({error})")


def check_row(row: tuple[int, bytes, bytes, bytes], *, seq: int, previous: bytes) -> Verified:
    """Return the entry in a row ``seq, body, salt, hash`` that must be number *seq* after head *previous*.

    Raises:
        LedgerCorruptError: It does not verify.
    """
    number, body, salt, stored = row
    decoded = _decoded(body, salt)
    if number != seq or decoded is None or next_head(previous, decoded[1]).hex().encode() != stored:
        raise _corrupt(seq, "run `ray-gpu audit verify` to see what is wrong")
    return _verified(seq, *decoded, salt, stored)


def _verified(seq: int, entry: dict[str, Any], digest: bytes, salt: bytes, stored: bytes) -> Verified:
    """Return an entry whose hash matched, if it is what entry *seq* has to be."""
    if entry.get("seq") != seq:
        raise _corrupt(seq, "its hash matches, but it is not a ledger entry with this number")
    if not isinstance(entry.get("time"), str) or not isinstance(entry.get("kind"), str):
        raise _corrupt(seq, "its hash matches, but it has no time or no kind")
    return Verified(entry, digest, bytes.fromhex(salt.decode("ascii")), bytes.fromhex(stored.decode("ascii")))


def _check(database: sqlite3.Connection, row: _Row, seq: int, previous: bytes | None) -> Verified:
    """Return the entry of a row that must be number *seq*."""
    if row.seq != seq or row.body is None or row.salt is None or row.hash is None:
        raise _corrupt(seq, _explain(database, row, seq, previous))
    if previous is None:
        entry = row.entry()
        previous = genesis(str(entry.get("zone"))) if entry else bytes(32)
    decoded = _decoded(row.body, row.salt)
    if decoded is None or next_head(previous, decoded[1]).hex().encode() != row.hash:
        raise _corrupt(seq, _explain(database, row, seq, previous))
    checked = _verified(seq, *decoded, row.salt, row.hash)
    if seq == 1 and not (checked.entry["kind"] == "opened" and isinstance(checked.entry.get("zone"), str)):
        raise _corrupt(seq, "its hash matches, but it does not open a ledger of a named zone")
    return checked


def _explain(database: sqlite3.Connection, row: _Row, seq: int, previous: bytes | None) -> str:
    """Say what is wrong with a row that does not verify. The best guess from its neighbours, never a proof."""
    entry = row.entry()
    if row.seq != seq:
        what = "missing" if row.seq > seq else "duplicated or out of order"
        return f"{what}: the row in its place has number {row.seq}"
    if row.body is None or row.salt is None or row.hash is None:
        return "truncated: body, salt or hash is not text"
    held = entry.get("seq") if entry else None
    if isinstance(held, int) and held != seq:
        return _explain_moved(database, row, seq, held)
    if len(row.hash) != 64:
        return "truncated: its hash does not have 64 digits"
    if entry is None:
        return "truncated: its JSON ends early" if not row.body.endswith(b"}") else "content changed: not JSON"
    following = next(_rows(database, "WHERE seq = ?", seq + 1), None)
    if following is not None and previous is not None:
        decoded = _decoded(row.body, row.salt)
        if decoded is not None and following.follows(next_head(previous, decoded[1])):
            return "hash changed: the next entry follows from this content with another hash"
        if _follows(row.hash, following):
            return "content changed: the next entry follows from this hash with other content or salt"
    return "content, salt or hash changed"


def _explain_moved(database: sqlite3.Connection, row: _Row, seq: int, held: int) -> str:
    twin = next(_rows(database, "WHERE seq = ?", held), None) if 0 < held < 1 << 63 else None
    if twin is not None and twin.body == row.body:
        return f"duplicated: its row repeats entry {held}"
    for other in _rows(database, "WHERE seq > ? ORDER BY seq", seq):
        if (other.entry() or {}).get("seq") == seq:
            return f"reordered: its row holds entry {held}, and it is in row {other.seq}"
    following = next(_rows(database, "WHERE seq = ?", seq + 1), None)
    if following is not None and (following.entry() or {}).get("seq") == seq + 1 and _follows(row.hash, following):
        return "content changed: the next entry follows from this hash with other content or salt"
    return f"missing: its row holds entry {held}"


def _follows(stored: bytes | None, following: _Row) -> bool:
    """Tell whether *following* was chained to the hash *stored*, which is then the one that was written."""
    try:
        previous = bytes.fromhex((stored or b"").decode("ascii"))
    except ValueError:
        return False
    return following.follows(previous)


def sqlite_name(error: Exception) -> str:
    """Return SQLite's name of an error, such as ``SQLITE_FULL``, or ``""`` if it has none."""
    return str(getattr(error, "sqlite_errorname", None) or "")


def _rows(database: sqlite3.Connection, where: str, *values: int) -> Iterator[_Row]:
    # `where` is one of this module's own literals.
    for seq, *columns in database.execute(f"SELECT {_COLUMNS} FROM entries {where}", values):
        types, found = columns[::2], columns[1::2]
        yield _Row(seq, *(value if of == b"text" else None for of, value in zip(types, found, strict=True)))


def _open_to_read(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise LedgerUnavailableError(f"there is no ledger file {path}; check the path")
    # Without a -wal file nobody writes, and `immutable` keeps SQLite from creating files beside a copy.
    mode = "mode=ro" if wal_path(path).exists() else "mode=ro&immutable=1"
    database = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, isolation_level=None)
    # Text stays bytes: damaged text must be compared, not decoded.
    database.text_factory = bytes
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("PRAGMA cell_size_check = ON")
    return database


def _check_schema(database: sqlite3.Connection, path: Path) -> None:
    found = database.execute("SELECT type, name, sql FROM sqlite_schema").fetchall()
    if not found and lacks_wal(path):
        raise LedgerUnavailableError(
            f"{path.name} was copied from a running gateway without its -wal file, which holds all entries; "
            "copy the ledger with `ray-gpu audit copy`"
        )
    if found != [(b"table", b"entries", SCHEMA.encode())]:
        raise _corrupt(1, "the file is not a ledger, or its table was redefined")


def _check_surroundings(database: sqlite3.Connection, path: Path, seq: int) -> None:
    """Look for damage outside the entries that could hide further ones."""
    if torn := _torn(path):
        raise _corrupt(seq + 1, f"not readable: {torn}")
    verdict = database.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != b"ok":
        raise LedgerCorruptError(
            f"all {seq} entries verify, but the SQLite file around them is damaged "
            f"({verdict.decode(errors='replace')}); keep the file as evidence and compare it with a backup"
        )


def _torn(path: Path) -> str:
    """Say what of the ``-wal`` SQLite leaves out; nothing where it is whole."""
    wal = wal_path(path)
    # The writer may be in the middle of a frame; what it committed is in a reader's snapshot.
    if not wal.exists() or _is_being_written(path) or not (lost := whole_bytes(wal.read_bytes())[1]):
        return ""
    return (
        f"{lost:,} bytes of the -wal file are of no whole commit, after a crash in the middle of a write or by damage; "
        "the gateway's next start leaves them out, keeps the -wal and writes both down"
    )


def lock_path(path: Path) -> Path:
    """Return the file whose ``flock`` the ledger's one writer holds."""
    return path.with_name(path.name + ".lock")


def _is_being_written(path: Path) -> bool:
    try:
        descriptor = os.open(lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _corrupt(seq: int, what: str) -> LedgerCorruptError:
    return LedgerCorruptError(
        f"ledger entry {seq} does not verify: {what}; keep the file as evidence and compare it with a backup", entry=seq
    )
