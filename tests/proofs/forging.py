"""Answers that no honest sandbox gives, and a witness who hears when one of them runs code."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa

from zones import values


class Witness:
    """Hears from any process of this host that unpickles what :meth:`armed` returns, caged ones included."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)

    @property
    def port(self) -> int:
        """Where a trap that springs connects to."""
        return int(self._listener.getsockname()[1])

    def armed(self) -> bytes:
        """Return a pickle that connects to this witness when it is loaded."""

        class Trap:
            port = self.port

            def __reduce__(self) -> Any:
                return socket.create_connection, (("127.0.0.1", self.port), 5)

        return pickle.dumps(Trap())

    def sprung(self) -> bool:
        """Return whether a trap sprang since the last time."""
        try:
            self._listener.accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


def answer_bytes(meta: dict[str, Any], value: bytes) -> bytes:
    """Return an answer as a sandbox writes it: length, msgpack map, padding to 64 bytes, value."""
    packed = msgpack.packb(meta)
    head: bytes = struct.pack("!I", len(packed)) + packed
    return head.ljust(-(-len(head) // 64) * 64, b"\0") + value


def value_bytes(skeleton: Any, buffer: bytes = b"") -> bytes:
    """Return an encoded value with any skeleton."""
    packed: bytes = msgpack.packb(skeleton)
    start = -(-(16 + len(packed)) // 64) * 64 if buffer else 16 + len(packed)
    return struct.pack("<4sIQ", b"RGV1", len(packed), start + len(buffer)) + packed.ljust(start - 16, b"\0") + buffer


def extension_bytes(name: str, armed: bytes) -> bytes:
    """Return a table with one cell of an extension type, as an Arrow stream."""
    field = pa.field("a", pa.binary(), metadata={"ARROW:extension:name": name, "ARROW:extension:metadata": armed})
    return table_bytes(pa.table([pa.array([armed])], schema=pa.schema([field])))


def table_bytes(table: pa.Table) -> bytes:
    """Return a table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def forgeries(armed: bytes) -> dict[str, bytes]:
    """Return answers that no honest sandbox gives. Each has the armed pickle where a careless reader would load it."""
    ok = {"status": "ok", "printed": ""}
    tables = {
        name: extension_bytes(name, armed) for name in ("ray.data.arrow_pickled_object", "arrow.py_extension_type")
    }
    return {
        "nothing but the pickle": armed,
        "pickle as the map": struct.pack("!I", len(armed)) + armed,
        "pickle as the value": answer_bytes(ok, armed),
        "pickle after the value": answer_bytes(ok, bytes(values.encode(1)) + armed),
        "object array": answer_bytes(ok, value_bytes(["n", "|O", [1], False], armed)),
        "unknown tag": answer_bytes(ok, value_bytes(["pickle", armed])),
        "skeleton extension": answer_bytes(ok, value_bytes(msgpack.ExtType(1, armed))),
        "map extension": answer_bytes({**ok, "value": msgpack.ExtType(1, armed)}, bytes(values.encode(1))) + armed,
        "unknown status": answer_bytes({"status": "pickle"}, armed),
        **{name: answer_bytes(ok, value_bytes(["T", len(table)], table)) for name, table in tables.items()},
    }


def bombs() -> dict[str, bytes]:
    """Return answers that are small, or claim to be, and would fill memory or the stack when they are believed."""
    ok = {"status": "ok", "printed": ""}
    cells = pa.DictionaryArray.from_arrays(np.zeros(400_000, np.int32), pa.array(["x" * 100_000]))
    bomb = table_bytes(pa.table({"a": cells}))
    deep_map = b"\x82\xa6status\xa2ok\xa1a" + b"\x91" * 100_000 + b"\xc0"
    deep_value = b"\x92\xa1l" * 100_000 + b"\xc0"
    nested = table_bytes(pa.table({"a": pa.array([None], _nested(60))}))
    return {
        "dictionary bomb": answer_bytes(ok, value_bytes(["T", len(bomb)], bomb)),
        "map nested deeply": struct.pack("!I", len(deep_map)) + deep_map + bytes(64),
        "value nested deeply": answer_bytes(ok, struct.pack("<4sIQ", b"RGV1", len(deep_value), 16 + len(deep_value))
                                            + deep_value),
        "lists of lists of a table": answer_bytes(ok, value_bytes(["T", len(nested)], nested)),
        "array of 2^40 numbers": answer_bytes(ok, value_bytes(["n", "<f8", [1 << 40], False], bytes(64))),
        "array of 2^80 numbers": answer_bytes(ok, value_bytes(["n", "<f8", [1 << 40, 1 << 40], False], bytes(64))),
        "a billion empty rows": answer_bytes(ok, value_bytes(["n", "<U0", [1 << 30], False])),
        "length beyond the end": answer_bytes(ok, value_bytes(["T", 1 << 40], bytes(64))),
        "negative length": answer_bytes(ok, value_bytes(["T", -1], bytes(64))),
        "map beyond the end": struct.pack("!I", 0xFFFFFFFF) + bytes(64),
        "list of four billion": answer_bytes(ok, struct.pack("<4sIQ", b"RGV1", 5, 21) + b"\xdd\xff\xff\xff\xff"),
        "nothing": b"",
        "zeros": bytes(1 << 16),
    }  # fmt: skip


def _nested(depth: int) -> pa.DataType:
    kind: pa.DataType = pa.int8()
    for _ in range(depth):
        kind = pa.list_(kind)
    return kind
