"""What a mutation is. Pure data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One change to one file."""

    file: str
    #: Exact text, which is in the file once.
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One control removed, and who must notice."""

    #: Id in :mod:`ray_gpu.controls`.
    control: str
    #: What the change does, for people: "keys open for any grant".
    what: str
    #: One, unless the control has several locks of which each alone is enough.
    edits: tuple[Edit, ...]
    #: Tests that must fail, ``file::function`` or ``file::function[parameters]``: the cheapest that notice.
    tests: tuple[str, ...]
    #: Regular expression that the failure's own text must match, so that no crash is taken for a catch.
    reason: str


def mutation(
    control: str, what: str, edits: Edit | tuple[Edit, ...], tests: str | tuple[str, ...], reason: str
) -> Mutation:
    """Return a mutation; one edit or test need not be a tuple."""
    return Mutation(
        control=control,
        what=what,
        edits=(edits,) if isinstance(edits, Edit) else edits,
        tests=(tests,) if isinstance(tests, str) else tests,
        reason=reason,
    )
