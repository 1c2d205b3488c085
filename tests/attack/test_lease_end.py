"""P2: keeper and sandbox are gone when whoever held the lease is, though neither of them is asked."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.proofs.attacked import Attacked, command
from tests.proofs.lessee import Lessee
from zones.errors import GrantRefusedError

NODE = "gpu-1"
#: The custodian notices at once; a busy machine takes its time to collect what was killed. Seconds.
GONE_TIMEOUT_S = 10.0


@pytest.fixture
def lease(cluster: Any) -> Iterator[tuple[Lessee, set[int]]]:
    """A lease that runs, and the processes that it brought."""
    attacked = Attacked(state=cluster.state, document=cluster.document, mark="", zone=cluster.zone)
    before = set(attacked.leases(NODE))
    with Lessee(attacked, NODE) as lessee:
        lessee.open()
        yield lessee, set(attacked.leases(NODE)) - before


def alive(pids: set[int]) -> list[list[str]]:
    """Return the commands of those that run."""
    return [words for pid in sorted(pids) if (words := command(pid))]


def test_lease_ends_with_its_actor(lease: tuple[Lessee, set[int]]) -> None:
    """When an actor dies without a word, its lease's keeper and sandbox are killed; until then they are there.

    Nobody connected to this keeper, so no gateway's goodbye ends it.
    """
    lessee, pids = lease
    programs = {" ".join(words) for words in alive(pids)}
    assert any("ray_gpu.keeper" in text for text in programs)
    assert any("ray_gpu.sandbox.child" in text for text in programs)

    lessee.actor.close()

    deadline = time.monotonic() + GONE_TIMEOUT_S
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive(pids) == []


def test_lease_lasts_while_its_actor_does(lease: tuple[Lessee, set[int]]) -> None:
    """Control: as long as the actor is connected, keeper and sandbox live, also when another actor comes and goes."""
    lessee, pids = lease
    with contextlib.suppress(GrantRefusedError), lessee.another_actor() as stranger:
        # An answer, so that the custodian has seen it come.
        lessee.offer(stranger)

    assert len(alive(pids)) == len(pids)
