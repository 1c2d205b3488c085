"""Starts the zone that the attacks are on: the clinic with one more data set, which it writes itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.proofs import visits
from tests.proofs.attacked import NOTEBOOK_TABLES, SESSION_BYTES, SMALL_BYTES, Attacked
from tests.proofs.canary import new_mark


@contextlib.contextmanager
def run_attacked(
    start_cluster: Callable[..., AbstractContextManager[Any]], copy_policies: Callable[..., Path]
) -> Iterator[Attacked]:
    """Run a cluster of its own with all controls on, by the fixtures of these names."""
    mark = new_mark()
    with start_cluster(data=False, policies=copy_policies(_edits(mark))) as cluster:
        world = Attacked(state=cluster.state, document=cluster.document, mark=mark)
        visits.write(world.layout.data(world.zone) / "visits.arrow", mark)
        yield world


def _edits(mark: str) -> dict[str, tuple[str, str]]:
    """Return what the zone's files say differently: its data set, and a purpose for tables of no data set."""
    tables = f'context.dataset == "" && context.purpose == "{NOTEBOOK_TABLES}"'
    identifiers = 'when { context.classes.contains("direct-identifier") }'
    permit = '@id("notebook-tables")\n@reason("for this purpose alone")\npermit (principal in Group::"research", '
    permit += f'action == Action::"egress", resource == Pool::"shared") when {{ {tables} }};'
    return {
        "clinic/catalog.yaml": visits.catalog(mark),
        "clinic/egress.cedar": (f"{identifiers};", f"{identifiers} unless {{ {tables} }};\n\n{permit}"),
        "clinic/zone.yaml": (
            "max_bytes: 65536\n  max_session_bytes: 4194304",
            f"max_bytes: {SMALL_BYTES}\n  max_session_bytes: {SESSION_BYTES}",
        ),
    }
