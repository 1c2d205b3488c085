"""The same on a real cluster of two GPU nodes, through the public API with all controls on. This module does I/O.

A function tells what its sandbox was given. It is the attacker's stand-in: what it returns is what root on the node
could have read.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import ray_gpu
from adversary.guessing import Seen, Shard
from ray_gpu import embedded
from ray_gpu.state import Layout
from zones.config import load_zone
from zones.envelope import padded_size

ZONE, DATASET, COLUMN = "clinic", "randhie", "mdvis"
#: Least shards of each call.
SHARDS = 16


@ray_gpu.gpu_remote(columns=[COLUMN], concurrency=2)
def given(batch: Any) -> dict[str, Any]:
    """Return which sandbox this is, when, and which rows it was given: their values are their numbers."""
    mark = sys.modules["ray_gpu.arrays"].__dict__.setdefault("mark_of_adversary", secrets.token_hex(8))
    return {"node": mark, "at": time.time(), "rows": np.asarray(batch["mdvis"])}


class Captured:
    """A cluster whose policy demands what is attacked.

    Args:
        state: State directory.
        rows: Rows of the data set.
    """

    def __init__(self, state: Path, rows: int) -> None:
        self._layout, self._rows = Layout(state), rows
        self._policies = state / "policies"
        shutil.copytree(embedded.shipped_policies(), self._policies)
        self._file = self._policies / ZONE / "zone.yaml"
        self._text = self._file.read_text(encoding="utf-8")
        self._write_data()

    def _write_data(self) -> None:
        """Write numbers in every column that the catalog names."""
        names = list(load_zone(self._policies, ZONE).datasets[DATASET].columns)
        numbers = pa.array(np.arange(self._rows, dtype=np.float64))
        table = pa.Table.from_arrays([numbers] * len(names), names=names)
        path = self._layout.data(ZONE) / f"{DATASET}.arrow"
        path.parent.mkdir(mode=0o700, parents=True)
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table)

    def start(self) -> None:
        """Start the cluster."""
        plan = embedded.Plan(state=str(self._layout.root), policies=str(self._policies), data=False)
        embedded.up(plan)

    def stop(self) -> None:
        """Stop it."""
        embedded.down(self._layout)

    def demand(self, lines: str) -> None:
        """Put obligations in force in place of the zone's shuffle."""
        self._file.write_text(self._text.replace("shuffle: rows", f"min_shards: {SHARDS}\n{lines}"), encoding="utf-8")
        wanted = load_zone(self._policies, ZONE).policy_digest
        deadline = time.monotonic() + 60
        while True:
            with ray_gpu.attach(ZONE, state_dir=self._layout.root) as session:
                if session.status()["policy_digest"] == wanted:
                    return
            if time.monotonic() > deadline:
                raise TimeoutError("the gateway did not take the policy in time")
            time.sleep(0.2)

    def seen(self, calls: int) -> Seen:
        """Make calls over the whole data set, in one session, and return what the nodes saw."""
        with ray_gpu.attach(ZONE, purpose="adversary", state_dir=self._layout.root) as session:
            data = session.read(DATASET, columns=[COLUMN])
            found = [given.options(session=session).map_reduce(data, list) for _ in range(calls)]
        return Seen(rows=self._rows, calls=[[_shard(number, one) for number, one in enumerate(c)] for c in found])


def _shard(number: int, told: dict[str, Any]) -> Shard:
    rows = told["rows"].astype(np.int64)
    return Shard(node=told["node"], number=number, rows=rows, at=told["at"], size=padded_size(8 * len(rows) + 500))


@contextlib.contextmanager
def cluster(rows: int) -> Iterator[Captured]:
    """Run a cluster with a state directory of its own."""
    root = Path(tempfile.mkdtemp(prefix="rga"))
    root.chmod(0o711)
    try:
        made = Captured(root / "s", rows)
        made.start()
        try:
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(root, ignore_errors=True)
