"""The nouns of the data owner's side: frozen values, no I/O, no behaviour beyond checks.

Canonical bytes (:func:`canonical`) are what is hashed and signed: JSON with sorted
keys, no white space, ASCII only, and no floats, in the spirit of RFC 8785.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from zones.hours import Hours
from zones.note import VerifierKey

if TYPE_CHECKING:
    from zones.environments import Environment

#: Node, zone, pool and lease ids. No dots: Vault policies glob on ``<node>.*``.
ID_PATTERN = re.compile(r"[a-z0-9-]{1,40}")


#: Made once: making it takes longer than using it.
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def check_id(value: str, *, what: str) -> str:
    """Return *value* if it is a valid id.

    Raises:
        ValueError: It is not 1 to 40 characters of ``a-z``, ``0-9`` and ``-``.
    """
    if not ID_PATTERN.fullmatch(value):
        raise ValueError(f"{what} {value!r} must be 1 to 40 characters of a-z, 0-9 and '-'")
    return value


def canonical(document: Any) -> bytes:
    """Return the one byte string that stands for *document* (JSON types without floats).

    Raises:
        TypeError: A value is a float or not a JSON type, or a key is not a string.
    """
    _check_canonical(document)
    return _ENCODER.encode(document).encode("ascii")


def _check_canonical(value: Any) -> None:
    if value is None or isinstance(value, (bool, int, str)):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"canonical documents have string keys, not {type(key).__name__}")
            _check_canonical(item)
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_canonical(item)
        return
    raise TypeError(f"canonical documents hold no {type(value).__name__}")


def digest(document: Any) -> str:
    """Return the SHA-256 of :func:`canonical` as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(document)).hexdigest()


class Carrier(StrEnum):
    """How a zone reaches the Ray cluster."""

    #: By a CPU node of its own: the zone is a part of the cluster, and its firewall lets Ray in.
    EDGE = "edge"
    #: By one outbound connection: no part of Ray's cluster is in the zone, and nothing is let in.
    CLIENT = "client"


class Padding(StrEnum):
    """How coarse the sizes are that messages of a lease are padded to."""

    #: Steps of an eighth of the size and less, from 4 KiB on: docs/envelope.md.
    FINE = "fine"
    #: Powers of two.
    COARSE = "coarse"


class Shuffle(StrEnum):
    """How far rows are moved apart before they are cut into shards."""

    ROWS = "rows"
    BLOCKS = "blocks"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeShare:
    """Most of a data set that one GPU node may be sent, over all calls of all sessions of a gateway.

    Where a zone has several gateways it is what is left of the policy's bound for each of them.
    """

    #: Of the rows, in percent, 1 to 99.
    percent: int
    #: So long it counts, seconds; then counting begins anew.
    window_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Obligations:
    """What a decision demands of the code that carries it out. ``None`` demands nothing."""

    shuffle: Shuffle = Shuffle.ROWS
    #: Rows a block holds with ``Shuffle.BLOCKS``; otherwise unused.
    block_rows: int = 1
    #: Rows are moved within windows of so many neighbours; ``None``: within all of them.
    shuffle_window: int | None = None
    padding: Padding = Padding.FINE
    #: Most rows that a call may send.
    max_rows: int | None = None
    #: Least shards that the rows of a call are cut into.
    min_shards: int = 1
    max_node_share: NodeShare | None = None
    #: Degradations (of :data:`RECEIPT_IDS`) that the zone accepts; any other refuses the lease.
    accepted_degradations: frozenset[str] = frozenset()
    #: Whether leases take whole GPUs, which nobody shares meanwhile.
    exclusive_gpu: bool = False
    #: Patterns of :mod:`fnmatch` that a node's device must match one of.
    gpu_kinds: tuple[str, ...] | None = None
    #: Digests of the environments that a sandbox may have.
    environments: frozenset[str] | None = None
    #: Whether shards may stay open in a sandbox after a call, for further calls of the session.
    resident_shards: bool = False
    #: Longest life of a lease, seconds.
    max_lease_s: int = 3600
    #: Longest life of a session, seconds.
    max_session_s: int | None = None
    #: When calls may be made.
    hours: Hours | None = None
    #: What a session must be for.
    purposes: frozenset[str] | None = None
    #: Whether functions must be ones that an officer approved.
    reviewed_functions_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ObligationRule:
    """Obligations for some pools and data sets of a zone."""

    #: Pools the rule is about; ``None`` means every pool.
    pools: frozenset[str] | None = None
    #: Data sets the rule is about; ``None`` means everything, also what comes from no data set.
    datasets: frozenset[str] | None = None
    obligations: Obligations


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """How a data set, or a segment of it, is divided."""

    #: Name of each part to its percent; together 100.
    parts: Mapping[str, int]
    #: Column whose equal values are in one part; ``None``: each row is for itself.
    by: str | None = None
    #: Column within each of whose values the percents hold.
    stratify: str | None = None
    #: Data set that lists the values of ``by`` that each round of learning has, if the parts are rounds.
    listed_in: str | None = None
    #: How parts are divided further.
    within: Mapping[str, Segments] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a step reads of a data set."""

    columns: tuple[str, ...]
    #: Names of segments; empty: all rows.
    segments: tuple[str, ...] = ()
    #: Columns that the step does not get, and that its rows have again afterwards.
    carries: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation:
    """How a data set is made of others."""

    #: A function of the zone's steps.py, its version, and the digest of its text (:mod:`zones.steps`).
    step: str
    version: int
    digest: str
    #: Data sets that it reads, in the order of the step's parameters.
    reads: Mapping[str, Reading]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One data set of a zone's catalog."""

    name: str
    #: Path of an Arrow IPC, Feather or Parquet file, relative to the zone's data directory.
    path: str
    #: Column name to class name, in file order.
    columns: Mapping[str, str]
    description: str = ""
    segments: Segments | None = None
    #: ``None``: it is no other data set's.
    derived: Derivation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallBytes:
    """Class and caps of bytes that come from no catalog handle: functions and call arguments."""

    classification: str
    #: Largest single call's arguments, and largest function, in bytes. Above it the default class holds.
    max_bytes: int
    #: Largest sum over one session, in bytes. Above it the default class holds.
    max_session_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Zone:
    """One zone as its reviewed files describe it."""

    name: str
    #: Class names, least sensitive first.
    classes: Sequence[str]
    #: Class of everything that comes from no catalog handle.
    default_class: str
    small_bytes: SmallBytes | None
    datasets: Mapping[str, Dataset]
    #: Names of the pools that zone.yaml lists.
    pools: Sequence[str]
    #: ``"127.0.0.0/8:20000-60999"``: where gateways may open data connections to.
    endpoints: Sequence[str]
    #: SHA-256 over every policy file of this zone and its pools, hexadecimal.
    policy_digest: str
    #: What holds where no rule of ``obligation_rules`` matches.
    obligations: Obligations = field(default_factory=Obligations)
    #: The first rule that matches a request's pool and data set holds.
    obligation_rules: Sequence[ObligationRule] = ()
    #: Whose signature approves functions.
    officers: Sequence[VerifierKey] = ()
    #: Digest of what is sent of a function to its name, of those that an officer approved.
    approved: Mapping[str, str] = field(default_factory=dict)
    #: Files below ``approved/`` that approve nothing, and why: ``file: reason``.
    disapproved: Sequence[str] = ()
    #: Published environments that the zone knows by a name.
    environments: Mapping[str, Environment] = field(default_factory=dict)
    #: ``None`` where zone.yaml says nothing: ``edge``, but for embedded clusters without root.
    carrier: Carrier | None = None
    #: On how many hosts the zone has a gateway. Bounds over all calls are divided among them.
    gateways: int = 1

    def rank(self, classification: str) -> int:
        """Return the position of a class, 0 for the least sensitive."""
        return list(self.classes).index(classification)


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressRequest:
    """A question to policy: may these columns leave for this pool?"""

    zone: str
    pool: str
    #: Name of the person in Vault's identity store, never ``$USER``.
    person: str
    groups: frozenset[str] = frozenset()
    purpose: str = ""
    #: Catalog name, or ``""`` for data that comes from no catalog handle.
    dataset: str = ""
    #: Columns that leave. Arguments without a data set use ``{"<arguments>"}``.
    columns: frozenset[str] = frozenset()
    #: Every class among the data, the function and its arguments.
    classes: frozenset[str] = frozenset()
    #: Segments that rows leave of; empty for a data set that has none, and without one.
    segments: frozenset[str] = frozenset()
    function_digest: str = ""
    function_reviewed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Policy's answer."""

    allowed: bool
    #: Ids of the policies that decided, or ``("default",)``.
    rules: tuple[str, ...]
    #: The rules' own explanations (``@reason``), in the same order.
    reasons: tuple[str, ...]
    policy_digest: str
    obligations: Obligations = field(default_factory=Obligations)


class Direction(StrEnum):
    """Which way a sealed message goes."""

    OUT = "out"
    BACK = "back"


class Kind(StrEnum):
    """What a sealed message is."""

    HELLO = "hello"
    FUNCTION = "function"
    ARGUMENTS = "arguments"
    CALL = "call"
    SHARD = "shard"
    RESULT = "result"
    CONTROL = "control"
    RECALL = "recall"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where a sealed message is valid. Authenticated, never stored in the message itself."""

    lease: str
    direction: Direction
    kind: Kind
    #: Number of the call within the lease.
    call: int
    #: Number of the shard within the call; carries no position in the data set.
    shard: int
    #: 0 for the first try of a shard, then 1, 2, ...
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a custodian says about its node before a lease. Signed by the node."""

    node: str
    pool: str
    #: Random per start of the custodian, 32 hexadecimal digits.
    boot: str
    #: One-time X25519 public key, 64 hexadecimal digits.
    exchange_key: str
    #: Ids of the missing controls; empty means ``strict``.
    degradations: tuple[str, ...]
    #: What computes: ``"NVIDIA H100"`` or ``"numpy stand-in"``.
    device: str
    #: Digests of what its sandboxes can import (:mod:`zones.environments`): the node's own Python first, then what its
    #: operator published.
    environments: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return the fields as JSON types, for :func:`canonical`."""
        return _document(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The terms of one lease, bound into its key."""

    zone: str
    lease: str
    node: str
    pool: str
    offer_digest: str
    #: The gateway's ephemeral X25519 public key, 64 hexadecimal digits.
    exchange_key: str
    accepted_degradations: tuple[str, ...]
    #: Of everything that is sent under the lease, either way.
    padding: Padding
    #: One of the offer's: what the function runs in.
    environment: str
    #: Thousandths of a GPU, so that canonical bytes need no float.
    gpu_milli: int
    memory_bytes: int
    policy_digest: str
    #: UTC seconds since the epoch.
    not_after: int

    def document(self) -> dict[str, Any]:
        """Return the fields as JSON types, for :func:`canonical`."""
        return _document(self)

    def digest(self) -> str:
        """Return the SHA-256 of the canonical grant, hexadecimal."""
        return digest(self.document())


#: Degradations that say something about the set-up around a sandbox, not about the sandbox.
SURROUNDINGS = frozenset({"numpy-stand-in", "embedded-vault", "self-enforced", "uncaged-ray", "shared-network"})


#: Every degradation that an offer or receipt may tell of: a zone can accept these and no others.
RECEIPT_IDS = SURROUNDINGS | {
    "shared-uid", "no-namespaces", "file-capability", "no-seccomp", "no-landlock", "no-cgroup", "swap-on",
}  # fmt: skip


#: Those of them that are a GPU node's own.
NODE_IDS = RECEIPT_IDS - {"embedded-vault", "self-enforced"}


def controls_held(degradations: Sequence[str]) -> list[str]:
    """Return the ids of the node's controls that held where these were missing, ascending."""
    return sorted(NODE_IDS - set(degradations))


def sandbox_level(degradations: Sequence[str]) -> str:
    """Return ``"strict"``, or ``"degraded: ..."`` naming the controls that a sandbox lacks."""
    missing = sorted(set(degradations) - SURROUNDINGS)
    return f"degraded: {', '.join(missing)}" if missing else "strict"


def _document(value: Any) -> dict[str, Any]:
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return {name: list(item) if isinstance(item, tuple) else item for name, item in fields.items()}
