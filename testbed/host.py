"""One host of the test bed: start it, run programs in it, end it. Starts processes; needs root."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from ray_gpu.ports import TABLE
from testbed.init import Plan
from testbed.network import Link
from zones.errors import ClusterError

ROOT = Path(__file__).parents[1]
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Home of root, who every program in a host is unless its caller says otherwise.
HOME = "/root"
_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")
#: A host is there within milliseconds; a busy machine gets several times that.
_STOP_TIMEOUT_S = 10.0


class HostProcess(subprocess.Popen[str]):
    """A program in a host, started by ``nsenter``. Signals go to the program itself; its descriptors are text.

    ``pid`` is that of ``nsenter``, whose end is the program's end too. As a context it waits for the program's end;
    an exception kills it first.
    """

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pipes and wait for the end; kill first if there was an exception."""
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, trace)

    def inner_pid(self) -> int | None:
        """Return the program's process id as the machine counts, or ``None`` before it starts and after it ended."""
        with contextlib.suppress(OSError, IndexError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii")
            return int(children.split()[0])
        return None

    def send_signal(self, sig: int) -> None:
        """Send *sig* to the program."""
        inner = self.inner_pid()
        if inner is None:
            super().send_signal(sig)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(inner, sig)


class Host:
    """A host: a network, host name, processes, files and System V memory of its own.

    Attributes:
        name: Host name.
        link: Its addresses, and those of the router's end.
        pid: Process id of its first process, as the machine counts.
    """

    def __init__(self, plan: Plan, link: Link, *, log: Path) -> None:
        self.name = plan["name"]
        self.link = link
        self.pid = 0
        self._plan = plan
        self._log = log
        self._first: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """IPv4 address."""
        return self.link.address

    @property
    def address6(self) -> str:
        """IPv6 address."""
        return self.link.address6

    def start(self) -> None:
        """Start the first process. :meth:`await_start` waits for it."""
        with self._log.open("ab") as log:
            self._first = subprocess.Popen(
                ["unshare", *_NAMESPACES, "--fork", "--kill-child=KILL", "--", *_init_command()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={"PATH": _SYSTEM_PATH, "LANG": "C.UTF-8"},
                start_new_session=True,  # a Ctrl-C at the terminal is the builder's
            )
        assert self._first.stdin is not None
        self._first.stdin.write(json.dumps(self._plan).encode() + b"\n")
        self._first.stdin.flush()

    def await_start(self) -> None:
        """Return when the host is built.

        Raises:
            ClusterError: It could not be built.
        """
        assert self._first is not None
        assert self._first.stdout is not None
        line = self._first.stdout.readline()
        if not line:
            said = self._log.read_text("utf-8", "replace").strip().splitlines()
            raise self._error(f"could not be built: {said[-1] if said else 'no reason given'}; is this root on Linux?")
        self.pid = int(line)

    def alive(self) -> bool:
        """Whether the host runs."""
        return self._first is not None and self._first.poll() is None

    def stop(self) -> None:
        """End every process of the host, and return when they are gone. Idempotent."""
        first, self._first = self._first, None
        if first is None:
            return
        assert first.stdin is not None
        assert first.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            first.stdin.close()
        try:
            first.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            first.kill()
            first.wait()
        first.stdout.close()

    def kill(self) -> None:
        """End the host as a power cut would: nothing in it gets a warning."""
        if self._first is not None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def environment(self) -> dict[str, str]:
        """Return what a program in the host finds in its environment, unless its caller adds to it."""
        return {
            "PATH": search_path(),
            "HOME": HOME,
            "USER": "root",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def popen(
        self,
        command: Sequence[str | Path],
        *,
        uid: int | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[str] | None = subprocess.DEVNULL,
        stdout: int | IO[str] | None = None,
        stderr: int | IO[str] | None = None,
    ) -> HostProcess:
        """Start a program in the host.

        Args:
            command: Program and arguments, looked for in the host.
            uid: User and group id that it runs under, without other groups; root's by default.
            env: Added to :meth:`environment`.
            stdin: As in ``subprocess``, and so are the others.
            stdout: By default the builder's.
            stderr: By default the builder's.
        """
        identity = [] if uid is None else [f"--setuid={uid}", f"--setgid={uid}"]
        enter = ["nsenter", f"--target={self.pid}", *_NAMESPACES, *identity, "--"]
        # Without nsenter, nobody waits for the program any more.
        enter += ["setpriv", "--pdeathsig=KILL", "--", *map(str, command)]
        return HostProcess(
            enter, env=self.environment() | dict(env or {}), stdin=stdin, stdout=stdout, stderr=stderr, text=True
        )

    def run(
        self,
        command: Sequence[str | Path],
        *,
        uid: int | None = None,
        env: Mapping[str, str] | None = None,
        text: str = "",
        check: bool = True,
        timeout_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the host to its end, with *text* as its standard input; otherwise as :meth:`popen`.

        Raises:
            ClusterError: It ended with another status than 0, and *check* is set; or it took longer than *timeout_s*.
        """
        pipe = subprocess.PIPE
        with self.popen(command, uid=uid, env=env, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            try:
                out, err = process.communicate(text, timeout_s)
            except subprocess.TimeoutExpired:
                raise self._error(f"{command[0]} did not end within {timeout_s:g} s") from None
        if check and process.returncode != 0:
            raise self._error(f"{command[0]} ended with status {process.returncode}: {err.strip()[-500:]}")
        return subprocess.CompletedProcess(list(map(str, command)), process.returncode, out, err)

    def write(self, path: str | Path, text: str, *, mode: int = 0o644, uid: int = 0) -> None:
        """Write a file in the host, and its parent directories where they are missing.

        It is never there with less than its content, or open to more than *mode*.
        """
        script = (
            'set -eu; umask 077; mkdir -p -m 0755 "$(dirname "$1")"; cat >"$1.new"; '
            'chown "$3:$3" "$1.new"; chmod "$2" "$1.new"; mv "$1.new" "$1"'
        )
        self.run(["sh", "-c", script, "sh", path, f"{mode:o}", str(uid)], text=text)

    def read(self, path: str | Path) -> str:
        """Return a file of the host as text."""
        return self.run(["cat", path]).stdout

    def configure_network(self, batch: str) -> None:
        """Carry out lines of ``ip -batch`` in the host's network, with the machine's files."""
        self._in_network(["ip", "-batch", "-"], batch)

    def load_rules(self, ruleset: str) -> None:
        """Load nftables rules into the host's network, in one step."""
        self._in_network(["nft", "--file", "-"], ruleset)

    def flush_rules(self) -> None:
        """Remove the host's firewall, for controls of tests. Its cage's rules stay: they are the cage's network."""
        self.load_rules(f"table inet {TABLE}\ndelete table inet {TABLE}\n")

    def _in_network(self, command: Sequence[str], text: str) -> None:
        done = subprocess.run(
            ["nsenter", f"--target={self.pid}", "--net", "--", *command],
            input=text,
            capture_output=True,
            text=True,
            env={"PATH": _SYSTEM_PATH},
        )
        if done.returncode != 0:
            raise self._error(f"{command[0]} failed: {done.stderr.strip()}")

    def enter_line(self) -> str:
        """Return the command by which root gets a shell in the host."""
        return f"nsenter --target={self.pid} {' '.join(_NAMESPACES)} -- env -i {_shell_environment(self)} bash"

    def _error(self, text: str) -> ClusterError:
        return ClusterError(f"host {self.name}: {text}", node=self.name, reason=text)


def search_path() -> str:
    """Return the PATH of hosts: this Python's programs first."""
    return f"{Path(sys.prefix).resolve() / 'bin'}:{_SYSTEM_PATH}"


def _shell_environment(host: Host) -> str:
    wanted = {**host.environment(), "TERM": '"$TERM"'}
    return " ".join(f"{name}={value}" for name, value in wanted.items())


@functools.cache
def _init_command() -> list[str]:
    """Return the first process's command: Python without site packages, which starts in 10 ms."""
    return [os.path.realpath(sys.executable), "-I", "-S", str(Path(__file__).with_name("init.py"))]
