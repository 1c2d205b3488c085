"""The commands."""

from __future__ import annotations

import sys
from pathlib import Path

import rich_click as click
from rich.console import Console

from ray_gpu.state import Layout, default_state_dir
from zones.errors import LedgerCorruptError, ZoneError

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

_STATE = click.option("--state", type=click.Path(path_type=Path, file_okay=False), default=default_state_dir,
                      show_default="RAY_GPU_STATE, or this user's state directory", help="State directory of the cluster.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run functions on shared GPUs without letting data out of its zone unsealed."""


@cli.command()
@_STATE
@click.option("--zone", default="clinic", show_default=True, help="Zone whose gateway to start.")
@click.option("--policies", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Policies directory.")
def up(state: Path, zone: str, policies: Path | None) -> None:
    """Start an embedded cluster on this machine and keep it running."""
    from ray_gpu import embedded  # noqa: PLC0415 - imports what only this command needs

    plan = embedded.Plan(state=str(state), zone=zone, policies=str(policies or embedded.shipped_policies()))
    document = embedded.up(plan, lambda text: console.print(f"[dim]·[/] {text}"))
    console.print(f"[green]up[/]: zone {zone}; three raylets, Ray at {document['address']}")
    console.print(f"degraded: {', '.join(document['degradations'])}")
    console.print(f"In Python: [bold]with ray_gpu.attach({zone!r}) as zone: ...[/]   Stop it: [bold]ray-gpu down[/]")


@cli.command()
@_STATE
def down(state: Path) -> None:
    """Stop the embedded cluster: sessions end, lease keys are shredded, every process is gone."""
    from ray_gpu import embedded  # noqa: PLC0415 - imports what only this command needs

    console.print("down" if embedded.down(Layout(state)) else f"nothing runs in {state}")


@cli.command()
@_STATE
def status(state: Path) -> None:
    """Show processes, nodes, GPUs and missing controls of the embedded cluster."""
    from ray_gpu.cli import show  # noqa: PLC0415 - imports what only this command needs

    show.status(console, state)


@cli.command()
@_STATE
@click.option("--keep", is_flag=True, help="Leave the cluster running afterwards.")
@click.option("--rows", type=int, default=None, help="Rows of the volume job (default: all 1,250,000).")
def demo(state: Path, keep: bool, rows: int | None) -> None:
    """Start a cluster, run the main job on real data, show what left the zone, stop everything."""
    from ray_gpu.cli import demo as shown  # noqa: PLC0415 - imports what only this command needs

    shown.run(console, state, keep=keep, rows=rows)


@cli.group()
def audit() -> None:
    """Check what left a zone."""


@audit.command()
@click.argument("ledger", type=click.Path(path_type=Path, dir_okay=False), required=False)
@_STATE
@click.option("--zone", default="clinic", show_default=True)
@click.option("--head", "head_text", default=None, help="Head that was noted down earlier, as `verify` prints it.")
def verify(ledger: Path | None, state: Path, zone: str, head_text: str | None) -> None:
    """Verify a ledger file (default: the embedded cluster's) and name the first entry that does not fit."""
    from zones.ledger import Head  # noqa: PLC0415 - imports what only this command needs
    from zones.ledger import verify as check  # noqa: PLC0415

    path = ledger or Layout(state).ledger(zone)
    try:
        report = check(path, expected_head=Head.parse(head_text) if head_text else None)
    except LedgerCorruptError as error:
        where = f"entry {error.entry}" if error.entry else "the file"
        errors.print(f"[red]broken[/] at {where}: {error.message}")
        sys.exit(1)
    except (OSError, ValueError) as error:
        errors.print(f"[red]cannot verify[/] {path}: {error}")
        sys.exit(2)
    console.print(f"[green]verifies[/]: zone {report.zone}, {report.entries} entries, head {report.head}", soft_wrap=True)


@audit.command()
@click.argument("ledger", type=click.Path(path_type=Path, dir_okay=False), required=False)
@_STATE
@click.option("--zone", default="clinic", show_default=True)
@click.option("--last", default=20, show_default=True, help="Entries to show.")
def log(ledger: Path | None, state: Path, zone: str, last: int) -> None:
    """Show a ledger's last entries."""
    from ray_gpu.cli import show  # noqa: PLC0415 - imports what only this command needs

    show.ledger(console, ledger or Layout(state).ledger(zone), last)


def main() -> None:
    """Run the command line; an error of this project becomes one line and exit status 1."""
    try:
        cli()
    except ZoneError as error:
        errors.print(f"[red]{type(error).__name__}[/]: {error.message}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)
