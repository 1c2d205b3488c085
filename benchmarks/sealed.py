"""This product, through its public API alone, on an embedded cluster of its own. This module does I/O.

Policies are the shipped ones, copied to a directory of the benchmark's own, with two changes: the volume data set has
a name for each set of obligations that is measured, and a session may send many small calls.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

import ray_gpu
from benchmarks import processes
from benchmarks.arithmetic import DATASET, echo, score_batch
from ray_gpu import demo_data, embedded
from ray_gpu.client import Session
from ray_gpu.state import Layout

#: Shuffles that are measured, and the catalog name of the same file under each.
SHUFFLES = {"none": f"{DATASET}_none", "blocks(16)": f"{DATASET}_blocks", "rows": f"{DATASET}_rows"}
#: Further obligations, measured in one size of shard: what zone.yaml demands, and whether rows are kept together by the
#: first column, of which there are some 450 values.
FURTHER: dict[str, tuple[dict[str, Any], bool]] = {
    "rows, in windows of 10,000": ({"shuffle": "rows", "shuffle_window": 10_000}, False),
    "rows, groups kept together": ({"shuffle": "rows"}, True),
    "rows, at most 60 % to a node": ({"shuffle": "rows", "max_node_share": {"percent": 60}}, False),
    "rows, coarse padding": ({"shuffle": "rows", "padding": "coarse"}, False),
    "blocks(16), at most 60 % to a node, coarse padding, 16 shards at least": (
        # A window of its own: what nodes are given of the same rows by another shuffle would count in full.
        {
            "shuffle": "blocks(16)",
            "max_node_share": {"percent": 60, "window_s": 43_200},
            "padding": "coarse",
            "min_shards": 16,
        },
        False,
    ),
    "rows, at most 60 % to a node, coarse padding, 16 shards at least": (
        {"shuffle": "rows", "max_node_share": {"percent": 60}, "padding": "coarse", "min_shards": 16},
        False,
    ),
}
_NAMES = SHUFFLES | {how: f"{DATASET}_further_{number}" for number, how in enumerate(FURTHER)}
ZONE = "clinic"
#: Bytes of function and arguments that a session may send here: thousands of calls, not the few of a person.
_SESSION_BYTES = 1 << 30
_echo = ray_gpu.gpu_remote(echo)
_score = ray_gpu.gpu_remote(score_batch)


def write_policies(directory: Path) -> None:
    """Copy the shipped policies to *directory* and change them as the module says."""
    shutil.copytree(embedded.shipped_policies(), directory, dirs_exist_ok=True)
    catalog_path, zone_path = directory / ZONE / "catalog.yaml", directory / ZONE / "zone.yaml"
    catalog = yaml.safe_load(catalog_path.read_text(encoding="utf-8"))
    zone = yaml.safe_load(zone_path.read_text(encoding="utf-8"))
    for name in _NAMES.values():
        catalog["datasets"][name] = dict(catalog["datasets"][DATASET])
    demands: dict[str, dict[str, Any]] = {shuffle: {"shuffle": shuffle} for shuffle in SHUFFLES}
    demands |= {how: demand for how, (demand, _) in FURTHER.items()}
    zone["obligations"] = [{"datasets": [_NAMES[how]], **demand} for how, demand in demands.items()]
    zone["small_bytes"]["max_session_bytes"] = _SESSION_BYTES
    catalog_path.write_text(yaml.safe_dump(catalog, sort_keys=False), encoding="utf-8")
    zone_path.write_text(yaml.safe_dump(zone, sort_keys=False), encoding="utf-8")


@contextlib.contextmanager
def state_directory() -> Iterator[Path]:
    """Make a directory with a short path that the product's other uids can pass through."""
    path = Path(tempfile.mkdtemp(prefix="rgb"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class Sealed:
    """An embedded cluster, and what is measured on it.

    Args:
        state: State directory.
        base_port: First port of the cluster.
        rows: Rows of the volume data set.
        memory_bytes: What the gateway may use of memory, if not all.
    """

    def __init__(self, state: Path, *, base_port: int, rows: int, memory_bytes: int | None = None) -> None:
        self.layout = Layout(state)
        self.policies = state / "policies"
        self._plan = embedded.Plan(
            state=str(state), policies=str(self.policies), base_port=base_port, gateway_memory_bytes=memory_bytes
        )
        self._rows = rows
        self._document: dict[str, Any] = {}

    def start(self) -> None:
        """Start the cluster, and wait until a first session gets its answer."""
        write_policies(self.policies)
        if self._rows != demo_data.RESAMPLED_ROWS:
            _write_table(self.table, demo_data.resampled(demo_data.breast_cancer(), self._rows))
        self._document = embedded.up(self._plan)
        first_result(self)

    def stop(self) -> None:
        """Stop it."""
        embedded.down(self.layout)

    @property
    def table(self) -> Path:
        """The Arrow file with the volume data set."""
        return self.layout.data(ZONE) / f"{DATASET}.arrow"

    def attach(self) -> Session:
        """Open a session."""
        return ray_gpu.attach(ZONE, purpose="benchmark", state_dir=self.layout.root)

    def degradations(self) -> list[str]:
        """Return the controls that the sandboxes lack."""
        return list(self._document["sandbox_degradations"])

    def gateway_pid(self) -> int:
        """Return the gateway's process id, the innermost one behind its boundary."""
        return processes.below(int(self._document["processes"]["gateway"]))[-1]

    def roles(self) -> dict[str, list[int]]:
        """Return the processes that work on a call, by role."""
        roles = {"ray_gpu.gateway": "gateway", "ray_gpu.keeper": "keepers", "ray_gpu.sandbox": "sandboxes"}
        return {"notebook": [os.getpid()], **processes.by_role([int(self._document["pid"])], roles, "all others")}


def _write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(mode=0o700, parents=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def calls(session: Session, value: bytes, count: int) -> list[float]:
    """Return the seconds of each of *count* calls that carry *value* there and back."""
    function = _echo.options(session=session, concurrency=1)
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        answer = function.remote(value).result()
        seconds.append(time.perf_counter() - start)
        assert answer == value
    return seconds


def score(session: Session, how: str, shard_bytes: int, coefficients: list[Any]) -> tuple[float, Any]:
    """Score the volume data set on two actors, under one of SHUFFLES or FURTHER; return seconds and probabilities."""
    name = _NAMES[how]
    features = [column for column in session.datasets[name] if column != "target"]
    data = session.read(name, columns=features)
    together = features[0] if how in FURTHER and FURTHER[how][1] else None
    function = _score.options(session=session, columns=features, shard_bytes=shard_bytes, keep_together=together)
    start = time.perf_counter()
    result = function.map(data, *coefficients)
    return time.perf_counter() - start, result


def first_result(sealed: Sealed) -> float:
    """Return the seconds from attaching to the first result of a session for which nothing is warm."""
    start = time.perf_counter()
    with sealed.attach() as session:
        calls(session, b"", 1)
        return time.perf_counter() - start
