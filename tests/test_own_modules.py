"""ray_gpu.own_modules: which modules a function imports in any case. Nothing that may go well is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ray_gpu.functions import PackedFunction
from ray_gpu.own_modules import certain

# mypy: disable-error-code="import-not-found"
# ruff: noqa: F401 - what is imported, and where, is what these are about


def _plain() -> None:
    import absent_a.b.c
    from absent_d import e as f


def _guarded() -> None:
    import absent_a

    try:
        import absent_b
    except ImportError:
        pass


def _under_with(lock: Any) -> None:
    with lock:
        import absent_b


def _branches(flag: bool) -> None:
    if flag:
        import absent_b
    else:
        import absent_c
    import absent_d


def _loop(items: list[int]) -> None:
    for _ in items:
        import absent_b
    while items:
        import absent_c


def _after_return(flag: bool) -> int:
    import absent_a

    if flag:
        return 1
    import absent_b

    return 2


def _either(flag: bool) -> bool:
    found = flag or bool(__import__("absent_b"))
    import absent_d

    return found


def _inner() -> Callable[[], None]:
    def never() -> None:
        import absent_b

    return never


def _generator() -> Any:
    yield 1
    import absent_b


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (_plain, ["absent_a", "absent_d"]),
        (_guarded, ["absent_a"]),
        (_under_with, []),
        (_branches, ["absent_d"]),
        (_loop, []),
        (_after_return, ["absent_a"]),
        (_either, ["absent_d"]),
        (_inner, []),
        (_generator, []),
    ],
)
def test_certain(function: Any, wanted: list[str]) -> None:
    """Only what runs whatever happens counts: not below a condition, a loop or what handles errors."""
    assert list(certain(function.__code__)) == wanted


def test_imports_of_a_function() -> None:
    """What its pickle names counts, with the version here; what every sandbox has does not."""

    def work(x: float) -> float:
        import absent_a

        return float(np.sqrt(x)) + math.pi + float(absent_a.y)

    assert PackedFunction(work).packed().imports == [("absent_a", ""), ("numpy", np.__version__)]
