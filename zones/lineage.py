"""What derived data sets come from, and that they are allowed no more than that. Pure.

A derived data set is made by a reviewed step (:mod:`zones.steps`) from columns, and segments, of others that the
catalog names. When it is to leave, policy is asked about it and, as if these left themselves, about what was read of
each data set that it comes from, those of theirs too. Only if every answer allows is it allowed, under the strictest of
all obligations. Columns that are carried past a step count where they leave, and nowhere else: a step that does not get
a patient's number cannot put it into another column.

What was really read stands in a document beside the file, which must say what the catalog says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zones.labels import labels
from zones.model import Dataset, EgressRequest, Reading, Zone
from zones.segments import divided, listings, touched

FORMAT = "ray-gpu lineage v1"


def chain(zone: Zone, request: EgressRequest) -> list[EgressRequest]:
    """Return *request* and, for each data set that its own comes from, the request for what was read of that.

    Raises:
        UnknownNameError: The catalog has no such column or segment.
    """
    found, whole = [request], {request.dataset: request}
    for asked in found:
        dataset = zone.datasets.get(asked.dataset)
        for name, reading in dataset.derived.reads.items() if dataset and dataset.derived else ():
            columns = {*reading.columns, *asked.columns.intersection(reading.carries)}
            further = replace(
                asked,
                dataset=name,
                columns=frozenset(columns),
                classes=asked.classes | set(labels(zone, name, columns).values()),
                segments=segments_read(zone.datasets[name], reading),
            )
            # What comes of one data set by several ways is together at the end: it is asked about together, too.
            together = whole[name] = _union(whole.get(name, further), further)
            found += [one for one in dict.fromkeys((further, together)) if one not in found]
    return found


def _union(one: EgressRequest, other: EgressRequest) -> EgressRequest:
    return replace(
        one,
        columns=one.columns | other.columns,
        classes=one.classes | other.classes,
        segments=one.segments | other.segments,
    )


def segments_read(dataset: Dataset, reading: Reading) -> frozenset[str]:
    """Return the segments of a data set that a step reads rows of, with those that they are parts of."""
    if dataset.segments is None:
        return frozenset()
    return touched(dataset.segments, reading.segments or dataset.segments.parts)


def document(
    dataset: Dataset, *, digest: str, rows: int, time: str, parents: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what is written beside the file of a derived data set.

    Args:
        dataset: As the catalog has it.
        digest: SHA-256 of the file that was made, hexadecimal.
        rows: In that file.
        time: When it was made, UTC.
        parents: For each data set that was read, in order: what :func:`parent` returns.
    """
    assert dataset.derived is not None
    return {
        "format": FORMAT,
        "dataset": dataset.name,
        "step": dataset.derived.step,
        "version": dataset.derived.version,
        "step_digest": dataset.derived.digest,
        "digest": digest,
        "rows": rows,
        "time": time,
        "parents": list(parents),
    }


def parent(
    dataset: Dataset,
    reading: Reading,
    *,
    digest: str,
    rows: int,
    lineage: Mapping[str, Any] | None,
    listed: Mapping[str, str],
) -> dict[str, Any]:
    """Return what is written of one data set that was read.

    Args:
        dataset: As the catalog has it.
        reading: What the catalog says is read of it.
        digest: SHA-256 of its file, hexadecimal.
        rows: That were read.
        lineage: What it comes from itself, if it is derived.
        listed: Digests of the data sets that say which rows are in which round.
    """
    return {
        "dataset": dataset.name,
        "columns": list(reading.columns),
        "segments": list(reading.segments),
        "carries": list(reading.carries),
        "divided": _division(dataset, reading),
        "digest": digest,
        "rows": rows,
        "lineage": lineage,
        "listed": dict(listed),
    }


def rounds_read(dataset: Dataset, reading: Reading) -> set[str]:
    """Return the data sets that say which rows are in the rounds that a step reads."""
    return set() if dataset.segments is None else listings(divided(dataset.segments, reading.segments))


def _division(dataset: Dataset, reading: Reading) -> str:
    """Return the digest of how a data set is divided, as far as a step's rows depend on it; ``""``: not at all."""
    if dataset.segments is None or not reading.segments:
        return ""
    return hashlib.sha256(repr(divided(dataset.segments, reading.segments)).encode()).hexdigest()


def problem(datasets: Mapping[str, Dataset], dataset: Dataset, written: Any, digests: Mapping[str, str]) -> str | None:
    """Return why what stands beside a derived data set's file is not about it as it is now, or ``None``.

    Args:
        datasets: All of the catalog's.
        dataset: This one.
        written: What was read there.
        digests: SHA-256 of the files as they are now: of this data set, of each that it is derived from, and of those
            that list the rounds which are read.
    """
    derived = dataset.derived
    assert derived is not None
    if not isinstance(written, dict) or written.get("format") != FORMAT or written.get("dataset") != dataset.name:
        return "what it was derived from is not written beside it"
    if written.get("digest") != digests[dataset.name]:
        return "its file was changed since it was derived"
    if (written.get("step"), written.get("version")) != (derived.step, derived.version):
        return "the catalog names another step, or another version of it, than it was made by"
    if written.get("step_digest") != derived.digest:
        return f"step {derived.step} was changed since, but not its version"
    try:
        read = {
            str(one["dataset"]): Reading(
                columns=tuple(one["columns"]), segments=tuple(one["segments"]), carries=tuple(one["carries"])
            )
            for one in written["parents"]
        }
        files = [(str(one["dataset"]), one["digest"]) for one in written["parents"]]
        files += [listed for one in written["parents"] for listed in one["listed"].items()]
        divisions = [one["divided"] for one in written["parents"]]
    except (AttributeError, KeyError, TypeError):
        return "what it was derived from is not written beside it"
    if list(read.items()) != list(derived.reads.items()):
        return "the catalog names other columns or segments than were read"
    if divisions != [_division(datasets[name], reading) for name, reading in read.items()]:
        return "the catalog divides what it was derived from in another way"
    changed = [name for name, digest in files if digest != digests.get(name)]
    return f"{changed[0]}, which it was derived from, was changed since" if changed else None
