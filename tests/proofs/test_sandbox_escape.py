"""P2: what user code cannot do in the sandbox that it reaches through ``@gpu_remote``, and can anywhere else.

The attempts are those of tests/sandbox/probe.py, all of them, with the running cluster's own sockets and processes.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from tests.proofs.attacked import Attacked, all_powerful
from tests.proofs.escaping import OWN_RAY, Battery, fight, own_ray
from tests.sandbox import probe

#: Tried where they end nothing: tests/attack.
BOMBS = {"fork bomb", "memory bomb", "memory bomb in a file"}
ATTEMPTS = [name for name in probe.ATTEMPTS if name not in {*BOMBS, OWN_RAY}]
#: What is not there to be reached on every host.
UNMADE = {
    "open_by_handle_at": "this host's root file system has no handles",
    "tcp over IPv6": "no IPv6 here",
    "udp over IPv6": "no IPv6 here",
}
#: Attempts whose message is heard outside. A signal, for one, is not.
HEARD = {"tcp", "udp", "tcp over IPv6", "udp over IPv6", "unix socket", "abstract socket", "datagram by socketpair"}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the probe's system call numbers are x86_64's")


@pytest.fixture(scope="module")
def battery(attacked: Attacked) -> Iterator[Battery]:
    """Run the same attempts in a sandbox and here."""
    with fight(attacked) as fought:
        yield fought


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_refused(battery: Battery, attempt: str) -> None:
    """Nothing works from inside the sandbox."""
    if attempt not in battery.inside:
        pytest.skip(UNMADE[attempt])
    assert battery.inside[attempt].startswith("refused")


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_works_outside(battery: Battery, attempt: str) -> None:
    """The very same program, run here, does all of it."""
    if attempt not in battery.outside:
        pytest.skip(UNMADE[attempt])
    if not all_powerful():
        pytest.skip("needs root with all capabilities: nobody else can do all of this outside either")
    assert battery.outside[attempt] == "done"


def test_nothing_reached_the_host(battery: Battery) -> None:
    """What the sandbox wrote is nowhere and no socket heard of it; what was written outside is there and was heard."""
    assert battery.files_inside == []
    assert battery.heard_inside == 0
    assert len(battery.files_outside) >= 3
    assert battery.heard_outside == len(HEARD & battery.outside.keys())


@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_own_ray(battery: Battery) -> None:
    """``import ray; ray.init()`` starts no Ray inside; outside the same call does."""
    inside, outside = own_ray(battery)

    assert inside.startswith("refused")
    assert inside != "refused: killed", "it ran into the limit"
    assert outside == "done"
