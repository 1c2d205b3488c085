"""A small reference computation, which an advisor times on a node and in the zone. Pure but for the clock."""

from __future__ import annotations

import time

from ray_gpu.arrays import namespace


def probe(sent: bytes, size: int) -> float:
    """Return the seconds of one reference computation on ``float64[size, size]``, the best of three; 0 for size 0.

    Args:
        sent: Anything: how long it takes to get here is what the caller measures.
        size: Rows and columns.
    """
    if not size:
        return 0.0
    xp = namespace()
    matrix = xp.reshape(xp.linspace(0.0, 1.0, size * size), (size, size))
    seconds = []
    # The first round makes what later ones find ready.
    for _ in range(4):
        start = time.perf_counter()
        # As a number, so that a GPU has finished it.
        float(xp.sum(xp.exp(matrix) @ matrix))
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
