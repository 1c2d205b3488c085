"""A notebook that makes one call with a canary in each channel, and ends as it is told. A program of its own.

Standard input: how the call shall end, then the mark. Standard output: ``calling``, then what became of the call. It
keeps its session until standard input ends.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

import ray_gpu
from tests.proofs import visits
from tests.proofs.canary import ARGUMENT, CHANNELS, canaries
from zones.errors import LeaseLostError, PlacementError

#: Long enough for a busy machine to run what has a lease already, and to look into it. Seconds.
TIMEOUT_S = 12.0
#: Values of a category column never leave the zone.
LEAVING = {*CHANNELS, ARGUMENT} - {"category"}
#: Ways to end a call, and what becomes of it in the notebook; ``""`` where it goes on with another lease, or waits for
#: one. In this order, for the last two break the cluster.
ENDINGS = {
    "returns": "returned",
    "raises": "KeyError",
    "timeout": "CallTimeoutError",
    "cancel": "KeyboardInterrupt",
    "segv": "",
    "oom": "",
    "kill sandbox": "",
    "kill keeper": "",
    "kill actor": "",
    "kill raylet": "",
    "kill custodian": "",
}
#: The cluster may have lost a node just now, and the machine may be busy. Seconds.
PATIENCE_S = 90.0
#: One lease, and no more in it than it takes.
ONE_SHARD = {"concurrency": 1, "shard_bytes": 1 << 24}
#: A global of the function that is sent.
GLOBAL = ""


def held(mark: str) -> Callable[..., Any]:
    """Return a function that has every canary at hand while it waits for SIGUSR1, and then ends as it is told."""
    captured = canaries(mark)["closure"]

    def hold(batch: Any, argument: str, how: str, default: str = canaries(mark)["default"]) -> Any:
        import ctypes
        import logging
        import signal

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        print(argument.replace("argument", "print"))  # noqa: T201 - it is what is tested
        logging.getLogger("theirs").warning(argument.replace("argument", "logging"))
        result = pa.table({"result": [argument.replace("argument", "result")] * len(batch)})
        try:
            raise KeyError(argument.replace("argument", "exception"))
        except KeyError as error:
            kept = (captured, GLOBAL, default, error)
        if not hasattr(signal, "came"):  # once for all shards
            signal.sigwait({signal.SIGUSR1})
            setattr(signal, "came", True)  # noqa: B010 - the module is a place that outlives the call, and has types
        if how == "segv":
            ctypes.string_at(0)
        taken = [bytearray(1)]
        while how == "oom":
            taken.append(bytearray(1 << 26))
        if how == "raises":
            raise kept[3]
        return result

    return hold


def open_lease(zone: Any, options: dict[str, Any]) -> None:
    """Have a lease open, so that a time limit is the function's alone. Ray may still place it on what was killed."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            ray_gpu.gpu_remote(**options)(lambda batch: batch["cost"]).map(zone.read("visits"))
        except (LeaseLostError, PlacementError):
            if time.monotonic() > deadline:
                raise
        else:
            return


def main(attach: Callable[[], Any]) -> None:
    """Make the call in a session that *attach* opens."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background programs ignore it
    how, mark = sys.stdin.readline().strip(), sys.stdin.readline().strip()
    globals()["GLOBAL"] = canaries(mark)["global"]
    say = sys.__stdout__
    assert say
    with attach() as zone:
        # Of the embedded cluster's nodes one is Ray's head, with which all would end: have a lease on both.
        several = {"concurrency": 2, "shard_bytes": 1 << 16}
        options = {"session": zone, "columns": visits.leaving(mark)} | (several if how == "kill raylet" else ONE_SHARD)
        open_lease(zone, options)
        print("calling", file=say, flush=True)
        function = ray_gpu.gpu_remote(**options, timeout_s=TIMEOUT_S if how == "timeout" else None)(held(mark))
        try:
            function.map(zone.read("visits"), canaries(mark)[ARGUMENT], how)
            became = "returned"
        except BaseException as error:  # noqa: BLE001 - whatever becomes of it is told, Ctrl-C too
            became = type(error).__name__
        print(became, file=say, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(lambda: ray_gpu.attach("clinic", purpose="canaries", state_dir=Path(sys.argv[1])))
