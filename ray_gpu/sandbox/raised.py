"""Describes what a user's function raised, as plain values that the caller builds it again from. Runs in the sandbox.

Objects of the user's own are asked for their text, which may raise anything, or have any size.
"""

from __future__ import annotations

import builtins
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from ray_gpu.answers import MAX_MEMBERS, MAX_TEXT_BYTES
from zones.errors import ZoneError

#: A type's name longer than this is cut, characters.
MAX_NAME_CHARS = 200
#: A message within an exception group longer than this is cut, characters.
_MAX_MEMBER_CHARS = MAX_TEXT_BYTES // MAX_MEMBERS
#: The code that calls the user's function: no part of what went wrong there.
_CALLER = str(Path(__file__).with_name("child.py"))


def describe(error: BaseException) -> dict[str, Any]:
    """Describe an exception by type, message, plain arguments, an exception group's members, and traceback text."""
    return {
        "status": "error",
        **_describe_one(error, MAX_TEXT_BYTES),
        "traceback": _text(lambda: _traceback(error))[-MAX_TEXT_BYTES:],
    }


def _describe_one(error: BaseException, most: int) -> dict[str, Any]:
    kind = type(error)
    builtin = getattr(builtins, kind.__name__, None) is kind
    return {
        "type": kind.__name__ if builtin else _text(lambda: f"{kind.__module__}.{kind.__qualname__}")[:MAX_NAME_CHARS],
        "builtin": builtin,
        "message": _text(lambda: str(error))[:most],
        "args": _plain_args(error, most),
        "members": _members(error) if builtin and isinstance(error, BaseExceptionGroup) else [],
    }


def _members(group: BaseExceptionGroup[Any]) -> list[dict[str, Any]]:
    """Describe the members of a group and of groups in it; none of them if they are too many."""
    return [_describe_one(one, _MAX_MEMBER_CHARS) for one in group.exceptions] if _count(group) <= MAX_MEMBERS else []


def _count(group: BaseExceptionGroup[Any]) -> int:
    waiting: list[BaseException] = [group]
    found = 0
    while waiting and found <= MAX_MEMBERS:
        one = waiting.pop()
        found += 1
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
    return found


def _traceback(error: BaseException) -> str:
    """Return the text of an exception and of all that it came from, without frames that are not the user's."""
    if isinstance(error, ZoneError):
        return error.message
    shown = traceback.TracebackException.from_exception(error)
    waiting, seen = [shown], set()
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            one.stack[:] = [frame for frame in one.stack if frame.filename != _CALLER]
            waiting += [other for other in (one.__cause__, one.__context__, *(one.exceptions or ())) if other]
    return "".join(shown.format())


def _plain_args(error: BaseException, most: int) -> list[Any]:
    """Return an exception's arguments, for the caller to build it again, if all are small plain values; else none."""
    try:
        if isinstance(error, BaseExceptionGroup):
            return [error.message] if _is_plain([error.message], most) else []
        args = list(error.args)
        if _is_plain(args, most):
            return args
        if isinstance(error, (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError)):
            # All but the text that it is about, which is long or no valid text.
            args = [arg[:0] if arg is error.object else arg for arg in args]
            return args if _is_plain(args, most) else []
    except Exception:  # noqa: BLE001 - args may be a property of the user's own
        return []
    return []


def _is_plain(args: list[Any], most: int) -> bool:
    if not all(type(arg) in (str, bytes, int, float, bool, type(None)) for arg in args):
        return False
    try:
        return len(msgpack.packb(args)) <= most
    except (ValueError, OverflowError):  # a lone surrogate, or an integer over 64 bits
        return False


def _text(make: Callable[[], str]) -> str:
    """Return the text that *make* makes of the user's object, as valid Unicode, or what kept it from doing so."""
    try:
        return make().encode("utf-8", "backslashreplace").decode("utf-8")
    except Exception as error:  # noqa: BLE001 - a __str__ of the user's own may raise anything
        return f"<its text cannot be shown: {type(error).__name__}>"
