"""SQLite's write-ahead log beside a ledger: where it is, whether it is whole, whether it should be there. Reads files.

Format: https://www.sqlite.org/fileformat2.html, section 4.
"""

from __future__ import annotations

import struct
from pathlib import Path


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


def wal_is_whole(wal: bytes) -> bool:
    """Tell whether every frame of the log's current generation is intact (SQLite file format, section 4).

    Frames left over from an earlier generation have other salts in both halves and do not count.
    """
    if len(wal) < 32:
        return len(wal) == 0
    magic, _, page_size, _, salt_1, salt_2, sum_1, sum_2 = struct.unpack(">8I", wal[:32])
    order = {0x377F0682: "<", 0x377F0683: ">"}.get(magic)
    if order is None or _wal_sum(wal[:24], (0, 0), order) != (sum_1, sum_2) or (len(wal) - 32) % (page_size + 24):
        return False
    running, intact = (sum_1, sum_2), True
    for at in range(32, len(wal), page_size + 24):
        salts = struct.unpack_from(">2I", wal, at + 8)
        if salts[0] != salt_1 and salts[1] != salt_2:
            intact = False
            continue
        running = _wal_sum(wal[at + 24 : at + 24 + page_size], _wal_sum(wal[at : at + 8], running, order), order)
        if not intact or salts != (salt_1, salt_2) or running != struct.unpack_from(">2I", wal, at + 16):
            return False
    return True


def _wal_sum(data: bytes, start: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = start
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second
