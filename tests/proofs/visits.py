"""The data set ``visits``: a canary in every kind of column. Writes files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.proofs.attacked import COLUMNS
from tests.proofs.canary import as_float64, as_int64, canaries

#: Enough for some ten of the smallest shards.
ROWS = 10_000


def catalog(mark: str) -> tuple[str, str]:
    """Return the edit of a zone's catalog that adds the data set: a line, and what it becomes."""
    columns = "".join(f"      {name}: {level}\n" for name, level in COLUMNS.items())
    columns += f"      {canaries(mark)['name']}: confidential\n"
    return "datasets:\n", f"datasets:\n  visits:\n    path: visits.arrow\n    columns:\n{columns}"


def leaving(mark: str) -> list[str]:
    """Return the columns with canaries that may leave."""
    return ["note", "kind", "cost", "count", "share", canaries(mark)["name"]]


def table(mark: str) -> pa.Table:
    """Return the data."""
    text = canaries(mark)
    return pa.table(
        {
            "note": [f"{text['value']} row {row}" for row in range(ROWS)],
            "kind": pa.array([text["category"], "other"] * (ROWS // 2)).dictionary_encode(),
            "cost": pa.array(np.arange(ROWS, dtype=np.float64)),
            "count": pa.array(np.full(ROWS, as_int64(mark))),
            "share": pa.array(np.full(ROWS, as_float64(mark))),
            "patient": pa.array(np.arange(ROWS)),
            text["name"]: pa.array(np.arange(ROWS, dtype=np.float64)),
        }
    )


def write(path: Path, mark: str) -> None:
    """Write the data where the uid that owns the directory can read it."""
    data = table(mark)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, data.schema) as writer:
        writer.write_table(data)
    owner = path.parent.stat()
    os.chown(path, owner.st_uid, owner.st_gid)
