"""ray_gpu.own_modules: which modules a function imports in any case. Nothing that may go well is refused."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_gpu import gpu_remote
from ray_gpu.functions import PackedFunction
from ray_gpu.own_modules import certain, sources
from ray_gpu.remote_class import RemoteMethod
from zones.errors import FunctionRefusedError

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


def _helper() -> None:
    import absent_h


def _sometimes() -> None:
    import absent_s


def _by_helper(flag: bool) -> None:
    _helper()
    if flag:
        _sometimes()


def test_helpers_and_classes() -> None:
    """What a function calls in any case counts as well, what it may not call does not; so do a class's own methods."""

    class Model:
        def __init__(self) -> None:
            import absent_i

        def predict(self) -> None:
            import absent_p

    assert PackedFunction(_by_helper).packed().imports == [("absent_h", "")]
    made = gpu_remote(Model)
    assert [name for name, _ in PackedFunction(_helper, (), made._kind.__init__).packed().imports] == ["absent_i"]
    method = RemoteMethod(Model, "predict", made._options, digest="", instance="1")
    assert [name for name, _ in method._packed.packed().imports] == ["absent_p"]


def test_modules_that_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a module imports at its top counts too; what lies where packages are installed is not the user's own."""
    (tmp_path / "goes.py").write_text("import absent_g\ntry:\n    import absent_t\nexcept ImportError:\n    pass\n")
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "elsewhere.py").write_text("LEVEL = 1\n")
    (tmp_path / "absent_g.py").touch()
    for place in (tmp_path, installed):
        monkeypatch.syspath_prepend(str(place))
    goes, elsewhere = importlib.import_module("goes"), importlib.import_module("elsewhere")
    with pytest.raises(FunctionRefusedError, match=r"module of it imports absent_g.*modules=\[absent_g\]"):
        PackedFunction(_helper, [goes]).packed()
    del sys.modules["absent_g"]
    (tmp_path / "absent_g.py").unlink()

    def work() -> int:
        import elsewhere

        return int(elsewhere.LEVEL)

    found = PackedFunction(work, [goes]).packed().imports
    assert [name for name, _ in found] == ["absent_g", "elsewhere"]
    with pytest.raises(FunctionRefusedError, match="elsewhere is installed here"):
        PackedFunction(work, [elsewhere]).packed()
    for name in ("goes", "elsewhere"):
        del sys.modules[name]


@pytest.mark.parametrize("name", ["_fast.cpython-311-x86_64-linux-gnu.so", "_fast.abi3.so", "fast.pyx"])
def test_compiled_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A package with compiled code is refused, whatever its file is called; one without goes along."""
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/__init__.py").touch()
    (tmp_path / "mixed/data-file.txt").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    mixed = importlib.import_module("mixed")
    try:
        assert sources([mixed]) == {"mixed": (True, "")}
        (tmp_path / "mixed" / name).touch()
        with pytest.raises(FunctionRefusedError, match="has compiled code"):
            sources([mixed])
    finally:
        del sys.modules["mixed"]
