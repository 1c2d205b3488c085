"""``make attack``: every attack beside its positive control, then every control removed once; writes docs/attacks.md.

Exits with 0 only if no attack succeeded, every positive control did, every mutant was caught, and every control was
shown by all three.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from attacks import mutants, report
from attacks.cases import Case, run
from attacks.catalogue import MUTATIONS
from attacks.outcome import Outcome
from attacks.screen import Screen
from attacks.sections import selected
from ray_gpu.controls import CONTROLS
from zones.errors import did_you_mean

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "attacks.md"
#: Longest run of a section, seconds.
_SECTION_TIMEOUT_S = 3600.0


def main() -> int:
    """Run what was asked for, show and write it, and return the exit status."""
    options = _options()
    started, screen = time.monotonic(), Screen()
    facts = report.describe(ROOT)
    _install(screen)
    cases: dict[str, list[Case]] = {}
    if options.only != "mutations":
        for section, tests in selected(ROOT, options.control).items():
            screen.section(section)
            cases[section] = run(ROOT, tests, timeout_s=_SECTION_TIMEOUT_S, on_case=screen.case)
            screen.flush()
    verdicts: list[mutants.Verdict] = []
    if options.only != "attacks":
        verdicts = _mutate(options.control, [case for found in cases.values() for case in found], options.jobs, screen)
    outcome = Outcome(cases=cases, verdicts=verdicts, controls=options.control or tuple(CONTROLS))
    screen.controls(outcome)
    screen.totals(outcome)
    whole = options.only is None and not options.control
    if target := options.report or (REPORT if whole else None):
        minutes = (time.monotonic() - started) / 60
        target.write_text(report.markdown(outcome, facts, minutes=minutes), encoding="utf-8")
        screen.say(f"written to {target}")
    return 0 if outcome.perfect() else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m attacks", description=__doc__)
    parser.add_argument("--only", choices=["attacks", "mutations"], help="one half of it")
    parser.add_argument("--control", nargs="+", default=[], metavar="ID", help="what belongs to these controls alone")
    parser.add_argument("--report", type=Path, help="where the report goes; docs/attacks.md after a whole run")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="mutants at one time (default: %(default)s)"
    )
    options = parser.parse_args()
    for name in options.control:
        if name not in CONTROLS:
            parser.error(f"no control {name!r}{did_you_mean(name, CONTROLS)}; they are listed in docs/controls.md")
    return options


def _install(screen: Screen) -> None:
    """Install what the test bed lacks. Where that is not possible its tests are skipped, and say why."""
    done = subprocess.run([ROOT / "scripts/testbed.sh"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        screen.say(f"without the test bed: {done.stderr.strip()}")


def _mutate(controls: Sequence[str], known: Sequence[Case], jobs: int, screen: Screen) -> list[mutants.Verdict]:
    wanted = [mutation for mutation in MUTATIONS if not controls or mutation.control in controls]
    screen.section("Mutation")
    for name in controls or CONTROLS:
        if all(mutation.control != name for mutation in wanted):
            screen.say(f"  NO MUTATION of {name}: add one to attacks/catalogue")
    screen.say(f"  {len(wanted)} changes; first, what the tests that must notice do without them")
    with mutants.copied() as tree:
        unchanged = mutants.baseline(wanted, tree, known)
        return mutants.attempt_all(wanted, tree, unchanged, jobs=jobs, on_verdict=screen.verdict)


if __name__ == "__main__":
    sys.exit(main())
