"""Functions that run on shared GPUs, as a notebook holds them."""

from __future__ import annotations

import functools
import json
import operator
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Generic, ParamSpec, TypeVar, overload

from ray_gpu import functions, progress, proposal, where
from ray_gpu.advice import Advice
from ray_gpu.arrays import Batch, to_host
from ray_gpu.attaching import current_session
from ray_gpu.broadcast import here, taken_out
from ray_gpu.call import Call, Data, as_table, is_data
from ray_gpu.client import Session
from ray_gpu.handle import Handle
from ray_gpu.local_call import LocalWork
from ray_gpu.options import FunctionOptions, with_options
from ray_gpu.remote_error import too_little_memory
from ray_gpu.request import MIN_SHARD_BYTES, Mode, pack_work
from ray_gpu.stream import Stream
from zones import values
from zones.errors import FunctionRefusedError, ValueRefusedError
from zones.shards import strip

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
#: Calls that give the same here as on GPU nodes.
_MOVABLE = (Mode.MAP, Mode.SHARDS, Mode.STREAM, Mode.CALL)


class RemoteFunction(Generic[P, R]):
    """A function that can run on shared GPUs, or here. Calling it runs it here, like any function."""

    __name__: str
    __wrapped__: Callable[P, R]

    def __init__(
        self,
        function: Callable[P, R],
        options: FunctionOptions,
        *,
        name: str = "",
        instance: str = "",
        body: Callable[..., Any] | None = None,
    ) -> None:
        functions.check_function(function)
        self._function = function
        self._options = options
        self._packed = functions.PackedFunction(function, options.modules, body)
        self._name = name or functions.name_of(function)
        self._instance = instance
        #: Function, whether it gets all rows at once, and both packed with the options.
        self._packed_work: tuple[bytes, bool, bytes] = (b"", False, b"")
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here, on what it is given."""
        return self._function(*args, **kwargs)

    def options(self, **changes: Any) -> RemoteFunction[P, R]:
        """Return the same function with other options.

        Raises:
            TypeError: No such option, whose nearest valid name is in the message, or a value of another type.
            ValueError: A value that the option cannot have.
        """
        return RemoteFunction(self._function, with_options(self._options, changes))

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
        return self._by_shards("map", data, args, kwargs)

    def map_reduce(self, data: Any, reduce: Callable[[list[R]], S], *args: Any, **kwargs: Any) -> S:
        """Run ``f(batch, *args, **kwargs)`` on every shard and return ``reduce(values)``, which runs here in the zone.

        The values come in no order that says anything: which rows made which value is not known.
        """
        if not callable(reduce):
            raise TypeError(f"reduce takes the list of the shards' values, as `sum` does; {reduce!r} is no function")
        return reduce(self._by_shards("shards", data, args, kwargs))

    def stream(
        self, data: Any, *args: Any, ordered: bool = False, return_exceptions: bool = False, **kwargs: Any
    ) -> Stream[R]:
        """Run ``f(batch, *args, **kwargs)`` on every shard and give its values one by one, as they come back.

        Args:
            data: As for :meth:`map`.
            args: Further arguments, the same for every shard.
            ordered: Whether values come by their shards' numbers. Where policy's shuffle is ``none`` that is the order
                of the rows; else it says nothing of them.
            return_exceptions: Whether what the function raises for a shard stands in for its value, and the others
                come all the same. If not, it ends the stream.
            kwargs: Further keyword arguments.

        Returns:
            An iterator for ``for`` and ``async for``. Errors are raised after the values that came before them.
        """
        return Stream(self._call("stream", data, args, kwargs, return_exceptions=return_exceptions), ordered=ordered)

    @overload
    def remote(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]: ...
    @overload
    def remote(self, data: Data, /, *args: Any, **kwargs: Any) -> Call[R]: ...
    def remote(self, *args: Any, **kwargs: Any) -> Call[R]:
        """Start ``f(*args, **kwargs)`` on one GPU actor and return its future.

        Arguments are plain values and small arrays. When the first one is a handle or a table, the function
        gets all of its rows as one batch.
        """
        if args and is_data(args[0]):
            return self._call("shards", args[0], args[1:], kwargs, whole=True)
        return self._call("call", None, args, kwargs)

    def starmap(self, arguments: Iterable[Iterable[Any]], *, return_exceptions: bool = False) -> list[R]:
        """Return ``[f(*args) for args in arguments]``, as many calls at once as the option ``concurrency`` says.

        Args:
            arguments: Those of each call.
            return_exceptions: Whether what a call raises stands in its place in the list. If not, the first error in
                the list's order is raised, and calls that run are stopped.

        Raises:
            Exception: What a call raised.
        """
        running: deque[Call[R]] = deque()
        found: list[Any] = []

        def take() -> None:
            try:
                found.append(running.popleft().result())
            except Exception as error:
                if not return_exceptions:
                    raise
                found.append(error)

        try:
            for each in arguments:
                if len(running) >= self._options.concurrency:
                    take()
                running.append(self.remote(*each))
            while running:
                take()
        finally:
            for call in running:
                call.cancel()
        return found

    def local(self, data: Any, *args: Any, **kwargs: Any) -> R:
        """Run the function here, on all rows of *data* as one batch; gives what the nodes would give for one shard.

        Raises:
            ValueRefusedError: The function returns something that is not data.
            Exception: What the function raised.
        """
        found = as_table(data, self._options.columns)
        table = found.to_arrow() if isinstance(found, Handle) else found
        shown = strip(table, keep_categories=self._options.categories or ())
        args, kwargs = tuple(map(here, args)), {name: here(arg) for name, arg in kwargs.items()}
        result = to_host(self._function(Batch.of_shard(shown), *args, **kwargs))  # type: ignore[arg-type]  # batch comes first
        values.prepare(result)
        return result  # type: ignore[no-any-return]  # the same with NumPy's arrays in place of CuPy's

    def advise(self, *args: Any, **kwargs: Any) -> Advice:
        """Say where ``f.map(data, ...)``, or ``f.remote(...)`` on arguments alone, is faster: on GPU nodes or here.

        It runs neither, but what :mod:`ray_gpu.where` says: the first time small calls of its own, and the function
        here, on a few of the rows. Policy is asked whether the rows may leave.

        Args:
            args: Those of the call. As for :meth:`remote`, a first one that is a handle or a table is its data; make a
                table of an array.
            kwargs: Its keyword arguments.

        Raises:
            EgressDeniedError: Policy refuses that rows of the zone leave by this call.
            TypeError: It is a method of an instance.
        """
        data, rest = (args[0], args[1:]) if args and is_data(args[0]) else (None, args)
        if self._instance:
            raise TypeError(f"{self._name} runs where its instance is, on GPU nodes; advice is for functions")
        return where.weigh(self._planned("call" if data is None else "map", data, rest, kwargs))

    def _by_shards(self, mode: str, data: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a call over data, made again with smaller shards if they are to be halved."""
        if not self._options.halve_shards:
            return self._call(mode, data, args, kwargs).result()
        # What gives its rows once is read once.
        data, function = as_table(data, self._options.columns), self
        while True:
            try:
                return function._call(mode, data, args, kwargs).result()
            except Exception as error:
                half = function._options.shard_bytes // 2
                if not too_little_memory(error) or half < MIN_SHARD_BYTES:
                    raise
                function = function.options(shard_bytes=half)

    def _call(self, mode: str, data: Any, args: tuple[Any, ...], kwargs: dict[str, Any], **how: bool) -> Call[Any]:
        planned = self._planned(mode, data, args, kwargs, **how)
        table, ended, advice = planned.work.data, None, None
        if not self._instance and planned.work.mode in _MOVABLE:
            advice = where.choose(planned)
            if advice is not None and advice.chosen == "local":
                return where.begin_here(planned, advice)
            ended = where.learner(planned)
        show = progress.Progress(self._name) if table is not None and progress.wanted() else None
        one = planned.work.whole or mode in ("call", "make")
        call: Call[Any] = Call(planned.session, planned.request, table, show=show, one=one, ended=ended)
        call.advice = advice
        return call

    def _planned(
        self,
        mode: str,
        data: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        whole: bool = False,
        return_exceptions: bool = False,
    ) -> where.Planned:
        """Return a call that may be made, here or on GPU nodes."""
        table = as_table(data, self._options.columns) if mode in ("map", "shards", "stream") else None
        session = self._session(table)
        work = self._work(session, whole=whole)
        given = args, kwargs
        args, kwargs, broadcasts = taken_out(args, kwargs, session)
        arguments = _encode(args, kwargs, broadcasts)
        request: dict[str, Any] = {"op": "call", "mode": mode, "work": work, "arguments": arguments}
        if return_exceptions:
            request["return_exceptions"] = True
        if broadcasts:
            request["broadcasts"] = sorted(set(broadcasts.values()))
        here = LocalWork(
            function=self._function,
            mode=Mode(mode),
            whole=whole,
            options=self._options,
            data=table,
            arguments=arguments,
            return_exceptions=return_exceptions,
            broadcasts={at: given[0][at] if isinstance(at, int) else given[1][at] for at in broadcasts},
        )
        return where.Planned(name=self._name, session=session, request=request, work=here)

    def proposal(self) -> str:
        """Return the function in a form that a zone's officer can read and approve, as JSON.

        Once it is approved (`ray-gpu policy approve`), sessions that attach send it in this form.

        Raises:
            FunctionRefusedError: It has none, for it captures more than modules, plain values and such functions.
        """
        try:
            form = next(iter(proposal.proposals(self._function)), None) or proposal.source(self._function)
        except (proposal.UnstableError, ValueError, RecursionError) as error:
            raise FunctionRefusedError(
                f"{self._name} cannot be approved: {error}. Pass what it captures as arguments", variable=None
            ) from None
        return json.dumps(form, indent=2)

    def _work(self, session: Session, *, whole: bool) -> bytes:
        """Return what to run and how, packed; the same bytes as last time when nothing of it has changed."""
        approved = session.approved and self._packed.approved(session.approved)
        function, imports = (approved, []) if approved else self._packed.packed()
        if (function, whole) != self._packed_work[:2]:
            options = {**self._options.document(), "whole": whole, "instance": self._instance, "imports": imports}
            packed = pack_work(function, self._name, options)
            self._packed_work = function, whole, packed
        return self._packed_work[2]

    def _session(self, data: Any) -> Session:
        """Return the session to use: that of the option, else that of the handle, else the one attached last."""
        chosen = self._options.session
        if isinstance(data, Handle):
            if chosen not in (None, data.session):
                raise ValueError(
                    f"{data!r} is of another session than the option `session` names; read it from that one"
                )
            return data.session
        return chosen or current_session()

    def __on_node__(self) -> Any:
        """Return how a remote function that another one captures is pickled: on the node it is the function itself."""
        return operator.getitem, ((self._function,), 0)

    def __reduce__(self) -> Any:
        # For processes of the zone, such as Ray Data's workers: with the options, or more columns would leave there.
        if self._instance:
            raise TypeError(
                f"{self._name} is of an instance on a GPU node, which does not leave this process; make one there"
            )
        return RemoteFunction, (self._function, self._options)

    def __repr__(self) -> str:
        return f"<gpu_remote function {self._name}>"


def _encode(args: tuple[Any, ...], kwargs: dict[str, Any], broadcasts: dict[int | str, str]) -> bytes:
    """Encode a call's arguments.

    Raises:
        ValueRefusedError: One is not plain data; the message names it.
    """
    args, kwargs = to_host(args), to_host(kwargs)
    try:
        return bytes(values.encode([list(args), kwargs, *([broadcasts] if broadcasts else [])]))
    except ValueRefusedError:
        for name, value in [*((f"argument {i + 1}", arg) for i, arg in enumerate(args)), *kwargs.items()]:
            try:
                values.prepare(value, what="it")
            except ValueRefusedError as error:
                what = f"{type(value).__module__.partition('.')[0]} {type(value).__name__}"
                raise ValueRefusedError(
                    f"{name} ({what}) cannot be sent: {error.message}; a handle or a large table is the call's first "
                    "argument"
                ) from None
        raise
