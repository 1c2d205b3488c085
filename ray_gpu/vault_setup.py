"""Everything this project needs inside a Vault.

Writes to the Vault it is given and reads policies/vault/*.hcl. Two steps, so that a node
can join without anybody else's credentials changing: :func:`install` may run at any time,
and running it again changes nothing; :func:`issue` makes new credentials for the names it
is given and ends their older ones. :func:`setup` is both.

Identity is one entity per name (node, zone or person), because policies are templated
on ``{{identity.entity.name}}``; so no two of them may share a name.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from zones.errors import ConfigError
from zones.model import check_id
from zones.vault import NODE_PKI, Vault, zone_mount

#: How long a gateway's or custodian's token lives; it logs in again by itself.
_TOKEN_TTL = "1h"
#: How long a person's login lasts: a working day.
_PERSON_TTL = "12h"
_CA_TTL = "87600h"
#: A custodian asks for a certificate at each start, and a node may stay up for weeks.
_NODE_CERTIFICATE_TTL = "2160h"


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonSpec:
    """One person to create."""

    name: str
    zone: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AppRole:
    """What a gateway or custodian logs in with."""

    role_id: str
    secret_id: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What :func:`issue` made, to hand out and forget."""

    #: By zone.
    gateways: Mapping[str, AppRole]
    #: By node.
    custodians: Mapping[str, AppRole]
    #: Password by name.
    people: Mapping[str, str] = field(repr=False)


def setup(
    vault: Vault, *, zones: Sequence[str], nodes: Sequence[str], people: Sequence[PersonSpec], policies: Path
) -> Credentials:
    """Run :func:`install`, then :func:`issue` for everybody. Arguments and errors are theirs."""
    install(vault, zones=zones, nodes=nodes, people=people, policies=policies)
    return issue(vault, zones=zones, nodes=nodes, people=[person.name for person in people])


def install(
    vault: Vault, *, zones: Sequence[str], nodes: Sequence[str], people: Sequence[PersonSpec], policies: Path
) -> None:
    """Install mounts, policies, roles, identities and the node CA; nobody's credentials change.

    Args:
        vault: Logged in with a token that may do all this. The caller revokes it afterwards.
        zones: Zone names.
        nodes: Ids of GPU nodes; each serves exactly the zones in *zones*.
        people: Those who are new get a password that nobody knows. Groups get exactly the members named here.
        policies: Directory with gateway.hcl, custodian.hcl and person.hcl.

    Raises:
        ConfigError: A policy file is missing, or two names are the same.
        ValueError: A name is no valid id.
        VaultDeniedError: The token may not do this.
    """
    _check_names([*zones, *nodes, *(person.name for person in people)])
    _mounts(vault, zones)
    _policies(vault, zones, policies)
    _node_pki(vault)
    accessors = {str(path): str(mount["accessor"]) for path, mount in vault.call("GET", "sys/auth")["data"].items()}
    for zone in zones:
        _approle(vault, _gateway(zone), zone, [f"gateway-{zone}"], accessors["approle/"])
    for node in nodes:
        _approle(vault, _custodian(node), node, [f"custodian-{zone}" for zone in zones], accessors["approle/"])
    known = vault.call("LIST", "auth/userpass/users").get("data", {}).get("keys", [])
    for person in people:
        _person(vault, person, accessors["userpass/"], new=person.name not in known)
    _groups(vault, people)


def issue(
    vault: Vault, *, zones: Sequence[str] = (), nodes: Sequence[str] = (), people: Sequence[str] = ()
) -> Credentials:
    """Return new credentials for names that :func:`install` made. Their older ones end; tokens in use run out.

    Raises:
        VaultDeniedError: The token may not do this, or a name is not installed.
    """
    return Credentials(
        gateways={zone: _issue(vault, _gateway(zone)) for zone in zones},
        custodians={node: _issue(vault, _custodian(node)) for node in nodes},
        people={name: _new_password(vault, name) for name in people},
    )


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        check_id(name, what="name")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"zones, nodes and people share one name space in Vault; rename one of each: {twice}")


def _mounts(vault: Vault, zones: Sequence[str]) -> None:
    mounted = vault.call("GET", "sys/mounts")["data"]
    for path, kind in {**{zone_mount(zone): "transit" for zone in zones}, NODE_PKI: "pki"}.items():
        if f"{path}/" not in mounted:
            vault.call("POST", f"sys/mounts/{path}", type=kind)
    enabled = vault.call("GET", "sys/auth")["data"]
    for kind in ("approle", "userpass"):
        if f"{kind}/" not in enabled:
            vault.call("POST", f"sys/auth/{kind}", type=kind)


def _policies(vault: Vault, zones: Sequence[str], directory: Path) -> None:
    for kind in ("gateway", "custodian", "person"):
        path = directory / f"{kind}.hcl"
        try:
            template = Template(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing; restore it from the repository", file=str(path)) from None
        for zone in zones:
            vault.call("PUT", f"sys/policies/acl/{kind}-{zone}", policy=template.substitute(zone=zone))


def _node_pki(vault: Vault) -> None:
    if not vault.call("LIST", f"{NODE_PKI}/issuers"):
        vault.call("POST", f"sys/mounts/{NODE_PKI}/tune", max_lease_ttl=_CA_TTL)
        vault.call(
            "POST",
            f"{NODE_PKI}/root/generate/internal",
            common_name="ray-gpu nodes",
            key_type="ed25519",
            ttl=_CA_TTL,
            max_path_length=0,
        )
    vault.call(
        "POST",
        f"{NODE_PKI}/roles/node",
        # The one name that a caller can get is its own entity's.
        allowed_domains=["{{identity.entity.name}}"],
        allowed_domains_template=True,
        allow_bare_domains=True,
        allow_subdomains=False,
        allow_localhost=False,
        allow_ip_sans=False,
        use_csr_sans=False,
        key_type="ed25519",
        key_usage=["DigitalSignature"],
        server_flag=False,
        client_flag=False,
        ttl=_NODE_CERTIFICATE_TTL,
        max_ttl=_NODE_CERTIFICATE_TTL,
    )


def _gateway(zone: str) -> str:
    return f"auth/approle/role/gateway-{check_id(zone, what='zone')}"


def _custodian(node: str) -> str:
    return f"auth/approle/role/custodian-{check_id(node, what='node')}"


def _approle(vault: Vault, path: str, entity: str, policies: Sequence[str], accessor: str) -> None:
    vault.call("POST", path, token_policies=list(policies), token_ttl=_TOKEN_TTL, token_no_default_policy=True)
    _entity(vault, entity, str(vault.call("GET", f"{path}/role-id")["data"]["role_id"]), accessor)


def _issue(vault: Vault, path: str) -> AppRole:
    role_id = str(vault.call("GET", f"{path}/role-id")["data"]["role_id"])
    older = vault.call("LIST", f"{path}/secret-id").get("data", {}).get("keys", [])
    secret_id = str(vault.call("POST", f"{path}/secret-id")["data"]["secret_id"])
    for secret_accessor in older:
        vault.call("POST", f"{path}/secret-id-accessor/destroy", secret_id_accessor=secret_accessor)
    return AppRole(role_id=role_id, secret_id=secret_id)


def _person(vault: Vault, person: PersonSpec, accessor: str, *, new: bool) -> None:
    vault.call(
        "POST",
        f"auth/userpass/users/{person.name}",
        token_policies=[f"person-{check_id(person.zone, what='zone')}"],
        token_ttl=_PERSON_TTL,
        token_no_default_policy=True,
        # Vault makes no user without a password.
        **({"password": secrets.token_urlsafe(24)} if new else {}),
    )
    _entity(vault, person.name, person.name, accessor)


def _new_password(vault: Vault, name: str) -> str:
    password = secrets.token_urlsafe(24)
    vault.call("POST", f"auth/userpass/users/{check_id(name, what='person')}/password", password=password)
    return password


def _entity(vault: Vault, name: str, alias: str, accessor: str) -> str:
    vault.call("POST", f"identity/entity/name/{name}")
    entity_id = str(vault.call("GET", f"identity/entity/name/{name}")["data"]["id"])
    vault.call("POST", "identity/entity-alias", name=alias, canonical_id=entity_id, mount_accessor=accessor)
    return entity_id


def _groups(vault: Vault, people: Sequence[PersonSpec]) -> None:
    for group in sorted({group for person in people for group in person.groups}):
        members = [person.name for person in people if group in person.groups]
        ids = [str(vault.call("GET", f"identity/entity/name/{name}")["data"]["id"]) for name in members]
        vault.call("POST", f"identity/group/name/{check_id(group, what='group')}", member_entity_ids=ids)
