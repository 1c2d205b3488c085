"""The registry of controls that a host may lack: id, what its absence means, how to mend it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One missing control."""

    #: Id as it stands in offers, grants, receipts and policies.
    id: str
    #: One sentence: what is weaker.
    meaning: str
    #: One sentence: what the node's operator does about it.
    fix: str


_ALL = (
    Control(
        id="shared-uid",
        meaning="Sandboxes, keepers and cages run under the uid of the process that started them.",
        fix="Run the custodian as root, so that each process gets a uid of its own.",
    ),
    Control(
        id="no-namespaces",
        meaning="bubblewrap cannot work here, so user code is held by Landlock, seccomp and limits alone.",
        fix="Install bubblewrap 0.8 or later and allow user namespaces, or run as root with CAP_SYS_ADMIN.",
    ),
    Control(
        id="file-capability",
        meaning="Confined processes keep a capability that passes file permissions, since Python or this project lies "
        "in a private directory; Landlock alone holds them.",
        fix="Move Python and the project to where every uid can read them, or let bubblewrap work.",
    ),
    Control(
        id="no-seccomp",
        meaning="System calls are not filtered, so more of the kernel is within reach of user code.",
        fix="Install libseccomp (libseccomp2) on a kernel built with CONFIG_SECCOMP_FILTER.",
    ),
    Control(
        id="no-landlock",
        meaning="The kernel's second check of file access is missing.",
        fix="Use Linux 5.13 or later with landlock in the kernel's lsm= list.",
    ),
    Control(
        id="no-cgroup",
        meaning="Memory is not capped, so one lease can exhaust the node's.",
        fix="Run as root on a host where the memory controller of /sys/fs/cgroup is writable.",
    ),
    Control(
        id="swap-on",
        meaning="Plaintext may be written to the node's swap device.",
        fix="Run swapoff -a, or use cgroups with swap accounting, which keep leases out of swap.",
    ),
)

#: Every control by id.
CONTROLS: Mapping[str, Control] = MappingProxyType({control.id: control for control in _ALL})


def describe(ids: Iterable[str]) -> str:
    """Return one line per id, ``id: meaning fix``, for people. An unknown id stands alone."""
    return "\n".join(f"{i}: {CONTROLS[i].meaning} {CONTROLS[i].fix}" if i in CONTROLS else i for i in ids)
