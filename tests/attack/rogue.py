"""A custodian gone bad: it has a node's real identity, opens real leases, and what it answers in them is lies.

Runs in place of a node's custodian: ``python -m tests.attack.rogue SETTINGS LIE TOLD``. It takes which lie to tell from
the file LIE, for each connection anew, and writes a line to the file TOLD for each lie that it told.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from ray_gpu import custodian, environment
from ray_gpu.endpoint import Endpoint
from ray_gpu.frames import SealedSocket
from tests.proofs.forging import answer_bytes, bombs, forgeries
from zones import ipc, values
from zones.envelope import Header, LeaseKey, header_for, padded_size, sealed_size
from zones.errors import ZoneError
from zones.keys import derive_lease_key
from zones.model import Direction, Grant, Kind, Slot, canonical

#: What this node's sandboxes can import.
CONTENTS = environment.current()
OK = {"status": "ok", "printed": ""}
#: How often a byte comes of a message that never ends, seconds.
TRICKLE_S = 0.5
#: What the witness's pickle connects to is read from here.
ARMED_VARIABLE = "ARMED"


def honest(rows: Any) -> bytes:
    """Return an answer of the right form."""
    return answer_bytes(OK, bytes(values.encode(rows)))


def content_lies(armed: bytes) -> dict[str, bytes]:
    """Return whole answers that no sandbox of ours gives."""
    return {**forgeries(armed), **bombs()}


class Liar:
    """A keeper gone bad: one lease, one connection, one lie."""

    def __init__(self, sock: socket.socket, key: LeaseKey, grant: Grant, lie: str, told: Callable[[str], None]) -> None:
        self.sock, self.key, self.grant, self.lie, self.told = sock, key, grant, lie, told
        self.link = SealedSocket(sock, key=key, grant_digest=grant.digest(), lease=grant.lease, outgoing=Direction.BACK)
        self.link.settimeout(None)
        #: What to answer, and where: the zone has these tests' numbers tripled.
        self.shards: deque[tuple[Slot, np.ndarray[Any, Any]]] = deque()

    def serve(self) -> None:
        """Speak the protocol, and lie where the lie belongs."""
        with contextlib.suppress(ZoneError, OSError):
            self.link.receive()
            self._hello()
            while True:
                header, payload = self.link.receive()
                if header.kind is Kind.CONTROL:
                    if msgpack.unpackb(payload).get("close"):
                        self._receipt(header)
                elif header.kind in (Kind.SHARD, Kind.CALL):
                    self._answer(header, bytes(payload))
        self.link.close()

    # -- hello and receipt ----------------------------------------------------------------------

    def _hello(self) -> None:
        honest = {
            "node": self.grant.node, "pool": self.grant.pool, "device": "none", "contents": CONTENTS.document(),
            "environment": self.grant.environment,
            "degradations": list(self.grant.accepted_degradations),
        }  # fmt: skip
        said = {
            "hello that is no msgpack": b"\xc1" * 99,
            "hello that is a list": msgpack.packb([honest]),
            "hello without fields": msgpack.packb({}),
            "hello of another node": msgpack.packb({**honest, "node": "gpu-2"}),
            "hello with a number for its lacks": msgpack.packb({**honest, "degradations": 7}),
            "hello with other contents": msgpack.packb({**honest, "contents": {**CONTENTS.document(), "packages": {}}}),
            "hello with contents that are none": msgpack.packb({**honest, "contents": {"python": ["3"]}}),
            "hello nested deeply": b"\x81\xa1a" + b"\x91" * 10_000 + b"\xc0",
            "hello with an extension": msgpack.packb({**honest, "device": msgpack.ExtType(1, b"x")}),
            "hello of 32 MiB": msgpack.packb({**honest, "device": "x" * (32 << 20)}),
        }.get(self.lie)
        slot = self.link.slot(Kind.HELLO, call=0)
        if said is not None:
            self.told(self.lie)
        elif self.lie == "hello under another kind":
            self.told(self.lie)
            slot = self.link.slot(Kind.RESULT, call=0)
        self.link.send(slot, msgpack.packb(honest) if said is None else said)

    def _receipt(self, header: Header) -> None:
        slot = self.link.slot(Kind.CONTROL, call=header.call, shard=header.shard)
        if not self.lie.startswith("receipt"):
            return
        self.told(self.lie)
        if self.lie == "receipt that never comes":
            for call in range(1 << 30):
                self.link.send(self.link.slot(Kind.RESULT, call=1 << 40, shard=call), b"")
        said: Any = {"receipt": {"lease": self.grant.lease}, "signature": "00", "certificate": "no"}
        if self.lie == "receipt nested deeply":
            self.link.send(slot, b"\x81\xa7receipt" + b"\x91" * 10_000 + b"\xc0")
        self.link.send(slot, msgpack.packb(said))

    # -- answers --------------------------------------------------------------------------------

    def _answer(self, header: Header, payload: bytes) -> None:
        slot = self.link.slot(Kind.RESULT, call=header.call, shard=header.shard, attempt=header.attempt)
        table = ipc.read_ipc(payload, trusted=True) if header.kind is Kind.SHARD else None
        self.shards.append((slot, table.columns[0].to_numpy() * 3 if table else np.zeros(1)))
        if len(self.shards) == 1 and self.lie in NEED_TWO:
            return
        if self.lie in RECEIPT_LIES:
            self.link.send(slot, answer_bytes(OK, bytes(values.encode(0))))
            return
        self.told(self.lie)
        lies = content_lies(bytes.fromhex(os.environ.get(ARMED_VARIABLE, "")))
        if self.lie in lies:
            self.link.send(slot, lies[self.lie])
        else:
            _LIES[self.lie](self)

    def sealed(self, slot: Slot, payload: bytes, key: LeaseKey | None = None) -> bytes:
        """Return a sealed message, by any key, without sending it."""
        ours, theirs = socket.socketpair()
        with ours, theirs, socket.create_server(("127.0.0.1", 0)) as listener:
            out = socket.create_connection(listener.getsockname())
            back = listener.accept()[0]
            with out, back:
                link = SealedSocket(
                    out, key=key or self.key, grant_digest=self.grant.digest(), lease=self.grant.lease,
                    outgoing=Direction.BACK,
                )  # fmt: skip
                link.send(slot, payload)
                out.shutdown(socket.SHUT_WR)
                return b"".join(iter(functools.partial(back.recv, 1 << 20), b""))

    def trickle(self, data: bytes) -> None:
        """Send a byte now and then, for as long as the other side bears it."""
        for byte in data:
            self.sock.sendall(bytes([byte]))
            time.sleep(TRICKLE_S)


def _one_row_less(liar: Liar) -> None:
    slot, rows = liar.shards[-1]
    liar.link.send(slot, honest(rows[1:]))


def _one_row_more(liar: Liar) -> None:
    slot, rows = liar.shards[-1]
    liar.link.send(slot, honest(np.append(rows, 0.0)))


def _swapped(liar: Liar) -> None:
    """Answer two shards in the wrong order, each with its own slot."""
    for slot, rows in reversed(liar.shards):
        liar.link.send(slot, honest(rows))


def _replayed(liar: Liar) -> None:
    slot, rows = liar.shards[0]
    recorded = liar.sealed(slot, honest(rows))
    liar.sock.sendall(recorded + recorded)


def _forged(liar: Liar) -> None:
    slot, rows = liar.shards[-1]
    sealed = bytearray(liar.sealed(slot, honest(rows)))
    sealed[-40] ^= 1
    liar.sock.sendall(sealed)


def _other_key(liar: Liar) -> None:
    slot, rows = liar.shards[-1]
    liar.sock.sendall(liar.sealed(slot, honest(rows), LeaseKey.from_bytes(os.urandom(32))))


def _other_slot(liar: Liar, **changes: Any) -> None:
    slot, rows = liar.shards[-1]
    fields = {"kind": Kind.RESULT, "call": slot.call, "shard": slot.shard, "attempt": slot.attempt, **changes}
    liar.link.send(liar.link.slot(fields.pop("kind"), **fields), honest(rows))


def _garbage(liar: Liar) -> None:
    liar.sock.sendall(os.urandom(1 << 16))


def _huge(liar: Liar) -> None:
    slot, _ = liar.shards[-1]
    head = bytearray(header_for(slot, padded_size(0)).encode())
    head[32:40] = (1 << 40).to_bytes(8, "big")
    liar.sock.sendall(head + os.urandom(1 << 16))


def _endless(liar: Liar) -> None:
    slot, _ = liar.shards[-1]
    size = padded_size(1 << 20)
    liar.sock.sendall(header_for(slot, size).encode())
    liar.trickle(bytes(sealed_size(size)))


def _half_a_header(liar: Liar) -> None:
    slot, _ = liar.shards[-1]
    liar.trickle(header_for(slot, padded_size(0)).encode()[:1])
    time.sleep(3600)


_LIES: dict[str, Callable[[Liar], None]] = {
    "one row less": _one_row_less,
    "one row more": _one_row_more,
    "swapped results": _swapped,
    "replayed result": _replayed,
    "forged result": _forged,
    "another key": _other_key,
    "result of another call": functools.partial(_other_slot, call=999),
    "result of another shard": functools.partial(_other_slot, shard=999_999),
    "result of another attempt": functools.partial(_other_slot, attempt=3),
    "a function": functools.partial(_other_slot, kind=Kind.FUNCTION),
    "a hello": functools.partial(_other_slot, kind=Kind.HELLO),
    "garbage": _garbage,
    "header of a terabyte": _huge,
    "message that never ends": _endless,
    "half a header": _half_a_header,
}
#: Lies that need two shards on their way.
NEED_TWO = ("swapped results", "replayed result")
RESULT_LIES = (*_LIES,)
STALLS = ("message that never ends", "half a header")
HELLO_LIES = (
    "hello that is no msgpack", "hello that is a list", "hello without fields", "hello of another node",
    "hello with a number for its lacks", "hello nested deeply", "hello with an extension", "hello of 32 MiB",
    "hello under another kind",
)  # fmt: skip
RECEIPT_LIES = ("receipt unsigned", "receipt nested deeply", "receipt that never comes")
OFFER_LIES = (
    "offer unsigned", "offer without fields", "offer of another node", "offer with a useless key", "offer that is text",
)  # fmt: skip


class Rogue(custodian.Custodian):
    """Makes real offers, opens the keys of real grants, and starts neither keeper nor sandbox."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lie_file, self._told_file = Path(sys.argv[2]), Path(sys.argv[3])
        self._endpoints: dict[str, Endpoint] = {}

    def _lie(self) -> str:
        return self._lie_file.read_text(encoding="utf-8").strip()

    def _told(self, lie: str) -> None:
        with self._told_file.open("a", encoding="utf-8") as file:
            file.write(f"{lie}\n")

    def offer(self, lease: str) -> dict[str, Any]:
        """Make an offer, forged if that is the lie."""
        made, lie = super().offer(lease), self._lie()
        if lie not in OFFER_LIES:
            return made
        self._told(lie)
        document = made["offer"]
        changed: Any = {
            "offer unsigned": document,
            "offer without fields": {},
            "offer of another node": {**document, "node": "gpu-2"},
            "offer with a useless key": {**document, "exchange_key": "00" * 32},
            "offer that is text": "offer",
        }[lie]
        if lie == "offer unsigned":
            return {**made, "signature": "00" * 64}
        if lie == "offer with a useless key":
            signed = canonical({"lease": lease, **changed})
            return {**made, "offer": changed, "signature": self._identity.sign(signed)}
        return {**made, "offer": changed}

    def grant(self, lease: str, request: dict[str, Any]) -> dict[str, Any]:
        """Open the lease's key and listen for its data, as the real one does."""
        grant = custodian._parse_grant(request.get("grant"))
        with self._lock:
            offer, exchange = self._take_offer(lease, grant)
        data_key = self._vault.unwrap(grant.zone, grant.node, lease, grant.digest(), str(request.get("wrapped")))
        key = derive_lease_key(data_key, exchange.shared(grant.exchange_key), grant.digest())
        endpoint = self._endpoints[lease] = Endpoint(self._settings.address, self._settings.endpoint_ports)
        endpoint.serve(lambda fd: self._lie_to(fd, key, grant))
        return {"device": "none", "offer": offer.document(), "endpoint": endpoint.address}

    def _lie_to(self, fd: int, key: LeaseKey, grant: Grant) -> None:
        liar = Liar(socket.socket(fileno=os.dup(fd)), key, grant, self._lie(), self._told)
        threading.Thread(target=liar.serve, daemon=True).start()

    def _end(self, lease: str) -> None:
        if endpoint := self._endpoints.pop(lease, None):
            endpoint.close()


if __name__ == "__main__":
    custodian.Custodian = Rogue  # type: ignore[misc]  # main() makes one of us in its place
    custodian.main([sys.argv[1]])
