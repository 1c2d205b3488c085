"""What stateful classes are on a GPU node: instances that stay in the sandbox they were made in. Sent by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: A sandbox has one at most; by the digest of its class, so that what is called is what was made.
_made: dict[str, Any] = {}


def make(digest: str, kind: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Make this sandbox's instance."""
    _made[digest] = kind(*args, **kwargs)


def call(digest: str, method: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call a method of this sandbox's instance."""
    return getattr(_made[digest], method)(*args, **kwargs)
