"""Everything this project needs inside a Vault.

Reads policies/vault/*.hcl and the Vault that it is given, and writes to that Vault. Two steps, so that a node can
join without anybody else's credentials changing: :func:`install` may run at any time, and running it again changes
nothing; :func:`issue` makes new credentials for the names it is given and ends their older ones. :func:`setup` is
both. :func:`plan` says what :func:`install` would do.

Identity is one entity per name (node, zone or person), because policies go by ``{{identity.entity.name}}``; so no two
of them may share a name. Set-up adds and corrects. It removes nothing but roles that a declared node
or zone has no longer: who leaves the declaration keeps its login until an administrator deletes it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import Template

from ray_gpu.node_identity import joined_addresses
from ray_gpu.vault_declaration import Declaration, NodeSpec, OidcSpec, PersonSpec
from ray_gpu.vault_pki import node_pki, ray_pki, ray_token
from ray_gpu.vault_plan import Change, Planner
from zones import signing
from zones.errors import ConfigError, UnknownNameError
from zones.model import check_id
from zones.vault import Vault, zone_mount

_HOUR_S = 3600
#: How long a gateway's or node's token lives; it logs in again by itself.
_TOKEN_TTL_S = _HOUR_S
#: How long a person's login lasts: a working day.
_PERSON_TTL_S = 12 * _HOUR_S


@dataclass(frozen=True, slots=True, kw_only=True)
class AppRole:
    """What a gateway or node logs in with."""

    role_id: str
    secret_id: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What :func:`issue` made, to hand out and forget."""

    #: By zone.
    gateways: Mapping[str, AppRole]
    #: By node: the custodian's on GPU nodes, the node's own on others.
    nodes: Mapping[str, AppRole]
    #: Password by name.
    people: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    """What to write anew although it is there."""

    #: Nodes that run keep the old token until they are restarted; no two with different ones can speak.
    ray_token: bool = False
    #: Vault never shows the identity provider's client secret, so a new one is not noticed.
    oidc_secret: bool = False


def setup(vault: Vault, declaration: Declaration, *, policies: Path) -> Credentials:
    """Run :func:`install`, then :func:`issue` for everybody. Arguments and errors are theirs."""
    install(vault, declaration, policies=policies)
    return issue(
        vault,
        zones=declaration.zones,
        nodes=[node.name for node in declaration.nodes],
        people=[person.name for person in declaration.people],
    )


def install(vault: Vault, declaration: Declaration, *, policies: Path, renew: Renew = Renew()) -> list[Change]:
    """Install what :func:`plan` finds missing or different, and return it. Arguments and errors are the plan's."""
    changes = plan(vault, declaration, policies=policies, renew=renew)
    for change in changes:
        change.apply()
    return changes


def plan(vault: Vault, declaration: Declaration, *, policies: Path, renew: Renew = Renew()) -> list[Change]:
    """Return what would have to be done, in order; nothing is changed.

    Mounts, policies, roles, identities, two CAs and the Ray token; nobody's credentials change.

    Args:
        vault: Logged in with a token that may do all this. The caller revokes it afterwards.
        declaration: GPU nodes serve exactly its zones. People who are new get a password that nobody knows. Groups
            have exactly the members named.
        policies: Directory with the policies, ``*.hcl``.
        renew: What to write anew although it is there.

    Raises:
        ConfigError: A policy file is missing, something else is mounted where this belongs, or the audit device that
            the declaration names is not on.
        VaultDeniedError: The token may not do this.
    """
    planner = Planner(vault)
    if declaration.audit_file is not None:
        _check_audit(vault, declaration.audit_file)
    for zone in declaration.zones:
        planner.want_mount(zone_mount(zone), "transit")
    planner.want_mount(signing.MOUNT, "transit")
    for zone in declaration.zones:
        ledger_key = {"type": "ed25519", "exportable": False, "allow_plaintext_backup": False}
        planner.want(f"ledger key of zone {zone}", f"{signing.MOUNT}/keys/{zone}", ledger_key)
    for kind in ("approle", "userpass", *(["oidc"] if declaration.oidc else [])):
        planner.want_auth(kind)
    _policies(planner, declaration, policies)
    node_pki(planner)
    ray_pki(planner, declaration.nodes)
    ray_token(planner, rotate=renew.ray_token)
    for zone in declaration.zones:
        _approle(planner, _gateway(zone), zone, [f"gateway-{zone}"])
    for node in declaration.nodes:
        _node(planner, node, declaration.zones)
    for person in declaration.people:
        _person(planner, person, oidc=declaration.oidc is not None)
    if declaration.oidc is not None:
        _oidc(planner, declaration, declaration.oidc, again=renew.oidc_secret)
    for group in sorted({group for person in declaration.people for group in person.groups}):
        members = [person.name for person in declaration.people if group in person.groups]
        planner.want_group(check_id(group, what="group"), members)
    return planner.changes


def issue(
    vault: Vault, *, zones: Sequence[str] = (), nodes: Sequence[str] = (), people: Sequence[str] = ()
) -> Credentials:
    """Return new credentials for names that :func:`install` made. Their older ones end; tokens in use run out.

    Raises:
        UnknownNameError: A node or zone is not installed.
        VaultDeniedError: The token may not do this, or a person is not installed.
    """
    return Credentials(
        gateways={zone: issue_role(vault, zone) for zone in zones},
        nodes={node: issue_role(vault, node) for node in nodes},
        people={name: _new_password(vault, name) for name in people},
    )


def issue_one(vault: Vault, name: str) -> dict[str, str]:
    """Return new credentials of a zone's gateway, a node or a person, as a file holds them; older ones end.

    Raises:
        UnknownNameError: Nothing is installed under this name.
        ValueError: *name* is no id.
        VaultDeniedError: The token may not do this.
    """
    if vault.find(f"auth/userpass/users/{check_id(name, what='name')}") is not None:
        return {"user": name, "password": _new_password(vault, name)}
    role = issue_role(vault, name)
    return {"role_id": role.role_id, "secret_id": role.secret_id}


def issue_role(vault: Vault, name: str) -> AppRole:
    """Return new credentials of the gateway of zone *name*, or of node *name*; older ones end.

    Raises:
        UnknownNameError: No AppRole is installed under this name.
        ValueError: *name* is no id.
        VaultDeniedError: The token may not do this.
    """
    for path in (_gateway(name), _custodian(name), _plain_node(name)):
        role_id = _role_id(vault, path)
        if role_id is not None:
            return _issue(vault, path, role_id)
    roles = (vault.find("auth/approle/role", method="LIST") or {"data": {"keys": []}})["data"]["keys"]
    known = {role.partition("-")[2] for role in roles if role.startswith(("gateway-", "custodian-", "node-"))}
    raise UnknownNameError.of("zone, node or person in Vault", name, known)


def audited(vault: Vault) -> bool:
    """Whether the server writes any audit log.

    Raises:
        VaultDeniedError: The token may not know.
    """
    return bool(vault.call("GET", "sys/audit")["data"])


def _policies(planner: Planner, declaration: Declaration, directory: Path) -> None:
    for kind in ("gateway", "custodian", "person"):
        template = _template(directory / f"{kind}.hcl")
        for zone in declaration.zones:
            _policy(planner, f"{kind}-{zone}", template.substitute(zone=zone))
    template = _template(directory / "ray-node.hcl")
    for node in declaration.nodes:
        addresses = joined_addresses(node.certified())
        _policy(planner, _ray_policy(node.name), template.substitute(node=node.name, addresses=addresses))


def _template(path: Path) -> Template:
    try:
        return Template(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; restore it from the repository", file=str(path)) from None


def _policy(planner: Planner, name: str, text: str) -> None:
    planner.want(f"policy {name}", f"sys/policies/acl/{name}", {"policy": text})


def _ray_policy(node: str) -> str:
    return f"ray-node-{node}"


# -- who logs in ------------------------------------------------------------------------------------


def _gateway(zone: str) -> str:
    return f"auth/approle/role/gateway-{check_id(zone, what='zone')}"


def _custodian(node: str) -> str:
    return f"auth/approle/role/custodian-{check_id(node, what='node')}"


def _plain_node(node: str) -> str:
    return f"auth/approle/role/node-{check_id(node, what='node')}"


def _approle(planner: Planner, path: str, entity: str, policies: Sequence[str]) -> None:
    body = {
        # Without it, the role's id alone would log in, and that is no secret.
        "bind_secret_id": True,
        "token_policies": list(policies),
        "token_ttl": _TOKEN_TTL_S,
        "token_no_default_policy": True,
    }
    planner.want(f"AppRole {path.rpartition('/')[2]}", path, body)
    planner.want_identity(entity, {"approle": partial(_role_id, planner.vault, path)})


def _role_id(vault: Vault, path: str) -> str | None:
    found = vault.find(f"{path}/role-id")
    return None if found is None else str(found["data"]["role_id"])


def _node(planner: Planner, node: NodeSpec, zones: Sequence[str]) -> None:
    """Want the node's one AppRole: a custodian's for GPU nodes, else one that unwraps nothing."""
    ray = _ray_policy(node.name)
    wanted, other = _custodian(node.name), _plain_node(node.name)
    policies = [*(f"custodian-{zone}" for zone in zones), ray]
    if node.role != "gpu":
        wanted, other, policies = other, wanted, [ray]
    # First: what a node was before it changed its role, it must not stay.
    planner.unwanted(f"AppRole {other.rpartition('/')[2]}", other)
    _approle(planner, wanted, node.name, policies)


def _issue(vault: Vault, path: str, role_id: str) -> AppRole:
    older = vault.call("LIST", f"{path}/secret-id").get("data", {}).get("keys", [])
    secret_id = str(vault.call("POST", f"{path}/secret-id")["data"]["secret_id"])
    for secret_accessor in older:
        vault.call("POST", f"{path}/secret-id-accessor/destroy", secret_id_accessor=secret_accessor)
    return AppRole(role_id=role_id, secret_id=secret_id)


def _person_login(zone: str) -> dict[str, object]:
    return {"token_policies": [f"person-{zone}"], "token_ttl": _PERSON_TTL_S, "token_no_default_policy": True}


def _person(planner: Planner, person: PersonSpec, *, oidc: bool) -> None:
    # Vault makes no user without a password.
    password = {"password": secrets.token_urlsafe(24)}
    path = f"auth/userpass/users/{person.name}"
    planner.want(f"person {person.name}", path, _person_login(person.zone), new=password)
    aliases = {"userpass": person.name}
    if oidc and person.oidc_subject is not None:
        aliases["oidc"] = person.oidc_subject
    planner.want_identity(person.name, {kind: partial(str, alias) for kind, alias in aliases.items()})


def _new_password(vault: Vault, name: str) -> str:
    password = secrets.token_urlsafe(24)
    vault.call("POST", f"auth/userpass/users/{check_id(name, what='person')}/password", password=password)
    return password


def _oidc(planner: Planner, declaration: Declaration, oidc: OidcSpec, *, again: bool) -> None:
    """Want login by the identity provider, with one role for each zone that admits the zone's people by name.

    A role without bound claims would make everybody whom the provider knows a person of the zone, so a zone none of
    whose people has a subject gets no role.
    """
    planner.want(
        "identity provider",
        "auth/oidc/config",
        {
            "oidc_discovery_url": oidc.discovery_url,
            "oidc_client_id": oidc.client_id,
            "oidc_discovery_ca_pem": oidc.ca_pem,
        },
        unread={"oidc_client_secret": oidc.client_secret},
        again=again,
    )
    for zone in declaration.zones:
        subjects = [p.oidc_subject for p in declaration.people if p.zone == zone and p.oidc_subject is not None]
        path = f"auth/oidc/role/person-{zone}"
        if not subjects:
            planner.unwanted(f"OIDC role person-{zone}", path)
            continue
        body = {
            **_person_login(zone),
            "role_type": "oidc",
            "user_claim": oidc.user_claim,
            "bound_claims": {oidc.user_claim: subjects},
            "bound_claims_type": "string",
            "allowed_redirect_uris": list(oidc.redirect_uris),
        }
        planner.want(f"OIDC role person-{zone}", path, body)


def _check_audit(vault: Vault, path: str) -> None:
    """Check that the server writes its audit log to *path*, with no value in clear.

    OpenBao turns audit devices on in its configuration only: whoever may make one by request can write to any file
    of the server. So set-up asks for that, whatever the server is.

    Raises:
        ConfigError: It does not.
    """
    devices = vault.call("GET", "sys/audit")["data"].values()
    options = [device["options"] or {} for device in devices if device["type"] == "file"]
    found = [option for option in options if option.get("file_path") == path]
    if not found:
        raise ConfigError(
            f"Vault writes no audit log to {path}. OpenBao: add to the server's configuration\n"
            f'audit "file" "ray-gpu" {{\n  description = "requests"\n  options {{\n    file_path = "{path}"\n  }}\n}}\n'
            f"and send it SIGHUP. HashiCorp Vault: vault audit enable file file_path={path}. Then run set-up again",
            file=None,
        )
    if any(option.get("log_raw", "false").lower() != "false" for option in found):
        raise ConfigError(f"the audit log {path} has secrets in clear; take log_raw out of its options", file=None)
