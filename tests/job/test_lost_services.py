"""Services that fail: Vault, the ledger's disk, custodian, relay and gateway, on a cluster of this file's own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_gpu import Batch, gpu_remote
from ray_gpu.vault_server import VaultServer
from tests.proofs.attacked import another_secret
from zones.errors import (
    GatewayError,
    GatewayUnavailableError,
    LeaseLostError,
    LedgerUnavailableError,
    VaultDeniedError,
    VaultError,
    VaultSealedError,
    VaultUnreachableError,
)

COLUMNS = ["mean_radius", "mean_texture"]


@gpu_remote
def add(a: int, b: int) -> int:
    """Do what a function should."""
    return a + b


@gpu_remote
def spin(seconds: float) -> float:
    """Compute for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return seconds


@gpu_remote(columns=COLUMNS, shard_bytes=64 << 10)
def slowly(batch: Batch, seconds: float) -> Any:
    """Return a number per row, after computing for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return batch["mean_radius"] * 3 + batch["mean_texture"]


@pytest.fixture
def services(own_services: Any) -> Iterator[Any]:
    """The cluster; when the test is over it works, and nothing is left over."""
    yield own_services
    assert own_services.works()
    own_services.inside.nothing_left()


def _rows(zone: Any) -> Any:
    return zone.read("breast_cancer_resampled", columns=COLUMNS)


def _expected(zone: Any) -> Any:
    table = _rows(zone).to_arrow()
    return table["mean_radius"].to_numpy() * 3 + table["mean_texture"].to_numpy()


# -- Vault ------------------------------------------------------------------------------------------


FAILURES = [
    ("vault_sealed", VaultSealedError, "unseal it"),
    ("vault_frozen", VaultUnreachableError, "check that it runs"),
]


@pytest.mark.parametrize(("how", "error", "says"), FAILURES, ids=["sealed", "unreachable"])
def test_vault_fails_at_attach(services: Any, how: str, error: type[VaultError], says: str) -> None:
    """Nobody gets a session while Vault cannot say who they are; the gateway asks it too, and says the same."""
    from ray_gpu.attaching import _login

    public = json.loads((services.cluster.state / "zones" / "clinic" / "zone.json").read_text("utf-8"))
    token = _login(services.cluster.state, public)
    with getattr(services, how)():
        started = time.monotonic()
        with pytest.raises(error, match=says):
            services.cluster.attach()
        with pytest.raises(error, match=says):
            services.cluster.attach(token=token)
        assert time.monotonic() - started < 40
    with services.cluster.attach(token=token) as zone:
        assert zone.person == "dana"


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [FAILURES[0], pytest.param(*FAILURES[1], marks=pytest.mark.chaos)],
    ids=["sealed", "unreachable"],
)
def test_vault_fails_at_the_opening_of_a_lease(services: Any, how: str, error: type[VaultError], says: str) -> None:
    """No lease without a key; afterwards the same session gets one."""
    with services.cluster.attach() as zone:
        with getattr(services, how)(), pytest.raises(error, match=says):
            add.options(session=zone).remote(1, 2).result(timeout=90)

        assert add.options(session=zone).remote(1, 2).result(timeout=90) == 3


@pytest.mark.chaos
def test_held_leases_outlive_a_sealed_vault(services: Any) -> None:
    """What has its key needs Vault no more: calls go on. A key that could not be shredded is shredded later."""
    with services.cluster.attach() as zone:
        call = slowly.options(session=zone)
        assert np.array_equal(call.map(_rows(zone), 0.0), _expected(zone))
        keys = services.inside.lease_keys()
        services.inside.close()
        with services.vault_sealed():
            assert np.array_equal(call.map(_rows(zone), 0.0), _expected(zone))
            zone.close()
        assert len(keys) == 2
    # The fixture waits until no key is left.


def test_wrong_password(services: Any) -> None:
    """A login that Vault refuses opens no session, and the error says what to check."""
    path = services.layout.person
    right = path.read_text("utf-8")
    path.write_text(json.dumps({**json.loads(right), "password": "wrong"}), encoding="utf-8")
    try:
        with pytest.raises(VaultDeniedError, match="check the login"):
            services.cluster.attach()
    finally:
        path.write_text(right, encoding="utf-8")


def test_gateway_that_lost_its_rights(services: Any) -> None:
    """A gateway that Vault does not let make keys opens no lease; with its rights back it does."""
    root = services.inside.vault().root_client()
    path = "sys/policies/acl/gateway-clinic"
    right = root.call("GET", path)["data"]["policy"]
    with services.cluster.attach() as zone:
        root.call("PUT", path, policy='path "nothing" { capabilities = ["deny"] }')
        try:
            with pytest.raises(VaultDeniedError, match="check the login, its policies"):
                add.options(session=zone).remote(1, 2).result(timeout=90)
        finally:
            root.call("PUT", path, policy=right)
            root.revoke()
        assert add.options(session=zone).remote(1, 2).result(timeout=90) == 3


@pytest.mark.parametrize("program", ["gateway", "custodian"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "VaultDeniedError: Vault refused POST auth/approle/login; check the login"),
        ({"vault": "https://127.0.0.1:1"}, "VaultUnreachableError: no answer from Vault at https://127.0.0.1:1"),
    ],
    ids=["wrong credentials", "unreachable"],
)
def test_start_without_vault(services: Any, tmp_path: Path, program: str, change: dict[str, str], says: str) -> None:
    """A gateway or custodian that cannot log in does not start, and says why in one line without its secret."""
    ran = _start_again(services, tmp_path, program, change)

    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 1
    assert "did not start" in ran.stderr
    assert says in ran.stderr
    assert "some-secret" not in ran.stderr


@pytest.mark.chaos
@pytest.mark.parametrize("program", ["gateway", "custodian"])
def test_start_with_a_sealed_vault(services: Any, tmp_path: Path, program: str) -> None:
    """The same for a Vault that is sealed."""
    with services.vault_sealed():
        ran = _start_again(services, tmp_path, program, {})

    assert ran.returncode == 1
    assert "VaultSealedError" in ran.stderr
    assert "unseal it" in ran.stderr


def test_start_beside_a_running_gateway(services: Any, tmp_path: Path) -> None:
    """A second gateway on the same ledger does not start, so that nobody shreds the first one's keys."""
    with services.cluster.attach() as zone:
        assert add.options(session=zone).remote(1, 2).result(timeout=90) == 3
        secret = another_secret(VaultServer.find(services.layout.vault), "gateway-clinic")
        ran = _start_again(services, tmp_path, "gateway", {}, secret)

        assert ran.returncode == 1
        assert "LedgerUnavailableError" in ran.stderr
        assert add.options(session=zone).remote(1, 2).result(timeout=90) == 3


def _start_again(
    services: Any, tmp_path: Path, program: str, change: dict[str, str], secret: str = "some-secret"
) -> subprocess.CompletedProcess[str]:
    place = services.layout.zone("clinic") if program == "gateway" else services.layout.node("gpu-1")
    settings = json.loads((place / "settings.json").read_text("utf-8"))
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings | change), encoding="utf-8")
    command = [sys.executable, "-m", f"ray_gpu.{program}", str(path)]
    return subprocess.run(command, input=secret, capture_output=True, text=True, timeout=60, check=False)


# -- the ledger -------------------------------------------------------------------------------------


def test_full_disk_stops_everything(services: Any) -> None:
    """When the ledger's disk is full nothing leaves, not even what was decided before; with room again it does."""
    directory = services.layout.ledger("clinic").parent
    if not os.path.ismount(directory):
        pytest.skip("needs root, to put the ledger on a small disk")
    with services.cluster.attach() as zone:
        call = slowly.options(session=zone)
        call.map(_rows(zone), 0.0)
        with _filled(directory):
            with pytest.raises(LedgerUnavailableError, match="disk is full; free space, then call again"):
                call.map(_rows(zone), 0.0)
            with pytest.raises(LedgerUnavailableError, match="free space"):
                add.options(session=zone).remote(1, 2).result(timeout=60)
            with pytest.raises(LedgerUnavailableError, match="free space"):
                services.cluster.attach()
        receipts = zone.close()
    with services.cluster.attach() as zone:
        call = slowly.options(session=zone)
        call.map(_rows(zone), 0.0)
        assert np.array_equal(call.map(_rows(zone), 0.0), _expected(zone))
        control = zone.close()

    # One map arrived at the nodes, and two of the same size in the session where both could be written down.
    assert _received(receipts, "shards") * 2 == _received(control, "shards")
    sent = 40_000 * 8 * len(COLUMNS)
    assert sent < _received(receipts, "received_bytes") < 1.8 * sent < 2 * sent < _received(control, "received_bytes")


def _received(receipts: list[dict[str, Any]], name: str) -> int:
    return sum(int(signed["receipt"][name]) for signed in receipts)


@contextlib.contextmanager
def _filled(directory: Path) -> Iterator[None]:
    """Fill a file system for a while."""
    path = directory / "filler"
    try:
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            for size in (1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        yield
    finally:
        path.unlink()


def test_vanished_ledger_stops_everything(services: Any) -> None:
    """When the ledger's file is gone nothing leaves, although it could still be written to; a restart mends it."""
    with services.cluster.attach() as zone:
        slowly.options(session=zone).map(_rows(zone), 0.0)
        control = zone.close()
    ledger = services.layout.ledger("clinic")
    aside = ledger.with_suffix(".aside")
    with services.cluster.attach() as zone:
        call = slowly.options(session=zone)
        call.map(_rows(zone), 0.0)
        ledger.rename(aside)
        with pytest.raises(LedgerUnavailableError, match="put it back, then restart the gateway"):
            call.map(_rows(zone), 0.0)
        aside.rename(ledger)
        with pytest.raises(LedgerUnavailableError, match="restart the gateway"):
            add.options(session=zone).remote(1, 2).result(timeout=60)
        receipts = zone.close()
    assert _received(receipts, "shards") == _received(control, "shards")

    services.restart()


# -- custodian, relay, gateway ----------------------------------------------------------------------


@pytest.mark.chaos
def test_custodian_killed_mid_map(services: Any, wait_until: Callable[..., None], in_background: Any) -> None:
    """A node without its custodian is out: its lease ends with its processes, and the other node carries on."""
    inside = services.inside
    with services.cluster.attach() as zone:
        call = slowly.options(session=zone)
        call.map(_rows(zone), 0.0)
        lost = inside.lease("sandbox", "gpu-2") + inside.lease("keeper", "gpu-2")
        running = in_background(lambda: call.map(_rows(zone), 0.3))
        inside.busy_node("gpu-2")
        inside.kill([inside.custodian("gpu-2")])

        assert np.array_equal(running.result(), _expected(zone))
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in lost), "the end of the lost lease")
        assert {lease["node"] for lease in zone.status()["leases"]} == {"gpu-1"}
    with services.cluster.attach() as zone:
        # Ray still counts the GPU of the node that is out; twice, since it may be asked first or second.
        for _ in range(2):
            assert add.options(session=zone).remote(1, 2).result(timeout=90) == 3
            assert np.array_equal(slowly.options(session=zone).map(_rows(zone), 0.0), _expected(zone))

    services.restart()


@pytest.mark.chaos
def test_relay_killed(services: Any, wait_until: Callable[..., None]) -> None:
    """Without its relay a gateway reaches no node: calls say so at once, and no lease is left."""
    inside = services.inside
    with services.cluster.attach() as zone:
        assert add.options(session=zone).remote(1, 2).result(timeout=90) == 3
        inside.kill(inside.relay())
        wait_until(lambda: not inside.leases("sandbox") and not inside.leases("keeper"), "the end of the leases")

        with pytest.raises(GatewayError, match="ray-gpu up"):
            add.options(session=zone).remote(1, 2).result(timeout=60)
        assert zone.status()["nodes"] == []
    wait_until(lambda: not inside.lease_keys(), "the end of the keys")

    services.restart()


@pytest.mark.chaos
def test_gateway_killed_mid_call(services: Any, wait_until: Callable[..., None], in_background: Any) -> None:
    """A killed gateway ends its calls and leases; the next one writes down what may have left and shreds the keys."""
    inside = services.inside
    zone = services.cluster.attach()
    slowly.options(session=zone).map(_rows(zone), 0.0)
    calls = [spin.options(session=zone).remote(60.0) for _ in range(2)]
    running = [in_background(call.result) for call in calls]
    inside.busy_node()
    inside.kill([inside.gateway()])

    for call in running:
        with pytest.raises(GatewayUnavailableError, match="attach again"):
            call.result()
    with pytest.raises(GatewayUnavailableError, match="ray-gpu up"):
        add.options(session=zone).remote(1, 2)
    with pytest.raises(GatewayUnavailableError, match="ray-gpu up"):
        services.cluster.attach()
    assert zone.close() == []
    wait_until(lambda: not inside.leases("sandbox") and not inside.leases("keeper"), "the end of the leases")
    assert len(inside.lease_keys()) == 2
    with _more_keys(services) as stays:
        services.restart()
        assert services.inside.lease_keys() == [stays]
    intents = {entry["seq"] for entry in services.cluster.entries("intent")}
    finished = {entry["intent"] for entry in services.cluster.entries("completion")}
    recovered = services.cluster.entries("recovered")
    assert {entry["intent"] for entry in recovered} == intents - finished
    assert all(entry["at_most_calls"] and entry["at_most_bytes"] and entry["node"] for entry in recovered)


@contextlib.contextmanager
def _more_keys(services: Any) -> Iterator[str]:
    """Make the key of a lease that is over, and the key of a lease that another gateway of the zone might hold."""
    server = services.inside.vault()
    root = server.root_client()
    later = int(time.time()) + 3600
    root.create_lease_key("clinic", "gpu-1", f"{'ab' * 8}-{later - 7200}")
    root.create_lease_key("clinic", "gpu-1", f"{'cd' * 8}-{later}")
    root.revoke()
    try:
        yield f"gpu-1.{'cd' * 8}-{later}"
    finally:
        services.inside.close()
        root = services.inside.vault().root_client()
        root.shred("clinic", "gpu-1", f"{'cd' * 8}-{later}")
        root.revoke()


@pytest.mark.chaos
def test_supervisor_killed(services: Any, wait_until: Callable[..., None], in_background: Any) -> None:
    """With a killed supervisor everything ends but Vault; the next start ends that too, and shreds what was left."""
    inside = services.inside
    zone = services.cluster.attach()
    call = in_background(spin.options(session=zone).remote(60.0).result)
    wait_until(lambda: inside.leases("sandbox"), "a sandbox")
    vault = inside.vault()
    gateway, custodians = inside.gateway(), [inside.custodian("gpu-1"), inside.custodian("gpu-2")]
    inside.kill([services.cluster.document["pid"]])

    with pytest.raises((GatewayUnavailableError, LeaseLostError)):
        call.result()
    zone.close()
    wait_until(lambda: not any(_runs(pid) for pid in [gateway, *custodians]), "the end of gateway and custodians")
    assert _runs(vault.pid)
    with pytest.raises(GatewayUnavailableError, match="ray-gpu up"):
        services.cluster.attach()

    services.restart()
    wait_until(lambda: not _runs(vault.pid), "the end of the old Vault")
    assert services.inside.lease_keys() == []


def _runs(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    return False
