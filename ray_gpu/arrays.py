"""CuPy or NumPy behind one array namespace, and the batch that a user's function receives.

The only module that imports CuPy. Without a working GPU driver NumPy stands in, and
:func:`device` says so: CuPy imports without a driver but fails on first use, so the
question is always ``cupy.cuda.is_available()``.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

#: Name of the device when NumPy computes.
STAND_IN = "numpy stand-in (no GPU)"
#: Name of the column when data is one array.
ARRAY_COLUMN = "array"
#: GPU memory is scrubbed in pieces from this size down to what the driver hands out at least, bytes.
SCRUB_BYTES, SMALLEST_SCRUB_BYTES = 1 << 30, 2 << 20


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


def scrub() -> int | None:
    """Write zeros to all memory of every GPU that is free; return how many bytes, or ``None`` without a GPU.

    What was taken stays this process's until it ends, so that no byte is left out.
    """
    cupy = _cupy()
    if cupy is None:
        return None
    runtime, total = cupy.cuda.runtime, 0
    for number in range(runtime.getDeviceCount()):
        runtime.setDevice(number)
        size = SCRUB_BYTES
        while size >= SMALLEST_SCRUB_BYTES:
            try:
                runtime.memset(runtime.malloc(size), 0, size)
            except runtime.CUDARuntimeError:
                # No piece of this size is left; smaller ones may be.
                size //= 2
                continue
            total += size
        runtime.deviceSynchronize()
    return total


def to_host(value: Any) -> Any:
    """Return *value* with every CuPy array inside lists, tuples and dicts copied to NumPy."""
    cupy = _cupy()
    if cupy is None:
        return value
    if isinstance(value, cupy.ndarray):
        return value.get()
    if type(value) is dict:
        return {key: to_host(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_host(item) for item in value)
    return value


def is_array(value: Any) -> bool:
    """Say whether *value* is an array with rows that this process can read: NumPy's, or another's with DLPack."""
    return getattr(value, "ndim", 0) >= 1 and (isinstance(value, np.ndarray) or hasattr(value, "__dlpack__"))


def column_of(array: Any) -> Any:
    """Return an array ``[rows, ...]`` as a column, zero-copy where it is in memory row by row.

    Raises:
        TypeError: Arrow has no such numbers, or the array is not on the CPU.
    """
    try:
        rows = array if isinstance(array, np.ndarray) else np.from_dlpack(array)
        column: Any = pa.array(np.ascontiguousarray(rows).reshape(-1))
    except (BufferError, RuntimeError, pa.ArrowException) as error:
        kind = f"{type(array).__module__.partition('.')[0]} {getattr(array, 'dtype', '')}"
        raise TypeError(f"an array of {kind} cannot be a column ({error}); bring it to the CPU, as numbers") from None
    for size in reversed(rows.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


class Batch:
    """Rows handed to a ``@gpu_remote`` function.

    ``batch["age"]`` is an array ``[rows]`` of ``batch.xp`` (CuPy on a GPU, else NumPy) and is
    copied to the device once, on first use; treat it as read-only. Fixed-size lists are further dimensions,
    ``[rows, ...]``. Nulls become NaN, and an integer column is
    ``float64`` where the call's data has nulls in it, also in a shard that has none. Dictionary columns are their
    integer codes; dates and times are integers in their column's unit. Text has no array form: use :meth:`to_arrow`.

    Args:
        table: The shard's rows. The batch borrows its memory; it is valid during the call.
        nullable: Columns that have nulls, if not in these rows then in others; by default those that have some here.
    """

    def __init__(self, table: pa.Table, *, nullable: Collection[str] | None = None) -> None:
        self._table = table
        self._nullable = nullable
        self._arrays: dict[str, Any] = {}

    @classmethod
    def of_shard(cls, table: pa.Table) -> Batch:
        """Return a batch of rows whose fields say which columns have nulls, as ``zones.shards.strip`` writes them."""
        nullable = frozenset(field.name for field in table.schema if field.nullable)
        # The function gets fields as Arrow makes them, so that it can put other rows below these.
        return cls(pa.Table.from_arrays(table.columns, names=table.column_names), nullable=nullable)

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
            self._arrays[column] = self.xp.asarray(self._host_array(column))
        return self._arrays[column]

    def __getattr__(self, name: str) -> Any:
        # Asked only for what a batch has not.
        column = not name.startswith("_") and name in self._table.column_names
        raise AttributeError(f"a batch has no attribute {name!r}" + (f'; write batch["{name}"]' if column else ""))

    def matrix(self, columns: list[str] | None = None, dtype: Any = None) -> Any:
        """Return the named columns (default: all) as one array ``dtype[rows, columns]``, ``float64`` by default.

        Raises:
            KeyError: No such column.
            TypeError: A column has no array form.
            ValueError: A column has nulls, which *dtype* has no value for.
        """
        names = self.columns if columns is None else columns
        # Column by column in memory, so that each column is one plain copy.
        out = np.empty((len(names), len(self)), dtype=np.float64 if dtype is None else dtype).T
        for index, name in enumerate(names):
            array = self._host_array(name)
            if out.dtype.kind in "iub" and self._has_nulls(name):
                raise ValueError(f"column {name!r} has nulls, which {out.dtype} cannot say; ask for a floating type")
            out[:, index] = array
        return self.xp.asarray(out)

    def to_arrow(self) -> pa.Table:
        """Return the rows as an Arrow table."""
        return self._table

    def _has_nulls(self, column: str) -> bool:
        if self._nullable is None:
            return bool(self._table.column(column).null_count)
        return column in self._nullable

    def _host_array(self, column: str) -> Any:
        try:
            # Not asked of column_names first, which for 30 columns costs more than copying a small shard's column.
            values = _one_array(self._table.column(column))
        except KeyError:
            raise KeyError(f"the batch has no column {column!r}; it has {self._table.column_names}") from None
        shape = [len(values)]
        while pa.types.is_fixed_size_list(values.type) and not values.null_count:
            shape.append(values.type.list_size)
            values = values.flatten()
        if isinstance(values, pa.DictionaryArray):
            values = values.indices
        elif pa.types.is_temporal(values.type):
            # CuPy has no dates: days, or the type's own unit, since 1970 or midnight.
            values = values.cast(pa.int32() if values.type.bit_width == 32 else pa.int64())
        array = values.to_numpy(zero_copy_only=False)
        if array.dtype.kind in "iub" and self._has_nulls(column):
            # What these rows would be if the draw had put a null among them.
            array = array.astype(np.float64 if array.dtype.kind != "b" else object)
        if array.dtype == object:
            more = " with nulls" if pa.types.is_boolean(values.type) else ""
            raise TypeError(f"column {column!r} of type {values.type}{more} has no array form; use batch.to_arrow()")
        return array.reshape(shape) if len(shape) > 1 else array

    def __repr__(self) -> str:
        return f"Batch(rows={len(self)}, columns={self.columns}, device={device()!r})"


def _one_array(column: pa.ChunkedArray[Any]) -> Any:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
