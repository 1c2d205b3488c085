"""Names and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from ray_gpu.state import default_state_dir
from zones.model import check_id

Command = Callable[..., Any]


def checked_zone(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Return the name of a zone, which may become part of a path; for use as a ``callback``."""
    try:
        return check_id(value, what="zone")
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def state_option(command: Command) -> Command:
    """Give a command the option ``--state``."""
    shown = "RAY_GPU_STATE, or this user's state directory"
    kind = click.Path(path_type=Path, file_okay=False)
    text = "State directory of the cluster."
    return click.option("--state", type=kind, default=default_state_dir, show_default=shown, help=text)(command)


def policies_option(command: Command) -> Command:
    """Give a command the option ``--policies``."""
    kind = click.Path(path_type=Path, exists=True, file_okay=False)
    return click.option("--policies", type=kind, help="Policies directory; by default the one that is shipped.")(
        command
    )


def zone_option(command: Command) -> Command:
    """Give a command the option ``--zone``."""
    text = "Name of the zone."
    return click.option("--zone", default="clinic", show_default=True, callback=checked_zone, help=text)(command)
