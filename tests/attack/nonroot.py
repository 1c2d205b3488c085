"""Runs a cluster as whoever runs this, and the escape battery in it. Run by test_escape_nonroot.py, through lesser.py.

``python nonroot.py JSON`` with ``{"state": path, "mark": text, "bomb_processes": int}`` prints what the battery
found, and what the cluster said of itself before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from ray_gpu import embedded
from ray_gpu.state import Layout
from tests.proofs.attacked import Attacked
from tests.proofs.escaping import fight


def main() -> None:
    """See the module."""
    wanted = json.loads(sys.argv[1])
    layout = Layout(Path(wanted["state"]))
    plan = embedded.Plan(state=str(layout.root), zone="clinic", data=False, policies=str(embedded.shipped_policies()))
    document = embedded.up(plan)
    try:
        attacked = Attacked(state=layout.root, document=document, mark=wanted["mark"])
        # Short, since what Ray makes below it are sockets.
        with fight(
            attacked, ray_directory=f"{layout.root.parent}/r", bomb_processes=wanted["bomb_processes"]
        ) as fought:
            told = list(fought.session.degradations)
            found = {field.name: getattr(fought, field.name) for field in dataclasses.fields(fought)}
        found.pop("session")
        sys.stdout.write(json.dumps({**found, "degradations": told, "uid": os.getuid()}))
    finally:
        embedded.down(layout)


if __name__ == "__main__":
    main()
