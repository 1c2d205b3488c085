"""Starts a rogue job (rogue_driver.py) where an attacker sits, and gives it commands."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROGUE = Path(__file__).with_name("rogue_driver.py")
#: Every way that Ray offers to run code on a node of one's choice.
VEHICLES = ("task", "function_table", "ray_call", "pip")
#: Enters the cage of a Ray node of this host, and becomes the program given: with the cage's uid, namespaces and
#: environment, as whoever has taken it over. Where Ray has no cage, the same leads to no other place.
ENTER = """
import os, pathlib, sys, time
address, own, *program = sys.argv[1:]
def raylet():
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\\0")
            wanted = (any(word.encode() in part for part in command) for word in (address, own))
            if command[0].endswith(b"/raylet") and all(wanted):
                return process
        except OSError:
            pass
deadline = time.monotonic() + 60
while (process := raylet()) is None:
    if time.monotonic() > deadline:
        sys.exit("no raylet here")
    time.sleep(0.1)
environment = dict(
    item.split("=", 1) for item in (process / "environ").read_text("utf-8", "replace").split("\\0") if "=" in item
)
uid = str(process.stat().st_uid)
enter = ["nsenter", f"--target={process.name}", "--mount", "--pid", "--ipc", "--net"]
enter += ["--", "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
python = os.path.join(os.path.realpath(sys.prefix), "bin/python")
os.execvpe("nsenter", [*enter, python, *program, address, own], {"PATH": os.environ["PATH"], **environment})
"""


class RogueJob:
    """A rogue job that runs. Use it as a context manager.

    Args:
        start: Starts a program with three pipes of text, where the attacker is.
        address: ``host:port`` of the GCS.
        own: Address of the node that counts as compromised.
    """

    def __init__(self, start: Any, address: str, own: str) -> None:
        program = ["-c", ROGUE.read_text(encoding="utf-8")]
        self._process: subprocess.Popen[str] = start(["python", "-c", ENTER, address, own, *program])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def vehicle(self, name: str, node: str, targets: dict[str, Any]) -> dict[str, Any]:
        """Have the probe run on a node, and return what it reports."""
        report: dict[str, Any] = self._command(op="vehicle", name=name, node=node, targets=targets)
        return report

    def ask(self, node: str, connection: int, **request: Any) -> dict[str, Any]:
        """Speak to a node's custodian from an actor there, and return its answer."""
        answer: dict[str, Any] = self._command(op="ask", node=node, connection=connection, request=request)
        return answer

    def _command(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(command)}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if match := re.match("answer: (.*)", line):
                answer = json.loads(match[1])
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["ok"]
        assert self._process.stderr is not None
        raise RuntimeError(self._process.stderr.read()[-3000:])


def masked(needles: dict[str, str]) -> dict[str, tuple[str, int, str]]:
    """Return what to look for in memory, such that whoever looks never has it: it would be found where it passed.

    That is its first half, reversed; its length in bytes; and its SHA-256.
    """
    return {
        name: (text[: len(text) // 2][::-1], len(text), hashlib.sha256(text.encode("ascii")).hexdigest())
        for name, text in needles.items()
    }


def probe_code() -> str:
    """Return what the rogue has run on nodes, for whoever looks as root."""
    constant = next(
        node.value
        for node in ast.parse(ROGUE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROBE"
    )
    return str(ast.literal_eval(constant))
