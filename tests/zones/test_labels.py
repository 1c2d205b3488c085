"""zones.labels: every byte that leaves is classified."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from zones.config import load_zone
from zones.errors import UnknownNameError
from zones.labels import classify, labels

CLINIC = load_zone(Path(__file__).parents[2] / "policies", "clinic")
CAP = 65536
SESSION_CAP = 4194304


@pytest.mark.parametrize(
    ("dataset", "columns", "sizes", "classes"),
    [
        ("randhie", ["mdvis", "lpi"], (10, 10, 0), {"confidential", "internal"}),
        ("randhie", ["lpi"], (10, 10, 0), {"internal"}),
        ("randhie", ["record_number"], (10, 10, 0), {"direct-identifier", "internal"}),
        ("", None, (10, 10, 0), {"internal"}),
        ("", ["age"], (10, 10, 0), {"direct-identifier", "internal"}),
        ("", ["<arguments>"], (10, 10, 0), {"direct-identifier", "internal"}),
        ("", None, (CAP, CAP, 0), {"internal"}),
        ("", None, (CAP + 1, 0, 0), {"direct-identifier"}),
        ("", None, (0, CAP + 1, 0), {"direct-identifier"}),
        ("", None, (10, 10, SESSION_CAP - 20), {"internal"}),
        ("", None, (10, 10, SESSION_CAP - 19), {"direct-identifier"}),
        ("randhie", ["lpi"], (0, CAP + 1, 0), {"internal", "direct-identifier"}),
    ],
    ids=[
        "columns",
        "low column",
        "identifier",
        "arguments alone",
        "own table",
        "own table with a clever name",
        "at the cap",
        "function over the cap",
        "arguments over the cap",
        "at the session's cap",
        "over the session's cap",
        "data set and large arguments",
    ],
)
def test_classes(dataset: str, columns: Collection[str] | None, sizes: tuple[int, int, int], classes: set[str]) -> None:
    """A call has the classes of its columns, and that of its function and arguments."""
    function_bytes, argument_bytes, session_bytes = sizes

    assert (
        classify(
            CLINIC,
            dataset=dataset,
            columns=columns,
            function_bytes=function_bytes,
            argument_bytes=argument_bytes,
            session_bytes=session_bytes,
        )
        == classes
    )


def test_no_small_bytes() -> None:
    """Where zone.yaml says nothing of small bytes, function and arguments have the highest class."""
    zone = replace(CLINIC, small_bytes=None)

    assert classify(zone, dataset="", columns=None, function_bytes=1, argument_bytes=0, session_bytes=0) == {
        "direct-identifier"
    }


@pytest.mark.parametrize(
    ("dataset", "columns", "kind", "near"),
    [("randhi", ["mdvis"], "dataset", "randhie"), ("randhie", ["mdvsi"], "column", "mdvis")],
)
def test_unknown_name(dataset: str, columns: list[str], kind: str, near: str) -> None:
    """An unknown data set or column is refused with the nearest name."""
    with pytest.raises(UnknownNameError, match=f"did you mean '{near}'") as caught:
        labels(CLINIC, dataset, columns)

    assert caught.value.kind == kind


def test_negative_size() -> None:
    """A size below zero is the caller's bug: it could hide bytes from the session's cap."""
    with pytest.raises(ValueError, match="0 bytes"):
        classify(CLINIC, dataset="", columns=None, function_bytes=10, argument_bytes=10, session_bytes=-1)
