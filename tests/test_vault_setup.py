"""`ray-gpu vault`: what it installs, what it leaves alone, who may then do what, against the real OpenBao binary."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ray_gpu.cli.main import cli
from ray_gpu.node_identity import RAY_KV, RAY_PKI, RAY_TOKEN, fetch
from ray_gpu.vault_declaration import read
from ray_gpu.vault_server import VaultServer
from zones.errors import ConfigError, VaultDeniedError
from zones.keys import tls_request
from zones.vault import Vault, lease_name

GRANT = "00" * 32
LEASE = lease_name(bytes(8), 4_000_000_000)
DECLARATION = """\
zones: [clinic, trading]
nodes:
  - {name: head, role: head, addresses: [10.9.0.1]}
  - {name: gpu-1, role: gpu, addresses: [10.9.0.2, "fd00::2"]}
  - {name: gpu-2, role: gpu, addresses: [10.9.0.3]}
  - {name: zone-clinic, role: zone, addresses: [10.9.0.4]}
people:
  - {name: dana, zone: clinic, groups: [research]}
  - {name: eli, zone: trading, groups: [research, night-shift]}
"""
#: What each certificate names: the head's has its loopback as well.
ADDRESSES = {
    "head": ["10.9.0.1", "127.0.0.1"],
    "gpu-1": ["10.9.0.2", "fd00::2"],
    "gpu-2": ["10.9.0.3"],
    "zone-clinic": ["10.9.0.4"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Who administers a real Vault: a directory with a token, a declaration, and the commands."""

    server: VaultServer
    root: Vault
    directory: Path

    def run(self, *words: str | Path) -> Result:
        """Run ``ray-gpu vault ...`` with this Vault's address, CA and token file."""
        known = [
            "--address",
            self.server.address,
            "--ca",
            self.server.ca_file,
            "--token-file",
            self.directory / "token",
        ]
        return CliRunner().invoke(cli, ["vault", *map(str, [*words, *known])])

    def setup(self, *options: str, declaration: str = DECLARATION) -> Result:
        """Run ``ray-gpu vault setup`` with a declaration."""
        path = self.directory / "vault.yaml"
        path.write_text(declaration)
        return self.run("setup", path, *options)

    def issue(self, name: str) -> dict[str, str]:
        """Return new credentials, read from the file that the command wrote."""
        out = self.directory / f"{name}.json"
        done = self.run("issue", name, "--out", out)
        assert done.exit_code == 0, done.output
        found: dict[str, str] = json.loads(out.read_text())
        return found

    def login(self, name: str) -> Vault:
        """Return a login with new credentials of a gateway, node or person."""
        found = self.issue(name)
        if "user" in found:
            return self.server.client().login_userpass(found["user"], found["password"])
        return self.server.client().login_approle(found["role_id"], found["secret_id"])

    @property
    def audit_log(self) -> Path:
        """Where the server writes its audit log."""
        return self.server.state_dir / "audit.log"


@pytest.fixture(scope="module")
def new_operator() -> Iterator[Callable[[], Operator]]:
    """Return what starts a Vault that knows nothing of this project yet."""
    directories: list[TemporaryDirectory[str]] = []
    servers: list[VaultServer] = []

    def start() -> Operator:
        directory = TemporaryDirectory(prefix="rgv")
        directories.append(directory)
        server = VaultServer.start(Path(directory.name) / "vault")
        servers.append(server)
        root = server.root_client()
        token = Path(directory.name) / "token"
        token.write_text(root.token + "\n")
        token.chmod(0o600)
        return Operator(server=server, root=root, directory=Path(directory.name))

    yield start
    for server in servers:
        server.stop()
    for directory in directories:
        directory.cleanup()


@pytest.fixture(scope="module")
def operator(new_operator: Callable[[], Operator]) -> Operator:
    """A Vault after set-up. Tests that change it put it right again."""
    made = new_operator()
    done = made.setup()
    assert done.exit_code == 0, done.output
    return made


@pytest.fixture(scope="module")
def logins(operator: Operator) -> dict[str, Vault]:
    """A login of everybody."""
    return {name: operator.login(name) for name in ("clinic", "trading", *ADDRESSES, "dana", "eli")}


#: Lists, and what is below each of their keys. ``{}`` stands for the key.
_LISTS = {
    "sys/policies/acl": ["sys/policies/acl/{}"],
    "auth/approle/role": [
        "auth/approle/role/{}",
        "auth/approle/role/{}/role-id",
        "LIST auth/approle/role/{}/secret-id",
    ],
    "auth/userpass/users": ["auth/userpass/users/{}"],
    "auth/oidc/role": ["auth/oidc/role/{}"],
    "identity/entity/name": ["identity/entity/name/{}"],
    "identity/group/name": ["identity/group/name/{}"],
    "pki-nodes/roles": ["pki-nodes/roles/{}"],
    "pki-ray/roles": ["pki-ray/roles/{}"],
    "pki-nodes/issuers": ["pki-nodes/issuer/{}"],
    "pki-ray/issuers": ["pki-ray/issuer/{}"],
    "kv-ray/metadata": ["kv-ray/metadata/{}", "kv-ray/data/{}"],
}


def everything(vault: Vault) -> dict[str, Any]:
    """Return all that can be read of what set-up writes, by path."""
    paths = ["sys/mounts", "sys/auth", "sys/audit", "auth/oidc/config", "kv-ray/config"]
    for path, below in _LISTS.items():
        keys = (vault.find(path, method="LIST") or {"data": {"keys": []}})["data"]["keys"]
        paths += [item.format(key) for key in keys for item in below]
    found: dict[str, Any] = {}
    for path in paths:
        method, _, name = path.rpartition(" ")
        found[path] = (vault.find(name, method=method or "GET") or {}).get("data")
        if "group_ids" in (found[path] or {}):  # sets, told in any order
            found[path] |= {kind: sorted(found[path][kind]) for kind in ("group_ids", "direct_group_ids")}
    return found


#: Vault takes no AppRole without secret ids, unless addresses bind it.
_LOOPBACK = {"secret_id_bound_cidrs": "127.0.0.0/8", "token_bound_cidrs": "127.0.0.0/8"}

# -- plan, install, install again ---------------------------------------------------------------


def test_dry_run_then_run_then_nothing(new_operator: Callable[[], Operator]) -> None:
    """A dry run says what would be made and makes none of it; the run makes it; a second run changes nothing at all."""
    operator = new_operator()
    before = everything(operator.root)

    planned = operator.setup("--dry-run")
    assert planned.exit_code == 0, planned.output
    assert everything(operator.root) == before

    done = operator.setup()
    assert done.exit_code == 0, done.output
    after = everything(operator.root)
    assert len(after) > len(before) + 30

    again = operator.setup()
    assert again.exit_code == 0, again.output
    assert again.output == "nothing changes: Vault holds what is declared\n"
    assert operator.setup("--dry-run").output == again.output
    assert everything(operator.root) == after
    steps = [line.removeprefix("would ") for line in planned.output.splitlines() if line.startswith("would ")]
    assert steps == [line for line in done.output.splitlines() if line.startswith(("make ", "change "))]
    assert "make policy ray-node-gpu-1" in steps
    assert after["kv-ray/data/token"]["data"]["token"] not in planned.output + done.output + again.output


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("sys/policies/acl/gateway-clinic", {"policy": 'path "*" { capabilities = ["read"] }'}, "policy"),
        ("auth/approle/role/node-head", {"token_policies": ["root"]}, "AppRole node-head (token_policies)"),
        ("auth/approle/role/node-head", {"bind_secret_id": False, **_LOOPBACK}, "AppRole node-head (bind_secret_id)"),
        ("auth/userpass/users/dana", {"token_policies": ["person-trading"]}, "person dana (token_policies)"),
        (f"{RAY_PKI}/roles/gpu-2", {"allow_any_name": True}, "certificate role pki-ray/gpu-2"),
        ("pki-nodes/roles/node", {"allow_any_name": True}, "certificate role pki-nodes/node"),
        ("sys/mounts/pki-ray/tune", {"max_lease_ttl": "1h"}, "mount pki-ray (max_lease_ttl)"),
        ("identity/group/name/research", {"member_entity_ids": []}, "group research"),
    ],
    ids=["policy", "AppRole", "no secret id", "person", "node's role", "nodes' role", "mount", "group"],
)
def test_what_differs_is_mended(operator: Operator, path: str, body: dict[str, Any], said: str) -> None:
    """What somebody changed by hand is named by the next run and put right, and then nothing differs."""
    operator.root.call("POST", path, **body)

    planned = operator.setup("--dry-run")
    assert f"would change {said}" in planned.output
    assert operator.setup().exit_code == 0
    assert "nothing changes" in operator.setup().output


def test_what_is_gone_is_made(operator: Operator) -> None:
    """A deleted role, entity, token and user come back; a role that comes back has the identity that it had."""
    for path in ("auth/approle/role/custodian-gpu-2", "identity/entity/name/eli", "kv-ray/metadata/token"):
        operator.root.call("DELETE", path)

    done = operator.setup()

    assert done.exit_code == 0, done.output
    for step in ("make AppRole custodian-gpu-2", "change identity gpu-2", "make identity eli", "make the Ray token"):
        assert step in done.output
    assert "nothing changes" in operator.setup().output
    assert fetch(operator.login("gpu-2"), node="gpu-2", addresses=ADDRESSES["gpu-2"]).token


def test_something_else_is_mounted(new_operator: Callable[[], Operator]) -> None:
    """A mount of another kind in the way stops set-up before it changes anything."""
    operator = new_operator()
    operator.root.call("POST", "sys/mounts/kv-ray", type="kv", options={"version": "1"})
    before = everything(operator.root)

    done = operator.setup()

    assert done.exit_code == 1
    assert "something else at kv-ray/" in done.output
    assert "move it away" in done.output
    assert everything(operator.root) == before


def test_rotated_token(operator: Operator) -> None:
    """A new token is made only when asked for, is not printed, and leaves the older one unreadable."""
    head = operator.login("head")
    older = fetch(head, node="head", addresses=ADDRESSES["head"]).token
    version = operator.root.call("GET", "kv-ray/metadata/token")["data"]["current_version"]

    planned = operator.setup("--rotate-token", "--dry-run")
    assert "would change the Ray token" in planned.output
    assert fetch(head, node="head", addresses=ADDRESSES["head"]).token == older
    done = operator.setup("--rotate-token")

    newer = fetch(head, node="head", addresses=ADDRESSES["head"]).token
    assert newer != older
    assert newer not in done.output
    assert operator.root.find(f"{RAY_KV}/data/{RAY_TOKEN}?version={version}") is None


def test_address_of_a_node_that_left(operator: Operator) -> None:
    """An address that a node left behind is nobody else's until that node's role is deleted."""
    renamed = DECLARATION.replace("name: gpu-2", "name: gpu-3")

    refused = operator.setup(declaration=renamed)
    assert refused.exit_code == 1
    assert "10.9.0.3 is still certified for node gpu-2" in refused.output
    operator.root.call("DELETE", f"{RAY_PKI}/roles/gpu-2")
    assert operator.setup(declaration=renamed).exit_code == 0

    for path in (f"{RAY_PKI}/roles/gpu-3", "auth/approle/role/custodian-gpu-3"):
        operator.root.call("DELETE", path)
    assert operator.setup().exit_code == 0


def test_node_that_changes_its_role(operator: Operator) -> None:
    """A GPU node that becomes a zone's node can unwrap no more, with the credentials that it had."""
    custodian = operator.issue("gpu-2")
    moved = DECLARATION.replace("name: gpu-2, role: gpu", "name: gpu-2, role: zone")

    done = operator.setup(declaration=moved)

    assert "remove AppRole custodian-gpu-2" in done.output
    with pytest.raises(VaultDeniedError):
        operator.server.client().login_approle(custodian["role_id"], custodian["secret_id"])
    assert operator.login("gpu-2").call("GET", "auth/token/lookup-self")["data"]["policies"] == ["ray-node-gpu-2"]
    assert operator.setup().exit_code == 0


# -- who may do what ----------------------------------------------------------------------------


def _unwraps(logins: dict[str, Vault], node: str) -> bool:
    gateway = logins["clinic"]
    gateway.create_lease_key("clinic", node, LEASE)
    key, wrapped = gateway.data_key("clinic", node, LEASE, GRANT)
    try:
        return logins[node].unwrap("clinic", node, LEASE, GRANT, wrapped) == key
    except VaultDeniedError:
        return False


def test_only_gpu_nodes_unwrap(logins: dict[str, Vault]) -> None:
    """A key wrapped for a node opens on a GPU node; a head or a zone's node opens none, not even under its own name."""
    assert [node for node in ADDRESSES if _unwraps(logins, node)] == ["gpu-1", "gpu-2"]


def test_only_nodes_read_the_token(logins: dict[str, Vault]) -> None:
    """Every node reads the Ray token; no gateway or person does, and no node writes it or reads what it was."""
    path = f"{RAY_KV}/data/{RAY_TOKEN}"
    tokens = {logins[node].call("GET", path)["data"]["data"]["token"] for node in ADDRESSES}
    assert len(tokens) == 1

    for name in ("clinic", "trading", "dana", "eli"):
        with pytest.raises(VaultDeniedError):
            logins[name].call("GET", path)
    for method, other in [("POST", path), ("DELETE", path), ("GET", f"{RAY_KV}/metadata/token"), ("LIST", RAY_KV)]:
        with pytest.raises(VaultDeniedError):
            logins["head"].call(method, other, data={"token": "mine"})


@pytest.mark.parametrize("who", ["gpu-2", "zone-clinic", "head", "clinic", "dana"])
def test_nobody_is_certified_as_another(logins: dict[str, Vault], who: str) -> None:
    """Neither gpu-1's name nor one of its addresses is certified for anybody but gpu-1."""
    for node in ("gpu-1", who):
        with pytest.raises(VaultDeniedError):
            fetch(logins[who], node=node, addresses=ADDRESSES["gpu-1"])
    assert fetch(logins["gpu-1"], node="gpu-1", addresses=ADDRESSES["gpu-1"]).certificate_pem


#: What gpu-2 might send besides to be taken for gpu-1, and whether Vault then refuses.
BESIDES: list[dict[str, Any]] = [
    {"ip_sans": "10.9.0.2"},
    {"ip_sans": ["10.9.0.3", "10.9.0.2"]},
    {"ip_sans": "10.9.0.3,10.9.0.2"},
    {"ip_sans": ""},
    {"alt_names": "gpu-1"},
    {"alt_names": "10.9.0.2"},
    {"uri_sans": "spiffe://gpu-1"},
    {"other_sans": "1.3.6.1.4.1.311.20.2.3;utf8:gpu-1"},
    {"common_name": "gpu-1"},
    {"IP_SANS": "10.9.0.2"},
    {"ttl": "87600h"},
    {"not_after": "2099-01-01T00:00:00Z"},
]


@pytest.mark.parametrize("besides", BESIDES, ids=str)
def test_nothing_slips_in_besides(logins: dict[str, Vault], besides: dict[str, Any]) -> None:
    """A request with anything but the node's own name and addresses is refused; without it, it is not."""
    path, plain = f"{RAY_PKI}/sign/gpu-2", {"common_name": "gpu-2", "ip_sans": "10.9.0.3"}
    csr = tls_request("gpu-2").csr_pem

    with pytest.raises(VaultDeniedError):
        logins["gpu-2"].call("POST", path, csr=csr, **{**plain, **besides})
    assert logins["gpu-2"].call("POST", path, csr=csr, **plain)["data"]["certificate"]


def _take_address(logins: dict[str, Vault]) -> bool:
    """Whether gpu-2 gets a certificate for gpu-1's address."""
    try:
        fetch(logins["gpu-2"], node="gpu-2", addresses=["10.9.0.2"])
    except VaultDeniedError:
        return False
    return True


def test_either_lock_holds_alone(operator: Operator, logins: dict[str, Vault]) -> None:
    """With the policy wide open the role refuses another's address, and the other way round; with both open neither."""
    policy, role = "sys/policies/acl/ray-node-gpu-2", f"{RAY_PKI}/roles/gpu-2"
    own_policy, own_role = (operator.root.call("GET", path)["data"] for path in (policy, role))
    open_policy = {"policy": f'path "{RAY_PKI}/sign/*" {{ capabilities = ["update"] }}\n'
                             f'path "{RAY_KV}/data/*" {{ capabilities = ["read"] }}'}  # fmt: skip
    open_role = {**own_role, "allowed_ip_sans_cidr": []}
    results = []
    for policy_body, role_body in [
        (own_policy, own_role),
        (open_policy, own_role),
        (own_policy, open_role),
        (open_policy, open_role),
    ]:
        operator.root.call("POST", policy, policy=policy_body["policy"])
        operator.root.call("POST", role, **role_body)
        results.append(_take_address(logins))

    assert operator.setup().exit_code == 0
    assert results == [False, False, False, True]
    assert not _take_address(logins)


# -- credentials --------------------------------------------------------------------------------


def test_issue(operator: Operator) -> None:
    """Each login is a private file; older ones of the same name end; another's do not."""
    other, first = operator.issue("gpu-1"), operator.issue("zone-clinic")
    second = operator.issue("zone-clinic")
    file = operator.directory / "zone-clinic.json"

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(VaultDeniedError):
        operator.server.client().login_approle(first["role_id"], first["secret_id"])
    for found in (second, other):
        operator.server.client().login_approle(found["role_id"], found["secret_id"])


def test_issue_to_nobody(operator: Operator) -> None:
    """An unknown name is refused with the nearest known one, and no file is left; a bad place for it ends nothing."""
    found = operator.issue("head")
    unknown = operator.run("issue", "haed", "--out", operator.directory / "x.json")
    nowhere = operator.run("issue", "head", "--out", operator.directory / "none" / "x.json")

    assert (unknown.exit_code, nowhere.exit_code) == (1, 1)
    assert "did you mean 'head'?" in unknown.output
    assert "directory that you may write" in nowhere.output
    assert list(operator.directory.glob("*x.json*")) == []
    operator.server.client().login_approle(found["role_id"], found["secret_id"])


# -- audit --------------------------------------------------------------------------------------


def test_audit_device(operator: Operator) -> None:
    """A declared audit file passes where the server writes it; elsewhere set-up stops, and says what to write where."""
    on = operator.setup(declaration=f"{DECLARATION}audit_file: {operator.audit_log}\n")
    off = operator.setup(declaration=f"{DECLARATION}audit_file: /var/log/other.log\n")

    assert "nothing changes" in on.output
    assert off.exit_code == 1
    assert 'audit "file" "ray-gpu" {' in off.output
    assert 'file_path = "/var/log/other.log"' in off.output


def test_openbao_takes_no_audit_device_by_request(operator: Operator) -> None:
    """Why set-up does not turn the device on itself: a token that may do all may not do this."""
    with pytest.raises(VaultDeniedError):
        operator.root.call("POST", "sys/audit/ray-gpu", type="file", options={"file_path": "/dev/null"})
    assert operator.root.call("GET", "sys/audit")["data"]


def test_no_secret_in_the_audit_log(operator: Operator) -> None:
    """Requests stand in the audit log by path; the Ray token, logins and what is signed do not stand there in clear."""
    operator.setup("--rotate-token")
    credentials, person = operator.issue("gpu-1"), operator.issue("dana")
    node = operator.server.client().login_approle(credentials["role_id"], credentials["secret_id"])
    operator.server.client().login_userpass("dana", person["password"])
    identity = fetch(node, node="gpu-1", addresses=ADDRESSES["gpu-1"])
    log = operator.audit_log.read_text()

    for path in (f"{RAY_PKI}/sign/gpu-1", f"{RAY_KV}/data/{RAY_TOKEN}", "auth/userpass/login/dana"):
        assert f'"path":"{path}"' in log
    secrets = [identity.token, credentials["secret_id"], person["password"], operator.root.token, node.token]
    for secret in (*secrets, *identity.key_pem.splitlines()[1:3], identity.certificate_pem.splitlines()[3]):
        assert secret not in log


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("role: head", "role: boss", 3, "'head', 'gpu' or 'zone'"),
        ("name: gpu-2", "name: gpu-1", 5, "one name space in Vault; rename one 'gpu-1'"),
        ("name: dana", "name: clinic", 8, "one name space in Vault; rename one 'clinic'"),
        ("10.9.0.3", "10.9.0.2", 5, "10.9.0.2 is gpu-1's already"),
        ("10.9.0.3", "10.9.0", 5, "does not appear to be an IPv4 or IPv6 address"),
        ("[10.9.0.3]", "[]", 5, "at least 1"),
        ("zone: clinic,", "zone: clinci,", 8, "no zone 'clinci' (did you mean 'clinic'?)"),
        ("groups:", "group:", 8, "unknown key 'group' (did you mean 'groups'?)"),
        ("name: gpu-1", "name: GPU_1", 4, "must be 1 to 40 characters"),
        ("zones: [clinic, trading]", "zones: []", 1, "at least 1"),
        ("zones: [clinic, trading]", "zones: [clinic, clinic]", 1, "clinic stands here twice"),
        ("people:", "people: ]", 7, "correct the file"),
        ("people:", "oidc: {discovery_url: 'http://x', client_id: y, client_secret_file: z}\npeople:", 7, "https://"),
        ("people:", "audit_file: log\npeople:", 7, "audit_file"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_declaration(tmp_path: Path, old: str, new: str, line: int, said: str) -> None:
    """What is wrong is said with file and line, before any server is asked."""
    path = tmp_path / "vault.yaml"
    assert old in DECLARATION
    path.write_text(DECLARATION.replace(old, new, 1))

    with pytest.raises(ConfigError) as caught:
        read(path)
    assert caught.value.message.startswith(f"{path}:{line}: ")
    assert said in caught.value.message


def test_declaration_as_written(tmp_path: Path) -> None:
    """The control of the above: as it stands, the declaration is read."""
    path = tmp_path / "vault.yaml"
    path.write_text(DECLARATION)

    assert [node.name for node in read(path).nodes] == list(ADDRESSES)
    assert read(path).nodes[1].addresses == ("10.9.0.2", "fd00::2")


def test_declaration_of_the_documents(tmp_path: Path) -> None:
    """The declaration that docs/vault.md shows is read as it stands."""
    text = (Path(__file__).parents[1] / "docs" / "vault.md").read_text(encoding="utf-8")
    (tmp_path / "oidc-secret").write_text("x")
    (tmp_path / "oidc-secret").chmod(0o600)
    (tmp_path / "vault.yaml").write_text(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])

    found = read(tmp_path / "vault.yaml")
    assert found.oidc is not None
    assert (found.oidc.client_secret, found.people[0].oidc_subject) == ("x", "8f14e45f")


@pytest.mark.parametrize(
    ("mode", "text", "said"),
    [
        (0o644, None, "chmod 600"),
        (0o620, None, "chmod 600"),
        (0o600, "", "holds no secret"),
        (0o600, "wrong", "refused"),
    ],
)
def test_bad_token_file(operator: Operator, mode: int, text: str | None, said: str) -> None:
    """A token file that others can read, or without a token that works, is refused, and the token is not printed."""
    token = operator.directory / "token"
    good = token.read_text()
    try:
        token.write_text(good if text is None else text)
        token.chmod(mode)
        done = operator.setup()
    finally:
        token.chmod(0o600)
        token.write_text(good)

    assert done.exit_code == 1
    assert said in done.output
    assert operator.root.token not in done.output
    assert operator.setup().exit_code == 0
