"""P2: what user code cannot do in the sandbox that it reaches through ``@gpu_remote``, and can anywhere else."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ray_gpu
from ray_gpu import raylet
from tests.proofs.attacked import Attacked, all_powerful

#: Attempts that need no privilege outside.
ANYBODY = ["write below /tmp", "write the caller's directory", "tcp", "udp", "unix socket", "gateway's socket",
           "custodian's socket", "abstract socket", "read /etc/passwd"]  # fmt: skip
#: Attempts that root alone can make outside.
ROOT = ["write /", "write /usr", "open core_pattern", "custodian's memory", "custodian's environment",
        "keeper's memory", "keeper's environment", "launcher's environment"]  # fmt: skip


def escape(target: dict[str, Any]) -> dict[str, str]:
    """Try everything; return ``"done"`` or what stopped it, for each attempt."""
    import socket
    from pathlib import Path

    def write(directory: str) -> None:
        Path(directory, target["name"]).write_text("escaped", encoding="ascii")

    def send(family: int, kind: int, address: Any) -> None:
        with socket.socket(family, kind) as sock:
            sock.settimeout(2)
            sock.connect(address)
            sock.send(b"escaped")

    def memory(pids: list[int]) -> None:
        pid = pids[0]
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
        start = int(next(line for line in lines if " rw-p " in line).split("-")[0], 16)
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
            file.seek(start)
            assert len(file.read(64)) == 64

    def environment(pids: list[int]) -> None:
        if not Path(f"/proc/{pids[0]}/environ").read_bytes().strip(b"\0"):
            raise PermissionError("it is empty")

    attempts: dict[str, Callable[[], object]] = {
        "write below /tmp": lambda: write(target["below_tmp"]),
        "write the caller's directory": lambda: write(target["directory"]),
        "write /": lambda: write("/"),
        "write /usr": lambda: write("/usr"),
        "tcp": lambda: send(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", target["tcp"])),
        "udp": lambda: send(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", target["udp"])),
        "unix socket": lambda: send(socket.AF_UNIX, socket.SOCK_STREAM, target["unix"]),
        "gateway's socket": lambda: send(socket.AF_UNIX, socket.SOCK_STREAM, target["gateway"]),
        "custodian's socket": lambda: send(socket.AF_UNIX, socket.SOCK_STREAM, target["custodian_socket"]),
        "abstract socket": lambda: send(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + target["name"]),
        "read /etc/passwd": lambda: Path("/etc/passwd").read_bytes(),
        "open core_pattern": lambda: os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY)),
        "custodian's memory": lambda: memory(target["custodian"]),
        "custodian's environment": lambda: environment(target["custodian"]),
        "keeper's memory": lambda: memory(target["keeper"]),
        "keeper's environment": lambda: environment(target["keeper"]),
        "launcher's environment": lambda: environment([os.getppid()]),
        # The two that may succeed: its own /tmp is in memory, and the host sees nothing of it.
        "write /tmp": lambda: write("/tmp"),
        "write the working directory": lambda: write("."),
    }
    outcomes = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            outcomes[name] = "done"
        except BaseException as error:  # noqa: BLE001 - every failure is an outcome
            outcomes[name] = f"refused: {error!r}"
    return outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class Battery:
    """What became of the attempts, inside the sandbox and outside, and what the host saw of each run."""

    inside: dict[str, str]
    outside: dict[str, str]
    files_inside: list[Path]
    files_outside: list[Path]
    connections_inside: int
    connections_outside: int


class Witness:
    """Where attempts lead: sockets that count who came, and files that somebody wrote."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.places = [Path(place) for place in ("/", "/usr", "/tmp")] + [directory, Path.cwd()]
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix, self.abstract = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
        self.unix.bind(str(directory / "unix"))
        (directory / "unix").chmod(0o666)
        self.abstract.bind(f"\0{name}")
        self.sockets = [self.tcp, self.udp, self.unix, self.abstract]
        for sock in self.sockets:
            sock.setblocking(False)
        self.unix.listen()
        self.abstract.listen()

    def connections(self) -> int:
        """Return how many sockets heard something since the last time."""
        return sum(map(self._heard, self.sockets))

    def _heard(self, sock: socket.socket) -> bool:
        with contextlib.suppress(BlockingIOError):
            if sock is self.udp:
                return sock.recv(100) == b"escaped"
            with sock.accept()[0] as peer:
                return peer.recv(100) == b"escaped"
        return False

    def files(self) -> list[Path]:
        """Return what was written since the last time, and remove it."""
        found = [path for place in self.places if (path := place / self.name).exists()]
        for path in found:
            path.unlink()
        return found


@pytest.fixture(scope="module")
def battery(attacked: Attacked) -> Iterator[Battery]:
    """Run the same function in a sandbox and here."""
    with contextlib.ExitStack() as stack:
        below, here = (stack.enter_context(tempfile.TemporaryDirectory(dir=place)) for place in ("/tmp", "/var/tmp"))
        stack.enter_context(contextlib.chdir(here))
        witness = Witness(Path(below), f"escaped-{attacked.mark}")
        for sock in witness.sockets:
            stack.enter_context(sock)
        session = stack.enter_context(attacked.attach())
        sandboxed = ray_gpu.gpu_remote(session=session)(escape)
        try_all: Callable[..., Any] = lambda target: sandboxed.remote(target).result()  # noqa: E731 - one expression
        target = {"name": witness.name, "below_tmp": below, "directory": here, "unix": f"{below}/unix",
                  "tcp": witness.tcp.getsockname()[1], "udp": witness.udp.getsockname()[1],
                  "gateway": str(attacked.layout.gateway_socket(attacked.zone)), **_somewhere(attacked)}  # fmt: skip
        try_all(target)  # so that there is a lease, and a keeper
        witness.connections()
        target |= _lease(attacked, session)
        inside, files, connections = try_all(target), witness.files(), witness.connections()
        outside = escape(target)
        yield Battery(inside=inside, files_inside=files, connections_inside=connections, outside=outside,
                      files_outside=witness.files(), connections_outside=witness.connections())  # fmt: skip


def _somewhere(attacked: Attacked) -> dict[str, Any]:
    pid = attacked.custodian("gpu-1")
    return {"custodian": [pid], "keeper": [pid], "custodian_socket": ""}


def _lease(attacked: Attacked, session: ray_gpu.Session) -> dict[str, Any]:
    """Return the processes and the socket around the one lease of *session*."""
    (lease,) = session.status()["leases"]
    node = lease["node"]
    return {
        "custodian": [attacked.custodian(node)],
        "keeper": attacked.leases(node, "ray_gpu.keeper")[-1:],
        "custodian_socket": str(attacked.layout.custodian_dir(node) / raylet.CUSTODIAN_SOCKET),
    }


@pytest.mark.parametrize("attempt", [*ANYBODY, *ROOT])
def test_refused(battery: Battery, attempt: str) -> None:
    """Nothing works from inside the sandbox."""
    assert battery.inside[attempt].startswith("refused")


@pytest.mark.parametrize("attempt", [*ANYBODY, *ROOT])
def test_works_outside(battery: Battery, attempt: str) -> None:
    """The very same function, called here, does all of it."""
    if attempt in ROOT and not all_powerful():
        pytest.skip("needs root with all capabilities: nobody else can do this outside either")
    assert battery.outside[attempt] == "done"


def test_nothing_reached_the_host(battery: Battery) -> None:
    """What the sandbox wrote is nowhere and no socket heard of it; what was written outside is there and was heard."""
    assert battery.files_inside == []
    assert battery.connections_inside == 0
    assert len(battery.files_outside) >= 3
    assert battery.connections_outside == 4
