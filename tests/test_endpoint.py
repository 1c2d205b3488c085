"""The data endpoint of a lease: who accepts, where, and why no process of Ray's may hold its sockets."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import socket
from collections.abc import Iterator

import pytest

from ray_gpu.endpoint import Endpoint
from zones.errors import GrantRefusedError

HOST = "127.0.0.1"
TIMEOUT_S = 20.0
_CLONE_NEWNET = 0x40000000


@pytest.fixture
def ports() -> range:
    """Three ports that were free a moment ago."""
    with socket.create_server((HOST, 0)) as probe:
        first = min(probe.getsockname()[1], 65000)
    return range(first, first + 3)


@pytest.fixture
def endpoint(ports: range) -> Iterator[Endpoint]:
    """An endpoint that listens."""
    made = Endpoint(HOST, ports)
    yield made
    made.close()


def test_hand_on(endpoint: Endpoint) -> None:
    """Each connection is handed on, those that came before it serves too; then ours is closed."""
    early = socket.create_connection(endpoint.address, timeout=TIMEOUT_S)
    handed: queue.Queue[int] = queue.Queue()
    endpoint.serve(lambda fd: handed.put(os.dup(fd)))
    late = socket.create_connection(endpoint.address, timeout=TIMEOUT_S)

    for connection in (early, late):
        with connection, socket.socket(fileno=handed.get(timeout=TIMEOUT_S)) as theirs:
            theirs.sendall(b"hello")
            theirs.close()
            assert connection.recv(5) + connection.recv(1) == b"hello"


def test_closed(endpoint: Endpoint) -> None:
    """A closed endpoint accepts nothing, and its port is free again."""
    endpoint.serve(os.close)
    endpoint.close()
    endpoint.close()

    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(endpoint.address, timeout=TIMEOUT_S)
    again = Endpoint(HOST, range(endpoint.address[1], endpoint.address[1] + 1))
    again.close()
    assert again.address == endpoint.address


def test_nobody_to_hand_on_to(endpoint: Endpoint) -> None:
    """When the keeper is gone, the endpoint hangs up and closes."""

    def gone(_: int) -> None:
        raise BrokenPipeError

    endpoint.serve(gone)
    with socket.create_connection(endpoint.address, timeout=TIMEOUT_S) as connection:
        assert connection.recv(1) == b""
    while True:  # the test's own time limit ends it
        with socket.socket() as probe:
            if probe.connect_ex(endpoint.address) == errno.ECONNREFUSED:
                break


def test_no_port_is_free(endpoint: Endpoint) -> None:
    """Where every data port is taken, the grant is refused and says so."""
    port = endpoint.address[1]

    with pytest.raises(GrantRefusedError, match=f"no data port of {HOST}:{port}-{port} is free"):
        Endpoint(HOST, range(port, port + 1))


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace, which needs root")
@pytest.mark.parametrize("held", ["listener", "nothing"])
def test_a_socket_keeps_its_network(endpoint: Endpoint, held: str) -> None:
    """Why the custodian accepts: with a listener of the host's, a cage would connect to the host's own services."""
    listener = endpoint._listener
    with socket.create_server((HOST, 0)) as service:
        child = os.fork()
        if child == 0:
            os._exit(_connects(listener if held == "listener" else None, service.getsockname()))
        _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == (0 if held == "listener" else 1)


def _connects(held: socket.socket | None, target: tuple[str, int]) -> int:
    """In a network namespace of its own, without privileges, try to connect; return 0 if it works, 1 if not."""
    try:
        assert ctypes.CDLL(None).unshare(_CLONE_NEWNET) == 0
        os.setresuid(61001, 61001, 61001)
        if held is not None:
            held.shutdown(socket.SHUT_RDWR)  # which makes it a socket like any other
        (held or socket.socket()).connect(target)
        return 0
    except OSError:
        return 1
    except BaseException:  # noqa: BLE001 - a fork of the test runner must not return
        return 2
