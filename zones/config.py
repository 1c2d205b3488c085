"""Reads ``policies/<zone>/*.yaml`` into :class:`zones.model.Zone`. Reads files; nothing else.

Rules:

1. Each file is read once; what is parsed is what the policy digest covers.
2. Every error is a :class:`ConfigError` with file and line, and the files are strict: see :mod:`zones.document`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, Strict, model_validator

from zones.approvals import approved
from zones.document import Document, FileModel, Id, Ids, Loc, distinct, read_text_file
from zones.environments import DIGEST, Environment
from zones.errors import ConfigError, UnknownNameError, did_you_mean
from zones.hours import Hours
from zones.model import (
    RECEIPT_IDS,
    Carrier,
    Dataset,
    Derivation,
    NodeShare,
    ObligationRule,
    Obligations,
    Padding,
    Reading,
    Segments,
    Shuffle,
    SmallBytes,
    Zone,
    check_id,
    digest,
)
from zones.note import VerifierKey
from zones.segments import ROUND_COLUMN, divided, listings, names, rounds
from zones.steps import ROW_COLUMN, STEPS_FILE, Step, parse

SCHEMA_FILE = "schema.cedarschema"

_APPROVED, _ENVIRONMENTS = "approved", "environments"
#: Formats that a gateway can map into memory or stream.
_DATA_SUFFIXES = frozenset({".arrow", ".feather", ".parquet"})
_BLOCKS = re.compile(r"blocks\(([1-9][0-9]{0,5})\)")


def zone_names(policies_dir: Path) -> list[str]:
    """Return the names of the zones that *policies_dir* describes."""
    return sorted(path.parent.name for path in policies_dir.glob("*/zone.yaml"))


def load_zone(policies_dir: Path, name: str) -> Zone:
    """Read and check the files of one zone.

    Raises:
        UnknownNameError: *policies_dir* has no ``<name>/zone.yaml``.
        ConfigError: A file is missing, cannot be read, or does not say what it must.
    """
    known = zone_names(policies_dir)
    if name not in known:
        raise UnknownNameError.of("zone", name, known)
    folder = policies_dir / name
    try:
        check_id(name, what="zone name")
    except ValueError as problem:
        raise ConfigError(f"{folder}: {problem}; rename the directory", file=str(folder)) from problem
    files = read_policy_files(policies_dir, zone_paths(policies_dir, name))
    zone_document = Document(files[f"{name}/zone.yaml"], folder / "zone.yaml")
    zone_file = zone_document.check(_ZoneFile)
    _check_pool_files(zone_document, zone_file, policies_dir)
    files |= read_policy_files(policies_dir, [pool_path(pool) for pool in zone_file.pools])
    steps = parse(files.get(steps_path(name), b"").decode("utf-8"), str(folder / STEPS_FILE))
    datasets = _datasets(Document(files[f"{name}/catalog.yaml"], folder / "catalog.yaml"), zone_file.classes, steps)
    zone = _zone(name, zone_document, zone_file, datasets, files_digest(files))
    officers = _officers(zone_document, zone_file.officers)
    approved, disapproved = _approved(name, folder, officers, files)
    environments = _environments(folder, files)
    return replace(zone, officers=officers, approved=approved, disapproved=disapproved, environments=environments)


def zone_paths(policies_dir: Path, name: str) -> list[str]:
    """Return the files that describe a zone, relative to the policies directory, but for its pools' files."""
    more = [
        f"{name}/{part}/{path.name}"
        for part, pattern in ((_APPROVED, "*.note"), (_ENVIRONMENTS, "*.json"))
        for path in (policies_dir / name / part).glob(pattern)
    ]
    steps = [steps_path(name)] if (policies_dir / steps_path(name)).exists() else []
    return [f"{name}/zone.yaml", f"{name}/catalog.yaml", egress_path(name), SCHEMA_FILE, *steps, *sorted(more)]


def approval_path(name: str, function: str) -> str:
    """Return where a zone's approval of a function belongs, relative to the policies directory."""
    return f"{name}/{_APPROVED}/{function[:16]}.note"


def steps_path(name: str) -> str:
    """Return where a zone's steps lie, if it has any, relative to the policies directory."""
    return f"{name}/{STEPS_FILE}"


def egress_path(name: str) -> str:
    """Return where a zone's Cedar policy lies, relative to the policies directory."""
    return f"{name}/egress.cedar"


def pool_path(pool: str) -> str:
    """Return where a pool's Cedar policy lies, relative to the policies directory."""
    return f"pools/{pool}.cedar"


def read_policy_files(policies_dir: Path, paths: Sequence[str]) -> dict[str, bytes]:
    """Return each of *paths*, as given, with its content.

    Raises:
        ConfigError: A file is missing, cannot be read, or is not UTF-8.
    """
    return {path: read_text_file(policies_dir / path) for path in paths}


def files_digest(files: Mapping[str, bytes]) -> str:
    """Return one SHA-256, hexadecimal, over sorted paths and contents."""
    return digest({path: hashlib.sha256(content).hexdigest() for path, content in files.items()})


def _shuffle(text: str) -> str:
    if text not in ("rows", "none") and not _BLOCKS.fullmatch(text):
        raise ValueError(f"shuffle is rows, none or blocks(n) with n from 1 to 999999, not {text!r}")
    return text


def _digests(texts: list[str]) -> list[str]:
    for text in texts:
        if not DIGEST.fullmatch(text):
            raise ValueError(f"an environment is named by its digest, as `ray-gpu env` prints it, not {text!r}")
    return texts


def _officer(text: str) -> str:
    return str(VerifierKey.parse(text))


def _hours(text: str) -> str:
    return Hours.parse(text).text


def _endpoint(text: str) -> str:
    network, _, ports = text.rpartition(":")
    low, dash, high = ports.partition("-")
    ipaddress.ip_network(network)
    if not (dash and low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high) <= 65535):
        raise ValueError(f"an endpoint is network:first-last, e.g. 10.0.0.0/8:20000-29999, not {text!r}")
    return text


def endpoint_allowed(endpoints: Sequence[str], host: str, port: int) -> bool:
    """Say whether one of a zone's *endpoints* covers the IP address *host* and *port*. A host name never is."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for endpoint in endpoints:
        network, _, ports = endpoint.rpartition(":")
        low, _, high = ports.partition("-")
        if address in ipaddress.ip_network(network) and int(low) <= port <= int(high):
            return True
    return False


def _data_path(text: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or path.suffix not in _DATA_SUFFIXES:
        raise ValueError(
            f"path is relative to the zone's data directory, without '..', and ends in "
            f"{', '.join(sorted(_DATA_SUFFIXES))}, not {text!r}"
        )
    return text


_SomeIds = Annotated[Ids, Field(min_length=1)]
_Name = Annotated[str, Field(min_length=1, max_length=200)]
_ShuffleText = Annotated[str, AfterValidator(_shuffle)]
_SomeNames = Annotated[list[_Name], Field(min_length=1), AfterValidator(distinct)]
#: Caps of a lease's and a session's life, seconds: a day, because a lease key should not outlive a shift by much.
_Seconds = Annotated[int, Field(gt=0, le=86400)]


class _SmallBytesPart(FileModel):
    classification: Id
    max_bytes: int = Field(gt=0)
    max_session_bytes: int = Field(gt=0)


class _NodeSharePart(FileModel):
    percent: int = Field(ge=1, le=99)
    window_s: Annotated[int, Field(ge=60, le=366 * 86400)] = 86400


class _ObligationsPart(FileModel):
    """The keys of obligations, in zone.yaml's top level and in each rule."""

    shuffle: _ShuffleText | None = None
    shuffle_window: Annotated[int, Field(gt=0)] | None = None
    padding: Annotated[Padding, Strict(False)] | None = None
    max_rows: Annotated[int, Field(gt=0)] | None = None
    min_shards: Annotated[int, Field(ge=1, le=4096)] | None = None
    max_node_share: _NodeSharePart | None = None
    accepted_degradations: Ids | None = None
    exclusive_gpu: bool | None = None
    gpu_kinds: _SomeNames | None = None
    environments: Annotated[_SomeNames, AfterValidator(_digests)] | None = None
    resident_shards: bool | None = None
    max_lease_s: _Seconds | None = None
    max_session_s: _Seconds | None = None
    hours: Annotated[str, AfterValidator(_hours)] | None = None
    purposes: _SomeNames | None = None
    reviewed_functions_only: bool | None = None


class _RulePart(_ObligationsPart):
    pools: _SomeIds | None = None
    datasets: _SomeNames | None = None


class _ZoneFile(_ObligationsPart):
    classes: _SomeIds
    default_class: Id
    small_bytes: _SmallBytesPart | None = None
    pools: _SomeIds
    endpoints: list[Annotated[str, AfterValidator(_endpoint)]] = Field(min_length=1)
    carrier: Annotated[Carrier, Strict(False)] | None = None
    gateways: int = Field(default=1, ge=1, le=64)
    officers: list[Annotated[str, AfterValidator(_officer)]] = Field(default_factory=list)
    obligations: list[_RulePart] = Field(default_factory=list)


class _SegmentsPart(FileModel):
    parts: Annotated[dict[Id, Annotated[int, Field(ge=1, le=100)]], Field(min_length=2)] | None = None
    folds: Annotated[int, Field(ge=2, le=100)] | None = None
    rounds: Annotated[int, Field(ge=1, le=1000)] | None = None
    listed_in: _Name | None = None
    by: _Name | None = None
    stratify: _Name | None = None
    within: dict[Id, _SegmentsPart] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if sum(given is not None for given in (self.parts, self.folds, self.rounds)) != 1:
            raise ValueError("segments have either parts with percents, or a number of folds, or a number of rounds")
        if (self.rounds is None) != (self.listed_in is None):
            raise ValueError("rounds have listed_in, the data set that says what is in which, and nothing else has")
        if self.rounds is not None and (self.by is None or self.stratify is not None):
            raise ValueError("rounds are by a column, whose values listed_in lists, and not stratified")
        if self.rounds is not None and self.within:
            raise ValueError("rounds are divided no further: rows that are labelled later would change sides")
        if self.parts is not None and sum(self.parts.values()) != 100:
            raise ValueError(f"the percents of parts make {sum(self.parts.values())}, not 100")
        return self

    def segments(self) -> Segments:
        """Return what this says."""
        folds = {f"fold-{number}": 1 for number in range(1, (self.folds or 0) + 1)}
        return Segments(
            parts=self.parts or folds or rounds(self.rounds or 0),
            listed_in=self.listed_in,
            by=self.by,
            stratify=self.stratify,
            within={name: inner.segments() for name, inner in self.within.items()},
        )


class _ReadingPart(FileModel):
    columns: _SomeNames
    segments: _SomeNames | None = None
    carries: _SomeNames | None = None


class _DerivedPart(FileModel):
    step: _Name
    version: Annotated[int, Field(ge=1)]
    reads: Annotated[dict[_Name, _ReadingPart], Field(min_length=1)]

    def derivation(self, digest: str) -> Derivation:
        """Return what this says of a step with this digest."""
        reads = {
            name: Reading(
                columns=tuple(part.columns), segments=tuple(part.segments or ()), carries=tuple(part.carries or ())
            )
            for name, part in self.reads.items()
        }
        return Derivation(step=self.step, version=self.version, digest=digest, reads=reads)


class _DatasetPart(FileModel):
    path: Annotated[str, AfterValidator(_data_path)]
    description: str = ""
    columns: dict[_Name, str] | None = Field(default=None, min_length=1)
    same_columns_as: _Name | None = None
    segments: _SegmentsPart | None = None
    derived: _DerivedPart | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.columns is None) == (self.same_columns_as is None):
            raise ValueError("a data set has either columns or same_columns_as")
        return self


class _CatalogFile(FileModel):
    datasets: dict[_Name, _DatasetPart]


def _check_pool_files(document: Document, zone_file: _ZoneFile, policies_dir: Path) -> None:
    for index, pool in enumerate(zone_file.pools):
        path = policies_dir / pool_path(pool)
        if not path.is_file():
            known = sorted(file.stem for file in path.parent.glob("*.cedar"))
            document.refuse(("pools", index), f"pool {pool!r} has no policy {path}{did_you_mean(pool, known)}")


def _check_known(document: Document, loc: Loc, what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        document.refuse(loc, f"no {what} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")


def _check_accepted(document: Document, loc: Loc, ids: Sequence[str]) -> None:
    for place, name in enumerate(ids):
        _check_known(document, (*loc, place), "degradation", name, sorted(RECEIPT_IDS))


def _datasets(document: Document, classes: Sequence[str], steps: Mapping[str, Step]) -> dict[str, Dataset]:
    parts = document.check(_CatalogFile).datasets
    for name, part in parts.items():
        for column, classification in (part.columns or {}).items():
            _check_known(document, ("datasets", name, "columns", column), "class", classification, classes)
        other = part.same_columns_as
        if other is not None:
            written_out = [known for known in parts if parts[known].columns is not None]
            _check_known(document, ("datasets", name, "same_columns_as"), "data set with columns", other, written_out)
    found = {}
    for name, part in parts.items():
        columns = dict(part.columns or parts[str(part.same_columns_as)].columns or {})
        if part.segments is not None:
            _check_segments(document, ("datasets", name, "segments"), part.segments, list(columns))
        if part.derived is not None:
            _check_step(document, ("datasets", name, "derived"), part.derived, steps)
        found[name] = Dataset(
            name=name,
            path=part.path,
            description=part.description,
            columns=columns,
            segments=None if part.segments is None else part.segments.segments(),
            derived=None if part.derived is None else part.derived.derivation(steps[part.derived.step].digest),
        )
    _check_paths(document, parts)
    for name, part in parts.items():
        if part.segments is not None:
            _check_rounds(document, ("datasets", name, "segments"), part.segments, found)
        if (derived := found[name].derived) is not None:
            _check_reads(document, name, derived, found, classes)
    return found


def _check_segments(document: Document, loc: Loc, part: _SegmentsPart, columns: Sequence[str]) -> None:
    for key in ("by", "stratify"):
        name = getattr(part, key)
        if name is not None:
            _check_known(document, (*loc, key), "column", name, columns)
    for name, inner in part.within.items():
        _check_known(document, (*loc, "within", name), "part", name, list(part.segments().parts))
        _check_segments(document, (*loc, "within", name), inner, columns)


def _check_paths(document: Document, parts: Mapping[str, _DatasetPart]) -> None:
    """Check that what is derived has a file of its own: it would be written over another's, or read as another."""
    of_path: dict[PurePosixPath, str] = {}
    for name, part in parts.items():
        other = of_path.setdefault(PurePosixPath(part.path), name)
        if other != name and (part.derived or parts[other].derived):
            document.refuse(("datasets", name, "path"), f"{part.path} is the file of {other} already")


def _check_rounds(document: Document, loc: Loc, part: _SegmentsPart, datasets: Mapping[str, Dataset]) -> None:
    """Check that the data set that lists rounds is there, and has both columns."""
    if part.listed_in is not None and part.by is not None:
        _check_known(document, (*loc, "listed_in"), "data set", part.listed_in, list(datasets))
        for column in (part.by, ROUND_COLUMN):
            _check_known(document, (*loc, "listed_in"), "column", column, list(datasets[part.listed_in].columns))
    for name, inner in part.within.items():
        _check_rounds(document, (*loc, "within", name), inner, datasets)


def _check_step(document: Document, loc: Loc, part: _DerivedPart, steps: Mapping[str, Step]) -> None:
    """Check that a derived data set's step is there, in this version, and takes as many data sets."""
    _check_known(document, (*loc, "step"), "step", part.step, sorted(steps))
    step = steps[part.step]
    if step.version != part.version:
        document.refuse((*loc, "version"), f"step {part.step} has version {step.version}, not {part.version}")
    if len(step.parameters) != len(part.reads):
        count = len(step.parameters)
        document.refuse((*loc, "reads"), f"step {part.step} takes {count} data sets: {', '.join(step.parameters)}")


def _check_reads(
    document: Document, name: str, derived: Derivation, datasets: Mapping[str, Dataset], classes: Sequence[str]
) -> None:
    """Check that what a derived data set is made of is there, does not come from it, and has no higher class."""
    loc: Loc = ("datasets", name, "derived", "reads")
    highest, where, own = -1, "", datasets[name].columns
    carriers = [other for other, reading in derived.reads.items() if reading.carries]
    if len(carriers) > 1:
        document.refuse((*loc, carriers[1], "carries"), "rows are those of one data set, which alone can carry columns")
    if ROW_COLUMN in own and carriers:
        document.refuse((*loc, carriers[0], "carries"), f"a step has the column {ROW_COLUMN} for itself then")
    for other, reading in derived.reads.items():
        _check_known(document, (*loc, other), "data set", other, list(datasets))
        parent = datasets[other]
        if any(name in _ancestors(datasets, one) for one in _needed(datasets, other, reading)):
            document.refuse((*loc, other), f"{other} comes from {name} itself")
        for place, column in enumerate(reading.columns):
            _check_known(document, (*loc, other, "columns", place), "column", column, list(parent.columns))
            rank = classes.index(parent.columns[column])
            if rank > highest:
                highest, where = rank, f"{other}.{column}"
        for place, segment in enumerate(reading.segments):
            known = [] if parent.segments is None else list(names(parent.segments))
            _check_known(document, (*loc, other, "segments", place), "segment", segment, known)
        for place, column in enumerate(reading.carries):
            for columns in (parent.columns, own):
                _check_known(document, (*loc, other, "carries", place), "column", column, list(columns))
            if column in reading.columns:
                document.refuse(
                    (*loc, other, "carries", place), f"{column} is read, so it is not carried past the step"
                )
            if classes.index(own[column]) < classes.index(parent.columns[column]):
                was = parent.columns[column]
                document.refuse(("datasets", name, "columns", column), f"{column} is {own[column]}, and was {was}")
    for column, classification in own.items():
        if classes.index(classification) < highest:
            document.refuse(
                ("datasets", name, "columns", column),
                f"{column} is {classification}, and its step reads {where}, which is {classes[highest]}; a derived "
                "column has no lower class than anything that its step reads",
            )


def _ancestors(datasets: Mapping[str, Dataset], name: str) -> set[str]:
    """Return a data set's name, and those of all that it comes from."""
    found, left = set(), [name]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            derived = datasets[one].derived if one in datasets else None
            for other, reading in derived.reads.items() if derived else ():
                left += _needed(datasets, other, reading)
    return found


def _needed(datasets: Mapping[str, Dataset], name: str, reading: Reading) -> list[str]:
    """Return what a step needs for what it reads of a data set: that one, and what lists the rounds that it reads."""
    parted = datasets[name].segments if name in datasets else None
    return [name, *(listings(divided(parted, reading.segments)) if parted else ())]


def _zone(name: str, document: Document, file: _ZoneFile, datasets: Mapping[str, Dataset], policy_digest: str) -> Zone:
    _check_accepted(document, ("accepted_degradations",), file.accepted_degradations or ())
    _check_divisible(document, ("max_node_share", "percent"), file.max_node_share, file.gateways)
    _check_known(document, ("default_class",), "class", file.default_class, file.classes)
    if file.default_class != file.classes[-1]:
        document.refuse(("default_class",), f"must be the highest class, {file.classes[-1]}")
    small = file.small_bytes
    if small is not None:
        _check_known(document, ("small_bytes", "classification"), "class", small.classification, file.classes)
    return Zone(
        name=name,
        classes=tuple(file.classes),
        default_class=file.default_class,
        datasets=datasets,
        small_bytes=None if small is None else SmallBytes(**small.model_dump()),
        pools=tuple(file.pools),
        endpoints=tuple(file.endpoints),
        policy_digest=policy_digest,
        obligations=_obligations(file, None),
        obligation_rules=tuple(_rules(document, file, datasets)),
        carrier=file.carrier,
        gateways=file.gateways,
    )


def _officers(document: Document, texts: Sequence[str]) -> tuple[VerifierKey, ...]:
    keys = [VerifierKey.parse(text) for text in texts]
    names = [key.name for key in keys]
    for index, name in enumerate(names):
        if name in names[:index]:
            document.refuse(("officers", index), f"two keys have the name {name}")
    return tuple(keys)


def _approved(
    name: str, folder: Path, officers: Sequence[VerifierKey], files: Mapping[str, bytes]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the functions that were approved with their names, and which files approve none, and why."""
    found, not_held = {}, []
    for path, content in files.items():
        if path.endswith(".note"):
            file = folder.parent / path
            try:
                approval = approved(content.decode("utf-8"), zone=name, officers=officers)
            except ValueError as problem:
                # Not approved is the safe side, and where an officer's key was taken out it is what is wanted.
                not_held.append(f"{file}: {problem}")
                continue
            found[approval.function] = approval.name
    return found, tuple(not_held)


def _environments(folder: Path, files: Mapping[str, bytes]) -> dict[str, Environment]:
    """Return the published environments that the zone knows, by the names of their files."""
    found = {}
    for path, content in files.items():
        if path.endswith(".json"):
            name, file = PurePosixPath(path).stem, str(folder.parent / path)
            try:
                found[check_id(name, what="name of an environment")] = Environment.parse(json.loads(content))
            except ValueError as problem:
                raise ConfigError(
                    f"{file}: {problem}; copy the environment.json that `ray-gpu env build` wrote", file=file
                ) from None
    return found


def _rules(document: Document, file: _ZoneFile, datasets: Mapping[str, Dataset]) -> list[ObligationRule]:
    rules = []
    for index, part in enumerate(file.obligations):
        _check_accepted(document, ("obligations", index, "accepted_degradations"), part.accepted_degradations or ())
        _check_divisible(
            document, ("obligations", index, "max_node_share", "percent"), part.max_node_share, file.gateways
        )
        for place, pool in enumerate(part.pools or ()):
            _check_known(document, ("obligations", index, "pools", place), "pool", pool, file.pools)
        for place, dataset in enumerate(part.datasets or ()):
            _check_known(document, ("obligations", index, "datasets", place), "data set", dataset, list(datasets))
        rules.append(
            ObligationRule(
                pools=None if part.pools is None else frozenset(part.pools),
                datasets=None if part.datasets is None else frozenset(part.datasets),
                obligations=_obligations(file, part),
            )
        )
    return rules


def _check_divisible(document: Document, loc: Loc, share: _NodeSharePart | None, gateways: int) -> None:
    """Refuse a share of which not every gateway gets a whole percent."""
    if share is not None and share.percent < gateways:
        document.refuse(loc, f"{gateways} gateways divide it, so it is at least {gateways}, not {share.percent}")


#: How a key's value in the file becomes that of :class:`Obligations`, where it is another.
_MEANINGS: Mapping[str, Callable[[Any], Any]] = {
    "accepted_degradations": frozenset,
    "environments": frozenset,
    "purposes": frozenset,
    "gpu_kinds": tuple,
    "hours": Hours.parse,
    "max_node_share": lambda part: NodeShare(**part),
}


def _obligations(file: _ZoneFile, part: _RulePart | None) -> Obligations:
    """Return what *part* says, and the zone's own value for each key that it leaves out."""
    said: dict[str, Any] = {}
    for key in _ObligationsPart.model_fields:
        value = getattr(part, key, None)
        value = getattr(file, key) if value is None else value
        if isinstance(value, _NodeSharePart):
            # Each of the zone's gateways counts for itself, so each may give its part of it.
            value = value.model_dump() | {"percent": value.percent // file.gateways}
        if value is not None:
            said[key] = _MEANINGS.get(key, lambda same: same)(value)
    shuffle = said.pop("shuffle", Shuffle.ROWS.value)
    if blocks := _BLOCKS.fullmatch(shuffle):
        return Obligations(shuffle=Shuffle.BLOCKS, block_rows=int(blocks[1]), **said)
    return Obligations(shuffle=Shuffle(shuffle), **said)
