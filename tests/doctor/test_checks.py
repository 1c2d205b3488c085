"""Each check of the doctor's says that a control holds where it does, and that it is missing where it is not."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_gpu.controls import CONTROLS
from ray_gpu.doctor import files, kernel, notebooks, software, vault
from ray_gpu.doctor.examination import ROLES, judge
from ray_gpu.doctor.finding import FileFacts, Files, Finding, holds, missing, unclear

SWAPS = "Filename Type Size Used Priority"
SWAP = f"{SWAPS}\n/dev/sda2 partition 8388604 0 -2"
GROUPS = kernel.Groups(version=2, mount="/sys/fs/cgroup", usable=True, swap_control=True)
MOUNTS = (
    "/dev/sda1 / ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\n/dev/sda3 /run/on-disk xfs rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0"
)
DAY_S = 86400.0
NOW = 1_800_000_000.0
ANSWER = vault.Answer(
    address="https://vault:8200", initialized=True, not_after=NOW + 90 * DAY_S, theirs=NOW - 0.5, ours=NOW
)
#: What a check says, and a word that it says it with.
Case = tuple[Callable[[], Finding], str, str]


def userns(
    most: str | None = "9999", clone: str | None = None, apparmor: str | None = None, euid: int = 1000
) -> Finding:
    """Check a kernel that allows user namespaces, but for what is given."""
    return kernel.user_namespaces(most, clone, apparmor, euid=euid)


def reach(mode: Any = "none", *, readable: bool = True, capability: str | None = None) -> Finding:
    """Check a Python that every uid can read without namespaces, but for what is given."""
    return kernel.python_reach(mode, readable=readable, capability=capability)


def gpu(model: str = "H100", *, devices: int = 1, cupy: bool = True) -> Finding:
    """Check a host with a GPU, but for what is given."""
    return software.gpu(model, devices=devices, cupy=cupy)


def running(*transports: Any) -> Finding:
    """Check a host with these kernels."""
    return notebooks.kernels([notebooks.Kernel(pid=pid, transport=kind) for pid, kind in enumerate(transports)])


CASES: dict[str, Case] = {
    "uid root": (lambda: kernel.uids(0), "holds", "root"),
    "uid user": (lambda: kernel.uids(1000), "missing", "uid 1000"),
    "gateway root": (lambda: kernel.gateway_uid(0), "holds", "root"),
    "gateway user": (lambda: kernel.gateway_uid(1000), "missing", "uid 1000"),
    "bwrap": (lambda: kernel.bubblewrap("/usr/bin/bwrap"), "holds", "/usr/bin/bwrap"),
    "bwrap missing": (lambda: kernel.bubblewrap(None), "missing", "0.8"),
    "namespaces of root": (lambda: kernel.namespaces("root", ""), "holds", "root"),
    "namespaces of a user": (lambda: kernel.namespaces("userns", ""), "holds", "user namespace"),
    "namespaces refused": (lambda: kernel.namespaces("none", "No permission"), "missing", "No permission"),
    "cage": (lambda: kernel.namespaces("root", "", control="uncaged-ray"), "holds", "root"),
    "no cage": (lambda: kernel.namespaces("none", "x", control="uncaged-ray"), "missing", "failed"),
    "cage's network": (lambda: kernel.cage_network("root", ""), "holds", "its own"),
    "cage without root": (lambda: kernel.cage_network("userns", "it takes root"), "missing", "it takes root"),
    "cage without nft": (lambda: kernel.cage_network("root", "nft not found"), "missing", "nft not found"),
    "cage without namespaces": (lambda: kernel.cage_network("none", ""), "missing", "bubblewrap"),
    "cages of one machine": (lambda: kernel.cage_network("root", "", nodes=3), "missing", "3 nodes"),
    "userns": (lambda: userns(), "holds", "allowed"),
    "userns of root": (lambda: userns(most="0", euid=0), "holds", "denies them to others"),
    "userns none": (lambda: userns(most=None), "missing", "none"),
    "userns 0": (lambda: userns(most="0"), "missing", "user.max_user_namespaces"),
    "userns Debian": (lambda: userns(clone="0"), "missing", "unprivileged_userns_clone"),
    "userns Ubuntu": (lambda: userns(apparmor="1"), "missing", "apparmor_restrict"),
    "Python behind namespaces": (lambda: reach("root", readable=False), "holds", "bubblewrap"),
    "Python readable": (lambda: reach(), "holds", "every uid"),
    "Python with a capability": (lambda: reach(capability="dac_override"), "missing", "dac_override"),
    "Python unreadable": (lambda: reach(readable=False), "missing", "cannot read"),
    "seccomp": (lambda: kernel.seccomp(kernel=True, library=True), "holds", "filters"),
    "seccomp kernel": (lambda: kernel.seccomp(kernel=False, library=True), "missing", "kernel"),
    "seccomp library": (lambda: kernel.seccomp(kernel=True, library=False), "missing", "libseccomp"),
    "Landlock": (lambda: kernel.landlock(6), "holds", "signals"),
    "Landlock old": (lambda: kernel.landlock(1), "holds", "ABI 1: files"),
    "Landlock none": (lambda: kernel.landlock(0), "missing", "none"),
    "groups": (lambda: kernel.memory_groups(GROUPS), "holds", "version 2"),
    "groups none": (lambda: kernel.memory_groups(None), "missing", "no memory controller"),
    "groups denied": (lambda: kernel.memory_groups(replace(GROUPS, usable=False)), "missing", "can make none"),
    "swap off": (lambda: kernel.swap(SWAPS, None), "holds", "off"),
    "swap on": (lambda: kernel.swap(SWAP, None), "missing", "/dev/sda2"),
    "swap accounted": (lambda: kernel.swap(SWAP, GROUPS), "holds", "kept out"),
    "swap unaccounted": (lambda: kernel.swap(SWAP, replace(GROUPS, swap_control=False)), "missing", "/dev/sda2"),
    "swap out of reach": (lambda: kernel.swap(SWAP, replace(GROUPS, usable=False)), "missing", "/dev/sda2"),
    "swap unreadable": (lambda: kernel.swap(None, None), "unclear", "/proc/swaps"),
    "ksm off": (lambda: kernel.ksm("0"), "holds", "off"),
    "ksm unmerged": (lambda: kernel.ksm("2"), "holds", "off"),
    "ksm none": (lambda: kernel.ksm(None), "holds", "none"),
    "ksm on": (lambda: kernel.ksm("1"), "missing", "is 1"),
    "cores to a file": (lambda: kernel.core_pattern("core.%p"), "holds", "core.%p"),
    "cores to systemd": (lambda: kernel.core_pattern("|/lib/systemd-coredump %P"), "missing", "systemd-coredump"),
    "cores to a bare pipe": (lambda: kernel.core_pattern("|"), "missing", "a program"),
    "cores unreadable": (lambda: kernel.core_pattern(None), "unclear", "cannot be read"),
    "no core": (lambda: kernel.core_limit(0), "holds", "0"),
    "any core": (lambda: kernel.core_limit(-1), "missing", "none"),
    "small core": (lambda: kernel.core_limit(4096), "missing", "4096 bytes"),
    "ptrace 1": (lambda: kernel.ptrace_scope("1", euid=1000), "holds", "1"),
    "ptrace 0": (lambda: kernel.ptrace_scope("0", euid=1000), "missing", "uid 1000"),
    "ptrace 0 as root": (lambda: kernel.ptrace_scope("0", euid=0), "holds", "no two"),
    "ptrace without Yama": (lambda: kernel.ptrace_scope(None, euid=1000), "missing", "no Yama"),
    "tmpfs": (lambda: files.tmpfs("x", "/run/ray-gpu-nodes", MOUNTS), "holds", "on a tmpfs"),
    "tmpfs itself": (lambda: files.tmpfs("x", "/dev/shm", MOUNTS), "holds", "on a tmpfs"),
    "disk below a tmpfs": (lambda: files.tmpfs("x", "/run/on-disk/a", MOUNTS), "missing", "xfs"),
    "disk": (lambda: files.tmpfs("x", "/running", MOUNTS), "missing", "ext4"),
    "mounts unreadable": (lambda: files.tmpfs("x", "/run", None), "unclear", "/proc/mounts"),
    "certificate": (lambda: files.node_certificate("/c", NOW + 20 * DAY_S, now=NOW), "holds", "until 20"),
    "certificate ended": (lambda: files.node_certificate("/c", NOW - 1, now=NOW), "missing", "ended"),
    "certificate ends": (lambda: files.node_certificate("/c", NOW + DAY_S, now=NOW), "missing", "soon"),
    "no certificate yet": (lambda: files.node_certificate("/c", None, now=NOW), "holds", "none yet"),
    "Vault": (lambda: vault.answers(ANSWER), "holds", "not sealed"),
    "Vault gone": (lambda: vault.answers(replace(ANSWER, failure="refused")), "missing", "refused"),
    "Vault sealed": (lambda: vault.answers(replace(ANSWER, sealed=True)), "missing", "sealed"),
    "Vault empty": (lambda: vault.answers(replace(ANSWER, initialized=False)), "missing", "nothing yet"),
    "Vault's certificate": (lambda: vault.certificate(ANSWER), "holds", "until 20"),
    "Vault's ends": (lambda: vault.certificate(replace(ANSWER, not_after=NOW + DAY_S)), "missing", "ends at"),
    "Vault's unknown": (lambda: vault.certificate(replace(ANSWER, failure="x")), "unclear", "did not answer"),
    "clock": (lambda: vault.clock(ANSWER), "holds", "agrees"),
    "clock ahead": (lambda: vault.clock(replace(ANSWER, theirs=NOW - 60)), "missing", "ahead"),
    "clock behind": (lambda: vault.clock(replace(ANSWER, theirs=NOW + 60)), "missing", "behind"),
    "clock unknown": (lambda: vault.clock(replace(ANSWER, theirs=None)), "unclear", "no date"),
    "clock without Vault": (lambda: vault.clock(replace(ANSWER, failure="x")), "unclear", "did not answer"),
    "Ray": (lambda: software.ray_version("2.60.0", ["ray>=2.56", "numpy>=2"]), "holds", "2.60.0"),
    "Ray old": (lambda: software.ray_version("2.9.3", ["ray>=2.56"]), "missing", "older than 2.56"),
    "Ray missing": (lambda: software.ray_version(None, ["ray>=2.56"]), "missing", "not installed"),
    "Ray's floor unknown": (lambda: software.ray_version("2.60.0", ["numpy>=2"]), "unclear", "not known"),
    "Ray plain": (lambda: software.plain_ray(["aiohttp"]), "holds", "opencensus"),
    "Ray with agents": (lambda: software.plain_ray([*software.AGENT_MODULES, "x"]), "missing", "ray[default]"),
    "GPU": (lambda: gpu(), "holds", "H100, with CuPy"),
    "GPU none": (lambda: gpu(devices=0), "missing", "/dev/nvidia"),
    "GPU without driver": (lambda: gpu("numpy stand-in"), "missing", "tells of no GPU"),
    "GPU without CuPy": (lambda: gpu(cupy=False), "missing", "CuPy is not installed"),
    "rules": (lambda: software.firewall("loaded"), "holds", "inet ray_gpu"),
    "rules missing": (lambda: software.firewall("not loaded"), "missing", "no table"),
    "rules without nft": (lambda: software.firewall("no nft"), "missing", "not installed"),
    "rules hidden": (lambda: software.firewall("refused"), "unclear", "only root"),
    "kernels none": (lambda: running(), "holds", "none"),
    "kernels by sockets": (lambda: running("ipc", "ipc"), "holds", "2 running"),
    "kernels by TCP": (lambda: running("ipc", "tcp", "unknown"), "missing", "process 1"),
    "kernels unknown": (lambda: running("ipc", "unknown"), "unclear", "process 1"),
}  # fmt: skip


@pytest.mark.parametrize(("check", "state", "word"), CASES.values(), ids=CASES)
def test_check(check: Callable[[], Finding], state: str, word: str) -> None:
    """A check finds what is there, names it, and says what to do unless it holds."""
    found = check()

    assert (found.state, word in found.found) == (state, True), found
    assert found.control in CONTROLS
    assert (found.fix == "") == (state == "holds")
    assert found.fix == "" or found.fix.endswith(".")


def test_every_check_was_tried_both_ways() -> None:
    """Each control that the doctor looks at has a case here in which it holds, and one in which it does not."""
    seen: dict[str, set[bool]] = {}
    for check, state, _ in CASES.values():
        seen.setdefault(check().control, set()).add(state == "holds")
    apart = {"credentials-open", "embedded-vault"}  # below; and always missing where there is one

    assert [control for control, ways in seen.items() if ways != {True, False}] == []
    assert set(seen) | apart == set(ROLES)


# -- files --------------------------------------------------------------------------------------


REGULAR, DIRECTORY = stat.S_IFREG, stat.S_IFDIR


@pytest.mark.parametrize(
    ("mode", "uid", "above", "state", "word"),
    [
        (REGULAR | 0o600, 0, DIRECTORY | 0o755, "holds", "its owner's alone"),
        (REGULAR | 0o400, 0, DIRECTORY | 0o755, "holds", "its owner's alone"),
        (REGULAR | 0o640, 0, DIRECTORY | 0o755, "missing", "mode 640"),
        (REGULAR | 0o604, 0, DIRECTORY | 0o755, "missing", "mode 604"),
        (REGULAR | 0o600, 1000, DIRECTORY | 0o755, "missing", "belongs to uid 1000"),
        (REGULAR | 0o600, 0, DIRECTORY | 0o777, "missing", "/d, above it"),
        (REGULAR | 0o600, 0, DIRECTORY | 0o1777, "holds", "its owner's alone"),
        (stat.S_IFLNK | 0o777, 0, DIRECTORY | 0o755, "missing", "no plain file"),
        (DIRECTORY | 0o755, 0, DIRECTORY | 0o755, "missing", "mode 755"),
    ],
)
def test_private_file(mode: int, uid: int, above: int, state: str, word: str) -> None:
    """A login is a plain file of its owner's, which nobody else reads or replaces."""
    file = FileFacts(path="/d/login", mode=mode, uid=uid)
    found = files.private_file("login", file, [FileFacts(path="/d", mode=above, uid=0)], owners=(0,))

    assert (found.state, word in found.found) == (state, True), found


def test_private_file_in_somebody_elses_directory() -> None:
    """Whoever owns a directory above can put another file there; who owns the file may own the directory."""
    file = FileFacts(path="/d/login", mode=REGULAR | 0o600, uid=7)
    above = [FileFacts(path="/d", mode=DIRECTORY | 0o755, uid=7)]

    assert files.private_file("login", file, above, owners=(7,)).state == "holds"
    assert files.private_file("login", file, [replace(above[0], uid=8)], owners=(7,)).state == "missing"
    assert files.private_file("login", None, above, owners=(7,)).fix == "Write it with `ray-gpu vault issue`."


def test_files_below_a_root(tmp_path: Path) -> None:
    """Files are read below the root that was given, as they are: a link is a link."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/swaps").write_text(f"{SWAPS}\n")
    (tmp_path / "proc/link").symlink_to("swaps")
    here = Files(tmp_path)

    assert here.text("/proc/swaps") == SWAPS
    assert here.text("/proc/none") is None
    assert here.facts("/proc/none") is None
    link = here.facts("/proc/link")
    assert link is not None
    assert stat.S_ISLNK(link.mode)
    assert [facts.path for facts in here.above("/proc/link")] == ["/proc", "/"]


# -- control groups -----------------------------------------------------------------------------


def groups_at(root: Path, mounts: str, contents: dict[str, str]) -> kernel.Groups | None:
    """Return the groups of a host with these mounts and these files in /g."""
    (root / "proc").mkdir()
    (root / "proc/mounts").write_text(mounts)
    for name, text in {"x/y": "", **contents}.items():
        (root / "g" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "g" / name).write_text(text)
    return kernel.find_groups(Files(root))


V2 = "cgroup2 /g cgroup2 rw 0 0"


@pytest.mark.parametrize(
    ("mounts", "contents", "usable", "swap_control"),
    [
        ("none /g cgroup rw,memory 0 0", {}, True, False),
        ("none /g cgroup rw,memory 0 0", {"memory.memsw.limit_in_bytes": "1"}, True, True),
        (V2, {"cgroup.controllers": "cpu memory"}, True, False),
        (V2, {"cgroup.controllers": "memory", "x/memory.swap.max": "max"}, True, True),
        # In a container that has processes at its top, the kernel hands no controller down.
        (V2, {"cgroup.controllers": "memory", "cgroup.type": "domain", "cgroup.procs": "1\n"}, False, False),
        (V2, {"cgroup.controllers": "memory", "cgroup.type": "domain", "cgroup.procs": ""}, True, False),
        (V2, {"cgroup.controllers": "memory", "cgroup.type": "domain", "cgroup.procs": "1\n",
              "cgroup.subtree_control": "memory"}, True, False),
    ],
)  # fmt: skip
def test_groups(tmp_path: Path, mounts: str, contents: dict[str, str], usable: bool, swap_control: bool) -> None:
    """Version, use and swap accounting are seen without making a group."""
    found = groups_at(tmp_path, mounts, contents)

    assert found is not None
    assert (found.usable, found.swap_control) == (usable, swap_control)
    assert sorted(path.name for path in (tmp_path / "g").iterdir() if path.is_dir()) == ["x"]


@pytest.mark.parametrize("mounts", ["none /g cgroup rw,cpu 0 0", V2, "tmpfs /g tmpfs rw 0 0", ""])
def test_no_groups(tmp_path: Path, mounts: str) -> None:
    """Where no memory controller is mounted, there are none."""
    assert groups_at(tmp_path, mounts, {"cgroup.controllers": "cpu"}) is None


# -- Jupyter kernels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "connection", "transport"),
    [
        (["python", "-m", "ipykernel_launcher", "-f", "/k.json"], {"transport": "tcp"}, "tcp"),
        (["python", "-m", "ipykernel_launcher", "-f", "/k.json"], {"transport": "ipc"}, "ipc"),
        (["python", "-m", "ipykernel_launcher", "--f=/k.json"], {"transport": "ipc"}, "ipc"),
        (["python", "-m", "ipykernel_launcher", "-f", "/k.json"], None, "unknown"),
        (["python", "-m", "ipykernel_launcher", "-f", "/k.json"], "text", "unknown"),
        (["python", "-m", "ipykernel"], None, "tcp"),
        (["python", "-m", "ipykernel", "--transport=ipc"], None, "ipc"),
        (["python", "-m", "ipykernel", "--IPKernelApp.transport=tcp"], None, "tcp"),
        (["python", "-m", "jupyterlab"], None, ""),
        (["python", "/lib/ipykernel_launcher.py", "-f", "/k.json"], {"transport": "tcp"}, "tcp"),
        (["R", "--slave", "-e", "IRkernel::main()", "--args", "/k.json"], {"transport": "tcp"}, "tcp"),
        (["/usr/bin/xpython", "-f", "/k.json"], {"transport": "ipc"}, "ipc"),
        (["python", "-m", "pip", "install", "ipykernel"], None, ""),
        (["vim", "notes-about-ipykernel_launcher.txt"], None, ""),
    ],
)
def test_kernel(tmp_path: Path, words: list[str], connection: Any, transport: str) -> None:
    """A kernel's transport is what its command line or its connection file says; told nothing, it uses TCP."""
    process = tmp_path / "proc/4711"
    process.mkdir(parents=True)
    (process / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    if connection is not None:
        (tmp_path / "k.json").write_text(connection if connection == "text" else json.dumps(connection))

    assert [kernel.transport for kernel in notebooks.find(Files(tmp_path))] == ([transport] if transport else [])


def test_own_process_is_no_kernel() -> None:
    """The look at the real /proc finds processes, and takes none for a kernel that is none."""
    assert not any(found.pid == os.getpid() for found in notebooks.find(Files()))


# -- judgement ----------------------------------------------------------------------------------


def test_judgement_depends_on_the_role() -> None:
    """What is missing fails a role that needs it, is weaker where it is only looked at, and silent elsewhere."""
    bare, hidden, fine = missing("swap-on", "swap", "x"), unclear("swap-on", "swap", "x"), holds("swap-on", "swap", "x")

    def words(*roles: Any) -> list[str]:
        return [line.word for line in judge([bare, hidden, fine], roles)]

    assert words("gpu") == ["missing", "unclear", "ok"]
    assert words("gateway") == ["weaker", "weaker", "ok"]
    assert words("zone", "gpu") == ["missing", "unclear", "ok"]
    assert words("head") == []


def test_no_fix_names_a_command_that_is_not_there() -> None:
    """Fixes name commands of this project that exist."""
    from ray_gpu.cli.main import cli

    said = " ".join(control.fix for control in CONTROLS.values())
    assert set(re.findall(r"ray-gpu ([a-z]+)", said)) <= set(cli.commands)
