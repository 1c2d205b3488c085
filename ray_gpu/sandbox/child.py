"""The sandbox's only program: runs the user's code on shards that its keeper puts into shared memory.

This module does I/O on inherited descriptors alone: one Unix socket to the keeper and one
shared memory file. It has no key, no network and no credentials, and everything it says is
untrusted input to the keeper.

Protocol, in order, one message at a time (msgpack, see ``ray_gpu.wire``):

=================================================  =============================================
keeper to sandbox                                  sandbox to keeper
=================================================  =============================================
``function``: slot, bytes, id                      ``done``
``arguments``: slot, bytes, id, function, room     ``done``
``run``: slot, bytes, arguments, shard             ``result``: out slot, bytes
``rerun``: slot, bytes, arguments, shard           ``result``: out slot, bytes
``call``: slot, bytes, function                    ``result``: out slot, bytes
``free``                                           (nothing)
=================================================  =============================================

With ``room``, bytes, the shards of a call stay open as far as all that do fit; those of calls that were used longest
ago make room for them, and for whatever a function needs. ``rerun`` names one by its number, and the call that brought
it by the eight bytes in its slot. Any message to the sandbox may also carry ``free``: out slots
whose results the keeper has taken.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import io
import mmap
import os
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import ray_gpu
from ray_gpu.answers import MAX_TEXT_BYTES, write_outcome
from ray_gpu.sandbox.functions import VALUE, decorator, load
from ray_gpu.sandbox.harden import harden_self
from ray_gpu.sandbox.memory import OUT_SLOTS, SlotMap
from ray_gpu.sandbox.open_shards import OpenShards
from ray_gpu.sandbox.raised import describe
from ray_gpu.wire import Inbox, PeerClosedError, send_message
from zones.errors import ResultTooLargeError, ValueRefusedError


class _Libraries:
    """What works on data. Imported once this process is hardened, and bound once: NumPy and Arrow start threads."""

    def __init__(self) -> None:
        import cloudpickle  # noqa: PLC0415 - after hardening; only the sandbox ever unpickles

        from ray_gpu import arrays  # noqa: PLC0415 - after hardening
        from zones import ipc, values  # noqa: PLC0415 - after hardening

        if importlib.util.find_spec("hvac") is None:
            # Modules of the user's own may well write it above a function that they are sent for.
            vars(ray_gpu)["gpu_remote"] = decorator
        self.unpickle = cloudpickle.loads
        self.batch, self.to_host, self.device = arrays.Batch.of_shard, arrays.to_host, arrays.device
        self.read_ipc = ipc.read_ipc
        self.decode, self.encode_into = values.decode, values.encode_into


class Sandbox:
    """Runs one message after another until the keeper closes the socket."""

    def __init__(self, sock: socket.socket, memory: SlotMap, output_fd: int, libraries: _Libraries) -> None:
        self._pid = os.getpid()
        self._sock = sock
        self._inbox = Inbox(sock)
        self._memory = memory
        self._output_fd = output_fd
        self._functions: dict[int, Callable[..., Any]] = {}
        #: Values that were broadcast, by the digest that arguments name them with.
        self._values: dict[str, Any] = {}
        self._arguments: dict[int, tuple[Callable[..., Any], list[Any], dict[str, Any]]] = {}
        #: Bytes that shards which stay open may take, for each arguments.
        self._room: dict[int, int] = {}
        #: Shards that stay open; bytes that the room for them may be.
        self._open, self._room_bytes = OpenShards(), 0
        self._load_errors: dict[int, BaseException] = {}
        self._free_out = deque(range(OUT_SLOTS))
        self._libraries = libraries
        self._waiting: deque[dict[str, Any]] = deque()

    def serve(self) -> None:
        """Answer messages until the keeper is gone."""
        while True:
            message = self._waiting.popleft() if self._waiting else self._receive()
            if message is None:
                return
            self._free_out.extend(message.pop("free", ()))
            getattr(self, f"_on_{message['op']}")(message)

    def _receive(self) -> dict[str, Any] | None:
        try:
            message, _ = self._inbox.receive()
        except (PeerClosedError, OSError):
            return None
        return message

    def _payload(self, message: dict[str, Any]) -> memoryview:
        return self._memory.payload(message["slot"], message["bytes"])

    def _on_free(self, message: dict[str, Any]) -> None:
        """Do nothing: the slots that any message frees are taken from it first."""

    def _on_function(self, message: dict[str, Any]) -> None:
        sent = bytes(self._payload(message))
        try:
            if sent.startswith(VALUE):
                # Bytes cannot be written to, and so neither can the arrays in them, which many calls get.
                encoded = memoryview(sent)[len(VALUE) :]
                digest = hashlib.sha256(encoded).hexdigest()
                self._values[digest] = self._libraries.decode(encoded, zero_copy=True)
            else:
                self._functions[message["id"]] = load(sent, self._libraries.unpickle)
        except BaseException as error:  # noqa: BLE001 - user code; raised again by the call
            self._load_errors[message["id"]] = error
        send_message(self._sock, {"op": "done"})

    def _on_arguments(self, message: dict[str, Any]) -> None:
        identifier = message["id"]
        self._room = {key: room for key, room in self._room.items() if key >= identifier - 8}
        self._room[identifier] = message.get("room", 0)
        try:
            args, kwargs = self._decode_arguments(message, copy=True)
            self._arguments[identifier] = (self._function(message["function"]), args, kwargs)
        except BaseException as error:  # noqa: BLE001 - raised again by the call
            self._load_errors[-identifier] = error
        for old in [key for key in self._arguments if key < identifier - 8]:
            del self._arguments[old]
        send_message(self._sock, {"op": "done"})

    def _function(self, identifier: int) -> Callable[..., Any]:
        if identifier in self._load_errors:
            raise self._load_errors[identifier]
        return self._functions[identifier]

    def _decode_arguments(self, message: dict[str, Any], *, copy: bool) -> tuple[list[Any], dict[str, Any]]:
        payload: Any = self._payload(message)
        args, kwargs, *named = self._libraries.decode(bytes(payload) if copy else payload)
        args, kwargs = list(args), dict(kwargs)
        for where, digest in (named[0] if named else {}).items():
            if isinstance(where, int):
                args[where] = self._values[digest]
            else:
                kwargs[where] = self._values[digest]
        return args, kwargs

    def _on_run(self, message: dict[str, Any]) -> None:
        payload = self._payload(message)
        self._run(message["arguments"], payload, kept=self._keep(message, payload))

    def _on_rerun(self, message: dict[str, Any]) -> None:
        brought_by = int.from_bytes(self._payload(message), "big")
        payload = self._open.get(brought_by, message["shard"])
        if payload is None:
            slot = self._out_slot()
            size = self._write(slot, {"status": "absent", "printed": ""}, None)
            send_message(self._sock, {"op": "result", "slot": slot, "bytes": size})
        else:
            self._run(message["arguments"], payload, kept=True)

    def _keep(self, message: dict[str, Any], payload: memoryview) -> bool:
        """Copy a shard to this process's own memory if it shall stay open and there is room; tell whether it is."""
        room = self._room.get(message["arguments"], 0)
        if not room:
            return False
        self._room_bytes = max(self._room_bytes, room)
        return self._open.keep(message["arguments"], message["shard"], payload, room=room)

    def _run(self, arguments: int, payload: memoryview, *, kept: bool) -> None:
        libraries = self._libraries

        def work() -> Any:
            if -arguments in self._load_errors:
                raise self._load_errors[-arguments]
            function, args, kwargs = self._arguments[arguments]
            table = libraries.read_ipc(payload, trusted=True)
            return function(libraries.batch(table), *args, **kwargs)

        self._answer(work, kept=kept)

    def _on_call(self, message: dict[str, Any]) -> None:
        def work() -> Any:
            args, kwargs = self._decode_arguments(message, copy=False)
            return self._function(message["function"])(*args, **kwargs)

        self._answer(work)

    def _answer(self, work: Callable[[], Any], *, kept: bool = False) -> None:
        """Run *work*; write its value or its error, and what it printed, into an out slot."""
        self._open.relieve(self._room_bytes)
        try:
            value = self._libraries.to_host(work())
            outcome: dict[str, Any] = {"status": "ok", "kept": True} if kept else {"status": "ok"}
        except BaseException as error:  # noqa: BLE001 - user code may raise anything; it is the answer
            value, outcome = None, describe(error)
            if isinstance(error, MemoryError):
                # A further call sends again what it needs.
                self._open.clear()
        if os.getpid() != self._pid:
            os._exit(0)  # The function forked and its child returned too; one answer is enough.
        outcome["printed"] = self._take_printed()
        slot = self._out_slot()
        send_message(self._sock, {"op": "result", "slot": slot, "bytes": self._write(slot, outcome, value)})

    def _write(self, slot: int, outcome: dict[str, Any], value: Any) -> int:
        view = self._memory.out_view(slot)
        try:
            return write_outcome(view, outcome, value, self._libraries.encode_into)
        except (ValueRefusedError, ResultTooLargeError) as error:
            refused = {
                "status": "refused",
                "error": type(error).__name__,
                "message": error.message,
                "fields": error.fields,
                "printed": outcome["printed"],
            }
            return write_outcome(view, refused, None, self._libraries.encode_into)
        except Exception as error:  # noqa: BLE001 - objects of the user's own may raise anything while they are read
            failed = describe(error) | {"printed": outcome["printed"]}
            return write_outcome(view, failed, None, self._libraries.encode_into)

    def _out_slot(self) -> int:
        while not self._free_out:
            message = self._receive()
            if message is None:
                raise SystemExit(0)
            self._free_out.extend(message.pop("free", ()))
            if message["op"] != "free":
                self._waiting.append(message)
        return self._free_out.popleft()

    def _take_printed(self) -> str:
        """Return what the function wrote to standard output and error, and forget it."""
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:  # noqa: BLE001 - the function may have put anything there
                pass
        if getattr(sys.stdout, "closed", True) or getattr(sys.stderr, "closed", True):
            # The function closed or replaced them; the next one may print all the same.
            _open_streams()
        size = os.fstat(self._output_fd).st_size
        if not size:
            return ""
        text = os.pread(self._output_fd, min(size, MAX_TEXT_BYTES), 0).decode("utf-8", "replace")
        os.ftruncate(self._output_fd, 0)
        os.lseek(self._output_fd, 0, os.SEEK_SET)
        return text if size <= MAX_TEXT_BYTES else f"{text}\n[cut: {size} bytes printed, {MAX_TEXT_BYTES} kept]\n"


def _capture_output() -> int:
    """Point descriptors 1 and 2 at a private memory file, so that prints of C code are kept too."""
    fd = os.memfd_create("printed", os.MFD_CLOEXEC)
    for standard in (1, 2):
        os.dup2(fd, standard)
    _open_streams()
    return fd


def _open_streams() -> None:
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True, errors="backslashreplace")
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True, errors="backslashreplace")


def main(argv: list[str]) -> None:
    """Harden this process, then serve. ``argv``: socket descriptor, memory descriptor."""
    sock_fd, memory_fd = int(argv[0]), int(argv[1])
    memory = SlotMap(mmap.mmap(memory_fd, 0))
    os.close(memory_fd)
    missing = harden_self(kind="sandbox", keep_fds=(sock_fd,))
    output_fd = _capture_output()
    libraries = _Libraries()
    gc.freeze()
    sock = socket.socket(fileno=sock_fd)
    send_message(sock, {"op": "ready", "device": libraries.device(), "missing": list(missing)})
    try:
        Sandbox(sock, memory, output_fd, libraries).serve()
    finally:
        # Threads that the function left behind would keep this process, and with it the call, for ever.
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
