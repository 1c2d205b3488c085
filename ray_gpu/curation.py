"""Makes derived data sets: runs the zone's reviewed steps on the zone's own data. This module does I/O.

``ray-gpu data derive`` is for whoever keeps the zone's data; nothing leaves the zone by it. A gateway never runs a
step. What was read, by which step, and what came of it is written beside the file (:mod:`zones.lineage`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_gpu import data_files, demo_data, source
from zones import lineage
from zones.config import load_zone, steps_path
from zones.errors import ConfigError, UnknownNameError, ZoneError
from zones.model import Dataset, Reading, Zone
from zones.steps import ROW_COLUMN, parse


def order(zone: Zone, names: Sequence[str] = ()) -> list[str]:
    """Return derived data sets, each after those that it comes from.

    Args:
        zone: The zone.
        names: Those that are wanted, and what they come from; by default all.

    Raises:
        UnknownNameError: There is no such data set, or it is not derived.
    """
    known = [name for name, dataset in zone.datasets.items() if dataset.derived is not None]
    for name in names:
        if name not in known:
            raise UnknownNameError.of("derived dataset", name, known)
    found: dict[str, None] = {}

    def visit(name: str) -> None:
        derived = zone.datasets[name].derived
        if derived is not None and name not in found:
            for parent, reading in derived.reads.items():
                for other in (*sorted(lineage.rounds_read(zone.datasets[parent], reading)), parent):
                    visit(other)
            found[name] = None

    for name in names or known:
        visit(name)
    return list(found)


def outdated(zone: Zone, data_dir: Path, name: str) -> str:
    """Return why a derived data set has to be derived (again); ``""`` when it is what its step would make now."""
    try:
        data_files.checked_lineage(zone.datasets, data_dir, name)
    except ConfigError as error:
        return error.message
    return ""


def derive(zone: Zone, policies_dir: Path, data_dir: Path, name: str) -> dict[str, Any]:
    """Run the step of a derived data set, write the file and what it comes from, and return that.

    The old file stays until the new one is whole.

    Args:
        zone: As *policies_dir* describes it.
        policies_dir: Where its steps are.
        data_dir: The zone's data.
        name: The data set.

    Raises:
        UnknownNameError: There is no such data set, or it is not derived.
        ConfigError: What it comes from is missing or outdated, the step was changed but not its version, failed, or
            returned something else than the catalog says.
    """
    order(zone, [name])
    dataset = zone.datasets[name]
    derived = dataset.derived
    assert derived is not None
    before = data_files.written_lineage(dataset, data_dir)
    now = {"step": derived.step, "version": derived.version, "step_digest": derived.digest}
    was = {key: before.get(key) for key in now} if isinstance(before, dict) else now
    if was != now and was == {**now, "step_digest": was["step_digest"]}:
        raise ConfigError(
            f"step {derived.step} of zone {zone.name} was changed since version {derived.version} of it made "
            f"{name}; raise its version in {steps_path(zone.name)} and in the catalog",
            file=steps_path(zone.name),
        )
    parents, tables, carried = [], [], None
    for parent, reading in derived.reads.items():
        found = source.from_catalog(zone, data_dir, _handle(parent, reading), None)
        table = found.table.select(list(reading.columns))
        if reading.carries:
            carried = found.table.select(list(reading.carries))
            table = table.append_column(ROW_COLUMN, pa.array(np.arange(found.rows)))
        tables.append(table)
        parents.append(
            lineage.parent(
                zone.datasets[parent],
                reading,
                digest=found.digest,
                rows=found.rows,
                lineage=found.lineage,
                listed=found.listed,
            )
        )
    table = _made(dataset, _function(zone, policies_dir, derived.step, derived.digest), tables, carried)
    path = data_dir / dataset.path
    _write(data_dir, path, lambda partial: _write_table(partial, path.suffix, table))
    document = lineage.document(
        dataset,
        digest=data_files.digest(dataset, data_dir),
        rows=table.num_rows,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        parents=parents,
    )
    text = json.dumps(document, indent=1)
    beside = data_files.lineage_path(dataset, data_dir)
    _write(data_dir, beside, lambda partial: partial.write_text(text, encoding="utf-8"))
    return document


def _handle(parent: str, reading: Reading) -> dict[str, Any]:
    columns = [*reading.columns, *reading.carries]
    return {"dataset": parent, "columns": columns, "segments": list(reading.segments) or None}


def _function(zone: Zone, policies_dir: Path, step: str, digest: str) -> Callable[..., Any]:
    """Run the file of steps and return one, which must be the text that the zone was read with."""
    file = policies_dir / steps_path(zone.name)
    text = file.read_text(encoding="utf-8")
    found = parse(text, str(file)).get(step)
    if found is None or found.digest != digest:
        raise ConfigError(f"{file} changed while it was read; try again", file=str(file))
    namespace: dict[str, Any] = {"__name__": f"steps_of_{zone.name}", "__file__": str(file)}
    try:
        # The zone's own reviewed code, run by whoever keeps its data.
        exec(compile(text, str(file), "exec"), namespace)
    except Exception as error:
        raise ConfigError(f"{file} does not run: {type(error).__name__}: {error}", file=str(file)) from error
    function: Callable[..., Any] = namespace[step]
    return function


def _made(
    dataset: Dataset, function: Callable[..., Any], tables: Sequence[pa.Table], carried: pa.Table | None
) -> pa.Table:
    """Return what a step makes, with the columns that were carried past it, if it is what the catalog says."""
    assert dataset.derived is not None
    where = f"step {dataset.derived.step}, which makes {dataset.name},"
    try:
        table = function(*tables)
    except Exception as error:
        raise ConfigError(f"{where} failed: {type(error).__name__}: {error}", file=dataset.path) from error
    if not isinstance(table, pa.Table):
        raise ConfigError(f"{where} returned {type(table).__name__}, not a pyarrow.Table", file=dataset.path)
    if carried is not None:
        table = _joined(table, carried, where, dataset)
    if table.column_names != list(dataset.columns):
        raise ConfigError(
            f"{where} returned columns {', '.join(table.column_names)}, and the catalog has "
            f"{', '.join(dataset.columns)}; correct one of the two",
            file=dataset.path,
        )
    return table.replace_schema_metadata(None)


def _joined(table: pa.Table, carried: pa.Table, where: str, dataset: Dataset) -> pa.Table:
    """Return a step's rows with the columns that were carried past it, in the catalog's order."""
    if ROW_COLUMN not in table.column_names:
        raise ConfigError(f"{where} returned no column {ROW_COLUMN}; return what it was given there", file=dataset.path)
    rows = table.column(ROW_COLUMN).combine_chunks()
    if not pa.types.is_int64(rows.type) or rows.null_count or not set(rows.to_pylist()) <= set(range(carried.num_rows)):
        raise ConfigError(f"{where} returned numbers of rows that it was not given", file=dataset.path)
    table, further = table.drop_columns([ROW_COLUMN]), carried.take(rows)
    for name in further.column_names:
        if name not in table.column_names:
            table = table.append_column(name, further.column(name))
    columns = list(dataset.columns)
    return table.select(columns) if sorted(table.column_names) == sorted(columns) else table


def _write_table(path: Path, suffix: str, table: pa.Table) -> None:
    if suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _write(data_dir: Path, path: Path, write: Callable[[Path], Any]) -> None:
    """Put a file in its place once it is whole; it belongs to whom the data directory belongs to."""
    owner = data_dir.stat()
    for folder in reversed([one for one in path.parents if data_dir in one.parents and not one.exists()]):
        folder.mkdir(mode=0o700)
        _give(folder, owner)
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600)
    write(partial)
    _give(partial, owner)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _give(path: Path, owner: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def derive_outdated(
    zone: Zone, policies_dir: Path, data_dir: Path, names: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Derive what has to be, in order; yield each name, and what it comes from, or ``None`` where nothing was to do.

    Raises as :func:`order` and :func:`derive`.
    """
    for name in order(zone, names):
        yield name, derive(zone, policies_dir, data_dir, name) if outdated(zone, data_dir, name) else None


def main(argv: Sequence[str]) -> None:
    """Make the shipped data sets of an embedded zone, and derive the others. ``argv``: zone, policies, data."""
    name, policies_dir, data_dir = argv[0], Path(argv[1]), Path(argv[2])
    demo_data.write(name, data_dir)
    try:
        for _ in derive_outdated(load_zone(policies_dir, name), policies_dir, data_dir):
            pass
    except ZoneError as error:
        sys.exit(f"data sets were not derived: {error.message}")


if __name__ == "__main__":
    main(sys.argv[1:])
