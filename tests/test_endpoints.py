"""Where data connections go: to what zone.yaml names, whatever the relay says."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ray_gpu.lease_keys import LeaseKeys
from ray_gpu.leases import LeaseOpener
from ray_gpu.relay_link import RelayLink
from zones.config import load_zone
from zones.errors import GrantRefusedError
from zones.vault import Vault

CLINIC = load_zone(Path(__file__).parents[1] / "policies", "clinic")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Something that a lying relay would have the gateway connect to."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.setblocking(False)
        yield made


#: Connects as the gateway of a zone with these endpoints does, to where its relay says.
Connect = Callable[[tuple[str, ...], object], socket.socket]


@pytest.fixture
def connect(tmp_path: Path) -> Connect:
    """Return what connects."""

    def connect(endpoints: tuple[str, ...], said: object) -> socket.socket:
        keys = LeaseKeys(Vault("https://127.0.0.1:1"), "clinic", tmp_path / "keys")
        relay = RelayLink(lambda lease, reason: None)
        return LeaseOpener(replace(CLINIC, endpoints=endpoints), keys, relay, "")._connect(said)

    return connect


@pytest.mark.parametrize("other", ["address", "port"])
def test_endpoint_that_the_zone_does_not_name(listener: socket.socket, connect: Connect, other: str) -> None:
    """An address, or a port, that zone.yaml does not name is refused, and nobody is connected to."""
    host, port = listener.getsockname()
    named = f"127.0.0.2/32:{port}-{port}" if other == "address" else f"{host}/32:{port + 1}-65535"

    with pytest.raises(GrantRefusedError, match="do not allow"):
        connect((named,), [host, port])
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_endpoint_that_the_zone_names(listener: socket.socket, connect: Connect) -> None:
    """Control: the same connection is made where zone.yaml names address and port."""
    host, port = listener.getsockname()

    with connect((f"{host}/32:{port}-{port}",), [host, port]):
        listener.accept()[0].close()


@pytest.mark.parametrize(
    "said", [None, [], ["localhost", 22], ["::ffff:127.0.0.1%lo", 1], ["127.0.0.1", "ssh"], {"a": 1}]
)
def test_no_endpoint(connect: Connect, said: object) -> None:
    """What is no IP address and port is refused: no name is ever looked up."""
    with pytest.raises(GrantRefusedError):
        connect(("0.0.0.0/0:1-65535",), said)
