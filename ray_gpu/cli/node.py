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
@click.option(
    "--await-hosts",
    type=click.FloatRange(min=0),
    default=90.0,
    show_default=True,
    help="On such a head: longest wait for the GPU hosts, seconds.",
)
def start_node(config: Path, autoscaling_config: Path | None, autoscaling_key: Path | None, await_hosts: float) -> None:
    """Join the cluster; returns when the node serves, and leaves it running."""
    from ray_gpu import node as nodes  # noqa: PLC0415 - imports what only this command needs

    if (autoscaling_config is None) != (autoscaling_key is None):
        raise click.UsageError("--autoscaling-config and --autoscaling-key go together")
    what = nodes.Start(
        config=str(config.absolute()),
        autoscaling_config=str(autoscaling_config.absolute()) if autoscaling_config else None,
        autoscaling_key=str(autoscaling_key.absolute()) if autoscaling_key else None,
        await_hosts_s=await_hosts,
    )
    _show_started(nodes.start(what, _say))


def _say(text: str) -> None:
    console.print(text, style="dim", soft_wrap=True)


def _show_started(document: dict[str, Any]) -> None:
    console.print(
        f"[green]up[/]: node [bold]{document['node']}[/] ({document['role']}) of the cluster at {document['address']}, "
        f"{sandbox_level(document['degradations'])}",
        soft_wrap=True,
    )


def _drain(default: float) -> Callable[[_Command], _Command]:
    return click.option(
        "--drain-timeout",
        type=click.FloatRange(min=0),
        default=default,
        show_default=True,
        help="On a GPU host: take no new leases, and wait so long for those that run, seconds.",
    )


@node.command("stop")
@_config("/etc/ray-gpu/node.yaml")
@_drain(0.0)
def stop_node(config: Path, drain_timeout: float) -> None:
    """Leave the cluster: leases end, and every process of the node is gone."""
    from ray_gpu import node as nodes  # noqa: PLC0415 - imports what only this command needs

    stopped = nodes.stop(nodes.read_config(config), drain_timeout_s=drain_timeout)
    console.print("down" if stopped else "nothing runs")


@node.command("restart")
@_config("/etc/ray-gpu/node.yaml")
@_drain(600.0)
def restart_node(config: Path, drain_timeout: float) -> None:
    """Stop the node and start it with a new certificate; on a GPU host no call is lost.

    Ray reads its certificate at start only, so this is how it is renewed. A zone's node has nothing to wait for:
    restart it when nobody computes. A head takes the whole cluster with it: `ray down`, then `ray up`.
    """
    from ray_gpu import node as nodes  # noqa: PLC0415 - imports what only this command needs

    found = nodes.read_config(config)
    if found.role == "head":
        raise click.UsageError("a head takes the whole cluster with it: run `ray down`, then `ray up`")
    nodes.stop(found, drain_timeout_s=drain_timeout)
    _show_started(nodes.start(nodes.Start(config=str(config.absolute())), _say))


@node.command("status")
@_config("/etc/ray-gpu/node.yaml")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for programs.")
def node_status(config: Path, as_json: bool) -> None:
    """Show whether this host's node runs, with its labels and GPUs; exit status 1 when it does not, or not yet."""
    from ray_gpu import node as nodes  # noqa: PLC0415 - imports what only this command needs

    document = nodes.running(nodes.read_config(config))
    if document is None:
        console.print("nothing runs; start it with `ray-gpu node start`")
        sys.exit(1)
    if "node" not in document:
        console.print("it starts")
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
    """Start the gateway, and leave it running.

    With carrier edge people can attach once the zone's node has joined as well. With carrier client the relay is
    started here too, and no node.
    """
    from ray_gpu import zone_host  # noqa: PLC0415 - imports what only this command needs

    document = zone_host.start(config, _say)
    console.print(
        f"[green]up[/]: gateway of zone [bold]{document['zone']}[/], {sandbox_level(document['degradations'])}",
        soft_wrap=True,
    )


@gateway.command("status")
@_config("/etc/ray-gpu/gateway.yaml")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON, for programs.")
def gateway_status(config: Path, as_json: bool) -> None:
    """Show whether this zone's gateway runs, and whether its relay has joined; exit status 1 when one does not."""
    from ray_gpu import zone_host  # noqa: PLC0415 - imports what only this command needs

    document = zone_host.condition(zone_host.read_config(config))
    if as_json:
        click.echo(json.dumps(document))
    else:
        console.print(document or "nothing runs; start it with `ray-gpu gateway start`")
    if not document or not document["relay"]:
        sys.exit(1)


@gateway.command("stop")
@_config("/etc/ray-gpu/gateway.yaml")
def stop_gateway(config: Path) -> None:
    """Stop the gateway: sessions end, lease keys are shredded."""
    from ray_gpu import zone_host  # noqa: PLC0415 - imports what only this command needs

    stopped = zone_host.stop(zone_host.read_config(config))
    console.print("down" if stopped else "nothing runs")
