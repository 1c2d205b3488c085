"""Section 7, keys: what was recorded stays sealed whatever is found later, and a lease can be ended without Ray."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest

import ray_gpu
from ray_gpu import functions, vault_server
from ray_gpu.frames import SILENCE_LIMIT_S
from ray_gpu.vault_server import VaultServer
from ray_gpu.vault_server import _config as vault_server_config
from tests.attack.eavesdropper import Recorder, derivable, opened
from tests.proofs.attacked import Attacked, all_powerful, another_secret, command
from tests.proofs.lessee import Lessee
from zones import values
from zones.errors import VaultDeniedError
from zones.model import Grant, Kind, Offer
from zones.vault import Vault

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

NODES = ("gpu-1", "gpu-2")
CANARY = "sealed-canary-5f0c"
#: From the zone's last word on, beside what the product promises, on a busy machine. Seconds.
SLACK_S = 6.0
TIMEOUT_S = 60.0
#: Life of the lease that is left to expire, seconds.
SHORT_S = 15


@pytest.fixture(scope="module")
def attacked(start_cluster: Callable[..., AbstractContextManager[Any]]) -> Iterator[Attacked]:
    """A cluster of this file's own: its last test breaks it."""
    if not all_powerful():
        pytest.skip("needs root, who may stop and look into every process")
    with start_cluster(data=False) as cluster:
        yield Attacked(state=cluster.state, document=cluster.document, mark=CANARY)


# -- recorded now, opened later? --------------------------------------------------------------------


class Recorded(Lessee):
    """A lease over which something was said, all of it recorded."""

    def __init__(self, attacked: Attacked, lease_s: int = 300) -> None:
        super().__init__(attacked, "gpu-1", lease_s=lease_s)
        self.recorder = Recorder()
        self.offered: Offer
        self.grant: Grant

    def connect(self) -> Any:
        """Connect by way of the recorder."""
        return self.recorder.between(super().connect())

    def talk(self) -> None:
        """Have the sandbox compute on a canary and return it, as the gateway does for a call on arguments."""
        self.offered, self.grant = self.open()
        self.hello(self.offered, self.grant)
        link = self.link
        link.send(link.slot(Kind.FUNCTION, call=1), functions.pack(lambda text: text * 2))
        link.send(link.slot(Kind.CALL, call=2, shard=1), values.encode([[CANARY], {}]))
        header, payload = link.receive()
        assert header.kind is Kind.RESULT
        assert (CANARY * 2).encode() in bytes(payload)

    def unwraps(self, vault: Vault, node: str) -> bytes | None:
        """Return the data key, if this Vault gives it to the node whose login it has."""
        with contextlib.suppress(VaultDeniedError):
            return vault.unwrap(self.grant.zone, node, self.lease, self.grant.digest(), self.message["wrapped"])
        return None


@dataclass(frozen=True, slots=True)
class Aftermath:
    """Three leases that have ended, and what an attacker has afterwards."""

    leases: dict[str, Recorded]
    #: A second Vault, started from a copy of the first that was made while the leases lasted.
    restored: VaultServer


@pytest.fixture(scope="module")
def aftermath(attacked: Attacked) -> Iterator[Aftermath]:
    """Leases that ended in each way there is; meanwhile somebody copied Vault's directory, unseal key and all."""
    with contextlib.ExitStack() as closing:
        made = {"end": 300, "revoke": 300, "expiry": SHORT_S}
        leases = {how: closing.enter_context(Recorded(attacked, lease_s)) for how, lease_s in made.items()}
        for lease in leases.values():
            lease.talk()
        directory = Path(tempfile.mkdtemp(prefix="rgb"))
        closing.callback(shutil.rmtree, directory, ignore_errors=True)
        copy_vault(attacked, directory / "vault")
        control = leases["end"].link
        control.send(control.slot(Kind.CONTROL, call=3, shard=1), msgpack.packb({"close": True}))
        control.receive()
        leases["end"].shred()
        # Revoked: whoever was between still holds the connection, and Vault has the key no more.
        leases["revoke"].shred()
        leases["revoke"].link.close()
        await_none(lambda: attacked.leases("gpu-1", "ray_gpu.keeper"), "the end of every keeper")
        with attacked.vault("gateway") as gateway:
            await_none(lambda: gateway.lease_keys(attacked.zone), "the end of every lease key")
        restored = restore(directory / "vault", attacked.layout.vault)
        closing.callback(restored.stop)
        yield Aftermath(leases, restored)


def copy_vault(attacked: Attacked, target: Path) -> None:
    """Copy the embedded Vault's directory as it is at one moment."""
    server = VaultServer.find(attacked.layout.vault)
    assert server is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        shutil.copytree(attacked.layout.vault, target)
    finally:
        os.kill(server.pid, signal.SIGCONT)


def restore(copy: Path, original: Path) -> VaultServer:
    """Start the copy. Whoever has it edits its configuration: OpenBao insists on the audit file that it began with."""

    def edited(state_dir: Path, api: str, cluster_port: int) -> dict[str, Any]:
        config = vault_server_config(state_dir, api, cluster_port)
        config["audit"][0]["file"]["file"]["options"]["file_path"] = str(original.resolve() / "audit.log")
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vault_server, "_config", edited)
        return VaultServer.start(copy)


def await_none(found: Callable[[], Any], what: str) -> None:
    """Wait until nothing is found."""
    deadline = time.monotonic() + TIMEOUT_S
    while left := found():
        assert time.monotonic() < deadline, f"waited in vain for {what}: {left}"
        time.sleep(0.05)


def login(server: VaultServer, attacked: Attacked, who: str) -> Vault:
    """Log in to a server as a node, or as the gateway, with a secret id that its root makes for them."""
    return server.client().login_approle(attacked.settings(who)["role_id"], another_secret(server, attacked.role(who)))


WAYS = ("end", "revoke", "expiry")


@pytest.mark.parametrize("how", WAYS)
def test_vault_gives_nothing_afterwards(attacked: Attacked, aftermath: Aftermath, how: str) -> None:
    """After a lease no identity gets its data key from Vault, with the very message that was recorded."""
    for who in (*NODES, "gateway"):
        with attacked.vault(who) as vault:
            assert aftermath.leases[how].unwraps(vault, "gpu-1") is None


@pytest.mark.parametrize("how", WAYS)
def test_traffic_stays_sealed(attacked: Attacked, aftermath: Aftermath, how: str) -> None:
    """All traffic, every identity and Vault's backup with its unseal key together open no message.

    Controls: the backup does give the data key; with the exchange's secret besides, or with the lease's key, the same
    program opens every message and finds the canary in it.
    """
    lease = aftermath.leases[how]
    found = [lease.unwraps(login(aftermath.restored, attacked, who), "gpu-1") for who in (*NODES, "gateway")]
    data_keys = [key for key in found if key]
    messages = list(lease.recorder.messages())

    assert data_keys == [lease.data_key]
    assert len(messages) >= 5
    assert opened(lease.recorder, lease.grant, derivable(lease.grant, lease.offered.document(), data_keys)) == []
    leaked = derivable(lease.grant, lease.offered.document(), data_keys, [lease.shared])
    for keys in (leaked, [lease.key.bytes]):
        payloads = opened(lease.recorder, lease.grant, keys)
        assert len(payloads) == len(messages)
        assert sum(CANARY.encode() in payload for payload in payloads) >= 2


def test_backup_opens_nothing_for_a_neighbour(attacked: Attacked, aftermath: Aftermath) -> None:
    """In the restored Vault, too, a lease is its own node's: not the other node's, and not the gateway's."""
    lease = aftermath.leases["revoke"]

    got = {who: lease.unwraps(login(aftermath.restored, attacked, who), "gpu-1") for who in (*NODES, "gateway")}
    assert got == {"gpu-1": lease.data_key, "gpu-2": None, "gateway": None}


# -- the end of a lease, while Ray delivers nothing ----------------------------------------------------


class Held:
    """A session with one lease that works, and the processes of that lease."""

    def __init__(self, attacked: Attacked) -> None:
        self.attacked = attacked
        self.session = attacked.attach()
        self._remote = ray_gpu.gpu_remote(session=self.session)(lambda: 1)
        self.call()
        (self.lease,) = self.session.status()["leases"]
        self.pids = attacked.leases(self.lease["node"])
        self._pidfds = [os.pidfd_open(pid) for pid in self.pids]

    def call(self) -> None:
        """Use the lease."""
        assert self._remote.remote().result(timeout=TIMEOUT_S) == 1

    def revoke(self) -> None:
        """Have the gateway end the session; it may wait for Ray meanwhile, and we do not wait for it."""
        threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        with contextlib.suppress(Exception):
            self.session.close()

    def gone_after_s(self, since: float) -> float:
        """Return how long after *since*, on the monotonic clock, the last of the lease's processes ended."""
        for pidfd in self._pidfds:
            left = since + SILENCE_LIMIT_S + 4 * SLACK_S - time.monotonic()
            assert select.select([pidfd], [], [], max(0.0, left))[0], "keeper or sandbox live on"
            os.close(pidfd)
        return time.monotonic() - since


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Stop processes: whoever speaks to them waits, and no connection ends."""
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def caged(attacked: Attacked, word: str = "") -> list[int]:
    """Return Ray's processes and the relay, those whose command has a word."""
    return [pid for pids in attacked.caged().values() for pid in pids if word in " ".join(command(pid))]


def in_time(held: Held, since: float, limit_s: float, what: str) -> None:
    """Assert that the lease's processes end within a limit; say when they did."""
    after_s = held.gone_after_s(since)
    print(f"{what}: keeper and sandbox gone after {after_s:.2f} s")  # noqa: T201 - the figure that the issue asks for
    assert after_s <= limit_s + SLACK_S


@pytest.fixture
def held(attacked: Attacked) -> Iterator[Held]:
    """A lease that works."""
    made = Held(attacked)
    yield made
    made._close()


def test_revoked_without_ray(held: Held) -> None:
    """With every process of Ray stopped, actor and head among them, the end of the session ends the lease.

    Control: stopped Ray alone ends nothing, the lease still computes.
    """
    with stopped(caged(held.attacked)):
        held.call()
        since = time.monotonic()
        held.revoke()
        in_time(held, since, SILENCE_LIMIT_S, "no Ray, session ended")


def test_revoked_without_relay(held: Held) -> None:
    """With the relay cut off, the end of the session ends the lease. Control: without a relay it still computes."""
    with stopped(caged(held.attacked, "ray_gpu.relay")):
        held.call()
        since = time.monotonic()
        held.revoke()
        in_time(held, since, SILENCE_LIMIT_S, "no relay, session ended")


def test_cut_connection_without_ray(held: Held) -> None:
    """With Ray stopped and the zone silent, as when its network is cut, the lease ends by itself."""
    with stopped(caged(held.attacked)):
        held.call()
        with stopped([held.attacked.gateway()]):
            in_time(held, time.monotonic(), SILENCE_LIMIT_S, "no Ray, zone cut off")


def test_dead_actor(held: Held) -> None:
    """A lease whose actor is killed ends, whatever the zone does."""
    actors = caged(held.attacked, "ray::GpuActor")
    since = time.monotonic()
    for pid in actors:
        os.kill(pid, signal.SIGKILL)
    in_time(held, since, SILENCE_LIMIT_S, "actor killed")


def test_dead_head_and_gateway(held: Held) -> None:
    """With the head killed, the lease computes on; with the gateway killed as well it ends. Nothing here is left."""
    for pid in caged(held.attacked, "gcs_server"):
        os.kill(pid, signal.SIGKILL)
    held.call()
    since = time.monotonic()
    os.kill(held.attacked.gateway(), signal.SIGKILL)
    in_time(held, since, SILENCE_LIMIT_S, "head and gateway killed")
