"""Modules of one's own go along as source, sealed as functions are; one that is missing is told before data leaves."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_gpu import gpu_remote
from zones.errors import FunctionRefusedError, RemoteFunctionError

FILES = {
    "clinicals/__init__.py": """
        from .scores import Score
        UNITS = "mmHg"
    """,
    "clinicals/scores.py": """
        from clinicals.deep import part
        class Score:
            def __init__(self, value):
                self.value = value
            def raised(self):
                return Score(self.value + part.STEP)
        def fails():
            raise LookupError("no such score")  # here
    """,
    "clinicals/deep/part.py": "STEP = 1\n",
    "clinicals/notes.txt": "not code",
    "single.py": """
        LEVEL = 1
    """,
}

Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """The user's own modules, importable here and nowhere else, and a way to write another."""

    def put(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")

    for name, text in FILES.items():
        put(name, text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield put
    for name in [name for name in sys.modules if name.partition(".")[0] in ("clinicals", "single")]:
        del sys.modules[name]


def steps(count: int) -> Any:
    """Import while it runs, as functions that load plug-ins do."""
    module = importlib.import_module("clinicals.scores")
    score = module.Score(0)
    for _ in range(count):
        score = score.raised()
    return [score.value, module.__name__, importlib.import_module("clinicals").UNITS]


def test_imports_while_it_runs(cluster: Any, write: Write) -> None:
    """A function imports packages, their parts and parts of parts, on a node that has none of them."""
    import clinicals  # type: ignore[import-not-found]  # written above

    with cluster.attach() as zone:
        with pytest.raises(ModuleNotFoundError, match="clinicals"):
            gpu_remote(session=zone)(steps).remote(2).result()
        assert gpu_remote(session=zone, modules=[clinicals])(steps).remote(2).result() == [
            2,
            "clinicals.scores",
            "mmHg",
        ]


def test_what_is_written_since(cluster: Any, write: Write) -> None:
    """A module that was edited goes along as it is now, also to a sandbox that had the older one."""
    import single  # type: ignore[import-not-found]  # written above

    with cluster.attach() as zone:
        level = gpu_remote(session=zone, concurrency=1, modules=[single])(
            lambda: importlib.import_module("single").LEVEL
        )
        assert level.remote().result() == 1
        write("single.py", "LEVEL = 2222\n")
        assert level.remote().result() == 2222
        assert len(zone.status()["leases"]) == 1


def test_one_class(cluster: Any, write: Write) -> None:
    """What the function names itself, and what it imports, are one class: not one by value and one by name."""
    import clinicals

    def same() -> bool:
        return isinstance(clinicals.Score(1), importlib.import_module("clinicals.scores").Score)

    with cluster.attach() as zone:
        assert gpu_remote(session=zone, modules=[clinicals])(same).remote().result() is True


def test_traceback_has_its_lines(cluster: Any, write: Write) -> None:
    """An error in such a module shows the line, as it would here."""
    import clinicals

    with cluster.attach() as zone, pytest.raises(LookupError) as raised:
        gpu_remote(session=zone, modules=[clinicals])(lambda: clinicals.scores.fails()).remote().result()
    assert 'raise LookupError("no such score")  # here' in str(raised.value.__cause__)


def test_class_with_modules(cluster: Any, write: Write) -> None:
    """A stateful class has them too, in each of its methods."""
    import single

    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def add(self) -> int:
            self.count += importlib.import_module("single").LEVEL
            return self.count

    with cluster.attach() as zone, gpu_remote(session=zone, modules=[single])(Counter).remote() as counter:
        assert [counter.add.remote().result() for _ in range(2)] == [1, 2]


def test_missing_is_told_first(cluster: Any, write: Write) -> None:
    """A module of one's own that a function imports, and that does not go along, is told before anything leaves."""

    def inside(batch: Any) -> int:
        import single

        return int(single.LEVEL)

    def maybe(batch: Any) -> int:
        try:
            import single
        except ImportError:
            return -1
        return int(single.LEVEL)

    with cluster.attach() as zone:
        data = zone.read("randhie", columns=["mdvis"])
        before = cluster.entries()[-1]["seq"]
        with pytest.raises(FunctionRefusedError, match=r"imports single, a module of your own.*modules=\[single\]"):
            gpu_remote(session=zone)(inside).remote(data).result()
        assert cluster.entries()[-1]["seq"] == before
        # What may fail without harm may; and where it goes along, both find it.
        assert gpu_remote(session=zone)(maybe).remote(data).result() == -1
        import single

        for function in (inside, maybe):
            assert gpu_remote(session=zone, modules=[single])(function).remote(data).result() == 1


def test_refused_modules(cluster: Any, write: Write) -> None:
    """What is installed, has compiled code, or is too large, is refused, with what to do."""
    import clinicals
    import numpy as np

    def nothing() -> int:
        return 0

    with cluster.attach() as zone:
        for module, says in ((np, "numpy is installed here"), (importlib, "importlib is installed here")):
            with pytest.raises(FunctionRefusedError, match=says):
                gpu_remote(session=zone, modules=[module])(nothing).remote().result()
        with pytest.raises(TypeError, match=r"as in modules=\[mymodule\]"):
            gpu_remote(session=zone, modules=["clinicals"])(nothing)
        write("clinicals/fast.so", "")
        with pytest.raises(FunctionRefusedError, match=r"has compiled code \(fast.so\).*env build"):
            gpu_remote(session=zone, modules=[clinicals])(nothing).remote().result()
        Path(clinicals.__file__).with_name("fast.so").unlink()
        write("clinicals/big.py", "X = " + repr([hash(str(number)) for number in range(9000)]))
        with pytest.raises(FunctionRefusedError, match=r"over the cap.*clinicals\.big"):
            gpu_remote(session=zone, modules=[clinicals])(nothing).remote().result()


def test_source_that_fails(cluster: Any, write: Write) -> None:
    """A module that raises while it is imported raises that in the call."""
    import single

    write("single.py", "raise RuntimeError('half written')\n")
    with cluster.attach() as zone, pytest.raises((RuntimeError, RemoteFunctionError), match="half written"):
        gpu_remote(session=zone, modules=[single])(lambda: single.LEVEL).remote().result()
