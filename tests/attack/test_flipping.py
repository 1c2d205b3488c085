"""A sandbox flips bytes in the memory that it shares with its keeper, at full speed, while shards and results pass."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ray_gpu.frames import SealedSocket
from ray_gpu.sandbox import boundary, memory
from ray_gpu.sandbox import profile as profiles
from ray_gpu.wire import recv_message, send_message
from tests.proofs.attacked import below, command
from zones.envelope import LeaseKey
from zones.model import Direction, Kind

KEY, GRANT, LEASE = bytes(range(32)), "5" * 64, "lease-1"
ROOT = Path(__file__).resolve().parents[2]
#: What OpenSSL may use of this processor: all, or neither AVX2 nor AVX-512 nor its wide AES.
PROCESSORS: dict[str, dict[str, str]] = {
    "all of it": {},
    "no wide vectors": {"OPENSSL_ia32cap": ":~0xffffffffffffffff"},
}
#: Prints what OpenSSL uses of the processor, in words of 64 bits; wide vectors and wide AES are in the second.
WORDS = """
from cryptography.hazmat.bindings.openssl.binding import Binding
said = Binding.ffi.string(Binding.lib.OpenSSL_version(9)).decode()
print(said.split()[1].partition("=")[2].replace(":", " "))
"""
#: Cells of eight bytes in a result: a message of several pieces' worth of cipher chunks.
CELLS = 32 << 10
#: Uid of this test's keeper as root, no other process's.
KEEPER_UID = 61990
FIRST, SECOND = 0x1111111111111111, 0x2222222222222222
RESULTS = 60
#: Writes two values over and over into all of the slots, for as long as it lives.
FLIPPER = """
import mmap, sys
import numpy as np
shared = mmap.mmap(int(sys.argv[1]), 0)
start, cells, first, second = (int(text) for text in sys.argv[2:])
view = np.frombuffer(shared, np.uint64, cells, start)
view[:] = first
print("flipping", flush=True)
while True:
    view[:] = second
    view[:] = first
"""


@contextlib.contextmanager
def flipping(fd: int, start: int) -> Iterator[None]:
    """Have another process flip every cell of an area of shared memory."""
    numbers = [str(number) for number in (fd, start, CELLS, FIRST, SECOND)]
    process = subprocess.Popen(
        [sys.executable, "-c", FLIPPER, *numbers],
        pass_fds=[fd],
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == b"flipping\n"
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Lease:
    """A real keeper in a process of its own; custodian, gateway and sandbox are this test's."""

    def __init__(self, processor: dict[str, str], closing: contextlib.ExitStack) -> None:
        self.fd = memory.create()
        closing.callback(os.close, self.fd)
        self.slots = memory.SlotMap(mmap.mmap(self.fd, 0))
        (custodian, inside), (self.sandbox, sandbox_end) = socket.socketpair(), socket.socketpair()
        for sock in (custodian, self.sandbox):
            closing.enter_context(sock)
        fds = (inside.fileno(), sandbox_end.fileno(), self.fd)
        profile = profiles.keeper(
            f"flip-{os.getpid()}", uid=KEEPER_UID if os.geteuid() == 0 else None, memory_bytes=None, keep_fds=fds
        )
        profile = replace(profile, env={**profile.env, **processor})
        with inside, sandbox_end:
            self.process = boundary.launch([sys.executable, "-P", "-m", "ray_gpu.keeper", *map(str, fds)], profile)
        closing.callback(boundary.kill, self.process)
        send_message(self.sandbox, {"op": "ready", "device": "none", "missing": []})
        start = {
            "key": KEY, "grant_digest": GRANT, "lease": LEASE, "node": "gpu-1", "pool": "shared", "degradations": [],
            "not_after": int(time.time()) + 600, "contents": {}, "environment": "", "padding": "fine",
        }  # fmt: skip
        send_message(custodian, start)
        assert recv_message(custodian)[0]["op"] == "ready"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            with listener.accept()[0] as theirs:
                send_message(custodian, {"op": "connection"}, [theirs.fileno()])
        # The keeper itself, below bubblewrap, has the mask: its environment is what it was given.
        keepers = [pid for pid in [self.process.pid, *below(self.process.pid)] if "ray_gpu.keeper" in command(pid)]
        for name, value in processor.items():
            found = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in keepers]
            assert f"{name}={value}".encode() in found[-1]
        self.gateway = SealedSocket(ours, key=LeaseKey(KEY), grant_digest=GRANT, lease=LEASE, outgoing=Direction.OUT)
        closing.callback(self.gateway.close)
        self.gateway.send(self.gateway.slot(Kind.HELLO, call=0), b"")
        assert self.gateway.receive()[0].kind is Kind.HELLO

    def call(self, number: int) -> Any:
        """Send a call as large as a shard, answer it with what lies in the slot, and return what the zone accepts."""
        self.gateway.send(self.gateway.slot(Kind.CALL, call=number, shard=1), bytes(8 * CELLS))
        # Slots that have become free may be told first.
        while (message := recv_message(self.sandbox)[0])["op"] == "free":
            pass
        assert message["op"] == "call"
        send_message(self.sandbox, {"op": "result", "slot": 0, "bytes": 8 * CELLS})
        header, payload = self.gateway.receive()
        assert (header.kind, header.call) == (Kind.RESULT, number)
        return np.frombuffer(payload, np.uint8)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("where", ["result", "shard"])
def test_nothing_forged(processor: str, where: str) -> None:
    """Every result is authentic, and each byte of it is one that the sandbox wrote there; the keeper lives on."""
    out = memory.IN_SLOTS * memory.SLOT_BYTES
    with contextlib.ExitStack() as closing:
        lease = Lease(PROCESSORS[processor], closing)
        start = out if where == "result" else 0
        if where == "shard":
            np.frombuffer(lease.slots.out_view(0)[: 8 * CELLS], np.uint64)[:] = FIRST
        with flipping(lease.fd, start):
            seen = {int(byte) for number in range(1, RESULTS) for byte in np.unique(lease.call(number))}

        assert seen == ({0x11, 0x22} if where == "result" else {0x11})
        assert lease.process.poll() is None


def test_processors() -> None:
    """The mask takes effect: OpenSSL has wide vectors where it may use all, none under the mask, narrow AES in both."""

    def words(processor: str) -> list[int]:
        environment = {**os.environ, **PROCESSORS[processor]}
        run = [sys.executable, "-c", WORDS]
        said = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
        return [int(word, 16) for word in said.split()]

    wide, narrow = words("all of it"), words("no wide vectors")
    avx2, aes_ni = 1 << 5, 1 << 57
    if not wide[1] & avx2:
        pytest.skip("this processor has no wide vectors")

    assert narrow[1] == 0
    assert wide[0] & narrow[0] & aes_ni


@pytest.mark.heavy
def test_control_cipher_in_shared_memory() -> None:
    """A cipher that works in that memory itself does accept, or seal, what nobody wrote, under the same flipping.

    Without wide vectors, that is: OpenSSL's AVX-512 paths happen to read each byte once, and forge nothing in minutes.
    """
    environment = {**os.environ, **PROCESSORS["no wide vectors"], "PYTHONPATH": str(ROOT)}
    code = "from tests.attack.test_flipping import forge; forge()"

    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True, timeout=170)


def forge() -> None:
    """Open and seal in shared memory until a forgery came through; runs for ever where none does."""
    cipher, nonce = AESGCM(bytes(32)), bytes(12)
    plain = np.full(CELLS, FIRST, np.uint64).tobytes()
    sealed = cipher.encrypt(nonce, plain, None)
    fd = memory.create()
    shared = memoryview(mmap.mmap(fd, 0))
    # One cell of the sealed message flips between what it is and something else.
    place = len(plain) - 4096
    true, false = sealed[place : place + 8], bytes(8)
    code = FLIPPER.replace("int(text) for text in sys.argv[2:]", "int(text) for text in sys.argv[2:6]")
    numbers = [fd, place, 1, int.from_bytes(true, "little"), int.from_bytes(false, "little")]
    with subprocess.Popen([sys.executable, "-c", code, *map(str, numbers)], pass_fds=[fd]) as flipper:
        try:
            while True:
                shared[: len(sealed)] = sealed
                with contextlib.suppress(InvalidTag):
                    if cipher.decrypt(nonce, shared[: len(sealed)], None) != plain:
                        return
                cipher.encrypt_into(nonce, plain, None, shared[: len(sealed)])
                with contextlib.suppress(InvalidTag):
                    if cipher.decrypt(nonce, bytes(shared[: len(sealed)]), None) != plain:
                        return
        finally:
            flipper.kill()
