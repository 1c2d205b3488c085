"""`ray-gpu vault`: what an operator does to a Vault of their own. The embedded cluster needs none of it."""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import rich_click as click
from rich.console import Console

from ray_gpu.cli.names import checked_zone
from zones.errors import ConfigError

if TYPE_CHECKING:
    from zones.vault import Vault

console = Console(highlight=False)

_FILE = click.Path(path_type=Path, dir_okay=False)
_Command = Callable[..., Any]


@click.group()
def vault() -> None:
    """Set up a Vault (OpenBao) for zones, nodes and people, and hand out their logins.

    Both commands take a token that may administer the Vault, from a file that nobody else can read. They revoke
    nothing: end the token when you are done.
    """


def _connection(command: _Command) -> _Command:
    for option in (
        click.option("--token-file", type=_FILE, required=True, help="File with the token; mode 0600."),
        click.option("--ca", type=_FILE, help="PEM file to check Vault's certificate with, instead of the system's."),
        click.option("--address", required=True, help="Vault's address, https://host:port."),
    ):
        command = option(command)
    return command


@contextmanager
def _login(address: str, ca: Path | None, token_file: Path) -> Iterator[Vault]:
    from ray_gpu.vault_declaration import read_secret  # noqa: PLC0415 - imports what only these commands need
    from zones.vault import Vault  # noqa: PLC0415 - as above

    client = Vault(address, ca_file=None if ca is None else str(ca)).with_token(read_secret(token_file))
    try:
        yield client
    finally:
        client.close()


@vault.command()
@click.argument("declaration", type=_FILE)
@_connection
@click.option("--policies", type=click.Path(path_type=Path, file_okay=False), help="Directory of *.hcl, if not ours.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option("--rotate-token", is_flag=True, help="Make a new Ray token; then restart every Ray node, head first.")
@click.option("--oidc-secret", is_flag=True, help="Write the client secret again: Vault cannot say that it changed.")
def setup(
    declaration: Path,
    address: str,
    ca: Path | None,
    token_file: Path,
    policies: Path | None,
    **flags: bool,
) -> None:
    """Make what the DECLARATION (a YAML file) says and Vault lacks; correct what differs; change nothing else.

    Run it again whenever the declaration changes: it says that nothing changes once all is as declared. It hands out
    no login (`ray-gpu vault issue` does), and never prints a secret.
    """
    from ray_gpu import embedded, vault_setup  # noqa: PLC0415 - imports what only this command needs
    from ray_gpu.vault_declaration import read  # noqa: PLC0415 - as above

    wanted = read(declaration)
    with _login(address, ca, token_file) as client:
        audited = vault_setup.audited(client)
        renew = vault_setup.Renew(ray_token=flags["rotate_token"], oidc_secret=flags["oidc_secret"])
        directory = policies or embedded.shipped_policies() / "vault"
        changes = vault_setup.plan(client, wanted, policies=directory, renew=renew)
        for change in changes:
            console.print(f"{'would ' if flags['dry_run'] else ''}{change}", soft_wrap=True, markup=False)
            if not flags["dry_run"]:
                change.apply()
        if not audited:
            console.print("[yellow]no audit device is on[/]: name audit_file in the declaration to be told how")
    counts = Counter(change.action for change in changes)
    total = ", ".join(f"{count} to {action}" for action, count in counts.items())
    if not changes:
        console.print("[green]nothing changes[/]: Vault holds what is declared")
    elif flags["dry_run"]:
        console.print(f"dry run, nothing was changed: {total}")
    else:
        console.print(f"[green]done[/]: {total}")


@vault.command()
@click.argument("name")
@_connection
@click.option("--out", type=_FILE, required=True, help="File to write, mode 0600; one that is there is replaced.")
def issue(name: str, address: str, ca: Path | None, token_file: Path, out: Path) -> None:
    """Write new credentials of one gateway (NAME is its zone), node or person; their older ones end.

    The file is JSON: `role_id` and `secret_id`, or `user` and `password`.
    """
    from ray_gpu.vault_setup import issue_one  # noqa: PLC0415 - imports what only this command needs

    # The file first: credentials that cannot be kept would end the older ones for nothing.
    with _private(out) as file, _login(address, ca, token_file) as client:
        try:
            document = issue_one(client, name)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="NAME") from None
        json.dump(document, file)
    console.print(f"wrote {out}: move it to where {name} runs, and keep no copy", soft_wrap=True)


@vault.command("ledger-key")
@click.argument("zone", callback=checked_zone)
@_connection
def ledger_key(zone: str, address: str, ca: Path | None, token_file: Path) -> None:
    """Print the public key that a ZONE's gateway signs its ledger with, for `ray-gpu audit` and docs/verify_proof.py.

    Any login of the zone may read it, a person's too.
    """
    from zones.signing import Signer  # noqa: PLC0415 - imports what only this command needs

    with _login(address, ca, token_file) as client:
        click.echo(Signer(client, zone).key)


@vault.command("node-ca")
@_connection
def node_ca(address: str, ca: Path | None, token_file: Path) -> None:
    """Print the CA certificate of the nodes that sign offers and receipts, for `ray-gpu audit receipts`.

    Any login may read it.
    """
    with _login(address, ca, token_file) as client:
        click.echo(client.node_ca(), nl=False)


@contextmanager
def _private(path: Path) -> Iterator[TextIO]:
    """Write a file of mode 0600 that is whole once it is there, and not there after an error."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as problem:
        message = f"{path}: {problem.strerror}; name a file in a directory that you may write"
        raise ConfigError(message, file=str(path)) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        draft.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            draft.unlink()
        raise
