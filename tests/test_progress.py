"""The progress line: quiet for short jobs, one line for long ones, and it ends at 100 %."""

from __future__ import annotations

import io
from typing import Any

import pytest

from ray_gpu import progress


class Terminal(io.StringIO):
    """A stream on which a carriage return goes back over the line."""

    def isatty(self) -> bool:
        """Say that this is a terminal."""
        return True

    def screen(self) -> list[str]:
        """Return what a person sees: lines, each as it was last written over."""
        lines = []
        for line in self.getvalue().split("\n"):
            seen = ""
            for text in line.split("\r"):
                seen = text + seen[len(text) :]
            lines.append(seen.rstrip())
        return lines


def _event(rows: int, of: int = 100, size: int = 0) -> dict[str, Any]:
    return {"event": "progress", "rows": rows, "of": of, "bytes": size}


@pytest.fixture
def long_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count every job as a long one."""
    monkeypatch.setattr(progress, "QUIET_S", 0.0)


def test_short_job_is_quiet() -> None:
    """A job that is over at once writes nothing."""
    stream = Terminal()
    line = progress.Progress("score", stream)
    line.update(_event(100))
    line.end()

    assert stream.getvalue() == ""


@pytest.mark.usefixtures("long_job")
@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "log"])
def test_last_line_is_100_percent(stream: io.StringIO) -> None:
    """The line ends at 100 % with the rows, whatever updates were left out on the way."""
    line = progress.Progress("score", stream)
    for rows in range(0, 1001, 10):
        line.update(_event(rows, 1000, rows * 1000))
    line.end()

    assert stream.getvalue().count("\n") == 1
    assert "100%  1,000 of 1,000 rows" in stream.getvalue()
    assert stream.getvalue().endswith("MB/s\n")


@pytest.mark.usefixtures("long_job")
def test_terminal_shows_one_line() -> None:
    """A terminal shows the line while it grows, written over itself, and short enough for 80 columns."""
    stream = Terminal()
    line = progress.Progress("a_function_with_a_very_long_name", stream)
    line.update(_event(1, 1_250_000))
    during = stream.screen()
    line.update(_event(1_250_000, 1_250_000))
    line.end()

    assert len(during) == 1
    assert "  0%" in during[0]
    assert len(stream.screen()) == 2
    assert "100%" in stream.screen()[0]
    assert len(stream.screen()[0]) <= 80 - len("9,999") + len("0")


@pytest.mark.usefixtures("long_job")
def test_log_gets_the_finished_line_alone() -> None:
    """A file keeps all it is given, so it is given the end only."""
    stream = io.StringIO()
    line = progress.Progress("score", stream)
    line.update(_event(50))

    assert stream.getvalue() == ""


@pytest.mark.usefixtures("long_job")
def test_no_rows_are_all_rows() -> None:
    """A job without rows is done."""
    stream = io.StringIO()
    line = progress.Progress("score", stream)
    line.update(_event(0, 0))
    line.end()

    assert "100%  0 of 0 rows" in stream.getvalue()


@pytest.mark.usefixtures("long_job")
def test_lost_node_is_said() -> None:
    """A lost node gets a line of its own, above the progress line."""
    stream = Terminal()
    line = progress.Progress("score", stream)
    line.update(_event(50))
    line.update({"event": "lost", "node": "gpu-2", "reason": "the GPU actor died"})
    line.update(_event(100))
    line.end()

    first, second, _ = stream.screen()
    assert first == "score: lost node gpu-2 (the GPU actor died); its shards go to another lease"
    assert "100%" in second


@pytest.mark.usefixtures("long_job")
def test_clear_makes_room_for_prints() -> None:
    """What the function prints does not run into the line."""
    stream = Terminal()
    line = progress.Progress("score", stream)
    line.update(_event(50))
    line.clear()
    stream.write("hello\n")
    line.end()

    assert stream.screen()[0] == "hello"


@pytest.mark.usefixtures("long_job")
def test_other_events_are_ignored() -> None:
    """Events that a newer gateway may send change nothing."""
    stream = Terminal()
    progress.Progress("score", stream).update({"event": "leases"})

    assert stream.getvalue() == ""


@pytest.mark.parametrize(("value", "wanted"), [("0", False), ("off", False), ("no", False), ("1", True), (None, True)])
def test_environment_turns_it_off(monkeypatch: pytest.MonkeyPatch, value: str | None, wanted: bool) -> None:
    """RAY_GPU_PROGRESS=0 turns the line off."""
    monkeypatch.delenv("RAY_GPU_PROGRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_GPU_PROGRESS", value)

    assert progress.wanted() is wanted
