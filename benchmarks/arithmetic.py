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
