"""`ray-gpu policy`: what a zone's security officer and a pool's operator do with their files. Starts nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
from rich.console import Console

from ray_gpu.cli.names import Command, checked_zone, policies_option
from zones.errors import UnknownNameError
from zones.model import EgressRequest

if TYPE_CHECKING:
    from zones.policy import Policy
    from zones.review import Asked

console = Console(highlight=False)

_DIRECTORY = click.Path(path_type=Path, exists=True, file_okay=False)


@click.group()
def policy() -> None:
    """Check, explain, test and compare policies, before a gateway reads them."""


def _zones(command: Command) -> Command:
    return click.argument("zones", nargs=-1, metavar="[ZONE]...", callback=_checked_zones)(command)


def _checked_zones(ctx: click.Context, param: click.Parameter, names: Sequence[str]) -> list[str]:
    return [checked_zone(ctx, param, name) for name in names]


def _directory(given: Path | None) -> Path:
    from ray_gpu import embedded  # noqa: PLC0415 - imports what only these commands need

    return given or embedded.shipped_policies()


def _load(directory: Path, zone: str) -> Policy:
    from zones.config import load_zone  # noqa: PLC0415 - imports what only these commands need
    from zones.policy import Policy  # noqa: PLC0415 - as above

    return Policy.load(directory, load_zone(directory, zone))


def _names(directory: Path, given: Sequence[str]) -> Sequence[str]:
    from zones.config import zone_names  # noqa: PLC0415 - imports what only these commands need

    known = zone_names(directory)
    if not given and not known:
        raise click.UsageError(f"{directory} describes no zone: there is no */zone.yaml in it")
    return given or known


@policy.command()
@policies_option
@_zones
def check(policies: Path | None, zones: Sequence[str]) -> None:
    """Check the files of each ZONE, by default of all, against the schema; what is wrong has file and line."""
    directory = _directory(policies)
    for name in _names(directory, zones):
        loaded = _load(directory, name)
        zone = loaded.zone
        counts = f"{len(zone.datasets)} data sets, {len(loaded.rule_ids)} rules"
        console.print(f"[green]ok[/]: {name}: {counts}, pools: {', '.join(zone.pools)}", soft_wrap=True)
        for problem in zone.disapproved:
            console.print(f"[yellow]approves nothing[/]: {problem}", soft_wrap=True)


@policy.command()
@policies_option
@_zones
def test(policies: Path | None, zones: Sequence[str]) -> None:
    """Put every golden decision of each ZONE (ZONE/decisions.yaml) to its policy; exit status 1 when one differs."""
    from zones import golden  # noqa: PLC0415 - imports what only this command needs

    directory, failed = _directory(policies), 0
    for name in _names(directory, zones):
        loaded = _load(directory, name)
        outcomes = golden.outcomes(loaded, golden.read(golden.golden_path(directory, name), loaded.zone))
        wrong = [outcome for outcome in outcomes if not outcome.holds]
        for outcome in wrong:
            expected = _answer(allowed=outcome.golden.allowed, rules=sorted(outcome.golden.rules or ()))
            found = _answer(allowed=outcome.decision.allowed, rules=outcome.decision.rules)
            console.print(f"[red]differs[/]: {outcome.golden.where}: {outcome.golden.name}", soft_wrap=True)
            console.print(f"  expected {expected}; decided {found}", soft_wrap=True)
        style = "red" if wrong else "green"
        console.print(f"[{style}]{name}[/]: {len(outcomes) - len(wrong)} of {len(outcomes)} golden decisions hold")
        failed += len(wrong)
    if failed:
        sys.exit(1)


def _answer(*, allowed: bool, rules: Iterable[str]) -> str:
    named = ", ".join(rules)
    return f"{'allowed' if allowed else 'refused'}{f' by {named}' if named else ''}"


@policy.command()
@policies_option
@click.argument("zone", callback=checked_zone)
@click.option("--person", default="", help="Name in Vault's identity store.")
@click.option("--team", "teams", multiple=True, help="Group in Vault's identity store; may be given several times.")
@click.option("--pool", default="", help="Pool of GPUs; by default the zone's first.")
@click.option("--purpose", default="", help="As it would be said when attaching.")
@click.option("--dataset", default="", help="Data set of the catalog; without one it is about arguments alone.")
@click.option("--columns", default="", help="Column names with commas between; by default all of the data set's.")
@click.option("--segments", default="", help="Segments with commas between; by default all rows.")
@click.option("--reviewed", is_flag=True, help="As if the function had been reviewed.")
def explain(zone: str, policies: Path | None, teams: Sequence[str], reviewed: bool, **asked: str) -> None:
    """Say whether something may leave ZONE, which rule decides, where it stands, and what would have to change."""
    from zones import review  # noqa: PLC0415 - imports what only this command needs
    from zones.obligations import duties  # noqa: PLC0415 - as above

    loaded = _load(_directory(policies), zone)
    pool = asked["pool"] or loaded.zone.pools[0]
    if pool not in loaded.zone.pools:
        raise UnknownNameError.of("pool", pool, loaded.zone.pools)
    columns = asked["columns"].split(",") if asked["columns"] else ()
    request = review.completed(
        loaded.zone,
        EgressRequest(
            zone=zone,
            pool=pool,
            person=asked["person"] or review.SOMEBODY,
            groups=frozenset(teams),
            purpose=asked["purpose"],
            dataset=asked["dataset"],
            columns=frozenset(name.strip() for name in columns),
            segments=frozenset(name.strip() for name in asked["segments"].split(",") if name.strip()),
            function_reviewed=reviewed,
        ),
    )
    found = review.explain(loaded, request)
    colour, word = ("green", "allowed") if found.decision.allowed else ("red", "refused")
    console.print(f"[{colour}]{word}[/]: {_subject(request)}", soft_wrap=True)
    for rule, reason, where in found.rules:
        console.print(f"  rule [bold]{rule}[/]: {reason}{f' ({where})' if where else ''}", soft_wrap=True)
    if found.decision.allowed:
        for key, value in duties(found.decision.obligations).items():
            console.print(f"  on the condition that {key}: {value}", soft_wrap=True, markup=False)
        return
    console.print("It would be allowed" if found.ways else "No simple change of the request would have it allowed.")
    for way in found.ways:
        console.print(f"  {way}", soft_wrap=True, markup=False)
    if found.owner:
        console.print(f"Otherwise ask {found.owner}.", soft_wrap=True)


def _subject(request: EgressRequest) -> str:
    who = ", ".join(f"team {team}" for team in sorted(request.groups)) or "somebody of no team"
    what = f"{request.dataset}: {', '.join(sorted(request.columns))}" if request.dataset else "arguments"
    purpose = f", purpose {request.purpose!r}" if request.purpose else ", no purpose"
    return f"{who} sends {what} (classes {', '.join(sorted(request.classes))}) to pool {request.pool}{purpose}"


@policy.command()
@click.argument("old", type=_DIRECTORY)
@click.argument("new", type=_DIRECTORY)
@click.option("--zone", "zones", multiple=True, callback=_checked_zones, help="By default every zone of both.")
def diff(old: Path, new: Path, zones: Sequence[str]) -> None:
    """Compare two policies directories: who gains access to what in NEW, who loses it, which conditions change.

    Exit status 0: nothing differs. 1: something does, or a file is wrong.
    """
    from zones import review  # noqa: PLC0415 - imports what only this command needs
    from zones.config import zone_names  # noqa: PLC0415 - as above

    differs = False
    before, after = set(zone_names(old)), set(zone_names(new))
    for name in zones or sorted(before | after):
        if name in before ^ after:
            differs = True
            console.print(f"zone {name} is {'new' if name in after else 'gone'}: read it whole", soft_wrap=True)
            continue
        found = review.difference(_load(old, name), _load(new, name))
        differs = differs or bool(found)
        for word, colour, asked in (("gains", "red", found.gained), ("loses", "green", found.lost)):
            _print_groups(word, colour, asked, found.purposes)
        for pool, data, key, was, will in found.obligations:
            console.print(f"  pool {pool}, {data}: {key}: {was} -> {will}", soft_wrap=True, markup=False)
        summary = f"{len(found.gained)} of {found.asked} questions newly allowed, {len(found.lost)} no longer"
        console.print(f"[bold]{name}[/]: {summary if found else f'nothing differs in {found.asked} questions'}")
    if differs:
        sys.exit(1)


def _print_groups(word: str, colour: str, asked: Sequence[Asked], purposes: Sequence[str]) -> None:
    from zones import review  # noqa: PLC0415 - imports what only these commands need

    for group in review.grouped(asked, purposes):
        what = f"{group.data}: {', '.join(group.columns)}" if group.columns else group.data
        console.print(f"  {group.who} [{colour}]{word}[/] {what} to pool {group.pool}, {group.when}", soft_wrap=True)


@policy.command()
@click.argument("ledger", type=click.Path(path_type=Path, dir_okay=False))
@policies_option
def simulate(ledger: Path, policies: Path | None) -> None:
    """Ask a policy what the LEDGER's decisions were asked, and show each that would be another one now.

    Exit status 0: all would be as they were. 1: some would not.
    """
    from zones import review  # noqa: PLC0415 - imports what only this command needs
    from zones.ledger import read  # noqa: PLC0415 - as above

    entries = list(read(ledger))
    loaded = _load(_directory(policies), str(entries[0]["zone"]))
    replayed = list(review.simulate(loaded, entries))
    changed = [one for one in replayed if one.decision.allowed is not one.was_allowed]
    for one in changed:
        now = _answer(allowed=one.decision.allowed, rules=one.decision.rules)
        was = _answer(allowed=one.was_allowed, rules=())
        console.print(f"  entry {one.seq}: {one.request.person}: {_subject(one.request)}", soft_wrap=True, markup=False)
        console.print(f"    was {was}, would be {now}", soft_wrap=True)
    console.print(f"{len(changed)} of {len(replayed)} decisions would change")
    if changed:
        sys.exit(1)


@policy.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File for the private key.")
def officer(name: str, out: Path) -> None:
    """Make a signing key for the officer NAME; prints the line for `officers` in zone.yaml."""
    from zones.note import SigningKey  # noqa: PLC0415 - imports what only this command needs

    try:
        key = SigningKey.generate(name)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise click.UsageError(f"{out} exists already; name a new file: a key is not overwritten") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{key.text}\n")
    console.print(f"Private key in {out}. In zone.yaml, below `officers`:", soft_wrap=True)
    click.echo(f"  - {key.verifier}")


@policy.command()
@click.argument("zone", callback=checked_zone)
@click.argument("proposal", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--key", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True, help="Officer's.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@policies_option
def approve(zone: str, proposal: Path, key: Path, policies: Path | None, *, yes: bool) -> None:
    """Show a function that somebody proposes (`f.proposal()`), and sign it for ZONE. Nothing of it is run."""
    from ray_gpu import proposal as proposals  # noqa: PLC0415 - imports what only this command needs
    from zones.approvals import Approval  # noqa: PLC0415 - as above
    from zones.config import approval_path  # noqa: PLC0415 - as above
    from zones.note import SigningKey  # noqa: PLC0415 - as above

    directory = _directory(policies)
    try:
        signer = SigningKey.parse(key.read_text(encoding="utf-8"))
        document = proposals.parse(proposal.read_text(encoding="utf-8"))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    loaded = _load(directory, zone)
    if signer.verifier not in loaded.zone.officers:
        raise click.UsageError(f"{signer.verifier.name} is no officer of zone {zone}; add the key to zone.yaml first")
    try:
        approval = Approval(zone=zone, function=proposals.digest(document), name=str(document["name"]))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(proposals.readable(document))
    if not yes:
        click.confirm(f"Approve this function for zone {zone}?", abort=True)
    path = directory / approval_path(zone, approval.function)
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(signer.sign(approval.text()), encoding="utf-8")
    draft.replace(path)
    console.print(f"[green]approved[/]: {approval.name}, {approval.function[:16]}, in {path}", soft_wrap=True)
    console.print("Sessions that attach from now on send it as it was approved.", soft_wrap=True)
