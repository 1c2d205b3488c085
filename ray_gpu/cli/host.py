"""What ``ray-gpu status`` shows of a host of a cluster: its node, its gateway, and the nodes that the latter sees."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from ray_gpu import node as nodes
from ray_gpu import zone_host
from ray_gpu.cli import show
from ray_gpu.doctor.examination import Subject
from zones.model import sandbox_level


def status(console: Console, host: Subject) -> bool:
    """Show what runs here of what the host's files describe; return whether all of it does.

    Args:
        console: Where to.
        host: From :func:`ray_gpu.doctor.examination.subject`, with a node or a gateway.
    """
    node = nodes.running(host.node) if host.node else None
    gateway = zone_host.running(host.gateway) if host.gateway else None
    if host.node:
        said = _node(node) if node and "node" in node else _absent(node, "ray-gpu node start")
        console.print(f"node [bold]{host.node.node}[/] ({host.node.role}): {said}", soft_wrap=True)
    if host.gateway:
        level = sandbox_level(gateway["degradations"]) if gateway and "degradations" in gateway else ""
        said = f"runs, {level}" if level else _absent(gateway, "ray-gpu gateway start")
        console.print(f"gateway of zone [bold]{host.gateway.zone}[/]: {said}", soft_wrap=True)
    if host.gateway and gateway:
        _cluster(console, host.gateway)
    return (node is not None or not host.node) and (gateway is not None or not host.gateway)


def _node(document: Mapping[str, Any]) -> str:
    """Say in words what a node that runs is."""
    end = datetime.fromtimestamp(document["certificate_not_after"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = [f"in the cluster at {document['address']}", sandbox_level(document["degradations"])]
    facts.append(show.labels(document["labels"]))
    if document["num_gpus"]:
        facts.append(f"{document['num_gpus']} for leases, computes with: {show.device()}")
    return "; ".join([*(fact for fact in facts if fact), f"certificate until {end}"])


def _absent(document: Mapping[str, Any] | None, command: str) -> str:
    if document is not None:
        return "it starts"
    unseen = "" if os.geteuid() == 0 else "; what root started is seen by root alone"
    return f"does not run; start it with {command}{unseen}"


def _cluster(console: Console, config: zone_host.GatewayFile) -> None:
    found = zone_host.cluster_nodes(config)
    if found:
        console.print(show.nodes(found, computing=False))
    else:
        console.print("the cluster's nodes are not known: the zone's node has not joined, or this is not root")
