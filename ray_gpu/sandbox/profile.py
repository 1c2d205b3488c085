"""What a confined process gets: profiles, and the four that this project uses.

A profile names everything that crosses the boundary; what it does not name is not there.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ray_gpu.sandbox.seccomp import Kind

#: Most processes and threads of one lease; OpenBLAS and CUDA start one or two per core.
MAX_PROCESSES = 1024
#: Room in a sandbox's /tmp, bytes. Counted in the lease's memory as it is used.
TMP_BYTES = 256 << 20
#: Room in the /dev/shm of a sandbox with a GPU, where CUDA keeps a small file. Bytes, counted as above.
SHM_BYTES = 64 << 20
#: What CUDA reads of the host: which kernel modules, GPUs, processors and memory there are. It does not start without.
CUDA_FILES = ("bus/pci", "devices/pci*", "devices/system/cpu", "devices/system/memory", "devices/system/node",
              "module/nvidia*")  # fmt: skip
#: Where containers put the driver's libraries, outside the loader's own list.
CUDA_LIBRARIES = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib")
CUDA_TOOLKIT = Path("/usr/local/cuda")
#: What every program needs of the distribution. Passwords, host names and keys are not among it.
SYSTEM = tuple(map(Path, ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")))
SYSTEM_FILES = (Path("/etc/ld.so.cache"), Path("/etc/alternatives"))
#: What a process that may use the network needs to find names and check certificates.
NETWORK_FILES = tuple(map(Path, ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl/certs")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one confined process gets."""

    #: For people and for the group's directory: a lease or node id.
    name: str
    #: Whose system call filter belongs to it.
    kind: Kind
    #: Uid and gid to run under; used, and required, when the launcher is root.
    uid: int | None = None
    #: The same number as *uid* when ``None``.
    gid: int | None = None
    #: Whether it stays in the host's network namespace.
    network: bool = False
    #: Directory of packages that takes the place of this Python's own, which are not there then.
    site: Path | None = None
    #: Paths shown read-only, at the same place, on top of the system and :func:`runtime_paths`.
    bind_ro: tuple[Path, ...] = ()
    #: Host path and place inside, writable. Without bubblewrap both must be the same.
    bind_rw: tuple[tuple[Path, Path], ...] = ()
    #: Place inside to size in bytes: private memory file systems, writable for every uid inside.
    #: Without bubblewrap they are not there, and nothing takes their place.
    tmpfs: Mapping[str, int] = field(default_factory=dict)
    #: Descriptors it inherits besides 0, 1 and 2.
    keep_fds: tuple[int, ...] = ()
    #: Cap on memory, page cache and tmpfs included, by cgroup. Swap is then zero where the host can.
    memory_bytes: int | None = None
    #: Cap on processes and threads.
    processes: int | None = None
    #: Device nodes shown besides null, zero, full, random, urandom and tty.
    devices: tuple[Path, ...] = ()
    #: Its whole environment. Never a secret: the launcher's command line shows it.
    env: Mapping[str, str] = field(default_factory=dict)

    def readable(self) -> tuple[Path, ...]:
        """Return what it may read besides the system."""
        packages = () if self.site is None else (self.site,)
        return (*runtime_paths(packages=self.site is None), *packages, *self.bind_ro)


def sandbox(
    name: str,
    *,
    uid: int | None,
    memory_bytes: int | None,
    keep_fds: tuple[int, ...],
    devices: tuple[Path, ...] = (),
    site: Path | None = None,
) -> Profile:
    """Return the profile for user code: no network, nothing writable but its own /tmp, and with a GPU /dev/shm.

    With *site*, the packages of that directory are there and no others. What scikit-learn and SciPy need to work on a
    GPU's arrays (``array_api_dispatch=True``) is switched on; joblib's processes, for which there is no place, are off.
    """
    gpu = bool(devices)
    tmpfs = {"/tmp": TMP_BYTES, **({"/dev/shm": SHM_BYTES} if gpu else {})}
    return Profile(
        name=name, kind="sandbox", uid=uid, memory_bytes=memory_bytes, processes=MAX_PROCESSES, keep_fds=keep_fds,
        site=site, bind_ro=cuda_files() if gpu else (), tmpfs=tmpfs,
        devices=devices,
        env={**python_env(site), "SCIPY_ARRAY_API": "1", "JOBLIB_MULTIPROCESSING": "0", **(cuda_env() if gpu else {})},
    )  # fmt: skip


def keeper(name: str, *, uid: int | None, memory_bytes: int | None, keep_fds: tuple[int, ...]) -> Profile:
    """Return the profile for a keeper: no network but the descriptors it is given, nothing writable."""
    return Profile(
        name=name, kind="keeper", uid=uid, memory_bytes=memory_bytes, processes=MAX_PROCESSES, keep_fds=keep_fds,
        env=python_env(),
    )  # fmt: skip


def cage(
    name: str,
    *,
    uid: int | None,
    bind_rw: tuple[tuple[Path, Path], ...] = (),
    tmpfs: Mapping[str, int],
    env: Mapping[str, str],
    network: bool,
) -> Profile:
    """Return the profile for a Ray node: its own files, and the host's network or, without *network*, one of its own.

    Ray needs ``"/dev/shm"`` among *tmpfs*, sized for its object store.
    """
    # Without a name server a name is looked for in vain at once, instead of until a time limit.
    readable = NETWORK_FILES if network else tuple(path for path in NETWORK_FILES if path.name != "resolv.conf")
    return Profile(
        name=name, kind="cage", uid=uid, network=network, bind_ro=readable, bind_rw=bind_rw, tmpfs=tmpfs,
        env={**python_env(), **env},
    )  # fmt: skip


def gateway(
    name: str, *, uid: int | None, bind_ro: tuple[Path, ...], bind_rw: tuple[tuple[Path, Path], ...], caged: bool,
    memory_bytes: int | None = None,
) -> Profile:  # fmt: skip
    """Return the profile for a zone's gateway: the host's network, its own files, and those it must read."""
    roots = () if caged else package_roots()
    return Profile(
        name=name, kind="cage", uid=uid, network=True, bind_ro=(*NETWORK_FILES, *bind_ro, *roots),
        bind_rw=bind_rw, tmpfs={"/tmp": 16 << 20} if caged else {}, env=python_env(), memory_bytes=memory_bytes,
    )  # fmt: skip


@functools.cache
def package_paths() -> tuple[Path, ...]:
    """Return the directories of the packages ``zones`` and ``ray_gpu``, and nothing else of a checkout."""
    found = []
    for name in ("zones", "ray_gpu"):
        spec = importlib.util.find_spec(name)
        found += [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    return tuple(found)


@functools.cache
def package_roots() -> tuple[Path, ...]:
    """Return the directories of a checkout that these packages are in."""
    return tuple(dict.fromkeys(path.parent for path in package_paths() if not path.is_relative_to(sys.prefix)))


@functools.cache
def runtime_paths(*, packages: bool = True) -> tuple[Path, ...]:
    """Return what to show read-only so that this Python, its environment and this project run.

    Without *packages*, those that are installed in the environment are left out.
    """
    python = Path(sys.executable).resolve().parents[1]
    wanted = [Path(sys.base_prefix), Path(sys.base_prefix).resolve(), python, *package_paths()]
    wanted += [Path(sys.prefix)] if packages else []
    outside = [p for p in dict.fromkeys(wanted) if not p.is_relative_to("/usr") and p != Path("/")]
    return tuple(p for p in outside if not any(p != other and p.is_relative_to(other) for other in outside))


def cuda_files() -> tuple[Path, ...]:
    """Return what CUDA reads of this host's /sys. Not all of it: the rest names other leases and the network."""
    return tuple(path for pattern in CUDA_FILES for path in sorted(Path("/sys").glob(pattern)))


def cuda_env() -> dict[str, str]:
    """Return what the environment adds for CUDA: where the driver's and the toolkit's libraries are."""
    places = [place for place in CUDA_LIBRARIES if Path(place, "libcuda.so.1").exists()]
    found = {"LD_LIBRARY_PATH": ":".join(places)} if places else {}
    return {**found, "CUDA_PATH": str(CUDA_TOOLKIT)} if CUDA_TOOLKIT.is_dir() else found


def python_env(site: Path | None = None) -> dict[str, str]:
    """Return the environment of a confined Python; with *site*, of one that imports from there."""
    # Of this project's directories nothing but its packages is shown where another's are imported.
    places = package_roots() if site is None else (site, *dict.fromkeys(path.parent for path in package_paths()))
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONPATH": ":".join(map(str, places)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        # Leases share a node's cores; a library that takes them all for one spins against the others.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # Compiled kernels stay in memory: they can tell what was computed.
        "CUPY_CACHE_IN_MEMORY": "1",
        "CUDA_CACHE_DISABLE": "1",
    }
