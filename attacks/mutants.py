"""Removes controls, one at a time, in copies of the tree, and looks whether a test notices. Starts processes.

A mutant counts as caught only if every test that the catalogue names passes without the change and, with it, fails
by itself for the reason that the catalogue gives: a crash, an import error or a cluster that did not start is none.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from attacks.cases import Case, environment, is_of, run
from attacks.catalogue.mutation import Edit, Mutation

ROOT = Path(__file__).resolve().parents[1]
#: A mutant may break what a test waits for.
_TIMEOUT_S = 400.0
_BASELINE_TIMEOUT_S = 1800.0
#: Most characters of a failure that are shown.
_SHORT = 200
#: Tests that start clusters or a test bed; one at a time, since two that start together take the same ports.
_CLUSTERS = ("tests/attack/", "tests/hosts/", "tests/job/", "tests/proofs/", "tests/test_node")
#: Says where the processes that a custodian starts take the product from: this one, and one behind the boundary.
_LOOK = """
import subprocess, sys, ray_gpu
from ray_gpu.sandbox import boundary, profile
print(ray_gpu.__file__)
inside = [sys.executable, "-P", "-c", "import ray_gpu; print(ray_gpu.__file__)"]
what = profile.sandbox("look", uid=61019, memory_bytes=None, keep_fds=())
with boundary.launch(inside, what, stdout=subprocess.PIPE) as process:
    print(process.stdout.read().decode().strip())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one mutant."""

    mutation: Mutation
    caught: bool
    #: The test that noticed, or why none did.
    by: str
    #: The failure's first line; of an escaped mutant, what the tests did instead.
    why: str = ""
    #: A test needs what this machine lacks, so the mutant was not made.
    skipped: bool = False
    seconds: float = 0.0


@contextlib.contextmanager
def copied(root: Path = ROOT) -> Iterator[Path]:
    """Copy the files that git knows, or would, and yield where; the copy goes when the block ends.

    Raises:
        FileNotFoundError: There is no git.
        subprocess.CalledProcessError: *root* is no checkout.
    """
    listing = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, check=True).stdout.decode().split("\0")
    with _directory() as directory:
        for name in filter(None, names):
            source, target = root / name, directory / name
            if source.is_file() and not source.is_symlink():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        yield directory


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Make a directory that sandboxes of other uids can read, and remove it."""
    directory = Path(tempfile.mkdtemp(prefix="rgm"))
    try:
        directory.chmod(0o755)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def check_copy(root: Path) -> None:
    """Make sure that the product's processes take the product from a copy, confined ones too.

    Raises:
        RuntimeError: One would not, so no mutant in a copy would be noticed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LOOK], cwd=root, env=environment(root), capture_output=True, text=True, timeout=120
    )
    places = done.stdout.split()
    if len(places) != 2 or any(not Path(place).is_relative_to(root) for place in places):
        raise RuntimeError(f"processes in a copy run the product of {places or 'nowhere'}: {done.stderr.strip()}")


def apply(edit: Edit, root: Path) -> None:
    """Make one change to a copy.

    Raises:
        ValueError: The text to remove is not in the file exactly once.
    """
    path = root / edit.file
    text = path.read_text(encoding="utf-8")
    if text.count(edit.old) != 1:
        raise ValueError(f"{edit.file} has the text of a mutation {text.count(edit.old)} times; see attacks/catalogue")
    path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")


def baseline(mutations: Sequence[Mutation], tree: Path, known: Sequence[Case] = ()) -> list[Case]:
    """Return what the tests of mutations do in *tree* as it is; those in *known* are not run again.

    Args:
        tree: A copy from :func:`copied`.
    """
    tests = dict.fromkeys(test for mutation in mutations for test in mutation.tests)
    check_copy(tree)
    cases = list(known)
    for _ in range(2):
        # An error says nothing about a test: on a busy machine a cluster may not start in time. It has another try.
        cases = [case for case in cases if case.outcome != "error"]
        missing = [test for test in tests if not any(is_of(case, test) for case in cases)]
        cases += run(tree, missing, timeout_s=_BASELINE_TIMEOUT_S)
    return cases


def attempt(mutation: Mutation, tree: Path, unchanged: Sequence[Case], stop: threading.Event | None = None) -> Verdict:
    """Make one mutant in a copy of *tree* and say whether it is caught.

    Args:
        unchanged: From :func:`baseline`.
        stop: Ends the tests when it is set; the verdict is then worth nothing.
    """
    for test in mutation.tests:
        before = [case for case in unchanged if is_of(case, test)]
        if lacking := [case.message for case in before if case.outcome == "skipped"]:
            return Verdict(mutation=mutation, caught=False, skipped=True, by=test, why=lacking[0])
        if not before or any(case.outcome != "passed" for case in before):
            did = next((case.message for case in before if case.outcome != "passed"), "it is not there")
            return Verdict(mutation=mutation, caught=False, by=test, why=f"fails without the change too: {did}")
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(_directory())
        shutil.copytree(tree, root, dirs_exist_ok=True)
        try:
            for edit in mutation.edits:
                apply(edit, root)
        except ValueError as problem:
            # Said, and the others go on.
            return Verdict(mutation=mutation, caught=False, by=mutation.tests[0], why=str(problem))
        cases = run(root, mutation.tests, timeout_s=_TIMEOUT_S, stop=stop)
        if any(case.outcome == "error" for case in cases):
            # On a busy machine a cluster may not start in time, which says nothing about the mutant.
            cases = run(root, mutation.tests, timeout_s=_TIMEOUT_S, stop=stop)
    return judge(mutation, cases, time.monotonic() - started)


def judge(mutation: Mutation, cases: Sequence[Case], seconds: float = 0.0) -> Verdict:
    """Say whether what the tests did with a mutant is that they caught it: each named one, and for the reason."""
    noticed: list[tuple[str, str]] = []
    for test in mutation.tests:
        own = [case for case in cases if is_of(case, test)]
        right = [case for case in own if case.outcome == "failed" and re.search(mutation.reason, case.message)]
        if not right:
            did = next((case for case in own if case.outcome != "passed"), None)
            why = f"{did.outcome}: {in_short(did.message)}" if did else "every case passed"
            return Verdict(mutation=mutation, caught=False, by=test, why=why, seconds=seconds)
        noticed.append((right[0].id, _around(mutation.reason, right[0].message)))
    by, why = noticed[0]
    return Verdict(mutation=mutation, caught=True, by=by, why=why, seconds=seconds)


def _around(reason: str, message: str) -> str:
    """Return the part of a failure's text in which its reason stands."""
    found = re.search(reason, message)
    start = found.start() if found else 0
    return in_short(message if start < _SHORT // 2 else f"... {message[start - _SHORT // 4 :]}")


def in_short(text: str) -> str:
    """Return a text in one line, shortened for people."""
    line = " ".join(text.split())
    return line if len(line) <= _SHORT else f"{line[: _SHORT - 3]}..."


def attempt_all(
    mutations: Sequence[Mutation],
    tree: Path,
    unchanged: Sequence[Case],
    *,
    jobs: int,
    on_verdict: Callable[[Verdict], None],
) -> list[Verdict]:
    """Make every mutant, *jobs* at a time, and return the verdicts in the catalogue's order.

    Args:
        tree: A copy from :func:`copied`.
        unchanged: From :func:`baseline`.
        jobs: How many at one time.
        on_verdict: Called with each as it falls, from one thread at a time.
    """
    guard, stop = threading.Lock(), threading.Event()
    took_s = {
        mutation: sum(case.seconds for case in unchanged for test in mutation.tests if is_of(case, test))
        for mutation in mutations
    }

    def one(mutation: Mutation) -> Verdict:
        verdict = attempt(mutation, tree, unchanged, stop)
        with guard:
            on_verdict(verdict)
        return verdict

    with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(max(1, jobs - 1)) as together:
        # The longest first, so that none is left to run alone at the end.
        ordered = sorted(mutations, key=lambda m: -took_s[m])
        running = {m: (alone if jobs == 1 or _starts_cluster(m) else together).submit(one, m) for m in ordered}
        try:
            return [running[mutation].result() for mutation in mutations]
        except BaseException:
            # Whoever interrupts the run does not wait for all that is left of it.
            stop.set()
            for pool in (alone, together):
                pool.shutdown(wait=False, cancel_futures=True)
            raise


def _starts_cluster(mutation: Mutation) -> bool:
    return any(test.startswith(_CLUSTERS) for test in mutation.tests)
