"""What a node, or whoever watches the network, learns from what it gets: and the same look where nothing is done."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from zones import plan, shards
from zones.envelope import HEADER_BYTES, LeaseKey, Sealer, padded_size, sealed_size
from zones.ipc import ipc_size, read_ipc, write_ipc_into
from zones.model import Direction, Kind, Obligations, Shuffle, Slot

ROWS = 4_000


def received(table: pa.Table, shuffle: str) -> list[pa.Table]:
    """Return the shards of a table as nodes read them."""
    order = plan.make_plan(
        len(table), 8, obligations=Obligations(shuffle=Shuffle(shuffle)), seed=os.urandom(32), shard_bytes=8_000,
        min_shards=2,
    )  # fmt: skip
    found = []
    for index in range(len(order)):
        buffer = memoryview(bytearray(1 << 20))
        size = shards.write_shard(table, order, index, lambda capacity, buffer=buffer: buffer[:capacity])  # type: ignore[misc]  # no type for the default
        found.append(read_ipc(bytes(buffer[:size]), trusted=True))
    return found


def follows(parts: list[pa.Table]) -> float:
    """Return the share of rows after which comes the row that followed it in the source."""
    rows = np.concatenate([part["n"].to_numpy() for part in parts])
    return float(np.mean(np.diff(rows) == 1))


def numbered() -> pa.Table:
    """Return rows that know their place."""
    return pa.table({"n": pa.array(np.arange(ROWS))})


def test_order_is_not_found() -> None:
    """Shuffled rows follow one another no more often than chance has it."""
    assert follows(received(numbered(), "rows")) < 0.01


def test_control_order_is_found() -> None:
    """Without the shuffle the same look finds all of the order."""
    assert follows(received(numbered(), "none")) > 0.99


def described() -> pa.Table:
    """Return a table whose schema and categories say more than its rows."""
    table = pa.table({"kind": pa.array(["SECRETCITY", "other"] * 50).dictionary_encode()})
    return table.replace_schema_metadata({"note": "SECRETNOTE"})


def found_words(table: pa.Table) -> set[str]:
    """Return which of the secrets stand in what a node would get."""
    buffer = bytearray(ipc_size(table))
    write_ipc_into(table, memoryview(buffer))
    return {word for word in ("SECRETCITY", "SECRETNOTE") if word.encode() in buffer}


def test_metadata_is_not_found() -> None:
    """Neither notes nor the names of categories are in a stripped table's bytes."""
    assert found_words(shards.strip(described())) == set()


def test_control_metadata_is_found() -> None:
    """In the same table, not stripped, both are."""
    assert found_words(described()) == {"SECRETCITY", "SECRETNOTE"}


def seen_sizes(padded: bool) -> set[int]:
    """Return the sizes on the wire of payloads that differ in a few bytes."""
    slot = Slot(lease="lease-1", direction=Direction.OUT, kind=Kind.SHARD, call=1, shard=0, attempt=0)
    sizes = set()
    for size in range(100_000, 100_500):
        total = padded_size(size) if padded else size
        sizes.add(HEADER_BYTES + sealed_size(total) if not padded else _sealed(slot, total))
    return sizes


def _sealed(slot: Slot, total: int) -> int:
    """Return how many bytes a message of this padded size really takes."""
    sealer = Sealer(LeaseKey(bytes(32)), "0" * 64, slot, total)
    out: Any = bytearray(total + (1 << 16))
    return len(sealer.header) + sealer.update_into(bytes(total), out) + len(sealer.finalize())


def test_size_is_not_found() -> None:
    """Five hundred lengths look the same on the wire."""
    assert len(seen_sizes(padded=True)) == 1


def test_control_size_is_found() -> None:
    """Sealed as long as they are, each length is another one on the wire."""
    assert len(seen_sizes(padded=False)) == 500


@pytest.mark.parametrize("rows", [10, ROWS])
def test_all_rows_arrive(rows: int) -> None:
    """The look is at everything: the shards together are the table."""
    parts = received(numbered().slice(0, rows), "rows")

    assert sorted(np.concatenate([part["n"].to_numpy() for part in parts]).tolist()) == list(range(rows))
