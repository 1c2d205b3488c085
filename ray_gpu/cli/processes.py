"""Which processes of an embedded cluster run, under which uid, behind what. Reads /proc, believes nothing else."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What each process has that would be worth taking; the rows of the table, in this order.
HOLDS: Mapping[str, str] = {
    "this program": "a session; no key",
    "gateway": "policy, ledger, order, lease keys",
    "relay": "nothing: control messages",
    "forwarder": "nothing: connections to the head",
    "Ray": "nothing: places the actors",
    "custodian": "the node's identity",
    "keeper": "the key of one lease",
    "sandbox": "user code and its data; no key",
    "Vault": "keys and identities",
    "supervisor": "starts and ends all others",
}
#: Program that a process runs (``python -m``) to its name in the table.
_PROGRAMS = {
    "ray_gpu.embedded": "supervisor",
    "ray_gpu.gateway": "gateway",
    "ray_gpu.relay": "relay",
    "ray_gpu.forwarder": "forwarder",
    "ray_gpu.custodian": "custodian",
    "ray_gpu.keeper": "keeper",
    "ray_gpu.sandbox.child": "sandbox",
}
#: Namespaces that show in the table, and what a process has of its own with each.
_NAMESPACES = {"net": "network", "mnt": "files", "pid": "pids"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One process, or all of Ray's on one node."""

    name: str
    #: Node that it belongs to, or ``"zone"``.
    where: str
    uid: int
    #: What the kernel says about it, or ``"nothing"``.
    confined_by: str
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Process:
    pid: int
    parent: int
    uid: int
    command: tuple[str, ...]
    confined_by: str

    @property
    def program(self) -> str:
        """Name in the table, or ``""``: bubblewrap's own processes, and those of Ray."""
        for option, module in zip(self.command, self.command[1:], strict=False):
            if option == "-m":
                return _PROGRAMS.get(module, "")
        return "Vault" if os.path.basename(self.command[0]) == "bao" else ""


def rows(document: Mapping[str, Any]) -> list[Row]:
    """Return what runs of a cluster, and the calling process.

    Args:
        document: From :func:`ray_gpu.embedded.running`.
    """
    everything = {process.pid: process for process in _everything()}
    own = everything[os.getpid()]
    zone = f"zone-{document['zone']}"
    found = Counter([Row(name="this program", where="zone", uid=own.uid, confined_by=own.confined_by)])
    places = {pid: name for name, pid in document["nodes"].items()}
    places |= {pid: name.removeprefix("custodian-") for name, pid in document["processes"].items()}
    for process in everything.values():
        above = list(_ancestors(process, everything))
        if document["pid"] not in above or os.path.basename(process.command[0]) == "bwrap":
            continue
        place = next((places[pid] for pid in above if pid in places), "")
        inside_ray = any(pid in document["nodes"].values() for pid in above)
        name = process.program or ("Ray" if inside_ray else "")
        if name:
            where = "zone" if place in ("gateway", "relay", "forwarder", zone) else place or "this host"
            found[Row(name=name, where=where, uid=process.uid, confined_by=process.confined_by)] += 1
    order = list(HOLDS)
    merged = [Row(**{**_fields(row), "count": count}) for row, count in found.items()]
    return sorted(merged, key=lambda row: (order.index(row.name), row.where, row.confined_by))


def _fields(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


def _ancestors(process: _Process, everything: Mapping[int, _Process]) -> Iterator[int]:
    """Yield the process's own id, its parent's, and so on."""
    current: _Process | None = process
    while current is not None:
        yield current.pid
        current = everything.get(current.parent)


def _everything() -> Iterator[_Process]:
    own = {name: _namespace(Path("/proc/self"), name) for name in _NAMESPACES}
    for directory in Path("/proc").glob("[0-9]*"):
        # A process that ended meanwhile, or a kernel thread, which has no command.
        with contextlib.suppress(OSError, ValueError, KeyError):
            yield _process(directory, own)


def _process(directory: Path, own: Mapping[str, str]) -> _Process:
    lines = (directory / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    command = (directory / "cmdline").read_bytes().rstrip(b"\0").decode("utf-8", "replace").split("\0")
    if not command[0]:
        raise ValueError("a kernel thread")
    apart = [text for name, text in _NAMESPACES.items() if _namespace(directory, name) not in ("", own[name])]
    layers = [f"own {', '.join(apart)}"] if apart else []
    if status["Seccomp"].strip() == "2":
        layers.append("seccomp")
    if "/ray-gpu/" in (directory / "cgroup").read_text(encoding="utf-8"):
        layers.append("memory cap")
    return _Process(
        pid=int(directory.name),
        parent=int(status["PPid"]),
        uid=int(status["Uid"].split()[0]),
        command=tuple(command),
        confined_by="; ".join(layers) or "nothing",
    )


def _namespace(directory: Path, name: str) -> str:
    """Return the namespace's identity, or ``""`` where this user may not know it."""
    try:
        return os.readlink(directory / "ns" / name)
    except OSError:
        return ""
