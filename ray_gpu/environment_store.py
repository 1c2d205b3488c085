"""Environments that an operator publishes on a GPU node: built from a lock file, read-only, named by their content.

Rules:

1. Each is a directory ``<digest>`` with ``environment.json``, whose SHA-256 that is, and ``site``, its packages.
2. Its document has a digest over every path, mode and byte of ``site``. It is compared before a sandbox sees it.
3. A lock file names every distribution with its version and hashes, and only wheels are taken: nothing of a package
   runs while it is built.
4. It has what a sandbox itself needs (:data:`NEEDED`): a sandbox of it sees Python's standard library and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ray_gpu import environment
from zones.environments import DIGEST, Environment, minor
from zones.errors import ConfigError
from zones.model import canonical

#: What the sandbox's own program imports.
NEEDED = ("array-api-compat", "cloudpickle", "msgpack", "numpy", "pyarrow")
#: What pip writes about an installation, and not about a package.
_ABOUT = frozenset({"INSTALLER", "REQUESTED", "direct_url.json"})
_DOCUMENT, _SITE = "environment.json", "site"
#: Lines of pip's that an error repeats.
_SAID_LINES = 12


class Store:
    """The environments below one directory. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        #: Looked at once: they do not change.
        self._verified = functools.cache(self._verify)

    def digests(self) -> tuple[str, ...]:
        """Return those that are published here, ascending; what has another name, a copy for example, is none."""
        found = (path.parent.name for path in self._root.glob(f"*/{_DOCUMENT}"))
        return tuple(sorted(name for name in found if DIGEST.fullmatch(name)))

    def environment(self, digest: str) -> Environment:
        """Return what an environment is.

        Raises:
            ConfigError: It is not here, or its document is not what its name says.
        """
        path = self._root / digest / _DOCUMENT
        try:
            found = Environment.parse(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}; build it again with `ray-gpu env build`", file=str(path)) from None
        if found.digest != digest:
            raise ConfigError(f"{path} was changed: its digest is {found.digest}; build it again", file=str(path))
        return found

    def site(self, digest: str) -> Path:
        """Return the directory of an environment's packages, once every file of it was compared.

        Raises:
            ConfigError: It is not here, is not for this Python, or was changed.
        """
        return self._verified(digest)

    def _verify(self, digest: str) -> Path:
        found, site = self.environment(digest), self._root / digest / _SITE
        here = minor(platform.python_version())
        if minor(found.python) != here:
            raise ConfigError(f"{site} is for Python {found.python}, and this node has {here}", file=str(site))
        if (was := files_digest(site)) != found.files:
            raise ConfigError(
                f"{site} was changed: its files' digest is {was} and was {found.files}; build it again with "
                "`ray-gpu env build`",
                file=str(site),
            )
        return site

    def build(self, lock: Path) -> Environment:
        """Install what a lock file names into a new environment, and publish it here.

        Args:
            lock: Requirements with versions and hashes, of everything, as ``pip-compile --generate-hashes`` writes it.

        Raises:
            ConfigError: pip refuses the lock file, or something is missing in it; the message has what pip said.
        """
        self._root.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self._new() as folder:
            site = folder / _SITE
            _install(lock, site)
            _tidy(site)
            found = environment.found([site], python=minor(platform.python_version()))
            if missing := [name for name in NEEDED if name not in found.packages]:
                raise ConfigError(
                    f"{lock} lacks {', '.join(missing)}, which every sandbox needs: add "
                    f"{'it' if len(missing) == 1 else 'them'}, and lock it again",
                    file=str(lock),
                )
            _compile(site)
            _protect(site)
            found = replace(found, files=files_digest(site))
            (folder / _DOCUMENT).write_bytes(canonical(found.document()))
            folder.chmod(0o755)
            self._put(folder, found.digest)
        return found

    def _put(self, folder: Path, digest: str) -> None:
        """Publish what was built, also in place of one that was changed."""
        there = self._root / digest
        if there.exists():
            try:
                self._verify(digest)
            except ConfigError:
                # Renamed first: a custodian never sees a part of it.
                there.rename(there.with_name(f".old-{digest}"))
                remove(there.with_name(f".old-{digest}"))
            else:
                return
        folder.rename(there)

    @contextlib.contextmanager
    def _new(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(prefix=".new-", dir=self._root))
        try:
            yield folder
        finally:
            if folder.exists():
                remove(folder)


def remove(folder: Path) -> None:
    """Remove an environment's directory, which nobody may write to."""
    for path in (folder, *(found for found in folder.rglob("*") if found.is_dir())):
        path.chmod(0o755)
    shutil.rmtree(folder)


def files_digest(site: Path) -> str:
    """Return one SHA-256, hexadecimal, over the path, mode and content of every file below *site*."""
    found = []
    for folder, folders, files in os.walk(site):
        # A link could lead anywhere; wheels have none.
        for name in sorted((*files, *(name for name in folders if Path(folder, name).is_symlink()))):
            path = Path(folder, name)
            if path.is_symlink():
                raise ConfigError(f"{path} is a link, which environments have none of; build it again", file=str(path))
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            found.append([path.relative_to(site).as_posix(), path.stat().st_mode & 0o777, content])
    return hashlib.sha256(canonical(sorted(found))).hexdigest()


def _install(lock: Path, site: Path) -> None:
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--root-user-action=ignore",
        "--require-hashes", "--only-binary", ":all:", "--no-compile", "--target", str(site), "-r", str(lock),
    ]  # fmt: skip
    if not lock.is_file():
        raise ConfigError(
            f"{lock}: no such file; name a lock file, as `pip-compile --generate-hashes` writes it", file=str(lock)
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = "\n  ".join(done.stderr.strip().splitlines()[-_SAID_LINES:])
        raise ConfigError(
            f"pip could not install {lock}. It needs everything by version and hash, as `pip-compile "
            f"--generate-hashes` writes it, and as wheels. It says:\n  {said}",
            file=str(lock),
        )


def _tidy(site: Path) -> None:
    """Take out what says where and how something was installed, so that the same lock gives the same files."""
    shutil.rmtree(site / "bin", ignore_errors=True)
    for folder in site.glob("*.dist-info"):
        for name in _ABOUT:
            (folder / name).unlink(missing_ok=True)
        record = folder / "RECORD"
        rows = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
        kept = [row for row in rows if not row.startswith("../") and row.split(",")[0].rpartition("/")[2] not in _ABOUT]
        record.write_text("".join(f"{row}\n" for row in sorted(kept)), encoding="utf-8")


def _compile(site: Path) -> None:
    """Add bytecode that is valid whatever the files' times: nobody can write it later."""
    command = [sys.executable, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash",
               "-s", str(site), "-p", "/", str(site)]  # fmt: skip
    # Packages have files that are no Python of this version, on purpose: they have no bytecode then.
    subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)


def _protect(site: Path) -> None:
    for folder, _, files in os.walk(site, topdown=False):
        for name in files:
            path = Path(folder, name)
            path.chmod(0o555 if path.stat().st_mode & 0o100 else 0o444)
        Path(folder).chmod(0o555)
