"""ray_gpu.environment_store: environments are named by their content, and served as they were built or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from ray_gpu.cli.main import cli
from ray_gpu.environment_store import NEEDED, Store, remove
from ray_gpu.state import Layout
from tests.published import EXTRA, lock
from zones.environments import Environment
from zones.errors import ConfigError
from zones.model import canonical


@pytest.fixture
def store(built_environment: Path, tmp_path: Path) -> Store:
    """A copy of it to change."""
    shutil.copytree(built_environment, Layout(tmp_path).environments)
    return Store(Layout(tmp_path).environments)


@pytest.mark.chaos
def test_built_again(built_environment: Path, tmp_path: Path) -> None:
    """The same lock gives the same files, bytecode included."""
    again = Store(tmp_path / "again")
    assert again.build(lock(tmp_path / "lock.txt")).digest == Store(built_environment).digests()[0]
    (digest,) = again.digests()
    assert again.build(tmp_path / "lock.txt").digest == digest


@pytest.mark.chaos
def test_built_anew(store: Store, tmp_path: Path) -> None:
    """Building again, as the error advises, puts what was built in place of what was changed."""
    (digest,) = store.digests()
    site = Layout(tmp_path).environments / digest / "site"
    _byte(site)
    with pytest.raises(ConfigError, match=r"was changed.*build it again"):
        store.site(digest)

    assert store.build(lock(tmp_path / "lock.txt")).digest == digest

    assert store.site(digest) == site
    assert [path.name for path in site.parent.parent.iterdir()] == [digest]


def test_what_it_is(built_environment: Path) -> None:
    """It has what the lock names, for Pythons of this minor version; its document proves itself; all is read-only."""
    store = Store(built_environment)
    (digest,) = store.digests()
    found, site = store.environment(digest), store.site(digest)

    assert found.packages.keys() == {*NEEDED, EXTRA}
    assert found.modules[EXTRA] == EXTRA
    assert found.python.count(".") == 1
    assert Environment.parse(json.loads((site.parent / "environment.json").read_bytes())).digest == digest
    assert not any(path.stat().st_mode & 0o222 for path in [site, *site.rglob("*")])
    assert list((site / EXTRA).glob("__pycache__/*.pyc"))
    assert not list(site.glob("*.dist-info/direct_url.json"))
    listed = CliRunner().invoke(cli, ["env", "list", "--state", str(built_environment.parent)])
    assert (listed.exit_code, listed.output.split()[0]) == (0, digest)


def _byte(site: Path) -> None:
    path = site / EXTRA / "functoolz.py"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"def ", b"def\t", 1))
    path.chmod(0o444)


def _bytecode(site: Path) -> None:
    path = next((site / EXTRA / "__pycache__").glob("functoolz*"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"\0")
    path.chmod(0o444)


def _more(site: Path) -> None:
    site.chmod(0o755)
    (site / "sitecustomize.py").touch(mode=0o444)


def _less(site: Path) -> None:
    (site / EXTRA).chmod(0o755)
    (site / EXTRA / "functoolz.py").unlink()


def _mode(site: Path) -> None:
    (site / EXTRA / "functoolz.py").chmod(0o666)


def _link(site: Path) -> None:
    _less(site)
    (site / EXTRA / "functoolz.py").symlink_to("/etc/passwd")


@pytest.mark.parametrize("change", [_byte, _bytecode, _more, _less, _mode, _link])
def test_changed(store: Store, tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Whatever is another about its files is found before it is served, and `env list` says so."""
    (digest,) = store.digests()
    change(Layout(tmp_path).environments / digest / "site")

    with pytest.raises(ConfigError, match=r"was changed|is a link"):
        store.site(digest)
    listed = CliRunner().invoke(cli, ["env", "list", "--state", str(tmp_path)])
    assert listed.exit_code == 1
    assert f"{digest}  not served" in listed.output


def test_as_it_was(store: Store, tmp_path: Path) -> None:
    """Control: what nobody changed is served. A copy beside it under another name is none."""
    (digest,) = store.digests()
    root = Layout(tmp_path).environments
    shutil.copytree(root / digest, root / f"{digest}.bak")
    assert store.digests() == (digest,)
    assert store.site(digest).is_dir()


def test_changed_document(store: Store, tmp_path: Path) -> None:
    """A document that says something else, or for another Python, is not believed for its name."""
    (digest,) = store.digests()
    folder = Layout(tmp_path).environments / digest
    document = json.loads((folder / "environment.json").read_bytes())
    (folder / "environment.json").write_bytes(canonical({**document, "packages": {}}))
    with pytest.raises(ConfigError, match="was changed: its digest is"):
        store.environment(digest)

    other = Environment.parse({**document, "python": "3.10"})
    folder = folder.rename(folder.with_name(other.digest))
    (folder / "environment.json").write_bytes(canonical(other.document()))
    with pytest.raises(ConfigError, match=r"is for Python 3\.10, and this node has 3\.1"):
        store.site(other.digest)


def test_refused_locks(tmp_path: Path) -> None:
    """A lock without hashes, or without what sandboxes need, is refused, with what to do; nothing is left behind."""
    store = Store(tmp_path / "environments")
    loose = tmp_path / "loose.txt"
    loose.write_text(f"{EXTRA}==1.0.0\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"(?s)pip could not install .*--generate-hashes.*Hashes are required"):
        store.build(loose)
    with pytest.raises(ConfigError, match="lacks cloudpickle, which every sandbox needs: add it"):
        store.build(lock(tmp_path / "without.txt", set(NEEDED) - {"cloudpickle"}))
    with pytest.raises(ConfigError, match="no such file"):
        store.build(tmp_path / "absent.txt")
    assert not list((tmp_path / "environments").iterdir())


def test_remove(store: Store, tmp_path: Path) -> None:
    """What nobody may write to can be removed all the same."""
    (digest,) = store.digests()
    folder = Layout(tmp_path).environments / digest
    assert not stat.S_IMODE(os.stat(folder / "site").st_mode) & 0o222

    remove(folder)

    assert store.digests() == ()
