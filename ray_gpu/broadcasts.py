"""The values that calls of a session may name, as its gateway keeps them: encoded, by digest. Pure."""

from __future__ import annotations

import hashlib
import threading

from ray_gpu.sandbox.functions import VALUE
from ray_gpu.sandbox.memory import SLOT_BYTES
from zones.errors import ValueRefusedError

#: Most bytes of all values of a session.
MAX_BYTES = 256 << 20


class Broadcasts:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, memoryview] = {}

    def add(self, encoded: memoryview) -> str:
        """Keep a value; return its digest.

        Raises:
            ValueRefusedError: It does not fit a lease's memory, or this session has too many already.
        """
        most = SLOT_BYTES - len(VALUE)
        if len(encoded) > most:
            raise ValueRefusedError(
                f"a broadcast of {len(encoded)} bytes is over the limit of {most}; broadcast its parts"
            )
        digest = hashlib.sha256(encoded).hexdigest()
        with self._lock:
            if digest not in self._values and sum(map(len, self._values.values())) + len(encoded) > MAX_BYTES:
                raise ValueRefusedError(
                    f"this session has broadcast {MAX_BYTES >> 20} MiB; attach again for more, or pass small values as "
                    "arguments"
                )
            self._values[digest] = encoded
        return digest

    def get(self, digest: str) -> memoryview:
        """Return a value.

        Raises:
            ValueRefusedError: There is none.
        """
        with self._lock:
            found = self._values.get(digest)
        if found is None:
            raise ValueRefusedError("the call names a broadcast that this session does not have; broadcast it again")
        return found
