"""Every error this project raises on purpose, in one tree.

A caller's bug raises ``ValueError`` or ``TypeError``; everything below describes
the world: policy, Vault, the ledger, a lease, a hostile peer.

::

    ZoneError
    ├── ConfigError                a policy file or option is wrong (file, line)
    ├── UnknownNameError           no such zone, pool, data set or column
    ├── EgressDeniedError          policy refuses; nothing left the zone
    ├── FunctionRefusedError       the function cannot or may not be sent
    ├── ValueRefusedError          a value is not data (executable, unsupported, too deep)
    │   ├── AnswerRefusedError     what a node answered is nothing that a sandbox of ours answers
    │   └── ResultTooLargeError
    ├── DiskSpaceError             the zone's disk does not take data larger than memory
    ├── RowCountError              f.map returned another number of rows than it was given
    ├── EnvelopeError              a sealed message did not open, whatever the reason
    ├── LedgerError
    │   ├── LedgerUnavailableError nothing may leave, because it could not be written down
    │   ├── LedgerCorruptError     the chain is broken at a named entry
    │   └── BudgetSpentError       the written intent covers no more; write another
    ├── VaultError
    │   ├── VaultUnreachableError
    │   ├── VaultSealedError
    │   └── VaultDeniedError
    ├── GatewayError
    │   ├── GatewayUnavailableError
    │   └── SessionClosedError
    ├── ClusterError               a node of the Ray cluster did not start, or died
    ├── PlacementError             no GPU node has room
    ├── SandboxLevelError          the node cannot give the level that policy asks for
    ├── GrantRefusedError          a custodian refused a grant
    │   └── EnvironmentRefusedError  for its environment was changed after it was built
    ├── LeaseLostError             keeper, sandbox, actor or connection died
    │   └── InstanceLostError      and with it the state of a class's instance
    ├── CallCancelledError
    ├── CallTimeoutError
    └── RemoteFunctionError        the user's function raised a type that is not a built-in

No message carries key material, row values or secrets, and every message says what
to do next. Errors cross process boundaries as their class name and fields
(:func:`to_wire`, :func:`from_wire`), never pickled.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"``, or ``""`` when no known name is near *name*."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class ZoneError(Exception):
    """Base of every error in this project.

    Attributes:
        message: One or two sentences: what happened, and what to do next.
        fields: JSON-like details; each is also an attribute.
    """

    #: Names of the keyword fields that instances carry.
    field_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str, **fields: Any) -> None:
        unknown = set(fields) - set(self.field_names)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {sorted(unknown)}")
        super().__init__(message)
        self.message = message
        self.fields = {name: fields.get(name) for name in self.field_names}
        for name, value in self.fields.items():
            setattr(self, name, value)

    def __reduce__(self) -> Any:
        return (from_wire, (to_wire(self),))


class ConfigError(ZoneError):
    """A policy file, cluster file or option is wrong.

    Attributes:
        file: Path of the file, as the caller gave it.
        line: 1-based line, or ``None`` where the parser gives none.
    """

    field_names = ("file", "line")
    file: str | None
    line: int | None


class UnknownNameError(ZoneError):
    """No such zone, pool, data set, column or option.

    Attributes:
        kind: What was looked up: ``"zone"``, ``"pool"``, ``"dataset"``, ``"column"``, ``"segment"``, ``"option"``.
        name: The name that was asked for.
        known: Names that exist.
    """

    field_names = ("kind", "name", "known")
    kind: str
    name: str
    known: list[str]

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Return the error for *name*, with the nearest of the *known* names as a hint."""
        names = sorted(known)
        return cls(
            f"no {kind} {name!r}{did_you_mean(name, names)}; known: {', '.join(names) or 'none'}",
            kind=kind,
            name=name,
            known=names,
        )


class EgressDeniedError(ZoneError):
    """The policy refuses to let this data leave its zone. Nothing left.

    Attributes:
        zone: Zone whose policy refused.
        rules: Ids of the policies that decided, or ``["default"]`` when none matched.
        reasons: The rules' own explanations, one each.
    """

    field_names = ("zone", "rules", "reasons")
    zone: str
    rules: list[str]
    reasons: list[str]


class FunctionRefusedError(ZoneError):
    """The function cannot or may not be sent.

    Attributes:
        variable: Name of the captured variable, global or default that is the cause, if one is.
    """

    field_names = ("variable",)
    variable: str | None


class ValueRefusedError(ZoneError):
    """A value is not plain data: executable, of an unsupported type, or nested too deep."""


class AnswerRefusedError(ValueRefusedError):
    """What a node answered is nothing that a sandbox of ours answers: the node lies, or the function took it over."""


class ResultTooLargeError(ValueRefusedError):
    """A result is larger than the lease allows.

    Attributes:
        size_bytes: Size of the encoded result.
        limit_bytes: Largest size allowed.
    """

    field_names = ("size_bytes", "limit_bytes")
    size_bytes: int
    limit_bytes: int


class DiskSpaceError(ZoneError):
    """Data larger than memory has to be put on the zone's disk before it leaves, and that does not take it."""


class RowCountError(ZoneError):
    """``f.map`` must return one row per row.

    Attributes:
        expected: Rows in the shard.
        got: Rows in the result.
    """

    field_names = ("expected", "got")
    expected: int
    got: int


class EnvelopeError(ZoneError):
    """A sealed message did not open. The cause is deliberately not told apart."""

    def __init__(self, message: str = "sealed message did not open; end the session and attach again") -> None:
        super().__init__(message)


class LedgerError(ZoneError):
    """The ledger cannot be used."""


class LedgerUnavailableError(LedgerError):
    """The ledger cannot be written, so nothing may leave."""


class LedgerCorruptError(LedgerError):
    """The hash chain is broken.

    Attributes:
        entry: Sequence number of the first entry that does not verify, or ``None`` when every
            entry verifies and only the file around them is damaged.
    """

    field_names = ("entry",)
    entry: int | None


class ProofError(LedgerError):
    """A proof from a ledger proves nothing."""


class BudgetSpentError(LedgerError):
    """The intent in the ledger does not cover this call; nothing left. Write another intent."""


class VaultError(ZoneError):
    """Vault refused or failed in a way with no more specific class."""


class VaultUnreachableError(VaultError):
    """No answer from Vault's address."""


class VaultSealedError(VaultError):
    """Vault answers but is sealed."""


class VaultDeniedError(VaultError):
    """Vault refused the credentials or the request."""


class GatewayError(ZoneError):
    """The zone's gateway could not do what was asked."""


class GatewayUnavailableError(GatewayError):
    """No gateway answers on the zone's socket."""


class SessionClosedError(GatewayError):
    """The session has ended; attach again."""


class ClusterError(ZoneError):
    """A node of the Ray cluster did not start, or died.

    Attributes:
        node: Node id.
        reason: What is known about the cause.
    """

    field_names = ("node", "reason")
    node: str
    reason: str


class PlacementError(ZoneError):
    """No GPU node with room was found in time.

    Attributes:
        pool: Pool that was asked.
        reason: What Ray said is missing.
    """

    field_names = ("pool", "reason")
    pool: str
    reason: str


class SandboxLevelError(ZoneError):
    """The node cannot give the sandbox level that policy asks for.

    Attributes:
        node: Node id.
        reasons: Degradations that the policy does not accept.
    """

    field_names = ("node", "reasons")
    node: str
    reasons: list[str]


class GrantRefusedError(ZoneError):
    """A custodian refused a grant: used lease, other boot, forbidden terms, or a key that does not open."""


class EnvironmentRefusedError(GrantRefusedError):
    """A node has an environment, but not as it was built. Another node may.

    Attributes:
        node: Its id.
    """

    field_names = ("node",)
    node: str


class LeaseLostError(ZoneError):
    """Keeper, sandbox, actor or connection of a lease died.

    Attributes:
        node: Node id.
        reason: What ended it, as far as the gateway can tell.
    """

    field_names = ("node", "reason")
    node: str
    reason: str


class InstanceLostError(LeaseLostError):
    """A sandbox of a stateful class's instance is gone, and its state with it."""


class CallCancelledError(ZoneError):
    """The call was cancelled by its caller."""


class CallTimeoutError(ZoneError):
    """The call did not finish within the timeout given."""


class RemoteFunctionError(ZoneError):
    """The user's function raised. Callers see the built-in type instead, where there is one.

    Attributes:
        type_name: Qualified name of the remote exception's type; a bare name if it is a built-in.
        builtin: Whether the type is a built-in.
        text: ``str()`` of the remote exception.
        plain_args: Its arguments, if all are plain values.
        members: What an exception group holds, each described by type, message, arguments and members.
        traceback: The remote traceback as text.
        printed: What the function printed before it raised.
    """

    field_names = ("type_name", "builtin", "text", "plain_args", "members", "traceback", "printed")
    type_name: str
    builtin: bool
    text: str
    plain_args: list[str | bytes | int | float | bool | None]
    members: list[dict[str, Any]]
    traceback: str
    printed: str


def _tree(root: type[ZoneError]) -> dict[str, type[ZoneError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def to_wire(error: ZoneError) -> dict[str, Any]:
    """Return *error* as ``{"error": class name, "message": str, "fields": {...}}``."""
    return {"error": type(error).__name__, "message": error.message, "fields": dict(error.fields)}


def from_wire(document: dict[str, Any]) -> ZoneError:
    """Rebuild an error from :func:`to_wire`. An unknown class becomes a plain :class:`ZoneError`."""
    cls = _tree(ZoneError).get(str(document.get("error")), ZoneError)
    message = str(document.get("message", "unknown error"))
    fields = document.get("fields")
    known = {str(k): v for k, v in fields.items() if k in cls.field_names} if isinstance(fields, dict) else {}
    return cls(message, **known)
