"""How one of our processes gives another its login: in memory, by standard input, never in a file or an environment.

Makes a memory file; reads and closes standard input.
"""

from __future__ import annotations

import os
import sys

from zones.errors import ConfigError

#: A secret id is some 40 bytes.
_MOST_BYTES = 4096


def secret_file(secret: str) -> int:
    """Return a descriptor whose content is *secret*, to start a process with as its standard input.

    The caller closes it once the process has started; the memory goes with the last descriptor.
    """
    fd = os.memfd_create("login", os.MFD_CLOEXEC)
    os.write(fd, secret.encode("ascii"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def take_secret() -> str:
    """Return what this process was started with, and let go of it: nothing started later inherits it.

    Raises:
        ConfigError: There is nothing.
    """
    secret = sys.stdin.read(_MOST_BYTES)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if not secret:
        raise ConfigError("no secret came by standard input; start this process with `ray-gpu`", file=None)
    return secret
