"""The functions of the demo and the first notebook: what a scientist would write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ray_gpu import Batch, gpu_remote

#: Outcome first, then the regressors.
RANDHIE_COLUMNS = ["mdvis", "lncoins", "idp", "lpi", "fmde", "physlm", "disea", "hlthg", "hlthf", "hlthp"]


@gpu_remote(columns=RANDHIE_COLUMNS)
def statistics(batch: Batch) -> dict[str, Any]:
    """Return the sums that least squares needs of one shard: ``X'X`` and ``X'y``."""
    y, *regressors = (batch[name] for name in batch.columns)
    x = batch.xp.stack([batch.xp.ones_like(y), *regressors], axis=1)
    return {"xtx": x.T @ x, "xty": x.T @ y}


def solve(parts: list[dict[str, Any]]) -> Any:
    """Add the shards' sums and solve for the coefficients; runs in the zone."""
    return np.linalg.solve(sum(part["xtx"] for part in parts), sum(part["xty"] for part in parts))


def least_squares(table: pa.Table) -> Any:
    """Fit the whole table at once with NumPy, to compare."""
    y, *regressors = (table[name].to_numpy() for name in table.column_names)
    return np.linalg.lstsq(np.column_stack([np.ones_like(y), *regressors]), y, rcond=None)[0]


@gpu_remote
def score(batch: Batch, weights: Any, intercept: float, mean: Any, scale: Any) -> Any:
    """Return a logistic regression's probability for each row."""
    xp = batch.xp
    weights, mean, scale = (xp.asarray(item) for item in (weights, mean, scale))
    # The same as ((x - mean) / scale) @ weights + intercept, without copies of the whole batch.
    z = batch.matrix() @ (weights / scale) + (intercept - mean / scale @ weights)
    return 1 / (1 + xp.exp(-z))
