"""Exceptions of a user's function, rebuilt at the caller from plain text."""

from __future__ import annotations

import builtins
import traceback
from typing import Any

import msgpack
import pytest

from ray_gpu.answers import MAX_TEXT_BYTES, write_outcome
from ray_gpu.outcome import open_outcome
from ray_gpu.remote_error import rebuild
from ray_gpu.sandbox import child
from ray_gpu.sandbox.raised import describe
from zones import values
from zones.errors import RemoteFunctionError, from_wire, to_wire


class OwnError(Exception):
    """A type that is not built in."""


def _through_the_zone(error: BaseException) -> RemoteFunctionError:
    """Describe *error* as the sandbox does, and check the description as the gateway does."""
    view = memoryview(bytearray(1 << 20))
    size = write_outcome(view, {**describe(error), "printed": ""}, None, values.encode_into)
    with pytest.raises(RemoteFunctionError) as raised:
        open_outcome(view[:size])
    document = msgpack.unpackb(msgpack.packb(to_wire(raised.value)))
    found = from_wire(document)
    assert isinstance(found, RemoteFunctionError)
    return found


def _remote(type_name: str, text: str = "", args: Any = (), *, builtin: bool = True) -> RemoteFunctionError:
    return RemoteFunctionError(
        f"{type_name}: {text}",
        type_name=type_name,
        builtin=builtin,
        text=text,
        plain_args=list(args),
        traceback=f'  File "cell", line 3\n{type_name}: {text}',
        printed="",
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad value"),
        ValueError(),
        ValueError("two", 2),
        KeyError("age"),
        KeyError(("a", 1)),
        IndexError(3),
        ZeroDivisionError("division by zero"),
        TypeError("no"),
        MemoryError("full"),
        OSError(28, "No space left"),
        FileNotFoundError(2, "No such file", "/data"),
        NameError("name 'x' is not defined"),
        AssertionError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"),
        UnicodeTranslateError("é", 0, 1, "no such character"),
        UnicodeError("plain"),
        StopIteration(3),
        StopAsyncIteration(),
        ExceptionGroup("several", [ValueError("one")]),
        RecursionError("deep"),
        UserWarning("careful"),
        NotImplementedError("later"),
        ArithmeticError("sum"),
        ImportError("no module"),
        ModuleNotFoundError("no module"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_builtin_type_comes_back(error: Exception) -> None:
    """``except ValueError`` works at the caller, with the text that the function gave."""
    found = rebuild(_through_the_zone(error))

    assert type(found) is type(error)
    assert str(found).strip("'\"") == str(error).strip("'\"")


def test_errno_comes_back() -> None:
    """An ``OSError`` keeps its number."""
    found = rebuild(_through_the_zone(PermissionError(13, "Permission denied", "/etc/shadow")))

    assert isinstance(found, PermissionError)
    assert found.errno == 13


@pytest.mark.parametrize(
    "error",
    [
        UnicodeDecodeError("utf-8", b"a" * 100_000 + b"\xff", 100_000, 100_001, "invalid start byte"),
        UnicodeDecodeError("utf-8", b"\xff" * 100_000, 3, 9, "invalid bytes"),
        UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates not allowed"),
        UnicodeTranslateError("\ud800", 0, 1, "no such character"),
    ],
    ids=["long bytes", "many bytes", "no valid text", "no valid text to translate"],
)
def test_unicode_error_about_a_text_that_stays(error: UnicodeError) -> None:
    """The text that it is about may be too long to come back, or no valid text; what it says is the same."""
    found: Any = rebuild(_through_the_zone(error))

    assert issubclass(type(found), type(error))
    assert (type(found).__name__, str(found)) == (type(error).__name__, str(error))
    assert (found.start, found.end, found.reason) == error.args[-3:]


def test_unicode_error_has_its_text() -> None:
    """A short one comes back with the bytes that it is about."""
    found: Any = rebuild(_through_the_zone(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")))

    assert (found.encoding, found.object, found.start, found.end) == ("utf-8", b"\xff", 0, 1)


def test_value_of_a_stop_iteration_comes_back() -> None:
    """What a generator returned is in it."""
    found: Any = rebuild(_through_the_zone(StopIteration(3)))

    assert found.value == 3


def test_members_of_a_group_come_back() -> None:
    """``except*`` finds the members of an exception group, in groups within it too."""
    inner = ExceptionGroup("inner", [KeyError("age"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")])
    found: Any = rebuild(_through_the_zone(ExceptionGroup("outer", [ValueError("one"), inner, OwnError("mine")])))

    assert type(found) is ExceptionGroup
    assert found.message == "outer"
    one, within, own = found.exceptions
    assert (type(one), str(one)) == (ValueError, "one")
    assert type(within) is ExceptionGroup
    assert [type(member) for member in within.exceptions] == [KeyError, UnicodeDecodeError]
    assert isinstance(own, RemoteFunctionError)
    assert own.type_name.endswith("OwnError")
    assert "OwnError: mine" in str(found.__cause__)


def _deep(depth: int) -> Exception:
    return ExceptionGroup("deep", [_deep(depth - 1)]) if depth else ValueError("one")


@pytest.mark.parametrize(
    "group",
    [
        ExceptionGroup("many", [ValueError(str(i)) for i in range(1000)]),
        _deep(200),
        BaseExceptionGroup("other", [KeyboardInterrupt()]),
    ],
    ids=["many", "deep", "interrupt"],
)
def test_group_that_cannot_come_back_is_text(group: BaseException) -> None:
    """A group with very many members, or with an interrupt, is named and shown."""
    found = rebuild(_through_the_zone(group))

    assert isinstance(found, RemoteFunctionError)
    assert found.type_name == type(group).__name__
    assert str(group) in str(found)


def test_hostile_description_of_a_group_is_cut() -> None:
    """A sandbox of somebody else's may describe what it likes; what is no description is left out."""
    described: dict[str, Any] = {"type": "ValueError", "builtin": True, "message": "x", "args": ["x"], "members": []}
    endless: dict[str, Any] = dict(described)
    for _ in range(200):
        endless = {**described, "type": "ExceptionGroup", "members": [endless, 3, None, "eval"]}
    view = memoryview(bytearray(1 << 20))
    size = write_outcome(view, {"status": "error", "traceback": "", **endless}, None, values.encode_into)

    with pytest.raises(RemoteFunctionError) as raised:
        open_outcome(view[:size])

    assert isinstance(rebuild(raised.value), Exception)


def _raises_from() -> None:
    try:
        dict[str, int]()["patient"]
    except KeyError as error:
        raise ValueError("outer") from error


def _raises_while_handling() -> None:
    try:
        _raises_from()
    except ValueError:
        raise TypeError("last")  # noqa: B904 - the implicit context is what is looked at


def test_chained_exceptions_are_in_the_traceback() -> None:
    """All links are shown, explicit and implicit ones, in Python's words; and no frame of what called the function."""
    with pytest.raises(TypeError) as raised:
        _raises_while_handling()
    # As if the sandbox's own code had called it: a frame with its name.
    source = compile("def call(function):\n    function()\n", child.__file__, "exec")
    names: dict[str, Any] = {}
    exec(source, names)
    with pytest.raises(TypeError) as called:
        names["call"](_raises_while_handling)

    for error in (raised.value, called.value):
        text = _through_the_zone(error).traceback
        assert [line for line in text.splitlines() if ": " in line and line[0] in "KVT"] == [
            "KeyError: 'patient'",
            "ValueError: outer",
            "TypeError: last",
        ]
        assert text.count("direct cause of the following exception") == 1
        assert text.count("During handling of the above exception, another exception occurred") == 1
        assert text.count("in _raises_from") == 2
        assert child.__file__ not in text


def test_suppressed_context_is_not_shown() -> None:
    """``raise ... from None`` hides what was before."""

    def raises() -> None:
        try:
            dict[str, int]()["patient"]
        except KeyError:
            raise ValueError("outer") from None

    with pytest.raises(ValueError, match="outer") as raised:
        raises()
    assert "patient" not in _through_the_zone(raised.value).traceback


def test_long_chain_is_cut() -> None:
    """However long a chain is, its end fits."""
    error: Exception | None = None
    for number in range(5000):
        following = ValueError(f"link {number}")
        following.__cause__ = error
        error = following
    assert error is not None

    text = _through_the_zone(error).traceback

    assert len(text) <= MAX_TEXT_BYTES
    assert "link 4999" in text


def test_traceback_text_is_shown() -> None:
    """The remote traceback is the cause, so that Python prints it above the error."""
    shown = "".join(traceback.format_exception(rebuild(_remote("ValueError", "bad", ["bad"]))))

    assert 'File "cell", line 3' in shown
    assert shown.rstrip().endswith("ValueError: bad")


@pytest.mark.parametrize("name", ["SystemExit", "KeyboardInterrupt", "GeneratorExit"])
def test_what_would_end_the_notebook_stays_remote(name: str) -> None:
    """A remote function cannot exit or interrupt the caller."""
    found = rebuild(_remote(name))

    assert isinstance(found, RemoteFunctionError)
    assert found.type_name == name


@pytest.mark.parametrize(
    "name", ["eval", "exit", "print", "object", "no_such", "__import__", "", "BaseException", "int"]
)
def test_what_is_no_exception_is_not_called(name: str) -> None:
    """A name from a hostile sandbox that is no built-in exception is text and nothing else."""
    assert type(rebuild(_remote(name, "1+1", ["1+1"]))) is RemoteFunctionError


def test_other_types_come_back_as_themselves_in_name() -> None:
    """A type of a library is not imported; its name, text and traceback are there."""
    found = rebuild(_remote("numpy.linalg.LinAlgError", "Singular matrix", builtin=False))

    assert isinstance(found, RemoteFunctionError)
    assert found.type_name == "numpy.linalg.LinAlgError"
    assert "Singular matrix" in str(found)


def test_every_builtin_exception_has_an_answer() -> None:
    """For each built-in exception there is an error to raise, of that type wherever it can be made."""
    names = [name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)]
    found = {name: rebuild(_remote(name, "text", ["text"])) for name in names}

    remaining = {name for name, error in found.items() if isinstance(error, RemoteFunctionError)}
    # These take other arguments than one text, which a sandbox of ours sends.
    assert remaining <= {"ExceptionGroup", "UnicodeDecodeError", "UnicodeEncodeError", "UnicodeTranslateError"}


@pytest.mark.parametrize(
    ("kind", "builtin", "hinted"),
    [
        ("MemoryError", True, True),
        ("cupy.cuda.memory.OutOfMemoryError", False, True),
        ("torch.OutOfMemoryError", False, True),
        ("ValueError", True, False),
    ],
)
def test_too_little_memory_says_what_to_do(kind: str, *, builtin: bool, hinted: bool) -> None:
    """An error about memory says how to send less; others say nothing of it."""
    notes = getattr(rebuild(_remote(kind, "no", ["no"], builtin=builtin)), "__notes__", [])

    assert any("shard_bytes" in note for note in notes) is hinted
