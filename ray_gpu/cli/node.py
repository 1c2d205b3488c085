"""``ray-gpu node`` and ``ray-gpu gateway``: this host's part of a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console

from zones.model import sandbox_level

console = Console()
_Command = Callable[..., Any]
_FILE = click.Path(path_type=Path, dir_okay=False)


def _config(default: str) -> Callable[[_Command], _Command]:
    return click.option("--config", type=_FILE, default=default, show_default=True, help="What this host is.")


@click.group()
def node() -> None:
    """Start and stop this host's node of a cluster: Ray in a cage, and on a GPU host its custodian."""


@node.command("start")
@_config("/etc/ray-gpu/node.yaml")
@click.option("--autoscaling-config", type=_FILE, help="On a head that `ray up` starts: ~/ray_bootstrap_config.yaml.")
@click.option("--autoscaling-key", type=_FILE, help="On such a head: ~/ray_bootstrap_key.pem.")
def start_node(config: Path, autoscaling_config: Path | None, autoscaling_key: Path | None) -> None:
    """Join the cluster; returns when the node serves, and leaves it running."""
    from ray_gpu import node as nodes  # noqa: PLC0415 - imports what only this command needs

    if (autoscaling_config is None) != (autoscaling_key is None):
        raise click.UsageError("--autoscaling-config and --autoscaling-key go together")
    what = nodes.Start(
        config=str(config.absolute()),
        autoscaling_config=str(autoscaling_config.absolute()) if autoscaling_config else None,
        autoscaling_key=str(autoscaling_key.absolute()) if autoscaling_key else None,
    )
    document = nodes.start(what, lambda text: console.print(text, style="dim", soft_wrap=True))
    console.print(
        f"[green]up[/]: node [bold]{document['node']}[/] ({document['role']}) of the cluster at {document['address']}, "
        f"{sandbox_level(document['degradations'])}",
        soft_wrap=True,
    )


@node.command("stop")
@_config("/etc/ray-gpu/node.yaml")
def stop_node(config: Path) -> None:
    """Leave the cluster: leases end, and every process of the node is gone."""
    from ray_gpu import node as nodes  # noqa: PLC0415 - imports what only this command needs

    stopped = nodes.stop(nodes.read_config(config))
    console.print("down" if stopped else "nothing runs")


@node.command("status")
@_config("/etc/ray-gpu/node.yaml")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for programs.")
def node_status(config: Path, as_json: bool) -> None:
    """Show whether this host's node runs, with its labels and GPUs; exit status 1 when it does not."""
    from ray_gpu import node as nodes  # noqa: PLC0415 - imports what only this command needs

    document = nodes.running(nodes.read_config(config))
    if document is None:
        console.print("nothing runs; start it with `ray-gpu node start`")
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(document))
    else:
        console.print(document)


@click.group()
def gateway() -> None:
    """Start and stop a zone's gateway on this host. Run by the zone's own people."""


@gateway.command("start")
@_config("/etc/ray-gpu/gateway.yaml")
def start_gateway(config: Path) -> None:
    """Start the gateway, and leave it running. People can attach once the zone's node has joined as well."""
    from ray_gpu import zone_host  # noqa: PLC0415 - imports what only this command needs

    document = zone_host.start(config, lambda text: console.print(text, style="dim", soft_wrap=True))
    console.print(
        f"[green]up[/]: gateway of zone [bold]{document['zone']}[/], {sandbox_level(document['degradations'])}",
        soft_wrap=True,
    )


@gateway.command("stop")
@_config("/etc/ray-gpu/gateway.yaml")
def stop_gateway(config: Path) -> None:
    """Stop the gateway: sessions end, lease keys are shredded."""
    from ray_gpu import zone_host  # noqa: PLC0415 - imports what only this command needs

    stopped = zone_host.stop(zone_host.read_config(config))
    console.print("down" if stopped else "nothing runs")
