"""Rebuilds the exception that a user's function raised, as far as plain text can. Runs in the notebook. Pure."""

from __future__ import annotations

import builtins

from zones.errors import RemoteFunctionError


class RemoteTraceback(Exception):  # noqa: N818 - it is no error, it is where one happened
    """Carries the remote traceback; shown by Python as the cause of the exception."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


#: Exceptions that would end or confuse the notebook if a remote function could raise them there.
_NEVER = {"SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "StopAsyncIteration"}


def rebuild(error: RemoteFunctionError) -> Exception:
    """Return the built-in exception of the same name and text, else *error*; the remote traceback is its cause.

    So ``except KeyError`` works at the caller. Nothing is unpickled: only names of built-in exceptions are looked up.
    """
    found = _builtin(error) or error
    found.__cause__ = RemoteTraceback(error.traceback)
    return found


def _builtin(error: RemoteFunctionError) -> Exception | None:
    kind = getattr(builtins, error.type_name, None) if error.builtin and error.type_name not in _NEVER else None
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        return None
    arguments = tuple(error.plain_args or ())
    made = _made(kind, arguments)
    if made is not None and str(made) == error.text:
        return made
    # Its arguments were more than plain values: the text alone has to do.
    made = _made(kind, (error.text,)) or _unicode_error(kind, error.text)
    if isinstance(made, OSError) and arguments and isinstance(arguments[0], int):
        made.errno = arguments[0]
    return made


def _made(kind: type[Exception], arguments: tuple[object, ...]) -> Exception | None:
    try:
        return kind(*arguments)
    except Exception:  # noqa: BLE001 - some types want other arguments, and say so in their own ways
        return None


def _unicode_error(kind: type[Exception], text: str) -> Exception | None:
    """Return an error about an empty text: the one that it was raised for stays where it was."""
    for empty in (b"", ""):
        if made := _made(kind, ("?", empty, 0, 0, text)) or _made(kind, (empty, 0, 0, text)):
            return made
    return None
