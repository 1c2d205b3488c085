"""CuPy or NumPy behind one array namespace, and the batch that a user's function receives.

The only module that imports CuPy. Without a working GPU driver NumPy stands in, and
:func:`device` says so: CuPy imports without a driver but fails on first use, so the
question is always ``cupy.cuda.is_available()``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

#: Name of the device when NumPy computes.
STAND_IN = "numpy stand-in (no GPU)"


@functools.cache
def _cupy() -> Any | None:
    try:
        import cupy  # noqa: PLC0415 - optional, slow, and absent on CPU hosts
    except ImportError:
        return None
    return cupy if cupy.cuda.is_available() else None


@functools.cache
def namespace() -> Any:
    """Return the array-API namespace: array_api_compat's CuPy, or NumPy as its stand-in."""
    if _cupy() is not None:
        import array_api_compat.cupy as xp  # noqa: PLC0415 - needs a driver

        return xp
    import array_api_compat.numpy as stand_in  # noqa: PLC0415 - the other branch of the same choice

    return stand_in


def device() -> str:
    """Return the name of what computes: the GPU's product name, or :data:`STAND_IN`."""
    cupy = _cupy()
    if cupy is None:
        return STAND_IN
    return str(cupy.cuda.runtime.getDeviceProperties(0)["name"].decode())


def to_host(value: Any) -> Any:
    """Return *value* with every CuPy array inside lists, tuples and dicts copied to NumPy."""
    if _cupy() is not None and isinstance(value, _cupy().ndarray):  # type: ignore[union-attr]  # checked on the left
        return value.get()
    if type(value) is dict:
        return {key: to_host(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_host(item) for item in value)
    return value


class Batch:
    """Rows handed to a ``@gpu_remote`` function.

    ``batch["age"]`` is an array ``[rows]`` of ``batch.xp`` (CuPy on a GPU, else NumPy) and is
    copied to the device once, on first use. Nulls become NaN in floating and integer columns;
    dictionary columns are their integer codes. Text has no array form: use :meth:`to_arrow`.

    Args:
        table: The shard's rows. The batch borrows its memory; it is valid during the call.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._arrays: dict[str, Any] = {}

    @property
    def xp(self) -> Any:
        """The array namespace, for code that runs on both CuPy and NumPy."""
        return namespace()

    @property
    def columns(self) -> list[str]:
        """Column names, in the order they were asked for."""
        return list(self._table.column_names)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __contains__(self, column: object) -> bool:
        return column in self._table.column_names

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __getitem__(self, column: str) -> Any:
        if column not in self._arrays:
            self._arrays[column] = self.xp.asarray(_host_array(self._table, column))
        return self._arrays[column]

    def matrix(self, columns: list[str] | None = None, dtype: Any = None) -> Any:
        """Return the named columns (default: all) as one array ``dtype[rows, columns]``, ``float64`` by default."""
        names = self.columns if columns is None else columns
        out = np.empty((len(self), len(names)), dtype=np.float64 if dtype is None else dtype)
        for index, name in enumerate(names):
            out[:, index] = _host_array(self._table, name)
        return self.xp.asarray(out)

    def to_arrow(self) -> pa.Table:
        """Return the rows as an Arrow table."""
        return self._table

    def __repr__(self) -> str:
        return f"Batch(rows={len(self)}, columns={self.columns}, device={device()!r})"


def _host_array(table: pa.Table, column: str) -> Any:
    if column not in table.column_names:
        raise KeyError(f"the batch has no column {column!r}; it has {table.column_names}")
    values = table.column(column)
    values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    if pa.types.is_dictionary(values.type):
        values = values.indices
    array = values.to_numpy(zero_copy_only=False)
    if array.dtype == object:
        raise TypeError(f"column {column!r} of type {values.type} has no array form; use batch.to_arrow()")
    return array
