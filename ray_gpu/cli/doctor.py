"""``ray-gpu doctor``: which controls hold on this host, and how to mend those that do not."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import rich_click as click
from rich.console import Console
from rich.text import Text

from ray_gpu.controls import CONTROLS

if TYPE_CHECKING:
    from ray_gpu.doctor.examination import Line, Role, Subject

console = Console(highlight=False)

_STYLES = {"ok": "green", "weaker": "yellow", "missing": "red", "unclear": "red"}
_ROLES = ["head", "gpu", "zone", "gateway", "embedded"]


@click.command()
@click.option(
    "--config",
    "configs",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="node.yaml or gateway.yaml; give both with two options. By default those in /etc/ray-gpu.",
)
@click.option("--role", type=click.Choice(_ROLES), help="What this host is to be, while it has no such file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def doctor(configs: tuple[Path, ...], role: Role | None, as_json: bool) -> None:
    """Check each control on this host, and say how to mend what is missing. Changes nothing.

    Run it as the user who starts the node or the gateway. Exit status 1: a control is missing, or cannot be seen,
    that this host's role needs. "weaker" is what the role runs without.
    """
    from ray_gpu.doctor import examination  # noqa: PLC0415 - imports what only this command needs

    assert set(_ROLES) == set(get_args(examination.Role))
    host = examination.subject(configs, role)
    lines = examination.examine(host)
    if as_json:
        click.echo(json.dumps(document(host, lines), indent=1))
    else:
        show(host, lines)
    if failed(lines):
        sys.exit(1)


def failed(lines: Sequence[Line]) -> list[str]:
    """Return the ids of the controls that are needed and do not hold, each once."""
    return list(dict.fromkeys(line.finding.control for line in lines if line.word in ("missing", "unclear")))


def document(host: Subject, lines: Sequence[Line]) -> dict[str, Any]:
    """Return what was found as JSON types."""
    return {
        "roles": sorted(host.roles),
        "ok": not failed(lines),
        "checks": [
            {
                "control": line.finding.control,
                "about": line.finding.about,
                "result": line.word,
                "needed": line.needed,
                "found": line.finding.found,
                "fix": line.finding.fix,
                "promise": CONTROLS[line.finding.control].promise,
            }
            for line in lines
        ],
    }


def show(host: Subject, lines: Sequence[Line]) -> None:
    """Print a line about the host and one for each check. None is folded, so that each can be found by its start."""
    ids = failed(lines)
    text = f"doctor: {_name(host)}: {'missing: ' + ', '.join(ids) if ids else 'all that it needs holds'}"
    console.print(Text(text, style="red" if ids else "green"), soft_wrap=True)
    control_width, about_width = (
        max(len(getattr(line.finding, name)) for line in lines) for name in ("control", "about")
    )
    for line in lines:
        finding = line.finding
        said = f"{finding.found}. {finding.fix}" if finding.fix else finding.found
        row = Text(f"  {line.word:<7}", style=_STYLES[line.word])
        row.append(f"  {finding.control:<{control_width}}  {finding.about:<{about_width}}  {said}", style="default")
        console.print(row, soft_wrap=True)


def _name(host: Subject) -> str:
    names = [f"node {host.node.node}"] if host.node else []
    names += [f"gateway of zone {host.gateway.zone}"] if host.gateway else []
    roles = ", ".join(sorted(host.roles))
    return f"{' and '.join(names)} ({roles})" if names else f"a host of role {roles}"
