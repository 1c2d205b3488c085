"""System call filters: compiled by libseccomp in the launcher, loaded by the kernel in the child.

Owner of ``pyseccomp``. The launcher compiles because looking for libseccomp starts a process,
which costs each sandbox more than everything else here. A filter is a list of what is refused:
an allow list that CUDA, NumPy and Arrow live with does not stay true between their releases.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
from typing import Literal

#: Whom a filter is for. ``"cage"`` is for Ray nodes and the gateway: they need sockets.
Kind = Literal["sandbox", "keeper", "cage"]

_REFUSED = """
    ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp process_madvise
    bpf perf_event_open userfaultfd lookup_dcookie fanotify_init
    io_uring_setup io_uring_enter io_uring_register
    keyctl add_key request_key
    mount umount umount2 mount_setattr move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick
    pivot_root chroot unshare setns statmount listmount
    open_by_handle_at name_to_handle_at
    kexec_load kexec_file_load init_module finit_module delete_module create_module
    reboot swapon swapoff acct quotactl quotactl_fd nfsservctl
    settimeofday clock_settime clock_adjtime adjtimex stime sethostname setdomainname
    iopl ioperm modify_ldt vm86 vm86old personality uselib ustat sysfs _sysctl syslog vhangup
    shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
""".split()  # noqa: SIM905 - reads as a table
#: Ray's own process uses System V calls nowhere, but libraries that its users bring do.
_CAGE_NEEDS = frozenset("shmget shmat shmctl shmdt semget semop semctl semtimedop".split())  # noqa: SIM905 - reads as a table
_KEEPER_ALSO = ("execve", "execveat")
_LEAVES_GROUP = ("setsid", "setpgid")
#: Numbers for calls that an older libseccomp cannot name; from 424 on they are equal on every architecture.
_NUMBERS = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "clone3": 435, "pidfd_getfd": 438,
    "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443, "statmount": 457, "listmount": 458,
    "open_tree_attr": 467,
}  # fmt: skip
#: CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
_CLONE_NEW = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_CAGE_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _FILTER_MODE = 4, 22, 2
_LOW_32_BITS = 0xFFFFFFFF
#: The bits of a socket's type that are no flags.
_SOCKET_TYPES = 0xF


@functools.cache
def compile_filter(kind: Kind, *, gpu: bool = False, grouped: bool = False) -> bytes | None:
    """Return the classic BPF program for *kind*, or ``None`` when libseccomp is missing.

    Args:
        kind: Whom the filter is for.
        gpu: Whether a sandbox must be able to start CUDA.
        grouped: Whether it must stay in its process group, which is how it is ended where no namespace does it.
    """
    try:
        import pyseccomp  # noqa: PLC0415 - raises without libseccomp
    except (ImportError, RuntimeError, OSError):
        return None
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    refused = [name for name in _REFUSED if kind != "cage" or name not in _CAGE_NEEDS]
    for name in [*refused, *(_KEEPER_ALSO if kind == "keeper" else ()), *(_LEAVES_GROUP if grouped else ())]:
        _refuse(rules, name)
    # glibc falls back to clone, whose flags a filter can see.
    _refuse(rules, "clone3", code=errno.ENOSYS)
    for flag in _CLONE_NEW:
        _refuse(rules, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    for request in (_TIOCSTI, _TIOCLINUX):
        _refuse(rules, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, _LOW_32_BITS, request))
    if kind == "cage":
        _refuse_families(rules)
    else:
        _refuse_sockets(rules, gpu=gpu)
    with os.fdopen(os.memfd_create("filter", os.MFD_CLOEXEC), "r+b", 0) as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _refuse_sockets(rules: object, *, gpu: bool) -> None:
    """Refuse every new socket but a connected stream pair, and becoming dumpable again.

    CUDA does not start unless it can listen on an abstract Unix socket of type seqpacket, by which it
    would hand memory to other processes. It may, and nobody is ever accepted or connected to.
    """
    import pyseccomp  # noqa: PLC0415 - raises without libseccomp

    if gpu:
        _refuse(rules, "socket", pyseccomp.Arg(0, pyseccomp.NE, int(socket.AF_UNIX)))
        for kind in range(_SOCKET_TYPES + 1):
            if kind != socket.SOCK_SEQPACKET:
                _refuse(rules, "socket", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, _SOCKET_TYPES, kind))
        for name in ("connect", "accept", "accept4"):
            _refuse(rules, name)
    else:
        _refuse(rules, "socket")
    # A datagram socket of a pair can still send to any path; a stream one cannot.
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        _refuse(rules, "socketpair", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, _SOCKET_TYPES, kind))
    # A core dump piped to the host's handler ignores RLIMIT_CORE; only this flag stops it.
    dumpable = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _LOW_32_BITS, _PR_SET_DUMPABLE)
    _refuse(rules, "prctl", dumpable, pyseccomp.Arg(1, pyseccomp.NE, 0))


def _refuse_families(rules: object) -> None:
    """Refuse socket families beyond those that Ray uses."""
    import pyseccomp  # noqa: PLC0415 - raises without libseccomp

    allowed = sorted(int(family) for family in _CAGE_FAMILIES)
    for family in range(max(allowed)):
        if family not in allowed:
            _refuse(rules, "socket", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _LOW_32_BITS, family))
    _refuse(rules, "socket", pyseccomp.Arg(0, pyseccomp.GT, max(allowed)))


def _refuse(rules: object, name: str, *conditions: object, code: int = errno.EPERM) -> None:
    import pyseccomp  # noqa: PLC0415 - raises without libseccomp

    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    if number == -1:
        number = _NUMBERS.get(name, -1)
    if number >= 0:  # other negative numbers: this architecture has no such call
        rules.add_rule(pyseccomp.ERRNO(code), number, *conditions)  # type: ignore[attr-defined]  # pyseccomp has no stubs


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def load(program: bytes) -> None:
    """Put this thread, and what it starts later, under *program* for good. Needs ``no_new_privs``.

    Raises:
        OSError: The kernel refused the program.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    description = _Program(len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER_MODE), ctypes.byref(description), 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")
