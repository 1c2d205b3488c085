"""Values in memory files that are sealed against writing, between gateway and notebook. This module does I/O.

A memory file is filled, unmapped, sealed (``F_SEAL_WRITE``, ``F_SEAL_SHRINK``, ``F_SEAL_GROW``) and its
descriptor sent. The receiver maps it read-only: nothing was copied, and nothing can change any more.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from zones import shards, values
from zones.errors import ValueRefusedError

#: What makes a memory file immutable.
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: Values up to here travel in the message itself.
INLINE_BYTES = 512 << 10
_REQUIRED = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def sealed_file(capacity: int, fill: Callable[[memoryview], int]) -> int:
    """Return the descriptor of a sealed memory file that *fill* wrote; the caller closes it.

    Args:
        capacity: Most bytes that *fill* may write.
        fill: Writes into the view it is given and returns how many bytes it wrote.
    """
    fd = os.memfd_create("ray-gpu", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, max(1, capacity))
        with mmap.mmap(fd, max(1, capacity)) as mapped:
            view = memoryview(mapped)
            used = fill(view)
            view.release()
        os.ftruncate(fd, max(1, used))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_sealed(fd: int, *, private: bool = False) -> memoryview:
    """Map a memory file that came from another process; closes the descriptor.

    Args:
        fd: Its descriptor.
        private: Whether the view may be written to: pages that are become this process's own.

    Raises:
        ValueRefusedError: It is not sealed, so its content could still change.
    """
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _REQUIRED != _REQUIRED:
            raise OSError
        if private:
            return memoryview(mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))
        return memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    except OSError:
        raise ValueRefusedError(
            "the data's memory file is not sealed against writing; send it through ray_gpu's own client"
        ) from None
    finally:
        os.close(fd)


def share_table(table: pa.Table) -> int:
    """Return a sealed memory file that holds *table* as an Arrow IPC stream, view columns as large text or bytes."""
    plain = shards.without_views(table)
    return sealed_file(shards.ipc_size(plain), lambda view: shards.write_ipc_into(plain, view))


def open_table(fd: int, *, trusted: bool) -> pa.Table:
    """Return the table of a memory file from :func:`share_table`, zero-copy; closes the descriptor."""
    return shards.read_ipc(open_sealed(fd), trusted=trusted)


def share_value(value: Any, *, what: str = "result") -> int:
    """Return a sealed memory file that holds an encoded value."""
    ready = values.prepare(value, what=what)
    return sealed_file(ready.size_bytes, ready.write_into)


def share_encoded(parts: list[memoryview]) -> tuple[int, list[list[int]]]:
    """Return a sealed memory file with encoded values one after another, and where each is: ``[start, stop]``."""
    places: list[list[int]] = []
    start = 0
    for part in parts:
        places.append([start, start + len(part)])
        start += -(-len(part) // 64) * 64

    def fill(view: memoryview) -> int:
        for part, (first, last) in zip(parts, places, strict=True):
            view[first:last] = part
        return start

    return sealed_file(start, fill), places
