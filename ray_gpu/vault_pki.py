"""What Vault certifies nodes with, and the Ray cluster's token. Reads and plans; writes only when a change is applied.

Two roots, so that a certificate for one purpose is worth nothing for the other: ``pki-nodes`` certifies the keys with
which custodians sign offers and receipts, ``pki-ray`` the TLS keys of Ray's processes, which count as compromised.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial

from ray_gpu.node_identity import RAY_KV, RAY_PKI, RAY_TOKEN, joined_addresses
from ray_gpu.vault_declaration import NodeSpec
from ray_gpu.vault_plan import Planner
from zones.errors import ConfigError
from zones.vault import NODE_PKI

_HOUR_S = 3600
_CA_TTL_S = 87600 * _HOUR_S
#: A custodian asks for a certificate at each start, and a node may stay up for weeks.
_NODE_CERTIFICATE_TTL_S = 2160 * _HOUR_S
#: Ray reads no revocation list, so this is how long a node that was thrown out can still speak to the others. It is
#: also how often a node must be restarted, since Ray reads its certificate at start only.
_RAY_CERTIFICATE_TTL_S = 720 * _HOUR_S
#: No name but those of ``allowed_domains``, as they stand there. Named one by one, so that set-up notices each change.
_NARROW = {
    "allow_bare_domains": True,
    "allow_any_name": False,
    "allow_glob_domains": False,
    "allow_subdomains": False,
    "allow_localhost": False,
    "allow_wildcard_certificates": False,
    "allowed_other_sans": [],
    "allowed_uri_sans": [],
    "enforce_hostnames": True,
}


def _pki(planner: Planner, mount: str, common_name: str, key_type: str) -> None:
    planner.want_mount(mount, "pki", longest_s=_CA_TTL_S)
    if planner.vault.find(f"{mount}/issuers", method="LIST") is None:
        root = {"common_name": common_name, "key_type": key_type, "ttl": f"{_CA_TTL_S}s", "max_path_length": 0}
        # "internal": the key is made in Vault and never leaves it.
        generate = partial(planner.vault.call, "POST", f"{mount}/root/generate/internal", **root)
        planner.add("make", f"root certificate of {mount}", generate)


def node_pki(planner: Planner) -> None:
    """Want a root for the signing keys of custodians, and a role that certifies each caller under its own name."""
    _pki(planner, NODE_PKI, "ray-gpu nodes", "ed25519")
    planner.want(
        f"certificate role {NODE_PKI}/node",
        f"{NODE_PKI}/roles/node",
        {
            **_NARROW,
            # The one name that a caller can get is its own entity's.
            "allowed_domains": ["{{identity.entity.name}}"],
            "allowed_domains_template": True,
            "allow_ip_sans": False,
            "use_csr_sans": False,
            "key_type": "ed25519",
            "key_usage": ["DigitalSignature"],
            "server_flag": False,
            "client_flag": False,
            "ttl": _NODE_CERTIFICATE_TTL_S,
            "max_ttl": _NODE_CERTIFICATE_TTL_S,
        },
    )


def ray_pki(planner: Planner, nodes: Sequence[NodeSpec]) -> None:
    """Want a root for Ray's TLS, and one certificate role for each node: it certifies that node alone.

    Raises:
        ConfigError: A node that is declared no longer can still have the address of one that is certified.
    """
    _check_taken(planner, nodes)
    _pki(planner, RAY_PKI, "ray-gpu Ray cluster", "ec")
    for node in nodes:
        planner.want(
            f"certificate role {RAY_PKI}/{node.name}",
            f"{RAY_PKI}/roles/{node.name}",
            {
                **_NARROW,
                "allowed_domains": [node.name],
                "allow_ip_sans": True,
                # HashiCorp Vault does not know this one; there the policy ray-node alone binds the addresses.
                "allowed_ip_sans_cidr": [_single(address) for address in joined_addresses(node.certified()).split(",")],
                # What counts is what policy has checked, not what the request to sign says.
                "use_csr_sans": False,
                "use_csr_common_name": False,
                "key_type": "ec",
                "key_bits": 256,
                "key_usage": ["DigitalSignature"],
                "server_flag": True,
                "client_flag": True,
                "ttl": _RAY_CERTIFICATE_TTL_S,
                "max_ttl": _RAY_CERTIFICATE_TTL_S,
            },
        )


def _check_taken(planner: Planner, nodes: Sequence[NodeSpec]) -> None:
    declared = {node.name for node in nodes}
    wanted = {_single(address) for node in nodes for address in joined_addresses(node.certified()).split(",")}
    listed = planner.vault.find(f"{RAY_PKI}/roles", method="LIST") or {"data": {"keys": []}}
    for name in set(listed["data"]["keys"]) - declared:
        role = planner.vault.call("GET", f"{RAY_PKI}/roles/{name}")["data"]
        taken = sorted(wanted & set(role.get("allowed_ip_sans_cidr") or ()))
        if taken:
            raise ConfigError(
                f"{taken[0].partition('/')[0]} is still certified for node {name}, which is not declared any more; "
                f"delete {RAY_PKI}/roles/{name} and the node's AppRole in Vault, and run set-up again",
                file=None,
            )


def _single(address: str) -> str:
    return f"{address}/128" if ":" in address else f"{address}/32"


def ray_token(planner: Planner, *, rotate: bool) -> None:
    """Want a token in KV. It is never read here: its metadata say whether there is one."""
    planner.want_mount(RAY_KV, "kv", options={"version": "2"})
    metadata = f"{RAY_KV}/metadata/{RAY_TOKEN}"
    # A token that was replaced must not stay readable to those who may read the newer one.
    planner.want("history of the Ray token: none", metadata, {"max_versions": 1})
    known = (planner.vault.find(metadata) or {"data": {}})["data"]
    version = int(known.get("current_version") or 0)
    newest = (known.get("versions") or {}).get(str(version), {})
    usable = bool(newest) and not newest["destroyed"] and not newest["deletion_time"]
    if usable and not rotate:
        return
    # With the version that was seen, so that of two set-ups at one time only one makes a token.
    write = partial(_write_token, planner, version)
    planner.add("change" if usable else "make", "the Ray token", write)


def _write_token(planner: Planner, version: int) -> None:
    body = {"data": {"token": secrets.token_hex(32)}, "options": {"cas": version}}
    planner.vault.call("POST", f"{RAY_KV}/data/{RAY_TOKEN}", **body)
