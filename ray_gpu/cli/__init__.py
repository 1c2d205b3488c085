"""``ray-gpu``: thin commands over the library. Only this package ends the process."""

from __future__ import annotations

from ray_gpu.cli.main import main

__all__ = ["main"]
