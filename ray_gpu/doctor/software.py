"""Checks of what is installed: Ray, the GPU's driver, the firewall's rules. :func:`modules_found` and others look."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Collection, Sequence
from importlib import metadata, util
from typing import Literal

from ray_gpu.doctor.finding import Finding, holds, missing, unclear
from ray_gpu.ports import TABLE

#: Ray starts its dashboard's agents where all of these are there; ray[default] brings them.
AGENT_MODULES = ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client")
#: What ``nft list table`` said.
Rules = Literal["loaded", "not loaded", "no nft", "refused"]
_NFT_TIMEOUT_S = 10.0


def ray_version(installed: str | None, requirements: Sequence[str]) -> Finding:
    """Check that Ray is not older than what this project asks for.

    Args:
        installed: Its version, or ``None``.
        requirements: This project's, as its metadata have them: ``"ray>=2.56"``.
    """
    control, about = "old-ray", "Ray"
    floors = [match[1] for line in requirements if (match := re.match(r"ray\s*>=\s*([\d.]+)", line))]
    if installed is None:
        return missing(control, about, "it is not installed")
    if not floors:
        return unclear(control, about, "the version asked for is not known", "Install this project with pip.")
    if _numbers(installed) < _numbers(floors[0]):
        return missing(control, about, f"{installed}, older than {floors[0]}")
    return holds(control, about, f"{installed}, not older than {floors[0]}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def plain_ray(modules: Collection[str]) -> Finding:
    """Check that the dashboard's agents do not start, given those of :data:`AGENT_MODULES` that are there."""
    if set(AGENT_MODULES) <= set(modules):
        return missing("full-ray", "Ray's agents", "all that ray[default] brings is here")
    absent = [name for name in AGENT_MODULES if name not in modules]
    return holds("full-ray", "Ray's agents", f"they cannot start without {', '.join(absent)}")


def gpu(model: str, *, devices: int, cupy: bool) -> Finding:
    """Check that there is a GPU, with its driver and CuPy. *model* is the first GPU's, as the driver tells."""
    control, about = "numpy-stand-in", "GPU"
    if devices == 0:
        return missing(control, about, "there is no device /dev/nvidia*")
    if model == "numpy stand-in":
        return missing(control, about, "there are devices, and the driver tells of no GPU")
    if not cupy:
        return missing(control, about, f"{model}, and CuPy is not installed", "Install CuPy: make gpu.")
    return holds(control, about, f"{model}, with CuPy")


def firewall(rules: Rules) -> Finding:
    """Say whether the rules of ``ray-gpu firewall`` are loaded on this host."""
    control, about = "ports-open", "firewall"
    if rules == "loaded":
        return holds(control, about, f"the table inet {TABLE} is loaded")
    if rules == "refused":
        return unclear(control, about, "only root can see the rules")
    return missing(control, about, "nft is not installed" if rules == "no nft" else f"no table inet {TABLE}")


# -- looking ------------------------------------------------------------------------------------


def modules_found(names: Collection[str]) -> list[str]:
    """Return those of these top-level modules that could be imported. Imports none."""
    return [name for name in names if util.find_spec(name) is not None]


def version_of(distribution: str) -> str | None:
    """Return the version of a distribution, or ``None`` when it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def own_requirements() -> list[str]:
    """Return what this project asks for, empty where it runs without being installed."""
    try:
        return metadata.requires("ray-gpu") or []
    except metadata.PackageNotFoundError:
        return []


def rules_loaded() -> Rules:
    """Ask nft for our table."""
    program = shutil.which("nft", path="/usr/sbin:/sbin:/usr/local/sbin:/usr/bin")
    if program is None:
        return "no nft"
    command = [program, "list", "table", "inet", TABLE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NFT_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return "refused"
    if done.returncode == 0:
        return "loaded"
    return "refused" if "not permitted" in done.stderr else "not loaded"
