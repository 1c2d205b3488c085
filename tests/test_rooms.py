"""Which nodes are asked for a lease, by what a relay says and what failed lately."""

from __future__ import annotations

from typing import Any

import pytest

from ray_gpu.rooms import Rooms
from zones.errors import GatewayError


class FakeRelay:
    """Answers like a relay whose cluster has two nodes in one pool."""

    def __init__(self) -> None:
        self.free = {"gpu-1": 1.0, "gpu-2": 0.0}
        self.answer: Any = None

    def request(self, message: dict[str, Any], *, timeout_s: float = 45.0) -> Any:
        """Return the nodes, or raise what the test wants."""
        assert message == {"op": "nodes"}
        if isinstance(self.answer, Exception):
            raise self.answer
        nodes = [
            {"name": name, "alive": True, "labels": {"ray-gpu-pool": "shared"}, "gpus_free": free}
            for name, free in self.free.items()
        ]
        return self.answer or {"nodes": nodes}


@pytest.fixture
def relay() -> FakeRelay:
    """A relay."""
    return FakeRelay()


@pytest.fixture
def rooms(relay: FakeRelay) -> Rooms:
    """What is known of its nodes."""
    return Rooms(relay)  # type: ignore[arg-type]  # only its request() is used


@pytest.mark.parametrize(
    ("pool", "gpu_milli", "room"), [("shared", 1000, True), ("shared", 2000, False), ("other", 1, False)]
)
def test_room(rooms: Rooms, pool: str, gpu_milli: int, room: bool) -> None:
    """There is room where one node of the pool has the whole share free."""
    assert rooms.has_room(pool, gpu_milli) is room


def test_failed_node_is_passed_over(rooms: Rooms) -> None:
    """A node that failed counts for nothing for a while, and it is known why."""
    rooms.failed("gpu-1", "its custodian does not answer")

    assert rooms.passed_over("shared") == {"gpu-1": "its custodian does not answer"}
    assert not rooms.has_room("shared", 1000)


def test_all_failed_nodes_are_tried_again(rooms: Rooms) -> None:
    """When every node failed, none is passed over: one of them may work again."""
    rooms.failed("gpu-1", "this")
    rooms.failed("gpu-2", "that")

    assert rooms.passed_over("shared") == {}
    assert rooms.has_room("shared", 1000)


def test_failed_node_is_tried_again_later(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the node may work again."""
    monkeypatch.setattr("ray_gpu.rooms.PASS_OVER_S", 0.0)
    rooms.failed("gpu-1", "this")

    assert rooms.passed_over("shared") == {}


@pytest.mark.parametrize(
    "answer", [GatewayError("no relay"), {"nodes": 1}, {"nodes": [{}]}, {"nodes": ["x"]}], ids=repr
)
def test_relay_that_tells_nothing(rooms: Rooms, relay: FakeRelay, answer: Any) -> None:
    """A relay that is gone, or talks nonsense, keeps nobody from asking for a lease."""
    rooms.failed("gpu-1", "this")
    relay.answer = answer

    assert rooms.has_room("shared", 1000)
    assert rooms.passed_over("shared") == {}


def test_room_for_several(rooms: Rooms, relay: FakeRelay) -> None:
    """Shares on different nodes count together, and parts of shares do not."""
    relay.free = {"gpu-1": 1.5, "gpu-2": 0.5}

    assert rooms.has_room("shared", 500, leases=4)
    assert rooms.has_room("shared", 1000, leases=1)
    assert not rooms.has_room("shared", 1000, leases=2)


def test_draining_node_has_no_room(rooms: Rooms) -> None:
    """A node that is about to be restarted has no room, and is not what makes a failed one worth another try."""
    rooms.draining = frozenset({"gpu-1", "gpu-2"})

    assert not rooms.has_room("shared", 1000)
