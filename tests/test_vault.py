"""The Vault client, the policies and the embedded server, against the real OpenBao binary."""

from __future__ import annotations

import base64
import hashlib
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from ray_gpu.vault_declaration import Declaration, NodeSpec, PersonSpec
from ray_gpu.vault_server import VaultServer
from ray_gpu.vault_setup import AppRole, Credentials, install, issue, setup
from zones.errors import (
    ConfigError,
    GrantRefusedError,
    UnknownNameError,
    VaultDeniedError,
    VaultError,
    VaultSealedError,
    VaultUnreachableError,
)
from zones.keys import NodeIdentity, verify_node_signature
from zones.vault import Vault, lease_expiry, lease_name

POLICIES = Path(__file__).parent.parent / "policies" / "vault"
PEOPLE = [
    PersonSpec(name="dana", zone="clinic", groups=("research", "night-shift")),
    PersonSpec(name="eli", zone="trading", groups=("research",)),
    PersonSpec(name="fay", zone="clinic"),
]
GIL = PersonSpec(name="gil", zone="trading")
GRANT = hashlib.sha256(b"grant").hexdigest()
OTHER_GRANT = hashlib.sha256(b"other grant").hexdigest()
FAR = 4_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """A server after ``setup``, and everybody's login."""

    server: VaultServer
    credentials: Credentials
    root_token: str
    gateway: Vault
    trading: Vault
    gpu_1: Vault
    gpu_2: Vault
    dana: Vault


@pytest.fixture(scope="module")
def state_dir() -> Iterator[Path]:
    """A short private directory that the module's server owns."""
    with TemporaryDirectory(prefix="rgv") as directory:
        yield Path(directory) / "vault"


@pytest.fixture(scope="module")
def installed(state_dir: Path) -> Iterator[Installed]:
    """A real server, set up twice (the second run must change nothing), its root token revoked."""
    server = VaultServer.start(state_dir)
    try:
        root = server.root_client()
        token = root.token
        wanted = _declare(["clinic", "trading"], ["gpu-1", "gpu-2"], PEOPLE)
        setup(root, wanted, policies=POLICIES)
        made = setup(root, wanted, policies=POLICIES)
        assert root.call("GET", "sys/mounts")["data"]["zone-clinic/"]["type"] == "transit"
        root.revoke()
        yield Installed(
            server=server,
            credentials=made,
            root_token=token,
            gateway=_login(server, made.gateways["clinic"]),
            trading=_login(server, made.gateways["trading"]),
            gpu_1=_login(server, made.nodes["gpu-1"]),
            gpu_2=_login(server, made.nodes["gpu-2"]),
            dana=server.client().login_userpass("dana", made.people["dana"]),
        )
    finally:
        server.stop()


def _declare(zones: list[str], gpu_nodes: list[str], people: list[PersonSpec]) -> Declaration:
    nodes = [NodeSpec(name=name, role="gpu", addresses=(f"10.9.0.{name[-1]}",)) for name in gpu_nodes]
    return Declaration(zones=tuple(zones), nodes=tuple(nodes), people=tuple(people))


def _login(server: VaultServer, role: AppRole) -> Vault:
    return server.client().login_approle(role.role_id, role.secret_id)


def _lease(not_after: int = FAR) -> str:
    return lease_name(secrets.token_bytes(8), not_after)


def _open(gateway: Vault, node: str = "gpu-1") -> tuple[str, bytes, str]:
    lease = _lease()
    gateway.create_lease_key("clinic", node, lease)
    return (lease, *gateway.data_key("clinic", node, lease, GRANT))


# -- lease keys ---------------------------------------------------------------------------------


def test_data_key_round_trip(installed: Installed) -> None:
    """The node unwraps the very bytes that the gateway got."""
    lease, key, wrapped = _open(installed.gateway)

    assert installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped) == key
    assert len(key) == 32


def test_data_keys_differ(installed: Installed) -> None:
    """Every data key is fresh, even for one lease and grant."""
    lease, key, _ = _open(installed.gateway)

    assert installed.gateway.data_key("clinic", "gpu-1", lease, GRANT)[0] != key


def test_changed_grant_refused(installed: Installed) -> None:
    """A wrapped key opens for its own grant and for no other."""
    lease, key, wrapped = _open(installed.gateway)

    with pytest.raises(VaultDeniedError):
        installed.gpu_1.unwrap("clinic", "gpu-1", lease, OTHER_GRANT, wrapped)
    assert installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped) == key


def test_other_lease_refused(installed: Installed) -> None:
    """A wrapped key does not open under another lease of the same node."""
    lease, key, wrapped = _open(installed.gateway)
    other, _, _ = _open(installed.gateway)

    with pytest.raises(VaultDeniedError):
        installed.gpu_1.unwrap("clinic", "gpu-1", other, GRANT, wrapped)
    assert installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped) == key


def test_changed_wrapping_refused(installed: Installed) -> None:
    """A wrapped key with a changed byte does not open."""
    lease, key, wrapped = _open(installed.gateway)
    prefix, _, body = wrapped.rpartition(":")
    raw = bytearray(base64.b64decode(body))
    raw[20] ^= 1

    with pytest.raises(VaultDeniedError):
        installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, f"{prefix}:{base64.b64encode(raw).decode()}")
    assert installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped) == key


def test_node_refused_other_nodes_key(installed: Installed) -> None:
    """gpu-2 cannot unwrap what is wrapped for gpu-1; gpu-1 can, and so can gpu-2 its own."""
    lease, key, wrapped = _open(installed.gateway, "gpu-1")
    own_lease, own_key, own_wrapped = _open(installed.gateway, "gpu-2")

    with pytest.raises(VaultDeniedError):
        installed.gpu_2.unwrap("clinic", "gpu-1", lease, GRANT, wrapped)
    assert installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped) == key
    assert installed.gpu_2.unwrap("clinic", "gpu-2", own_lease, GRANT, own_wrapped) == own_key


def test_shredded_key_refuses(installed: Installed) -> None:
    """After shredding nothing unwraps, not even under a new key of the same name; shredding twice is no error."""
    lease, key, wrapped = _open(installed.gateway)
    assert installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped) == key

    installed.gateway.shred("clinic", "gpu-1", lease)
    installed.gateway.shred("clinic", "gpu-1", lease)

    with pytest.raises(VaultDeniedError):
        installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped)
    installed.gateway.create_lease_key("clinic", "gpu-1", lease)
    with pytest.raises(VaultDeniedError):
        installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped)


def test_prune_shreds_only_expired(installed: Installed) -> None:
    """Pruning shreds the keys of expired leases; live ones and names of others' making stay."""
    gateway = installed.trading
    now = 1_000_000
    expired, live = _lease(now - 1), _lease(now)
    for lease in (expired, live, "made-by-hand", "no-time-1"):
        gateway.create_lease_key("trading", "gpu-1", lease)

    assert gateway.prune("trading", now) == [f"gpu-1.{expired}"]
    assert sorted(gateway.lease_keys("trading")) == sorted([f"gpu-1.{live}", "gpu-1.made-by-hand", "gpu-1.no-time-1"])
    assert gateway.prune("trading", now) == []


def test_no_keys_is_an_empty_list(installed: Installed) -> None:
    """A zone without keys lists none; a zone that this gateway is not of is refused."""
    for name in installed.trading.lease_keys("trading"):
        installed.trading.shred("trading", *name.split("."))

    assert installed.trading.lease_keys("trading") == []
    with pytest.raises(VaultDeniedError):
        installed.trading.lease_keys("clinic")


def test_lease_name_round_trip() -> None:
    """A lease name carries its expiry; other names carry none."""
    assert lease_expiry(lease_name(bytes(8), 123)) == 123
    assert lease_expiry("abc-123") is None
    with pytest.raises(ValueError, match="lease name"):
        lease_name(b"", 123)


# -- who may do what ----------------------------------------------------------------------------


def test_gateway_cannot_unwrap_or_weaken(installed: Installed) -> None:
    """A gateway makes keys but never unwraps, exports, backs up, rotates, or makes keys of another kind or zone."""
    lease, _, wrapped = _open(installed.gateway)
    key = f"zone-clinic/keys/gpu-1.{lease}"
    new = f"zone-clinic/keys/gpu-1.{_lease()}"
    fine = {"type": "aes256-gcm96", "derived": True}

    with pytest.raises(VaultDeniedError):
        installed.gateway.unwrap("clinic", "gpu-1", lease, GRANT, wrapped)
    refused: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", f"zone-clinic/export/encryption-key/gpu-1.{lease}", {}),
        ("GET", f"zone-clinic/backup/gpu-1.{lease}", {}),
        ("POST", f"{key}/rotate", {}),
        ("POST", f"{key}/config", {"exportable": True}),
        ("POST", new, {**fine, "exportable": True}),
        ("POST", new, {**fine, "derived": False}),
        ("POST", new, {"type": "aes256-gcm96"}),
        ("POST", f"zone-trading/keys/gpu-1.{lease}", fine),
        ("POST", f"zone-trading/datakey/plaintext/gpu-1.{lease}", {"context": "AAAA"}),
        ("POST", "auth/token/create", {}),
        ("GET", "sys/policies/acl/gateway-clinic", {}),
    ]
    for method, path, body in refused:
        with pytest.raises(VaultDeniedError):
            installed.gateway.call(method, path, **body)
    installed.gateway.call("POST", new, **fine)


def test_gateway_unwraps_checkpoints_alone(installed: Installed) -> None:
    """What a zone's people keep its gateway wraps and unwraps, for the same context alone; no other zone's does."""
    other = "ab" * 32
    key, wrapped = installed.gateway.checkpoint_key("clinic", GRANT)

    assert installed.gateway.unwrap_checkpoint("clinic", GRANT, wrapped) == key
    assert installed.gateway.checkpoint_key("clinic", GRANT)[0] != key
    assert "checkpoints" not in installed.gateway.lease_keys("clinic")
    with pytest.raises(VaultDeniedError):
        installed.gateway.unwrap_checkpoint("clinic", other, wrapped)
    with pytest.raises(VaultDeniedError):
        installed.gateway.checkpoint_key("trading", GRANT)
    with pytest.raises(VaultDeniedError):
        installed.gpu_1.unwrap_checkpoint("clinic", GRANT, wrapped)


def test_custodian_only_unwraps(installed: Installed) -> None:
    """A custodian makes, lists, shreds and wraps nothing, not even under its own name; the gateway does."""
    lease, _, _ = _open(installed.gateway)
    node = installed.gpu_1

    with pytest.raises(VaultDeniedError):
        node.create_lease_key("clinic", "gpu-1", _lease())
    with pytest.raises(VaultDeniedError):
        node.data_key("clinic", "gpu-1", lease, GRANT)
    with pytest.raises(VaultDeniedError):
        node.lease_keys("clinic")
    with pytest.raises(VaultDeniedError):
        node.shred("clinic", "gpu-1", lease)
    with pytest.raises(VaultDeniedError):
        node.whoami(installed.dana.token, "clinic")
    assert f"gpu-1.{lease}" in installed.gateway.lease_keys("clinic")
    installed.gateway.shred("clinic", "gpu-1", lease)


def test_person_only_looked_up(installed: Installed) -> None:
    """A person's token can be looked up and nothing else."""
    lease, _, wrapped = _open(installed.gateway)
    assert installed.dana.call("GET", "auth/token/lookup-self")["data"]["policies"] == ["person-clinic"]

    with pytest.raises(VaultDeniedError):
        installed.dana.create_lease_key("clinic", "gpu-1", _lease())
    with pytest.raises(VaultDeniedError):
        installed.dana.data_key("clinic", "gpu-1", lease, GRANT)
    with pytest.raises(VaultDeniedError):
        installed.dana.unwrap("clinic", "gpu-1", lease, GRANT, wrapped)
    for method, path in [
        ("LIST", "zone-clinic/keys"),
        ("GET", "identity/entity/name/dana"),
        ("POST", "auth/token/create"),
        ("POST", "auth/userpass/users/dana/password"),
        ("POST", "cubbyhole/x"),
        ("GET", "sys/mounts"),
    ]:
        with pytest.raises(VaultDeniedError):
            installed.dana.call(method, path, password="x")


def test_root_token_is_revoked(installed: Installed) -> None:
    """The token that set everything up no longer works; a new one does until it is revoked."""
    with pytest.raises(VaultDeniedError):
        installed.server.client().with_token(installed.root_token).call("GET", "sys/mounts")

    again = installed.server.root_client()
    assert "zone-clinic/" in again.call("GET", "sys/mounts")["data"]
    token = again.token
    again.revoke()
    with pytest.raises(VaultDeniedError):
        installed.server.client().with_token(token).call("GET", "sys/mounts")


# -- people -------------------------------------------------------------------------------------


def test_whoami(installed: Installed) -> None:
    """A person's token becomes the name and groups of Vault's identity store."""
    found = installed.gateway.whoami(installed.dana.token, "clinic")
    fay = installed.server.client().login_userpass("fay", installed.credentials.people["fay"])

    assert found.name == "dana"
    assert found.groups == frozenset({"research", "night-shift"})
    assert installed.gateway.whoami(fay.token, "clinic").groups == frozenset()


def test_whoami_refuses_who_is_no_person_of_the_zone(installed: Installed) -> None:
    """Another zone's person, a node, a gateway, an ended and an invented token are no people of this zone."""
    eli = installed.server.client().login_userpass("eli", installed.credentials.people["eli"])
    ended = installed.server.client().login_userpass("dana", installed.credentials.people["dana"])
    ended_token = ended.token
    ended.revoke()
    assert installed.trading.whoami(eli.token, "trading").name == "eli"

    for token in (eli.token, installed.gpu_1.token, installed.gateway.token, ended_token, "s.invented", ""):
        with pytest.raises(VaultDeniedError):
            installed.gateway.whoami(token, "clinic")


# -- nodes --------------------------------------------------------------------------------------


def test_node_certificate(installed: Installed) -> None:
    """A node's signature verifies under the CA that the gateway reads from Vault, for that node alone."""
    identity = NodeIdentity.enrol("gpu-1", installed.gpu_1)
    ca, now = installed.gateway.node_ca(), int(time.time())
    signature = identity.sign(b"offer")

    verify_node_signature(identity.certificate_pem, ca, "gpu-1", b"offer", signature, now)
    with pytest.raises(GrantRefusedError):
        verify_node_signature(identity.certificate_pem, ca, "gpu-2", b"offer", signature, now)


def _request(name: str, *alternatives: str) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = x509.SubjectAlternativeName([x509.DNSName(other) for other in (name, *alternatives)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    return builder.sign(Ed25519PrivateKey.generate(), None).public_bytes(Encoding.PEM).decode("ascii")


def _names(certificate_pem: str) -> set[str]:
    certificate = x509.load_pem_x509_certificate(certificate_pem.encode("ascii"))
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    subject = {str(name.value) for name in certificate.subject}
    return subject | {str(name.value) for name in alternatives}


@pytest.mark.parametrize("name", ["gpu-1", "gpu-2.gpu-1", "localhost", "x.gpu-2"])
def test_node_cannot_be_another(installed: Installed, name: str) -> None:
    """gpu-2's login gets no certificate that names gpu-1 or anything else than gpu-2."""
    csr = _request(name)

    for beside in (name, "gpu-2"):
        with pytest.raises(VaultDeniedError):
            installed.gpu_2.call("POST", "pki-nodes/sign/node", common_name=beside, csr=csr)
    assert _names(installed.gpu_2.sign_node_certificate("gpu-2", _request("gpu-2"))[0]) == {"gpu-2"}


def test_names_beside_the_request_do_not_slip_in(installed: Installed) -> None:
    """What gpu-2 writes beside its own request, or into its alternative names, reaches no certificate."""
    csr, wide = _request("gpu-2"), _request("gpu-2", "gpu-1")

    beside = installed.gpu_2.call("POST", "pki-nodes/sign/node", common_name="gpu-1", csr=csr)["data"]
    assert _names(beside["certificate"]) == {"gpu-2"}
    within = installed.gpu_2.call("POST", "pki-nodes/sign/node", common_name="gpu-2", csr=wide)["data"]
    assert _names(within["certificate"]) == {"gpu-2"}
    with pytest.raises(VaultDeniedError):
        installed.gpu_2.call("POST", "pki-nodes/sign/node", common_name="gpu-2", alt_names="gpu-1", csr=csr)
    for path in ("pki-nodes/issue/node", "pki-nodes/sign-verbatim", "pki-nodes/root/sign-intermediate"):
        with pytest.raises(VaultDeniedError):
            installed.gpu_2.call("POST", path, common_name="gpu-2")


def test_gateway_and_person_get_no_certificate(installed: Installed) -> None:
    """Only custodians can have a certificate signed."""
    for login in (installed.gateway, installed.dana):
        with pytest.raises(VaultDeniedError):
            NodeIdentity.enrol("clinic", login)


# -- set-up -------------------------------------------------------------------------------------


def test_install_changes_no_credentials(installed: Installed) -> None:
    """Installing everything again, with one more node, leaves every login as it was."""
    root = installed.server.root_client()
    install(root, _declare(["clinic", "trading"], ["gpu-1", "gpu-2", "gpu-3"], PEOPLE), policies=POLICIES)
    joined = issue(root, nodes=["gpu-3"])
    root.revoke()

    made = installed.credentials
    for role in (*made.gateways.values(), *made.nodes.values(), *joined.nodes.values()):
        _login(installed.server, role)
    for name, password in made.people.items():
        installed.server.client().login_userpass(name, password)
    assert (list(joined.gateways), list(joined.nodes), list(joined.people)) == ([], ["gpu-3"], [])


def test_issue_ends_older_credentials(installed: Installed) -> None:
    """New credentials end the same name's older ones and nobody else's; an unknown name gets none."""
    root = installed.server.root_client()
    install(root, _declare(["clinic", "trading"], ["gpu-9"], [*PEOPLE, GIL]), policies=POLICIES)
    first = issue(root, nodes=["gpu-9"], people=["gil"])
    _login(installed.server, first.nodes["gpu-9"])
    installed.server.client().login_userpass("gil", first.people["gil"])
    second = issue(root, nodes=["gpu-9"], people=["gil"])
    with pytest.raises(UnknownNameError, match="gpu-9"):
        issue(root, nodes=["gpu-10"])
    root.revoke()

    with pytest.raises(VaultDeniedError):
        _login(installed.server, first.nodes["gpu-9"])
    with pytest.raises(VaultDeniedError):
        installed.server.client().login_userpass("gil", first.people["gil"])
    _login(installed.server, second.nodes["gpu-9"])
    installed.server.client().login_userpass("gil", second.people["gil"])
    _login(installed.server, installed.credentials.nodes["gpu-1"])


@pytest.mark.parametrize(
    ("zones", "nodes", "people"),
    [(["a"], ["a"], []), (["a"], ["b", "b"], []), (["a"], ["b"], [PersonSpec(name="b", zone="a")])],
    ids=["zone and node", "two nodes", "node and person"],
)
def test_setup_refuses_shared_names(zones: list[str], nodes: list[str], people: list[PersonSpec]) -> None:
    """Two identities of one name would share policies, so set-up refuses before it asks Vault anything."""
    with pytest.raises(ConfigError, match="rename"):
        _declare(zones, nodes, people)


def test_setup_names_missing_policy(installed: Installed, tmp_path: Path) -> None:
    """A missing policy file stops set-up and is named."""
    root = installed.server.root_client()
    with pytest.raises(ConfigError, match=r"gateway\.hcl"):
        setup(root, _declare(["clinic"], [], []), policies=tmp_path)
    root.revoke()


def test_credentials_are_redacted(installed: Installed) -> None:
    """No secret id, password or token shows in a repr."""
    shown = repr(installed.credentials) + repr(installed.gateway)

    for role in (*installed.credentials.gateways.values(), *installed.credentials.nodes.values()):
        assert role.secret_id not in shown
    assert installed.credentials.people["dana"] not in shown
    assert installed.gateway.token not in shown


# -- failures -----------------------------------------------------------------------------------


def test_wrong_credentials(installed: Installed) -> None:
    """Wrong AppRole, password and token are one error, without the secret in it; the right ones work."""
    role = installed.credentials.gateways["clinic"]
    client = installed.server.client
    _login(installed.server, role)

    for attempt in (
        lambda: client().login_approle(role.role_id, "wrong-secret"),
        lambda: client().login_userpass("dana", "wrong-secret"),
        lambda: client().login_userpass("nobody", "wrong-secret"),
        lambda: client().with_token("wrong-secret").lease_keys("clinic"),
    ):
        with pytest.raises(VaultDeniedError, match="check") as caught:
            attempt()
        assert "wrong-secret" not in str(caught.value)
        assert caught.value.__suppress_context__


def test_unreachable(installed: Installed, tmp_path: Path) -> None:
    """A closed port, a server that the CA file does not vouch for and a missing CA file are one error."""
    address, ca = installed.server.address, str(installed.server.ca_file)
    assert Vault(address, ca_file=ca).call("GET", "sys/health")["sealed"] is False

    for wrong in (
        Vault("https://127.0.0.1:1", ca_file=ca),
        Vault(address),
        Vault(address, ca_file=str(tmp_path / "missing.pem")),
    ):
        with pytest.raises(VaultUnreachableError, match="check that it runs"):
            wrong.login_userpass("dana", "x")


def test_plain_http_refused() -> None:
    """No login goes to an address without TLS."""
    with pytest.raises(ConfigError, match="https://"):
        Vault("http://127.0.0.1:1")


def test_sealed(installed: Installed) -> None:
    """A sealed server says so to everybody; once unsealed, the same logins go on."""
    lease, key, wrapped = _open(installed.gateway)
    installed.server.seal()
    try:
        for ask in (
            lambda: installed.gateway.create_lease_key("clinic", "gpu-1", _lease()),
            lambda: installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped),
            lambda: installed.gateway.whoami(installed.dana.token, "clinic"),
            lambda: installed.server.client().login_userpass("dana", "x"),
        ):
            with pytest.raises(VaultSealedError, match="unseal it"):
                ask()
    finally:
        installed.server.unseal()
    assert installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped) == key


def test_logs_in_again(installed: Installed) -> None:
    """When a gateway's token ends it logs in again, once, for all its threads; a person's client does not."""
    gateway = _login(installed.server, installed.credentials.gateways["clinic"])
    old = gateway.token
    installed.server.client().with_token(old).revoke()
    threads = [threading.Thread(target=gateway.lease_keys, args=("clinic",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert gateway.lease_keys("clinic") is not None
    new = gateway.token
    assert new != old
    with pytest.raises(VaultDeniedError):
        gateway.lease_keys("trading")
    assert gateway.token == new, "a refusal by policy must not cost a login"

    person = installed.server.client().login_userpass("dana", installed.credentials.people["dana"])
    installed.server.client().with_token(person.token).revoke()
    with pytest.raises(VaultDeniedError):
        person.call("GET", "auth/token/lookup-self")


# -- the embedded server ------------------------------------------------------------------------


def test_environment_is_ignored(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, addresses and proxies in the environment change nothing."""
    monkeypatch.setenv("VAULT_TOKEN", installed.gateway.token)
    monkeypatch.setenv("VAULT_ADDR", "https://127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("VAULT_SKIP_VERIFY", "true")

    with pytest.raises(VaultDeniedError):
        installed.server.client().lease_keys("clinic")
    with pytest.raises(VaultUnreachableError):
        Vault(installed.server.address).lease_keys("clinic")
    role = installed.credentials.gateways["clinic"]
    assert _login(installed.server, role).lease_keys("clinic") is not None


def test_files_are_private(installed: Installed) -> None:
    """The state directory and every file in it are the owner's alone."""
    state_dir = installed.server.state_dir

    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o700
    loose = [path.name for path in state_dir.iterdir() if path.stat().st_mode & 0o077]
    assert loose == []


def test_nothing_secret_is_logged(installed: Installed) -> None:
    """Neither log holds a key, a token or a password; the audit log does name the request."""
    lease, key, wrapped = _open(installed.gateway)
    installed.gpu_1.unwrap("clinic", "gpu-1", lease, GRANT, wrapped)
    state_dir = installed.server.state_dir
    logs = (state_dir / "audit.log").read_text() + (state_dir / "server.log").read_text()

    assert f"zone-clinic/decrypt/gpu-1.{lease}" in logs
    for secret in (
        base64.b64encode(key).decode(),
        installed.gateway.token,
        installed.root_token,
        installed.credentials.gateways["clinic"].secret_id,
        installed.credentials.people["dana"],
        (state_dir / "unseal.key").read_text(),
        hashlib.sha256(b"grant").hexdigest(),
    ):
        assert secret not in logs


def test_second_start_is_refused(installed: Installed) -> None:
    """A directory has one server at a time, and it can be found from anywhere."""
    found = VaultServer.find(installed.server.state_dir)

    assert found is not None
    assert (found.pid, found.address) == (installed.server.pid, installed.server.address)
    with pytest.raises(VaultError, match="already runs"):
        VaultServer.start(installed.server.state_dir)


def test_stop_and_start_again(tmp_path: Path) -> None:
    """Stopped through its directory by another than its starter, the server is gone; started again, it has its data."""
    with TemporaryDirectory(prefix="rgv") as directory:
        started = VaultServer.start(Path(directory))
        try:
            root = started.root_client()
            root.call("POST", "sys/mounts/zone-clinic", type="transit")
            root.create_lease_key("clinic", "gpu-1", "kept")
            root.revoke()
            found = VaultServer.find(Path(directory))
            assert found is not None
            found.stop()
            assert VaultServer.find(Path(directory)) is None
            started.stop()

            again = VaultServer.start(Path(directory))
            try:
                root = again.root_client()
                assert root.lease_keys("clinic") == ["gpu-1.kept"]
                root.revoke()
            finally:
                again.stop()
        finally:
            started.stop()


def test_lost_key_is_said(tmp_path: Path) -> None:
    """A server whose unseal key is gone does not start, says what to do, and leaves no process behind."""
    with TemporaryDirectory(prefix="rgv") as directory:
        VaultServer.start(Path(directory)).stop()
        (Path(directory) / "unseal.key").unlink()

        with pytest.raises(VaultError, match=r"unseal\.key is missing"):
            VaultServer.start(Path(directory))
        assert VaultServer.find(Path(directory)) is None
