"""`ray-gpu audit`: what an auditor does with a ledger file. Starts nothing, and needs no gateway."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
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
_EXISTING = click.Path(path_type=Path, dir_okay=False, exists=True)


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
    if report.repairs:
        numbers = ", ".join(map(str, report.repairs))
        errors.print(f"[yellow]repaired[/]: entries {numbers} say what a start could not read", soft_wrap=True)
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
@_ledger
@click.option("--node-ca", type=_EXISTING, required=True, help="CA of the nodes, from `ray-gpu vault node-ca`.")
def receipts(ledger: Path | None, state: Path, zone: str, node_ca: Path) -> None:
    """Check every receipt of a ledger with the nodes' CA alone; name those that do not hold.

    Exit status 0: all hold. 1: one does not, or the ledger does not verify.
    """
    from zones.ledger import read  # noqa: PLC0415 - imports what only this command needs
    from zones.receipts import check  # noqa: PLC0415 - as above

    found = list(check(read(ledger or Layout(state).ledger(zone)), node_ca.read_text(encoding="utf-8")))
    bad = [one for one in found if one.problem]
    for one in bad:
        console.print(f"  entry {one.seq}: lease {one.lease} on {one.node}: {one.problem}", soft_wrap=True)
    signed = [one for one in found if one.receipt]
    console.print(
        f"{len(signed) - len(bad)} of {len(signed)} receipts hold; {len(found) - len(signed)} leases were lost, "
        "and have none"
    )
    if bad:
        sys.exit(1)


@audit.command()
@click.option("--out", type=_FILE, required=True, help="New file for what is counted.")
def watch(out: Path) -> None:
    """Write down what the kernel counts on each TCP connection that ends here, until Ctrl-C. As root, on a zone's host.

    `ray-gpu audit reconcile` compares that with the ledger. Start it before the leases that are to be compared begin.
    """
    from ray_gpu.kernel_counts import KernelCounts  # noqa: PLC0415 - imports what only this command needs

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    with KernelCounts() as counts, out.open("x", encoding="utf-8") as file:
        file.write(f"{json.dumps({'since': datetime.now(UTC).strftime('%Y-%m-%dT%H:%M:%S.%fZ')})}\n")
        file.flush()
        console.print(f"counting into {out}; end it with Ctrl-C", soft_wrap=True)

        def keep(one: Any) -> None:
            file.write(f"{json.dumps({'local': one.local, 'remote': one.remote, 'sent': one.sent})}\n")
            file.flush()

        counts.watch(keep, ended.is_set)


@audit.command()
@click.argument("counts", type=_FILE)
@_from
def reconcile(counts: Path, ledger: Path | None, state: Path, zone: str) -> None:
    """Compare a ledger with what the kernel counted meanwhile (COUNTS, from `ray-gpu audit watch`), to the byte.

    Exit status 0: all fits. 1: something left that the ledger does not have, or the reverse.
    """
    from zones.ledger import read  # noqa: PLC0415 - imports what only this command needs
    from zones.reconcile import Counted  # noqa: PLC0415 - as above
    from zones.reconcile import reconcile as compare  # noqa: PLC0415 - as above

    try:
        first, *lines = [json.loads(line) for line in counts.read_text(encoding="utf-8").splitlines()]
        since, counted = str(first["since"]), [Counted(**line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{counts} is not what `ray-gpu audit watch` writes: {error}", file=str(counts)) from None
    found = list(compare(read(ledger or Layout(state).ledger(zone)), counted, since=since))
    bad = [line for line in found if line.problem]
    for line in bad:
        of = f"lease {line.lease} on {line.node}" if line.lease else "no lease of the ledger"
        console.print(f"  {line.local} to {line.remote}, {of}: {line.problem}", soft_wrap=True, markup=False)
    fits = [line for line in found if not line.problem]
    console.print(
        f"{len(fits)} of {len(found)} connections fit to the byte: {sum(line.ledger_bytes for line in fits)} bytes of "
        f"calls and {sum(line.framing_bytes for line in fits)} of framing, since {since}",
        soft_wrap=True,
    )
    if bad:
        sys.exit(1)


@audit.command()
@_ledger
@click.option("--out", type=_FILE, required=True, help="New HTML file.")
@click.option("--since", default="", metavar="TIME", help="Begin of the time to report on, UTC, as in 2026-01-31.")
@click.option("--until", default="~", metavar="TIME", help="End of it, which it does not include.")
@_key
@click.option("--node-ca", type=_EXISTING, help="CA of the nodes, from `ray-gpu vault node-ca`: checks receipts too.")
def report(ledger: Path | None, state: Path, zone: str, out: Path, key_text: str | None, **given: Any) -> None:
    """Write what a ledger says as one HTML file with pictures, for screen and paper, that needs no network.

    The ledger is verified before, and its decisions are made again; the report says what was checked.
    """
    from zones.ledger import read  # noqa: PLC0415 - imports what only this command needs
    from zones.pictures import page  # noqa: PLC0415 - as above
    from zones.summary import summarise  # noqa: PLC0415 - as above

    path = ledger or Layout(state).ledger(zone)
    verified = _checked(path, key_text, given["node_ca"])
    text = page(summarise(read(path), since=given["since"], until=given["until"]), verified=verified)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise click.UsageError(f"{out} exists already; name a new file") from None
    console.print(f"written to {out}; it needs no network", soft_wrap=True)


def _checked(path: Path, key_text: str | None, node_ca: Path | None) -> list[tuple[str, str]]:
    """Check a ledger, and return in words what was checked."""
    from zones.checkpoint import VerifierKey  # noqa: PLC0415 - imports what only this command needs
    from zones.ledger import read  # noqa: PLC0415 - as above
    from zones.ledger import verify as check  # noqa: PLC0415 - as above
    from zones.receipts import check as check_receipts  # noqa: PLC0415 - as above
    from zones.replaying import replay as again  # noqa: PLC0415 - as above

    key = _parsed(key_text, VerifierKey.parse, "--key") if key_text else None
    held = check(path, key=key)
    decisions = [one.same for one in again(read(path))]
    signed = f"covers entries 1 to {held.signed} of {held.entries}" if key else "not checked: no key was named"
    said = [
        ("every entry, the chain and the tree", f"verify: {held.entries} entries, head {held.head}"),
        ("decisions, made again by the policy of their time", f"{sum(decisions)} of {len(decisions)} are the same"),
        ("the zone's signature", signed),
    ]
    if node_ca is None:
        return [*said, ("receipts of the nodes", "not checked: no CA was named")]
    receipts = [one for one in check_receipts(read(path), node_ca.read_text(encoding="utf-8")) if one.receipt]
    good = sum(not one.problem for one in receipts)
    return [*said, ("receipts of the nodes", f"{good} of {len(receipts)} hold, with what they received to the byte")]


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
def archive(ledger: Path | None, state: Path, zone: str) -> None:
    """Move all entries of a ledger, whose gateway does not run, to a file of their own beside it.

    The gateway's next start continues it in a new file. Verifying needs all files; keep them together.
    """
    from zones.ledger import archive as move  # noqa: PLC0415 - imports what only this command needs

    moved = move(ledger or Layout(state).ledger(zone))
    console.print(f"moved to {moved}; the gateway continues in a new file. Keep both together", soft_wrap=True)


@audit.command()
@_ledger
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="Entries to show.")
def log(ledger: Path | None, state: Path, zone: str, last: int) -> None:
    """Show a ledger's last entries, each verified before it is shown."""
    from ray_gpu.cli import show  # noqa: PLC0415 - imports what only this command needs

    show.ledger(console, ledger or Layout(state).ledger(zone), last)
