"""What a whole run came to. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from attacks.cases import Case, is_of
from attacks.mutants import Verdict
from attacks.sections import Kind, kind_of
from ray_gpu.controls import CONTROLS


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Cases of one kind."""

    made: int
    #: Of those made, how many went as they must: an attack failed, a positive control succeeded.
    right: int
    skipped: int
    #: Could not be made: a fixture failed, or the process ended.
    errors: int

    @property
    def wrong(self) -> int:
        """How many did not."""
        return self.made - self.right

    @property
    def perfect(self) -> bool:
        """Whether all went as they must, and none was kept from being made."""
        return self.wrong == self.errors == 0


def count(cases: Iterable[Case]) -> Count:
    """Count cases. A test passes when an attack fails, and when a positive control succeeds."""
    outcomes = [case.outcome for case in cases]
    passed, failed = outcomes.count("passed"), outcomes.count("failed")
    return Count(
        made=passed + failed, right=passed, skipped=outcomes.count("skipped"), errors=outcomes.count("error")
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Everything that was run."""

    #: By section, in the order in which they were run; empty when no attack was.
    cases: Mapping[str, Sequence[Case]] = field(default_factory=dict)
    verdicts: Sequence[Verdict] = ()
    #: The ids that were asked for.
    controls: Sequence[str] = tuple(CONTROLS)

    def all_cases(self) -> list[Case]:
        """Return the cases of every section."""
        return [case for cases in self.cases.values() for case in cases]

    def of_kind(self, kind: Kind) -> list[Case]:
        """Return the cases of one kind."""
        return [case for case in self.all_cases() if kind_of(case.test, case.doc) == kind]

    def of_control(self, name: str, kind: Kind) -> list[Case]:
        """Return the cases of the tests that a control names. A test may be both its attack and its control."""
        tests = CONTROLS[name].attacks if kind == "attack" else CONTROLS[name].positives
        return [case for case in self.all_cases() if any(is_of(case, test) for test in tests)]

    def positives(self) -> list[Case]:
        """Return the cases that show an attack to be real, those included that are an attack as well."""
        named = {test for control in CONTROLS.values() for test in control.positives}
        return [c for c in self.all_cases() if c.test in named or kind_of(c.test, c.doc) == "positive"]

    def caught(self) -> int:
        """How many mutants were caught."""
        return sum(verdict.caught for verdict in self.verdicts)

    def made(self) -> list[Verdict]:
        """Return the mutants that were made."""
        return [verdict for verdict in self.verdicts if not verdict.skipped]

    def not_shown(self) -> dict[str, list[str]]:
        """Return the controls that this run did not show to hold, and what of theirs is missing or was skipped."""
        found: dict[str, list[str]] = {}
        for name in self.controls:
            kinds = [kind for kind, needs_gpu in self._unmade(name) if not needs_gpu]
            if self.verdicts and not any(v.mutation.control == name for v in self.made()):
                kinds.append("mutation")
            if kinds:
                found[name] = kinds
        return found

    def unproven(self) -> dict[str, list[str]]:
        """Return what of which controls only a machine with a GPU can show, where this one has none."""
        found = {name: [kind for kind, needs_gpu in self._unmade(name) if needs_gpu] for name in self.controls}
        return {name: kinds for name, kinds in found.items() if kinds}

    def _unmade(self, name: str) -> Iterator[tuple[str, bool]]:
        """Yield what was not made of a control's cases, and whether it is for want of a GPU."""
        kinds: tuple[tuple[str, Kind], ...] = (("attack", "attack"), ("positive control", "positive"))
        for words, kind in kinds:
            cases = self.of_control(name, kind)
            if self.cases and not count(cases).made:
                yield words, _needs_gpu(cases)

    def perfect(self) -> bool:
        """Whether no attack succeeded, all positive controls did, all mutants were caught, and all controls shown."""
        fine = all(count(cases).perfect for cases in (self.all_cases(), self.positives()))
        return fine and self.caught() == len(self.made()) and not self.not_shown()


def _needs_gpu(cases: Sequence[Case]) -> bool:
    return bool(cases) and all(case.outcome == "skipped" and case.test.startswith("tests/gpu/") for case in cases)
