"""What a notebook may ask of a gateway, checked field by field. Pure.

Everything here comes from a process that the zone does not trust. A request names its data
(a catalog handle, or a sealed memory file), and carries the function and arguments as bytes
that the gateway never unpickles.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import Any

from zones.errors import FunctionRefusedError

#: Largest function with its closure, globals and defaults, bytes.
MAX_FUNCTION_BYTES = 64 << 10
#: Largest encoded arguments that fit a message; larger values belong into a data set.
MAX_ARGUMENT_BYTES = 768 << 10
#: Shard sizes that make sense: below, calls cost more than bytes; above, nothing is won.
MIN_SHARD_BYTES, DEFAULT_SHARD_BYTES, MAX_SHARD_BYTES = 64 << 10, 4 << 20, 32 << 20


class Mode(str, Enum):
    """What a call means."""

    #: Row-aligned: N rows in, N rows out.
    MAP = "map"
    #: One value per shard, for a reduction in the notebook.
    SHARDS = "shards"
    #: One call on arguments alone.
    CALL = "call"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a call, as ``@gpu_remote`` and ``.options`` take them."""

    pool: str = ""
    #: Thousandths of a GPU for each actor.
    gpu_milli: int = 1000
    #: GPU actors that work at once.
    concurrency: int = 2
    #: Columns that leave; ``None`` means all of the data's.
    columns: tuple[str, ...] | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    #: Seconds until the call is given up; ``None`` means never.
    timeout_s: float | None = None
    #: Seconds to wait for a GPU node with room.
    placement_timeout_s: float = 30.0
    #: Send all rows as one shard, whatever their size.
    whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One call."""

    mode: Mode
    function: bytes
    #: Qualified name, for the screen only; the ledger has the digest.
    function_name: str
    arguments: bytes
    #: A catalog handle's document, ``{"memory": true}`` for a memory file, or ``None`` without data.
    data: dict[str, Any] | None
    options: Options

    @property
    def function_digest(self) -> str:
        """SHA-256 of the function's bytes, hexadecimal."""
        return hashlib.sha256(self.function).hexdigest()


def parse(message: dict[str, Any]) -> Request:
    """Build a request from a notebook's message.

    Raises:
        FunctionRefusedError: Function or arguments are over their caps.
        ValueError: A field is missing or of another type.
    """
    function, arguments = message.get("function"), message.get("arguments")
    if not isinstance(function, bytes) or not isinstance(arguments, bytes):
        raise ValueError("function and arguments must be bytes")
    if len(function) > MAX_FUNCTION_BYTES:
        raise FunctionRefusedError(
            f"the function with everything it captures has {len(function)} bytes, over the cap of {MAX_FUNCTION_BYTES}; "
            "pass large values as arguments or read them from a data set", variable=None)
    if len(arguments) > MAX_ARGUMENT_BYTES:
        raise FunctionRefusedError(
            f"the arguments have {len(arguments)} bytes, over the cap of {MAX_ARGUMENT_BYTES}; "
            "pass tables and large arrays as data", variable=None)
    data = message.get("data")
    if data is not None and not isinstance(data, dict):
        raise ValueError("data must be a map")
    mode = Mode(message.get("mode"))
    if (data is None) != (mode is Mode.CALL):
        raise ValueError("map and shards need data; call takes none")
    return Request(mode=mode, function=function, function_name=str(message.get("name", "function"))[:120],
                   arguments=arguments, data=data, options=_options(dict(message.get("options") or {})))


def _options(given: dict[str, Any]) -> Options:
    columns = given.pop("columns", None)
    options = Options(**given, columns=None if columns is None else tuple(str(name) for name in columns))
    if not isinstance(options.pool, str) or type(options.gpu_milli) is not int or options.gpu_milli < 1:
        raise ValueError("pool must be a name and num_gpus a positive number of thousandths")
    if type(options.concurrency) is not int or not 1 <= options.concurrency <= 64:
        raise ValueError("concurrency must be 1 to 64")
    if type(options.shard_bytes) is not int or not MIN_SHARD_BYTES <= options.shard_bytes <= MAX_SHARD_BYTES:
        raise ValueError(f"shard_bytes must be {MIN_SHARD_BYTES} to {MAX_SHARD_BYTES}")
    return options
