"""Arrow IPC streams: written into a caller's buffer, read back without copies, checked when they come from outside.

Rules for a stream that is not trusted (:func:`read_ipc` with ``trusted=False``):

1. One schema message, then dictionaries and record batches, then the end marker, then nothing.
2. No body is compressed (a length field would choose how much memory we allocate) and no dictionary is a delta.
3. Every type is on the list of :func:`check_type`: no extension type, at any depth, and no metadata.
4. Rows, bytes and the size that dictionaries would decode to are capped.
5. ``Table.validate(full=True)`` passed, so offsets, UTF-8 and codes can be relied on.

Rules 1 and 2 are checked on the messages before Arrow builds anything from them.
Format: https://arrow.apache.org/docs/format/Columnar.html, Message.fbs and Schema.fbs.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from zones.errors import ValueRefusedError

#: What the functions here read from. All share memory with the values they return.
Buffer = bytes | bytearray | memoryview | pa.Buffer

#: Rows of a table or elements of an array. A generous bound on loops, not on memory, which bytes bound.
MAX_ROWS = 1 << 31
#: Bytes of one encoded value. Larger results belong in shards.
MAX_BYTES = 1 << 32
#: Nesting of Arrow types. Arrow itself stops at 64.
MAX_TYPE_DEPTH = 16

_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_TIME_ZONE = re.compile(r"[A-Za-z0-9_+\-]{1,32}(/[A-Za-z0-9_+\-]{1,32}){0,2}|[+-]\d\d:\d\d")
_VARIABLE = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
_FLAT = (
    *_VARIABLE,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_duration,
)


def is_flat(kind: pa.DataType) -> bool:
    """Say whether *kind* is a plain column type without children, whose cells all take memory."""
    if pa.types.is_timestamp(kind):
        return kind.tz is None or _TIME_ZONE.fullmatch(kind.tz) is not None
    if pa.types.is_fixed_size_binary(kind):
        return bool(kind.byte_width > 0)
    return any(test(kind) for test in _FLAT)


def check_type(kind: pa.DataType, where: str, *, depth: int = 0) -> None:
    """Accept plain types and lists, structs and maps of them; dictionaries and nulls only as a whole column.

    Raises:
        ValueRefusedError: Anything else, such as an extension type, a union or run-end encoding.
    """
    if depth == 0 and (pa.types.is_null(kind) or (pa.types.is_dictionary(kind) and is_flat(kind.value_type))):
        return
    if is_flat(kind):
        return
    fields = _children(kind)
    if not fields or depth >= MAX_TYPE_DEPTH:
        raise ValueRefusedError(f"{where} has Arrow type {_name(kind)}; cast it to a plain Arrow type first")
    for field in fields:
        check_type(field.type, where, depth=depth + 1)


def _children(kind: pa.DataType) -> list[pa.Field[Any]]:
    nested = (pa.types.is_list, pa.types.is_large_list, pa.types.is_struct, pa.types.is_map)
    if any(test(kind) for test in nested) or (pa.types.is_fixed_size_list(kind) and kind.list_size > 0):
        return [kind.field(i) for i in range(kind.num_fields)]
    return []


def _name(kind: pa.DataType) -> str:
    # The full text of a type may hold what its owner put into an extension's parameters.
    return type(kind).__name__ if isinstance(kind, pa.BaseExtensionType) else str(kind)[:80]


def plain_table(table: pa.Table, where: str = "the table") -> pa.Table:
    """Return *table* without metadata of the schema, its fields and theirs. Copies nothing that is large.

    Raises:
        ValueRefusedError: A column is not plain, see :func:`check_type`; the message starts with *where*.
    """
    names = table.column_names
    columns = [plain_column(table.column(i), f"{where}, column {name!r},") for i, name in enumerate(names)]
    fields = [pa.field(name, column.type) for name, column in zip(names, columns, strict=True)]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def without_views(table: pa.Table) -> pa.Table:
    """Return *table* with its view columns, which a stream from outside may not have, as large text or bytes."""
    if not any(_is_view(kind) for kind in table.schema.types):
        return table
    return pa.Table.from_arrays([_without_views(column) for column in table.columns], names=table.column_names)


def _without_views(column: Any) -> Any:
    # A view's buffers hold the text of rows that were filtered away.
    if not _is_view(column.type):
        return column
    return column.cast(pa.large_string() if pa.types.is_string_view(column.type) else pa.large_binary())


def _is_view(kind: Any) -> bool:
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def plain_column(column: Any, where: str) -> Any:
    """Return a chunked array without metadata inside its type. Raises as :func:`plain_table`, naming *where*."""
    column = _without_views(column)
    check_type(column.type, where)
    plain = _plain_type(column.type)
    return column if plain.equals(column.type, check_metadata=True) else column.cast(plain)


def _plain_type(kind: Any) -> Any:
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _plain_type(f.type)) for f in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain_type(kind.key_type), _plain_type(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_type(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_type(kind.value_type))
    return pa.list_(_plain_type(kind.value_type)) if pa.types.is_list(kind) else kind


def ipc_size(table: pa.Table) -> int:
    """Return the exact bytes that :func:`write_ipc_into` writes. Costs no copy of fixed-width columns."""
    sink = pa.MockOutputStream()
    _write(table, sink)
    return int(sink.size())


def write_ipc_into(table: pa.Table, out: memoryview) -> int:
    """Write *table* as an uncompressed Arrow IPC stream straight into *out*; each buffer is copied once.

    Returns:
        Bytes written.

    Raises:
        ValueError: *out* is shorter than :func:`ipc_size`.
    """
    if not len(out):
        raise ValueError("the buffer for an Arrow stream is empty; ask ipc_size first")
    sink = pa.FixedSizeBufferWriter(pa.py_buffer(out))
    try:
        _write(table, sink)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"an Arrow stream does not fit in {len(out)} bytes; ask ipc_size first") from error
    return int(sink.tell())


def _write(table: pa.Table, sink: pa.NativeFile) -> None:
    # One dictionary per column and stream, so that no replacement has to be sent.
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.unify_dictionaries())


def read_ipc(buffer: Buffer, *, trusted: bool, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> pa.Table:
    """Read an Arrow IPC stream without copying: the table's memory is *buffer*, which must not change any more.

    Args:
        buffer: The whole stream. Not memory that another trust domain can still write.
        trusted: ``True`` only for what this zone's gateway wrote and an envelope protected.
        max_rows: Largest number of rows accepted.
        max_bytes: Largest stream, and largest size once dictionaries are decoded.

    Raises:
        ValueRefusedError: The stream is not a plain table; see the module's rules.
    """
    data = buffer if isinstance(buffer, pa.Buffer) else pa.py_buffer(buffer)
    try:
        if not trusted:
            _check_messages(data, max_rows, max_bytes)
        with pa.ipc.open_stream(pa.BufferReader(data)) as reader:
            if not trusted:
                _check_schema(reader.schema)
            table = reader.read_all()
        if not trusted:
            _check_table(table, max_rows, max_bytes)
    except ValueRefusedError:
        raise
    except Exception:  # noqa: BLE001 - whatever a hostile stream does to the parser is one refusal
        # The parser's text may quote values, so it is dropped.
        raise ValueRefusedError("not a valid Arrow stream; return a plain pyarrow Table") from None
    return table


def _check_messages(data: pa.Buffer, max_rows: int, max_bytes: int) -> None:
    if data.size > max_bytes:
        raise ValueRefusedError(f"an Arrow stream of {data.size} bytes is above the limit of {max_bytes}")
    if data.size < 16 or data.slice(data.size - 8).to_pybytes() != _END:
        raise ValueRefusedError("an Arrow stream has no end marker; send it again")
    rows = 0
    for position, kind, metadata in _messages(data):
        if kind not in ("schema", "dictionary", "record batch") or (kind == "schema") != (position == 0):
            raise ValueRefusedError(f"an Arrow stream holds an unexpected message of kind {kind}")
        if kind == "schema":
            continue
        header = _Flat(metadata)
        if header.has(4):
            raise ValueRefusedError("an Arrow message carries metadata; remove it")
        batch = header.field(2)
        if kind == "dictionary":
            if batch.byte(2):
                raise ValueRefusedError("an Arrow stream has dictionary deltas; unify the dictionaries first")
            batch = batch.field(1)
        if batch.has(3):
            raise ValueRefusedError("an Arrow stream is compressed; write it uncompressed")
        rows += batch.long(0) if kind == "record batch" else 0
        if not 0 <= rows <= max_rows:
            raise ValueRefusedError(f"an Arrow stream has more than the {max_rows} rows allowed")


def _messages(data: pa.Buffer) -> Iterator[tuple[int, str, bytes]]:
    source = pa.BufferReader(data)
    reader = pa.ipc.MessageReader.open_stream(source)
    position = 0
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            break
        yield position, message.type, message.metadata.to_pybytes()
        position += 1
    if source.tell() != data.size:
        raise ValueRefusedError("an Arrow stream has bytes after its end")


class _Flat:
    """The few fields of a FlatBuffers table that the rules need. A bad offset raises ``struct.error``."""

    def __init__(self, data: bytes, position: int | None = None) -> None:
        self.data = data
        self.position = struct.unpack_from("<I", data, 0)[0] if position is None else position

    def _slot(self, index: int) -> int:
        vtable = self.position - struct.unpack_from("<i", self.data, self.position)[0]
        if vtable < 0:
            raise struct.error("vtable before the buffer")
        if 4 + 2 * index + 2 > struct.unpack_from("<H", self.data, vtable)[0]:
            return 0
        offset: int = struct.unpack_from("<H", self.data, vtable + 4 + 2 * index)[0]
        return self.position + offset if offset else 0

    def has(self, index: int) -> bool:
        return self._slot(index) != 0

    def byte(self, index: int) -> int:
        slot = self._slot(index)
        return self.data[slot] if slot else 0

    def long(self, index: int) -> int:
        slot = self._slot(index)
        return int(struct.unpack_from("<q", self.data, slot)[0]) if slot else 0

    def field(self, index: int) -> _Flat:
        slot = self._slot(index)
        if not slot:
            raise struct.error("missing table")
        return _Flat(self.data, slot + struct.unpack_from("<I", self.data, slot)[0])


def _check_schema(schema: pa.Schema) -> None:
    if schema.metadata:
        raise ValueRefusedError("an Arrow schema carries metadata; remove it with replace_schema_metadata(None)")
    for field in schema:
        _refuse_metadata(field)
        check_type(field.type, "a column")


def _refuse_metadata(field: pa.Field[Any]) -> None:
    if field.metadata:
        raise ValueRefusedError("an Arrow field carries metadata; remove it")
    for child in _children(field.type):
        _refuse_metadata(child)


def _check_table(table: pa.Table, max_rows: int, max_bytes: int) -> None:
    if table.num_rows > max_rows:
        raise ValueRefusedError(f"{table.num_rows} rows are above the limit of {max_rows}")
    table.validate(full=True)
    decoded = sum(_decoded_bytes(chunk) for column in table.columns for chunk in column.chunks)
    if decoded > max_bytes:
        raise ValueRefusedError(f"dictionary columns decode to more than the {max_bytes} bytes allowed")


def _decoded_bytes(array: pa.Array[Any]) -> int:
    # A few bytes of codes may stand for gigabytes of text: count before anybody decodes.
    if not isinstance(array, pa.DictionaryArray):
        return 0
    values: Any = array.dictionary
    if not any(test(values.type) for test in _VARIABLE):
        return int(values.type.bit_width // 8 + 1) * len(array)
    lengths: Any = pc.binary_length(values).cast(pa.int64()).take(array.indices)
    return int(pc.sum(lengths).as_py() or 0)
