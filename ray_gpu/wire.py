"""Messages between our own processes, and sealed pieces on a data connection. This module does I/O.

Two formats, both length-checked before anything is allocated:

* *Messages* (Unix sockets): 4-byte big-endian length, then one msgpack map. File
  descriptors ride with the first byte (``SCM_RIGHTS``), and the map's ``fds`` says how
  many. Nothing is pickled, and no extension types are decoded.
* *Frames* (TCP, see docs/envelope.md): the 64-byte header of a sealed message, then its
  body in pieces of at most 1 MiB. This module moves bytes; ``zones.envelope`` opens them.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack

from zones.errors import ZoneError, from_wire, to_wire
from zones.packing import pack

#: Control messages are small; bulk rides in memfds or frames. 1 MiB leaves room for inline results.
MAX_MESSAGE_BYTES = 1 << 20
_LENGTH = struct.Struct("!I")
#: A plain number: socket's own flag is an enum, whose arithmetic costs more than the rest of a receive.
_CTRUNC = int(socket.MSG_CTRUNC)
_READ_BYTES = 64 << 10
_FD_BYTES = array.array("i").itemsize


class PeerClosedError(ConnectionError):
    """The other side closed the connection between two messages or in the middle of one."""


class MalformedMessageError(ConnectionError):
    """The other side sent something that is no message: wrong length, not msgpack, not a map."""


def send_message(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message, with *fds* attached to its first byte.

    Raises:
        ValueError: The packed message is longer than ``MAX_MESSAGE_BYTES``.
        OSError: The connection broke.
    """
    packed = pack({**message, "fds": len(fds)} if fds else message)
    if len(packed) > MAX_MESSAGE_BYTES:
        raise ValueError(f"message of {len(packed)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    data = memoryview(_LENGTH.pack(len(packed)) + packed)
    sent = 0
    if fds:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        sent = sock.sendmsg([data], rights)
    if sent < len(data):
        sock.sendall(data[sent:])


def recv_message(
    sock: socket.socket, *, max_bytes: int = MAX_MESSAGE_BYTES, max_fds: int = 0
) -> tuple[dict[str, Any], list[int]]:
    """Receive one message and the descriptors that came with it (close-on-exec; the caller closes them).

    Raises:
        PeerClosedError: The connection ended.
        MalformedMessageError: What came is no message; the connection is of no further use.
        OSError: The connection broke.
    """
    fds: list[int] = []
    try:
        head = _recv_with_fds(sock, _LENGTH.size, fds, max_fds)
        (length,) = _LENGTH.unpack(head)
        if length > max_bytes:
            raise MalformedMessageError(f"peer announced {length} bytes, over the limit of {max_bytes}")
        message = _unpack(recv_exactly(sock, length))
        if message.pop("fds", 0) != len(fds):
            raise MalformedMessageError("peer announced other descriptors than it sent")
        return message, fds
    except BaseException:
        close_fds(fds)
        raise


class Inbox:
    """Receives messages from one socket with one system call each where it can: whatever more came is kept.

    For sockets that carry many small messages. Nothing else may read from the socket. Descriptors belong to
    the message that announces them (``send_message`` does); they are close-on-exec and the caller closes them.

    Args:
        sock: Connected Unix socket.
        max_bytes: Largest message.
        max_fds: Most descriptors of one message.
    """

    def __init__(self, sock: socket.socket, *, max_bytes: int = MAX_MESSAGE_BYTES, max_fds: int = 0) -> None:
        self.sock = sock
        self._max_bytes = max_bytes
        self._max_fds = max_fds
        self._space = socket.CMSG_SPACE(max_fds * _FD_BYTES) if max_fds else 0
        self._data = bytearray()
        self._fds: list[int] = []
        self._arrival = select.poll()
        self._arrival.register(sock, select.POLLIN)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Return the next message and its descriptors. Raises as :func:`recv_message`."""
        try:
            if not self._data:
                chunk = self._read()
                if self._is_one(chunk):
                    message = _unpack(memoryview(chunk)[_LENGTH.size :])
                    return message, self._take_fds(message)
                self._data += chunk
            while (size := self._size()) is None or len(self._data) < size:
                self._data += self._read()
            message = _unpack(self._data[_LENGTH.size : size])
            del self._data[:size]
            return message, self._take_fds(message)
        except BaseException:
            close_fds(self._fds)
            self._fds = []
            raise

    def wait(self, deadline: float) -> bool:
        """Wait until there is something to read, or until *deadline* on the monotonic clock; say which."""
        return bool(self._data) or bool(self._arrival.poll(max(0.0, deadline - time.monotonic()) * 1000))

    def _size(self) -> int | None:
        if len(self._data) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._data)
        if length > self._max_bytes:
            raise MalformedMessageError(f"peer announced {length} bytes, over the limit of {self._max_bytes}")
        return _LENGTH.size + int(length)

    def _is_one(self, chunk: bytes) -> bool:
        """Tell whether *chunk* is one whole message, as most reads bring."""
        if len(chunk) < _LENGTH.size:
            return False
        (length,) = _LENGTH.unpack_from(chunk)
        return bool(length <= self._max_bytes and _LENGTH.size + length == len(chunk))

    def _read(self) -> bytes:
        # A thread that waits in recv() on a Unix socket also wakes each time that the peer takes what it sent; one
        # that waits in poll() does not. The wake-ups saved cost more than the further system call.
        self._arrival.poll()
        if self._space:
            data, ancillary, flags, _ = self.sock.recvmsg(_READ_BYTES, self._space, socket.MSG_CMSG_CLOEXEC)
            self._fds += _descriptors(ancillary)
            # Those of the message that is being read, and of the next one, whose start may have come along.
            if flags & _CTRUNC or len(self._fds) > 2 * self._max_fds:
                raise MalformedMessageError("peer sent more descriptors than allowed")
        else:
            data = self.sock.recv(_READ_BYTES)
        if not data:
            raise PeerClosedError("peer closed the connection")
        return data

    def _take_fds(self, message: dict[str, Any]) -> list[int]:
        count = message.pop("fds", 0)
        if count == 0 and not self._fds:
            return []
        if type(count) is not int or not 0 <= count <= min(self._max_fds, len(self._fds)):
            raise MalformedMessageError("peer announced descriptors that it did not send")
        if len(self._fds) > count and not self._data:
            raise MalformedMessageError("peer sent descriptors that it did not announce")
        taken, self._fds = self._fds[:count], self._fds[count:]
        return taken


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(array.array("i", payload[: len(payload) - len(payload) % _FD_BYTES]))
    return fds


def _recv_with_fds(sock: socket.socket, count: int, fds: list[int], max_fds: int) -> bytes | bytearray:
    """Read *count* bytes; descriptors ride with the first, so only that read asks for them."""
    if not max_fds:
        return recv_exactly(sock, count)
    space = socket.CMSG_SPACE(max_fds * _FD_BYTES)
    first, ancillary, flags, _ = sock.recvmsg(count, space, socket.MSG_CMSG_CLOEXEC)
    fds.extend(_descriptors(ancillary))
    if not first:
        raise PeerClosedError("peer closed the connection")
    if flags & _CTRUNC or len(fds) > max_fds:
        raise MalformedMessageError("peer sent more descriptors than allowed")
    return first + (recv_exactly(sock, count - len(first)) if len(first) < count else b"")


def _unpack(packed: bytes | bytearray | memoryview) -> dict[str, Any]:
    try:
        message = msgpack.unpackb(packed, raw=False, strict_map_key=True, ext_hook=_refuse_extension)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedMessageError(f"peer sent no valid msgpack ({type(error).__name__})") from None
    if not isinstance(message, dict):
        raise MalformedMessageError("peer sent msgpack that is not a map")
    return message


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError("extension types are refused")


def close_fds(fds: Sequence[int]) -> None:
    """Close descriptors that nobody will use."""
    for fd in fds:
        os.close(fd)


def recv_exactly(sock: socket.socket, count: int) -> bytearray:
    """Read *count* bytes into a new private buffer.

    Raises:
        PeerClosedError: The connection ended first.
    """
    data = bytearray(count)
    recv_into(sock, memoryview(data))
    return data


def recv_into(sock: socket.socket, view: memoryview) -> None:
    """Fill *view*, which must be private memory: an AEAD reads it next.

    Raises:
        PeerClosedError: The connection ended first.
    """
    filled = 0
    while filled < len(view):
        count = sock.recv_into(view[filled:])
        if not count:
            raise PeerClosedError("peer closed the connection")
        filled += count


def unix_connect(path: str) -> socket.socket:
    """Connect to a Unix socket.

    Raises:
        OSError: Nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def unix_listen(path: str, *, mode: int = 0o600) -> socket.socket:
    """Listen on a Unix socket with file mode *mode*; a stale file is replaced.

    Raises:
        ValueError: *path* is longer than the 107 bytes that Linux allows.
    """
    if len(os.fsencode(path)) > 107:
        raise ValueError(f"socket path {path} is longer than 107 bytes; choose a shorter state directory")
    if os.path.exists(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    os.chmod(path, mode)
    sock.listen(64)
    return sock


def call(sock: socket.socket, request: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
    """Send *request*, wait for the reply, and raise the error that it carries, if any."""
    send_message(sock, request, fds)
    reply, _ = recv_message(sock)
    return raise_for_error(reply)


def raise_for_error(reply: dict[str, Any]) -> dict[str, Any]:
    """Return *reply* unless it is ``{"ok": False, "error": ...}``, which is raised.

    Raises:
        ZoneError: The error that the peer reported, rebuilt from its class name and fields.
    """
    if reply.get("ok") is False:
        document = reply.get("error")
        raise from_wire(document if isinstance(document, dict) else {"message": str(document)})
    return reply


def error_reply(error: BaseException) -> dict[str, Any]:
    """Return the reply that makes :func:`raise_for_error` raise *error* at the peer.

    Only a :class:`ZoneError` keeps its text; any other exception is named by type alone,
    since its text could quote data.
    """
    if isinstance(error, ZoneError):
        return {"ok": False, "error": to_wire(error)}
    # Where it happened goes to the log; not the text, for the same reason.
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    sys.stderr.write(f"internal error: {type(error).__name__} at {' '.join(places)}\n")
    sys.stderr.flush()
    message = f"internal error: {type(error).__name__}; try again, and report it with the place that the log names"
    return {"ok": False, "error": {"error": "ZoneError", "message": message}}
