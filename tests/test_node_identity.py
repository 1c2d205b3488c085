"""What a Ray node gets from Vault, how it lies on disk, and whom real Ray lets in with it."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ray_gpu.doctor.software import AGENT_MODULES, modules_found
from ray_gpu.node_identity import RAY_PKI, RayIdentity, certified_addresses, fetch, joined_addresses, write
from ray_gpu.nodes import free_base_port
from ray_gpu.sandbox import boundary
from ray_gpu.vault_declaration import Declaration, NodeSpec
from ray_gpu.vault_server import VaultServer
from ray_gpu.vault_setup import setup
from zones.errors import ConfigError, VaultDeniedError
from zones.keys import tls_request
from zones.vault import Vault

ROOT = Path(__file__).parent.parent
#: By node. The last is nobody's.
ADDRESSES = {"head": "127.0.77.1", "gpu-1": "127.0.77.2", "gpu-2": "127.0.77.3"}
NOBODYS = "127.0.77.9"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another uid, which needs root")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """A real Vault's logins and identities, by node."""

    logins: dict[str, Vault]
    identities: dict[str, RayIdentity]
    #: gpu-2's, but certified by another root.
    stranger: RayIdentity
    #: gpu-2's, with a certificate that has ended by the time that Ray starts.
    ended: RayIdentity


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Three nodes of a Vault that was set up as an operator does it."""
    roles = {"head": "head", "gpu-1": "gpu", "gpu-2": "gpu"}
    specs = [NodeSpec(name=n, role=roles[n], addresses=(a,)) for n, a in ADDRESSES.items()]  # type: ignore[arg-type]
    with TemporaryDirectory(prefix="rgn") as directory:
        server = VaultServer.start(Path(directory) / "vault")
        try:
            root = server.root_client()
            made = setup(root, Declaration(zones=("clinic",), nodes=tuple(specs)), policies=ROOT / "policies" / "vault")
            logins = {n: server.client().login_approle(r.role_id, r.secret_id) for n, r in made.nodes.items()}
            identities = {
                n: fetch(logins[n], node=n, addresses=certified_addresses([a], head=n == "head"))
                for n, a in ADDRESSES.items()
            }
            stranger = _stranger(root, identities["gpu-2"])
            ended = _ended(root, identities["gpu-2"])
            root.revoke()
            yield Nodes(logins=logins, identities=identities, stranger=stranger, ended=ended)
        finally:
            server.stop()


def _stranger(root: Vault, like: RayIdentity) -> RayIdentity:
    """Return what *like* is, with a certificate of a root that the cluster does not know."""
    root.call("POST", "sys/mounts/pki-other", type="pki")
    root.call("POST", "pki-other/root/generate/internal", common_name="ray-gpu Ray cluster", key_type="ec")
    root.call("POST", "pki-other/roles/any", allow_any_name=True, key_type="ec", key_bits=256, enforce_hostnames=False)
    wanted = {"common_name": "gpu-2", "ip_sans": ADDRESSES["gpu-2"], "ttl": "1h"}
    made = root.call("POST", "pki-other/issue/any", **wanted)["data"]
    return replace(like, certificate_pem=made["certificate"], key_pem=made["private_key"])


def _ended(root: Vault, like: RayIdentity) -> RayIdentity:
    """Return what *like* is, with a certificate that lasts for a second."""
    request = tls_request("gpu-2")
    wanted = {"common_name": "gpu-2", "ip_sans": ADDRESSES["gpu-2"], "csr": request.csr_pem, "ttl": "1s"}
    made = root.call("POST", f"{RAY_PKI}/sign/gpu-2", **wanted)["data"]
    return replace(like, certificate_pem=made["certificate"] + "\n", key_pem=request.key_pem)


# -- what Vault gives -------------------------------------------------------------------------------


def test_identity_is_whole(nodes: Nodes) -> None:
    """The certificate is of the root, for the key made here, and names the node and its address alone; it will end."""
    identity = nodes.identities["gpu-1"]
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem.encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.ca_pem.encode()))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert certificate.public_key() == load_pem_private_key(identity.key_pem.encode(), None).public_key()
    assert {str(name.value) for name in names} == {"gpu-1", ADDRESSES["gpu-1"]}
    assert identity.not_after == int(certificate.not_valid_after_utc.timestamp())
    assert 29 * 86400 < identity.not_after - time.time() <= 30 * 86400
    assert len(identity.token) == 64
    assert {found.token for found in nodes.identities.values()} == {identity.token}


def test_identity_is_redacted(nodes: Nodes) -> None:
    """Neither key nor token is in what is printed, and an identity is never pickled."""
    identity = nodes.identities["gpu-1"]

    assert identity.token not in repr(identity)
    assert identity.key_pem.splitlines()[1] not in repr(identity)
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(identity)


@pytest.mark.parametrize(
    ("node", "addresses"),
    [
        ("gpu-1", [ADDRESSES["gpu-1"]]),
        ("gpu-2", [ADDRESSES["gpu-1"]]),
        ("gpu-2", [ADDRESSES["gpu-2"], ADDRESSES["gpu-1"]]),
        ("gpu-2", [NOBODYS]),
    ],
    ids=["another node", "another's address", "another's besides", "nobody's address"],
)
def test_fetch_refused(nodes: Nodes, node: str, addresses: list[str]) -> None:
    """gpu-2 gets no identity of another node or address, and the error says what to compare; its own it gets."""
    with pytest.raises(VaultDeniedError, match=r"compare its addresses with those that `ray-gpu vault setup`"):
        fetch(nodes.logins["gpu-2"], node=node, addresses=addresses)
    assert fetch(nodes.logins["gpu-2"], node="gpu-2", addresses=[ADDRESSES["gpu-2"]]).certificate_pem


def test_addresses_have_one_spelling() -> None:
    """Order, repetition and spelling of addresses do not matter; what is no plain address is refused."""
    assert joined_addresses(["fd00:0::2", "10.0.0.1", "fd00::2"]) == "10.0.0.1,fd00::2"
    for wrong in (["10.0.0.256"], [], ["gpu-1"], ["fe80::1%eth0"], ['fe80::1%"]'], ["10.0.0.0/8"]):
        with pytest.raises(ValueError, match=r"address"):
            joined_addresses(wrong)


# -- on disk ----------------------------------------------------------------------------------------


def test_files_are_private(nodes: Nodes, tmp_path: Path) -> None:
    """Every file is of mode 0600 below a directory of mode 0700, also where something laxer was there before."""
    directory = tmp_path / "identity"
    directory.mkdir(mode=0o755)
    (directory / "ray-token").write_text("old")
    (directory / "ray-token").chmod(0o644)

    files = write(nodes.identities["gpu-1"], directory, uid=None)

    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == dict.fromkeys(("ray-ca.pem", "ray-node.key", "ray-node.pem", "ray-token"), 0o600)
    assert files.token.read_text() == nodes.identities["gpu-1"].token
    assert {Path(value) for value in files.environment().values() if value.startswith("/")} == set(directory.iterdir())


@needs_root
def test_files_are_the_nodes(nodes: Nodes, tmp_path: Path) -> None:
    """Directory and files belong to the node's uid, and a link that the uid planted is replaced, not followed."""
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    directory = tmp_path / "identity"
    directory.mkdir()
    (directory / "ray-token").symlink_to(victim)

    files = write(nodes.identities["gpu-1"], directory, uid=61001)

    assert {path.lstat().st_uid for path in (directory, *directory.iterdir())} == {61001}
    assert not files.token.is_symlink()
    assert (victim.read_text(), victim.stat().st_uid) == ("untouched", 0)


def test_directory_that_is_a_link(nodes: Nodes, tmp_path: Path) -> None:
    """A link in place of the directory is refused, with the name and what to do."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "identity").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match="name a directory"):
        write(nodes.identities["gpu-1"], tmp_path / "identity", uid=None)
    assert list((tmp_path / "elsewhere").iterdir()) == []


# -- real Ray ---------------------------------------------------------------------------------------


def test_whom_ray_lets_in(nodes: Nodes, tmp_path: Path) -> None:
    """Nodes with both certificate and token form a cluster; without either, or at another's address, none gets in.

    The control is gpu-2 itself: with what Vault gives it, it gets in where all its variants did not.
    """
    survey = boundary.survey()
    if survey.bwrap is None or survey.mode == "none":
        pytest.skip(f"Ray nodes need a PID namespace here, which bubblewrap cannot make: {survey.reason}")
    own = nodes.identities["gpu-2"]
    variants = {
        **nodes.identities,
        "other-root": nodes.stranger,
        "wrong-token": replace(own, token="0" * len(own.token)),
        "other-address": own,
    }
    plan = {
        "base_port": free_base_port(),
        "nodes": {
            name: {
                "address": NOBODYS if name == "other-address" else ADDRESSES.get(name, ADDRESSES["gpu-2"]),
                # gpu-2 starts once its variants have ended, so it may have the ports of one.
                "index": min(index, 2) if name in ADDRESSES else index - 1,
                "environment": write(identity, tmp_path / name, uid=None).environment(),
            }
            for index, (name, identity) in enumerate(variants.items())
        },
        "steps": [
            {"start": ["head", "gpu-1"], "until": "serves"},
            {"start": ["other-root", "wrong-token", "other-address"], "until": "ended"},
            {"start": ["gpu-2"], "until": "serves"},
        ],
    }

    done = _confined(str(survey.bwrap), plan)

    assert done.returncode == 0, done.stderr[-4000:]
    first = {name: ADDRESSES[name] for name in ("head", "gpu-1")}
    assert [json.loads(line) for line in done.stdout.splitlines()] == [first, first, ADDRESSES]
    assert "InvalidAuthToken" in done.stderr
    assert "Timed out while waiting for GCS" in done.stderr


#: What a cluster without one of the two does not set.
TLS = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")


@pytest.mark.parametrize(
    ("without", "who", "gets_in"),
    [pytest.param((), "ended", False, marks=pytest.mark.heavy), (TLS, "stranger", True), (TOKEN, "gpu-2", True)],
    ids=["certificate ended", "control: no TLS", "control: no token, as with an old Ray"],
)
def test_each_keeps_out(nodes: Nodes, tmp_path: Path, without: tuple[str, ...], who: str, gets_in: bool) -> None:
    """A node whose certificate has ended stays out. Without TLS a certificate is not asked for, nor a token without it.

    They are the attempts of test_whom_ray_lets_in, on a cluster where one of the two is off: a stranger with the token
    but no certificate, and a node without the token.
    """
    survey = boundary.survey()
    if survey.bwrap is None or survey.mode == "none":
        pytest.skip(f"Ray nodes need a PID namespace here, which bubblewrap cannot make: {survey.reason}")
    comer = {"ended": nodes.ended, "stranger": nodes.stranger, "gpu-2": nodes.identities["gpu-2"]}[who]
    kept = {"head": write(nodes.identities["head"], tmp_path / "head", uid=None).environment()}
    kept["gpu-2"] = write(comer, tmp_path / "gpu-2", uid=None).environment()
    plan = {
        "base_port": free_base_port(),
        "nodes": {
            name: {
                "address": ADDRESSES[name],
                "index": index,
                "environment": {key: value for key, value in found.items() if key not in without},
            }
            for index, (name, found) in enumerate(kept.items())
        },
        "steps": [
            {"start": ["head"], "until": "serves"},
            {"start": ["gpu-2"], "until": "serves" if gets_in else "ended"},
        ],
    }

    done = _confined(str(survey.bwrap), plan)

    assert done.returncode == 0, done.stderr[-4000:]
    assert set(json.loads(done.stdout.splitlines()[-1])) == ({"head", "gpu-2"} if gets_in else {"head"})


@pytest.mark.parametrize("full", [False, True], ids=["plain ray", "control: ray[default]"])
def test_agents(nodes: Nodes, tmp_path: Path, full: bool, request: pytest.FixtureRequest) -> None:
    """No agent of a node with plain Ray answers a stranger; with ray[default] they do, though TLS and token are on."""
    survey = boundary.survey()
    if survey.bwrap is None or survey.mode == "none":
        pytest.skip(f"Ray nodes need a PID namespace here, which bubblewrap cannot make: {survey.reason}")
    if not full and set(AGENT_MODULES) <= set(modules_found(AGENT_MODULES)):
        pytest.skip("ray[default] is installed here: this environment has no plain Ray")
    # Off by default with us; a node that somebody starts with ray[default] has them.
    metrics = {"RAY_enable_metrics_collection": "1"}
    head = {
        "address": ADDRESSES["head"],
        "index": 0,
        "environment": write(nodes.identities["head"], tmp_path / "head", uid=None).environment() | metrics,
        "packages": [str(request.getfixturevalue("full_ray"))] if full else [],
    }
    plan = {
        "base_port": free_base_port(),
        "nodes": {"head": head},
        "steps": [{"start": ["head"], "until": "serves"}],
        "agents": True,
    }

    done = _confined(str(survey.bwrap), plan)

    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert {what: bool(answer) for what, answer in answers.items()} == {"metrics": full, "agent": full}


def _confined(bwrap: str, plan: dict[str, object]) -> subprocess.CompletedProcess[str]:
    """Run the plan in a PID namespace, with which every process of Ray ends."""
    boxed = [bwrap, "--unshare-pid", "--die-with-parent", "--dev-bind", "/", "/", "--proc", "/proc"]
    command = [
        *boxed,
        "--tmpfs",
        "/dev/shm",
        sys.executable,
        str(ROOT / "tests" / "ray_admission.py"),
        json.dumps(plan),
    ]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
