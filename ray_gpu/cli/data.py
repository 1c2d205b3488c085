"""`ray-gpu data`: what the keeper of a zone's data does with derived data sets. Nothing leaves the zone by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.console import Console

from ray_gpu.cli.names import Command, checked_zone, policies_option, state_option
from ray_gpu.state import Layout

if TYPE_CHECKING:
    from zones.model import Zone

console = Console(highlight=False)

_DIRECTORY = click.Path(path_type=Path, exists=True, file_okay=False)


@click.group()
def data() -> None:
    """Derive data sets from others by the zone's reviewed steps, and show what they come from."""


def _where(command: Command) -> Command:
    for option in (
        click.option("--data", "data_dir", type=_DIRECTORY, help="Data directory; by default the embedded cluster's."),
        policies_option,
        state_option,
    ):
        command = option(command)
    return command


def _load(zone: str, policies: Path | None, data_dir: Path | None, state: Path) -> tuple[Zone, Path, Path]:
    from ray_gpu import embedded  # noqa: PLC0415 - imports what only these commands need
    from zones.config import load_zone  # noqa: PLC0415 - as above

    policies = policies or embedded.shipped_policies()
    return load_zone(policies, zone), policies, data_dir or Layout(state).data(zone)


@data.command()
@_where
@click.argument("zone", callback=checked_zone)
@click.argument("names", nargs=-1, metavar="[DATASET]...")
def derive(zone: str, names: Sequence[str], **where: Any) -> None:
    """Derive each DATASET of ZONE that is not what its step would make now, by default all, and what they come from."""
    from ray_gpu import curation  # noqa: PLC0415 - imports what only this command needs

    for name, made in curation.derive_outdated(*_load(zone, **where), names):
        if made is None:
            console.print(f"[green]up to date[/]: {name}", soft_wrap=True)
        else:
            said = f"{made['rows']:,} rows by {made['step']} version {made['version']}"
            console.print(f"[green]derived[/]: {name}: {said}", soft_wrap=True)


@data.command()
@_where
@click.argument("zone", callback=checked_zone)
def lineage(zone: str, **where: Any) -> None:
    """Show what each derived data set of ZONE comes from, and which have to be derived again."""
    from ray_gpu import curation, data_files  # noqa: PLC0415 - imports what only this command needs

    loaded, _, data_dir = _load(zone, **where)
    for name in curation.order(loaded):
        dataset = loaded.datasets[name]
        assert dataset.derived is not None
        why = curation.outdated(loaded, data_dir, name)
        state = f"[yellow]{why}[/]" if why else "[green]up to date[/]"
        console.print(f"{name}: {dataset.derived.step} version {dataset.derived.version}: {state}", soft_wrap=True)
        written = data_files.written_lineage(dataset, data_dir)
        rows = {} if why or not written else {one["dataset"]: one["rows"] for one in written["parents"]}
        for parent, reading in dataset.derived.reads.items():
            read = f"{rows[parent]:,} rows, " if parent in rows else ""
            of = f" of {', '.join(reading.segments)}" if reading.segments else ""
            past = f", past the step: {', '.join(reading.carries)}" if reading.carries else ""
            console.print(f"  {parent}{of}: {read}{', '.join(reading.columns)}{past}", soft_wrap=True)
