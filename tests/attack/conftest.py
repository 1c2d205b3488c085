"""A cluster of several hosts for the attacks that need one: pool and both zones, for the whole run."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testbed import Testbed, lacking
from testbed.cluster import BedCluster


@pytest.fixture(scope="session")
def bed_cluster(head_packages: Path | None) -> Iterator[BedCluster]:
    """A pool by `ray up`, and the zones clinic and trading, which joined by themselves. Nothing of it may be broken."""
    if reason := lacking():
        pytest.skip(reason)
    with Testbed() as bed, BedCluster(bed, head_packages=head_packages) as cluster:
        cluster.up()
        with ThreadPoolExecutor(2) as both:
            list(both.map(cluster.join, ("clinic", "trading")))
        yield cluster
