"""Writes docs/attacks.md: what was attacked on which machine, and what came of it. Reads /proc and git."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from attacks.cases import Case
from attacks.mutants import Verdict
from attacks.outcome import Outcome, count
from attacks.sections import kind_of
from benchmarks import machine
from ray_gpu.controls import CONTROLS
from ray_gpu.sandbox.boundary import device_hint

_HEAD = """\
# Attacks

Written by `make attack`, which makes every attack beside its positive control, and removes every control once, in a
copy, to see a test fail. Do not edit it. What the ids mean is in [controls.md](controls.md).

"""
#: What a reader of the last table must know.
_ABOUT_MUTATIONS = """\
Each row is one change in a copy of the tree. It is caught by a test that passes without the change, and with it fails
by itself for the reason that is named beforehand; a crash is none. The texts are in
[attacks/catalogue](../attacks/catalogue).
"""


def describe(root: Path) -> dict[str, str]:
    """Return what the run was made on."""
    known = machine.describe()
    device = device_hint()
    return {
        "date": known["date"],
        "commit": _commit(root),
        "processor": known["processor"],
        "memory": known["memory"],
        "kernel": known["kernel"],
        "versions": known["versions"],
        "user": known["user"],
        "GPU": "none: NumPy stood in, so the scrubbing of GPU memory is unproven here"
        if device == "numpy stand-in"
        else device,
    }


def _commit(root: Path) -> str:
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    text = done.stdout.strip() or "unknown"
    return text.replace("-dirty", ", with changes that are not committed")


def markdown(outcome: Outcome, facts: dict[str, str], *, minutes: float) -> str:
    """Return the report."""
    attacks, positives = count(outcome.of_kind("attack")), count(outcome.positives())
    checks = count(outcome.of_kind("check"))
    made = len(outcome.made())
    totals = [
        f"- **attacks: {attacks.made} made, {attacks.wrong} succeeded**",
        f"- **positive controls: {positives.made} made, {positives.right} succeeded "
        f"({_percent(positives.right, positives.made)})**",
        f"- **mutations: {made} made, {outcome.caught()} caught ({_percent(outcome.caught(), made)})**",
        f"- checks besides: {checks.made} made, {checks.wrong} failed; time: {minutes:.0f} minutes",
    ]
    facts_table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    parts = [
        _HEAD.rstrip("\n"),
        "\n".join(totals),
        "\n".join(facts_table),
        *_failures(outcome),
        "## Controls\n\n" + "\n".join(_controls(outcome)),
        *(f"## {name}\n\n" + "\n".join(_section(cases)) for name, cases in outcome.cases.items()),
        "## Mutation\n\n" + "\n".join(_mutations(outcome.verdicts)),
        "## What did not run here\n\n" + "\n".join(_skipped(outcome)),
    ]
    return "\n\n".join(parts) + "\n"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none made"


def _failures(outcome: Outcome) -> list[str]:
    wrong = [case for case in outcome.all_cases() if case.outcome in ("failed", "error")]
    escaped = [verdict for verdict in outcome.made() if not verdict.caught]
    lines = [f"- `{case.id}`: {case.outcome}: {_cell(case.message)}" for case in wrong]
    lines += [f"- mutation of `{v.mutation.control}` ({v.mutation.what}): {_cell(v.why)}" for v in escaped]
    lines += [f"- `{name}`: no {', no '.join(kinds)} ran here" for name, kinds in outcome.not_shown().items()]
    return ["## What is not as it must be\n\n" + "\n".join(lines)] if lines else []


def _controls(outcome: Outcome) -> Iterator[str]:
    yield "| control | keeps off | attacks that failed | positive controls that succeeded | its removal is noticed by |"
    yield "|---|---|---|---|---|"
    for name in outcome.controls:
        attacks, positives = (count(outcome.of_control(name, kind)) for kind in ("attack", "positive"))
        removed = [_caught(verdict) for verdict in outcome.verdicts if verdict.mutation.control == name]
        yield (
            f"| `{name}` | {CONTROLS[name].keeps_off} | {attacks.right} of {attacks.made} | "
            f"{positives.right} of {positives.made} | {'; '.join(dict.fromkeys(removed)) or 'none'} |"
        )


def _caught(verdict: Verdict) -> str:
    if verdict.skipped:
        return "not tried here"
    return f"{_link(verdict.by)}, {verdict.seconds:.0f} s" if verdict.caught else "**nobody**"


def _link(case: str) -> str:
    test, _, parameters = case.partition("[")
    file, _, name = test.partition("::")
    return f"[{name}](../{file})" + (f", {_cell(parameters.removesuffix(']'))}" if parameters else "")


def _section(cases: Sequence[Case]) -> Iterator[str]:
    """Yield a row for each test, its cases summed up."""
    yield "| | test | what it says | cases | s |"
    yield "|---|---|---|---|---|"
    for test in dict.fromkeys(case.test for case in cases):
        own = [case for case in cases if case.test == test]
        found = count(own)
        went = f"{found.right} of {found.made} as they must" if found.made else ""
        rest = [f"{number} {what}" for number, what in ((found.skipped, "skipped"), (found.errors, "errors")) if number]
        seconds = sum(case.seconds for case in own)
        sentence = _cell(own[0].doc) or "(no sentence)"
        cells = ", ".join([*([went] if went else []), *rest])
        yield f"| {kind_of(test, own[0].doc)} | {_link(test)} | {sentence} | {cells} | {seconds:.1f} |"


def _mutations(verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield _ABOUT_MUTATIONS
    yield "| control | what the change does | noticed by | which said | s |"
    yield "|---|---|---|---|---|"
    for verdict in verdicts:
        by = "not tried here" if verdict.skipped else _link(verdict.by) if verdict.caught else "**nobody**"
        why = _cell(verdict.why)
        yield f"| `{verdict.mutation.control}` | {verdict.mutation.what} | {by} | {why} | {verdict.seconds:.1f} |"


def _skipped(outcome: Outcome) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for case in outcome.all_cases():
        if case.outcome == "skipped":
            reasons.setdefault(case.message, []).append(case.test)
    for verdict in outcome.verdicts:
        if verdict.skipped:
            reasons.setdefault(verdict.why, []).append(f"mutation of {verdict.mutation.control}")
    if not reasons:
        yield "Everything ran."
    for name, kinds in outcome.unproven().items():
        yield f"- **`{name}`: {', '.join(kinds)} unproven here, for want of a GPU**"
    for reason, tests in reasons.items():
        yield f"- {_cell(reason)}: {_names(tests)}"


def _names(tests: Iterable[str]) -> str:
    return ", ".join(f"`{test}`" for test in dict.fromkeys(tests))


def _cell(text: str) -> str:
    """Return a text as it can stand in a table: one line, short, and without what Markdown would take for more."""
    line = re.sub(
        r"[|`<>\[\]*]", lambda match: {"|": "/", "<": "(", ">": ")"}.get(match[0], "'"), " ".join(text.split())
    )
    # Where a tree is, or a test kept its files, is nobody's business.
    line = re.sub(r"(?<![\w.])/(?:tmp|home|root|work|var)/\S*", "…", line)
    return line if len(line) <= 200 else f"{line[:197]}..."
