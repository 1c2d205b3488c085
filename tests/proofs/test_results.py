"""P6: nothing comes back but data. Functions and forgers send what would run code if it were unpickled."""

from __future__ import annotations

import pickle
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import ray_gpu
from ray_gpu.outcome import RowsExpected, open_outcome
from ray_gpu.remote_error import rebuild
from tests.proofs.attacked import Attacked, all_powerful, command
from tests.proofs.forging import Witness, answer_bytes, bombs, extension_bytes, forgeries, table_bytes, value_bytes
from zones import values
from zones.errors import AnswerRefusedError, RemoteFunctionError, ValueRefusedError

#: What reading a bomb may add to the memory of this process, KiB: building it takes some, too.
BOMB_LIMIT_KIB = 200 << 10


@pytest.fixture
def witness() -> Iterator[Witness]:
    """A witness that has heard nothing yet."""
    made = Witness()
    yield made
    made.close()


@pytest.fixture(scope="module")
def session(attacked: Attacked) -> Iterator[ray_gpu.Session]:
    """One session for all tests of this file."""
    with attacked.attach() as opened:
        yield opened


# -- what functions return ------------------------------------------------------------------------


def return_trap(kind: str, port: int) -> Any:
    """Return a value that runs code when it is unpickled; runs in the sandbox."""
    import pickle

    import numpy as np
    import pyarrow as pa

    class Trap:
        def __reduce__(self) -> Any:
            return socket.create_connection, (("127.0.0.1", port), 5)

    class Column(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.binary(), "ray.data.arrow_pickled_object")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> Any:
            return cls()

    armed = pickle.dumps(Trap())
    made: dict[str, Callable[[], Any]] = {
        "object": Trap,
        "object in a list": lambda: [{"a": Trap()}],
        "object array": lambda: np.array([Trap()], dtype=object),
        "structured array": lambda: np.zeros(1, dtype=[("a", object)]),
        "class": lambda: Trap,
        "function": lambda: lambda: 1,
        "extension type": lambda: pa.ExtensionArray.from_storage(Column(), pa.array([armed])),
        "table with it": lambda: pa.table({"a": pa.ExtensionArray.from_storage(Column(), pa.array([armed]))}),
    }
    return made[kind]()


@pytest.mark.parametrize(
    "kind",
    ["object", "object in a list", "object array", "structured array", "class", "function", "extension type",
     "table with it"],
)  # fmt: skip
def test_refused_by_the_sandbox(session: ray_gpu.Session, witness: Witness, kind: str) -> None:
    """A value that is not data is refused by name, where it arises, and never unpickled."""
    with pytest.raises(ValueRefusedError):
        ray_gpu.gpu_remote(session=session)(return_trap).remote(kind, witness.port).result()

    assert not witness.sprung()


def test_pickle_stays_bytes(session: ray_gpu.Session, witness: Witness) -> None:
    """Bytes that happen to be a pickle come back as the bytes they are."""
    armed = witness.armed()

    assert ray_gpu.gpu_remote(session=session)(lambda data: data).remote(armed).result() == armed
    assert not witness.sprung()


# -- what a hostile sandbox or keeper sends -------------------------------------------------------


FORGERIES = list(forgeries(b"armed"))


@pytest.mark.parametrize("name", bombs())
def test_bomb_is_refused(name: str) -> None:
    """An answer that would fill memory or the stack is refused before it does either."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(AnswerRefusedError):
        open_outcome(memoryview(bombs()[name]), expected=RowsExpected(3))

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < BOMB_LIMIT_KIB


@pytest.mark.parametrize("name", FORGERIES)
def test_forgery_is_refused(witness: Witness, name: str) -> None:
    """The gateway's reader refuses a forged answer with one error, whatever it is."""
    with pytest.raises(ValueRefusedError):
        open_outcome(memoryview(forgeries(witness.armed())[name]))

    assert not witness.sprung()


def test_honest_answer_opens() -> None:
    """The same builders make answers that open, when their value is data: so nothing but the forgery is refused."""
    table = pa.table({"a": [b"armed"]})
    stream = table_bytes(table)
    honest = {
        "list": (value_bytes(["l", 1, b"armed"]), [1, b"armed"]),
        "array": (value_bytes(["n", "<i8", [1], False], bytes(8)), np.zeros(1, np.int64)),
        "table": (value_bytes(["T", len(stream)], stream), table),
    }

    for value, expected in honest.values():
        assert open_outcome(memoryview(answer_bytes({"status": "ok", "printed": ""}, value))).value == expected


def test_extension_names_matter(witness: Witness) -> None:
    """The very stream that is refused as a result is one that Arrow reads, so its refusal is ours."""
    stream = extension_bytes("ray.data.arrow_pickled_object", witness.armed())

    assert pa.ipc.open_stream(stream).read_all().num_rows == 1


def forge(payload: bytes) -> int:
    """Have the sandbox's own program send *payload* for an answer, once; runs in the sandbox."""
    import sys

    program: Any = sys.modules["__main__"]
    honest = program.write_outcome

    def forged(view: memoryview, *_: Any) -> int:
        program.write_outcome = honest
        view[: len(payload)] = payload
        return len(payload)

    program.write_outcome = forged
    return 0


@pytest.mark.parametrize("name", FORGERIES)
def test_hostile_sandbox(session: ray_gpu.Session, witness: Witness, name: str) -> None:
    """User code that took over its sandbox gets a forged answer no further than the gateway, which lives on."""
    with pytest.raises(ValueRefusedError):
        ray_gpu.gpu_remote(session=session)(forge).remote(forgeries(witness.armed())[name]).result()

    assert not witness.sprung()
    assert ray_gpu.gpu_remote(session=session)(lambda: 1).remote().result() == 1


def test_forger_can_answer(session: ray_gpu.Session) -> None:
    """What took over the sandbox does choose the answer: data that it forges arrives, as data."""
    payload = answer_bytes({"status": "ok", "printed": ""}, bytes(values.encode({"forged": np.arange(3)})))

    answer: Any = ray_gpu.gpu_remote(session=session)(forge).remote(payload).result()

    assert answer["forged"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["eval", "exec", "SystemExit", "KeyboardInterrupt", "open", "os.system", "object"])
def test_forged_exception(kind: str) -> None:
    """What is no exception of Python's own stays a :class:`RemoteFunctionError`; nothing else is called."""
    meta = {"status": "error", "type": kind, "builtin": True, "message": "1/0", "args": ["1/0"], "traceback": "",
            "printed": ""}  # fmt: skip
    with pytest.raises(RemoteFunctionError) as caught:
        open_outcome(memoryview(answer_bytes(meta, b"")))

    assert rebuild(caught.value) is caught.value


# -- the traps are live ---------------------------------------------------------------------------


def test_trap_springs_here(witness: Witness) -> None:
    """Unpickled in this process, the same bytes run their code."""
    pickle.loads(witness.armed()).close()

    assert witness.sprung()


def test_trap_springs_in_the_gateway(attacked: Attacked, witness: Witness) -> None:
    """Were it unpickled with the gateway's uid and files, the witness would hear of it."""
    if not all_powerful():
        pytest.skip("needs root with all capabilities: enters the gateway's namespaces")
    gateway = attacked.gateway()
    uid = Path(f"/proc/{gateway}").stat().st_uid
    inside = ["nsenter", f"--target={gateway}", "--mount", "--pid", "--", "setpriv", f"--reuid={uid}", f"--regid={uid}"]
    code = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1])).close()"
    subprocess.run(
        [*inside, "--clear-groups", sys.executable, "-c", code, witness.armed().hex()], check=True, timeout=60
    )

    assert "ray_gpu.gateway" in command(gateway)
    assert witness.sprung()
