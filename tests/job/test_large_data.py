"""Data sets larger than the memory that the gateway is given, moved as policy demands: whole, exact, and within it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_gpu import embedded, gpu_remote
from ray_gpu.sandbox import cgroup
from ray_gpu.state import Layout
from zones.config import load_zone
from zones.errors import EgressDeniedError, ResultTooLargeError

pytestmark = pytest.mark.skipif(cgroup.hierarchy() is None, reason="this host has no control group to cap memory with")

MEMORY = 384 << 20
COLUMNS = list(load_zone(embedded.shipped_policies(), "clinic").datasets["breast_cancer"].columns)
ROWS = MEMORY // (8 * len(COLUMNS)) + 100_000
AS_PARQUET = {"clinic/catalog.yaml": ("path: breast_cancer.arrow", "path: breast_cancer.parquet")}


@gpu_remote(columns=COLUMNS)
def number(batch: Any) -> Any:
    """Return the number of each row, which is its first value; all others are noise."""
    return batch[COLUMNS[0]]


def write(layout: Layout) -> None:
    """Write the same rows as an Arrow file of many batches and as a Parquet file of several row groups."""
    directory = layout.data("clinic")
    directory.mkdir(parents=True)
    noise = np.random.default_rng(1)
    columns = [np.arange(ROWS, dtype=np.float64), *(noise.random(ROWS) for _ in COLUMNS[1:])]
    table = pa.Table.from_arrays([pa.array(column) for column in columns], names=COLUMNS)
    with pa.ipc.new_file(str(directory / "breast_cancer_resampled.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=100_000)
    path = directory / "breast_cancer.parquet"
    pq.write_table(table, path, row_group_size=200_000, compression="none", use_dictionary=False)


@pytest.fixture(scope="module")
def small(start_cluster: Callable[..., Any], copy_policies: Callable[..., Path]) -> Iterator[Any]:
    """A cluster whose gateway has less memory than either data set takes."""
    policies = copy_policies(AS_PARQUET)
    with start_cluster(policies=policies, data=False, prepare=write, gateway_memory_bytes=MEMORY) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def group(small: Any, look_inside: Callable[[Any], Any]) -> cgroup.Cgroup:
    """The gateway's control group."""
    found = cgroup.hierarchy()
    assert found is not None
    lines = Path(f"/proc/{look_inside(small).gateway()}/cgroup").read_text("utf-8").splitlines()
    (name,) = {Path(line).name for line in lines if Path(line).name.startswith("gateway-clinic-")}
    return cgroup.Cgroup(version=found.version, directories=(found.memory / name,))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        pytest.param("breast_cancer_resampled", 1.0, id="arrow"),
        pytest.param("breast_cancer_resampled", 0.9, id="arrow, filtered", marks=pytest.mark.chaos),
        pytest.param("breast_cancer", 1.0, id="parquet", marks=pytest.mark.chaos),
        pytest.param("breast_cancer", 0.9, id="parquet, filtered"),
    ],
)
def test_larger_than_memory(small: Any, group: cgroup.Cgroup, name: str, kept: float) -> None:
    """Every row goes out in an order drawn over all of them and comes back to its place; the gateway keeps within."""
    before = group.processes()
    with small.attach() as session:
        data = session.read(name)
        data = data if kept == 1 else data.filter([COLUMNS[0], "<", int(ROWS * kept)])
        found = number.options(session=session).map(data)

    assert np.array_equal(found, np.arange(int(ROWS * kept), dtype=np.float64))
    assert group.processes() == before
    assert group.oom_kills() == 0


def test_rows_for_people(small: Any, group: cgroup.Cgroup) -> None:
    """Who asks for more rows than the gateway can hold is told so, and the gateway lives."""
    before = group.processes()
    with small.attach() as session:
        data = session.read("breast_cancer_resampled")
        with pytest.raises(ResultTooLargeError, match="read fewer columns"):
            data.to_arrow()
        advice = number.options(session=session).advise(data)
        assert (advice.chosen, advice.predicted_local_s) == ("remote", None)
        assert "the gateway has no room to hand out" in advice.reason
        assert data.select(COLUMNS[:1]).to_arrow().num_rows == ROWS
    assert group.processes() == before


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("breast_cancer_resampled", id="arrow", marks=pytest.mark.chaos),
        pytest.param("breast_cancer", id="parquet"),
    ],
)
def test_nothing_is_written_for_what_is_refused(small: Any, group: cgroup.Cgroup, name: str) -> None:
    """What policy refuses is refused before large data is decoded to the disk; what it allows is the control."""

    def written() -> int:
        (pid,) = group.processes()[-1:]
        fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text("ascii").splitlines())
        return int(fields["wchar"])

    forget_decoded(small)
    with small.attach() as session:
        function = number.options(session=session)
        kept = session.read(name).filter([COLUMNS[0], "<", ROWS - 1])
        before = written()
        with pytest.raises(EgressDeniedError):
            function.map_reduce(kept, len, bytes(70_000))
        refused = written() - before
        before = written()
        assert function.map_reduce(kept, len) > 1
        allowed = written() - before

    assert refused < 4 << 20
    assert allowed > MEMORY


def forget_decoded(small: Any) -> None:
    """Touch the data sets' files, so that what was decoded of them is not used again."""
    for path in Layout(small.state).data("clinic").iterdir():
        os.utime(path)


def test_control_memory_is_too_small(small: Any) -> None:
    """Control: a process of the same memory that reads the data set as it is read otherwise is killed."""
    made = cgroup.create("control-of-test", memory_bytes=MEMORY, processes=None)
    assert made is not None
    path = Layout(small.state).data("clinic") / "breast_cancer.parquet"
    code = (
        f"from pathlib import Path; Path({str(made.entrances()[0])!r}).write_text('0'); "
        f"import pyarrow.parquet as pq; print(pq.read_table({str(path)!r}).nbytes)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (-9, b"")
        assert made.oom_kills() > 0
    finally:
        made.remove()
