"""The values of a call over data, one by one as they come back into the zone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from ray_gpu.advice import Advice
from ray_gpu.call import Call

R = TypeVar("R")
_END = object()


class Stream(Iterator[R], AsyncIterator[R]):
    """What :meth:`RemoteFunction.stream` returns: take it with ``for`` or ``async for``.

    One whose values nobody takes holds up its call, and holds no more memory. As a context manager, or when nobody
    holds it any more, it stops the call.

    Args:
        call: The call, begun.
        ordered: Whether values come by their shards' numbers.
    """

    def __init__(self, call: Call[Any], *, ordered: bool) -> None:
        self._call = call
        self._ordered = ordered
        self._early: dict[int, R] = {}
        self._next = 0

    @property
    def advice(self) -> Advice | None:
        """With ``where="auto"`` or ``"local"``: what was predicted, and where the call runs."""
        return self._call.advice

    @property
    def report(self) -> dict[str, Any]:
        """Once all values were taken: shards by node, rows, bytes sent."""
        return self._call.report

    def cancel(self) -> None:
        """Stop the call; its sandboxes are killed. Waiting for its values raises :class:`CallCancelledError`."""
        self._call.cancel()

    def __next__(self) -> R:
        while self._next not in self._early:
            part = self._call.next_part()
            if part is None:
                raise StopIteration
            number, value = part
            if not self._ordered:
                return value  # type: ignore[no-any-return]  # plain data; the function's annotation says which
            self._early[number] = value
        self._next += 1
        return self._early.pop(self._next - 1)

    async def __anext__(self) -> R:
        try:
            value = await asyncio.to_thread(next, self, _END)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if value is _END:
            raise StopAsyncIteration
        return value  # type: ignore[return-value]  # the end was taken out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.cancel()
