"""Decides every decision of a ledger again, by the policy that the ledger holds for it. docs/ledger.md.

Does I/O: writes each version of the policy to a directory of its own, to be read and checked as at a gateway's start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from zones.config import load_zone
from zones.errors import ConfigError, LedgerError, UnknownNameError
from zones.model import Decision
from zones.obligations import duties
from zones.policy import Policy
from zones.review import asked_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Redecided:
    """One decision, as it stands in the ledger and as it is made again."""

    seq: int
    #: As written down.
    allowed: bool
    rules: tuple[str, ...]
    #: What it demanded, by the keys of zone.yaml.
    obligations: Mapping[str, str]
    #: Made again.
    decision: Decision

    @property
    def same(self) -> bool:
        """Whether answer, deciding rules and obligations are those that were written down."""
        demanded = duties(self.decision.obligations) if self.decision.allowed else {}
        again = self.decision.allowed, self.decision.rules, demanded
        return (self.allowed, self.rules, self.obligations) == again


def entry(policy: Policy) -> dict[str, Any]:
    """Return the ledger entry that keeps a policy: every file of it, word for word."""
    files = {path: content.decode("utf-8") for path, content in policy.files.items()}
    return {"kind": "policy", "policy_digest": policy.zone.policy_digest, "files": files}


def replay(entries: Iterable[Mapping[str, Any]]) -> Iterator[Redecided]:
    """Yield every decision of a ledger, made again.

    Args:
        entries: All of a ledger, in order (:func:`zones.ledger.read`).

    Raises:
        LedgerError: A decision rests on a policy that the ledger does not hold, or that does not hold as a policy.
    """
    zone = ""
    policies: dict[str, Policy] = {}
    for found in entries:
        kind = found["kind"]
        if kind == "opened":
            zone = str(found["zone"])
        elif kind == "policy":
            policies[str(found["policy_digest"])] = _loaded(zone, found)
        elif kind == "decision":
            policy = policies.get(str(found["policy_digest"]))
            if policy is None:
                raise LedgerError(f"entry {found['seq']} rests on a policy that the ledger does not hold before it")
            yield Redecided(
                seq=found["seq"],
                allowed=found["decision"] == "allowed",
                rules=tuple(found["rules"]),
                obligations=found["obligations"],
                decision=policy.decide(asked_of(zone, found)),
            )


def _loaded(zone: str, found: Mapping[str, Any]) -> Policy:
    """Return the policy in an entry, which must be the one that it names."""
    with TemporaryDirectory(prefix="rgp") as directory:
        root = Path(directory).resolve()
        for name, text in found["files"].items():
            path = (root / name).resolve()
            if not path.is_relative_to(root):
                raise LedgerError(f"entry {found['seq']} holds a policy file with a path outside: {name!r}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="")
        try:
            policy = Policy.load(root, load_zone(root, zone))
        except (ConfigError, UnknownNameError) as error:
            raise LedgerError(f"entry {found['seq']} holds a policy that cannot be read: {error.message}") from error
    if policy.zone.policy_digest != found["policy_digest"]:
        raise LedgerError(f"entry {found['seq']} holds another policy than the one whose digest it names")
    return policy
