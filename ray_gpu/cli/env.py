"""`ray-gpu env`: what sandboxes on a host can import, and environments that its operator publishes for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.console import Console

from ray_gpu.cli.names import state_option
from ray_gpu.state import Layout

if TYPE_CHECKING:
    from zones.environments import Environment

console = Console(highlight=False)


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print its document, over which the digest is.")
@click.pass_context
def env(context: click.Context, *, as_json: bool) -> None:
    """Show what sandboxes on this host can import, and the digest by which zone.yaml names that (`environments`)."""
    if context.invoked_subcommand is not None:
        return
    from ray_gpu import environment  # noqa: PLC0415 - imports what only this command needs

    found = environment.current()
    if as_json:
        click.echo(json.dumps(found.document()))
        return
    click.echo(_line(found))
    for name, version in sorted(found.packages.items()):
        click.echo(f"  {name} {version}")


@env.command()
@click.argument("lock", type=click.Path(path_type=Path, dir_okay=False))
@state_option
def build(lock: Path, state: Path) -> None:
    """Build an environment from LOCK, requirements with versions and hashes, and publish it on this host.

    Sandboxes of it import its packages and no others, and cannot change them. Calls ask for it by the digest, or by a
    name: copy its environment.json to a zone's policies, environments/NAME.json.
    """
    from ray_gpu.environment_store import Store  # noqa: PLC0415 - imports what only this command needs

    store = Layout(state).environments
    with console.status(f"installing {lock}"):
        found = Store(store).build(lock)
    console.print("[green]published[/]:", _line(found), soft_wrap=True)
    console.print(f"  {store / found.digest / 'environment.json'}", soft_wrap=True)


@env.command(name="list")
@state_option
def list_(state: Path) -> None:
    """List the environments that are published on this host, and say of each whether it is as it was built."""
    from ray_gpu.environment_store import Store  # noqa: PLC0415 - imports what only this command needs
    from zones.errors import ConfigError  # noqa: PLC0415 - as above

    store, changed = Store(Layout(state).environments), False
    for digest in store.digests():
        try:
            store.site(digest)
            click.echo(_line(store.environment(digest)))
        except ConfigError as error:
            changed = True
            click.echo(f"{digest}  not served: {error.message}")
    if changed:
        raise SystemExit(1)


def _line(found: Environment) -> str:
    return f"{found.digest}  Python {found.python}, {len(found.packages)} distributions"
