"""Exceptions of a user's function, rebuilt at the caller from plain text."""

from __future__ import annotations

import builtins
import traceback
from typing import Any

import pytest

from ray_gpu.remote_error import rebuild
from zones.errors import RemoteFunctionError


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


def _travelled(error: BaseException) -> RemoteFunctionError:
    """Describe *error* as the sandbox does."""
    from ray_gpu.sandbox.child import _describe

    said = _describe(error)
    return RemoteFunctionError(
        "",
        type_name=said["type"],
        builtin=said["builtin"],
        text=said["message"],
        plain_args=said["args"],
        traceback=said["traceback"],
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
    found = rebuild(_travelled(error))

    assert type(found) is type(error)
    if not isinstance(error, UnicodeError):
        assert str(found).strip("'\"") == str(error).strip("'\"")
    else:
        assert error.reason in str(found)  # type: ignore[attr-defined]  # both kinds here have one


def test_errno_comes_back() -> None:
    """An ``OSError`` keeps its number."""
    found = rebuild(_travelled(PermissionError(13, "Permission denied", "/etc/shadow")))

    assert isinstance(found, PermissionError)
    assert found.errno == 13


def test_traceback_text_is_shown() -> None:
    """The remote traceback is the cause, so that Python prints it above the error."""
    shown = "".join(traceback.format_exception(rebuild(_remote("ValueError", "bad", ["bad"]))))

    assert 'File "cell", line 3' in shown
    assert shown.rstrip().endswith("ValueError: bad")


@pytest.mark.parametrize(
    "name", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "StopAsyncIteration"]
)
def test_what_would_end_the_notebook_stays_remote(name: str) -> None:
    """A remote function cannot exit, interrupt or silently end a loop of the caller."""
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
    assert remaining <= {"StopIteration", "StopAsyncIteration", "ExceptionGroup"}
