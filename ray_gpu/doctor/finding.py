"""What a check found, and the files that checks look at. Reads files; nothing else."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_gpu.controls import CONTROLS

#: ``"unclear"``: it could not be read, so nobody may rely on it.
State = Literal["holds", "missing", "unclear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's."""

    #: Id in :data:`ray_gpu.controls.CONTROLS`.
    control: str
    #: What was looked at, in a word or two.
    about: str
    state: State
    #: What is so, without a full stop.
    found: str
    #: What to do about it; empty when it holds.
    fix: str


def holds(control: str, about: str, found: str) -> Finding:
    """Return that a control holds."""
    return Finding(control=control, about=about, state="holds", found=found, fix="")


def missing(control: str, about: str, found: str, fix: str = "") -> Finding:
    """Return that a control is missing; *fix* replaces the registry's."""
    return Finding(control=control, about=about, state="missing", found=found, fix=fix or CONTROLS[control].fix)


def unclear(control: str, about: str, found: str, fix: str = "Run ray-gpu doctor as root, who may look.") -> Finding:
    """Return that nobody can tell."""
    return Finding(control=control, about=about, state="unclear", found=found, fix=fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """What a check needs to know of a file."""

    path: str
    #: As ``st_mode`` of the file itself, not of what a link points to.
    mode: int
    uid: int

    @property
    def permissions(self) -> str:
        """The nine bits as an octal number."""
        return f"{stat.S_IMODE(self.mode) & 0o777:o}"


class Files:
    """The files of a host. Tests have theirs below another root than ``/``."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def at(self, path: str | Path) -> Path:
        """Return where *path*, which is absolute, is."""
        return self.root / str(path).lstrip("/")

    def text(self, path: str | Path) -> str | None:
        """Return a file's text without spaces at its ends, or ``None`` where it is missing or may not be read."""
        with contextlib.suppress(OSError):
            return self.at(path).read_text(encoding="utf-8", errors="replace").strip()
        return None

    def facts(self, path: str | Path) -> FileFacts | None:
        """Return mode and owner, or ``None`` where there is no such file or no way to it.

        Raises:
            PermissionError: It lies in a directory that may not be entered.
        """
        try:
            found = os.lstat(self.at(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileFacts(path=str(path), mode=found.st_mode, uid=found.st_uid)

    def above(self, path: str | Path) -> Iterator[FileFacts]:
        """Yield mode and owner of each directory above a file, as far as there is one."""
        for parent in Path(path).parents:
            if facts := self.facts(parent):
                yield facts
