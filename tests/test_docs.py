"""What the documents point to exists, the tests that they name exist, and the first example runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from ray_gpu.cli.main import cli
from ray_gpu.controls import CONTROLS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
#: A link to a test file, and what stands in parentheses behind it.
NAMED_TESTS = re.compile(r"\]\(\.\./(tests/\S+?\.py)\)\s*\(([^)]*`test_[^)]*)\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document: Path) -> None:
    """Each link inside the project leads to a file or a folder."""
    links = [link for link in LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]

    assert [link for link in links if not (document.parent / link).exists()] == []


def test_threat_model_is_whole() -> None:
    """The threat model links every file of the attack suite, and names every control."""
    text = (ROOT / "docs/threat-model.md").read_text(encoding="utf-8")
    table = text[text.index("### Which tests play them") : text.index("**Not protected against:**")]
    files = {f"../{path.relative_to(ROOT)}" for path in (ROOT / "tests/attack").glob("test_*.py")}

    assert files - set(LINK.findall(table)) == set()
    assert set(CONTROLS) ^ set(re.findall(r"`([a-z]+(?:-[a-z]+)*)`", table.partition("|---|")[2])) == set()


def test_named_tests_exist() -> None:
    """Each test that a document names as proof is in the file that it links."""
    named = [match for document in DOCUMENTS for match in NAMED_TESTS.findall(document.read_text(encoding="utf-8"))]
    missing = [
        (file, name)
        for file, names in named
        for name in re.findall(r"`(test_\w+)`", names)
        if f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]

    assert len(named) > 5
    assert missing == []


def test_readme_example(cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first example of the README runs as it stands, and gives what its function says."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    source = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    monkeypatch.setenv("RAY_GPU_STATE", str(cluster.state))
    # A file, since a function's source and module belong to one.
    path = tmp_path / "example.py"
    path.write_text(source, encoding="utf-8")
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    exec(compile(source, path, "exec"), names)  # the reader's own words, from this repository

    with cluster.attach() as zone:
        expected = names["strain"].local(zone.read("randhie", ["mdvis", "disea"], filter=["physlm", ">", 0]))
    assert len(names["result"]) > 1000
    assert (names["result"] == expected).all()


@pytest.mark.parametrize("name", ["howto-cloud.md", "howto-kuberay.md"])
def test_sketches(name: str) -> None:
    """What nobody has run says so in its first line; its example is YAML, and starts our nodes and nothing else."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    document = yaml.safe_load(example)

    assert text.startswith("**UNTESTED.**")
    assert "ray-gpu node start" in json.dumps(document)
    assert "ray start" not in json.dumps(document)
    if "cloud" in name:
        shipped = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
        assert {key: document[key] for key in document if "start" in key} == {
            key: shipped[key] for key in shipped if "start" in key
        }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(document: Path) -> None:
    """Each ``ray-gpu`` command that a document names is there."""
    runner = CliRunner()
    for words in re.findall(r"`ray-gpu((?: [a-z-]+)+)", document.read_text(encoding="utf-8")):
        command = words.split()
        # What follows a command that has no further ones is an argument of it.
        command = command[: 2 if isinstance(cli.commands.get(command[0]), click.Group) else 1]
        assert runner.invoke(cli, [*command, "--help"]).exit_code == 0, words
