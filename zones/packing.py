"""msgpack, packed by one packer for each thread. Pure."""

from __future__ import annotations

import threading
from typing import Any

import msgpack


class _Mine(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        # msgpack.packb() makes one for every value, with a buffer of 256 KiB, which costs more than the packing.
        self.packer = msgpack.Packer(use_bin_type=True)


_mine = _Mine()


def pack(value: Any) -> bytes:
    """Return *value* as msgpack. Raises as ``msgpack.packb``; the packer is then as good as new."""
    packed: bytes = _mine.packer.pack(value)
    return packed
