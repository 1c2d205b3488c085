"""Checks of files: who can read the logins, what lies on a disk, when the node's certificate ends. Pure."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from ray_gpu.doctor.finding import FileFacts, Finding, holds, missing, unclear
from ray_gpu.mounts import IN_MEMORY, file_system

#: A node that ends within this time is restarted before, seconds.
SOON_S = 7 * 86400
_OTHERS_READ, _OTHERS_WRITE = 0o077, 0o022


def private_file(what: str, file: FileFacts | None, above: Iterable[FileFacts], *, owners: Sequence[int]) -> Finding:
    """Check that a file is its owner's alone, and that nobody else can put another in its place.

    Args:
        what: A word or two for people.
        file: ``None`` when it is not there.
        above: The directories that it lies in.
        owners: Uids that it may belong to, the likeliest first.
    """
    control = "credentials-open"
    if file is None:
        return missing(control, what, "it is not there", "Write it with `ray-gpu vault issue`.")
    if not stat.S_ISREG(file.mode) and not stat.S_ISDIR(file.mode):
        return missing(control, what, f"{file.path} is no plain file", "Put the file itself there, mode 600.")
    if file.uid not in owners:
        fix = f"Run chown {owners[0]} {file.path}, and issue what is in it anew."
        return missing(control, what, f"{file.path} belongs to uid {file.uid}, not {owners[0]}", fix)
    if file.mode & _OTHERS_READ:
        bits = "700" if stat.S_ISDIR(file.mode) else "600"
        fix = f"Run chmod {bits} {file.path}; if others had it, issue what is in it anew."
        return missing(control, what, f"{file.path} has mode {file.permissions}", fix)
    for directory in above:
        sticky = directory.mode & stat.S_ISVTX
        if directory.uid not in (0, *owners) or (directory.mode & _OTHERS_WRITE and not sticky):
            fix = f"Give {directory.path} to root, and run chmod go-w {directory.path}."
            return missing(control, what, f"{directory.path}, above it, can be changed by others", fix)
    return holds(control, what, f"{file.path} is its owner's alone")


def tmpfs(what: str, path: str, mounts: str | None) -> Finding:
    """Check that a directory is memory, not disk. *mounts* is /proc/mounts; the directory need not be there yet."""
    control = "session-on-disk"
    if mounts is None:
        return unclear(control, what, "/proc/mounts cannot be read")
    place, kind = file_system(path, mounts)
    if kind in IN_MEMORY:
        return holds(control, what, f"{path} is on a {kind}")
    return missing(control, what, f"{path} is on {place}, which is {kind}")


def node_certificate(path: str, not_after: float | None, *, now: float) -> Finding:
    """Check when the certificate with which a node speaks Ray ends.

    Args:
        path: Where it is.
        not_after: UTC seconds since the epoch; ``None`` when there is none yet.
        now: The same.
    """
    control, about = "certificate-ends", "Ray's certificate"
    if not_after is None:
        return holds(control, about, "none yet: `ray-gpu node start` gets one")
    when = datetime.fromtimestamp(not_after, UTC).strftime("%Y-%m-%d %H:%M UTC")
    if not_after <= now:
        return missing(control, about, f"{path} ended at {when}")
    if not_after - now < SOON_S:
        return missing(control, about, f"{path} ends soon, at {when}")
    return holds(control, about, f"until {when}")
