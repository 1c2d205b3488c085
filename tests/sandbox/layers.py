"""Makes escape attempts under one layer of confinement alone, and under none.

``python layers.py JSON`` with ``{"uid": int | null, "site": str, "layers": {layer: [attempt]}}`` prints
``{layer: {attempt: outcome}}``, and under ``"none"`` what becomes of all of them where every layer is off. As root it
becomes *uid* first. Each layer is put on as the product does, the others are taken off one by one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.sandbox.bait import Bait, own_network
from tests.sandbox.custodian import BOMB, BOMBS, battery_profile, become, confined

#: What a confined process does to itself, in the probe's words.
OWN = {"seccomp", "landlock", "descriptors", "limits"}
#: Uid of the sandbox where the launcher is root, and of another lease.
UID, OTHER_UID = 61007, 61009
_WITH_NOTHING = "none"


def main() -> None:
    """See the module."""
    wanted = json.loads(sys.argv[1])
    own_network()
    become(wanted["uid"], deny_userns=False)
    canary = secrets.token_hex(8)
    os.environ["LAUNCHER_CANARY"] = canary
    layers = {
        _WITH_NOTHING: sorted({name for names in wanted["layers"].values() for name in names}),
        **wanted["layers"],
    }
    result = {}
    for layer, attempts in layers.items():
        victim = None if wanted["uid"] is not None else OTHER_UID if layer == "uid" else UID
        with tempfile.TemporaryDirectory(prefix="b") as name, Bait(Path(name), canary, victim_uid=victim) as bait:
            result[layer] = _alone(layer, battery_profile(Path(wanted["site"])), bait.target, attempts)
            bait.written()
    sys.stdout.write(json.dumps(result))


def _alone(layer: str, profile: Any, target: dict[str, Any], attempts: list[str]) -> dict[str, str]:
    """Make *attempts* under *layer* alone."""
    from ray_gpu.sandbox import boundary

    found = boundary.survey()
    # The stray descriptor comes in with the launch, as what a sandbox has read is there until it hardens itself.
    profile = dataclasses.replace(profile, keep_fds=(*profile.keep_fds, target["stray_fd"]))
    if layer != "cgroup":
        profile = dataclasses.replace(profile, memory_bytes=None, processes=None)
    if layer != "namespaces":
        boundary.survey = lambda: dataclasses.replace(found, mode="none")  # type: ignore[assignment]  # no cache needed
    target = {**target, "off": sorted(OWN - {layer})}
    try:
        outcomes: dict[str, str] = confined(
            profile, {**target, "only": [name for name in attempts if name not in BOMBS]}
        )["outcomes"]
        for bomb in BOMBS.intersection(attempts):
            outcomes |= confined(profile, {**target, **BOMB, "only": [bomb]})["outcomes"]
        return outcomes
    finally:
        boundary.survey = lambda: found  # type: ignore[assignment]  # as above


if __name__ == "__main__":
    main()
