"""A table becomes shards that say nothing about their place, and results become rows in order again.

A call goes :func:`strip` → :func:`zones.plan.make_plan` → one :func:`write_shard_into` per shard →
:func:`reassemble`. The functions of :mod:`zones.ipc`, :mod:`zones.plan` and :mod:`zones.filters` that such
a call needs are reachable from here too.

Nothing here reads a clock, randomness or files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from zones.errors import RowCountError, UnknownNameError, ValueRefusedError
from zones.filters import apply_filter as apply_filter
from zones.filters import to_expression as to_expression
from zones.ipc import ipc_size as ipc_size
from zones.ipc import plain_column
from zones.ipc import read_ipc as read_ipc
from zones.ipc import without_views as without_views
from zones.ipc import write_ipc_into as write_ipc_into
from zones.plan import SEED_BYTES as SEED_BYTES
from zones.plan import Index
from zones.plan import Plan as Plan
from zones.plan import cut as cut
from zones.plan import make_plan as make_plan
from zones.plan import order as order
from zones.plan import parse_shuffle as parse_shuffle
from zones.plan import row_bytes as row_bytes
from zones.plan import split_rows as split_rows

Array = npt.NDArray[Any]

# --- strip --------------------------------------------------------------------------------------------------------


def strip(table: pa.Table, *, keep_categories: Collection[str] = (), join: bool = True) -> pa.Table:
    """Return *table* without metadata and category values, and with its numbers in one chunk per column.

    Column names stay: functions ask for them. A dictionary column becomes its integer codes, unless it is in
    *keep_categories*; then the category values of these rows leave, all of them with each shard, and no others. Numbers
    in several chunks are joined into one, unless *join* is false, which for a moment takes their memory twice; nothing
    else is copied.

    A field says whether its column has nulls (``nullable``). Every shard carries this one bit of the whole, so that
    what a function gets, and returns, is not of one type here and another there, as the shuffle has it.

    Raises:
        ValueRefusedError: A column's type could carry more than its rows; see :func:`zones.ipc.check_type`. Or a column
            of *keep_categories* has no categories.
        UnknownNameError: There is no such column.
    """
    names = table.column_names
    for name in keep_categories:
        if name not in names:
            raise UnknownNameError.of("column", name, names)
        if not pa.types.is_dictionary(table.schema.field(name).type):
            raise ValueRefusedError(f"column {name!r} has no categories; take it out of categories=[...]")
    columns = [_strip_column(table.column(i), name, name in keep_categories, join) for i, name in enumerate(names)]
    fields = [
        pa.field(name, column.type, nullable=bool(column.null_count) or pa.types.is_null(column.type))
        for name, column in zip(names, columns, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def _strip_column(column: Any, name: str, keep_categories: bool, join: bool) -> Any:
    if keep_categories:
        column = _used_categories(column)
    elif pa.types.is_dictionary(column.type):
        kind = column.type.index_type
        # Codes of different chunks mean the same category only after this.
        column = _chunked([chunk.indices for chunk in column.unify_dictionaries().chunks], kind)
    column = plain_column(column, f"column {name!r}")
    if pa.types.is_struct(column.type) and column.null_count:
        column = _chunked([_hide_nulls(chunk) for chunk in column.chunks], column.type)
    stays = not join or column.num_chunks == 1 or _cell_type(column.type) is None
    return column if stays else _chunked([column.combine_chunks()], column.type)


def _used_categories(column: Any) -> Any:
    """Return a dictionary column with the categories that its rows have: in their order if they have one, else sorted.

    The order of a dictionary without one may be that in which rows came.
    """
    whole = column.unify_dictionaries().combine_chunks()
    categories = pc.unique(whole.dictionary.take(whole.indices)).drop_null()
    places = pc.index_in(categories, value_set=whole.dictionary) if whole.type.ordered else categories
    categories = categories.take(pc.sort_indices(places))
    codes = pc.index_in(whole.dictionary.take(whole.indices), value_set=categories).cast(whole.type.index_type)
    return _chunked([pa.DictionaryArray.from_arrays(codes, categories, ordered=whole.type.ordered)], whole.type)


def _chunked(chunks: Any, kind: Any) -> Any:
    return pa.chunked_array(chunks, kind)


def _hide_nulls(array: Any) -> Any:
    # The fields of a null struct may still hold values; flatten makes them null, and take then overwrites them.
    return pa.StructArray.from_arrays(array.flatten(), fields=list(array.type), mask=array.is_null())


# --- gather -------------------------------------------------------------------------------------------------------

_Runs = Sequence[tuple[slice, Index | slice]]


def shard_size(table: pa.Table, plan: Plan, shard: int) -> int:
    """Return the bytes that :func:`write_shard_into` writes.

    Costs nothing for fixed-width columns without nulls; otherwise as much as :func:`shard_table`, which is then
    better called once, with :func:`ipc_size` and :func:`write_ipc_into` after it.
    """
    if _moves_directly(table, plan, shard):
        return _layout(table.schema, plan.shard_rows(shard)).size
    return ipc_size(shard_table(table, plan, shard))


def write_shard_into(table: pa.Table, plan: Plan, shard: int, out: memoryview) -> int:
    """Write the rows of *shard* as an Arrow IPC stream into *out*, without a copy between where that is possible.

    Args:
        table: From :func:`strip`, with ``plan.rows`` rows.
        plan: Where each row goes.
        shard: Its number, from 0.
        out: Caller's buffer, at least :func:`shard_size` bytes.

    Returns:
        Bytes written.

    Raises:
        ValueError: *out* is too short, or *table* is not the plan's.
    """
    if not _moves_directly(table, plan, shard):
        return write_ipc_into(shard_table(table, plan, shard), out)
    rows = plan.shard_rows(shard)
    layout = _layout(table.schema, rows)
    if len(out) < layout.size:
        raise ValueError(f"a shard of {layout.size} bytes does not fit in {len(out)}; ask shard_size first")
    for start, constant in layout.constants:
        out[start : start + len(constant)] = constant
    runs = list(plan.runs(shard))
    for column, start in zip(table.columns, layout.columns, strict=True):
        cells = _cells(column.chunk(0))
        _gather(cells, np.frombuffer(out, cells.dtype, rows, start), runs, plan)
    return layout.size


def write_shard(table: pa.Table, plan: Plan, shard: int, room: Callable[[int], memoryview]) -> int:
    """Write the rows of *shard* as an Arrow IPC stream into the buffer that ``room(size)`` returns.

    Gathers once, whatever the columns' types. Arguments as in :func:`write_shard_into`.
    """
    if _moves_directly(table, plan, shard):
        return write_shard_into(table, plan, shard, room(shard_size(table, plan, shard)))
    rows = shard_table(table, plan, shard)
    return write_ipc_into(rows, room(ipc_size(rows)))


def shard_table(table: pa.Table, plan: Plan, shard: int) -> pa.Table:
    """Return the rows of *shard* in its order, one chunk per column.

    What lies beneath a null is overwritten, and no buffer holds another shard's rows. Arguments as in
    :func:`write_shard_into`, which saves a copy.
    """
    _check_rows(table, plan)
    runs = list(plan.runs(shard))
    index = None if all(_moves(column) for column in table.columns) else pa.array(plan.row_index(shard))
    columns = [_shard_column(column, plan, runs, index) for column in table.columns]
    return pa.Table.from_arrays(columns, schema=table.schema)


def _shard_column(column: Any, plan: Plan, runs: _Runs, index: Any) -> Any:
    source = runs[0][1]
    if isinstance(source, slice) and len(runs) == 1 and _slices(column):
        return column.slice(source.start, source.stop - source.start).combine_chunks()
    if _moves(column):
        cells = _cells(column.chunk(0))
        target = np.empty(sum(run.stop - run.start for run, _ in runs), cells.dtype)
        _gather(cells, target, runs, plan)
        return _column(target, column.type)
    return column.take(index).combine_chunks()


def _moves(column: Any) -> bool:
    """Say whether cells are whole bytes in one place, all valid, so that NumPy may move them."""
    return bool(column.num_chunks == 1 and column.null_count == 0 and _cell_type(column.type) is not None)


def _slices(column: Any) -> bool:
    # Arrow writes a slice's last byte of bits whole, with the next rows' bits in it; hence no bits and no nulls.
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    whole_bytes = _cell_type(column.type) is not None or any(test(column.type) for test in text)
    return whole_bytes and column.null_count == 0


def _moves_directly(table: pa.Table, plan: Plan, shard: int) -> bool:
    _check_rows(table, plan)
    return plan.shard_rows(shard) > 0 and table.num_columns > 0 and all(_moves(column) for column in table.columns)


def _check_rows(table: pa.Table, plan: Plan) -> None:
    if table.num_rows != plan.rows:
        raise ValueError(f"the plan is for {plan.rows} rows, but the table has {table.num_rows}; make a new plan")


@lru_cache(maxsize=64)
def _cell_type(kind: Any) -> np.dtype[Any] | None:
    if pa.types.is_dictionary(kind) or pa.types.is_nested(kind) or pa.types.is_boolean(kind):
        return None
    try:
        width = kind.bit_width // 8
    except ValueError:
        return None
    return np.dtype(f"u{width}" if width in (1, 2, 4, 8) else f"V{width}") if width else None


def _cells(array: Any) -> Array:
    cell = _cell_type(array.type)
    assert cell is not None  # the callers asked _moves
    if len(array) == 0:
        return np.empty(0, cell)
    return np.frombuffer(array.buffers()[1], cell, len(array), array.offset * cell.itemsize)


def _column(cells: Array, kind: Any) -> Any:
    data: Any = cells
    return pa.Array.from_buffers(kind, len(cells), [None, pa.py_buffer(data)])


def _gather(cells: Array, target: Array, runs: _Runs, plan: Plan) -> None:
    for rows, source in runs:
        if isinstance(source, slice):
            target[rows] = cells[source]
        else:
            # "clip" never clips here; it spares take the second buffer that "raise" fills before writing to out.
            units = _by_unit(cells, plan)
            np.take(units, source, axis=0, out=target[rows].reshape(-1, *units.shape[1:]), mode="clip")


def _by_unit(rows: Array, plan: Plan) -> Array:
    """View whole units: ``[rows, ...]`` as ``[rows // block_rows, block_rows, ...]``, unchanged for single rows."""
    n, whole = plan.block_rows, plan.rows // plan.block_rows
    return rows if n == 1 else rows[: whole * n].reshape(whole, n, *rows.shape[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where an IPC stream of fixed-width columns keeps its cells, and every byte around them."""

    size: int
    columns: tuple[int, ...]
    constants: tuple[tuple[int, bytes], ...]


@lru_cache(maxsize=16)
def _layout(schema: pa.Schema, rows: int) -> _Layout:
    # Arrow itself writes a table of zeros; then we look where each column landed.
    cells = [cell for kind in schema.types if (cell := _cell_type(kind)) is not None]
    columns = [_column(np.zeros(rows, cell), kind) for cell, kind in zip(cells, schema.types, strict=True)]
    blank = pa.Table.from_arrays(columns, schema=schema)
    stream: Any = np.zeros(ipc_size(blank), np.uint8)
    write_ipc_into(blank, memoryview(stream))
    buffers = [_buffer(column.chunk(0)) for column in read_ipc(memoryview(stream), trusted=True).columns]
    starts = [int(buffer.address) - int(stream.ctypes.data) for buffer in buffers]
    stops = [start + rows * cell.itemsize for start, cell in zip(starts, cells, strict=True)]
    around = zip([0, *stops], [*starts, len(stream)], strict=True)
    constants = tuple((a, stream[a:b].tobytes()) for a, b in around if b > a)
    return _Layout(size=len(stream), columns=tuple(starts), constants=constants)


def _buffer(array: Any) -> Any:
    return array.buffers()[1]


# --- reassemble ---------------------------------------------------------------------------------------------------


def reassemble(parts: Mapping[int, Any], plan: Plan) -> Any:
    """Put results back into the source's order.

    Args:
        parts: The result of each shard: all tables, or all arrays with rows first.
        plan: The plan that the shards were cut by.

    Returns:
        A table, or an array with the parts' dtype (the widest of one kind) and ``plan.rows`` rows.

    Raises:
        RowCountError: A part has not one row per row of its shard.
        ValueRefusedError: The parts do not fit together: other types, columns or shapes.
        ValueError: A shard is missing, or there is one too many.
    """
    if set(parts) != set(range(len(plan))):
        raise ValueError(f"{len(plan)} shards were cut, but {len(parts)} came back; wait for all of them")
    ordered = [parts[shard] for shard in range(len(plan))]
    tables = [part for part in ordered if isinstance(part, pa.Table)]
    arrays = [part for part in ordered if isinstance(part, np.ndarray)]
    if max(len(tables), len(arrays)) != len(ordered) or any(array.ndim == 0 for array in arrays):
        raise ValueRefusedError("f.map needs tables from all shards, or arrays with one row per row from all shards")
    for shard, part in enumerate(ordered):
        _check_count(plan.shard_rows(shard), part.shape[0])
    return _join_tables(tables, plan) if tables else _join_arrays(arrays, plan)


def _check_count(expected: int, got: int) -> None:
    if got != expected:
        raise RowCountError(
            f"the function returned {got} rows for a shard of {expected}; return one row per row, or use map_reduce",
            expected=expected,
            got=got,
        )


def _join_arrays(parts: Sequence[Array], plan: Plan) -> Array:
    if len({(part.shape[1:], part.dtype.kind) for part in parts}) > 1:
        seen = sorted({f"{part.dtype}{list(part.shape[1:])}" for part in parts})
        raise ValueRefusedError(f"shards returned different arrays ({', '.join(seen)}); convert them with astype")
    result = np.empty((plan.rows, *parts[0].shape[1:]), np.result_type(*{part.dtype for part in parts}))
    _scatter(parts, result, plan)
    return result


def _scatter(parts: Sequence[Array], result: Array, plan: Plan) -> None:
    for shard, part in enumerate(parts):
        for rows, source in plan.runs(shard):
            if isinstance(source, slice):
                result[source] = part[rows]
            else:
                units = _by_unit(result, plan)
                units[source] = part[rows].reshape(len(source), *units.shape[1:])


def _join_tables(parts: Sequence[pa.Table], plan: Plan) -> pa.Table:
    names = parts[0].column_names
    if any(part.column_names != names for part in parts):
        raise ValueRefusedError("shards returned tables with different columns; return the same columns from each")
    # By place while they are joined: names may be there twice, and Arrow promotes by name.
    places = [str(place) for place in range(len(names))]
    try:
        # A column that is empty in one shard arrives there with the null type: promote that and nothing else.
        joined = pa.concat_tables([part.rename_columns(places) for part in parts], promote_options="default")
    except pa.ArrowException:
        raise ValueRefusedError("shards returned columns of different types; cast them to one type") from None
    unified = joined.unify_dictionaries().rename_columns(names)
    return unified if plan.order is None else unified.take(_inverse(plan))


def _inverse(plan: Plan) -> Any:
    place = np.empty(plan.rows, np.int64)
    place[np.concatenate([plan.row_index(shard) for shard in range(len(plan))])] = np.arange(plan.rows)
    return pa.array(place)
