"""A ledger signed by its zone's key in a real OpenBao: who may sign and read, and what an auditor does with it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from click.testing import CliRunner, Result

from ray_gpu.cli.main import cli
from ray_gpu.vault_declaration import Declaration, NodeSpec, PersonSpec
from ray_gpu.vault_server import VaultServer
from ray_gpu.vault_setup import Credentials, setup
from zones.audit import verify
from zones.checkpoint import VerifierKey, opened, origin
from zones.errors import VaultDeniedError, VaultError
from zones.ledger import Ledger
from zones.signing import Signer
from zones.vault import Vault

ROOT = Path(__file__).parents[1]
START = {"kind": "session-start", "person": "dana", "session": "s1", "purpose": "nobody's business"}


class Site:
    """A Vault after set-up, and everybody's login."""

    def __init__(self, server: VaultServer, made: Credentials, root: Vault) -> None:
        self.server = server
        self.root = root
        roles = {**made.gateways, **made.nodes}
        self.logins = {
            name: server.client().login_approle(role.role_id, role.secret_id) for name, role in roles.items()
        }
        self.logins["dana"] = server.client().login_userpass("dana", made.people["dana"])


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """One Vault for this file."""
    with TemporaryDirectory(prefix="rgs") as directory:
        server = VaultServer.start(Path(directory) / "vault")
        try:
            root = server.root_client()
            declaration = Declaration(
                zones=("clinic", "trading"),
                nodes=(NodeSpec(name="gpu-1", role="gpu", addresses=("10.9.0.1",)),),
                people=(PersonSpec(name="dana", zone="clinic"),),
            )
            made = setup(root, declaration, policies=ROOT / "policies/vault")
            yield Site(server, made, root)
        finally:
            server.stop()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """An open ledger of the clinic, ``ledger.sqlite``."""
    with Ledger.open(tmp_path / "ledger.sqlite", zone="clinic") as writer:
        yield writer


def test_signed_by_the_gateway(site: Site, ledger: Ledger, tmp_path: Path) -> None:
    """A gateway's checkpoints hold by the key that Vault shows, which people of the zone may read."""
    signer = Signer(site.logins["clinic"], "clinic")
    for _ in range(3):
        ledger.append(START)
        note = signer.sign(ledger)

    report = verify(tmp_path / "ledger.sqlite", key=signer.key)
    assert (report.entries, report.signed) == (7, 6)
    assert opened(note, Signer(site.logins["dana"], "clinic").key).size == 6
    assert signer.key.name == origin("clinic")


def test_threads_sign(site: Site, ledger: Ledger, tmp_path: Path) -> None:
    """Sessions that end together sign one after another, so that the newest checkpoint is of the most entries."""
    signer = Signer(site.logins["clinic"], "clinic")
    with ThreadPoolExecutor(8) as several:
        notes = list(several.map(lambda _: signer.sign(ledger), range(16)))

    assert sorted(opened(note, signer.key).size for note in notes) == list(range(1, 17))
    assert verify(tmp_path / "ledger.sqlite", key=signer.key).signed == 16


@pytest.mark.parametrize("name", ["trading", "gpu-1", "dana"])
def test_others_do_not_sign(site: Site, ledger: Ledger, name: str) -> None:
    """Neither another zone's gateway, nor a node, nor a person signs; control: the zone's own gateway does."""
    body = {"input": base64.b64encode(b"x").decode()}

    assert site.logins["clinic"].call("POST", "ledger/sign/clinic", **body)["data"]["signature"].startswith("vault:v1:")
    with pytest.raises(VaultDeniedError):
        site.logins[name].call("POST", "ledger/sign/clinic", **body)
    if name != "dana":
        with pytest.raises(VaultDeniedError, match="shows this login no ledger key of zone clinic"):
            Signer(site.logins[name], "clinic")
    assert ledger.head.seq == 1


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "ledger/export/signing-key/clinic", {}),
        ("GET", "ledger/backup/clinic", {}),
        ("POST", "ledger/keys/clinic/config", {"exportable": True}),
        ("POST", "ledger/keys/clinic/rotate", {}),
        ("DELETE", "ledger/keys/clinic", {}),
        ("POST", "ledger/keys/other", {"type": "ed25519"}),
    ],
)
def test_key_stays_in_vault(site: Site, method: str, path: str, body: dict[str, object]) -> None:
    """A gateway that was taken over cannot take the key away, replace it, or make another; nor can root export it."""
    with pytest.raises(VaultDeniedError):
        site.logins["clinic"].call(method, path, **body)
    if "export" in path or "backup" in path:
        with pytest.raises(VaultError):
            site.root.call(method, path, **body)


def test_rotated_key(site: Site, tmp_path: Path) -> None:
    """A signer keeps to the version that it began with; the next one has the new one, and each its own public key."""
    signer = Signer(site.logins["trading"], "trading")
    with Ledger.open(tmp_path / "ledger.sqlite", zone="trading") as ledger:
        site.root.call("POST", "ledger/keys/trading/rotate")
        later = Signer(site.logins["trading"], "trading")

        assert opened(signer.sign(ledger), signer.key).size == 1
        assert opened(later.sign(ledger), later.key).size == 2
    assert later.key != signer.key


def test_older_setup(site: Site) -> None:
    """A Vault without the key says what to do; a key of another kind is none."""
    site.root.call("POST", "ledger/keys/lab", type="aes256-gcm96")
    with pytest.raises(VaultError, match="ledger/keys/lab in Vault is no Ed25519 key"):
        Signer(site.root, "lab")
    for login in (site.root, site.logins["clinic"]):
        with pytest.raises(VaultDeniedError, match="run `ray-gpu vault setup` again"):
            Signer(login, "nowhere")


# -- the commands ---------------------------------------------------------------------------------


def run(*words: object) -> Result:
    """Run ``ray-gpu`` with these words."""
    return CliRunner().invoke(cli, [*map(str, words)])


def test_commands(site: Site, ledger: Ledger, tmp_path: Path) -> None:
    """From key and checkpoint to proofs that a stranger checks, by commands alone; then what a rewriting looks like."""
    path, token, note = tmp_path / "ledger.sqlite", tmp_path / "token", tmp_path / "note"
    token.write_text(site.logins["dana"].token)
    token.chmod(0o600)
    connection = ["--address", site.server.address, "--ca", site.server.ca_file, "--token-file", token]
    key = run("vault", "ledger-key", "clinic", *connection).output.strip()
    signer = Signer(site.logins["clinic"], "clinic")
    ledger.append(START)
    signer.sign(ledger)
    note.write_text(run("audit", "checkpoint", path).output)
    ledger.append(START)
    signer.sign(ledger)

    assert VerifierKey.parse(key) == signer.key
    good = run("audit", "verify", path, "--key", key, "--checkpoint", note)
    assert good.exit_code == 0, good.output
    assert "signed up to entry 4; 1 came later" in good.output
    assert "begins with the 2 entries of the checkpoint that was kept" in good.output
    stranger = [sys.executable, "-I", str(ROOT / "docs/verify_proof.py")]
    for command, extra in ((["prove", 2, "person", "kind"], []), (["growth", note, "--key", key], [note])):
        proof = tmp_path / "proof.json"
        proof.write_text(run("audit", *command, "--from", path).output)
        done = subprocess.run(
            [*stranger, str(proof), key, *map(str, extra)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "nobody's business" not in proof.read_text()
    assert json.loads(run("audit", "prove", 2, "--from", path).output)["opened"][0]["value"] == "session-start"
    assert "signed: the 4 entries before" in run("audit", "log", path).output

    rewritten = tmp_path / "rewritten.sqlite"
    with closing(Ledger.open(rewritten, zone="clinic")) as other:
        for _ in range(5):
            other.append(START | {"person": "nobody"})
    assert run("audit", "verify", rewritten).exit_code == 0
    found = run("audit", "verify", rewritten, "--key", key, "--checkpoint", note)
    assert found.exit_code == 1
    assert "it was rewritten" in found.output


def test_bad_arguments(ledger: Ledger, tmp_path: Path) -> None:
    """What is no key, no checkpoint, or a checkpoint without a key, is said to be so."""
    path, note = tmp_path / "ledger.sqlite", tmp_path / "note"
    note.write_text("no note")
    key = VerifierKey(origin("clinic"), bytes(32))

    for words, message in (
        (["verify", path, "--key", "x"], "name+id+base64"),
        (["verify", path, "--checkpoint", note], "name the zone's key with --key"),
        (["verify", path, "--key", key, "--checkpoint", note], "this is no checkpoint"),
        (["verify", path, "--key", key, "--checkpoint", tmp_path / "nothing"], "cannot be read"),
        (["prove", 1, "--from", path], "no signed checkpoint yet"),
        (["prove", 0, "--from", path], "0 is not in the range"),
        (["checkpoint", path], "no signed checkpoint yet"),
    ):
        done = run("audit", *words)
        assert done.exit_code in {1, 2}
        assert message in " ".join(done.output.replace("│", " ").split()), done.output
    assert ledger.head.seq == 1
