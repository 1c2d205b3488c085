"""A notebook that uses none of our client: it speaks to the gateway's socket itself, and says what it likes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import cloudpickle
import msgpack
import pyarrow as pa

from ray_gpu.wire import raise_for_error, recv_message, send_message, unix_connect
from tests.proofs.attacked import Attacked
from zones import values
from zones.vault import Vault

_SHRINK_GROW = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
#: The seal that a writable mapping made earlier survives; fcntl has no name for it before Python 3.12.
_F_SEAL_FUTURE_WRITE = 0x10
#: What makes a memory file immutable, and what does not.
SEALED = _SHRINK_GROW | fcntl.F_SEAL_WRITE
NOT_SEALED = {"no seal": 0, "size alone": _SHRINK_GROW, "writing alone": fcntl.F_SEAL_WRITE,
              "future writing": _SHRINK_GROW | _F_SEAL_FUTURE_WRITE}  # fmt: skip


class Notebook:
    """One connection to the gateway with the shipped person's login, or nobody's without *purpose*."""

    def __init__(self, attacked: Attacked, purpose: str | None = "bypass") -> None:
        self._sock = unix_connect(str(attacked.layout.gateway_socket(attacked.zone)))
        self._sock.settimeout(60)
        self.session = self.secret = ""
        if purpose is not None:
            card = self.ask({"op": "attach", "token": token(attacked), "purpose": purpose})
            self.session, self.secret = card["session"], card["secret"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._sock.close()

    def ask(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send anything and return the answer, or raise the error that it is."""
        send_message(self._sock, message, fds)
        while True:
            reply, received = recv_message(self._sock, max_fds=1)
            for fd in received:
                os.close(fd)
            if "event" not in reply:
                return raise_for_error(reply)

    def call(self, fds: Sequence[int] = (), **changes: Any) -> dict[str, Any]:
        """Make a call that is honest but for *changes*."""
        return self.ask(honest(**changes), fds)

    def close(self) -> list[dict[str, Any]]:
        """End the session and return its receipts."""
        return list(self.ask({"op": "close"})["receipts"])


def token(attacked: Attacked) -> str:
    """Log in to Vault as the shipped person."""
    person = json.loads(attacked.layout.person.read_text(encoding="utf-8"))
    settings = attacked.settings("gateway")
    client = Vault(settings["vault"], ca_file=settings["vault_ca"])
    try:
        return client.login_userpass(person["user"], person["password"]).token
    finally:
        client.close()


def count(batch: Any, *_: Any) -> int:
    """Return the number of rows."""
    return len(batch)


def honest(**changes: Any) -> dict[str, Any]:
    """Return a request that is allowed but for *changes*: rows of a column that may leave."""
    work = {"name": "count", "function": pickled(), "options": {"concurrency": 1, "gpu_milli": 100}}
    work |= {name: changes.pop(name) for name in work if name in changes}
    data = {"dataset": "visits", "columns": ["cost"]}
    return {
        "op": "call",
        "mode": "shards",
        "work": msgpack.packb(work),
        "arguments": encoded(),
        "data": data,
        **changes,
    }


def pickled(captured: bytes = b"") -> bytes:
    """Return a function that captures any bytes, past every check that the client makes."""
    return bytes(cloudpickle.dumps(lambda batch, *_: len(batch) + len(captured)))


def encoded(*arguments: Any) -> bytes:
    """Return encoded arguments."""
    return bytes(values.encode([list(arguments), {}]))


def memory_file(table: pa.Table, seals: int = SEALED) -> int:
    """Return the descriptor of a memory file with a table, sealed in any way; the caller closes it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    fd = os.memfd_create("table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, sink.getvalue())
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
