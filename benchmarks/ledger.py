"""What the ledger costs: ``python -m benchmarks.ledger [ENTRIES]``. Writes to a temporary directory.

Entries are decisions of the size that a call of ten columns has. Not part of ``make bench``: it takes a minute.
"""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.machine import describe
from zones.ledger import Egress, Ledger, verify
from zones.model import Decision, EgressRequest

#: So many entries verify in so many seconds.
ENTRIES, VERIFIED_S = 100_000, 10.0
_WRITERS = 64
_SINGLE = 2000
_REQUEST = EgressRequest(
    zone="clinic",
    pool="shared",
    person="dana",
    groups=frozenset({"research"}),
    purpose="cost study",
    dataset="randhie",
    columns=frozenset({"mdvis", "lncoins", "idp", "lpi", "fmde", "physlm", "disea", "hlthg", "hlthf", "hlthp"}),
    classes=frozenset({"internal", "confidential"}),
    function_digest="ab" * 32,
)
_EGRESS = Egress(request=_REQUEST, session="0" * 16, policy_digest="cd" * 32, rows=20190, gpu_milli=1000)
_ALLOWED = Decision(
    allowed=True,
    rules=("research-may-send", "shared-admits-zones"),
    reasons=("team research may send", "the pool admits the zone"),
    policy_digest="cd" * 32,
)


def main(entries: int) -> int:
    """Measure; return 1 where verifying took longer than it may."""
    with TemporaryDirectory() as directory:
        path = Path(directory) / "ledger.sqlite"
        with Ledger.open(path, zone="clinic") as ledger:
            alone = sorted(_seconds(ledger) for _ in range(_SINGLE))
            started = time.perf_counter()
            with ThreadPoolExecutor(_WRITERS) as several:
                list(several.map(lambda _: ledger.decided(_EGRESS, _ALLOWED), range(entries - _SINGLE)))
            together = (entries - _SINGLE) / (time.perf_counter() - started)
        size = path.stat().st_size
        started = time.perf_counter()
        report = verify(path)
        verified = time.perf_counter() - started
        started = time.perf_counter()
        with Ledger.open(path, zone="clinic"):
            opened = time.perf_counter() - started
    assert report.entries == entries + 1
    print("; ".join(describe().values()))
    print(f"one writer: p50 {statistics.median(alone) * 1e6:.0f} us, p99 {alone[int(0.99 * _SINGLE)] * 1e6:.0f} us")
    print(f"{_WRITERS} writers: {together:,.0f} entries/s")
    print(f"{entries:,} entries, {size / 1e6:.0f} MB: verified in {verified:.1f} s; opened again in {opened:.1f} s")
    most = VERIFIED_S * entries / ENTRIES
    if verified > most:
        print(f"missed: to verify them may take {most:.1f} s", file=sys.stderr)
    return int(verified > most)


def _seconds(ledger: Ledger) -> float:
    started = time.perf_counter()
    ledger.decided(_EGRESS, _ALLOWED)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else ENTRIES))
