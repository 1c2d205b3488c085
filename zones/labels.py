"""Which classes a call's bytes have. Every byte that leaves is classified; pure.

Columns of a catalog data set have the catalog's classes. Functions and call arguments
have the zone's ``small_bytes`` class within its caps. Everything else has the zone's
default class, the highest.
"""

from __future__ import annotations

from collections.abc import Iterable

from zones.errors import UnknownNameError
from zones.model import Zone

#: Stands for the columns in a request about a call without a table.
ARGUMENTS = frozenset({"<arguments>"})


def labels(zone: Zone, dataset: str, columns: Iterable[str]) -> dict[str, str]:
    """Return the class of each column. With ``dataset == ""`` that is the zone's default class.

    Raises:
        UnknownNameError: The catalog has no such data set, or the data set no such column.
    """
    if not dataset:
        return dict.fromkeys(columns, zone.default_class)
    if dataset not in zone.datasets:
        raise UnknownNameError.of("dataset", dataset, zone.datasets)
    known = zone.datasets[dataset].columns
    found = {}
    for column in columns:
        if column not in known:
            raise UnknownNameError.of("column", column, known)
        found[column] = known[column]
    return found


def classify(
    zone: Zone,
    *,
    dataset: str,
    columns: Iterable[str] | None,
    function_bytes: int,
    argument_bytes: int,
    session_bytes: int,
) -> frozenset[str]:
    """Return every class among a call's data, function and arguments.

    Args:
        zone: The zone the call starts in.
        dataset: Catalog name, or ``""`` when the data comes from no catalog handle.
        columns: Columns of the table that leaves, or ``None`` when there is no table. (Not a magic
            name: a table whose one column had that name would lose its class.)
        function_bytes: Size of the serialised function with its closure, globals and defaults.
        argument_bytes: Size of the encoded arguments.
        session_bytes: Functions and arguments that this session sent before this call, in bytes.

    Raises:
        UnknownNameError: As :func:`labels`.
        ValueError: A size is negative.
    """
    data = set() if columns is None else set(labels(zone, dataset, columns).values())
    return frozenset(data | {_small_class(zone, function_bytes, argument_bytes, session_bytes)})


def _small_class(zone: Zone, function_bytes: int, argument_bytes: int, session_bytes: int) -> str:
    if min(function_bytes, argument_bytes, session_bytes) < 0:
        raise ValueError("sizes are counted from 0 bytes")
    caps = zone.small_bytes
    if caps is None or max(function_bytes, argument_bytes) > caps.max_bytes:
        return zone.default_class
    if session_bytes + function_bytes + argument_bytes > caps.max_session_bytes:
        return zone.default_class
    return caps.classification
