"""Overwrites GPU memory between two zones' leases, in a sandbox of its own. This module starts processes.

Drivers need not clear what a process leaves behind. :class:`Tenancy` knows which zones have used the GPUs of a node
since they were last scrubbed; before a lease of another zone starts, :func:`scrub` takes all memory that is free and
writes zeros to it. Memory that another lease holds meanwhile is not free, so nobody else can have it either.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

from ray_gpu.sandbox import boundary
from ray_gpu.sandbox import profile as profiles
from ray_gpu.sandbox.harden import harden_self
from zones.errors import GrantRefusedError

#: CUDA's first start takes seconds; clearing 80 GB well below one. Seconds.
_TIMEOUT_S = 60.0
_MEMORY_BYTES = 4 << 30
#: Who used the GPUs before this custodian started; no zone has such a name.
_UNKNOWN = "?"


def scrub(uid: int, devices: Collection[Path]) -> int | None:
    """Overwrite the free memory of *devices*; return how many bytes that was, or ``None`` where CuPy finds no GPU.

    Args:
        uid: That of the lease for which it is done; unused without root.
        devices: Device nodes of the GPUs.

    Raises:
        GrantRefusedError: It did not work.
    """
    profile = profiles.sandbox("scrub", uid=uid, memory_bytes=_MEMORY_BYTES, keep_fds=(), devices=tuple(devices))
    process = boundary.launch([sys.executable, "-P", "-m", __name__], profile, stdout=subprocess.PIPE)
    try:
        said, _ = process.communicate(timeout=_TIMEOUT_S)
        scrubbed = json.loads(said)["scrubbed_bytes"]
    except (subprocess.TimeoutExpired, ValueError, LookupError, TypeError):
        raise GrantRefusedError(
            "the node's GPU memory could not be scrubbed of another zone's data; see the custodian's log"
        ) from None
    finally:
        process.end()
    return None if scrubbed is None else int(scrubbed)


class Tenancy:
    """Keeps GPU memory that one zone used from the next. Thread-safe.

    Args:
        devices: Device nodes of the node's GPUs; none where NumPy stands in, and then there is nothing to scrub.
        scrubber: :func:`scrub`.
    """

    def __init__(
        self, devices: Collection[Path], scrubber: Callable[[int, Collection[Path]], int | None] = scrub
    ) -> None:
        self._devices = devices
        self._scrubber = scrubber
        self._lock = threading.Lock()
        #: Zones that used the GPUs since the last scrub.
        self._since = {_UNKNOWN}
        #: Leases of each zone whose sandbox may have GPU memory now.
        self._running: Counter[str] = Counter()

    def enter(self, zone: str, uid: int) -> str:
        """Make the GPUs fit for a lease of *zone*, and count it; return what that took, for the receipt.

        Args:
            zone: Whose lease is about to start. :meth:`leave` when its sandbox is gone.
            uid: For the scrub.

        Raises:
            GrantRefusedError: Another zone used them, and they cannot be scrubbed.
        """
        if not self._devices:
            return "no GPU"
        with self._lock:
            others = self._since - {zone}
            scrubbed = self._scrubber(uid, self._devices) if others else 0
            if scrubbed is None and others != {_UNKNOWN}:
                raise GrantRefusedError(
                    "another zone used this node's GPU, and without CuPy it cannot be scrubbed; "
                    "install CuPy there with `make gpu`"
                )
            self._running[zone] += 1
            self._since = {name for name, leases in self._running.items() if leases}
        if not others:
            return "same zone"
        return "CuPy finds no GPU" if scrubbed is None else f"{scrubbed} bytes"

    def leave(self, zone: str) -> None:
        """Count a lease of *zone* off, whose sandbox is gone."""
        with self._lock:
            self._running[zone] -= 1


def main() -> None:
    """Be the scrub: confined like user code, and of no use to it."""
    harden_self(kind="sandbox")
    from ray_gpu import arrays  # noqa: PLC0415 - after hardening

    sys.stdout.write(json.dumps({"scrubbed_bytes": arrays.scrub()}))


if __name__ == "__main__":
    main()
