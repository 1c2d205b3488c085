"""Rebuilds the exception that a user's function raised, as far as plain text can. Runs in the notebook. Pure."""

from __future__ import annotations

import builtins
from typing import Any

from zones.errors import RemoteFunctionError


class RemoteTraceback(Exception):  # noqa: N818 - it is no error, it is where one happened
    """Carries the remote traceback; shown by Python as the cause of the exception."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


#: Exceptions that would end the notebook, or a coroutine of its own, if a remote function could raise them there.
_NEVER = {"SystemExit", "KeyboardInterrupt", "GeneratorExit"}


def rebuild(error: RemoteFunctionError) -> Exception:
    """Return the built-in exception of the same name and text, else *error*; the remote traceback is its cause.

    So ``except KeyError`` works at the caller, and ``except*`` for the members of an ``ExceptionGroup``. Nothing is
    unpickled: only names of built-in exceptions are looked up.

    A ``StopIteration`` is one too, and does to the caller's code what it does where a function is called directly:
    within a generator Python turns it into ``RuntimeError``, and ``map(...)`` or a ``__next__`` of the caller's own
    take it for the end of what they go through.
    """
    found = _builtin(error) or error
    found.__cause__ = RemoteTraceback(error.traceback)
    if too_little_memory(found):
        found.add_note(
            "The node had too little memory for what the function made of one shard. Send less at once, as in "
            ".options(shard_bytes=1 << 20), or .options(halve_shards=True) to find out how much; or fewer columns, or "
            "have it compute with float32."
        )
    return found


def too_little_memory(error: BaseException) -> bool:
    """Tell whether a function found too little memory: Python's, or a GPU's, as CuPy and PyTorch say it."""
    named = isinstance(error, RemoteFunctionError) and error.type_name.endswith("OutOfMemoryError")
    return named or isinstance(error, MemoryError)


def _builtin(error: RemoteFunctionError) -> Exception | None:
    kind = getattr(builtins, error.type_name, None) if error.builtin and error.type_name not in _NEVER else None
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return None
    arguments = tuple(error.plain_args or ())
    if issubclass(kind, ExceptionGroup):
        return _made(kind, (*arguments, [_member(one) for one in error.members or ()]))
    made = _made(kind, arguments)
    if made is not None and str(made) == error.text:
        return made
    if isinstance(made, UnicodeError):
        # The text that it is about was too long, or is none: what it says of that text was said where it was.
        return _made(_saying(kind, error.text), arguments)
    # Its arguments were more than plain values: the text alone has to do.
    made = _made(kind, (error.text,))
    if isinstance(made, OSError) and arguments and isinstance(arguments[0], int):
        made.errno = arguments[0]
    return made


def _member(described: dict[str, Any]) -> Exception:
    """Return one exception of a group, whose traceback is in the group's."""
    one = RemoteFunctionError(
        f"{described['type']}: {described['message']}",
        type_name=described["type"],
        builtin=described["builtin"],
        text=described["message"],
        plain_args=described["args"],
        members=described["members"],
        traceback="",
        printed="",
    )
    return _builtin(one) or one


def _saying(kind: type[Exception], text: str) -> type[Exception]:
    """Return a kind of *kind*, with its name, that says *text*."""
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__str__": lambda _: text})


def _made(kind: type[Exception], arguments: tuple[object, ...]) -> Exception | None:
    try:
        return kind(*arguments)
    except Exception:  # noqa: BLE001 - some types want other arguments, and say so in their own ways
        return None
