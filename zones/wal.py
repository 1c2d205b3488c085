"""SQLite's write-ahead log beside a ledger: where it is, whether it is whole, whether it should be there. Reads files.

Format: https://www.sqlite.org/fileformat2.html, section 4.
"""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
#: So many times, at most, a log was begun anew since a frame in it was left over.
_GENERATIONS = 1 << 20


def wal_path(path: Path) -> Path:
    """Return SQLite's write-ahead log beside *path*."""
    return path.with_name(path.name + "-wal")


def lacks_wal(path: Path) -> bool:
    """Tell whether a ledger file says that its gateway runs, and the ``-wal`` of that run is not beside it.

    A gateway that stops leaves no ``-wal`` and says so in the file (SQLite file format, section 1.3: bytes 18, 19).
    """
    try:
        with path.open("rb") as file:
            return file.read(20)[18:] == b"\2\2" and not wal_path(path).exists()
    except OSError:
        return False


def whole_bytes(wal: bytes) -> tuple[int, int]:
    """Return where a log's last whole commit ends, and how many bytes behind it SQLite leaves out (0: it is whole).

    A crash in the middle of a write leaves such bytes, and so does damage: a frame whose checksum is wrong, and all
    behind it. Frames left over from an earlier generation do not count (SQLite file format, section 4): each
    generation's first salt is the one before it and one more, its second another.
    """
    if len(wal) < _HEADER_BYTES:
        return 0, len(wal)
    magic, _, page_size, _, salt_1, salt_2, sum_1, sum_2 = struct.unpack(">8I", wal[:_HEADER_BYTES])
    order = {0x377F0682: "<", 0x377F0683: ">"}.get(magic)
    if order is None or _wal_sum(wal[:24], (0, 0), order) != (sum_1, sum_2):
        return 0, len(wal)
    frame = _FRAME_HEADER_BYTES + page_size
    running, intact, end, lost = (sum_1, sum_2), True, _HEADER_BYTES, 0
    for at in range(_HEADER_BYTES, len(wal), frame):
        found = wal[at : at + frame]
        whole = len(found) == frame
        salts = struct.unpack_from(">2I", found, 8) if whole else (salt_1, salt_2)
        if 0 < (salt_1 - salts[0]) % (1 << 32) < _GENERATIONS and salts[1] != salt_2:
            intact = False
            continue
        lost += len(found)
        if intact and whole:
            running = _wal_sum(found[_FRAME_HEADER_BYTES:], _wal_sum(found[:8], running, order), order)
        intact = intact and whole and salts == (salt_1, salt_2) and running == struct.unpack_from(">2I", found, 16)
        # The frame that ends a commit names the size of the database.
        if intact and found[4:8] != bytes(4):
            end, lost = at + frame, 0
    return end, lost


def _wal_sum(data: bytes, start: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = start
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
