"""Blocks of code in the documents are what they say: commands are there with their options, files are read, code runs.

What needs a cluster of its own, :mod:`tests.test_guide` and :mod:`tests.hosts.test_docs` run.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jsonschema  # type: ignore[import-untyped]  # a tool for notebooks brings it, without types
import pytest
import ray
import yaml

import ray_gpu
from ray_gpu import hosts_file, vault_declaration
from ray_gpu.cli.main import cli
from zones import audit, steps
from zones.config import _DatasetPart, _SegmentsPart, load_zone

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/adr/*.md")])
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:ray-gpu|make) [^`]+)`")
#: What is run elsewhere: see above.
_RUN = {("README.md", "python"), ("using.md", "python"), ("testbed.md", "python"), ("howto-ray-data.md", "python")}


def blocks(kind: str) -> dict[str, str]:
    """Return the blocks of one kind, each with its page and number."""
    return {
        f"{page.name}-{number}": found[2]
        for page in PAGES
        for number, found in enumerate(_BLOCK.finditer(page.read_text(encoding="utf-8")))
        if found[1] == kind
    }


def commands() -> list[str]:
    """Return every command of ours in a block or in the text of a page."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        plain = "\n".join(block[2] for block in _BLOCK.finditer(text) if block[1] in ("", "sh"))
        lines = [line.partition("  #")[0].strip() for line in plain.splitlines()]
        found += [line for line in lines if line.startswith(("ray-gpu ", "make "))]
        found += _INLINE.findall(_BLOCK.sub("", text))
    return sorted(dict.fromkeys(found))


@pytest.mark.parametrize("line", commands())
def test_command(line: str) -> None:
    """A command that a page shows is there, and so is every option that it is shown with."""
    words = shlex.split(re.split(r" [>&|]|;|…|\.\.\.", line)[0])
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        known = {name for group in targets for name in group.split()}
        assert words[1].partition("=")[0] in known | {"PYTHON"}, line
        return
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands and command.invoke_without_command:
            break
        # Alternatives are written as `start|stop`.
        command = next(command.commands[name] for name in rest[0].split("|"))
        rest = rest[1:]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options | {"--help"}, line


def test_commands_are_found() -> None:
    """Control: the pages do show commands, and one that is not there is noticed."""
    assert len(commands()) > 20
    for wrong in ("ray-gpu stat", "ray-gpu status --jason", "make tets"):
        with pytest.raises((AssertionError, KeyError)):
            test_command(wrong)


def _declaration(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
    secret = path.with_name("oidc-secret")
    secret.touch(mode=0o600)
    secret.write_text("of the test", encoding="utf-8")
    assert vault_declaration.read(path).zones


def _hosts(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
    assert len(hosts_file.read(path)) == 7


def _cluster(text: str, path: Path) -> None:
    """Ray's own schema takes it; :mod:`ray_gpu.cluster_file` is for hosts that are listed."""
    schema = Path(ray.__file__).with_name("autoscaler") / "ray-schema.json"
    jsonschema.validate(yaml.safe_load(text), json.loads(schema.read_text(encoding="utf-8")))


def _kubernetes(text: str, path: Path) -> None:
    assert yaml.safe_load(text)["kind"] == "RayCluster"


def _catalog(text: str, path: Path) -> None:
    """It is a part of a data set, or of its segments."""
    said = yaml.safe_load(text.replace("..., ", ""))
    if "within" in said:
        _SegmentsPart.model_validate({"parts": {"train": 80, "test": 20}, **said})
    elif "segments" in said:
        _DatasetPart.model_validate({"path": "digits.arrow", "columns": {"label": "public"}, **said})
    else:
        (dataset,) = said.values()
        _DatasetPart.model_validate(dataset)


FILES: dict[str, Callable[[str, Path], None]] = {
    "vault.md": _declaration,
    "ports.md": _hosts,
    "howto-cloud.md": _cluster,
    "howto-kuberay.md": _kubernetes,
    "policies.md": _catalog,
}


@pytest.mark.parametrize("name", blocks("yaml"))
def test_file(name: str, tmp_path: Path) -> None:
    """A file that a page shows is read by what reads it."""
    FILES[name.rpartition("-")[0]](blocks("yaml")[name], tmp_path / "file.yaml")


def test_sql() -> None:
    """The ledger's table is as the page says."""
    assert [" ".join(text.split()) for text in blocks("sql").values()] == [audit.SCHEMA]


def test_vault_configuration() -> None:
    """What an audit log needs in Vault's configuration is what the set-up asks for."""
    (shown,) = blocks("hcl").values()
    said = (ROOT / "ray_gpu/vault_setup.py").read_text(encoding="utf-8")
    assert textwrap.dedent(shown).splitlines()[0] in said
    assert all(line.split("=")[0].strip() in said for line in shown.splitlines())


def test_step() -> None:
    """The step that the page on policies shows is a step, and the shipped clinic's own."""
    (shown,) = (text for name, text in blocks("python").items() if name.startswith("policies.md"))
    made = steps.parse(shown, "policies.md")
    clinic = load_zone(ROOT / "policies", "clinic")

    assert set(made) == {"label"}
    assert any(one.derived and one.derived.step == "label" for one in clinic.datasets.values())
    assert shown.partition("@step")[2] in (ROOT / "policies/clinic/steps.py").read_text(encoding="utf-8")


def test_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    """The measurement behind the choice of an envelope runs, and prints what its table has."""
    (shown,) = (text for name, text in blocks("python").items() if name.startswith("0002"))

    exec(compile(shown, "0002-envelope.md", "exec"), {"__name__": "measurement"})

    assert "GB/s" in capsys.readouterr().out


def test_option(capsys: pytest.CaptureFixture[str]) -> None:
    """The option that the page on environments shows is one."""
    (shown,) = (text for name, text in blocks("python").items() if name.startswith("environments"))
    names: dict[str, Any] = {}
    exec(compile(shown, "environments.md", "exec"), names)
    assert isinstance(names["remote"](len), ray_gpu.RemoteFunction)


def _is_python(text: str) -> bool:
    """Tell whether a block could be a program: it can be read as one, and calls or imports something."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    return any(isinstance(node, (ast.Call, ast.Import, ast.ImportFrom)) for node in ast.walk(tree))


def test_every_block_is_run_somewhere() -> None:
    """No block has a language that nothing here, nor what is named above, looks at."""
    here = {("policies.md", "python"), ("0002-envelope.md", "python"), ("environments.md", "python")}
    looked_at = {"", "sh", "yaml", "sql", "hcl"}
    for page in PAGES:
        for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            known: Any = found[1] in looked_at or (page.name, found[1]) in _RUN | here
            assert known, (page.name, found[1])
            assert found[1] or not _is_python(found[2]), (page.name, found[2])
