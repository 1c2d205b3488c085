"""Where to run: what ``where="auto"`` predicts, and what calls then take: ``python -m benchmarks.where``.

Run alone it starts an embedded cluster of its own, prints its section and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray_gpu
from benchmarks import arithmetic, machine, sealed
from ray_gpu import demo_data, nodes
from ray_gpu.advice import Advice, Link
from ray_gpu.client import Session

ROUNDS = 5
_INTRODUCTION = """\
## Where to run

What `where="auto"` predicts, and what calls then take, in one session and from small to large, after two calls of
another function. *First*: the advice when nothing of the function is known but a trial on a few rows here. *Again*: the
advice after one call in each place. Measured are medians of {rounds} calls in each place that took turns, with
`where="remote"` and `where="local"`, leases open. The error is (predicted - measured) / measured. *Right*: it chose
what was then faster; *tie*: the two were within 10 % of each other. Without a GPU a node computes with NumPy on the
same cores, so that little speaks for it but two actors.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call."""

    what: str
    function: Any
    #: Of the session, the data; ``None``: arguments alone.
    data: Callable[[Session], Any] | None
    args: tuple[Any, ...] = ()
    #: Row-aligned, or a value of each shard.
    rows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was predicted of a call, and what it took."""

    what: str
    first: Advice
    again: Advice
    remote_s: float
    local_s: float
    #: What asking for advice takes once the function is known.
    asking_s: float


def _volume(columns: int) -> Callable[[Session], Any]:
    """Return what reads so many columns of the volume data set, in the order that it has."""
    name = sealed.SHUFFLES["none"]

    def read(session: Session) -> Any:
        return session.read(name, columns=[one for one in session.datasets[name] if one != "target"][:columns])

    return read


def _visits(session: Session) -> Any:
    return session.read("randhie", columns=["mdvis", "lncoins", "disea"])


CASES = (
    Case(what="add two numbers", function=arithmetic.add, data=None, args=(1.0, 2.0)),
    Case(what="400 products of matrices of 256", function=arithmetic.products, data=None, args=(256, 400)),
    Case(what="sum of 3 columns, 20,190 rows", function=arithmetic.total, data=_visits),
    Case(what="a loop in Python over 20,190 rows", function=arithmetic.counted, data=_visits),
    Case(what="200 layers over 20,190 rows", function=arithmetic.layers, data=_visits, args=(200,), rows=True),
    Case(what="sum of 1 volume column", function=arithmetic.total, data=_volume(1)),
    Case(what="sum of 30 volume columns", function=arithmetic.total, data=_volume(30)),
    Case(what="sort of 3 volume columns", function=arithmetic.ranked, data=_volume(3)),
    Case(what="1 layer over 30 volume columns", function=arithmetic.layers, data=_volume(30), args=(1,), rows=True),
    Case(what="8 layers over 30 volume columns", function=arithmetic.layers, data=_volume(30), args=(8,), rows=True),
)


def measure(session: Session, rounds: int) -> tuple[list[Found], Link]:
    """Measure every case in *session*; return what was found, and what the advisor knows of the link at the end."""
    # A session's first calls, after which both leases are open.
    usual = ray_gpu.gpu_remote(arithmetic.ranked, session=session)
    usual.advise(_visits(session))
    for _ in range(2):
        usual.map_reduce(_visits(session), sum)
    found = [_case(session, case, rounds) for case in CASES]
    return found, session.advisor.links[""]


def _case(session: Session, case: Case, rounds: int) -> Found:
    given, columns = case.args, None
    if case.data is not None:
        handle = case.data(session)
        given, columns = (handle, *case.args), handle.columns
    # Packed once each, as in a notebook's cell that runs again; where a function runs is no part of what is packed.
    there, here = (
        ray_gpu.gpu_remote(case.function, session=session, columns=columns, where=where)
        for where in ("remote", "local")
    )
    first = there.advise(*given)
    _seconds(there, case, given), _seconds(here, case, given)
    started = time.perf_counter()
    again = there.advise(*given)
    asking = time.perf_counter() - started
    took = [(_seconds(there, case, given), _seconds(here, case, given)) for _ in range(rounds)]
    remote, local = zip(*took, strict=True)
    return Found(
        what=case.what,
        first=first,
        again=again,
        remote_s=statistics.median(remote),
        local_s=statistics.median(local),
        asking_s=asking,
    )


def _seconds(function: Any, case: Case, given: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    if case.data is None:
        function.remote(*given).result()
    elif case.rows:
        function.map(*given)
    else:
        function.map_reduce(given[0], sum, *given[1:])
    return time.perf_counter() - start


def section(found: Sequence[Found], link: Link, rounds: int) -> str:
    """Return the report's section, as Markdown."""
    lines = [
        "| call | place | first, ms | again, ms | measured, ms | error, first | error, again |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        for place, measured in (("remote", one.remote_s), ("local", one.local_s)):
            predicted = [getattr(advice, f"predicted_{place}_s") for advice in (one.first, one.again)]
            cells = [*map(_ms, predicted), _ms(measured), *(_percent(each, measured) for each in predicted)]
            lines.append(f"| {one.what if place == 'remote' else ''} | {place} | {' | '.join(cells)} |")
    choices = [
        "| call | faster was | first | again | asking takes, ms |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {one.what} | {_faster(one)} | {_right(one, one.first)} | {_right(one, one.again)} "
            f"| {_ms(one.asking_s)} |"
            for one in found
        ),
    ]
    return "\n".join(
        [_INTRODUCTION.format(rounds=rounds), *lines, "", *choices, "", _summary(found), "", _measured(link), ""]
    )


def _summary(found: Sequence[Found]) -> str:
    parts = []
    for when in ("first", "again"):
        errors = [
            abs(predicted - measured) / measured
            for one in found
            for place, measured in (("remote", one.remote_s), ("local", one.local_s))
            if (predicted := getattr(getattr(one, when), f"predicted_{place}_s")) is not None
        ]
        right = sum(_right(one, getattr(one, when)) in ("right", "tie") for one in found)
        parts.append(
            f"{when}: {len(errors)} of {2 * len(found)} predicted, median error {statistics.median(errors):.0%}, "
            f"largest {max(errors):.0%}, {right} of {len(found)} choices right or a tie"
        )
    return ";\n".join(parts).capitalize() + "."


def _measured(link: Link) -> str:
    sent = f"{1e-6 / link.sent_s_per_byte:,.0f} MB/s" if link.sent_s_per_byte else "faster than was to be measured"
    return (
        f"The advisor's own measurements: round trip {_ms(link.trip_s)} ms, with data {_ms(link.shards_s)} ms, "
        f"opening a\nlease {_ms(link.open_s)} ms, bytes {sent}, "
        f"a node takes {link.node_s_per_local_s:.2f} of the seconds here."
    )


def _faster(one: Found) -> str:
    return "remote" if one.remote_s < one.local_s else "local"


def _right(one: Found, advice: Advice) -> str:
    if max(one.remote_s, one.local_s) <= 1.1 * min(one.remote_s, one.local_s):
        return "tie"
    if None in (advice.predicted_remote_s, advice.predicted_local_s):
        return f"not known, so {advice.chosen}"
    return "right" if advice.chosen == _faster(one) else "**wrong**"


def _ms(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1e3:,.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}"


def _percent(predicted: float | None, measured: float) -> str:
    return "" if predicted is None else f"{(predicted - measured) / measured:+.0%}"


def main() -> int:
    """Measure on a cluster of its own, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.where", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small table and one round: whether it runs")
    options = parser.parse_args()
    os.environ["RAY_GPU_PROGRESS"] = "0"
    rounds = 1 if options.quick else ROUNDS
    rows = 40_000 if options.quick else demo_data.RESAMPLED_ROWS
    host = machine.describe()
    with sealed.state_directory() as root, contextlib.ExitStack() as stack:
        ours = sealed.Sealed(root / "s", base_port=nodes.free_base_port(), rows=rows)
        stack.callback(ours.stop)
        ours.start()
        with ours.attach() as session:
            found, link = measure(session, rounds)
    facts = "".join(f"{name}: {value}\n" for name, value in host.items())
    sys.stdout.write(f"{facts}\n{section(found, link, rounds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
