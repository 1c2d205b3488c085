"""Policy bounds how much of a data set a GPU node is given: over calls, sessions, filters, lost nodes and restarts."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_gpu import embedded, gpu_remote
from ray_gpu.state import Layout
from zones.errors import EgressDeniedError

ROWS, PERCENT = 3000, 60
COLUMNS = ["mdvis", "lncoins", "idp", "lpi", "fmde", "physlm", "disea", "hlthg", "hlthf", "hlthp", "record_number"]
EDIT = {"clinic/zone.yaml": ("shuffle: rows", f"shuffle: rows\nmax_node_share: {{percent: {PERCENT}}}")}


@gpu_remote(columns=["mdvis"])
def seen(batch: Any) -> dict[str, Any]:
    """Return which sandbox this is, and which rows it got: their values are their numbers."""
    mark = sys.modules["ray_gpu.arrays"].__dict__.setdefault("sandbox_of_test", secrets.token_hex(8))
    return {"sandbox": mark, "rows": np.asarray(batch["mdvis"])}


@gpu_remote(columns=["mdvis"], placement_timeout_s=2)
def slowly(batch: Any, seconds: float) -> Any:
    """Return the rows, after computing for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return batch["mdvis"]


def numbered(layout: Layout) -> None:
    """Write a data set whose values say which row they are of; ``idp`` is one of 60 groups."""
    numbers = [pa.array(np.arange(ROWS, dtype=np.float64) % (60 if name == "idp" else ROWS)) for name in COLUMNS]
    table = pa.Table.from_arrays(numbers, names=COLUMNS)
    layout.data("clinic").mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_file(str(layout.data("clinic") / "randhie.arrow"), table.schema) as file:
        file.write_table(table)


@pytest.fixture(scope="module")
def world(start_cluster: Callable[..., Any], copy_policies: Callable[..., Path]) -> Iterator[Any]:
    """A cluster of two GPU nodes that may each be given 60 % of a data set a day."""
    with start_cluster(policies=copy_policies(EDIT), data=False, prepare=numbered) as cluster:
        yield cluster


def sent(cluster: Any, condition: Any = None) -> list[set[int]]:
    """Send the data set once, in a session of its own, and return the rows that each sandbox got."""
    with cluster.attach() as session:
        found: dict[str, set[int]] = {}
        data = session.read("randhie", columns=["mdvis"], filter=condition)
        for shard in seen.options(session=session).map_reduce(data, list):
            found.setdefault(shard["sandbox"], set()).update(shard["rows"].astype(int).tolist())
        return list(found.values())


def test_epochs_do_not_add_up(world: Any) -> None:
    """Sessions, epochs and parts of the data give a node the same rows again, and never more than its share."""
    before = {kind: len(world.entries(kind)) for kind in ("share", "intent")}
    first = sent(world)
    assert sorted(row for rows in first for row in rows) == list(range(ROWS))
    assert len(first) == 2
    assert all(len(rows) <= PERCENT / 100 * ROWS for rows in first)
    for condition in (None, None, ["mdvis", "<", 1000], ["idp", "==", 7]):
        for rows in sent(world, condition):
            assert any(rows <= held for held in first), condition

    shares, intents = (world.entries(kind)[count:] for kind, count in before.items())
    assert len(shares) == 2
    assert all(entry["percent"] <= PERCENT for entry in shares)
    assert max(entry["seq"] for entry in shares) < min(entry["seq"] for entry in intents)


def test_result_is_in_order(world: Any) -> None:
    """Rows that went to their nodes by cell come back to their places."""
    with world.attach() as session:
        data = session.read("randhie", columns=["mdvis"], filter=["mdvis", ">=", 500])

        assert np.array_equal(slowly.options(session=session).map(data, 0.0), np.arange(500.0, ROWS))


def test_all_rows_to_one_node(world: Any) -> None:
    """All rows as one batch are more than a node's share, and refused; a few that it has are not."""
    with world.attach() as session:
        data, whole = session.read("randhie", columns=["mdvis"]), seen.options(session=session)
        with pytest.raises(EgressDeniedError, match=r"at most 60 % of randhie .*\(obligation max_node_share\)"):
            whole.remote(data).result()
        assert world.entries("refusal")[-1]["obligations"] == ["max_node_share"]
        assert len(whole.remote(data.filter(["mdvis", "<", 9])).result()["rows"]) == 9


def test_groups(world: Any) -> None:
    """Rows of one group go to one shard; the column that says so does not leave, and counts for policy all the same.

    Groups make other cells than rows do. What nodes were given of those counts in full, so they may have no more of
    these.
    """
    sent(world)
    with world.attach() as session:
        function = seen.options(session=session, keep_together="idp", columns=["mdvis"])
        with pytest.raises(EgressDeniedError, match=r"\(obligation max_node_share\)"):
            function.map_reduce(session.read("randhie"), list)
    assert world.entries("decision")[-1]["columns"] == ["mdvis"]
    assert "internal" in world.entries("decision")[-1]["classes"]


def test_groups_without_a_bound(cluster: Any) -> None:
    """Where no share is bound, groups stay together all the same: each value of a column is in one shard."""
    with cluster.attach() as session:
        function = gpu_remote(columns=["mdvis", "lncoins"], keep_together="lncoins", session=session)(values)
        shards = function.map_reduce(session.read("randhie", columns=["mdvis", "lncoins"]), list)

    where = [set(shard) for shard in shards]
    # At least: large groups may fall together.
    assert len(where) > 1
    assert sum(map(len, where)) == len(set().union(*where))


def test_control_without_a_bound(cluster: Any) -> None:
    """Control: where no share is bound, one node is given all of a data set."""
    with cluster.attach() as session:
        data = session.read("randhie", columns=["mdvis"])
        assert len(seen.options(session=session).remote(data).result()["rows"]) == len(data.to_arrow())


def values(batch: Any) -> Any:
    """Return a column's values."""
    return np.unique(np.asarray(batch["lncoins"]))


@pytest.mark.heavy
def test_lost_node(
    start_cluster: Callable[..., Any],
    copy_policies: Callable[..., Path],
    look_inside: Callable[[Any], Any],
    in_background: Any,
    wait_until: Callable[..., None],
) -> None:
    """Shards of a lost node go to the other as far as its share allows; then calls fail. A new gateway counts on."""
    percent = 97
    demand = f"shuffle: rows\nmin_shards: 16\nmax_node_share: {{percent: {percent}}}"
    edit = {"clinic/zone.yaml": ("shuffle: rows", demand)}
    with start_cluster(policies=copy_policies(edit), data=False, prepare=numbered) as cluster:
        inside = look_inside(cluster)
        with cluster.attach() as session:
            call = slowly.options(session=session)
            data = session.read("randhie", columns=["mdvis"])
            call.map(session.read("randhie", columns=["mdvis"], filter=["mdvis", "<", 300]), 0.0)
            (sandbox,) = inside.lease("sandbox", "gpu-2")
            before = inside.cpu_ticks(sandbox)
            running = in_background(lambda: call.map(data, 1.0))
            # It has done one of its eight shards, which count for its own share.
            wait_until(lambda: inside.cpu_ticks(sandbox) > before + 150, "a shard on gpu-2")
            inside.kill([inside.custodian("gpu-2")])

            assert np.array_equal(running.result(), np.arange(float(ROWS)))
            with pytest.raises(EgressDeniedError, match=r"may go to none of gpu-1 \(obligation max_node_share\)"):
                call.map(data, 0.0)
        held = held_by(cluster)
        inside.close()
        layout = Layout(cluster.state)
        embedded.down(layout)
        plan = embedded.Plan(state=str(cluster.state), zone="clinic", policies=str(cluster.policies), data=False)
        cluster.document.update(embedded.up(plan))

        assert len(sent(cluster)) == 2
        again = held_by(cluster)
        assert all(held[node] <= again[node] for node in held)
        assert again["gpu-1"] & again["gpu-2"] == held["gpu-1"] & held["gpu-2"]
        assert all(len(cells) <= percent * 240 / 100 for cells in again.values())


def held_by(cluster: Any) -> dict[str, set[int]]:
    """Return the cells that each node was given, as the ledger says."""
    found: dict[str, set[int]] = {}
    for entry in cluster.entries("share"):
        bits = int(entry["cells"], 16)
        found.setdefault(entry["node"], set()).update(cell for cell in range(240) if bits >> cell & 1)
    return found
