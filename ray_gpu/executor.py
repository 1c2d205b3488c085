"""A ``concurrent.futures.Executor`` whose functions run on shared GPUs."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from ray_gpu.api import gpu_remote
from ray_gpu.options import FunctionOptions, with_options
from ray_gpu.remote_function import RemoteFunction

P = ParamSpec("P")
R = TypeVar("R")


class Executor(concurrent.futures.Executor):
    """Runs functions on shared GPUs, in place of a ``ThreadPoolExecutor`` or ``ProcessPoolExecutor``.

    ``Executor(session=zone).submit(f, 1, 2).result()`` is ``gpu_remote(f, session=zone).remote(1, 2).result()``. As
    many calls run at once as the option ``concurrency`` says; others wait. Of remote functions their own options hold.

    Args:
        options: Those of :class:`ray_gpu.FunctionOptions`.

    Raises:
        TypeError: No such option, or a value of another type.
        ValueError: A value that the option cannot have.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        checked = with_options(FunctionOptions(), options)
        self._threads = concurrent.futures.ThreadPoolExecutor(checked.concurrency, thread_name_prefix="ray-gpu")

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[R]:
        """Start ``fn(*args, **kwargs)`` as soon as there is room, and return its future.

        Raises:
            FunctionRefusedError: It cannot be sent.
            RuntimeError: The executor was shut down.
        """
        function = fn if isinstance(fn, RemoteFunction) else gpu_remote(fn, **self._options)
        return self._threads.submit(lambda: function.remote(*args, **kwargs).result())

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no further functions; as ``concurrent.futures.Executor.shutdown``."""
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
