"""Section 4 of the attack suite, into the zone: a node that lies, a relay that lies, strangers on the data port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_gpu
from ray_gpu import raylet, services
from ray_gpu.embedded import shipped_policies
from ray_gpu.frames import SealedSocket
from ray_gpu.handover import secret_file
from ray_gpu.leases import LeaseOpener
from tests.attack import rogue
from tests.attack.relay import AttackersRelay
from tests.proofs.attacked import Attacked
from tests.proofs.forging import Witness
from zones.config import load_zone
from zones.envelope import LeaseKey
from zones.errors import AnswerRefusedError, ClusterError, EnvelopeError, RowCountError
from zones.model import Direction, Grant, Padding

#: Two leases of this share fit no node, so each node has one; the bystander's fits beside either.
SHARE, BYSTANDERS_SHARE = 0.7, 0.1
LIAR, HONEST = "gpu-1", "gpu-2"
ROOT = Path(__file__).resolve().parents[2]


class World:
    """A cluster whose node gpu-1 is in an attacker's hands, and a bystander's session in the same gateway."""

    def __init__(self, attacked: Attacked, scratch: Path, witness: Witness) -> None:
        self.attacked, self.witness = attacked, witness
        self._lie, self._told = scratch / "lie", scratch / "told"
        self._lie.write_text("nothing", encoding="utf-8")
        self.gateway = attacked.gateway()
        self.bystander = attacked.attach("bystander")
        self.checked: Any = ray_gpu.gpu_remote(session=self.bystander, num_gpus=BYSTANDERS_SHARE)(lambda x: x + 1)

    def warn_bystander(self) -> None:
        """Have the bystander's session find out for itself that the node lies, so that it does not disturb any more."""
        self.tell("garbage")
        while not accused(self.bystander):
            calls = [self.checked.remote(number) for number in range(8)]
            assert [call.result(timeout=60) for call in calls] == list(range(1, 9))

    def replace_custodian(self) -> subprocess.Popen[bytes]:
        """Put the attacker's program in the custodian's place, with its identity, and wait until it serves."""
        layout = self.attacked.layout
        os.kill(self.attacked.custodian(LIAR), signal.SIGTERM)
        socket_path = layout.custodian_dir(LIAR) / raylet.CUSTODIAN_SOCKET
        never = ClusterError("the attacker's program did not start", node=LIAR, reason="")
        services.await_until(lambda: not services.listens(socket_path), check=lambda: None, timeout_s=60, failure=never)
        command = [sys.executable, "-m", "tests.attack.rogue", str(layout.node(LIAR) / "settings.json")]
        login = secret_file(self.attacked.secret_id(LIAR))
        process = subprocess.Popen(
            [*command, str(self._lie), str(self._told)],
            stdin=login,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), rogue.ARMED_VARIABLE: self.witness.armed().hex()},
        )
        os.close(login)
        services.await_until(lambda: services.listens(socket_path), check=lambda: None, timeout_s=60, failure=never)
        return process

    def tell(self, lie: str) -> None:
        """Have the node tell this lie on every connection from now on."""
        self._told.write_text("", encoding="utf-8")
        self._lie.write_text(lie, encoding="utf-8")

    def told(self) -> list[str]:
        """Return the lies that were told."""
        return self._told.read_text(encoding="utf-8").splitlines()

    def check_gateway(self) -> None:
        """Assert that the gateway ran nothing, is the same process, and served its other session all the while."""
        assert not self.witness.sprung()
        assert self.attacked.gateway() == self.gateway
        assert self.checked.remote(1).result(timeout=60) == 2


@pytest.fixture(scope="module")
def world(
    start_cluster: Callable[..., AbstractContextManager[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """One cluster for this file."""
    witness = Witness()
    with start_cluster() as cluster:
        made = World(
            Attacked(state=cluster.state, document=cluster.document, mark=""),
            tmp_path_factory.mktemp("rogue"),
            witness,
        )
        liar = made.replace_custodian()
        try:
            made.warn_bystander()
            yield made
        finally:
            made.bystander.close()
            liar.kill()
            liar.wait()
    witness.close()


@pytest.fixture(scope="module")
def relay(world: World) -> Iterator[AttackersRelay]:
    """The attacker has taken the relay's place, too."""
    with AttackersRelay(world.attacked) as taken:
        yield taken


def rows_of(session: ray_gpu.Session) -> tuple[Any, Any]:
    """Return some shards' worth of rows as a handle, and what :func:`work` makes of them."""
    handle = session.read("breast_cancer_resampled", columns=["mean_radius"])
    return handle, handle.to_arrow()["mean_radius"].to_numpy() * 3


def work(session: ray_gpu.Session) -> Any:
    """Return the function that the zone has computed, on both nodes at once."""
    remote = ray_gpu.gpu_remote(session=session, columns=["mean_radius"], num_gpus=SHARE, shard_bytes=64 << 10)
    return remote(lambda batch: batch["mean_radius"] * 3)


def accused(session: ray_gpu.Session) -> list[str]:
    """Return the nodes that a session says have lied."""
    return [lie["node"] for lie in session.status()["lies"]]


# -- a node that lies -----------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("lie", ["forged result", "pickle as the value"])
def test_lying_result_on_ray(world: World, lie: str) -> None:
    """A call ends as it should, on the honest node; the liar's lease is named, and its node is asked no more."""
    _lying_result(world, lie)


@pytest.mark.heavy
@pytest.mark.parametrize("lie", [*rogue.RESULT_LIES, *rogue.content_lies(b"")])
def test_lying_result(world: World, relay: AttackersRelay, lie: str) -> None:
    """So it does for every lie. Here the attacker has the relay as well, and places leases without Ray."""
    _lying_result(world, lie)


def _lying_result(world: World, lie: str) -> None:
    world.tell(lie)
    with world.attacked.attach() as session:
        handle, expected = rows_of(session)
        assert np.array_equal(work(session).map(handle), expected)

        told = world.told()
        assert set(told) == {lie}
        (said,) = session.status()["lies"]
        assert said["node"] == LIAR
        assert [lease["node"] for lease in session.status()["leases"]] == [HONEST]
        assert np.array_equal(work(session).map(handle), expected)
        assert world.told() == told
    (ended,) = world.attacked.entries("lease-end", lease=said["lease"])
    assert (ended["outcome"], ended["reason"], ended["node"]) == ("lost", said["reason"], LIAR)
    world.check_gateway()


@pytest.mark.heavy
@pytest.mark.parametrize("lie", ["forged result", "pickle as the value", "nothing", "value nested deeply"])
def test_lying_answer_to_a_call(world: World, relay: AttackersRelay, lie: str) -> None:
    """Calls without data are answered by an honest node as well."""
    world.tell(lie)
    with world.attacked.attach() as session:
        remote: Any = ray_gpu.gpu_remote(session=session, num_gpus=SHARE)(lambda x: x * 2)
        calls = [remote.remote(number) for number in range(8)]

        assert [call.result(timeout=120) for call in calls] == [2 * number for number in range(8)]
        assert set(world.told()) == {lie}
        assert accused(session) == [LIAR]
    world.check_gateway()


@pytest.mark.heavy
@pytest.mark.parametrize("lie", rogue.RECEIPT_LIES)
def test_lying_receipt(world: World, relay: AttackersRelay, lie: str) -> None:
    """A receipt that is none is not written down as one, and holds nobody up."""
    world.tell(lie)
    with world.attacked.attach() as session:
        remote: Any = ray_gpu.gpu_remote(session=session, num_gpus=SHARE)(lambda x: x)
        _occupy(session, remote)
        (lease,) = [lease["lease"] for lease in session.status()["leases"] if lease["node"] == LIAR]
    (ended,) = world.attacked.entries("lease-end", lease=lease)
    assert ended["receipt"] is None
    assert world.told() == [lie]
    world.check_gateway()


def _occupy(session: ray_gpu.Session, remote: Any) -> None:
    """Have a session open a lease on each node."""
    calls = [remote.remote(number) for number in range(2)]
    for call in calls:
        call.result(timeout=60)


@pytest.mark.heavy
def test_same_answer_of_two_nodes(world: World, relay: AttackersRelay) -> None:
    """What two nodes say alike is the function's doing: the caller gets the error, and no node stands accused."""
    world.tell("one row less")
    with world.attacked.attach() as session:
        handle, _ = rows_of(session)
        remote = ray_gpu.gpu_remote(session=session, columns=["mean_radius"], num_gpus=SHARE, shard_bytes=64 << 10)
        with pytest.raises((RowCountError, AnswerRefusedError)):
            remote(lambda batch: batch["mean_radius"][1:]).map(handle)


@pytest.mark.heavy
@pytest.mark.parametrize("lie", ["offer unsigned", "hello without fields"])
def test_lying_introduction(world: World, relay: AttackersRelay, lie: str) -> None:
    """A node that cannot introduce itself gets nothing to compute, and the calls that asked it end elsewhere."""
    world.tell(lie)
    asked = time.monotonic() + 60
    while not world.told():
        # The gateway passes a node that failed over for some seconds.
        assert time.monotonic() < asked
        with world.attacked.attach() as session:
            handle, expected = rows_of(session)
            assert np.array_equal(work(session).map(handle), expected)
            assert {lease["node"] for lease in session.status()["leases"]} == {HONEST}
    world.check_gateway()


# -- the same lies, told to the gateway's own code in this process --------------------------------

GRANT = Grant(
    zone="clinic", lease="lease-1", node=LIAR, pool="shared", offer_digest="0" * 64, exchange_key="0" * 64,
    accepted_degradations=(), padding=Padding.FINE, environment=rogue.CONTENTS.digest, gpu_milli=1000,
    memory_bytes=1 << 30, policy_digest="0" * 64, not_after=1 << 40,
)  # fmt: skip


@pytest.fixture(scope="module")
def opener() -> LeaseOpener:
    """The gateway's side of leases, of the shipped clinic; it asks neither Vault nor relay in these tests."""
    absent: Any = None
    return LeaseOpener(load_zone(shipped_policies(), "clinic"), absent, absent, node_ca="")


def introduced(opener: LeaseOpener, lie: str) -> Any:
    """Return what the gateway makes of a liar's hello."""
    key = LeaseKey.from_bytes(bytes(32))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        liar = rogue.Liar(listener.accept()[0], key, GRANT, lie, told=lambda _: None)
    speaking = threading.Thread(target=liar.serve)
    speaking.start()
    link = SealedSocket(ours, key=key, grant_digest=GRANT.digest(), lease=GRANT.lease, outgoing=Direction.OUT)
    try:
        return opener._hello(link, GRANT)
    finally:
        link.shutdown()
        link.close()
        speaking.join(60)


@pytest.mark.parametrize("lie", rogue.HELLO_LIES)
def test_lying_hello(opener: LeaseOpener, lie: str) -> None:
    """A keeper that cannot say what it is gets no work."""
    with pytest.raises(EnvelopeError):
        introduced(opener, lie)


def test_honest_hello(opener: LeaseOpener) -> None:
    """The same program, without its lie, is believed."""
    assert introduced(opener, "no lie") == ("none", (), rogue.CONTENTS)
