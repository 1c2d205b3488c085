"""The zone that the proofs attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.proofs.attacked import Attacked
from tests.proofs.attacked_zone import run_attacked


@pytest.fixture(scope="session")
def attacked(
    start_cluster: Callable[..., AbstractContextManager[Any]], copy_policies: Callable[..., Path]
) -> Iterator[Attacked]:
    """A running cluster with all controls on, shared by every proof; its zone has the data set ``visits``."""
    with run_attacked(start_cluster, copy_policies) as world:
        yield world
