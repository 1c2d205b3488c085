"""What a function may take along when it leaves the zone, and how a refusal names the cause."""

from __future__ import annotations

import array
import functools
import importlib
import io
import pickle
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_gpu import functions
from ray_gpu.request import MAX_FUNCTION_BYTES
from zones.errors import FunctionRefusedError

TABLE = pa.table({"age": [1, 2]})
WEIGHTS = np.arange(3.0)
SCALE = 2.0
NAMES = ["age"]


class Model:
    """A user's class, as notebooks have them."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def predict(self, x: float) -> float:
        """Return a number."""
        return float(x * self.weights)


class Slotted:
    __slots__ = ("weights",)

    def __init__(self, weights: Any) -> None:
        self.weights = weights


class Settings:
    table = TABLE


class Reader:
    @staticmethod
    def read() -> int:
        """Read a global."""
        return int(TABLE.num_rows)

    @classmethod
    def read_too(cls) -> int:
        """Read a global."""
        return int(TABLE.num_rows)

    @property
    def rows(self) -> int:
        """Read a global."""
        return int(TABLE.num_rows)


def _prepare(x: float) -> float:
    return x * float(WEIGHTS.sum())


def _loaded(packed: bytes) -> Callable[..., Any]:
    """Unpickle as the sandbox does."""
    function: Callable[..., Any] = pickle.loads(packed)
    return function


def _refused(function: Callable[..., Any]) -> FunctionRefusedError:
    with pytest.raises(FunctionRefusedError) as refused:
        functions.pack(function)
    return refused.value


# -- what travels -----------------------------------------------------------------------------------


def test_closure_globals_and_defaults_travel() -> None:
    """A packed function gives what the original gives."""
    offset = 3

    def compute(x: float, factor: float = 10.0, *, more: float = 0.5) -> float:
        return x * SCALE * factor + offset + more

    assert _loaded(functions.pack(compute))(1) == compute(1) == 23.5


def test_lambda_travels() -> None:
    """A lambda is a function like any other."""
    assert _loaded(functions.pack(lambda x: x + 1))(1) == 2


def test_helper_and_class_of_the_users_module_travel() -> None:
    """Functions and classes of the user's own module go by value: the node cannot import it."""
    model = Model(2.0)

    def score(x: float) -> float:
        return model.predict(x)

    packed = functions.pack(score)
    code = "import sys, pickle; print(pickle.load(sys.stdin.buffer)(4))"
    done = subprocess.run([sys.executable, "-P", "-c", code], input=packed, capture_output=True, cwd="/", check=True)
    assert float(done.stdout) == 8.0


def test_other_module_of_the_user_travels(tmp_path: Path) -> None:
    """A module beside the notebook goes by value too; without that the node could not import it (the control)."""
    (tmp_path / "mine_to_send.py").write_text("FACTOR = 3\n\ndef times(x):\n    return FACTOR * x\n", encoding="utf-8")
    script = textwrap.dedent("""
        import sys, cloudpickle
        import mine_to_send
        from mine_to_send import times
        from ray_gpu import functions
        def work(x):
            return times(x)
        sys.stdout.buffer.write(cloudpickle.dumps(work) if "plain" in sys.argv else functions.pack(work))
    """)
    path = [str(tmp_path), *sys.path]
    results = []
    for mode in ("plain", "packed"):
        packed = subprocess.run(
            [sys.executable, "-c", script, mode], capture_output=True, check=True, env={"PYTHONPATH": ":".join(path)}
        ).stdout
        loaded = subprocess.run(
            [sys.executable, "-P", "-c", "import sys, pickle; print(pickle.load(sys.stdin.buffer)(5))"],
            input=packed,
            capture_output=True,
            cwd="/",
            check=False,
        )
        results.append((loaded.returncode, loaded.stdout.strip(), b"ModuleNotFoundError" in loaded.stderr))

    assert results == [(1, b"", True), (0, b"15", False)]


def test_installed_module_is_named_only() -> None:
    """NumPy is on the node as well; its name is all that is sent."""
    packed = functions.pack(lambda x: np.sqrt(x))

    assert len(packed) < 2000
    assert _loaded(packed)(4.0) == 2.0


def test_partial_and_method_travel() -> None:
    """A partial and a bound method are functions with something captured."""

    def power(base: float, exponent: float) -> float:
        return float(base**exponent)

    assert _loaded(functions.pack(functools.partial(power, exponent=2)))(3) == 9
    assert _loaded(functions.pack(Model(2.0).predict))(4) == 8.0


def test_one_numpy_number_is_a_parameter() -> None:
    """A NumPy scalar is no array, nor is an array without dimensions; and so is Arrow's."""
    alpha, beta, gamma = np.float64(0.5), np.array(2.0), pa.scalar(1.0)

    assert _loaded(functions.pack(lambda x: x * alpha + beta + gamma.as_py()))(2) == 4.0


def test_recursive_function_travels() -> None:
    """A function may call itself."""

    def factorial(n: int) -> int:
        return 1 if n == 0 else n * factorial(n - 1)

    assert _loaded(functions.pack(factorial))(5) == 120


def test_variable_without_value_yet_is_no_obstacle() -> None:
    """An inner function may name a variable that is assigned later, or never."""
    if not NAMES:
        later = 1

    def work() -> int:
        return later  # never assigned, which is the point

    with pytest.raises(NameError):
        _loaded(functions.pack(work))()


# -- what is refused --------------------------------------------------------------------------------


def _capturing(value: Any) -> Callable[..., Any]:
    captured = value
    return lambda: captured


@pytest.mark.parametrize(
    "value",
    [
        TABLE,
        TABLE.to_batches()[0],
        TABLE["age"],
        TABLE["age"].chunk(0),
        WEIGHTS,
        pd.DataFrame({"age": [1]}),
        pd.Series([1]),
        pd.Index([1]),
        array.array("d", [1.0]),
        memoryview(b"Alice"),
        pa.py_buffer(b"Alice"),
        pa.scalar([1, 2]),
        pa.scalar({"age": 1}),
        pa.scalar("Alice"),
        pa.array(["Alice"]).dictionary_encode()[0],
        pc.field("age").isin(pa.array([1, 2])),
        np.zeros(1, [("age", "f8")])[0],
        np.zeros(1, [("age", "f8")]).view(np.recarray)[0],
        np.array([1, 2], dtype=object)[:1].reshape(()),
        io.BytesIO(b"Alice"),
        io.StringIO("Alice"),
        [1, {"deep": (WEIGHTS,)}],
        {"key": WEIGHTS},
        Model(WEIGHTS),
        Slotted(WEIGHTS),
        Model(Model([WEIGHTS])),
        Model(WEIGHTS).predict,
        functools.partial(max, WEIGHTS),
        functools.partial(max, key=WEIGHTS),
        Settings,
        Settings(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_captured_data_is_refused(value: Any) -> None:
    """Tables and arrays are refused wherever they hang, and the closure variable is named."""
    error = _refused(_capturing(value))

    assert error.variable == "captured"
    assert "captured" in error.message
    assert "pass it as an argument" in error.message


def test_captured_file_is_refused(tmp_path: Path) -> None:
    """A file would take its content along, as cloudpickle alone shows (the control); closed or open for writing too."""
    path = tmp_path / "patients.csv"
    path.write_text("Alice", encoding="utf-8")
    with path.open(encoding="utf-8") as file, path.open("rb") as raw:
        assert b"Alice" in cloudpickle.dumps(_capturing(file))
        errors = [_refused(_capturing(file)), _refused(_capturing([raw])), _refused(lambda: file.read())]

    assert [error.variable for error in errors] == ["captured", "captured", "file"]
    assert "file object" in errors[0].message


def test_standard_output_is_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent by name: what the function writes there is printed at the caller."""
    # pytest's own is of a kind that cannot be pickled.
    with Path("/dev/null").open("w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)

        assert _loaded(functions.pack(_capturing(stdout)))() is stdout


def test_global_table_is_named() -> None:
    """A global that the function reads is captured."""
    error = _refused(lambda: TABLE.num_rows)

    assert error.variable == "TABLE"
    assert "pyarrow Table" in error.message


def test_default_is_named() -> None:
    """A default value is captured."""

    def positional(a: int, weights: Any = WEIGHTS) -> Any:
        return weights

    def keyword(*, weights: Any = WEIGHTS) -> Any:
        return weights

    assert _refused(positional).variable == "default of weights"
    assert _refused(keyword).variable == "default of weights"


def test_variable_of_a_called_function_is_named() -> None:
    """What a called function reads is captured as well; both names are in the message."""
    error = _refused(lambda x: _prepare(x))

    assert error.variable == "WEIGHTS"
    assert "WEIGHTS (in _prepare)" in error.message


def test_variable_of_an_inner_function_is_named() -> None:
    """A function defined inside the function names its globals there."""

    def work() -> Any:
        def inner() -> Any:
            return [WEIGHTS for _ in range(2)]

        return inner()

    assert _refused(work).variable == "WEIGHTS"


@pytest.mark.parametrize("name", ["read", "read_too", "rows"])
def test_method_bodies_are_looked_into(name: str) -> None:
    """Static methods, class methods and properties of a captured class name globals too."""
    work = {
        "read": lambda: Reader.read(),
        "read_too": lambda: Reader.read_too(),
        "rows": lambda: Reader().rows,
    }[name]

    error = _refused(work)

    assert error.variable == "TABLE"
    assert "(in " in error.message


def test_attribute_is_named() -> None:
    """The message says which attribute of a captured object is the cause."""
    model = Model({"first": WEIGHTS})

    error = _refused(lambda: model.predict(1))

    assert error.variable == "model"
    assert "model.weights['first']" in error.message


def test_attribute_of_the_function_itself_is_named() -> None:
    """What is stored on the function goes along."""

    def work() -> None: ...

    work.table = TABLE  # type: ignore[attr-defined]  # what a careless user does

    assert _refused(work).variable == "table"


def test_what_cannot_be_pickled_is_named() -> None:
    """Locks, files and generators stay; the message says which variable holds one, and what to do."""
    lock = threading.Lock()
    error = _refused(lambda: lock.locked())

    assert error.variable == "lock"
    assert "cannot be pickled" in error.message
    assert "inside the function" in error.message


def test_unpicklable_attribute_is_named() -> None:
    """The cause may be deep in an object."""
    model = Model([threading.Lock()])

    assert "model.weights[0]" in _refused(lambda: model).message


def test_large_closure_is_named() -> None:
    """Above 64 KiB the largest captured variable is named, with its size."""
    small, words = "x", "y" * MAX_FUNCTION_BYTES
    error = _refused(lambda: (small, words))

    assert error.variable == "words"
    assert str(MAX_FUNCTION_BYTES) in error.message
    assert "read them from a data set" in error.message


def test_cap_is_on_the_packed_bytes() -> None:
    """What just fits is sent, and one byte more is not."""
    room = MAX_FUNCTION_BYTES - len(functions.pack(_capturing("")))
    for size in range(room, 0, -1):  # a longer text has a longer head
        try:
            packed = functions.pack(_capturing("y" * size))
        except FunctionRefusedError:
            continue
        break

    assert room - size < 16
    assert len(packed) == MAX_FUNCTION_BYTES


@pytest.mark.parametrize("thing", [3, "shared", Model, Model(1.0), None], ids=repr)
def test_only_functions_are_packed(thing: Any) -> None:
    """A class, an object or a value is no function; the message shows the right form."""
    with pytest.raises(TypeError, match="gpu_remote takes a function"):
        functions.pack(thing)


# -- packing again ----------------------------------------------------------------------------------


def test_same_function_is_packed_once() -> None:
    """As long as nothing changed, the bytes are the same object."""
    packed = functions.PackedFunction(lambda x: np.sqrt(x) * SCALE)

    assert bytes(packed) is bytes(packed)


def test_changed_global_is_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A global that got another value goes with its new value: remote and local results stay equal."""
    packed = functions.PackedFunction(lambda: SCALE)
    before = bytes(packed)
    monkeypatch.setitem(globals(), "SCALE", 5.0)

    assert _loaded(before)() == 2.0
    assert _loaded(bytes(packed))() == 5.0


def test_changed_list_is_packed_again() -> None:
    """A captured list may change without getting another identity."""
    names = ["age"]
    packed = functions.PackedFunction(lambda: names)
    before = bytes(packed)
    names.append("income")

    assert _loaded(before)() == ["age"]
    assert _loaded(bytes(packed))() == ["age", "income"]


def test_changed_global_of_a_called_function_is_packed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """So does what a called function reads."""
    monkeypatch.setitem(globals(), "WEIGHTS", np.float64(2.0))
    packed = functions.PackedFunction(lambda x: _prepare(x))
    before = bytes(packed)
    monkeypatch.setitem(globals(), "WEIGHTS", np.float64(3.0))

    assert _loaded(before)(1) == 2.0
    assert _loaded(bytes(packed))(1) == 3.0


def test_data_that_comes_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A global that became a table since the first call stops the second."""
    packed = functions.PackedFunction(lambda: SCALE)
    bytes(packed)
    monkeypatch.setitem(globals(), "SCALE", TABLE)

    with pytest.raises(FunctionRefusedError):
        bytes(packed)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of the user's, beside the notebook."""
    path = tmp_path / "mine_to_change.py"
    path.write_text("FACTOR = 3\n\ndef times(x):\n    return FACTOR * x\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("mine_to_change")
    del sys.modules["mine_to_change"]


def test_changed_module_of_the_user_is_packed_again(own_module: Any) -> None:
    """A value in a module that travels goes with its new value, named by the function or by what it calls."""
    named = functions.PackedFunction(lambda: own_module.FACTOR)
    called = functions.PackedFunction(lambda: own_module.times(1))
    assert (_loaded(bytes(named))(), _loaded(bytes(called))()) == (3, 3)
    assert bytes(named) is bytes(named)

    own_module.FACTOR = 7

    assert (_loaded(bytes(named))(), _loaded(bytes(called))()) == (7, 7)


def test_module_in_a_module_of_the_user_is_looked_into(own_module: Any) -> None:
    """A module that travels takes along those that it imported."""
    outer = types.ModuleType("outer_of_mine")
    outer.inner = own_module  # type: ignore[attr-defined]  # as an import there does
    packed = functions.PackedFunction(lambda: outer.inner.FACTOR)
    assert _loaded(bytes(packed))() == 3

    own_module.FACTOR = 7

    assert _loaded(bytes(packed))() == 7


def test_reloaded_module_of_the_user_is_packed_again(own_module: Any) -> None:
    """After ``importlib.reload`` the new code runs, remote as local."""
    packed = functions.PackedFunction(lambda x: own_module.times(x))
    assert _loaded(bytes(packed))(1) == 3
    Path(own_module.__file__).write_text("def times(x):\n    return x + 1000  # mended\n", encoding="utf-8")

    importlib.reload(own_module)

    assert _loaded(bytes(packed))(1) == 1001


def test_changed_code_of_a_function_is_packed_again(own_module: Any) -> None:
    """Tools that reload modules give old functions new code."""
    times = own_module.times
    packed = functions.PackedFunction(lambda x: times(x))
    assert _loaded(bytes(packed))(1) == 3

    times.__code__ = compile("lambda x: FACTOR + x", "mended", "eval").co_consts[0]

    assert _loaded(bytes(packed))(1) == 4


def test_class_of_a_module_of_the_user_is_packed_again(own_module: Any) -> None:
    """What hangs on a class may change too."""
    own_module.Settings = type("Settings", (), {"k": 1, "__module__": "mine_to_change"})
    packed = functions.PackedFunction(lambda: own_module.Settings.k)
    assert _loaded(bytes(packed))() == 1

    own_module.Settings.k = 2

    assert _loaded(bytes(packed))() == 2


def test_data_that_comes_into_a_module_later_is_refused(own_module: Any) -> None:
    """A module that travels may not take a table along, whenever it got it."""
    packed = functions.PackedFunction(lambda: own_module.FACTOR)
    bytes(packed)
    own_module.TABLE = TABLE

    with pytest.raises(FunctionRefusedError) as refused:
        bytes(packed)
    assert "TABLE" in refused.value.message


def test_method_of_a_list_is_packed_again() -> None:
    """A built-in method is bound to an object, which may change."""
    names = ["age"]
    count = names.count
    captured, itself = functions.PackedFunction(lambda: count("age")), functions.PackedFunction(names.count)
    assert (_loaded(bytes(captured))(), _loaded(bytes(itself))("age")) == (1, 1)

    names.append("age")

    assert (_loaded(bytes(captured))(), _loaded(bytes(itself))("age")) == (2, 2)


def test_function_made_by_an_installed_module_is_looked_into() -> None:
    """A function that no name leads to goes by value, whatever module it says it is from."""
    state = [1]

    def read() -> int:
        return state[0]

    read.__module__ = "functools"
    packed = functions.PackedFunction(lambda: read())
    assert _loaded(bytes(packed))() == 1

    state[0] = 2

    assert _loaded(bytes(packed))() == 2


def test_threads_pack_at_once() -> None:
    """The list of modules that cloudpickle keeps is one for the process; threads that pack do not disturb it."""
    model, failures = Model(2.0), []

    def pack() -> None:
        try:
            for _ in range(20):
                assert _loaded(functions.pack(lambda x: model.predict(x)))(1) == 2.0
        except Exception as error:  # noqa: BLE001 - collected for the main thread
            failures.append(error)

    threads = [threading.Thread(target=pack) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
