"""Classes whose instances stay on shared GPUs, with their state, as a notebook holds them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ray_gpu import functions
from ray_gpu.call import gone
from ray_gpu.client import Session
from ray_gpu.options import FunctionOptions, check_remote, with_options
from ray_gpu.remote_function import RemoteFunction
from ray_gpu.sandbox import stateful
from ray_gpu.wire import Inbox, MalformedMessageError, raise_for_error, send_message
from zones.errors import InstanceLostError

T = TypeVar("T")


class RemoteClass(Generic[T]):
    """A class whose instances can live on shared GPUs, or here. Calling it makes one here, as of any class."""

    def __init__(self, kind: type[T], options: FunctionOptions) -> None:
        if kind.__module__ == "builtins":
            functions.check_function(kind)
        check_remote(kind.__qualname__, options)
        self._kind, self._options = kind, options
        functools.update_wrapper(self, kind, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> T:
        """Make an instance here."""
        return self._kind(*args, **kwargs)

    def options(self, **changes: Any) -> RemoteClass[T]:
        """Return the same class with other options.

        Raises:
            TypeError: No such option, whose nearest valid name is in the message, or a value of another type.
            ValueError: A value that the option cannot have; or that ``where`` cannot have for a class.
        """
        return RemoteClass(self._kind, with_options(self._options, changes))

    def remote(self, *args: Any, **kwargs: Any) -> Instance[T]:
        """Make an instance on a GPU node, and return when its ``__init__`` has; with ``concurrency``, on as many.

        It keeps its GPU until it is closed, its session ends, or nobody holds it any more. Its state is in the memory
        of its sandboxes alone, and gone with them.

        Args:
            args: Of ``__init__``: plain values and small arrays.
            kwargs: Its keyword arguments.

        Raises:
            EgressDeniedError: Policy refuses; nothing left the zone.
            PlacementError: There is no room for it.
            FunctionRefusedError: The class cannot be sent.
            Exception: What ``__init__`` raised.
        """
        return Instance(self._kind, self._options, args, kwargs)

    def __reduce__(self) -> Any:
        # What captures it is, on the node, given the class itself.
        return _itself, (self._kind,)

    def __repr__(self) -> str:
        return f"<gpu_remote class {self._kind.__qualname__}>"


def _itself(kind: type[T]) -> type[T]:
    return kind


class Instance(Generic[T]):
    """An instance of a class on GPU nodes. Its methods are ``instance.name.remote(...)``, ``.map(data)`` and so on.

    Use it as a context manager, or :meth:`close` it, so that others get its GPU.
    """

    def __init__(self, kind: type[T], options: FunctionOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._kind = kind
        self._connection: Inbox | None = None
        self._digest = hashlib.sha256(functions.pack(functools.partial(stateful.make, "", kind))).hexdigest()
        maker = _Maker(
            functools.partial(stateful.make, self._digest, kind), options, name=kind.__qualname__, body=kind.__init__
        )
        self._session, self._id = maker.make(args, kwargs)
        self._options = with_options(options, {"session": self._session})
        connection = self._session.take_connection()
        try:
            self._exchange(connection, "hold")
        except BaseException:
            connection.sock.close()
            raise
        self._connection = connection

    def _exchange(self, connection: Inbox, op: str) -> None:
        try:
            send_message(connection.sock, {"op": op, "instance": self._id})
            reply, _ = connection.receive()
        except (OSError, MalformedMessageError):
            raise gone() from None
        raise_for_error(reply)

    def close(self) -> None:
        """End it: its sandboxes are gone when this returns, and its state with them."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                self._exchange(connection, "release")
            finally:
                connection.sock.close()

    def __getattr__(self, name: str) -> RemoteMethod:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if not callable(getattr(self._kind, name, None)):
            known = [one for one in dir(self._kind) if not one.startswith("_") and callable(getattr(self._kind, one))]
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its methods are {', '.join(known) or 'none'}"
            raise AttributeError(
                f"{self._kind.__qualname__} has no method {name!r}; {hint}. Attributes stay on the GPU node: return "
                "them from a method"
            )
        if self._connection is None:
            raise InstanceLostError(
                f"this {self._kind.__qualname__} was closed; make another one with .remote(...)",
                node="",
                reason="closed",
            )
        return RemoteMethod(self._kind, name, self._options, digest=self._digest, instance=self._id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # Where the session has ended meanwhile, so has this.
        with contextlib.suppress(Exception) if error is not None or self._session.closed else contextlib.nullcontext():
            self.close()

    def __del__(self) -> None:
        # The gateway ends what nobody holds any more. Not close: nothing may wait here.
        connection = self.__dict__.get("_connection")
        if connection is not None:
            connection.sock.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"an instance of {self._kind.__qualname__} on a GPU node does not leave this process; pass what its "
            "methods return"
        )

    def __repr__(self) -> str:
        return f"<{self._kind.__qualname__} {'closed' if self._connection is None else 'on GPU nodes'}>"


class _Maker(RemoteFunction[..., None]):
    """What makes an instance."""

    def make(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Session, str]:
        """Make it; return the session and the instance's id in it."""
        session = self._session(None)
        call = self._call("make", None, args, kwargs)
        call.result()
        return session, str(call.report["instance"])


class RemoteMethod(RemoteFunction[..., Any]):
    """A method of an instance on GPU nodes: as a remote function, in the instance's sandboxes alone."""

    def __init__(self, kind: type, name: str, options: FunctionOptions, *, digest: str, instance: str) -> None:
        check_remote(kind.__qualname__, options)
        self._how = kind, name, digest, instance
        run = functools.partial(stateful.call, digest, name)
        super().__init__(
            run, options, name=f"{kind.__qualname__}.{name}", instance=instance, body=getattr(kind, name, None)
        )

    def options(self, **changes: Any) -> RemoteMethod:
        """Return the same method with other options. How many actors there are was said when it was made."""
        for fixed in ("concurrency", "session", "num_gpus", "pool"):
            if fixed in changes:
                raise ValueError(
                    f"{fixed} is the instance's: say it before .remote(...), as in Model.options({fixed}=...)"
                )
        kind, name, digest, instance = self._how
        return RemoteMethod(kind, name, with_options(self._options, changes), digest=digest, instance=instance)

    def every(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Call it once in each of the instance's sandboxes, and return what each of them gave.

        Raises:
            Exception: What the method raised in one of them.
        """
        found: list[Any] = self._call("every", None, args, kwargs).result()
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the instance is not here."""
        raise TypeError(f"{self._name} runs where its instance is: write .{self._how[1]}.remote(...), or .map(data)")

    def local(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the instance is not here."""
        raise TypeError(f"{self._name} runs where its instance is; make one here by calling the class, and use that")
