"""P3: whatever a notebook says, and to whomever, no byte leaves that was not decided on and written down."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import ray_gpu
from ray_gpu import functions, handle, options
from ray_gpu.ports import NodePorts
from tests.proofs.attacked import COLUMNS, NOTEBOOK_TABLES, SESSION_BYTES, SMALL_BYTES, Attacked
from tests.proofs.notebook import NOT_SEALED, SEALED, Notebook, encoded, honest, memory_file, pickled, token
from zones import errors
from zones.envelope import HEADER_BYTES, MIN_PADDED_BYTES, sealed_size
from zones.errors import EgressDeniedError, SessionClosedError, ValueRefusedError, VaultDeniedError
from zones.header import header_for
from zones.model import Direction, Kind, Slot

#: Hello, heartbeats, "finished" and "close" say nothing that the zone must decide on, and have one size.
CONTROL_BYTES = HEADER_BYTES + sealed_size(MIN_PADDED_BYTES)
HEARTBEAT_S = 3
#: State of a socket in /proc/net/tcp.
LISTENING = "0A"
VISITS = {"dataset": "visits", "columns": ["cost"]}
MORE_THAN_SMALL = os.urandom(SMALL_BYTES)


@pytest.fixture(scope="module")
def notebook(attacked: Attacked) -> Iterator[Notebook]:
    """One hostile notebook for all requests that leave its session whole."""
    with Notebook(attacked) as opened:
        yield opened


def test_honest_request(notebook: Notebook, attacked: Attacked) -> None:
    """The request that all others here are variations of goes through, and the ledger has it."""
    before = len(attacked.entries("intent"))

    assert notebook.call()["ok"] is True
    assert len(attacked.entries("intent")) > before


#: What a lying client may change in a request, and how it is refused before anything is decided.
MALFORMED: dict[str, tuple[str, dict[str, Any]]] = {
    "path for a data set": ("UnknownNameError", {"data": {**VISITS, "dataset": "../visits"}}),
    "absolute path for a data set": ("UnknownNameError", {"data": {**VISITS, "dataset": "/etc/passwd"}}),
    "file name for a data set": ("UnknownNameError", {"data": {**VISITS, "dataset": "visits.arrow"}}),
    "unknown column": ("UnknownNameError", {"data": {**VISITS, "columns": ["cost", "../patient"]}}),
    "column that the handle lacks": ("UnknownNameError", {"options": {"columns": ["note"]}}),
    "unknown column in a filter": ("UnknownNameError", {"data": {**VISITS, "filter": ["rows", ">", 1]}}),
    "filter that is code": ("GatewayError", {"data": {**VISITS, "filter": "__import__('os').system('true')"}}),
    "memory without a file": ("GatewayError", {"data": {"memory": True}}),
    "a call with data": ("GatewayError", {"mode": "call"}),
    "rows without data": ("GatewayError", {"data": None}),
    "unknown mode": ("GatewayError", {"mode": "raw"}),
    "unknown pool": ("UnknownNameError", {"options": {"pool": "mine"}}),
    "unknown option": ("GatewayError", {"options": {"reviewed": True}}),
    "no limit on shards": ("GatewayError", {"options": {"shard_bytes": 1 << 40}}),
    "no limit on leases": ("GatewayError", {"options": {"concurrency": 1 << 20}}),
    "function over the cap": ("FunctionRefusedError", {"function": bytes((64 << 10) + 1)}),
    "function that is no bytes": ("GatewayError", {"function": "count"}),
    "arguments over the cap": ("FunctionRefusedError", {"arguments": bytes((768 << 10) + 1)}),
    "unknown request": ("GatewayError", {"op": "send"}),
}
#: What policy refuses, and what the ledger then says of the data: (dataset, one of the columns).
DENIED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "forbidden column": ("visits", "patient", {"data": {**VISITS, "columns": ["cost", "patient"]}}),
    "all columns": ("visits", "patient", {"data": {"dataset": "visits"}}),
    "filter on a forbidden column": ("visits", "patient", {"data": {**VISITS, "filter": ["patient", "<", 100]}}),
    "second filter on one": ("visits", "patient", {"data": {**VISITS, "then": ["patient", "<", 100]}}),
    "filter hidden in others": (
        "visits", "patient", {"data": {**VISITS, "filter": ["and", ["cost", ">", 0], ["not", ["patient", "==", 1]]]}},
    ),
    "large arguments": ("visits", "cost", {"arguments": encoded(MORE_THAN_SMALL)}),
    "large function": ("visits", "cost", {"function": pickled(MORE_THAN_SMALL)}),
    "large arguments of a call": (
        "", "<arguments>", {"mode": "call", "data": None, "arguments": encoded(MORE_THAN_SMALL)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(notebook: Notebook, attacked: Attacked, name: str) -> None:
    """A request that names what is not there, or is over a cap, is refused; nothing leaves."""
    error, changes = MALFORMED[name]
    before = len(attacked.entries("intent"))

    with pytest.raises(getattr(errors, error)):
        notebook.call(**changes)
    assert len(attacked.entries("intent")) == before


@pytest.mark.parametrize("name", DENIED)
def test_denied(notebook: Notebook, attacked: Attacked, name: str) -> None:
    """What policy forbids is refused however it is asked for, each time it is asked for, and the ledger says so."""
    dataset, column, changes = DENIED[name]
    before = len(attacked.entries("intent"))

    for _ in range(2):
        with pytest.raises(EgressDeniedError):
            notebook.call(**changes)
    assert len(attacked.entries("intent")) == before
    refused = attacked.entries("decision", decision="refused", session=notebook.session)[-1]
    assert refused["dataset"] == dataset
    assert "direct-identifier" in refused["classes"]
    assert column in refused["columns"] or column == "patient"


def test_handle_names_no_path(notebook: Notebook, attacked: Attacked, tmp_path: Path) -> None:
    """A path in a handle is not read: the rows that leave are the catalog's, and so is what is written down."""
    smuggled = tmp_path / "visits.arrow"
    table = pa.table({"cost": [1.0]})
    with pa.OSFile(str(smuggled), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    rows = pa.ipc.open_file(str(attacked.layout.data(attacked.zone) / "visits.arrow")).read_all().num_rows

    reply = notebook.call(data={**VISITS, "path": str(smuggled), "columns_classes": {"cost": "public"}})

    assert reply["report"]["rows"] == rows
    assert attacked.entries("intent", session=notebook.session)[-1]["rows"] == rows


def test_lie_about_the_function(notebook: Notebook, attacked: Attacked) -> None:
    """The ledger knows a function by its bytes, whatever the notebook calls it."""
    function = pickled(b"not what it says")

    notebook.call(
        function=function, name="ray_gpu.examples.statistics", function_digest="0" * 64, function_reviewed=True
    )

    entry = attacked.entries("intent", session=notebook.session)[-1]
    assert entry["function"] == hashlib.sha256(function).hexdigest()
    assert entry["function_reviewed"] is False


def test_renamed_columns(notebook: Notebook, attacked: Attacked) -> None:
    """A table that the notebook made is of the highest class, though its columns are named like cleared ones."""
    table = pa.table({"cost": pa.array(np.arange(9.0))})
    for data in ({"memory": True}, {"memory": True, **VISITS}):
        fd = memory_file(table)
        with pytest.raises(EgressDeniedError):
            notebook.call([fd], data=data)
        os.close(fd)

    refused = attacked.entries("decision", decision="refused", session=notebook.session)[-1]
    assert (refused["dataset"], refused["columns"]) == ("", ["cost"])
    assert "direct-identifier" in refused["classes"]


# -- memory files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(attacked: Attacked) -> Iterator[Notebook]:
    """A notebook whose purpose lets its own tables leave."""
    with Notebook(attacked, NOTEBOOK_TABLES) as opened:
        yield opened


def test_sealed_file(tables: Notebook, attacked: Attacked) -> None:
    """A table in a sealed memory file leaves, where policy lets it, and is written down with the highest class."""
    fd = memory_file(pa.table({"mine": pa.array(np.arange(9.0))}))

    assert tables.call([fd], data={"memory": True})["report"]["rows"] == 9
    entry = attacked.entries("intent", session=tables.session)[-1]
    assert (entry["dataset"], entry["columns"]) == ("", ["mine"])
    assert "direct-identifier" in entry["classes"]
    os.close(fd)


@pytest.mark.parametrize("name", NOT_SEALED)
def test_file_that_can_change(tables: Notebook, name: str) -> None:
    """A memory file that could change between decision and sending is refused."""
    fd = memory_file(pa.table({"mine": pa.array(np.arange(9.0))}), NOT_SEALED[name])

    with pytest.raises(ValueRefusedError):
        tables.call([fd], data={"memory": True})
    os.close(fd)


def test_other_descriptors(tables: Notebook, attacked: Attacked) -> None:
    """A descriptor of a file on disk, or of something that is no file, is refused."""
    files = [os.open(attacked.layout.data(attacked.zone) / "visits.arrow", os.O_RDONLY), *os.pipe()]
    for fd in files:
        with pytest.raises(ValueRefusedError):
            tables.call([fd], data={"memory": True})
        os.close(fd)


def test_hostile_table(tables: Notebook) -> None:
    """A sealed file must hold an Arrow stream without extension types and without an end that is missing."""
    metadata = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": ""}
    field = pa.field("mine", pa.binary(), metadata=metadata)
    pickles = memory_file(pa.table([pa.array([b"x"])], schema=pa.schema([field])))
    cut = memory_file(pa.table({"mine": pa.array(np.arange(9.0))}), NOT_SEALED["no seal"])
    os.ftruncate(cut, os.fstat(cut).st_size // 2)
    fcntl.fcntl(cut, fcntl.F_ADD_SEALS, SEALED)
    for fd in (pickles, cut):
        with pytest.raises(ValueRefusedError):
            tables.call([fd], data={"memory": True})
        os.close(fd)


# -- sessions and caps ----------------------------------------------------------------------------


def test_nobody(attacked: Attacked, notebook: Notebook) -> None:
    """Without a person's login, or a session's secret, there is nothing to be had; with either there is."""
    with Notebook(attacked, None) as nobody:
        for request in (honest(), {"op": "read", "data": VISITS}, {"op": "catalog"}, {"op": "status"}):
            with pytest.raises(SessionClosedError):
                nobody.ask(request)
        with pytest.raises(SessionClosedError):
            nobody.ask({"op": "join", "session": notebook.session, "secret": "0" * 32})
        with attacked.vault("gpu-1") as custodian, pytest.raises(VaultDeniedError):
            nobody.ask({"op": "attach", "token": custodian.token, "purpose": "bypass"})
        with attacked.vault("gateway") as gateway, pytest.raises(VaultDeniedError):
            nobody.ask({"op": "attach", "token": gateway.token, "purpose": "bypass"})
        assert nobody.ask({"op": "join", "session": notebook.session, "secret": notebook.secret})["ok"] is True
        assert nobody.call()["ok"] is True
    assert token(attacked)


def test_session_cap(attacked: Attacked) -> None:
    """Arguments that carry a table piece by piece, on many connections at once, are stopped at the session's cap."""
    piece = encoded(MORE_THAN_SMALL[: SMALL_BYTES // 2])
    sent: list[int] = []

    def leak(connection: Notebook) -> None:
        with contextlib.suppress(EgressDeniedError):
            while sum(sent) <= SESSION_BYTES:
                connection.call(mode="call", data=None, arguments=piece)
                sent.append(len(piece))

    with Notebook(attacked) as leaking, contextlib.ExitStack() as closing:
        others = [closing.enter_context(Notebook(attacked, None)) for _ in range(4)]
        for other in others:
            other.ask({"op": "join", "session": leaking.session, "secret": leaking.secret})
        threads = [threading.Thread(target=leak, args=(other,)) for other in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(EgressDeniedError):
            leaking.call(mode="call", data=None, arguments=piece)
    assert SESSION_BYTES - 2 * len(piece) < sum(sent) <= SESSION_BYTES
    assert attacked.entries("decision", decision="refused", session=leaking.session)


def test_patched_client(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook whose client classes are all replaced by liars is told the same as an honest one."""
    forbidden = {"dataset": "visits", "columns": [*COLUMNS]}
    monkeypatch.setattr(handle.Handle, "document", lambda _: forbidden)
    monkeypatch.setattr(options.FunctionOptions, "document", lambda _: {"columns": ["patient"]})
    packed = functions.PackedFunction
    monkeypatch.setattr(packed, "packed", lambda _: functions.Packed(pickled(b"captured"), []))
    before = len(attacked.entries("intent"))

    with attacked.attach() as session:
        remote = ray_gpu.gpu_remote(session=session)(lambda batch: 0)
        with pytest.raises(EgressDeniedError):
            remote.map_reduce(session.read("visits", columns=["cost"]), sum)
        monkeypatch.setattr(packed, "packed", lambda _: functions.Packed(bytes(1 << 17), []))
        with pytest.raises(errors.FunctionRefusedError):
            ray_gpu.gpu_remote(session=session)(lambda: 0).remote().result()
    assert len(attacked.entries("intent")) == before


# -- the data connection --------------------------------------------------------------------------


def endpoints(attacked: Attacked) -> list[tuple[str, int]]:
    """Return where GPU actors listen for data connections, as anybody on the host can find out."""
    base_port = int(attacked.document["address"].partition(":")[2])
    ranges = [NodePorts.of(base_port, index).endpoints.split("-") for index in range(2)]
    found = []
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        local, _, state = line.split()[1:4]
        address, port = local.split(":")
        if state == LISTENING and any(int(low) <= int(port, 16) <= int(high) for low, high in ranges):
            found.append((socket.inet_ntoa(struct.pack("<I", int(address, 16))), int(port, 16)))
    return found


def knocks(lease: str) -> dict[str, bytes]:
    """Return what somebody without the key can send: well-formed up to what only the key can make."""
    headers = {}
    for kind in (Kind.HELLO, Kind.CONTROL, Kind.CALL):
        slot = Slot(lease=lease, direction=Direction.OUT, kind=kind, call=0, shard=0, attempt=0)
        headers[kind] = header_for(slot, MIN_PADDED_BYTES).encode()
    body = os.urandom(sealed_size(MIN_PADDED_BYTES))
    return {"silence": b"", "garbage": os.urandom(CONTROL_BYTES), "half a header": headers[Kind.HELLO][:30],
            **{f"{kind} without the key": header + body for kind, header in headers.items()}}  # fmt: skip


def heard(endpoint: tuple[str, int], said: bytes, timeout_s: float) -> bytes:
    """Return what an endpoint answers to *said*."""
    with socket.create_connection(endpoint, timeout=timeout_s) as sock:
        sock.sendall(said)
        with contextlib.suppress(TimeoutError, ConnectionError):
            return sock.recv(1 << 16)
    return b""


def test_raw_connections(attacked: Attacked) -> None:
    """Whoever connects to the actors' ports hears nothing and takes nothing over: the running map ends as it should."""

    def slow(batch: Any) -> Any:
        import time

        time.sleep(0.1)
        return batch["cost"] * 2

    with attacked.attach() as session, contextlib.ExitStack() as idle:
        remote = ray_gpu.gpu_remote(session=session, columns=["cost"], shard_bytes=1 << 16, num_gpus=0.5)(slow)
        visits = session.read("visits", columns=["cost"])
        remote.map(visits)  # so that both leases are there
        leases = session.status()["leases"]
        ports = endpoints(attacked)
        result: list[Any] = []
        running = threading.Thread(target=lambda: result.append(remote.map(visits)))
        running.start()
        for endpoint in ports:
            for _ in range(12):
                idle.enter_context(socket.create_connection(endpoint, timeout=5))
            for lease in leases:
                for name, said in knocks(lease["lease"]).items():
                    assert heard(endpoint, said, 0.3) == b"", name
        running.join()
        assert len(ports) >= len(leases) == 2
        assert np.array_equal(result[0], 2 * np.arange(len(visits), dtype=np.float64))
        assert [item["lease"] for item in session.status()["leases"]] == [item["lease"] for item in leases]


def test_every_byte_is_in_the_ledger(attacked: Attacked) -> None:
    """What each keeper received, signed by its custodian, is what the ledger says, but for messages without content."""
    with attacked.attach() as session:
        remote = ray_gpu.gpu_remote(session=session, columns=["cost"])(lambda batch, *_: len(batch))
        remote.map_reduce(session.read("visits", columns=["cost"]), sum)
        remote.map_reduce(session.read("visits", columns=["cost"]), sum, b"arguments")
        ray_gpu.gpu_remote(session=session)(lambda text: text).remote("small").result()

    for entry in attacked.entries("lease-end"):
        if entry["receipt"]:
            receipt = entry["receipt"]["receipt"]
            drawn = sum(item["bytes"] for item in attacked.entries("completion", lease=entry["lease"]))
            contentless = receipt["received_bytes"] - drawn
            messages = 2 + receipt["calls"] + (receipt["ended"] - receipt["started"] + 1) // HEARTBEAT_S + 1
            assert contentless <= messages * CONTROL_BYTES
            assert drawn > 0
    assert any(entry["receipt"] for entry in attacked.entries("lease-end"))
