"""ray_gpu.environment: one digest for what a sandbox can import, the same as the command prints."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner

from ray_gpu import environment
from ray_gpu.cli.main import cli
from ray_gpu.environment import Environment


def test_current() -> None:
    """It has this Python, and each distribution in the version that is imported; another process finds the same."""
    found = environment.current()
    code = "from ray_gpu import environment; print(environment.current().digest)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.python == platform.python_version()
    assert found.packages["pyarrow"] == pa.__version__ == metadata.version("pyarrow")
    assert found.packages["scikit-learn"] == metadata.version("scikit_learn")
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
    """Another Python, another version, one distribution more or less: another digest. The order says nothing."""
    base = Environment(python="3.11.7", packages={"a": "1", "b": "2"})
    others = [
        Environment(python="3.11.8", packages=base.packages),
        Environment(python="3.11.7", packages={"a": "1", "b": "2.0"}),
        Environment(python="3.11.7", packages={"a": "1"}),
        Environment(python="3.11.7", packages={"a": "1", "b": "2", "c": "3"}),
    ]

    assert len({base.digest, *(other.digest for other in others)}) == 5
    assert Environment(python="3.11.7", packages={"b": "2", "a": "1"}).digest == base.digest


def test_command() -> None:
    """`ray-gpu env` prints the digest and what it is over."""
    found = environment.current()
    text, document = (CliRunner().invoke(cli, ["env", *options]) for options in ([], ["--json"]))

    assert text.output.startswith(f"{found.digest}  Python {found.python}")
    assert f"  pyarrow {pa.__version__}\n" in text.output
    assert json.loads(document.output) == {"digest": found.digest, **found.document()}
