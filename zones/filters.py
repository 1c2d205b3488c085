"""Row filters as small JSON documents. A notebook sends them, so they can name columns and constants and nothing else.

::

    filter     := [column, op, value] | ["and", filter, ...] | ["or", filter, ...] | ["not", filter]
    op         := "==" | "!=" | "<" | "<=" | ">" | ">=" | "in" | "not in" | "is null" | "is not null"

``in`` takes a list, ``is null`` and ``is not null`` take ``None`` or no value. Dates and times are ISO 8601 strings.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from zones.errors import UnknownNameError

#: Parts of one filter, and their nesting: far above what a person writes, far below what exhausts a stack.
MAX_PARTS = 1000
MAX_DEPTH = 32
MAX_LIST = 100_000

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_JOIN: dict[str, Callable[[Any, Any], Any]] = {"and": operator.and_, "or": operator.or_}


def to_expression(doc: Any, columns: pa.Schema | Sequence[str]) -> pc.Expression:
    """Build an Arrow expression from a filter document.

    Args:
        doc: See the module's grammar.
        columns: The columns that exist. A schema also turns ISO 8601 strings into dates and times where needed.

    Raises:
        UnknownNameError: The filter names a column that does not exist.
        ValueError: The document is malformed.
    """
    expression: pc.Expression = _Builder(columns).build(doc, 0)
    return expression


def plain(doc: Any, depth: int = 0) -> Any:
    """Return a filter document with NumPy's scalars as the Python values that they are."""
    if isinstance(doc, (list, tuple)) and depth <= MAX_DEPTH + 1:
        return [plain(part, depth + 1) for part in doc]
    return doc.item() if isinstance(doc, np.generic) else doc


def filter_columns(doc: Any, columns: pa.Schema | Sequence[str]) -> set[str]:
    """Return the names of the columns that a filter reads: they show in which rows leave. Raises as above."""
    builder = _Builder(columns)
    builder.build(doc, 0)
    return builder.used


class _Builder:
    def __init__(self, columns: pa.Schema | Sequence[str]) -> None:
        self.schema = columns if isinstance(columns, pa.Schema) else None
        self.names: list[str] = [str(name) for name in (columns.names if isinstance(columns, pa.Schema) else columns)]
        self.used: set[str] = set()
        self.parts = 0

    def build(self, doc: Any, depth: int) -> Any:
        self.parts += 1
        if self.parts > MAX_PARTS or depth > MAX_DEPTH:
            raise ValueError(f"a filter has at most {MAX_PARTS} parts, nested at most {MAX_DEPTH} deep; simplify it")
        if not isinstance(doc, (list, tuple)) or len(doc) < 2 or not isinstance(doc[0], str):
            raise ValueError("a filter is [column, op, value] or ['and' | 'or' | 'not', filter, ...]")
        # A column may be called "and": only a filter in second place makes it a word.
        if not isinstance(doc[1], (list, tuple)):
            return self._compare(*self._triple(doc))
        inner = [self.build(part, depth + 1) for part in doc[1:]]
        if doc[0] == "not" and len(inner) == 1:
            return ~inner[0]
        if doc[0] not in _JOIN:
            raise ValueError("filters are joined with 'and', 'or' or 'not'; 'not' takes one filter")
        return functools.reduce(_JOIN[doc[0]], inner)

    def _triple(self, doc: Sequence[Any]) -> tuple[str, str, Any]:
        column, op = doc[0], doc[1]
        unary = op in ("is null", "is not null")
        if len(doc) != 3 and not (unary and len(doc) == 2):
            raise ValueError("a comparison is [column, op, value]")
        if column not in self.names:
            message = f"no column {column!r} to filter by; choose one of {', '.join(self.names)}"
            raise UnknownNameError(message, kind="column", name=column, known=self.names)
        self.used.add(column)
        return column, op, None if unary else doc[2]

    def _compare(self, column: str, op: str, value: Any) -> Any:
        cell: Any = pc.field(column)
        if op in ("is null", "is not null"):
            return cell.is_null() if op == "is null" else cell.is_valid()
        if op in ("in", "not in"):
            if not isinstance(value, (list, tuple)) or len(value) > MAX_LIST:
                raise ValueError(f"{op!r} takes a list of at most {MAX_LIST} constants")
            found = cell.isin(self._constants(column, value))
            return found if op == "in" else ~found
        if op not in _COMPARE:
            raise ValueError(f"operator {op!r} is not one of {', '.join([*_COMPARE, 'in', 'not in', 'is null'])}")
        if value is None:
            raise ValueError("a comparison with null is never true; use [column, 'is null']")
        return _COMPARE[op](cell, self._constants(column, [value])[0])

    def _constants(self, column: str, values: Sequence[Any]) -> Any:
        if not all(isinstance(value, (bool, int, float, str)) for value in values):
            raise ValueError("a filter compares with strings, numbers and booleans")
        kind = self.schema.field(column).type if self.schema is not None else None
        constants: Any = list(values)
        try:
            array = pa.array(constants)
            return array.cast(kind) if kind is not None and pa.types.is_temporal(kind) else array
        except (pa.ArrowException, OverflowError):
            raise ValueError(f"a constant does not compare with column {column!r}; check its type") from None


def apply_filter(source: pa.Table | ds.Dataset, doc: Any | None, *, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows of *source* that pass the filter, and of them the columns asked for, in the order asked for.

    Args:
        source: A table, which is not copied where nothing is left out, or a data set, of which only these are read.
        doc: A filter document, or ``None`` for all rows. It may read columns that are not returned.
        columns: Names, or ``None`` for all.

    Raises:
        UnknownNameError: A column does not exist.
        ValueError: The filter is malformed, or compares a column with a constant of another kind.
    """
    names = list(source.schema.names)
    for name in columns or ():
        if name not in names:
            message = f"no column {name!r}; choose one of {', '.join(names)}"
            raise UnknownNameError(message, kind="column", name=name, known=names)
    expression = None if doc is None else to_expression(doc, source.schema)
    chosen = names if columns is None else list(columns)
    try:
        if isinstance(source, pa.Table):
            return (source if expression is None else source.filter(expression)).select(chosen)
        return source.to_table(columns=chosen, filter=expression)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        raise ValueError("the filter compares a column with a constant of another type; check its types") from None
