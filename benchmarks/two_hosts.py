"""``python -m benchmarks.two_hosts``: rows per second of one CPU host of a zone beside two. Needs root.

A cluster of several hosts (:mod:`testbed`) with two hosts of one zone, and a private Ray cluster on these. Ray Data
maps the same parts of a data set with :class:`ray_gpu.OnGpu`, always on two GPU nodes: by one actor and one gateway,
by two actors and one gateway, and by two actors with a gateway each. The ways take turns, and a ratio is of one round.
Hosts of a bed share the machine's cores: with few of them this shows less than two machines would.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks import machine
from ray_gpu.ports import Role
from testbed import Testbed, lacking
from testbed.bed import HOSTS as ONE_OF_EACH
from testbed.cluster import BedCluster
from testbed.private_ray import PrivateRay

ROUNDS, PARTS = 5, 12
CLINIC = ("zone-clinic", "zone-clinic-2")
#: How many hosts and actors of Ray Data, and how many leases for each actor.
WAYS: Mapping[str, tuple[int, int, int]] = {
    "one host, one actor": (1, 1, 2),
    "one host, two actors": (1, 2, 1),
    "two hosts, an actor on each": (2, 2, 1),
}
#: Arithmetic row by row, so that results are the same to the bit however rows are cut.
_SCRIPT = """
import socket, time
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
DATASET, PARTS = "breast_cancer_resampled", int(sys.argv[3])
ray.data.DataContext.get_current().wait_for_min_actors_s = 100
with ray_gpu.attach("clinic", login=LOGIN, state_dir=STATE) as zone:
    COLUMNS = [name for name in zone.datasets[DATASET] if name != "target"]
    TABLE = zone.read(DATASET, columns=COLUMNS).to_arrow()
@ray_gpu.gpu_remote(columns=COLUMNS, shard_bytes=4 << 20)
def weighed(batch):
    found = batch[COLUMNS[0]]
    for number, name in enumerate(COLUMNS[1:], start=2):
        found = found + batch[name] / number
    return found
WANTED = np.sort(weighed({name: TABLE[name].to_numpy() for name in COLUMNS}))
class Timed(ray_gpu.OnGpu):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self(ray_gpu.parts(100).slice(0, 1))  # leases are open, and processes warm
    def __call__(self, batch):
        start = time.time()
        found = super().__call__(batch)
        end = time.time()
        for name, value in {"host": socket.gethostname(), "start": start, "end": end}.items():
            found = found.append_column(name, pa.array([value] * found.num_rows))
        return found
def once(hosts, actors, leases):
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    where = {"zone": "clinic", "dataset": DATASET, "login": LOGIN, "state_dir": STATE, "purpose": "benchmark"}
    ds = ray.data.from_arrow(ray_gpu.parts(PARTS)).repartition(PARTS).map_batches(
        Timed, fn_constructor_args=[weighed.options(concurrency=leases)], fn_constructor_kwargs=where,
        batch_format="pyarrow", batch_size=1, concurrency=actors, num_cpus=0, resources={"gateway": hosts / actors},
        scheduling_strategy="SPREAD" if hosts > 1 else here,
    )
    table = pa.concat_tables(ray.get(ds.to_arrow_refs()))
    start, end = min(table["start"].to_pylist()), max(table["end"].to_pylist())
    exact = np.array_equal(np.sort(table["result"].to_numpy()), WANTED)
    shares = [count["counts"] for count in table["host"].value_counts().to_pylist()]
    assert len(shares) == hosts
    return {"exact": exact, "rows": table.num_rows, "seconds": end - start, "shares": shares}
rounds = [[once(*way) for way in json.loads(sys.argv[4])] for _ in range(int(sys.argv[5]))]
print(json.dumps(rounds))
"""


def measure(rounds: int) -> list[list[dict[str, Any]]]:
    """Return for each round, and each of ``WAYS`` in it, rows, seconds, and whether the result is exact."""
    roles = {name: role for name, role in ONE_OF_EACH.items() if name != "zone-trading"}
    roles["zone-clinic-2"] = Role.EDGE_ZONE
    with Testbed(roles) as bed, BedCluster(bed) as cluster:
        cluster.up()
        with ThreadPoolExecutor(2) as both:
            list(both.map(cluster.join, ("clinic", "clinic-2")))
        with PrivateRay(cluster, "clinic", CLINIC) as private:
            ways = [list(way) for way in WAYS.values()]
            arguments = (str(PARTS), repr(ways), str(rounds))
            found: list[list[dict[str, Any]]] = private.run(_SCRIPT, *arguments, timeout_s=60 + 60 * rounds)
    return found


def report(rounds: list[list[dict[str, Any]]]) -> str:
    """Return what was measured, side by side."""
    speeds = [[run["rows"] / run["seconds"] for run in one] for one in rounds]
    lines = [f"{'':30}{'rows/s, median':>16}{'lowest':>12}{'highest':>12}{'two hosts beside it':>22}"]
    for place, name in enumerate(WAYS):
        own = [one[place] for one in speeds]
        ratio = statistics.median(one[-1] / one[place] for one in speeds)
        lines.append(f"{name:30}{statistics.median(own):16,.0f}{min(own):12,.0f}{max(own):12,.0f}{ratio:22.2f}")
    return "\n".join(lines)


def main() -> int:
    """Measure and print; return the exit status: 1 where a result was not exact."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_hosts", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often each way is measured; {ROUNDS}")
    rounds = parser.parse_args().rounds
    if reason := lacking():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    about = machine.describe()
    found = measure(rounds)
    runs = [run for one in found for run in one]
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(f"{rounds} rounds, {runs[0]['rows']:,} rows of 30 columns in {PARTS} parts; all hosts share these cores\n")
    print(report(found))
    exact = all(run["exact"] for run in runs)
    print(f"\nresults are {'exactly those of the data set computed whole' if exact else 'WRONG'}")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
