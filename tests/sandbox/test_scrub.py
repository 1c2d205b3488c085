"""GPU memory between zones: when it is scrubbed, and what is said where there is no GPU. On a GPU: tests/gpu."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from ray_gpu.sandbox import boundary
from ray_gpu.sandbox.scrub import Tenancy, scrub
from ray_gpu.sandbox.survey import survey
from zones.errors import GrantRefusedError

UID = 61013
GPU = (Path("/dev/full"),)


class Node:
    """A node's tenancy, whose scrubs are counted instead of done."""

    def __init__(self, scrubbed: int | None = 5, devices: Collection[Path] = GPU) -> None:
        self.scrubs = 0
        self._scrubbed = scrubbed
        self._tenancy = Tenancy(devices, self._scrub)

    def _scrub(self, uid: int, devices: Collection[Path]) -> int | None:
        self.scrubs += 1
        return self._scrubbed

    def run(self, text: str) -> list[str]:
        """Start (``a``) and end (``-a``) leases of zones; return what receipts would say of each start."""
        said = []
        for word in text.split():
            if word.startswith("-"):
                self._tenancy.leave(word[1:])
            else:
                said.append(self._tenancy.enter(word, UID))
        return said


@pytest.mark.parametrize(
    ("leases", "scrubs"),
    [
        ("a", 1),
        ("a -a a -a a", 1),
        ("a -a b", 2),
        ("a -a b -b a", 3),
        ("a a b", 2),
        # a's second lease ends after b's scrub, so its memory was not free then.
        ("a b -a b", 3),
        ("a b -a b -b b", 3),
    ],
    ids=["at first", "one zone", "the next zone", "back again", "at the same time", "left since", "left before"],
)
def test_when_it_is_scrubbed(leases: str, scrubs: int) -> None:
    """Before the first lease, and before any of another zone than those that have used the GPU since."""
    node = Node()

    said = node.run(leases)

    assert node.scrubs == scrubs == said.count("5 bytes")
    assert set(said) <= {"5 bytes", "same zone"}


def test_without_a_scrub_no_other_zone() -> None:
    """Where CuPy does not work the GPU stays with the zone that had it first."""
    node = Node(scrubbed=None)

    assert node.run("a -a a") == ["CuPy finds no GPU", "same zone"]
    with pytest.raises(GrantRefusedError, match="cannot be scrubbed"):
        node.run("b")


def test_stand_in() -> None:
    """Where NumPy stands in there is nothing to scrub, and receipts say so."""
    node = Node(devices=())

    assert node.run("a -a b") == ["no GPU", "no GPU"]
    assert node.scrubs == 0


@pytest.mark.skipif(survey().mode == "none", reason="needs a bubblewrap that works here")
def test_the_scrub_runs_confined() -> None:
    """The scrub itself starts in a sandbox and says what it did; without a GPU that is nothing."""
    done = scrub(UID, boundary.gpu_devices())

    assert done is None or done > 0
