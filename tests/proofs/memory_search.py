"""Looks for a text in everything that processes hold: memory, files they map or have open, directories. Needs root."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tests.proofs.attacked import command

_PAGE = os.sysconf("SC_PAGE_SIZE")
_PIECE = 32 << 20
#: Longest needle, so that none is missed between two pieces.
_OVERLAP = 256
#: Bits of /proc/PID/pagemap: present, and backed by a file or shared.
_PRESENT, _FILE = np.uint64(1 << 63), np.uint64(1 << 61)
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ *(.*)")
#: Where a process is looked at: its memory, and the files that it maps or has open, deleted ones too.
PROCESS_PLACES = frozenset({"memory", "map_files", "fd"})
#: Memory that belongs to files of these places can have changed without a trace in the file's times.
_VOLATILE = ("/memfd:", "/dev/", "/s/", "/tmp/", "/SYSV")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One place where the text was found."""

    #: For example ``raylet[123] memory 7f12…``.
    where: str
    #: ``raw``, ``utf-16``, ``hex`` or ``base64``.
    form: str
    #: What follows the text there, which tells one canary from another.
    after: str


def forms(text: str) -> dict[bytes, str]:
    """Return the byte strings to look for, with the name of each form."""
    raw = text.encode("ascii")
    found = {raw: "raw", text.encode("utf-16-le"): "utf-16"}
    found |= {raw.hex().encode(): "hex", raw.hex().upper().encode(): "hex"}
    for shift in range(3):
        # Only the characters that do not depend on what stands before and after.
        start, end = -(-shift * 8 // 6), (shift + len(raw)) * 8 // 6
        found[base64.b64encode(bytes(shift) + raw + bytes(3))[start:end]] = "base64"
    return found


@dataclass(slots=True, kw_only=True)
class Search:
    """One search for one text."""

    text: str
    #: Files that have not changed since then cannot hold the text, UTC seconds since the epoch.
    since: float
    #: Of ``PROCESS_PLACES``, those to look at. Fewer than all show that a control is found there and nowhere else.
    places: frozenset[str] = PROCESS_PLACES
    hits: list[Hit] = field(default_factory=list)
    #: Bytes looked at.
    searched_bytes: int = 0
    _needles: dict[bytes, str] = field(default_factory=dict)
    _files: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._needles = forms(self.text)

    def kinds(self, form: str = "raw") -> set[str]:
        """Return the words that follow the text where it was found, such as ``{"closure", "print"}``."""
        words = (re.match(r"-([a-z]+)", hit.after) for hit in self.hits if hit.form == form)
        return {word[1] for word in words if word}

    def process(self, pid: int) -> None:
        """Look at a process's memory, and at the files that it maps or has open. One that is gone holds nothing."""
        name = f"{os.path.basename((command(pid) or ['?'])[0].partition(' ')[0])}[{pid}]"
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if "memory" in self.places:
                self._memory(pid, name)
            for kind in sorted(self.places - {"memory"}):
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
            piece = file.read(min(size, _PIECE))
            if not piece:
                return
            self._scan(kept + piece, where)
            size -= len(piece)
            self.searched_bytes += len(piece)
            kept = piece[-_OVERLAP:]

    def _scan(self, data: bytes, where: str) -> None:
        for needle, form in self._needles.items():
            at = data.find(needle)
            seen: set[bytes] = set()
            while at >= 0:
                at += len(needle)
                after = data[at : at + 12]
                if after[:6] not in seen:
                    seen.add(after[:6])
                    self.hits.append(Hit(where=where, form=form, after=after.decode("latin-1")))
                at = data.find(needle, at)


def _device(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat().st_dev
    return None


def search(
    text: str,
    pids: Iterable[int],
    *,
    since: float,
    trees: Iterable[Path] = (),
    places: frozenset[str] = PROCESS_PLACES,
) -> Search:
    """Look for *text* in processes and directories."""
    done = Search(text=text, since=since, places=places & PROCESS_PLACES)
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
