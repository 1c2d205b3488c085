"""What this host lacks is said before anything is launched: each lack by its id, and nothing that is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_gpu.sandbox import cgroup, survey

#: A host that lacks nothing.
WHOLE = survey.Survey(
    root=True, bwrap=Path("/usr/bin/bwrap"), mode="root", reason="", python_readable=True, capability=None,
    seccomp=True, landlock_abi=6, swap=True,
    cgroup=cgroup.Hierarchy(version=2, memory=Path("/g"), pids=Path("/g"), swap_control=True),
)  # fmt: skip
assert WHOLE.cgroup is not None
LACKS: dict[str, dict[str, Any]] = {
    "shared-uid": {"root": False},
    "no-namespaces": {"mode": "none"},
    "file-capability": {"capability": "dac_override"},
    "no-seccomp": {"seccomp": False},
    "no-landlock": {"landlock_abi": 0},
    "no-cgroup": {"cgroup": None, "swap": False},
    "swap-on": {"cgroup": replace(WHOLE.cgroup, swap_control=False)},
}


@pytest.mark.parametrize("name", LACKS)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A host that lacks one thing says that id and no other; a whole host says none."""
    monkeypatch.setattr(survey, "survey", lambda: WHOLE)
    assert survey.degradations() == ()

    monkeypatch.setattr(survey, "survey", lambda: replace(WHOLE, **LACKS[name]))

    said = survey.degradations()
    assert name in said
    assert said == (name,)
