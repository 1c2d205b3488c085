"""What Ray says of the cluster's nodes. This module does I/O.

Only a driver or worker of the cluster can ask. An ``edge`` relay is one, and asks by itself. A ``client`` relay is
not: it has :class:`Accounts` made an actor on the head. The class is imported by name there, as the GPU actor's is.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._private import state as ray_state


class Accounts:
    """Answers in plain lists and maps."""

    def nodes(self) -> list[dict[str, Any]]:
        """Return every node: id, name, whether it is alive, labels, GPUs, free GPUs."""
        # ray.util.state needs ray[default]; this is what it reads from.
        free = ray_state.available_resources_per_node()  # type: ignore[no-untyped-call]  # Ray has no types here
        return [
            {
                "id": node["NodeID"],
                "name": node["NodeName"],
                "alive": node["Alive"],
                "labels": dict(node.get("Labels") or {}),
                "gpus": float(node["Resources"].get("GPU", 0.0)),
                "gpus_free": float(free.get(node["NodeID"], {}).get("GPU", 0.0)),
            }
            for node in ray.nodes()  # type: ignore[no-untyped-call]  # Ray has no types here
        ]

    def draining(self) -> list[str]:
        """Return the names of the nodes that Ray places nothing on any more."""
        found = ray_state.state.get_draining_nodes()
        return sorted(node["NodeName"] for node in ray.nodes() if node["NodeID"] in found) if found else []  # type: ignore[no-untyped-call]  # Ray has no types here
