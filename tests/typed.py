"""What type checkers see of this library: mypy and pyright both check this file, and nothing runs it."""

from __future__ import annotations

from typing import assert_type

import pyarrow as pa

from ray_gpu import Batch, Call, Executor, Instance, RemoteClass, RemoteFunction, Stream, gpu_remote


@gpu_remote
def add(a: int, b: int = 0) -> float:
    """Take numbers."""
    return a + b


@gpu_remote(columns=["x"], num_gpus=0.5)
def total(batch: Batch, factor: float) -> dict[str, float]:
    """Take rows."""
    return {"total": float(batch["x"].sum()) * factor}


class Model:
    """Take state."""

    def predict(self, batch: Batch) -> float:
        """Take rows."""
        return float(len(batch))


def functions(table: pa.Table) -> None:
    """Decorated functions keep their parameters and results."""
    assert_type(add(1, b=2), float)
    assert_type(add.remote(1, b=2), Call[float])
    assert_type(add.remote(1).result(), float)
    assert_type(add.starmap([(1, 2)]), list[float])
    assert_type(add.options(num_gpus=1)(1), float)
    assert_type(total.remote(table, 2.0), Call[dict[str, float]])
    assert_type(total.map_reduce(table, len, 2.0), int)
    assert_type(total.local(table, 2.0), dict[str, float])
    assert_type(total.stream(table, 2.0), Stream[dict[str, float]])
    for one in total.stream(table, 2.0):
        assert_type(one, dict[str, float])
    assert_type(Executor().submit(max, 1, 2).result(), int)
    function: RemoteFunction[[int, int], float] = add
    assert_type(function(1, 2), float)


async def awaited() -> None:
    """Calls are awaited as what the function returns."""
    assert_type(await add.remote(1, 2), float)


def classes() -> None:
    """Decorated classes make what they are."""
    kind = gpu_remote(Model)
    assert_type(kind, RemoteClass[Model])
    assert_type(kind(), Model)
    with kind.remote() as there:
        assert_type(there, Instance[Model])
