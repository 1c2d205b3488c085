"""The commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console

from ray_gpu.cli.audit import audit
from ray_gpu.cli.data import data
from ray_gpu.cli.doctor import doctor
from ray_gpu.cli.env import env
from ray_gpu.cli.names import Command, policies_option, state_option, zone_option
from ray_gpu.cli.node import gateway, node
from ray_gpu.cli.policy import policy
from ray_gpu.cli.vault import vault
from ray_gpu.state import Layout, default_state_dir
from zones.errors import LedgerCorruptError, LedgerUnavailableError, ZoneError
from zones.model import Carrier

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


class _Commands(click.RichGroup):
    """Turns an error of this project into one line, and Ctrl-C into the usual exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LedgerCorruptError as error:
            errors.print(f"[red]broken[/]: {error.message}", soft_wrap=True)
            ctx.exit(1)
        except ZoneError as error:
            errors.print(f"[red]{type(error).__name__}[/]: {error.message}", soft_wrap=True)
            ctx.exit(2 if isinstance(error, LedgerUnavailableError) else 1)
        except KeyboardInterrupt:
            errors.print("interrupted; what was started is stopped")
            ctx.exit(130)


def _start(command: Command) -> Command:
    command = policies_option(command)
    command = click.option(
        "--carrier",
        type=click.Choice([carrier.value for carrier in Carrier]),
        help="How the zone reaches Ray; by default what zone.yaml says, else edge as root and client otherwise.",
    )(command)
    ports = click.IntRange(1024, 32000)
    return click.option("--base-port", type=ports, help="First of 1,000 ports for Ray; by default a free range.")(
        command
    )


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Run functions on shared GPUs without letting data out of its zone unsealed.

    Start with `ray-gpu demo`. For notebooks, `ray-gpu up` starts a cluster that stays; then
    `with ray_gpu.attach("clinic") as zone:` in Python.
    """


def _plan(state: Path, zone: str, policies: Path | None, base_port: int | None, carrier: str | None) -> Any:
    from ray_gpu import embedded  # noqa: PLC0415 - imports what only these commands need

    return embedded.Plan(
        state=str(state),
        zone=zone,
        policies=str(policies or embedded.shipped_policies()),
        base_port=base_port or 0,
        carrier=Carrier(carrier) if carrier else None,
    )


@cli.command()
@state_option
@zone_option
@_start
def up(state: Path, zone: str, policies: Path | None, base_port: int | None, carrier: str | None) -> None:
    """Start an embedded cluster on this machine and keep it running."""
    from ray_gpu import embedded  # noqa: PLC0415 - imports what only this command needs
    from ray_gpu.cli import show  # noqa: PLC0415 - as above

    plan = _plan(state, zone, policies, base_port, carrier)
    document = embedded.up(plan, lambda text: console.print(text, style="dim"))
    ids = show.missing(document)
    console.print(f"[green]up[/]: zone [bold]{zone}[/], Ray at {document['address']}, computes with: {show.device()}")
    console.print(show.degraded_line(ids), soft_wrap=True)
    console.print(show.meanings(ids))
    if state != default_state_dir():
        console.print(f"Before that: [bold]export RAY_GPU_STATE={state}[/]", soft_wrap=True)
    console.print(f"In Python: [bold]with ray_gpu.attach({zone!r}) as zone: ...[/]   Stop it: [bold]ray-gpu down[/]")


@cli.command()
@state_option
def down(state: Path) -> None:
    """Stop the embedded cluster: sessions end, lease keys are shredded, every process is gone."""
    from ray_gpu import embedded  # noqa: PLC0415 - imports what only this command needs

    stopped = embedded.down(Layout(state))
    console.print(f"{'down' if stopped else 'nothing runs'}: {state}", soft_wrap=True)


@cli.command()
@state_option
@click.option(
    "--config",
    "configs",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="node.yaml or gateway.yaml of a host of a cluster; by default those in /etc/ray-gpu.",
)
def status(state: Path, configs: tuple[Path, ...]) -> None:
    """Show what is missing, the nodes and the processes; exit status 1 when something does not run.

    On a host of a cluster it shows the host's node and its gateway, and beside a gateway the cluster's nodes.
    """
    from ray_gpu.cli import host, show  # noqa: PLC0415 - imports what only this command needs
    from ray_gpu.doctor import examination  # noqa: PLC0415 - as above

    subject = examination.subject(configs, None)
    of_a_cluster = subject.node is not None or subject.gateway is not None
    runs = host.status(console, subject) if of_a_cluster else True
    # An embedded cluster may run beside it.
    if not of_a_cluster or embedded_runs(state):
        runs = show.status(console, state) and runs
    if not runs:
        sys.exit(1)


def embedded_runs(state: Path) -> bool:
    """Return whether an embedded cluster runs in a state directory."""
    from ray_gpu import embedded  # noqa: PLC0415 - imports what only these commands need

    return embedded.running(Layout(state)) is not None


@cli.command()
@state_option
@_start
@click.option("--keep", is_flag=True, help="Leave the cluster running afterwards.")
@click.option("--rows", type=click.IntRange(min=1000), help="Rows of the volume job, instead of all 1,250,000.")
def demo(keep: bool, rows: int | None, **where: Any) -> None:
    """Start a cluster, run the main job on real data, show what left the zone, stop everything."""
    from ray_gpu.cli import demo as shown  # noqa: PLC0415 - imports what only this command needs

    shown.run(console, _plan(zone="clinic", **where), keep=keep, rows=rows)


@cli.command()
@click.argument("role")
@click.option(
    "--hosts",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="YAML file: names, roles, addresses.",
)
def firewall(role: str, hosts: Path) -> None:
    """Print the nftables rules of a host of ROLE, or of the router between the hosts.

    ROLE: operator, head, gpu, edge-zone, client-zone, vault or router. docs/ports.md shows a hosts file, and every flow
    that the rules let through.
    """
    from ray_gpu import hosts_file, ports  # noqa: PLC0415 - imports what only this command needs

    click.echo(ports.rules_of(role, hosts_file.read(hosts)), nl=False)


@cli.command()
@click.argument("cluster", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--hosts", type=click.Path(path_type=Path, dir_okay=False), help="The hosts file of `ray-gpu firewall`.")
def check(cluster: Path, hosts: Path | None) -> None:
    """Check CLUSTER, a cluster.yaml, before `ray up`: what is wrong is named with file and line. Starts nothing.

    With a hosts file, also that each host of it is one of the pool, and none a zone's.
    """
    from ray_gpu import cluster_file, hosts_file  # noqa: PLC0415 - imports what only this command needs

    cluster_file.check(cluster, hosts_file.read(hosts) if hosts else ())
    console.print(f"[green]ok[/]: {cluster}", soft_wrap=True)


cli.add_command(audit)
cli.add_command(data)
cli.add_command(doctor)
cli.add_command(env)
cli.add_command(node)
cli.add_command(gateway)
cli.add_command(policy)
cli.add_command(vault)


def main() -> None:
    """Run the command line."""
    cli(prog_name="ray-gpu")
