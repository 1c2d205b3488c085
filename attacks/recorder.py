"""A pytest plugin that writes down what each test case did, one JSON document a line. Loaded by :mod:`attacks.cases`.

The first line says where the product was imported from, so that nobody takes one tree's results for another's.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

#: Enough of a failure to see what it was, and to find a reason in.
_TEXT_CHARACTERS = 16_000
_PACKAGES = ("ray_gpu", "zones", "tests", "testbed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names the file."""
    parser.addoption("--record", help="file to which what each test did is written, one JSON document a line")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to write, where a file was named."""
    if path := config.getoption("--record"):
        config.pluginmanager.register(Recorder(Path(path)), "recorder")


class Recorder:
    """Puts together a test's three phases."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._docs: dict[str, str] = {}
        self._case: dict[str, Any] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Write where things come from, and what will run."""
        for item in session.items:
            text = str(getattr(getattr(item, "function", None), "__doc__", None) or "")
            self._docs[item.nodeid] = " ".join(text.split("\n\n")[0].split())
        self._write(
            {"event": "collected", "ids": [item.nodeid for item in session.items], "origins": _origins()},
        )

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in one phase, and write the case after the last."""
        if report.when == "setup":
            self._case = {"outcome": "passed", "message": "", "text": "", "seconds": 0.0}
        self._case["seconds"] += report.duration
        if report.skipped:
            self._case.update(outcome="skipped", message=_reason(report))
        elif report.failed and self._case["outcome"] == "passed":
            # Only what the test itself says is a failure; what its fixtures do is an error.
            self._case.update(
                outcome="failed" if report.when == "call" else "error",
                message=_message(report),
                text=report.longreprtext[-_TEXT_CHARACTERS:],
            )
        if report.when == "teardown":
            self._write({"event": "case", "id": report.nodeid, "doc": self._docs.get(report.nodeid, ""), **self._case})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write what could not even be collected."""
        if report.failed:
            self._write({"event": "uncollected", "id": report.nodeid, "text": report.longreprtext[-_TEXT_CHARACTERS:]})

    def _write(self, document: dict[str, Any]) -> None:
        self._file.write(json.dumps(document) + "\n")
        self._file.flush()


def _origins() -> dict[str, str]:
    """Return where each package is imported from, by a look that imports nothing."""
    found = {name: importlib.util.find_spec(name) for name in _PACKAGES}
    places = {name: list(spec.submodule_search_locations or ()) for name, spec in found.items() if spec}
    return {name: str(Path(place[0]).resolve()) for name, place in places.items() if place}


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)


def _message(report: pytest.TestReport) -> str:
    """Return the exception with its text: of a failed assertion, all that pytest found out about it."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", "") or report.longreprtext)[:_TEXT_CHARACTERS]
