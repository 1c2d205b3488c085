"""What file system a path is on, from the text of /proc/mounts. Pure."""

from __future__ import annotations

from pathlib import PurePosixPath

#: File systems whose content is in memory and ends with the host.
IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def file_system(path: str, mounts: str) -> tuple[str, str]:
    """Return where the file system of *path* is mounted, and its kind. The path need not be there yet."""
    # Later mounts cover earlier ones at the same place.
    kinds = {fields[1]: fields[2] for fields in (line.split() for line in mounts.splitlines()) if len(fields) > 2}
    place = next((str(p) for p in (PurePosixPath(path), *PurePosixPath(path).parents) if str(p) in kinds), "/")
    return place, kinds.get(place, "of an unknown kind")
