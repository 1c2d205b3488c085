"""Sessions: attaching to a zone, leaving it, and the small bytes that one session may send."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import pytest

import ray_gpu
from ray_gpu import gpu_remote
from zones.errors import (
    EgressDeniedError,
    GatewayUnavailableError,
    SessionClosedError,
    UnknownNameError,
    VaultDeniedError,
)

FACTOR = 3.0


@gpu_remote
def add(a: float, b: float = 1.0) -> float:
    """Add on arguments alone."""
    return a + b


def test_attach_is_a_context_manager(cluster: Any) -> None:
    """Inside the ``with`` calls work; after it the session is closed, and whoever uses it is told to attach again."""
    with ray_gpu.attach("clinic", purpose="test", state_dir=cluster.state) as zone:
        assert_type(zone, ray_gpu.Session)
        assert (zone.zone, zone.person, zone.closed) == ("clinic", "dana", False)
        assert add.options(session=zone).remote(1, 2).result() == 3
        session = zone.status()["session"]

    assert zone.closed
    assert len(cluster.entries("session-end", session=session)) == 1
    with pytest.raises(SessionClosedError, match="attach again"):
        add.options(session=zone).remote(1, 2)
    with pytest.raises(SessionClosedError, match="attach again"):
        zone.read("randhie").to_arrow()


def test_room_that_another_session_used(cluster: Any) -> None:
    """Leases of a session that stays open go to another one soon after their last call, not after a minute."""
    with cluster.attach("first") as first, cluster.attach("second") as second:
        for number in range(2):
            assert add.options(session=first, concurrency=2).starmap([(number, 1), (number, 2)]) == [
                number + 1,
                number + 2,
            ]
        assert len(first.status()["leases"]) == 2
        # By default leases idle for a minute.
        assert add.options(session=second, placement_timeout_s=20).remote(1, 2).result() == 3


def test_attach_takes_the_state_directory_from_the_environment(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``attach("clinic")`` is enough where RAY_GPU_STATE, or the default, says where the cluster is."""
    monkeypatch.setenv("RAY_GPU_STATE", str(cluster.state))

    with ray_gpu.attach("clinic") as zone:
        assert zone.zone == "clinic"
        assert add.remote(1, 2).result() == 3


def test_unknown_zone_names_the_nearest(cluster: Any) -> None:
    """A typing error in the zone's name is answered with the right one."""
    with pytest.raises(UnknownNameError, match=r"no zone 'clinics' \(did you mean 'clinic'\?\)"):
        ray_gpu.attach("clinics", state_dir=cluster.state)


def test_no_gateway_on_this_host(tmp_path: Path) -> None:
    """Where nothing runs, the error says how to start something."""
    with pytest.raises(GatewayUnavailableError, match="ray-gpu up"):
        ray_gpu.attach("clinic", state_dir=tmp_path)


def test_wrong_token(cluster: Any) -> None:
    """A token that Vault does not know opens no session."""
    with pytest.raises(VaultDeniedError):
        cluster.attach(token="hvs.no-such-token")


def test_call_without_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that is called before any attach says what to write."""
    monkeypatch.setattr("ray_gpu.attaching._sessions", [])

    with pytest.raises(SessionClosedError, match=r"with ray_gpu\.attach"):
        add.remote(1, 2)


def test_closed_session_says_so(cluster: Any) -> None:
    """A closed session's card asks nobody."""
    with cluster.attach() as zone:
        pass

    assert repr(zone).endswith("closed)")
    assert zone.close() == zone.receipts


def test_arguments_and_function_have_the_small_class(cluster: Any) -> None:
    """A call without data is decided on the class that zone.yaml gives small arguments, and all of it is counted."""
    with cluster.attach("count bytes") as zone:
        work = add.options(session=zone)
        work.remote(1, 2).result()
        once = zone.status()["small_bytes"]
        work.remote(1, 2).result()
        again = zone.status()["small_bytes"]
        session = zone.status()["session"]

    (decision,) = cluster.entries("decision", session=session)
    assert decision["classes"] == ["internal"]
    assert again - once < once, "the function is sent, and counted, once"
    assert once - (again - once) == len(bytes(add._packed))


def test_closure_globals_and_defaults_are_counted(cluster: Any) -> None:
    """What the function takes along is part of the bytes that are classified and capped."""
    captured = "c" * 10_000

    def work(number: int, text: str = "d" * 10_000) -> float:
        return number + len(captured) + len(text) + FACTOR

    with cluster.attach("count bytes") as zone:
        assert gpu_remote(work, session=zone).remote(1).result() == 20_004
        assert 20_000 < zone.status()["small_bytes"] < 25_000


def test_many_small_arguments_have_the_highest_class(cluster: Any) -> None:
    """Many small calls do not get more out than the cap of a session: 4 MiB."""

    @gpu_remote
    def size(data: bytes) -> int:
        return len(data)

    with cluster.attach("many small calls") as zone:
        work = size.options(session=zone)
        fit = (4 << 20) // 60_200
        assert sum(work.remote(bytes(60_000)).result() for _ in range(fit)) == fit * 60_000
        with pytest.raises(EgressDeniedError):
            work.remote(bytes(60_000)).result()
        with pytest.raises(EgressDeniedError):
            work.remote(bytes(60_000)).result()
