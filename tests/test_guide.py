"""Every block of Python in the guide and the README runs, as it stands there, against a cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "docs/using.md"])
def test_blocks_run(cluster: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after another, in one namespace."""
    monkeypatch.setenv("RAY_GPU_STATE", str(cluster.state))
    monkeypatch.setenv("RAY_GPU_PROGRESS", "0")
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = [(text[: found.start(1)].count("\n"), found[1]) for found in _BLOCK.finditer(text)]
    variables: dict[str, Any] = {"__name__": "guide"}

    assert blocks
    for line, block in blocks:
        # Lines of a traceback are then the document's.
        exec(compile("\n" * line + block, name, "exec"), variables)
