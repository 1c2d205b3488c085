"""Checks of the kernel and of what it lets this user do. Pure but for :func:`find_groups`, which reads."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ray_gpu.doctor.finding import Files, Finding, holds, missing, unclear
from ray_gpu.sandbox.survey import Mode

_GROUPS = "memory groups"
#: What each version of Landlock adds, by the first that has it.
_LANDLOCK = {1: "files", 3: "truncation", 4: "TCP", 6: "signals and abstract sockets"}


def uids(euid: int) -> Finding:
    """Check that each confined process can get a uid of its own."""
    if euid == 0:
        return holds("shared-uid", "uids", "root, so each lease, keeper and cage gets its own")
    return missing("shared-uid", "uids", f"uid {euid} would run all of them")


def gateway_uid(euid: int) -> Finding:
    """Check that the gateway can have another uid than the people whom it serves."""
    if euid == 0:
        return holds("self-enforced", "gateway's uid", "root, so the gateway gets its own")
    return missing("self-enforced", "gateway's uid", f"the gateway would run as uid {euid}, like this shell")


def bubblewrap(program: str | None) -> Finding:
    """Check that there is a bubblewrap that is new enough."""
    if program is None:
        return missing("no-namespaces", "bubblewrap", "no bubblewrap 0.8 or later was found")
    return holds("no-namespaces", "bubblewrap", program)


def namespaces(mode: Mode, reason: str, *, control: str = "no-namespaces") -> Finding:
    """Check that bubblewrap works for this user, which was tried."""
    about = "namespaces" if control == "no-namespaces" else "cage"
    if mode == "none":
        return missing(control, about, f"bubblewrap failed: {reason}")
    return holds(control, about, "made by root" if mode == "root" else "made inside a user namespace")


def cage_network(mode: Mode, lacking: str, *, nodes: int = 1) -> Finding:
    """Check that Ray's cage can have a network of its own.

    Args:
        mode: How namespaces are made here.
        lacking: From :func:`ray_gpu.cage_net.lacking`.
        nodes: How many are on this host.
    """
    control, about = "shared-network", "cage's network"
    if nodes > 1:
        return missing(control, about, f"{nodes} nodes on one host share its loopback addresses")
    if lacking or mode != "root":
        return missing(control, about, lacking or "bubblewrap makes no namespaces")
    return holds(control, about, "its own, made by root")


def user_namespaces(most: str | None, clone: str | None, apparmor: str | None, *, euid: int) -> Finding:
    """Check that a user without privileges may make user namespaces, which root does without.

    Args:
        most: /proc/sys/user/max_user_namespaces.
        clone: /proc/sys/kernel/unprivileged_userns_clone, of Debian's kernels.
        apparmor: /proc/sys/kernel/apparmor_restrict_unprivileged_userns, of Ubuntu's.
        euid: Of whoever would make them.
    """
    about = "user namespaces"
    refusals = {
        "user.max_user_namespaces": most == "0",
        "kernel.unprivileged_userns_clone": clone == "0",
        "kernel.apparmor_restrict_unprivileged_userns": apparmor == "1",
    }
    settings = [name for name, refuses in refusals.items() if refuses]
    if euid == 0:
        denied = f", though {settings[0]} denies them to others" if settings else ""
        return holds("no-namespaces", about, f"not needed by root{denied}")
    if most is None:
        return missing("no-namespaces", about, "this kernel has none")
    if settings:
        allowed = "28000" if "max" in settings[0] else "0" if "apparmor" in settings[0] else "1"
        fix = f"Run sysctl -w {settings[0]}={allowed}, or run as root."
        return missing("no-namespaces", about, f"{settings[0]} denies them", fix)
    return holds("no-namespaces", about, "allowed")


def python_reach(mode: Mode, *, readable: bool, capability: str | None) -> Finding:
    """Check that confined processes need no capability to read Python, where there are no namespaces."""
    about = "Python's files"
    if mode != "none":
        return holds("file-capability", about, "shown by bubblewrap")
    if not readable:
        return missing("file-capability", about, "another uid cannot read Python or this project at all")
    if capability:
        return missing("file-capability", about, f"readable under another uid with {capability} alone")
    return holds("file-capability", about, "every uid can read them")


def seccomp(*, kernel: bool, library: bool) -> Finding:
    """Check that system calls can be filtered."""
    if not kernel:
        return missing("no-seccomp", "seccomp", "this kernel has no seccomp")
    if not library:
        return missing("no-seccomp", "seccomp", "libseccomp is missing")
    return holds("no-seccomp", "seccomp", "filters can be made")


def landlock(abi: int) -> Finding:
    """Check the kernel's version of Landlock."""
    if abi == 0:
        return missing("no-landlock", "Landlock", "this kernel has none, or it is off")
    known = [text for first, text in _LANDLOCK.items() if abi >= first]
    return holds("no-landlock", "Landlock", f"ABI {abi}: {', '.join(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The control groups that could cap memory."""

    version: int
    mount: str
    #: Whether this user can make groups with the memory controller there.
    usable: bool
    #: Whether a group can be kept out of swap.
    swap_control: bool


def find_groups(files: Files) -> Groups | None:
    """Return where memory groups are, without making one as :mod:`ray_gpu.sandbox.cgroup` does."""
    for line in (files.text("/proc/mounts") or "").splitlines():
        _, mount, kind, options, *_ = line.split()
        place = files.at(mount)
        if kind == "cgroup" and "memory" in options.split(","):
            swap = (place / "memory.memsw.limit_in_bytes").exists()
            return Groups(version=1, mount=mount, usable=os.access(place, os.W_OK), swap_control=swap)
        if kind == "cgroup2" and "memory" in (files.text(f"{mount}/cgroup.controllers") or "").split():
            # The kernel hands controllers down from a group without processes, and from its topmost.
            given = "memory" in (files.text(f"{mount}/cgroup.subtree_control") or "").split()
            topmost = not (place / "cgroup.type").exists()
            usable = given or topmost or files.text(f"{mount}/cgroup.procs") == ""
            swap = any(place.glob("*/memory.swap.max"))
            return Groups(version=2, mount=mount, usable=usable and os.access(place, os.W_OK), swap_control=swap)
    return None


def memory_groups(groups: Groups | None) -> Finding:
    """Check that a lease's memory can be capped."""
    if groups is None:
        return missing("no-cgroup", _GROUPS, "no memory controller is mounted")
    what = f"version {groups.version} at {groups.mount}"
    if not groups.usable:
        return missing("no-cgroup", _GROUPS, f"{what}, where this user can make none")
    return holds("no-cgroup", _GROUPS, what)


def swap(swaps: str | None, groups: Groups | None) -> Finding:
    """Check that memory is not written to disk. *swaps* is /proc/swaps."""
    if swaps is None:
        return unclear("swap-on", "swap", "/proc/swaps cannot be read")
    devices = [line.split()[0] for line in swaps.splitlines()[1:] if line.strip()]
    if not devices:
        return holds("swap-on", "swap", "off")
    if groups and groups.usable and groups.swap_control:
        return holds("swap-on", "swap", f"{', '.join(devices)} is on, and leases are kept out of it")
    return missing("swap-on", "swap", f"{', '.join(devices)} is on")


def ksm(run: str | None) -> Finding:
    """Check that equal pages stay apart. *run* is /sys/kernel/mm/ksm/run."""
    if run == "1":
        return missing("ksm-on", "page merging", "/sys/kernel/mm/ksm/run is 1")
    return holds("ksm-on", "page merging", "off" if run else "this kernel does none")


def core_pattern(pattern: str | None) -> Finding:
    """Check that cores are no program's input. *pattern* is /proc/sys/kernel/core_pattern."""
    if pattern is None:
        return unclear("core-handler", "core_pattern", "/proc/sys/kernel/core_pattern cannot be read")
    if pattern.startswith("|"):
        program = pattern[1:].split()[0] if pattern[1:].split() else "a program"
        return missing("core-handler", "core_pattern", f"cores go to {program}")
    return holds("core-handler", "core_pattern", f"a file, which the core limit stops: {pattern or 'core'}")


def core_limit(limit: int) -> Finding:
    """Check how large a core may be, in bytes, of what is started here; -1 stands for any size."""
    if limit == 0:
        return holds("core-limit", "core limit", "0")
    return missing("core-limit", "core limit", "none" if limit < 0 else f"{limit} bytes")


def ptrace_scope(scope: str | None, *, euid: int) -> Finding:
    """Check that processes of one uid cannot read each other. *scope* is /proc/sys/kernel/yama/ptrace_scope."""
    about = "ptrace_scope"
    if scope in ("1", "2", "3"):
        return holds("ptrace-open", about, scope)
    found = "this kernel has no Yama" if scope is None else scope
    if euid == 0:
        return holds("ptrace-open", about, f"{found}, and no two of our processes share a uid")
    return missing("ptrace-open", about, f"{found}, and our processes share uid {euid}")
