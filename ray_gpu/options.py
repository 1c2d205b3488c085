"""Options of a remote function, checked where they are written. Pure."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ray_gpu.handle import column_names
from ray_gpu.request import (
    DEFAULT_SHARD_BYTES,
    MAX_CONCURRENCY,
    MAX_RETRIES,
    MAX_SHARD_BYTES,
    MAX_WAIT_S,
    MIN_SHARD_BYTES,
)

if TYPE_CHECKING:
    from ray_gpu.client import Session


#: What the option ``where`` can be.
PLACES = ("remote", "local", "auto")


#: What Ray and Modal call an option that is here under another name.
_ELSEWHERE = {
    "gpu": "num_gpus",
    "num_cpus": "num_gpus",
    "image": "environment",
    "runtime_env": "environment",
    "py_modules": "modules",
    "accelerator_type": "pool",
    "label_selector": "pool",
    "max_containers": "concurrency",
    "max_concurrency": "concurrency",
    "timeout": "timeout_s",
    "retries": "max_retries",
    "max_task_retries": "max_retries",
    "batch_size": "shard_bytes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionOptions:
    """Options of a remote function or class.

    Args:
        num_gpus: Fraction or number of GPUs for each actor.
        pool: Pool of GPU nodes; the zone's first one by default.
        concurrency: GPU actors that work at once; of a class, those that its instances are made on.
        columns: Columns that leave; by default all that the data has.
        keep_together: Column whose equal values mark rows that stay in one shard, such as a patient's number. It does
            not leave unless it is one of *columns*; policy is asked about its class all the same.
        categories: Columns of categories whose values the function needs: ``batch.to_arrow()`` then has them. By
            default categories leave as codes alone.
        resident: Keep shards open in the sandboxes of this session's leases after the call: a further call on the same
            rows, of this function or another with this option, then sends none of those that are open still. Policy
            has to allow it.
        shard_bytes: Size of a shard before padding, bytes.
        halve_shards: Where the function finds too little memory for a shard, in ``.map`` or ``.map_reduce``, make the
            call again with shards of half the size, and again, down to 64 KiB. The memory of GPUs and of Python counts;
            a sandbox that its node kills for memory is a lost lease.
        timeout_s: Seconds until the call is stopped; ``None`` means never.
        max_retries: How often ``f.remote`` on arguments alone is made again, after longer and longer waits, when its
            node, sandbox or connection was lost in the middle: a function that has effects may then have had them
            twice. What the function raises is never tried again. Shards of data always go to another node.
        placement_timeout_s: Seconds to wait for a GPU node with room.
        environment: What the function can import: the name of an environment that the zone knows, or the digest of one
            that the nodes' operator published; by default the nodes' own Python.
        modules: Modules of your own that the function imports while it runs, such as ``[mymodule]``, with all modules
            of their packages. Their source is sent with the function. What the function names itself, goes without.
        session: Session to use; by default the data's, or else the one attached last.
        where: ``"remote"``: on GPU nodes. ``"local"``: here, in this process, and no row leaves. ``"auto"``: where it
            is predicted to be faster (:mod:`ray_gpu.where`). For that the function may run here a few times more, on
            some of the rows: one that has effects has them each time. Not for classes, whose state is on nodes.

    Raises:
        TypeError: A value has another type than its option.
        ValueError: A value is outside of what its option can be.
    """

    num_gpus: float = 1.0
    pool: str = ""
    concurrency: int = 2
    columns: tuple[str, ...] | None = None
    keep_together: str | None = None
    categories: tuple[str, ...] | None = None
    resident: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    halve_shards: bool = False
    timeout_s: float | None = None
    max_retries: int = 0
    placement_timeout_s: float = 30.0
    environment: str = ""
    modules: tuple[ModuleType, ...] = ()
    session: Session | None = None
    where: str = "remote"

    def __post_init__(self) -> None:
        if not isinstance(self.pool, str):
            raise TypeError(f'pool is a name, as in pool="shared", not {self.pool!r}')
        if not isinstance(self.environment, str):
            raise TypeError(f'environment is a name or a digest, as in environment="torch", not {self.environment!r}')
        if not all(isinstance(module, ModuleType) for module in self.modules):
            raise TypeError(f"modules is a list of modules, as in modules=[mymodule], not {self.modules!r}")
        if not isinstance(self.keep_together, (str, type(None))):
            raise TypeError(f'keep_together is a column, as in keep_together="patient", not {self.keep_together!r}')
        for name in ("resident", "halve_shards"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False, not {getattr(self, name)!r}")
        if self.where not in PLACES:
            near = difflib.get_close_matches(str(self.where), PLACES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"where is {', '.join(map(repr, PLACES[:-1]))} or {PLACES[-1]!r}, not {self.where!r}{hint}"
            )
        _check_gpus(self.num_gpus)
        _check_whole("concurrency", self.concurrency, 1, MAX_CONCURRENCY)
        _check_whole("max_retries", self.max_retries, 0, MAX_RETRIES)
        _check_whole("shard_bytes", self.shard_bytes, MIN_SHARD_BYTES, MAX_SHARD_BYTES)
        if self.timeout_s is not None:
            _check_seconds("timeout_s", self.timeout_s)
        _check_seconds("placement_timeout_s", self.placement_timeout_s)
        if self.session is not None and not hasattr(self.session, "take_connection"):
            raise TypeError("session is what ray_gpu.attach(...) returned")

    def document(self) -> dict[str, Any]:
        """Return what the gateway gets."""
        return {
            "pool": self.pool,
            "gpu_milli": round(self.num_gpus * 1000),
            "concurrency": self.concurrency,
            "columns": None if self.columns is None else list(self.columns),
            "keep_together": self.keep_together,
            "categories": None if self.categories is None else list(self.categories),
            "resident": self.resident,
            "shard_bytes": self.shard_bytes,
            "max_retries": self.max_retries,
            "timeout_s": self.timeout_s,
            "placement_timeout_s": self.placement_timeout_s,
            "environment": self.environment,
        }


def with_options(base: FunctionOptions, changes: dict[str, Any]) -> FunctionOptions:
    """Return *base* with *changes*.

    Raises:
        TypeError: No such option, whose nearest valid name is in the message, or a value of another type.
        ValueError: A value that the option cannot have.
    """
    known = FunctionOptions.__dataclass_fields__
    for name in changes:
        if name not in known:
            near = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"options are {', '.join(known)}"
            raise TypeError(f"gpu_remote has no option {name!r}; {hint}")
    given = [name for name in ("columns", "categories") if changes.get(name) is not None]
    listed: dict[str, Any] = {name: column_names(changes[name]) for name in given}
    if isinstance(changes.get("modules"), list):
        listed["modules"] = tuple(changes["modules"])
    return replace(base, **changes | listed)


def check_remote(name: str, options: FunctionOptions) -> None:
    """Raise if a class, whose state is on nodes, shall run elsewhere.

    Raises:
        ValueError: It shall.
    """
    if options.where != "remote":
        raise ValueError(
            f"where={options.where!r} is for functions, and {name} is a class, whose instances keep their state on GPU "
            f"nodes; take it away, or make an instance here with {name}(...)"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_gpus(value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f"num_gpus is a number, for example 0.5 or 1, not {value!r}")
    if not 0.001 <= value <= 64:
        raise ValueError(f"num_gpus is from 0.001 to 64, for example 0.5 or 1, not {value!r}")
    if value > 1 and value != int(value):
        raise ValueError(f"num_gpus above 1 is a whole number, for example {math.ceil(value)}, not {value!r}")


def _check_whole(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} is from {least} to {most}, not {value}")


def _check_seconds(name: str, value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f"{name} is a number of seconds, not {value!r}")
    if not 0 < value <= MAX_WAIT_S:
        raise ValueError(f"{name} is a number of seconds above 0 and at most {MAX_WAIT_S}, not {value!r}")
