"""Shows a run to whoever watches it: each attack as it fails, each control with both sides, and the three totals."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attacks.cases import Case
from attacks.mutants import Verdict, in_short
from attacks.outcome import Count, Outcome, count
from attacks.sections import Kind, kind_of
from ray_gpu.controls import CONTROLS

#: What a test's passing means, and its failing.
_WORDS: dict[Kind, tuple[str, str]] = {
    "attack": ("fails", "SUCCEEDS"),
    "positive": ("real", "NOT REAL"),
    "check": ("holds", "FAILS"),
}
#: Where the output goes to a file, whose reader scrolls.
_FILE_COLUMNS = 160


class Screen:
    """Prints. A test's cases are summed up in one line, when the next test begins."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console.width = _FILE_COLUMNS
        self._cases: list[Case] = []

    def section(self, title: str) -> None:
        """Begin a part."""
        self.flush()
        self._console.print(f"\n[bold]{escape(title)}[/bold]")

    def case(self, case: Case) -> None:
        """Take a case."""
        if self._cases and self._cases[-1].test != case.test:
            self.flush()
        self._cases.append(case)

    def flush(self) -> None:
        """Print the line of the test whose cases have come."""
        if not self._cases:
            return
        cases, self._cases = self._cases, []
        found, kind = count(cases), kind_of(cases[0].test, cases[0].doc)
        word, colour = self._word(found, kind)
        times = f" x {found.made}" if found.made > 1 else ""
        label = f"{kind:8}" if kind != "check" else "check   "
        text = cases[0].doc or cases[0].test.partition("::")[2]
        self._console.print(f"  {label} [{colour}]{word + times:14}[/{colour}] {escape(text)}")
        for case in cases:
            if case.outcome in ("failed", "error"):
                self._console.print(f"      [red]{escape(case.id)}: {escape(in_short(case.message))}[/red]")
        if found.skipped == len(cases):
            self._console.print(f"      [yellow]{escape(in_short(cases[0].message))}[/yellow]")

    def _word(self, found: Count, kind: Kind) -> tuple[str, str]:
        if found.errors:
            return "not made", "red"
        if not found.made:
            return "did not run", "yellow"
        return (_WORDS[kind][1], "red") if found.wrong else (_WORDS[kind][0], "green")

    def verdict(self, verdict: Verdict) -> None:
        """Print what became of a mutant."""
        word, colour = ("not caught", "red")
        if verdict.caught:
            word, colour = "caught", "green"
        elif verdict.skipped:
            word, colour = "did not run", "yellow"
        mutation = verdict.mutation
        by = verdict.by.partition("::")[2]
        text = (
            f"{mutation.what}: {by}, {verdict.seconds:.0f} s" if verdict.caught else f"{mutation.what}: {verdict.why}"
        )
        self._console.print(f"  [{colour}]{word:12}[/{colour}] {mutation.control:20} {escape(text)}")

    def controls(self, outcome: Outcome) -> None:
        """Print each control with its attacks, its positive controls and its mutants side by side."""
        self.flush()
        table = Table("control", "keeps off", "attacks", "positive controls", "removed", box=None, pad_edge=False)
        for name in outcome.controls:
            attacks, positives = (count(outcome.of_control(name, kind)) for kind in ("attack", "positive"))
            own = [verdict for verdict in outcome.made() if verdict.mutation.control == name]
            caught = sum(verdict.caught for verdict in own)
            table.add_row(
                name, CONTROLS[name].keeps_off,
                _cell(attacks, "failed"), _cell(positives, "succeeded"),
                _cell(Count(made=len(own), right=caught, skipped=0, errors=0), "caught"),
            )  # fmt: skip
        self._console.print()
        self._console.print(table)

    def totals(self, outcome: Outcome) -> None:
        """Print the three totals, and what was not shown."""
        attacks, positives = count(outcome.of_kind("attack")), count(outcome.positives())
        made = len(outcome.made())
        for name, kinds in outcome.not_shown().items():
            self._console.print(f"[yellow]{name}: no {', no '.join(kinds)} ran here[/yellow]")
        for name, kinds in outcome.unproven().items():
            self._console.print(f"[yellow]{name}: {', '.join(kinds)} unproven here, for want of a GPU[/yellow]")
        self._console.print()
        self._total("attacks", f"{attacks.made} made, {attacks.wrong} succeeded", attacks.perfect)
        self._total("positive controls", f"{positives.made} made, {positives.right} succeeded", positives.perfect)
        self._total("mutations", f"{made} made, {outcome.caught()} caught", outcome.caught() == made)

    def _total(self, what: str, text: str, fine: bool) -> None:
        colour = "green" if fine else "red"
        self._console.print(f"[bold]{what:18}[/bold] [{colour}]{text}[/{colour}]")

    def say(self, text: str) -> None:
        """Print a line."""
        self.flush()
        self._console.print(escape(text))


def _cell(found: Count, word: str) -> str:
    if not found.made:
        return "[yellow]none[/yellow]"
    colour = "green" if found.perfect else "red"
    return f"[{colour}]{found.right} of {found.made} {word}[/{colour}]"
