"""What a Vault shall hold for this project: zones, nodes, people. Reads files and nothing else.

The file is what an operator reviews and edits; :func:`read` turns it into a :class:`Declaration`, with file and line
in every error. Zones, nodes and people share one name space, because policies go by the name of Vault's entity.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from ray_gpu.node_identity import certified_addresses, joined_addresses
from zones.document import Document, FileModel, Id, Ids, Loc, read_text_file
from zones.errors import ConfigError, did_you_mean
from zones.model import check_id

#: Far more than a token or a client secret has.
_SECRET_BYTES = 1 << 16
#: Where the login program of a Vault waits for the provider's answer.
_REDIRECT_URIS = ("http://localhost:8250/oidc/callback",)
NodeRole = Literal["head", "gpu", "zone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One node of the Ray cluster."""

    name: str
    #: ``"gpu"`` nodes have a custodian, which unwraps keys; the others unwrap nothing.
    role: NodeRole
    #: IP addresses of its own; at least one.
    addresses: tuple[str, ...]

    def certified(self) -> tuple[str, ...]:
        """Return the IP addresses that the node's certificate names."""
        return certified_addresses(self.addresses, head=self.role == "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonSpec:
    """One person."""

    name: str
    zone: str
    groups: tuple[str, ...] = ()
    #: What the identity provider calls this person in ``OidcSpec.user_claim``; ``None`` for no login by OIDC.
    oidc_subject: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OidcSpec:
    """The identity provider that people log in with."""

    #: Without ``/.well-known/openid-configuration``.
    discovery_url: str
    client_id: str
    client_secret: str = field(repr=False)
    #: PEM of the provider's CA; ``""`` for the system's.
    ca_pem: str = ""
    #: ``"sub"`` is the one claim that a provider never gives to somebody else later.
    user_claim: str = "sub"
    redirect_uris: tuple[str, ...] = _REDIRECT_URIS


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """Everything that set-up installs. Checked when made.

    Raises:
        ConfigError: Two names or two nodes' addresses are the same, a person's zone is none of *zones*, or two people
            are one to the identity provider.
        ValueError: A name is no id, or an address is none.
    """

    zones: tuple[str, ...]
    nodes: tuple[NodeSpec, ...] = ()
    people: tuple[PersonSpec, ...] = ()
    oidc: OidcSpec | None = None
    #: File of the server's audit device; ``None`` leaves that to whoever runs the server.
    audit_file: str | None = None

    def __post_init__(self) -> None:
        for _, problem in _problems(self.zones, self.nodes, self.people):
            raise ConfigError(f"{problem}; correct the declaration", file=None)


def _problems(
    zones: Sequence[str], nodes: Sequence[NodeSpec], people: Sequence[PersonSpec]
) -> Iterator[tuple[Loc, str]]:
    """Yield what is wrong between the parts of a declaration, and where it stands."""
    places: list[tuple[Loc, str]] = [(("zones", index), name) for index, name in enumerate(zones)]
    places += [(("nodes", index, "name"), node.name) for index, node in enumerate(nodes)]
    places += [(("people", index, "name"), person.name) for index, person in enumerate(people)]
    seen: set[str] = set()
    for loc, name in places:
        if check_id(name, what="name") in seen:
            yield loc, f"zones, nodes and people share one name space in Vault; rename one {name!r}"
        seen.add(name)
    yield from _shared_addresses(nodes)
    subjects: set[str] = set()
    for index, person in enumerate(people):
        if person.zone not in zones:
            near = did_you_mean(person.zone, zones)
            yield ("people", index, "zone"), f"no zone {person.zone!r}{near}; name one of: {', '.join(zones)}"
        if person.oidc_subject in subjects:
            yield ("people", index, "oidc_subject"), "two people cannot be one to the identity provider"
        subjects |= {person.oidc_subject} if person.oidc_subject else set()


def _shared_addresses(nodes: Sequence[NodeSpec]) -> Iterator[tuple[Loc, str]]:
    owners: dict[str, str] = {}
    for index, node in enumerate(nodes):
        for address in joined_addresses(node.addresses).split(","):
            if address in owners:
                loc = ("nodes", index, "addresses")
                yield (
                    loc,
                    f"{address} is {owners[address]}'s already; give each node addresses of its own",
                )
            owners[address] = node.name


# -- the file -------------------------------------------------------------------------------------


def _address(text: str) -> str:
    return joined_addresses([text])


class _NodePart(FileModel):
    name: Id
    role: NodeRole
    addresses: list[Annotated[str, AfterValidator(_address)]] = Field(min_length=1)


class _PersonPart(FileModel):
    name: Id
    zone: Id
    groups: Ids = Field(default_factory=list)
    oidc_subject: str | None = Field(default=None, min_length=1)


class _OidcPart(FileModel):
    discovery_url: str = Field(pattern=r"^https://")
    client_id: str = Field(min_length=1)
    client_secret_file: str
    ca_file: str | None = None
    user_claim: str = Field(default="sub", min_length=1)
    redirect_uris: list[str] = Field(default_factory=lambda: list(_REDIRECT_URIS), min_length=1)


class _File(FileModel):
    zones: Ids = Field(min_length=1)
    nodes: list[_NodePart] = Field(default_factory=list)
    people: list[_PersonPart] = Field(default_factory=list)
    oidc: _OidcPart | None = None
    audit_file: str | None = Field(default=None, pattern="^/")


def read(path: Path) -> Declaration:
    """Read a declaration from a YAML file. Files that it names are relative to its own directory.

    Raises:
        ConfigError: Anything is wrong; names file and line.
    """
    document = Document(read_text_file(path), path)
    file = document.check(_File)
    zones = tuple(file.zones)
    nodes = tuple(NodeSpec(name=n.name, role=n.role, addresses=tuple(n.addresses)) for n in file.nodes)
    people = tuple(
        PersonSpec(name=p.name, zone=p.zone, groups=tuple(p.groups), oidc_subject=p.oidc_subject) for p in file.people
    )
    for loc, problem in _problems(zones, nodes, people):
        document.refuse(loc, problem)
    oidc = _oidc(file.oidc, path.parent) if file.oidc else None
    return Declaration(zones=zones, nodes=nodes, people=people, oidc=oidc, audit_file=file.audit_file)


def _oidc(part: _OidcPart, directory: Path) -> OidcSpec:
    return OidcSpec(
        discovery_url=part.discovery_url,
        client_id=part.client_id,
        client_secret=read_secret(directory / part.client_secret_file),
        ca_pem=read_text_file(directory / part.ca_file).decode("utf-8") if part.ca_file else "",
        user_claim=part.user_claim,
        redirect_uris=tuple(part.redirect_uris),
    )


def read_secret(path: Path) -> str:
    """Return a file's text, without space around it. The file must be its owner's alone.

    Raises:
        ConfigError: It is missing, empty or not text, or others can read or write it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(_SECRET_BYTES)
    except OSError as problem:
        raise ConfigError(f"{path}: {problem.strerror}; name a file that holds the secret", file=str(path)) from None
    if mode & 0o077:
        # What was readable may have been read: a narrower mode alone does not make it secret again.
        raise ConfigError(
            f"{path}: others can read or write it (mode {mode:04o}); run chmod 600 on it, and make a new secret if "
            "somebody may have read this one",
            file=str(path),
        )
    try:
        text = content.decode("ascii").strip()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise ConfigError(f"{path}: holds no secret; write the secret into it, and nothing else", file=str(path))
    return text
