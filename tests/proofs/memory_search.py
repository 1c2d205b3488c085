"""Looks for canaries in all that processes hold: memory, files they map or have open, directories. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tests.proofs.attacked import command
from tests.proofs.canary import LONGEST_BYTES, Needle, needles, told

_PAGE = os.sysconf("SC_PAGE_SIZE")
#: Bytes that are read at once.
PIECE = 32 << 20
#: What two pieces have in common, so that nothing is missed between them.
_OVERLAP = 2 * LONGEST_BYTES
#: Enough of what follows a mark to tell two channels apart in any form.
_TELLING_BYTES = 48
#: Bits of /proc/PID/pagemap: present, and backed by a file or shared.
_PRESENT, _FILE = np.uint64(1 << 63), np.uint64(1 << 61)
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")
#: Where a process is looked at: its memory, its environment and command line as /proc shows them, and the files that
#: it maps or has open, deleted ones too.
PROCESS_PLACES = frozenset({"memory", "environ", "cmdline", "map_files", "fd"})
#: Memory that belongs to files of these places can have changed without a trace in the file's times.
_VOLATILE = ("/memfd:", "/dev/", "/s/", "/tmp/", "/SYSV")


_libc = ctypes.CDLL(None)
_libc.memmem.restype = ctypes.c_void_p
_libc.memmem.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One place where a mark was found."""

    mark: str
    #: For example ``raylet[123] memory 7f12…``.
    where: str
    #: As :func:`tests.proofs.canary.told` says it.
    form: str
    #: Which canary it is; ``""`` when what follows the mark does not say.
    channel: str


@dataclass(slots=True, kw_only=True)
class Search:
    """One search for one text or more."""

    texts: tuple[str, ...]
    #: Files that have not changed since then cannot hold the texts, UTC seconds since the epoch.
    since: float
    #: Of ``PROCESS_PLACES``, those to look at. Fewer than all show that a control is found there and nowhere else.
    places: frozenset[str] = PROCESS_PLACES
    hits: list[Hit] = field(default_factory=list)
    #: Bytes looked at.
    searched_bytes: int = 0
    _needles: list[tuple[str, bytes, Needle]] = field(default_factory=list)
    _files: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._needles = [(text, raw, needle) for text in self.texts for raw, needle in needles(text).items()]

    def of(self, mark: str) -> list[Hit]:
        """Return the hits of one of the texts."""
        return [hit for hit in self.hits if hit.mark == mark]

    def channels(self, mark: str | None = None) -> set[str]:
        """Return the channels whose canaries were found, of one mark or of all, such as ``{"closure", "print"}``."""
        return {hit.channel for hit in self.hits if hit.channel and mark in (None, hit.mark)}

    def process(self, pid: int) -> None:
        """Look at a process's memory, and at the files that it maps or has open. One that is gone holds nothing."""
        name = f"{os.path.basename((command(pid) or ['?'])[0].partition(' ')[0])}[{pid}]"
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if "memory" in self.places:
                self._memory(pid, name)
            for kind in sorted(self.places & {"environ", "cmdline"}):
                self.data(Path(f"/proc/{pid}/{kind}").read_bytes(), f"{name} {kind}")
            for kind in sorted(self.places & {"map_files", "fd"}):
                for link in sorted(Path(f"/proc/{pid}/{kind}").iterdir()):
                    self._linked(link, f"{name} {kind}")

    def tree(self, root: Path) -> None:
        """Look at every regular file below *root* on the same file system: what is mounted below was there before."""
        device = root.stat().st_dev
        for directory, inside, names in os.walk(root):
            inside[:] = [name for name in inside if _device(Path(directory, name)) == device]
            for name in names:
                self.file(Path(directory, name))

    def file(self, path: Path) -> None:
        """Look at a file, if it is a regular one."""
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                self._extents(path, found.st_size, str(path))

    def data(self, data: bytes, where: str) -> None:
        """Look at bytes that were read somewhere."""
        self._scan(data, where, last=True)
        self.searched_bytes += len(data)

    def device(self, path: Path, size: int) -> None:
        """Look at the first *size* bytes of a block device."""
        with path.open("rb", buffering=0) as file:
            self._stream(file, size, str(path))

    def _memory(self, pid: int, name: str) -> None:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory, open(f"/proc/{pid}/pagemap", "rb", 0) as pages:
            for start, end, skip_files in self._regions(pid):
                for first, last in _present(pages, start, end, skip_files=skip_files):
                    with contextlib.suppress(OSError):  # unmapped meanwhile, or a device's
                        memory.seek(first)
                        self._stream(memory, last - first, f"{name} memory {first:x}")

    def _regions(self, pid: int) -> Iterator[tuple[int, int, bool]]:
        """Yield readable regions: start, end, and whether its pages that equal an unchanged file need no reading."""
        for line in Path(f"/proc/{pid}/maps").read_text("utf-8", "surrogateescape").splitlines():
            match = _REGION.fullmatch(line)
            assert match, line
            start, end, access, path = int(match[1], 16), int(match[2], 16), match[3], match[4]
            if access[0] == "r" and not path.startswith(("[vvar", "[vsyscall")):
                shared_writable = access[3] == "s" and access[1] == "w"
                link = Path(f"/proc/{pid}/map_files/{match[1]}-{match[2]}")
                yield start, end, path.startswith("/") and not shared_writable and self._unchanged(link, path)

    def _unchanged(self, link: Path, path: str) -> bool:
        if path.startswith(_VOLATILE) or path.endswith("(deleted)"):
            return False
        with contextlib.suppress(OSError):
            return link.stat().st_ctime < self.since
        return False

    def _linked(self, link: Path, where: str) -> None:
        try:
            target, found = os.readlink(link), link.stat()
        except OSError:
            return
        key = (found.st_dev, found.st_ino)
        if not stat.S_ISREG(found.st_mode) or key in self._files or self._unchanged(link, target):
            return
        self._files.add(key)
        if not target.startswith(("/proc/", "/sys/")):
            self._extents(link, found.st_size, f"{where} {target}")

    def _extents(self, path: Path, size: int, where: str) -> None:
        """Look at a file's content, without its holes: shared memory has gigabytes of them."""
        with path.open("rb", buffering=0) as file:
            at = 0
            while at < size:
                try:
                    start = os.lseek(file.fileno(), at, os.SEEK_DATA)
                    at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                except OSError:
                    return
                file.seek(start)
                self._stream(file, at - start, where)

    def _stream(self, file: BinaryIO, size: int, where: str) -> None:
        kept = b""
        while size > 0:
            piece = file.read(min(size, PIECE))
            size = size - len(piece) if piece else 0
            self._scan(kept + piece, where, last=size == 0)
            self.searched_bytes += len(piece)
            kept = piece[-_OVERLAP:] if len(piece) >= _OVERLAP else (kept + piece)[-_OVERLAP:]

    def _scan(self, data: bytes, where: str, *, last: bool) -> None:
        """Find every needle in *data*. Unless it is the *last* piece, what is near its end is left to the next."""
        end = len(data) if last else len(data) - LONGEST_BYTES
        for mark, raw, needle in self._needles:
            seen: set[bytes] = set()
            told_of: set[tuple[str, str]] = set()
            for at in _find(data, raw):
                if at >= end:
                    break
                after = data[at + len(raw) : at + len(raw) + LONGEST_BYTES // 2]
                if after[:_TELLING_BYTES] in seen:  # plain Ray repeats itself thousands of times
                    continue
                seen.add(after[:_TELLING_BYTES])
                found = told(mark, needle, after)
                if found not in told_of:
                    told_of.add(found)
                    self.hits.append(Hit(mark=mark, where=where, form=found[0], channel=found[1]))


def _find(data: bytes, needle: bytes) -> Iterator[int]:
    """Yield where *needle* begins in *data*. The C library's search is several times as fast as Python's."""
    start = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    at = 0
    while at < len(data):
        found = _libc.memmem(start + at, len(data) - at, needle, len(needle))
        if found is None:
            return
        at = found - start
        yield at
        at += len(needle)


def _device(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_dev
    return None


def search(
    text: str | Iterable[str],
    pids: Iterable[int],
    *,
    since: float,
    trees: Iterable[Path] = (),
    places: frozenset[str] = PROCESS_PLACES,
) -> Search:
    """Look for a text, or several, in processes and directories."""
    texts = (text,) if isinstance(text, str) else tuple(text)
    done = Search(texts=texts, since=since, places=places & PROCESS_PLACES)
    for pid in pids:
        done.process(pid)
    for root in trees:
        done.tree(root)
    return done


def _present(pages: BinaryIO, start: int, end: int, *, skip_files: bool) -> Iterator[tuple[int, int]]:
    """Yield the address ranges that are in memory; with *skip_files* only those that differ from their file."""
    pages.seek(start // _PAGE * 8)
    flags = np.frombuffer(pages.read((end - start) // _PAGE * 8), np.uint64)
    wanted = (flags & _PRESENT) != 0
    if skip_files:
        wanted &= (flags & _FILE) == 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]]).astype(np.int8)))
    for first, last in edges.reshape(-1, 2).tolist():
        yield start + first * _PAGE, start + last * _PAGE
