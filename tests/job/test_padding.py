"""What a listener on the network learns of results, errors and prints from their sizes: the bucket, and no more."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from adversary.captured import messages
from ray_gpu import gpu_remote
from testbed.capture import Capture
from zones.model import Kind

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root alone can capture what the network carries")

#: Lengths of texts: each is another size before it is padded.
LENGTHS = range(300, 8000, 350)


@gpu_remote(concurrency=1)
def answer(how: str, length: int) -> str | None:
    """Give back, print or fail with a text of this length."""
    text = "x" * length
    if how == "printed":
        print(text)  # noqa: T201 - prints are what is tested
    if how == "error":
        raise ValueError(text)
    return text if how == "result" else None


def sizes(cluster: Any, path: Path, how: str) -> list[int]:
    """Return the bytes on the wire of the answer to each length, from one connection."""
    with Capture(os.getpid(), path) as capture:
        with cluster.attach() as session:
            for length in LENGTHS:
                with contextlib.suppress(ValueError):
                    answer.options(session=session).remote(how, length).result()
        capture.end()
    assert capture.dropped == 0
    found = [
        [size for header, size in messages(one) if header.kind is Kind.RESULT] for one in capture.streams().values()
    ]
    (carried,) = (some for some in found if some)
    return carried


def test_answers_are_padded(cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Results, prints and errors of many lengths have the same few sizes, which grow with them all the same."""
    found = {how: sizes(cluster, tmp_path / how, how) for how in ("result", "printed", "error")}
    capfd.readouterr()

    for seen in found.values():
        assert len(seen) == len(LENGTHS)
        # Powers of two up to 64 KiB, and what sealing adds to each.
        assert len(set(seen)) <= 6
        # Not all one size: a listener would see that much.
        assert seen == sorted(seen)
        assert seen[0] < seen[-1]
    assert len(set().union(*map(set, found.values()))) <= 7
