"""Names that people give to several commands."""

from __future__ import annotations

import rich_click as click

from zones.model import check_id


def checked_zone(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Return the name of a zone, which may become part of a path; for use as a ``callback``."""
    try:
        return check_id(value, what="zone")
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None
