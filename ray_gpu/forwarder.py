"""The one way out of a client relay's cage, both ends of it. This module does I/O.

Outside, on the zone's host, the *forwarder* opens connections to one address and port that it is started with,
Ray Client's server on the head, and to nothing else, whatever is asked: it reads nothing that the cage says. Whoever
connects to its Unix socket is sent one connected TCP socket (``SCM_RIGHTS``) and hung up on.

Inside, where no network is, the *tunnel* listens on the loopback, and carries what Ray Client says there to such a
socket and back.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ray_gpu.sandbox import boundary
from ray_gpu.wire import unix_connect, unix_listen

#: Name of a forwarder's socket in its own directory.
FORWARDER_SOCKET = "head.sock"
#: How long one attempt to reach the head lasts, seconds.
CONNECT_TIMEOUT_S = 10.0
#: After so long without an answer of its host the head counts as gone, seconds.
_GONE_S = 20
#: Pause after a connection that failed or ended: whoever asks again and again shall not flood the head. Seconds.
_PAUSE_S = 0.1
_CHUNK_BYTES = 1 << 16


# -- outside: the forwarder ---------------------------------------------------------------------


@dataclass(slots=True)
class Forwarder:
    """Hands out connections to one destination.

    Args:
        host: The head's address.
        port: Port of Ray Client's server there.
        uids: Who may have one.
    """

    host: str
    port: int
    uids: frozenset[int]
    #: What was said last.
    _said: str = ""

    def serve(self, listener: socket.socket) -> None:
        """Answer everybody, one after the other: a relay needs one connection, and again one when that is lost."""
        while True:
            asker, _ = listener.accept()
            with asker, contextlib.suppress(OSError):
                if boundary.peer_uid(asker) in self.uids:
                    self._answer(asker)

    def _answer(self, asker: socket.socket) -> None:
        try:
            head = _connect(self.host, self.port)
        except OSError as error:
            self._say(f"Ray Client's server at {self.host}:{self.port} does not answer: {error.strerror or error}")
            time.sleep(_PAUSE_S)
            return
        self._say("")
        with head:
            asker.settimeout(CONNECT_TIMEOUT_S)
            socket.send_fds(asker, [b"1"], [head.fileno()])

    def _say(self, text: str) -> None:
        """Write to the log what changed: relays ask often."""
        if text and text != self._said:
            sys.stderr.write(f"forwarder: {text}\n")
            sys.stderr.flush()
        self._said = text


def _connect(host: str, port: int) -> socket.socket:
    head = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
    head.settimeout(None)
    _prompt(head)
    # A head that vanishes without a word is noticed: by what is sent, or by probes where nothing is.
    head.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    head.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _GONE_S // 2)
    head.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _GONE_S // 4)
    head.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_S * 1000)
    return head


def _prompt(connection: socket.socket) -> None:
    """Send small messages at once: to wait for more of them would cost 48 ms a call."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# -- inside: the tunnel -------------------------------------------------------------------------


class Tunnel:
    """Listens on the loopback, and carries each connection to the head by way of the forwarder.

    Args:
        path: The forwarder's socket.
        on_end: Called with each connection that ended after it had been up.
    """

    def __init__(self, path: str, on_end: Callable[[], None]) -> None:
        self._path = path
        self._on_end = on_end
        self._listener = socket.create_server(("127.0.0.1", 0))
        #: Where Ray Client finds the head.
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def probe(self) -> None:
        """Connect to the head and hang up.

        Raises:
            OSError: It cannot be reached.
        """
        self._far_end().close()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            _prompt(near)
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near:
            try:
                far = self._far_end()
            except OSError:
                # Ray Client tries again for as long as its own limit says.
                time.sleep(_PAUSE_S)
                return
            with far:
                back = threading.Thread(target=_pump, args=(far, near), daemon=True)
                back.start()
                _pump(near, far)
                back.join()
        self._on_end()

    def _far_end(self) -> socket.socket:
        """Return a connection to the head.

        Raises:
            OSError: The forwarder is not there, or could not reach the head.
        """
        with unix_connect(self._path) as forwarder:
            forwarder.settimeout(2 * CONNECT_TIMEOUT_S)
            _, fds, _, _ = socket.recv_fds(forwarder, 1, 1)
        if not fds:
            raise ConnectionError("the forwarder could not reach the head; look at the gateway's log")
        return socket.socket(fileno=fds[0])


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Carry bytes one way until either side ends; then end both, since Ray Client has no use for half a connection."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


# -- the program ----------------------------------------------------------------------------------


def main() -> None:
    """Be the forwarder."""
    parser = argparse.ArgumentParser(prog="python -m ray_gpu.forwarder", description="connections to one destination")
    parser.add_argument("--socket", required=True, help="Unix socket to listen on")
    parser.add_argument("--host", required=True, help="address of the head")
    parser.add_argument("--port", required=True, type=int, help="port of Ray Client's server")
    parser.add_argument("--relay-uid", required=True, type=int, help="who may have connections, besides our own uid")
    options = parser.parse_args()
    listener = unix_listen(options.socket, mode=0o666)
    Forwarder(options.host, options.port, frozenset({os.geteuid(), options.relay_uid})).serve(listener)


if __name__ == "__main__":
    main()
