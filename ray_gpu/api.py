"""``attach`` and ``@gpu_remote``: what a data scientist uses."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar, overload

import numpy as np
import pyarrow as pa

from ray_gpu import functions, progress
from ray_gpu.arrays import Batch, to_host
from ray_gpu.client import Call, Handle, Session, as_table
from ray_gpu.request import DEFAULT_SHARD_BYTES
from ray_gpu.state import default_state_dir
from zones import values
from zones.errors import GatewayUnavailableError, SessionClosedError, UnknownNameError
from zones.vault import Vault

P = ParamSpec("P")
R = TypeVar("R")

#: The session that functions use when they are not given one: the one attached last.
_sessions: list[Session] = []


def attach(zone: str, *, purpose: str = "", state_dir: Path | str | None = None, token: str | None = None) -> Session:
    """Open a session with a zone's gateway on this host; use it as a context manager.

    Args:
        zone: Name of the zone.
        purpose: What the work is for; policy may ask for it, and the ledger records it.
        state_dir: Where the zone's gateway has its socket; ``RAY_GPU_STATE`` or the default of ``ray-gpu up``.
        token: Vault token of the person; by default the login that ``ray-gpu up`` left for its user.

    Raises:
        UnknownNameError: No such zone on this host.
        GatewayUnavailableError: Its gateway does not run.
        VaultError: Vault is unreachable or sealed, or refuses the login.
    """
    state = Path(state_dir) if state_dir else default_state_dir()
    zones_here = sorted(path.parent.name for path in state.glob("zones/*/zone.json"))
    if zone not in zones_here:
        if not zones_here:
            raise GatewayUnavailableError(f"no gateway runs on this host (looked in {state}); start one with `ray-gpu up`")
        raise UnknownNameError.of("zone", zone, zones_here)
    public = json.loads((state / "zones" / zone / "zone.json").read_text(encoding="utf-8"))
    session = Session(Path(public["socket"]), token or _login(state, public), purpose)
    _sessions.append(session)
    return session


def _login(state: Path, public: dict[str, Any]) -> str:
    """Log in to Vault as the person that ``ray-gpu up`` made for whoever started it."""
    path = state / "person.json"
    try:
        person = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise GatewayUnavailableError(f"no login at {path}; pass token=..., from a Vault login of your own") from None
    vault = Vault(public["vault"], ca_file=public.get("vault_ca"))
    vault.login_userpass(person["user"], person["password"])
    return vault.token


def current_session() -> Session:
    """Return the session attached last that is still open.

    Raises:
        SessionClosedError: There is none.
    """
    while _sessions and _sessions[-1].closed:
        _sessions.pop()
    if not _sessions:
        raise SessionClosedError("no session is open; use `with ray_gpu.attach(\"<zone>\") as zone:`")
    return _sessions[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionOptions:
    """Options of a remote function."""

    #: Fraction or number of GPUs for each actor.
    num_gpus: float = 1.0
    #: Pool of GPU nodes; the zone's first one by default.
    pool: str = ""
    #: GPU actors that work at once.
    concurrency: int = 2
    #: Columns that leave; by default all that the data has.
    columns: tuple[str, ...] | None = None
    #: Size of a shard before padding, bytes.
    shard_bytes: int = DEFAULT_SHARD_BYTES
    #: Seconds until the call is stopped; ``None`` means never.
    timeout_s: float | None = None
    #: Seconds to wait for a GPU node with room.
    placement_timeout_s: float = 30.0
    #: Session to use; by default the one attached last.
    session: Session | None = None

    def document(self) -> dict[str, Any]:
        """Return what the gateway gets."""
        return {"pool": self.pool, "gpu_milli": round(self.num_gpus * 1000), "concurrency": self.concurrency,
                "columns": None if self.columns is None else list(self.columns), "shard_bytes": self.shard_bytes,
                "timeout_s": self.timeout_s, "placement_timeout_s": self.placement_timeout_s}


def _with_options(base: FunctionOptions, changes: dict[str, Any]) -> FunctionOptions:
    known = FunctionOptions.__dataclass_fields__
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; options are {sorted(known)}"
            raise TypeError(f"gpu_remote has no option {name!r}{hint}")
    if changes.get("columns") is not None:
        changes = {**changes, "columns": tuple(changes["columns"])}
    made = replace(base, **changes)
    if not made.num_gpus > 0:
        raise ValueError("num_gpus must be above 0, for example 0.5 or 1")
    return made


class RemoteFunction(Generic[P, R]):
    """A function that can run on shared GPUs, or here. Calling it runs it here, like any function."""

    def __init__(self, function: Callable[P, R], options: FunctionOptions) -> None:
        self._function = function
        self._options = options
        self._packed: bytes | None = None
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._function(*args, **kwargs)

    def options(self, **changes: Any) -> RemoteFunction[P, R]:
        """Return the same function with other options.

        Raises:
            TypeError: No such option; the nearest valid name is in the message.
        """
        return RemoteFunction(self._function, _with_options(self._options, changes))

    def map(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``f(batch, *args, **kwargs)`` on every shard of *data* and return N rows for N rows, in order.

        Args:
            data: A ``zone.read(...)`` handle, anything with ``__arrow_c_stream__``, or a ``pyarrow.dataset.Dataset``.
            args: Further arguments, the same for every shard: plain values and small arrays.
            kwargs: Further keyword arguments.

        Returns:
            A ``pyarrow.Table`` or a NumPy array, as the function returns for its shards.

        Raises:
            EgressDeniedError: Policy refuses; nothing left the zone.
            RowCountError: The function returned another number of rows than it was given.
            Exception: What the function raised.
        """
        return self._call("map", data, args, kwargs).result()

    def map_reduce(self, data: Any, reduce: Callable[[list[R]], Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``f(batch, *args, **kwargs)`` on every shard and return ``reduce(values)``, which runs here in the zone."""
        return reduce(self._call("shards", data, args, kwargs).result())

    def remote(self, *args: Any, **kwargs: Any) -> Call:
        """Start ``f(*args, **kwargs)`` on one GPU actor and return its future.

        Arguments are plain values and small arrays. When the first one is a handle or a table, the function
        gets all of its rows as one batch.
        """
        if args and _is_data(args[0]):
            return self._call("shards", args[0], args[1:], kwargs, whole=True)
        return self._call("call", None, args, kwargs)

    def local(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the function here, on all rows of *data* as one batch; gives what :meth:`map` gives.

        Raises:
            RowCountError, ValueRefusedError: As :meth:`map`, where the result is a table or an array per row.
        """
        table = as_table(data)
        table = table.to_arrow() if isinstance(table, Handle) else table
        if self._options.columns is not None:
            table = table.select(list(self._options.columns))
        from zones.shards import strip  # noqa: PLC0415 - pulls in the sharding code only when it is needed

        return to_host(self._function(Batch(strip(table)), *args, **kwargs))  # type: ignore[arg-type]  # batch comes first

    def _call(self, mode: str, data: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, whole: bool = False) -> Call:
        session = self._options.session or current_session()
        if self._packed is None:
            self._packed = functions.pack(self._function)
        request = {"op": "call", "mode": mode, "name": self._function.__qualname__, "function": self._packed,
                   "arguments": _encode(args, kwargs), "options": {**self._options.document(), "whole": whole}}
        show = progress.Progress(self._function.__name__) if mode != "call" and progress.wanted() else None
        return Call(session, request, None if data is None else as_table(data), show=show)

    def __repr__(self) -> str:
        return f"<gpu_remote function {self._function.__qualname__}>"


def _is_data(value: Any) -> bool:
    import pyarrow.dataset as pad  # noqa: PLC0415 - slow to import, and only asked here

    return isinstance(value, (Handle, pa.Table, pad.Dataset)) or (
        hasattr(value, "__arrow_c_stream__") and not isinstance(value, np.ndarray))


def _encode(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    return bytes(values.encode([list(args), kwargs]))


@overload
def gpu_remote(function: Callable[P, R]) -> RemoteFunction[P, R]: ...
@overload
def gpu_remote(**options: Any) -> Callable[[Callable[P, R]], RemoteFunction[P, R]]: ...
def gpu_remote(function: Callable[P, R] | None = None, **options: Any) -> Any:
    """Make a function runnable on shared GPUs: ``@gpu_remote`` or ``@gpu_remote(num_gpus=0.5, columns=[...])``.

    The function gets a batch: ``batch["age"]`` is an array of ``batch.xp`` (CuPy, or NumPy where there is no GPU),
    ``batch.to_arrow()`` a table. Options are those of :class:`FunctionOptions`.
    """
    if function is not None:
        return RemoteFunction(function, FunctionOptions())
    made = _with_options(FunctionOptions(), options)
    return lambda wrapped: RemoteFunction(wrapped, made)
