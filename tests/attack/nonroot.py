"""Runs a cluster as whoever runs this, and the escape battery in it. Run by test_escape_nonroot.py, through lesser.py.

``python nonroot.py JSON`` with ``{"state": path, "mark": text, "bomb_processes": int}`` prints what the battery
found, and what the cluster said of itself before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from ray_gpu import embedded
from ray_gpu.state import Layout
from tests.proofs.attacked import Attacked
from tests.proofs.escaping import OWN_RAY, fight, own_ray
from zones.errors import ClusterError

_STARTS = 4


def _start(plan: embedded.Plan) -> dict[str, Any]:
    """Start a cluster, again where its message says so: Ray's nodes give up early on a machine that is busy."""
    for _ in range(_STARTS - 1):
        with contextlib.suppress(ClusterError):
            return embedded.up(plan, tied=True)
    return embedded.up(plan, tied=True)


def main() -> None:
    """See the module."""
    wanted = json.loads(sys.argv[1])
    layout = Layout(Path(wanted["state"]))
    plan = embedded.Plan(state=str(layout.root), zone="clinic", data=False, policies=str(embedded.shipped_policies()))
    document = _start(plan)
    try:
        attacked = Attacked(state=layout.root, document=document, mark=wanted["mark"])
        with fight(attacked, bomb_processes=wanted["bomb_processes"]) as fought:
            found = {field.name: getattr(fought, field.name) for field in dataclasses.fields(fought)}
            found["inside"][OWN_RAY], found["outside"][OWN_RAY] = own_ray(fought)
        found.pop("session")
        # A line of its own: what the function prints comes back to its caller.
        sys.stdout.write("\n" + json.dumps({**found, "uid": os.getuid()}) + "\n")
    finally:
        embedded.down(layout)


if __name__ == "__main__":
    main()
