"""The same on a real cluster of two GPU nodes, through the public API with all controls on. This module does I/O.

A function tells what its sandbox was given. It is the attacker's stand-in: what it returns is what root on the node
could have read. Sizes are those that a capture of the network has, which needs root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import ray_gpu
from adversary.guessing import Seen, Shard
from ray_gpu import embedded
from ray_gpu.state import Layout
from testbed.capture import Capture
from zones.config import load_zone
from zones.errors import EnvelopeError
from zones.header import HEADER_BYTES, Header, sealed_size
from zones.model import Kind

ZONE, DATASET, COLUMN = "clinic", "randhie", "mdvis"
#: A column that is the same in all rows.
ALIKE = "lncoins"
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
        numbers, alike = pa.array(np.arange(self._rows, dtype=np.float64)), pa.array(np.zeros(self._rows))
        table = pa.Table.from_arrays([alike if name == ALIKE else numbers for name in names], names=names)
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

    def demand(self, lines: str, *, min_shards: int = SHARDS) -> None:
        """Put obligations in force in place of the zone's shuffle."""
        demanded = f"min_shards: {min_shards}\n{lines}"
        self._file.write_text(self._text.replace("shuffle: rows", demanded), encoding="utf-8")
        wanted = load_zone(self._policies, ZONE).policy_digest
        deadline = time.monotonic() + 60
        while True:
            with ray_gpu.attach(ZONE, state_dir=self._layout.root) as session:
                if session.status()["policy_digest"] == wanted:
                    return
            if time.monotonic() > deadline:
                raise TimeoutError("the gateway did not take the policy in time")
            time.sleep(0.2)

    def seen(self, calls: int, *, keep_together: str | None = None) -> Seen:
        """Make calls over the whole data set, in one session, and return what the nodes saw."""
        path = self._layout.root / "packets"
        with Capture(os.getpid(), path) as capture:
            with ray_gpu.attach(ZONE, purpose="adversary", state_dir=self._layout.root) as session:
                data = session.read(DATASET, columns=[COLUMN])
                function = given.options(session=session, keep_together=keep_together)
                found = [function.map_reduce(data, list) for _ in range(calls)]
            capture.end()
            if capture.dropped:
                raise RuntimeError(f"the capture lost {capture.dropped} packets; run it on an idle machine")
            sent = list(_shards_sent(capture.streams().values()))
        path.unlink()
        return Seen(
            rows=self._rows,
            calls=_with_sizes([[_shard(number, one) for number, one in enumerate(c)] for c in found], sent),
        )


def _shard(number: int, told: dict[str, Any]) -> Shard:
    rows = told["rows"].astype(np.int64)
    return Shard(node=told["node"], number=number, rows=rows, at=told["at"], size=0)


def messages(stream: bytes) -> Iterator[tuple[Header, int]]:
    """Yield the header of each sealed message in what one connection carried one way, and its bytes on the wire."""
    at = 0
    while at + HEADER_BYTES <= len(stream):
        try:
            header = Header.decode(stream[at : at + HEADER_BYTES])
        except EnvelopeError:
            # Of another program.
            return
        size = HEADER_BYTES + sealed_size(header.padded_bytes)
        yield header, size
        at += size


def _shards_sent(streams: Iterable[bytes]) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each connection that carried any, the number of each shard and its bytes."""
    for stream in streams:
        found = [(header.shard, size) for header, size in messages(stream) if header.kind is Kind.SHARD]
        if found:
            yield found


def _with_sizes(calls: list[list[Shard]], sent: list[list[tuple[int, int]]]) -> list[list[Shard]]:
    """Give each shard its size on the wire: a node's connection carried the node's shards, in their order."""
    by_node: dict[str, list[Shard]] = defaultdict(list)
    for call in calls:
        for shard in sorted(call, key=lambda one: one.at):
            by_node[shard.node].append(shard)
    sizes: dict[tuple[str, float], int] = {}
    for node, shards in by_node.items():
        numbers = [shard.number for shard in shards]
        carried = [stream for stream in sent if [number for number, _ in stream] == numbers]
        if len(carried) != 1:
            raise RuntimeError(
                f"{len(carried)} connections carried the shards of {node}, not one; is the capture whole?"
            )
        sizes |= {(node, shard.at): size for shard, (_, size) in zip(shards, carried[0], strict=True)}
    return [[replace(shard, size=sizes[shard.node, shard.at]) for shard in call] for call in calls]


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
