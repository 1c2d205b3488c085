"""Run a function on shared GPUs without letting its data out of the zone unsealed.

Names are loaded on first use: a keeper or an actor must not load what only a notebook needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_gpu.api import gpu_remote
    from ray_gpu.arrays import Batch
    from ray_gpu.attaching import attach
    from ray_gpu.broadcast import Broadcast
    from ray_gpu.call import Call
    from ray_gpu.client import Session
    from ray_gpu.executor import Executor
    from ray_gpu.handle import Handle
    from ray_gpu.on_gpu import OnGpu, parts
    from ray_gpu.options import FunctionOptions
    from ray_gpu.remote_class import Instance, RemoteClass
    from ray_gpu.remote_function import RemoteFunction
    from ray_gpu.stream import Stream

__all__ = [
    "Batch",
    "Broadcast",
    "Call",
    "Executor",
    "FunctionOptions",
    "Handle",
    "Instance",
    "OnGpu",
    "RemoteClass",
    "RemoteFunction",
    "Session",
    "Stream",
    "attach",
    "gpu_remote",
    "parts",
]

_HOMES = {
    "Batch": "arrays", "Broadcast": "broadcast", "Call": "call", "Executor": "executor", "FunctionOptions": "options",
    "Handle": "handle", "Instance": "remote_class", "OnGpu": "on_gpu", "RemoteClass": "remote_class",
    "RemoteFunction": "remote_function", "Session": "client", "Stream": "stream", "attach": "attaching",
    "parts": "on_gpu",
}  # fmt: skip


def load_ipython_extension(shell: Any) -> None:
    """Add ``%%gpu_remote`` to a notebook; ``%load_ext ray_gpu`` calls this."""
    shell.register_magics(importlib.import_module("ray_gpu.magic").GpuMagics)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        meant = {"get": "call.result()", "init": "ray_gpu.attach(...)", "remote": "@ray_gpu.gpu_remote"}
        hint = f"; write {meant[name]}" if name in meant else ""
        raise AttributeError(f"module 'ray_gpu' has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(f"ray_gpu.{_HOMES.get(name, 'api')}"), name)
