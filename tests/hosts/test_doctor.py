"""``ray-gpu doctor`` on a GPU host and a zone's host of a bed, with one control broken at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ray_gpu.node import CAGE_UID, RUN_DIR
from testbed import Host, Testbed
from tests.hosts.vault_like import stand_in
from zones.keys import loopback_tls

PROJECT = Path(__file__).parents[2]
CONFIG, LOGIN, CA = "/etc/ray-gpu/node.yaml", "/etc/ray-gpu/login.json", "/etc/ray-gpu/ca.pem"
RAY = RUN_DIR / "gpu-1/ray"
#: Starts a real Vault, which outlives this program and ends with its host; prints its CA.
VAULT = """
import sys; from pathlib import Path; from ray_gpu.vault_server import VaultServer
server = VaultServer.start(Path("/var/lib/ray-gpu/vault"), host=sys.argv[1], port=8200)
print(server.ca_file.read_text())
"""
NFT = shutil.which("nft", path="/usr/local/sbin:/usr/sbin:/sbin")
WHERE_BWRAP_IS = "from ray_gpu.sandbox.bubblewrap import find; print(find() or '')"


def node_file(vault: str) -> str:
    """Return a GPU node's node.yaml."""
    return (
        "node: gpu-1\nrole: gpu\naddress: 192.0.2.11\nhead: 192.0.2.10\ncluster: [192.0.2.10]\n"
        f"pool: shared\nnum_gpus: 1\npolicies: {PROJECT}/policies\n"
        f"vault: {{address: '{vault}', ca: {CA}, credentials: {LOGIN}}}\n"
    )


@pytest.fixture(scope="module")
def site(can_build: None) -> Iterator[Testbed]:
    """A bed of this module's own, since its hosts get files, with a real Vault that serves."""
    with Testbed() as bed:
        ca = bed["vault"].run(["python", "-c", VAULT, bed["vault"].address]).stdout
        for name in ("gpu-1", "zone-clinic"):
            bed[name].write(CA, ca)
            bed[name].write(LOGIN, "{}", mode=0o600)
        yield bed


@pytest.fixture(scope="module")
def host(site: Testbed) -> Host:
    """A GPU host as its node leaves it."""
    gpu = site["gpu-1"]
    gpu.write(CONFIG, node_file(f"https://{site['vault'].address}:8200"))
    gpu.write(RAY / "ray-node.pem", loopback_tls(datetime.now(UTC), 30).certificate_pem.decode(), uid=CAGE_UID)
    for name in ("ray-token", "ray-node.key"):
        gpu.write(RAY / name, "x", mode=0o600, uid=CAGE_UID)
    gpu.run(["sh", "-c", f"chown {CAGE_UID} {RAY} && chmod 700 {RAY}"])
    return gpu


def results(host: Host, *before: str) -> tuple[int, dict[str, set[str]]]:
    """Run the doctor in a host; return its exit status, and ids of controls by the words it has for them."""
    done = host.run([*before, "ray-gpu", "doctor", "--json"], check=False)
    assert done.stdout, done.stderr
    found: dict[str, set[str]] = {}
    for check in json.loads(done.stdout)["checks"]:
        found.setdefault(check["result"], set()).add(check["control"])
    return done.returncode, found


def failing(host: Host) -> set[str]:
    """Return the controls that fail in a host."""
    status, found = results(host)
    ids = found.get("missing", set()) | found.get("unclear", set())
    assert status == (1 if ids else 0)
    return ids


@contextmanager
def shell(host: Host, broken: str, mended: str) -> Iterator[None]:
    """Run a command in a host, and another one afterwards."""
    host.run(["sh", "-euc", broken])
    try:
        yield
    finally:
        host.run(["sh", "-euc", mended])


@contextmanager
def no_bubblewrap(host: Host) -> Iterator[None]:
    """Hide bubblewrap, wherever it is, behind an empty file."""
    found = host.run(["python", "-c", WHERE_BWRAP_IS]).stdout.strip()
    hidden = []
    try:
        while found:
            host.run(["mount", "--bind", "/dev/null", found])
            hidden.append(found)
            found = host.run(["python", "-c", WHERE_BWRAP_IS]).stdout.strip()
            # What cannot be started is still found where the wheel's is, and then fails.
            found = "" if found in hidden else found
        yield
    finally:
        for place in hidden:
            host.run(["umount", place])


@contextmanager
def certificate(host: Host, end: timedelta) -> Iterator[None]:
    """Give the node a certificate with another end."""
    path = RAY / "ray-node.pem"
    good = host.read(path)
    tls = loopback_tls(datetime.now(UTC) + end - timedelta(days=1), 1)
    host.write(path, tls.certificate_pem.decode(), uid=CAGE_UID)
    try:
        yield
    finally:
        host.write(path, good, uid=CAGE_UID)


@contextmanager
def vault_like(host: Host, *, sealed: bool = False, **options: Any) -> Iterator[None]:
    """Point the host at a server on itself that says what a real Vault cannot be made to say here."""
    before = host.read(CONFIG)
    with stand_in(host, CA, says={"initialized": True, "sealed": sealed}, **options) as address:
        host.write(CONFIG, node_file(address))
        try:
            yield
        finally:
            host.write(CONFIG, before)


BROKEN: dict[str, tuple[Callable[[Host], Any], set[str]]] = {
    "login that others read": (
        lambda host: shell(host, f"chmod 644 {LOGIN}", f"chmod 600 {LOGIN}"), {"credentials-open"}),
    "login of somebody else": (
        lambda host: shell(host, f"chown 1000 {LOGIN}", f"chown 0 {LOGIN}"), {"credentials-open"}),
    "login that is missing": (
        lambda host: shell(host, f"mv {LOGIN} /tmp/away", f"mv /tmp/away {LOGIN}"), {"credentials-open"}),
    "directory that others write": (
        lambda host: shell(host, "chmod 777 /etc/ray-gpu", "chmod 755 /etc/ray-gpu"), {"credentials-open"}),
    "token that others read": (
        lambda host: shell(host, f"chmod 640 {RAY}/ray-token", f"chmod 600 {RAY}/ray-token"), {"credentials-open"}),
    "Ray's directory open": (
        lambda host: shell(host, f"chmod 755 {RAY}", f"chmod 700 {RAY}"), {"credentials-open"}),
    "no bubblewrap": (no_bubblewrap, {"no-namespaces", "uncaged-ray", "shared-network"}),
    "no nft": (
        lambda host: shell(host, f"mount --bind /dev/null {NFT}", f"umount {NFT}"), {"shared-network"}),
    "certificate that ended": (lambda host: certificate(host, timedelta(hours=-1)), {"certificate-ends"}),
    "certificate that ends soon": (lambda host: certificate(host, timedelta(days=2)), {"certificate-ends"}),
    "no certificate at all": (
        lambda host: shell(host, f"cp {RAY}/ray-node.pem /tmp/good && echo x >{RAY}/ray-node.pem",
                           f"cp /tmp/good {RAY}/ray-node.pem"), {"certificate-ends"}),
    "clock ahead": (lambda host: vault_like(host, advance_s=-90), {"clock-skew"}),
    "clock behind": (lambda host: vault_like(host, advance_s=90), {"clock-skew"}),
    "Vault sealed": (lambda host: vault_like(host, sealed=True), {"vault-unproven"}),
    "Vault's certificate ended": (
        lambda host: vault_like(host, days=1, ago=2), {"vault-unproven", "clock-skew"}),
    "CA file of another": (
        lambda host: shell(host, f"cp {CA} /tmp/ca && cp {RAY}/ray-node.pem {CA}", f"cp /tmp/ca {CA}"),
        {"vault-unproven", "clock-skew"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def as_it_is(host: Host) -> set[str]:
    """What fails on the machine itself, with nothing broken: a GPU may be missing, swap on."""
    found = failing(host)
    assert not found & {name for _, names in BROKEN.values() for name in names}
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_one_control_broken(host: Host, as_it_is: set[str], name: str) -> None:
    """One thing broken fails its control and no other."""
    broken, expected = BROKEN[name]

    with broken(host):
        assert failing(host) - as_it_is == expected


def test_mended(host: Host, as_it_is: set[str]) -> None:
    """Once all that was broken is mended, nothing is said of it."""
    assert failing(host) == as_it_is


def test_firewall_is_said(host: Host) -> None:
    """A host's rules are said to be there; without them that is said too, and is no failure."""
    loaded = host.run(["nft", "list", "ruleset"]).stdout
    assert "ports-open" in results(host)[1]["ok"]
    before = failing(host)
    host.flush_rules()
    try:
        assert "ports-open" in results(host)[1]["weaker"]
        # Without rules Vault is reached as before.
        assert failing(host) == before
    finally:
        host.load_rules(loaded)
    assert "ports-open" in results(host)[1]["ok"]


def test_core_limit_is_said(host: Host) -> None:
    """A limit that lets cores be written is said, and none is not."""
    assert "core-limit" in results(host, "prlimit", "--core=0")[1]["ok"]
    assert "core-limit" in results(host, "prlimit", "--core=unlimited")[1]["weaker"]


def test_changes_nothing(host: Host) -> None:
    """A run leaves no file and no control group, and changes none."""
    script = (
        "find / -xdev -newer /tmp/mark ! -path '/proc/*' ! -path '/tmp/mark' -type f; "
        "find /sys/fs/cgroup -name 'ray-gpu*'; ls -la /run /tmp /var/lib/ray-gpu /dev/shm | grep -v total"
    )
    host.run(["touch", "/tmp/mark"])
    before = host.run(["sh", "-c", script]).stdout
    results(host)

    assert host.run(["sh", "-c", script]).stdout == before


def test_zone_host(site: Testbed) -> None:
    """A zone's host with both files is examined as both; another uid than root cannot see its login, and fails."""
    zone, private = site["zone-clinic"], "/etc/ray-gpu/private/login.json"
    part = f"vault: {{address: 'https://{site['vault'].address}:8200', ca: {CA}, credentials: {private}}}\n"
    zone.write(
        CONFIG,
        f"node: z\nrole: zone\nzone: clinic\naddress: {zone.address}\nhead: {site['head'].address}\n"
        f"cluster: [{site['head'].address}]\n{part}",
    )
    zone.write("/etc/ray-gpu/gateway.yaml", f"zone: clinic\npolicies: {PROJECT}/policies\n{part}")
    zone.write(private, "{}", mode=0o600)
    zone.run(["chmod", "700", "/etc/ray-gpu/private"])
    by_root, by_other = (zone.run(["ray-gpu", "doctor", "--json"], uid=uid, check=False) for uid in (None, 61994))
    document = json.loads(by_root.stdout)
    said = {check["about"]: check["result"] for check in json.loads(by_other.stdout)["checks"]}

    assert document["roles"] == ["gateway", "zone"]
    assert [c["result"] for c in document["checks"] if c["about"] == "login for Vault"] == ["ok", "ok"]
    assert [c["result"] for c in document["checks"] if c["control"] == "vault-unproven"] == ["ok", "ok"]
    assert (said["login for Vault"], said["gateway's uid"], by_other.returncode) == ("unclear", "missing", 1)
