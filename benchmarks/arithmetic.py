"""What both sides compute: the same functions on the same table. Pure.

Nothing else of this package is imported here, so that the functions travel to sandboxes by value.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from ray_gpu import Batch

#: Data set in the catalog; its 30 feature columns are scored.
DATASET = "breast_cancer_resampled"


def probabilities(matrix: Any, weights: Any, intercept: float, mean: Any, scale: Any) -> Any:
    """Return a logistic regression's probability for each row of ``float64[rows, 30]``."""
    import numpy as np  # noqa: PLC0415 - a function that travels brings its imports along

    # The formula of ray_gpu.examples.score: no copies of the whole matrix, on either side.
    return 1 / (1 + np.exp(-(matrix @ (weights / scale) + (intercept - mean / scale @ weights))))


def score_batch(batch: Batch, weights: Any, intercept: float, mean: Any, scale: Any) -> Any:
    """Score a shard as this product hands it over."""
    return probabilities(batch.matrix(), weights, intercept, mean, scale)


def score_table(table: pa.Table, weights: Any, intercept: float, mean: Any, scale: Any) -> Any:
    """Score a shard that came to a plain Ray actor as an Arrow table, by the same way to a matrix."""
    return probabilities(Batch(table).matrix(), weights, intercept, mean, scale)


def echo(value: bytes) -> bytes:
    """Return the argument: the smallest call that carries bytes both ways."""
    return value


def add(left: float, right: float) -> float:
    """Return a sum: nothing to compute."""
    return left + right


def products(size: int, times: int) -> float:
    """Multiply a matrix of *size* by itself so many times."""
    import numpy as np  # noqa: PLC0415 - as above

    matrix = found = np.full((size, size), 1 / size)
    for _ in range(times):
        found = found @ matrix
    return float(found.sum())


def total(batch: Batch) -> float:
    """Sum all columns: as cheap as data gets."""
    return float(sum(float(batch[name].sum()) for name in batch))


def ranked(batch: Batch) -> float:
    """Sort each column and take its middle."""
    import numpy as np  # noqa: PLC0415 - as above

    return float(sum(float(np.sort(batch[name])[len(batch) // 2]) for name in batch))


def layers(batch: Batch, times: int) -> Any:
    """Push rows through a layer again and again: dear, and the dearer the more rows."""
    import numpy as np  # noqa: PLC0415 - as above

    rows = batch.matrix()
    weights = np.full((rows.shape[1], rows.shape[1]), 1 / rows.shape[1])
    for _ in range(times):
        rows = np.tanh(rows @ weights)
    return rows.sum(axis=1)


def counted(batch: Batch) -> int:
    """Go through the rows one by one in Python, which no GPU makes faster."""
    column = next(iter(batch))
    return sum(1 for value in batch[column].tolist() if value > 0)
