"""``@gpu_remote``: what a data scientist writes above a function or a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

from ray_gpu.options import FunctionOptions, with_options
from ray_gpu.remote_class import RemoteClass
from ray_gpu.remote_function import RemoteFunction

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@overload
def gpu_remote(function: type[T], **options: Any) -> RemoteClass[T]: ...
@overload
def gpu_remote(function: Callable[P, R], **options: Any) -> RemoteFunction[P, R]: ...
@overload
def gpu_remote(**options: Any) -> Decorator: ...
def gpu_remote(function: Any = None, **options: Any) -> Any:
    """Make a function or class runnable on shared GPUs: ``@gpu_remote`` or ``@gpu_remote(num_gpus=0.5, ...)``.

    A function gets a batch: ``batch["age"]`` is an array of ``batch.xp`` (CuPy, or NumPy where there is no GPU),
    ``batch.to_arrow()`` a table. So does each method of a class that is called on data. Options are those of
    :class:`ray_gpu.options.FunctionOptions`; ``concurrency`` of a class is 1 unless it is given.

    Raises:
        TypeError: No function or class, no such option, or a value of another type.
        ValueError: A value that the option cannot have.
    """
    made = with_options(FunctionOptions(), options)
    decorator = Decorator(made, frozenset(options))
    return decorator if function is None else decorator(function)


class Decorator:
    """What ``@gpu_remote(...)`` is above a function or a class."""

    def __init__(self, options: FunctionOptions, given: frozenset[str]) -> None:
        self._options, self._given = options, given

    @overload
    def __call__(self, wrapped: type[T]) -> RemoteClass[T]: ...  # type: ignore[overload-overlap]  # a class comes first
    @overload
    def __call__(self, wrapped: Callable[P, R]) -> RemoteFunction[P, R]: ...
    def __call__(self, wrapped: Any) -> Any:
        """Return what runs on GPUs."""
        if not isinstance(wrapped, type):
            return RemoteFunction(wrapped, self._options)
        alone = {} if "concurrency" in self._given else {"concurrency": 1}
        return RemoteClass(wrapped, with_options(self._options, alone))
