"""Messages between processes: what is no message ends the connection, and descriptors neither leak nor get lost."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_gpu import wire
from zones.errors import UnknownNameError, ZoneError

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two ends of a connection."""
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def _framed(packed: bytes, length: int | None = None) -> bytes:
    return struct.pack("!I", len(packed) if length is None else length) + packed


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(message=st.dictionaries(st.text().filter(lambda key: key != "fds"), _plain))
def test_round_trip(message: dict[str, Any]) -> None:
    """Plain data arrives as it was sent."""
    left, right = socket.socketpair()
    with left, right:
        wire.send_message(left, message)

        assert wire.recv_message(right) == (message, [])


def test_messages_in_a_row(pair: Pair) -> None:
    """Several messages on one connection come one at a time, in order."""
    for number in range(5):
        wire.send_message(pair[0], {"n": number})

    assert [wire.recv_message(pair[1])[0]["n"] for _ in range(5)] == [0, 1, 2, 3, 4]


def test_long_message_arrives_whole(pair: Pair) -> None:
    """A message longer than the socket's buffer arrives in pieces and is put together."""
    message = {"data": os.urandom(900_000)}
    sender = threading.Thread(target=wire.send_message, args=(pair[0], message))
    sender.start()

    assert wire.recv_message(pair[1])[0] == message
    sender.join()


# -- malformed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        _framed(b"\xc1"),
        _framed(b""),
        _framed(msgpack.packb([1, 2])),
        _framed(msgpack.packb("text")),
        _framed(msgpack.packb({1: 2})),
        _framed(msgpack.packb({"a": 1}) + b"\x00"),
        _framed(msgpack.packb({"a": 1})[:-1]),
        _framed(msgpack.packb({"a": msgpack.ExtType(1, b"x")})),
        _framed(b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0"),
        _framed(b"\x81\xa2\xff\xfe\x01"),
        struct.pack("!I", wire.MAX_MESSAGE_BYTES + 1),
        struct.pack("!I", 0xFFFFFFFF),
    ],
    ids=[
        "no-msgpack",
        "empty",
        "list",
        "text",
        "integer-key",
        "trailing",
        "cut",
        "extension",
        "deep",
        "no-utf8",
        "over-the-limit",
        "4-GiB",
    ],
)
def test_malformed_message(pair: Pair, data: bytes) -> None:
    """What is no map of plain data, or too long, is refused before anything is allocated for it."""
    pair[0].sendall(data)

    with pytest.raises(wire.MalformedMessageError):
        wire.recv_message(pair[1])


def test_receiver_may_set_a_lower_limit(pair: Pair) -> None:
    """A keeper or a relay link takes only small messages."""
    wire.send_message(pair[0], {"data": bytes(5000)})

    with pytest.raises(wire.MalformedMessageError, match="over the limit of 4096"):
        wire.recv_message(pair[1], max_bytes=4096)


def test_sender_refuses_what_is_too_long(pair: Pair) -> None:
    """Nothing of a message that is too long is sent: the connection can go on."""
    with pytest.raises(ValueError, match="over the limit"):
        wire.send_message(pair[0], {"data": bytes(wire.MAX_MESSAGE_BYTES)})
    wire.send_message(pair[0], {"n": 1})

    assert wire.recv_message(pair[1])[0] == {"n": 1}


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6])
def test_connection_that_ends(pair: Pair, count: int) -> None:
    """A peer that goes, between messages or in one, is told apart from a peer that talks nonsense."""
    pair[0].sendall(_framed(msgpack.packb({"a": 1}))[:count])
    pair[0].close()

    with pytest.raises(wire.PeerClosedError):
        wire.recv_message(pair[1])


@given(data=st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Whatever comes, it is a message or one of two errors."""
    left, right = socket.socketpair()
    with left, right:
        left.sendall(data)
        left.close()
        try:
            message, fds = wire.recv_message(right, max_fds=1)
        except (wire.MalformedMessageError, wire.PeerClosedError):
            return
        assert isinstance(message, dict)
        assert fds == []


# -- descriptors ------------------------------------------------------------------------------------


def test_descriptor_arrives(pair: Pair) -> None:
    """A descriptor rides with its message, works, and is closed in programs that are started."""
    with (Path("/proc/self/status")).open("rb") as file:
        wire.send_message(pair[0], {"n": 1}, [file.fileno()])
        message, (fd,) = wire.recv_message(pair[1], max_fds=1)

    assert message == {"n": 1}
    assert os.pread(fd, 5, 0) == b"Name:"
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize("sent", [2, 5])
def test_more_descriptors_than_allowed(pair: Pair, sent: int) -> None:
    """More than the receiver asked for is refused, and none stays open."""
    before = _descriptors()
    with Path("/proc/self/status").open("rb") as file:
        wire.send_message(pair[0], {"n": 1}, [file.fileno()] * sent)
        with pytest.raises(wire.MalformedMessageError, match="descriptors"):
            wire.recv_message(pair[1], max_fds=1)

    assert _descriptors() == before


def test_descriptor_that_nobody_asked_for(pair: Pair) -> None:
    """Without ``max_fds`` a message that says it brought some is refused, and the kernel drops them."""
    before = _descriptors()
    with Path("/proc/self/status").open("rb") as file:
        wire.send_message(pair[0], {"n": 1}, [file.fileno()])
        with pytest.raises(wire.MalformedMessageError, match="descriptors"):
            wire.recv_message(pair[1])

    assert _descriptors() == before


@pytest.mark.parametrize("said", [0, 2, -1, "1", None])
def test_descriptor_that_was_not_announced(pair: Pair, said: Any) -> None:
    """The message says how many descriptors it brings; any other number is refused, and none stays open."""
    before = _descriptors()
    with Path("/proc/self/status").open("rb") as file:
        socket.send_fds(pair[0], [_framed(msgpack.packb({"fds": said}))], [file.fileno()])
        with pytest.raises(wire.MalformedMessageError, match="descriptors"):
            wire.recv_message(pair[1], max_fds=1)

    assert _descriptors() == before


def test_descriptor_of_a_malformed_message_is_closed(pair: Pair) -> None:
    """Who sends nonsense cannot fill the receiver's table of descriptors."""
    before = _descriptors()
    with Path("/proc/self/status").open("rb") as file:
        socket.send_fds(pair[0], [_framed(b"\xc1")], [file.fileno()])
        with pytest.raises(wire.MalformedMessageError):
            wire.recv_message(pair[1], max_fds=1)

    assert _descriptors() == before


def test_descriptor_of_a_cut_message_is_closed(pair: Pair) -> None:
    """Nor can who sends half a message."""
    before = _descriptors()
    with Path("/proc/self/status").open("rb") as file:
        socket.send_fds(pair[0], [_framed(b"\x81")[:-1]], [file.fileno()])
        pair[0].close()
        with pytest.raises(wire.PeerClosedError):
            wire.recv_message(pair[1], max_fds=1)

    assert _descriptors() == before - 1  # the end that was closed


# -- many small messages ----------------------------------------------------------------------------


@given(messages=st.lists(st.dictionaries(st.sampled_from("abc"), _plain), max_size=5), pieces=st.integers(1, 50))
def test_inbox_gets_what_was_sent(messages: list[dict[str, Any]], pieces: int) -> None:
    """However the bytes are cut on their way, the same messages come out, and then the end."""
    left, right = socket.socketpair()
    stream = b"".join(_framed(msgpack.packb(message)) for message in messages)
    piece = len(stream) // pieces + 1  # many tiny ones would fill the socket's buffer
    with right:
        with left:
            for start in range(0, len(stream), piece):
                left.sendall(stream[start : start + piece])
        inbox = wire.Inbox(right)

        assert [inbox.receive() for _ in messages] == [(message, []) for message in messages]
        with pytest.raises(wire.PeerClosedError):
            inbox.receive()


@given(data=st.binary(max_size=200))
def test_inbox_and_any_bytes(data: bytes) -> None:
    """Whatever comes, it is messages and then one of two errors."""
    left, right = socket.socketpair()
    with right:
        with left:
            left.sendall(data)
        inbox = wire.Inbox(right, max_fds=1)
        try:
            while isinstance(inbox.receive()[0], dict):
                pass
        except (wire.MalformedMessageError, wire.PeerClosedError):
            return
    raise AssertionError("not a map")


def test_inbox_gives_descriptors_to_their_message(pair: Pair) -> None:
    """Descriptors belong to the message that announces them, also when several messages were read at once."""
    inbox = wire.Inbox(pair[1], max_fds=1)
    with Path("/proc/self/status").open("rb") as first, Path("/proc/self/stat").open("rb") as second:
        wire.send_message(pair[0], {"n": 0})
        wire.send_message(pair[0], {"n": 1}, [first.fileno()])
        wire.send_message(pair[0], {"n": 2})
        wire.send_message(pair[0], {"n": 3}, [second.fileno()])
        got = [inbox.receive() for _ in range(4)]

    assert [message for message, _ in got] == [{"n": n} for n in range(4)]
    assert [len(fds) for _, fds in got] == [0, 1, 0, 1]
    assert os.pread(got[1][1][0], 5, 0) == b"Name:"
    assert os.pread(got[3][1][0], 9, 0).startswith(str(os.getpid()).encode())
    for _, fds in got:
        wire.close_fds(fds)


@pytest.mark.parametrize(("said", "sent"), [(1, 0), (0, 1), (2, 1), (1, 2), (-1, 1), ("1", 1), (True, 1)])
def test_inbox_wants_descriptors_announced(pair: Pair, said: Any, sent: int) -> None:
    """Another number of descriptors than announced is refused, and none stays open."""
    before = _descriptors()
    with Path("/proc/self/status").open("rb") as file:
        socket.send_fds(pair[0], [_framed(msgpack.packb({"fds": said}))], [file.fileno()] * sent)
        with pytest.raises(wire.MalformedMessageError, match="descriptors"):
            wire.Inbox(pair[1], max_fds=1).receive()

    assert _descriptors() == before


def test_inbox_does_not_collect_descriptors(pair: Pair) -> None:
    """A peer that attaches one to every byte of a message cannot fill the receiver's table of descriptors."""
    before = _descriptors()
    data = _framed(msgpack.packb({"fds": 1, "data": bytes(300)}))
    with Path("/proc/self/status").open("rb") as file:
        for start in range(100):
            socket.send_fds(pair[0], [data[start : start + 1]], [file.fileno()])
        pair[0].shutdown(socket.SHUT_WR)
        with pytest.raises(wire.MalformedMessageError):
            wire.Inbox(pair[1], max_fds=1).receive()

    assert _descriptors() == before


# -- sockets ----------------------------------------------------------------------------------------


def test_listen_replaces_a_stale_socket(tmp_path: Path) -> None:
    """A file that an ended process left is replaced; its mode is the one asked for."""
    path = str(tmp_path / "s")
    wire.unix_listen(path).close()
    with wire.unix_listen(path, mode=0o660) as listener, wire.unix_connect(path) as client:
        server, _ = listener.accept()
        with server:
            wire.send_message(client, {"n": 1})
            assert wire.recv_message(server)[0] == {"n": 1}
        assert os.stat(path).st_mode & 0o777 == 0o660


def test_listen_on_a_long_path() -> None:
    """A path over 107 bytes is refused with what to do, not cut by the kernel."""
    with pytest.raises(ValueError, match="choose a shorter state directory"):
        wire.unix_listen("/tmp/" + "x" * 103)


def test_connect_to_nobody(tmp_path: Path) -> None:
    """Nobody there is an ``OSError``; no socket stays open."""
    before = _descriptors()
    with pytest.raises(OSError, match="No such file"):
        wire.unix_connect(str(tmp_path / "s"))

    assert _descriptors() == before


# -- errors -----------------------------------------------------------------------------------------


def test_error_crosses(pair: Pair) -> None:
    """An error of this project arrives as itself, with its fields."""
    sent = UnknownNameError.of("column", "agee", ["age"])
    wire.send_message(pair[1], wire.error_reply(sent))

    with pytest.raises(UnknownNameError) as raised:
        wire.call(pair[0], {"op": "x"})
    assert (raised.value.message, raised.value.fields) == (sent.message, sent.fields)


def test_other_error_keeps_its_text() -> None:
    """The text of any other exception could quote data; its type alone crosses."""
    reply = wire.error_reply(RuntimeError("patient 4711"))

    with pytest.raises(ZoneError, match="RuntimeError") as raised:
        wire.raise_for_error(reply)
    assert "4711" not in str(raised.value)


@pytest.mark.parametrize("document", [None, "text", 3, {}, {"error": "NoSuchError"}, {"error": "OSError", "fields": 3}])
def test_malformed_error(document: Any) -> None:
    """An error that says nothing sensible is still an error of this project."""
    with pytest.raises(ZoneError):
        wire.raise_for_error({"ok": False, "error": document})
