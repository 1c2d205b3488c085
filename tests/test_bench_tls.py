"""What TLS costs is measured against a copy of the product without it; the interval is what it says."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tls import WITHOUT, interval, markdown, without_tls


@pytest.mark.parametrize(("count", "low", "high"), [(6, 1, 6), (15, 4, 12), (24, 7, 18)])
def test_interval(count: int, low: int, high: int) -> None:
    """The interval's ends are the order statistics of the tables of the sign test, in any order of the values."""
    values = [float(number) for number in range(count, 0, -1)]

    assert interval(values) == (low, high)
    # One rank further in would hold the median with less than 95 %.
    outside = 2 * sum(math.comb(count, k) for k in range(low + 1)) / 2**count
    assert outside > 0.05


def test_too_few() -> None:
    """Five values bound no median with 95 %."""
    with pytest.raises(ValueError, match="at least 6"):
        interval([1.0] * 5)


def test_the_copy_lacks_tls_alone(tmp_path: Path) -> None:
    """The copy differs from the product in what it says, and nothing else."""
    without_tls(tmp_path)
    root = Path(__file__).parent.parent
    changed = {
        str(path.relative_to(tmp_path))
        for path in tmp_path.rglob("*.py")
        if path.read_text(encoding="utf-8") != (root / path.relative_to(tmp_path)).read_text(encoding="utf-8")
    }

    assert changed == {edit.file for edit in WITHOUT}
    # It is whole: a side of the benchmark starts in it.
    command = [sys.executable, "-P", "-c", "import benchmarks.tls; print(benchmarks.tls.__file__)"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith(str(tmp_path))


#: Seconds until a cluster was up, and until the zone's node had joined.
UP = {"up_s": 20.0, "joined_s": 30.0}


@pytest.mark.parametrize(("joined_s", "met"), [(89.0, "less than 90 s: met."), (90.0, "less than 90 s: **no**.")])
def test_report_says_whether_ray_up_was_in_time(joined_s: float, met: str) -> None:
    """The report says how long `ray up` took, and whether that is less than it may."""
    rounds = [({"call": 1.0, "job": 1.0}, {"call": 1.0, "job": 1.0})] * 6

    assert markdown(rounds, {}, UP | {"joined_s": joined_s}).rstrip().endswith(met)


@pytest.mark.parametrize(("ours", "met"), [(1.0, "yes"), (1.2, "**no**")])
def test_report_says_whether_one_is_inside(ours: float, met: str) -> None:
    """A side that is slower in every round does not meet the target."""
    rounds = [({"call": ours * base, "job": base}, {"call": base, "job": base}) for base in (1.0, 1.1, 0.9) * 3]
    rows = [line for line in markdown(rounds, {}, UP).splitlines() if line.startswith("| call")]

    assert rows[0].endswith(f"| {met} |")
