"""ray_gpu.environment: one digest for what a sandbox can import, the same as the command prints."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner

from ray_gpu import environment
from ray_gpu.cli.main import cli
from zones.environments import Environment


def test_current() -> None:
    """It has this Python, and each distribution in the version that is imported; another process finds the same."""
    found = environment.current()
    code = "from ray_gpu import environment; print(environment.current().digest)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.python == platform.python_version()
    assert found.packages["pyarrow"] == pa.__version__ == metadata.version("pyarrow")
    assert found.packages["scikit-learn"] == metadata.version("scikit_learn")
    assert {name: found.modules[name] for name in ("sklearn", "PIL", "ray_gpu", "zones", "_pytest")} == {
        "sklearn": "scikit-learn", "PIL": "pillow", "ray_gpu": "ray-gpu", "zones": "ray-gpu", "_pytest": "pytest"
    }  # fmt: skip
    assert done.stdout.strip() == found.digest


def test_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution on a path that only this process has is none of the environment's."""
    (tmp_path / "extra-1.dist-info").mkdir()
    (tmp_path / "extra-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1\n")
    before = environment.current()
    monkeypatch.syspath_prepend(str(tmp_path))

    assert metadata.version("extra") == "1"
    assert environment.current() == before


def test_digest_follows_every_part() -> None:
    """Whatever is another, the digest is; but for the order. A document gives the environment again."""
    base = Environment(
        python="3.11.7", platform="linux-x86_64", packages={"a": "1", "b": "2"}, modules={"a": "a", "b_": "b"}
    )
    others = [
        replace(base, python="3.11.8"),
        replace(base, platform="linux-aarch64"),
        replace(base, packages={"a": "1", "b": "2.0"}),
        replace(base, packages={"a": "1"}),
        replace(base, packages={"a": "1", "b": "2", "c": "3"}),
        replace(base, modules={"a": "a", "b_": "a"}),
        replace(base, files="0" * 64),
    ]

    assert len({base.digest, *(other.digest for other in others)}) == 8
    assert replace(base, packages={"b": "2", "a": "1"}).digest == base.digest
    assert Environment.parse(json.loads(json.dumps(base.document()))) == base


@pytest.mark.parametrize(
    "change", [{"python": 3}, {"packages": []}, {"packages": {"a": 1}}, {"more": ""}, {"modules": None}]
)
def test_no_document(change: dict[str, Any]) -> None:
    """What is no document of an environment is refused."""
    with pytest.raises(ValueError, match="an environment's"):
        Environment.parse({**environment.current().document(), **change})


def test_command() -> None:
    """`ray-gpu env` prints the digest and what it is over."""
    found = environment.current()
    text, document = (CliRunner().invoke(cli, ["env", *options]) for options in ([], ["--json"]))

    assert text.output.startswith(f"{found.digest}  Python {found.python}")
    assert f"  pyarrow {pa.__version__}\n" in text.output
    assert Environment.parse(json.loads(document.output)) == found
