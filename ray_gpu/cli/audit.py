"""`ray-gpu audit`: what an auditor does with a ledger file. Starts nothing, and needs no gateway."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.console import Console

from ray_gpu.cli.names import Command, state_option, zone_option
from ray_gpu.state import Layout
from zones.errors import ConfigError

if TYPE_CHECKING:
    from zones.checkpoint import Checkpoint, VerifierKey

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def audit() -> None:
    """Check and read the ledger: what was decided, what left a zone, what was refused; and prove it to others."""


def _ledger(command: Command) -> Command:
    return click.argument("ledger", type=_FILE, required=False)(state_option(zone_option(command)))


def _from(command: Command) -> Command:
    option = click.option("--from", "ledger", type=_FILE, help="Ledger file, instead of the embedded cluster's.")
    return option(state_option(zone_option(command)))


def _key(command: Command) -> Command:
    text = "The zone's key, as `ray-gpu vault ledger-key` prints it."
    return click.option("--key", "key_text", help=text)(command)


def _parsed(text: str, parse: Callable[[str], Any], option: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def _noted(file: Path | None, key: VerifierKey | None) -> Checkpoint | None:
    """Return the checkpoint in a file, whose signature holds."""
    from zones.checkpoint import opened  # noqa: PLC0415 - imports what only these commands need

    if file is None:
        return None
    if key is None:
        raise click.UsageError("a checkpoint is worth something by its signature: name the zone's key with --key")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as a checkpoint: {error}", file=str(file)) from None
    note: Checkpoint = _parsed(text, lambda text: opened(text, key), "--checkpoint")
    return note


@audit.command()
@_ledger
@click.option("--head", "head_text", help="Head that was noted down earlier, as `verify` prints it.")
@_key
@click.option("--checkpoint", "file", type=_FILE, help="Signed checkpoint that was kept outside.")
def verify(
    ledger: Path | None, state: Path, zone: str, head_text: str | None, key_text: str | None, file: Path | None
) -> None:
    """Verify a ledger file, by default the embedded cluster's, and name the first entry that does not fit.

    Entries cut off at the end, or a ledger rewritten as a whole, are found by a signed checkpoint, or a head, that was
    kept outside. Exit status 0: it verifies. 1: it was changed. 2: there is no such file, or it cannot be read.
    """
    from zones.checkpoint import VerifierKey  # noqa: PLC0415 - imports what only this command needs
    from zones.ledger import Head  # noqa: PLC0415 - as above
    from zones.ledger import verify as check  # noqa: PLC0415 - as above

    head = _parsed(head_text, Head.parse, "--head") if head_text else None
    key = _parsed(key_text, VerifierKey.parse, "--key") if key_text else None
    noted = _noted(file, key)
    report = check(ledger or Layout(state).ledger(zone), expected_head=head, key=key, noted=noted)
    console.print(
        f"[green]verifies[/]: zone {report.zone}, {report.entries} entries, head {report.head}", soft_wrap=True
    )
    if key is not None:
        console.print(f"signed up to entry {report.signed}; {report.entries - report.signed} came later")
    if noted is not None:
        console.print(f"begins with the {noted.size} entries of the checkpoint that was kept")
    if report.without_wal:
        errors.print(
            "[yellow]perhaps not all of it[/]: the file was copied from a running gateway without its -wal file, where "
            "later entries are; copy it with `ray-gpu audit copy`",
            soft_wrap=True,
        )


@audit.command()
@_ledger
def replay(ledger: Path | None, state: Path, zone: str) -> None:
    """Decide every decision of a ledger again, by the policy that the ledger holds for it; name those that differ.

    Exit status 0: all are as written down. 1: one differs, or the ledger does not verify.
    """
    from zones.ledger import read  # noqa: PLC0415 - imports what only this command needs
    from zones.replaying import replay as again  # noqa: PLC0415 - as above

    count, differ = 0, 0
    for one in again(read(ledger or Layout(state).ledger(zone))):
        count += 1
        if not one.same:
            differ += 1
            was, now = (
                _answer(*each) for each in ((one.allowed, one.rules), (one.decision.allowed, one.decision.rules))
            )
            console.print(f"  entry {one.seq}: written down as {was}; the policy says {now}", soft_wrap=True)
    console.print(f"{count - differ} of {count} decisions are as the policy of their time has them")
    if differ:
        sys.exit(1)


def _answer(allowed: bool, rules: Sequence[str]) -> str:
    return f"{'allowed' if allowed else 'refused'} by {', '.join(rules)}"


@audit.command()
@_ledger
def checkpoint(ledger: Path | None, state: Path, zone: str) -> None:
    """Print the newest signed checkpoint in a ledger, to be kept outside: later it shows what was changed since."""
    from zones.proof import newest_note  # noqa: PLC0415 - imports what only this command needs

    click.echo(newest_note(ledger or Layout(state).ledger(zone)), nl=False)


@audit.command()
@click.argument("entry", type=click.IntRange(min=1))
@click.argument("fields", nargs=-1)
@_from
def prove(entry: int, fields: tuple[str, ...], ledger: Path | None, state: Path, zone: str) -> None:
    """Print the proof that a ledger has the ENTRY with this number, with the values of FIELDS, and of no others.

    By default with its kind and time. Whoever gets it checks it with docs/verify_proof.py and the zone's key alone.
    """
    from zones import proof  # noqa: PLC0415 - imports what only this command needs

    document = proof.prove(ledger or Layout(state).ledger(zone), entry, fields or ("kind", "time"))
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


@audit.command()
@click.argument("old", type=_FILE)
@_from
@click.option("--key", "key_text", required=True, help="The zone's key, as `ray-gpu vault ledger-key` prints it.")
def growth(old: Path, ledger: Path | None, state: Path, zone: str, key_text: str) -> None:
    """Print the proof that a ledger begins with the one that the signed checkpoint in the file OLD is of."""
    from zones import proof  # noqa: PLC0415 - imports what only this command needs
    from zones.checkpoint import VerifierKey  # noqa: PLC0415 - as above

    noted = _noted(old, _parsed(key_text, VerifierKey.parse, "--key"))
    assert noted is not None
    click.echo(json.dumps(proof.prove_growth(ledger or Layout(state).ledger(zone), noted), indent=2))


@audit.command()
@click.argument("target", type=_FILE)
@_from
def copy(target: Path, ledger: Path | None, state: Path, zone: str) -> None:
    """Copy a ledger, by default the embedded cluster's, to the new file TARGET, while its gateway runs or not.

    Copying the file alone leaves out what a running gateway has written last.
    """
    from zones import ledger as ledgers  # noqa: PLC0415 - imports what only this command needs

    ledgers.copy_ledger(ledger or Layout(state).ledger(zone), target)
    console.print(f"copied to {target}; check it with: ray-gpu audit verify {target}", soft_wrap=True)


@audit.command()
@_ledger
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="Entries to show.")
def log(ledger: Path | None, state: Path, zone: str, last: int) -> None:
    """Show a ledger's last entries, each verified before it is shown."""
    from ray_gpu.cli import show  # noqa: PLC0415 - imports what only this command needs

    show.ledger(console, ledger or Layout(state).ledger(zone), last)
