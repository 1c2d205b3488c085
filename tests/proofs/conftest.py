"""The zone that the proofs attack: the clinic with one more data set, which the tests write themselves."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.proofs.attacked import COLUMNS, NOTEBOOK_TABLES, SESSION_BYTES, SMALL_BYTES, Attacked

#: Enough for some ten of the smallest shards.
_ROWS = 10_000


@pytest.fixture(scope="session")
def attacked(
    start_cluster: Callable[..., AbstractContextManager[Any]], copy_policies: Callable[..., Path]
) -> Iterator[Attacked]:
    """A running cluster with all controls on, shared by every proof; its zone has the data set ``visits``."""
    mark = secrets.token_hex(12)
    policies = copy_policies(_edits(f"{mark}-name"))
    with start_cluster(data=False, policies=policies) as cluster:
        world = Attacked(state=cluster.state, document=cluster.document, mark=mark)
        _write_visits(world)
        yield world


def _edits(column: str) -> dict[str, tuple[str, str]]:
    """Return what the zone's files say differently: its data set, and a purpose for tables of no data set."""
    columns = "".join(f"      {name}: {classification}\n" for name, classification in COLUMNS.items())
    dataset = f"datasets:\n  visits:\n    path: visits.arrow\n    columns:\n{columns}      {column}: confidential\n"
    tables = f'context.dataset == "" && context.purpose == "{NOTEBOOK_TABLES}"'
    identifiers = 'when { context.classes.contains("direct-identifier") }'
    permit = '@id("notebook-tables")\n@reason("for this purpose alone")\npermit (principal in Group::"research", '
    permit += f'action == Action::"egress", resource == Pool::"shared") when {{ {tables} }};'
    return {
        "clinic/catalog.yaml": ("datasets:\n", dataset),
        "clinic/egress.cedar": (f"{identifiers};", f"{identifiers} unless {{ {tables} }};\n\n{permit}"),
        "clinic/zone.yaml": (
            "max_bytes: 65536\n  max_session_bytes: 4194304",
            f"max_bytes: {SMALL_BYTES}\n  max_session_bytes: {SESSION_BYTES}",
        ),
    }


def _write_visits(world: Attacked) -> None:
    """Write the data set, each kind of column with a canary, where the gateway's uid can read it."""
    table = pa.table(
        {
            "note": [f"{world.mark}-string row {row}" for row in range(_ROWS)],
            "kind": pa.array([f"{world.mark}-category", "other"] * (_ROWS // 2)).dictionary_encode(),
            "cost": pa.array(np.arange(_ROWS, dtype=np.float64)),
            "patient": pa.array(np.arange(_ROWS)),
            f"{world.mark}-name": pa.array(np.arange(_ROWS, dtype=np.float64)),
        }
    )
    path = world.layout.data(world.zone) / "visits.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    owner = path.parent.stat()
    os.chown(path, owner.st_uid, owner.st_gid)
