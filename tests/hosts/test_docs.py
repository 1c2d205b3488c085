"""The blocks of docs/testbed.md run as they stand there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

import testbed
from testbed import bed, cluster, disk

BLOCKS = re.findall(
    r"^```python\n(.*?)^```$",
    (Path(__file__).parents[2] / "docs/testbed.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(
    "number",
    [0, pytest.param(1, marks=[pytest.mark.heavy, pytest.mark.timeout(300)]), 2],
    ids=["hosts", "cluster", "disk"],
)
def test_block(can_build: None, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each does what is said beside it, and leaves nothing behind."""
    image = tmp_path / "gpu-1.img"
    names: dict[str, Any] = {**vars(testbed), **vars(bed), **vars(cluster), "disk": disk, "image": image}

    exec(compile(BLOCKS[number], "testbed.md", "exec"), names)

    assert len(BLOCKS) == 3
    assert image.exists() == (number == 2)
    assert os.environ.get("HOME")
