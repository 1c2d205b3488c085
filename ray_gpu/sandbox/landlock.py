"""Landlock through raw system calls: file access, TCP, abstract sockets and signals. This module does I/O.

Source: linux/landlock.h and Documentation/userspace-api/landlock.rst. Each ABI version adds
rights; all that the running kernel knows are handled, so that what is not granted is refused.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from pathlib import Path

# The numbers are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK, _TRUNCATE, _IOCTL_DEV = 1 << 6, 1 << 11, 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
#: Rights that the kernel accepts for something that is not a directory.
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
#: Number of file rights by ABI version; the latest known stands for later ones.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
#: Bind and connect TCP (ABI 4), and the scopes abstract Unix sockets and signals (ABI 6).
_TCP, _SCOPES = 0b11, 0b11

_libc = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def abi() -> int:
    """Return the kernel's Landlock ABI version, 0 when it has none."""
    return max(0, int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))))


def restrict(*, read: Iterable[Path], write: Iterable[Path], allow_tcp: bool = False) -> None:
    """Confine the calling thread, and what it starts later, for good. Needs ``no_new_privs``.

    Args:
        read: Files and trees that may be read and executed. What does not exist is left out.
        write: Files and trees that may be read and changed, not executed; device nodes with their ioctls.
        allow_tcp: Whether TCP ports may be bound and connected.

    Raises:
        OSError: The kernel has no Landlock, or refused.
    """
    version = abi()
    if version == 0:
        raise OSError("this kernel has no Landlock; see the control no-landlock")
    handled = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    net = _TCP if version >= 4 and not allow_tcp else 0
    attributes = _Ruleset(handled, net, _SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _checked(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for path in read:
            _allow(ruleset, path, handled & _READ)
        for path in write:
            _allow(ruleset, path, handled & ~(_EXECUTE | _MAKE_CHAR | _MAKE_BLOCK))
        _checked(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISDIR(mode):
            rights &= _ON_FILES
        if not stat.S_ISCHR(mode):
            rights &= ~_IOCTL_DEV
        rule = _PathRule(rights, fd)
        _checked(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(fd)


def _checked(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
