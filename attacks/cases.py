"""Runs tests in a process of their own and returns what each case did. This module starts processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

#: ``"error"``: its fixtures failed, it could not be collected, or its process ended before it did.
Outcome = Literal["passed", "failed", "error", "skipped"]
_POLL_S = 0.1
#: Of what pytest prints, as much as can say why it ran nothing.
_LAST_WORDS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one test case did."""

    #: ``file::function[parameters]``, or a file that could not be collected.
    id: str
    outcome: Outcome
    #: The failure's text, or why it was skipped.
    message: str = ""
    #: The failure as pytest shows it.
    text: str = ""
    seconds: float = 0.0
    #: The test's sentence.
    doc: str = ""

    @property
    def test(self) -> str:
        """``file::function``."""
        return self.id.partition("[")[0]

    @property
    def file(self) -> str:
        """The test's file."""
        return self.id.partition("::")[0]


def is_of(case: Case, name: str) -> bool:
    """Whether a case is the one that *name* means, or one of its parameters'."""
    return case.id == name or case.test == name


class WrongTreeError(Exception):
    """The tests of one tree would have tested another."""


def run(
    root: Path,
    tests: Sequence[str],
    *,
    timeout_s: float,
    on_case: Callable[[Case], None] = lambda case: None,
    stop: threading.Event | None = None,
) -> list[Case]:
    """Run tests of the tree at *root*, those marked heavy too, and return what each case did.

    Args:
        root: A checkout or a copy of one; the product's processes are its own.
        tests: Files, or ``file::function[parameters]``.
        timeout_s: Longest run; the cases that had no turn are then errors.
        on_case: Called with each case as it ends.
        stop: Ends the run before its time when it is set.

    Raises:
        WrongTreeError: A package is imported from elsewhere.
    """
    stop, deadline = stop or threading.Event(), time.monotonic() + timeout_s
    cases: list[Case] = []
    left = list(tests)
    while left:
        found, awaited, said = _run_once(root, left, deadline, stop, on_case)
        cases += found
        unknown = [name for name in left if not any(_belongs(one, name) for one in awaited)]
        left = [name for name in (*awaited, *unknown) if not any(_settles(case, name) for case in found)]
        if left:
            # A test that hangs takes its process along; what comes after it has another.
            cases.append(Case(id=left.pop(0), outcome="error", message="pytest ended before it did", text=said))
            on_case(cases[-1])
        if left and (stop.is_set() or time.monotonic() > deadline):
            cases += [Case(id=name, outcome="error", message="it had no turn: the time was over") for name in left]
            left = []
    return cases


def _belongs(one: str, name: str) -> bool:
    """Whether the id of a case is one of those that *name*, a file or a test, stands for."""
    return name in (one, one.partition("[")[0], one.partition("::")[0])


def _settles(case: Case, name: str) -> bool:
    """Whether a case says what became of *name*: its own, one of its parameters', or that its file is broken."""
    return is_of(case, name) or case.id == name.partition("::")[0]


def _run_once(
    root: Path, tests: Sequence[str], deadline: float, stop: threading.Event, on_case: Callable[[Case], None]
) -> tuple[list[Case], list[str], str]:
    """Run one pytest; return what was recorded, the ids of all that should have been, and its last words."""
    cases: list[Case] = []
    awaited = list(tests)
    with tempfile.TemporaryDirectory(prefix="rga") as directory:
        record, log = Path(directory) / "record", Path(directory) / "log"
        record.touch()
        process = _start(root, tests, record, log)
        try:
            for document in _documents(record, process, deadline, stop):
                if document["event"] == "collected":
                    _check_origins(document["origins"], root)
                    awaited = document["ids"]
                else:
                    cases.append(_case(document))
                    on_case(cases[-1])
        finally:
            _end(process)
        return cases, awaited, log.read_text("utf-8", "replace")[-_LAST_WORDS:]


def _start(root: Path, tests: Sequence[str], record: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-p", "attacks.recorder", "--record", str(record)]
    # No cache, which runs at one time would share; and every word of a failed assertion, where reasons are looked for.
    command += ["-p", "no:cacheprovider", "-vv", "-m", "heavy or not heavy", *tests]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, cwd=root, env=environment(root), stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def environment(root: Path) -> dict[str, str]:
    """Return the environment in which Python takes this project's packages from *root*."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RAY_GPU_"))}
    return {**kept, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}


def _documents(
    record: Path, process: subprocess.Popen[bytes], deadline: float, stop: threading.Event
) -> Iterator[dict[str, Any]]:
    """Yield what is written down, as it is, until the process has ended or the time is over."""
    with record.open(encoding="utf-8") as file:
        while process.poll() is None and time.monotonic() < deadline and not stop.wait(_POLL_S):
            yield from _lines(file)
        yield from _lines(file)


def _lines(file: IO[str]) -> Iterator[dict[str, Any]]:
    while True:
        place, line = file.tell(), file.readline()
        if not line.endswith("\n"):
            file.seek(place)  # the rest is still to come
            return
        yield json.loads(line)


def _check_origins(origins: dict[str, str], root: Path) -> None:
    # Links in the way to it are resolved on both sides.
    foreign = {name: place for name, place in origins.items() if not Path(place).is_relative_to(root.resolve())}
    if foreign or "ray_gpu" not in origins:
        raise WrongTreeError(f"the tests of {root} would have tested what lies elsewhere: {foreign or 'nothing'}")


def _case(document: dict[str, Any]) -> Case:
    if document["event"] == "uncollected":
        return Case(id=document["id"], outcome="error", message="it cannot be collected", text=document["text"])
    return Case(**{name: value for name, value in document.items() if name != "event"})


def _end(process: subprocess.Popen[bytes]) -> None:
    """End pytest, politely first, so that its fixtures stop what they started; then its process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
