"""What this host can do to confine a process, found out by trying. This module starts processes."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_gpu.sandbox import bubblewrap, cgroup, landlock, seccomp
from ray_gpu.sandbox.profile import Profile, runtime_paths

#: How namespaces come about: made by root, inside a user namespace, or not at all.
Mode = Literal["root", "userns", "none"]

_PROBE = Profile(name="probe", kind="sandbox", uid=61000, tmpfs={"/tmp": 1 << 20})
_PROBE_TIMEOUT_S = 20.0
#: The second is what container engines leave to root.
_FILE_CAPABILITIES = ("dac_read_search", "dac_override")
_TRUNCATION_ABI = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What this host can do for the uid that asks."""

    root: bool
    bwrap: Path | None
    mode: Mode
    #: Why *mode* is ``"none"``, in bubblewrap's words; otherwise empty.
    reason: str
    #: Whether Python and this project can be read under another uid; always true without root.
    python_readable: bool
    #: The capability that it takes, if one: they lie in a private directory, and there are no namespaces.
    capability: str | None
    seccomp: bool
    #: Landlock ABI version, 0 for none.
    landlock_abi: int
    cgroup: cgroup.Hierarchy | None
    swap: bool

    @property
    def namespaces(self) -> bool:
        """Whether a process here can have namespaces of its own."""
        return self.mode != "none"

    @property
    def counts_processes(self) -> bool:
        """Whether a limit on processes fits: it counts all of a uid, since Linux 5.14 within its user namespace."""
        return self.root or (self.mode == "userns" and _kernel() >= (5, 14))


def _kernel() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])


@functools.cache
def survey() -> Survey:
    """Return what this host can do. Tries it the first time, which takes some 50 ms."""
    root = os.geteuid() == 0
    bwrap = bubblewrap.find()
    mode, reason = try_bubblewrap(bwrap, root=root)
    readable, capability = (True, None) if mode != "none" or not root else reach_python()
    return Survey(
        root=root,
        bwrap=bwrap,
        mode=mode,
        reason=reason,
        python_readable=readable,
        capability=capability,
        seccomp=Path("/proc/sys/kernel/seccomp").exists() and seccomp.compile_filter("sandbox") is not None,
        landlock_abi=landlock.abi(),
        cgroup=cgroup.hierarchy(),
        swap=len(Path("/proc/swaps").read_text(encoding="utf-8").splitlines()) > 1,
    )


def degradations(kind: seccomp.Kind = "sandbox") -> tuple[str, ...]:
    """Return the ids of the controls (:mod:`.controls`) that this host lacks; empty means ``strict``.

    A cage holds nothing worth having, so memory and swap do not count for it.
    """
    found = survey()
    missing = {
        "shared-uid": not found.root,
        "no-namespaces": found.mode == "none",
        "file-capability": found.capability is not None,
        "no-seccomp": not found.seccomp,
        "no-landlock": found.landlock_abi == 0,
        "no-cgroup": found.cgroup is None and kind != "cage",
        "swap-on": found.swap and kind != "cage" and not (found.cgroup and found.cgroup.swap_control),
    }
    return tuple(name for name, lacks in missing.items() if lacks)


def drop(profile: Profile, capability: str | None = None) -> list[str]:
    """Return the words that, before a command, change from root to the profile's uid with no capability left but one.

    Raises:
        FileNotFoundError: ``setpriv`` is missing.
    """
    program = shutil.which("setpriv", path="/usr/bin:/bin:/usr/sbin:/sbin")
    if program is None:
        raise FileNotFoundError("setpriv is missing; install util-linux")
    gid = profile.uid if profile.gid is None else profile.gid
    ids = [f"--reuid={profile.uid}", f"--regid={gid}", "--clear-groups"]
    kept = f",+{capability}" if capability else ""
    sets = [f"--bounding-set=-all{kept}", f"--inh-caps=-all{kept}", *([f"--ambient-caps=-all{kept}"] if kept else [])]
    return [program, *ids, *sets, "--no-new-privs", "--"]


def try_bubblewrap(bwrap: Path | None, *, root: bool) -> tuple[Mode, str]:
    """Return how bubblewrap makes namespaces here or, with mode ``"none"``, why it does not."""
    if bwrap is None:
        return "none", "no bubblewrap 0.8 or later was found"
    options = bubblewrap.arguments(_PROBE, userns=not root)
    reason = _succeeds([str(bwrap), *options, "--", *(drop(_PROBE) if root else []), "/bin/true"])
    return ("none", reason) if reason else ("root" if root else "userns", "")


def reach_python() -> tuple[bool, str | None]:
    """Return whether another uid can read Python and this project, and the capability that it takes, if one."""
    # A Python whose library is out of reach may quietly take another Python's, so look at the places.
    places = [os.path.dirname(os.__file__), *map(str, runtime_paths())]
    check = f"import os, sys; sys.exit(os.__file__ != {os.__file__!r} or any(not os.listdir(p) for p in {places!r}))"
    # Past file permissions Landlock is all that is left, from the version on that knows truncation.
    capabilities = _FILE_CAPABILITIES if landlock.abi() >= _TRUNCATION_ABI else ()
    for capability in (None, *capabilities):
        if _succeeds([*drop(_PROBE, capability), sys.executable, "-c", check]) == "":
            return True, capability
    return False, None


def _succeeds(command: list[str]) -> str:
    """Run *command*; return nothing, or why it failed."""
    try:
        done = subprocess.run(command, env={}, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"
