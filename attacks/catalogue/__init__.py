"""The mutations: for each control of the registry, at least one text without which it is gone. Pure data."""

from __future__ import annotations

from attacks.catalogue import built_in, host
from attacks.catalogue.mutation import Mutation

#: In the registry's order.
MUTATIONS: tuple[Mutation, ...] = (*host.MUTATIONS, *built_in.MUTATIONS)


def caught_by() -> dict[str, tuple[str, ...]]:
    """Return, by control, the tests that notice when it is gone."""
    found: dict[str, dict[str, None]] = {}
    for mutation in MUTATIONS:
        found.setdefault(mutation.control, {}).update(dict.fromkeys(mutation.tests))
    return {control: tuple(tests) for control, tests in found.items()}
