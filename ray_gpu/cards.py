"""How a notebook shows sessions, nodes, calls and receipts: as HTML, in words that ``repr`` has too. Pure."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> str:
    """Return a table; all text is escaped."""
    made = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    caption = f"<caption style='caption-side:top;text-align:left'><b>{html.escape(title)}</b></caption>"
    above = f"<thead><tr>{made}</tr></thead>" if made else ""
    return f"<table>{caption if title else ''}{above}<tbody>{body}</tbody></table>"


def session(status: Mapping[str, Any], *, level: str, closed: bool) -> str:
    """Return a session's card: whose it is, how it is confined, what functions can import, and its leases."""
    rows = [
        ("zone", status["zone"]),
        ("person", status["person"]),
        ("purpose", status["purpose"] or "none was given"),
        ("sandboxes", "closed" if closed else level),
        ("carrier", status["carrier"]),
        ("pools", ", ".join(status["pools"])),
    ]
    leases = status["leases"]
    more = _environments(status["environments"]) + (_leases(leases) if leases else "")
    return table((), rows, title="session") + ("" if closed else more)


def _environments(environments: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the environments that are known, or nothing where none is."""
    rows = [
        (one["name"], one["digest"][:12], ", ".join(one["nodes"]), ", ".join(one["differs"]) or "no")
        for one in environments
    ]
    head = ("name", "digest", "seen on", "differs from here")
    return table(head, sorted(rows), title="environments") if rows else ""


def _leases(leases: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (one["node"], one["device"], one["level"], f"{one['gpu_milli'] / 1000:g}", ", ".join(one["differs"]) or "no")
        for one in leases
    ]
    return table(("node", "computes with", "sandbox", "GPUs", "differs from here"), sorted(rows), title="leases")


def nodes(found: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of the cluster's nodes."""
    rows = [
        (one["name"], _labels(one["labels"]), _free(one)) for one in sorted(found, key=lambda node: str(node["name"]))
    ]
    return table(("node", "labels", "free GPUs"), rows, title="nodes")


def _labels(labels: Mapping[str, str]) -> str:
    """Return a node's labels, without those that Ray gives itself."""
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items()) if not key.startswith("ray.io/"))


def _free(node: Mapping[str, Any]) -> str:
    return f"{node['gpus_free']:g} of {node['gpus']:g}" if node["gpus"] else ""


def receipts(found: Iterable[Mapping[str, Any]]) -> str:
    """Return the table of a session's receipts: what custodians signed of its leases."""
    rows = [
        (
            one["node"],
            one["device"],
            ", ".join(one["degradations"]) or "nothing",
            one["calls"],
            one["shards"],
            f"{one['received_bytes']:,}",
            one["exit"],
        )
        for one in (dict(signed["receipt"]) for signed in found)
    ]
    head = ("node", "computed with", "missing", "calls", "shards", "bytes received", "ended")
    return table(head, sorted(rows), title="receipts, signed by the nodes' custodians")


def call(*, done: bool, error: BaseException | None, report: Mapping[str, Any]) -> str:
    """Return what is known of a call."""
    state = "running" if not done else f"{type(error).__name__}: {error}" if error is not None else "done"
    rows: list[tuple[str, Any]] = [("state", state)]
    if "nodes" in report:
        rows.append(("nodes", ", ".join(f"{node}: {count}" for node, count in sorted(report["nodes"].items()))))
    rows += [
        (name, f"{report[key]:,}") for name, key in (("rows", "rows"), ("bytes sent", "sent_bytes")) if key in report
    ]
    return table((), rows, title="call")
