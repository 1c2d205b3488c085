"""A lease's data endpoint: listens in the host's network and hands every connection on. This module does I/O.

The custodian has it, and no Ray process ever gets one of its sockets. A cage has a network of its own,
but a socket stays in the network that it was made in: whoever holds one, a listening one too, can
disconnect it and connect it anew, to whatever the *host* reaches.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from zones.errors import GrantRefusedError


class Endpoint:
    """Listens from the start; nothing is accepted before :meth:`serve`.

    Args:
        host: The node's own address; it listens there and nowhere else.
        ports: It takes the first that is free.

    Raises:
        GrantRefusedError: None is free.
    """

    def __init__(self, host: str, ports: range) -> None:
        self._listener = _listen(host, ports)
        #: Where it listens.
        self.address: tuple[str, int] = self._listener.getsockname()

    def serve(self, hand_on: Callable[[int], None]) -> None:
        """Accept, on a thread of its own, until it is closed.

        Args:
            hand_on: Is given the descriptor of each connection, which is closed here afterwards. When it raises
                ``OSError``, the endpoint closes.
        """
        threading.Thread(target=self._accept, args=(hand_on,), daemon=True).start()

    def close(self) -> None:
        """Accept nothing more. Idempotent."""
        with contextlib.suppress(OSError):
            # Wakes the thread in accept(); closing alone would leave it there.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self, hand_on: Callable[[int], None]) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                self.close()
                return
            with connection:
                try:
                    # Sealed pieces are written whole; waiting to fill packets would only delay them.
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    hand_on(connection.fileno())
                except OSError:
                    self.close()
                    return


def _listen(host: str, ports: range) -> socket.socket:
    for port in ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError:
            listener.close()
            continue
        return listener
    raise GrantRefusedError(
        f"no data port of {host}:{ports.start}-{ports.stop - 1} is free; end leases or other programs there"
    )
