"""The memory that one keeper and its sandbox share, and nobody else.

A sealed-size memory file: ``IN_SLOTS`` areas that the keeper fills with opened shards, then
``OUT_SLOTS`` areas that the sandbox fills with results. Pages are allocated on first touch, so
small calls cost small memory. The file's size is sealed: a sandbox that could shrink it would
kill its keeper with SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os

#: Shards that may wait in the sandbox's memory at once, arguments and functions included.
IN_SLOTS = 4
#: Results that may wait for the keeper.
OUT_SLOTS = 2
#: Largest payload of one slot, bytes. Shards are 1 to 16 MiB; one with a single huge row may be larger.
SLOT_BYTES = 64 << 20


def create() -> int:
    """Return the descriptor of a new memory file whose size is sealed. The caller closes it."""
    fd = os.memfd_create("slots", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SLOT_BYTES * (IN_SLOTS + OUT_SLOTS))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class SlotMap:
    """Views of the slots in a mapped memory file."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._view = memoryview(memory)

    def payload(self, slot: int, size: int) -> memoryview:
        """Return the payload of *size* bytes in an input slot."""
        start = self._start(slot, IN_SLOTS)
        if not 0 <= size <= SLOT_BYTES:
            raise ValueError(f"{size} bytes do not fit a slot")
        return self._view[start : start + size]

    def out_view(self, slot: int) -> memoryview:
        """Return an output slot."""
        start = self._start(slot, OUT_SLOTS) + IN_SLOTS * SLOT_BYTES
        return self._view[start : start + SLOT_BYTES]

    @staticmethod
    def _start(slot: int, slots: int) -> int:
        if not 0 <= slot < slots:
            raise ValueError(f"no slot {slot}")
        return slot * SLOT_BYTES
