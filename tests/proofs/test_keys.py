"""P4: a lease's key opens once, for exactly the granted terms, for one node, and never again after the lease."""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ray_gpu
from ray_gpu import custodian as custodian_program
from ray_gpu.wire import unix_connect
from tests.proofs.attacked import Attacked
from tests.proofs.lessee import Lessee
from zones.errors import GrantRefusedError, VaultDeniedError
from zones.keys import ExchangeKey

START_TIMEOUT_S = 60.0


@pytest.fixture
def lessee(attacked: Attacked) -> Iterator[Lessee]:
    """A lessee of gpu-1 with nothing granted yet."""
    with Lessee(attacked, "gpu-1") as made:
        yield made


def test_honest_grant(lessee: Lessee) -> None:
    """With the right terms the key opens, and whoever holds the lease's key is heard: the control for all else."""
    offer, grant = lessee.open()

    assert lessee.hello(offer, grant)["node"] == "gpu-1"


def test_replayed_by_the_same_actor(lessee: Lessee) -> None:
    """The recorded message is refused when it comes a second time, also while the lease runs."""
    lessee.open()

    with pytest.raises(GrantRefusedError):
        lessee.replay(lessee.actor)


def test_replayed_by_another_actor(lessee: Lessee) -> None:
    """Another actor gets nothing for a stolen message, before and after it asks for an offer for the same lease."""
    lessee.open()
    thief = lessee.another_actor()

    with pytest.raises(GrantRefusedError):
        lessee.replay(thief)
    with pytest.raises(GrantRefusedError, match="used before"):
        lessee.offer(thief)
    with pytest.raises(GrantRefusedError):
        lessee.replay(thief)


def test_replayed_after_the_lease(lessee: Lessee) -> None:
    """A message whose lease has ended is worth nothing to the next actor, even while Vault still has the key."""
    lessee.open()
    lessee.actor.close()
    thief = lessee.another_actor()

    with pytest.raises(GrantRefusedError, match="used before"):
        lessee.offer(thief)
    with pytest.raises(GrantRefusedError):
        lessee.replay(thief)


@pytest.fixture(scope="module")
def second_custodian(attacked: Attacked) -> Iterator[Path]:
    """Start another custodian of gpu-1 with the same login; return its socket. Its boot id is another."""
    settings = attacked.settings("gpu-1")
    directory = attacked.layout.node("gpu-1")
    settings |= {"socket": str(directory / "second.sock"), "uid_base": settings["uid_base"] + 6000, "uid_count": 100}
    path = directory / "second.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", custodian_program.__name__, str(path)]
    pipe = subprocess.PIPE
    with (
        (directory / "second.log").open("wb") as log,
        subprocess.Popen(command, stdin=pipe, stdout=log, stderr=log) as process,
    ):
        try:
            assert process.stdin is not None
            process.stdin.write(attacked.secret_id("gpu-1").encode())
            process.stdin.close()
            _await_socket(settings["socket"], process)
            yield Path(settings["socket"])
        finally:
            process.terminate()


def _await_socket(path: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            unix_connect(path).close()
            return
        time.sleep(0.02)
    pytest.fail("the second custodian did not start")


def test_another_boot(attacked: Attacked, lessee: Lessee, second_custodian: Path) -> None:
    """A second custodian with the node's own login refuses a stolen message, whatever it offers for the same lease."""
    first, _ = lessee.open()
    thief = lessee.another_actor(second_custodian)

    with pytest.raises(GrantRefusedError):
        lessee.replay(thief)
    assert lessee.offer(thief).boot != first.boot
    with pytest.raises(GrantRefusedError, match="offer"):
        lessee.replay(thief)
    with Lessee(attacked, "gpu-1", custodian=second_custodian) as honest:
        assert honest.hello(*honest.open())["node"] == "gpu-1"


def test_the_data_key_is_not_enough(attacked: Attacked, lessee: Lessee) -> None:
    """A thief of login and message can have Vault open the data key; nobody is heard without the exchange."""
    offer, grant = lessee.open()
    with attacked.vault("gpu-1") as vault:
        stolen = vault.unwrap(grant.zone, "gpu-1", lessee.lease, grant.digest(), lessee.message["wrapped"])

    assert stolen == lessee.data_key
    lessee._exchange = ExchangeKey()
    with pytest.raises(OSError, match="closed"):
        lessee.hello(offer, grant)


@pytest.mark.parametrize(
    "name", ["gpu_milli", "memory_bytes", "not_after", "policy_digest", "exchange_key", "accepted_degradations"]
)
def test_changed_grant(lessee: Lessee, name: str) -> None:
    """Terms that were changed on the way pass every check of the custodian, and Vault opens no key for them."""
    offer = lessee.offer()
    grant = lessee.terms(offer)
    other: dict[str, Any] = {
        "gpu_milli": grant.gpu_milli + 1, "memory_bytes": 2 * grant.memory_bytes, "not_after": grant.not_after + 1,
        "policy_digest": "1" * 64, "exchange_key": ExchangeKey().public_hex,
        "accepted_degradations": (*grant.accepted_degradations, "one-more"),
    }  # fmt: skip
    wrapped = lessee.wrap(grant)

    with pytest.raises(VaultDeniedError):
        lessee.hand_over(replace(grant, **{name: other[name]}), wrapped)


def test_changed_grant_alone_is_fine(lessee: Lessee) -> None:
    """The same terms open when the key was wrapped for them, so that it was the change that was refused."""
    offer = lessee.offer()
    grant = lessee.terms(offer, gpu_milli=500, memory_bytes=1 << 36, policy_digest="1" * 64)

    assert lessee.hand_over(grant, lessee.wrap(grant))["ok"] is True


def test_share_that_is_still_ending(attacked: Attacked, lessee: Lessee) -> None:
    """A lease that Ray placed while the last one is still ending waits for its share of the GPU, and gets it."""
    with Lessee(attacked, lessee.node) as last, ThreadPoolExecutor(1) as background:
        offer = last.offer()
        whole = last.terms(offer, gpu_milli=1000)
        last.hand_over(whole, last.wrap(whole))
        grant = lessee.terms(lessee.offer(), gpu_milli=1000)
        waiting = background.submit(lessee.hand_over, grant, lessee.wrap(grant))
        with pytest.raises(TimeoutError):
            waiting.result(1)
        last.actor.close()

        assert waiting.result(30)["ok"] is True


@pytest.mark.parametrize("terms", [{"memory_bytes": (64 << 30) + 1}, {"zone": "elsewhere"}], ids=["memory", "zone"])
def test_forbidden_by_the_pool(lessee: Lessee, terms: dict[str, Any]) -> None:
    """Terms that the pool's operator forbids are refused by the node itself, whoever had a key wrapped for them."""
    grant = lessee.terms(lessee.offer(), **terms)
    wrapped = lessee.wrap(grant) if grant.zone != "elsewhere" else "vault:v1:none"

    with pytest.raises(GrantRefusedError, match="pool shared refuses the grant"):
        lessee.hand_over(grant, wrapped)


@pytest.mark.parametrize("who", ["gpu-1", "gpu-2", "gateway"])
def test_who_can_unwrap(attacked: Attacked, lessee: Lessee, who: str) -> None:
    """Vault opens gpu-1's key for gpu-1 alone: not for its neighbour, nor for the gateway that had it made."""
    grant = lessee.terms(lessee.offer())
    wrapped = lessee.wrap(grant)

    with attacked.vault(who) as vault:
        if who == "gpu-1":
            assert vault.unwrap(grant.zone, "gpu-1", lessee.lease, grant.digest(), wrapped) == lessee.data_key
        else:
            with pytest.raises(VaultDeniedError):
                vault.unwrap(grant.zone, "gpu-1", lessee.lease, grant.digest(), wrapped)


def test_shredded_with_the_session(attacked: Attacked) -> None:
    """While a session lasts, its leases' keys are in Vault and their nodes can open them; afterwards nobody can."""
    digest = secrets.token_hex(32)
    with attacked.vault("gateway") as gateway, attacked.vault("gpu-1") as one, attacked.vault("gpu-2") as two:
        nodes = {"gpu-1": one, "gpu-2": two}
        with attacked.attach() as session:
            assert ray_gpu.gpu_remote(session=session)(lambda: 1).remote().result() == 1
            (lease,) = session.status()["leases"]
            node, name = lease["node"], f"{lease['node']}.{lease['lease']}"
            assert name in gateway.lease_keys(attacked.zone)
            data_key, recorded = gateway.data_key(attacked.zone, node, lease["lease"], digest)
            assert nodes[node].unwrap(attacked.zone, node, lease["lease"], digest, recorded) == data_key

        assert name not in gateway.lease_keys(attacked.zone)
        with pytest.raises(VaultDeniedError):
            nodes[node].unwrap(attacked.zone, node, lease["lease"], digest, recorded)
