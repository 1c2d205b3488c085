"""The tree keeps its shape, names nobody's machine, and installs only what is locked."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = ("pyproject.toml", "zones", "ray_gpu", "policies", "cluster.yaml", "notebooks", "tests")
LOCKS = ("constraints.txt", "constraints-gpu.txt", "constraints-head.txt")
PIN = re.compile(r"[a-z0-9-]+==\S+ \\")
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")

# Spelled in two halves, so that this file passes its own test.
REGISTRIES = ("pypi" + ".org", "python" + "hosted", "conda" + ".anaconda", "registry.np" + "mjs")
MACHINE_PATHS = re.compile(r"(?<![\w./~$}-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me)/[\w.]")


def tracked_files() -> list[Path]:
    """Files of the project: what git tracks or would add; without git, what .gitignore's folders leave."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def texts() -> list[tuple[str, str]]:
    """Names and contents of the tracked files that are UTF-8."""
    found = []
    for path in tracked_files():
        try:
            found.append((str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_top_level(name: str) -> None:
    """The top level has the parts that the documentation names."""
    assert (ROOT / name).exists()


def test_no_registry_host() -> None:
    """No file names the host of a package registry: the reader's own configuration decides."""
    assert [(name, host) for name, text in texts() for host in REGISTRIES if host in text] == []


def test_no_machine_path() -> None:
    """No file names a folder that exists on one machine only."""
    assert [(name, hit[0]) for name, text in texts() if (hit := MACHINE_PATHS.search(text))] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cd /wo" + "rk/main", True),
        ('"/ro' + 'ot/.cache"', True),
        ("docs/wo" + "rk/x", False),
        ("~/ho" + "me/x", False),
    ],
)
def test_machine_path_pattern(text: str, found: bool) -> None:
    """The search for machine paths finds one where one is."""
    assert bool(MACHINE_PATHS.search(text)) is found


@pytest.mark.parametrize("name", LOCKS)
def test_fully_hashed(name: str) -> None:
    """A lock holds exact versions and hashes, and no option, address or path."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]

    assert [line for line in lines if not PIN.fullmatch(line) and not HASH.fullmatch(line)] == []
    for pin, after in zip(lines, [*lines[1:], ""], strict=True):
        assert not PIN.fullmatch(pin) or HASH.fullmatch(after), f"{pin} has no hash"


def test_locks_agree() -> None:
    """A package in both locks has one version."""
    pins = [dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / name).read_text(), re.MULTILINE)) for name in LOCKS]

    assert {name for name in pins[0].keys() & pins[1].keys() if pins[0][name] != pins[1][name]} == set()


def test_everything_declared_is_locked() -> None:
    """Every dependency that a set-up installs is in a lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["demo"] + extras["dev"] + extras["gpu"]
    names = {re.split(r"[\[><=!~ ]", requirement, maxsplit=1)[0].lower().replace("_", "-") for requirement in declared}
    locked = {pin for lock in LOCKS for pin in re.findall(r"^([a-z0-9-]+)==", (ROOT / lock).read_text(), re.MULTILINE)}

    assert names - locked == set()


def test_readme_commands() -> None:
    """The README shows the two commands that a new user types."""
    readme = (ROOT / "README.md").read_text()

    assert "make demo" in readme
    assert "make test" in readme


def test_ci_adds_nothing() -> None:
    """Continuous integration runs the README's test command and nothing else."""
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]

    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]
