"""Golden decisions: what a zone's officer expects its policy to answer, in ``policies/<zone>/decisions.yaml``.

Reads files. The file is no part of the policy: it decides nothing, and no digest covers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from zones.document import Document, FileModel, Id, distinct, read_text_file
from zones.errors import UnknownNameError
from zones.model import Decision, EgressRequest, Zone
from zones.policy import Policy
from zones.review import SOMEBODY, completed

_Names = Annotated[list[str], Field(min_length=1), AfterValidator(distinct)]


class _Part(FileModel):
    name: Annotated[str, Field(min_length=1, max_length=200)]
    person: str = SOMEBODY
    groups: Annotated[list[Id], AfterValidator(distinct)] = Field(default_factory=list)
    pool: Id | None = None
    purpose: str = ""
    dataset: str = ""
    columns: _Names | None = None
    segments: _Names | None = None
    reviewed: bool = False
    expect: Literal["allowed", "refused"]
    rules: _Names | None = None


class _File(FileModel):
    decisions: Annotated[list[_Part], Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """One golden decision."""

    #: ``file:line``.
    where: str
    name: str
    request: EgressRequest
    allowed: bool
    #: Ids of the rules that must decide; ``None`` when any may.
    rules: frozenset[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A golden decision beside what policy decides."""

    golden: Golden
    decision: Decision

    @property
    def holds(self) -> bool:
        """Whether policy decides so, by these rules."""
        golden = self.golden
        same = golden.rules is None or golden.rules == set(self.decision.rules)
        return golden.allowed == self.decision.allowed and same


def golden_path(policies_dir: Path, zone: str) -> Path:
    """Return where a zone's golden decisions lie."""
    return policies_dir / zone / "decisions.yaml"


def read(path: Path, zone: Zone) -> Sequence[Golden]:
    """Return the golden decisions in a file.

    Raises:
        ConfigError: It is missing, or wrong; file and line say where.
    """
    document = Document(read_text_file(path), path)
    return list(_parsed(document, document.check(_File).decisions, zone))


def _parsed(document: Document, parts: Sequence[_Part], zone: Zone) -> Iterator[Golden]:
    for index, part in enumerate(parts):
        loc = ("decisions", index)
        pool = part.pool or zone.pools[0]
        if pool not in zone.pools:
            document.refuse((*loc, "pool"), str(UnknownNameError.of("pool", pool, zone.pools).message))
        try:
            asked = EgressRequest(
                zone=zone.name,
                pool=pool,
                person=part.person,
                groups=frozenset(part.groups),
                purpose=part.purpose,
                dataset=part.dataset,
                columns=frozenset(part.columns or ()),
                segments=frozenset(part.segments or ()),
                function_reviewed=part.reviewed,
            )
            request = completed(zone, asked)
        except UnknownNameError as error:
            where = {"column": "columns", "segment": "segments"}.get(error.kind, "dataset")
            document.refuse((*loc, where), error.message)
        yield Golden(
            where=f"{document.path}:{document.line((*loc, 'name'))}",
            name=part.name,
            request=request,
            allowed=part.expect == "allowed",
            rules=None if part.rules is None else frozenset(part.rules),
        )


def outcomes(policy: Policy, goldens: Sequence[Golden]) -> list[Outcome]:
    """Put every golden decision's question to *policy*."""
    return [Outcome(golden=golden, decision=policy.decide(golden.request)) for golden in goldens]
