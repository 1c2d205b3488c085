"""Values that many calls get: sealed and sent to each lease once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ray_gpu.arrays import to_host
from ray_gpu.share import share_value
from zones.errors import ValueRefusedError

if TYPE_CHECKING:
    from ray_gpu.client import Session


class Broadcast:
    """A value that calls of a session take as an argument, as :meth:`Session.broadcast` returns it.

    Each lease is sent it once, sealed, with the first call that takes it; functions get the value itself, whose arrays
    cannot be written to.
    """

    def __init__(self, session: Session, value: Any) -> None:
        self._session = session
        #: The value, here in the zone.
        self.value = value
        fd = share_value(to_host(value), what="the value to broadcast")
        try:
            reply, _ = session.ask({"op": "broadcast"}, (fd,))
        finally:
            os.close(fd)
        #: SHA-256 of the encoded value, hexadecimal.
        self.digest = str(reply["digest"])
        self.size_bytes = int(reply["bytes"])

    def __reduce__(self) -> Any:
        raise TypeError("a broadcast is an argument of a call of its session, and does not travel inside a function")

    def __repr__(self) -> str:
        return f"<Broadcast of {self.size_bytes:,} bytes>"


def taken_out(
    args: tuple[Any, ...], kwargs: dict[str, Any], session: Session
) -> tuple[tuple[Any, ...], dict[str, Any], dict[int | str, str]]:
    """Return arguments without broadcasts, and the digests of those: by position, or by name.

    Raises:
        ValueRefusedError: One is of another session.
    """
    named: dict[int | str, Any] = dict(enumerate(args))
    named.update(kwargs)
    found = {where: one for where, one in named.items() if isinstance(one, Broadcast)}
    for one in found.values():
        if one._session is not session:
            raise ValueRefusedError("a broadcast is of the session that made it; broadcast the value in this one too")
    if not found:
        return args, kwargs, {}
    left = tuple(None if where in found else arg for where, arg in enumerate(args))
    rest = {name: arg for name, arg in kwargs.items() if name not in found}
    return left, rest, {where: one.digest for where, one in found.items()}


def here(value: Any) -> Any:
    """Return a broadcast's value, and any other as it is: for what runs in the zone."""
    return value.value if isinstance(value, Broadcast) else value
