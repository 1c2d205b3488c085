"""A policy is changed while people work: the next call is decided by it, and everything is in the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_gpu import gpu_remote
from zones.errors import EgressDeniedError
from zones.ledger import read
from zones.replaying import replay

TIMEOUT_S = 30.0


@gpu_remote(columns=["mdvis"])
def total(batch: Any) -> float:
    """Return a sum."""
    return float(batch["mdvis"].sum())


def test_reload(fresh_cluster: Callable[..., Any], copy_policies: Callable[..., Path]) -> None:
    """A session's remembered decision falls with its policy; a version that does not hold changes nothing."""
    policies = copy_policies()
    cluster = fresh_cluster(policies=policies)
    file = policies / "clinic/egress.cedar"
    text = file.read_text()
    with cluster.attach() as session:
        data = session.read("randhie", columns=["mdvis"])

        def call() -> bool:
            try:
                return bool(np.isfinite(total.options(session=session).map_reduce(data, sum)))
            except EgressDeniedError:
                return False

        def change(content: str, reached: Callable[[], bool]) -> None:
            file.write_text(content)
            deadline = time.monotonic() + TIMEOUT_S
            while not reached():
                assert time.monotonic() < deadline, session.status()
                time.sleep(0.2)

        digest = session.status()["policy_digest"]
        assert call()
        change(text.replace('Group::"research"', 'Group::"nursing"'), lambda: not call())
        assert session.status()["policy_digest"] != digest
        with pytest.raises(EgressDeniedError, match=r"no rule of egress\.cedar permits it"):
            total.options(session=session).map_reduce(data, sum)
        change("permit (", lambda: "egress.cedar:1: " in session.status()["policy_problem"])
        assert not call()
        change(text, call)
        assert session.status()["policy_digest"] == digest
        assert session.status()["policy_problem"] == ""

    entries = list(read(cluster.ledger))
    kept = [entry["policy_digest"] for entry in entries if entry["kind"] == "policy"]
    assert [kept[0], len(kept), kept[2]] == [digest, 3, digest]
    again = list(replay(entries))
    assert {one.allowed for one in again} == {True, False}
    assert all(one.same for one in again)
