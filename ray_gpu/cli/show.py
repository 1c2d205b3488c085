"""Tables for people: status, nodes, ledger, receipts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_gpu import api, embedded
from ray_gpu.sandbox.controls import describe
from ray_gpu.state import Layout
from zones.ledger import read
from zones.model import sandbox_level


def status(console: Console, state: Path) -> None:
    """Show what runs in a state directory."""
    document = embedded.running(Layout(state))
    if document is None or "nodes" not in document:
        console.print(f"nothing runs in {state}; start it with [bold]ray-gpu up[/]")
        return
    console.print(f"zone {document['zone']}, Ray at {document['address']}, supervisor {document['pid']}")
    console.print(degraded_line(document["degradations"], document["sandbox_degradations"]))
    if document["sandbox_degradations"]:
        console.print(describe(document["sandbox_degradations"]))
    with api.attach(document["zone"], purpose="status", state_dir=state) as session:
        card = session.status()
    console.print(nodes(card["nodes"], document))


def degraded_line(surroundings: list[str], sandbox: list[str]) -> str:
    """Return the line that says how strong everything is: sandbox level, then each reason."""
    level = sandbox_level(sandbox)
    reasons = [*sandbox, *surroundings]
    return f"sandbox level: {'strict' if level == 'strict' else 'degraded'};  degraded: {', '.join(reasons) or 'nothing'}"


def nodes(found: list[dict[str, Any]], document: dict[str, Any]) -> Table:
    """Return the table of Ray nodes."""
    table = Table(title="nodes", title_justify="left")
    for column in ("node", "role", "GPUs", "free", "pid"):
        table.add_column(column)
    for node in sorted(found, key=lambda item: str(item["name"])):
        zone = node["labels"].get("ray-gpu-zone")
        role = f"CPU node of zone {zone}" if zone else f"GPU node, pool {node['labels'].get('ray-gpu-pool')}"
        table.add_row(node["name"], role, f"{node['gpus']:g}", f"{node['gpus_free']:g}",
                      str(document["nodes"].get(node["name"], "")))
    return table


def ledger(console: Console, path: Path, last: int) -> None:
    """Show a ledger's last entries."""
    entries = list(read(path))[-last:]
    console.print(entries_table(entries))


def entries_table(entries: list[Any]) -> Table:
    """Return a table of ledger entries: what was decided, intended and done."""
    table = Table(title="ledger", title_justify="left")
    for column in ("#", "time (UTC)", "what", "who", "data", "where", "rows", "bytes", "why"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        what = entry["kind"] if entry["kind"] != "decision" else f"decision: {entry['decision']}"
        columns = entry.get("columns") or []
        data = entry.get("dataset") or ("arguments" if columns else "")
        shown = f"{data} ({len(columns)} columns)" if entry.get("dataset") else data
        table.add_row(str(entry["seq"]), str(entry["time"])[:19], what, str(entry.get("person", "")), shown,
                      str(entry.get("node") or entry.get("pool") or ""), _number(entry.get("rows")),
                      _number(entry.get("bytes")), ", ".join(entry.get("rules") or []) or str(entry.get("outcome", "")))
    return table


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and value else ""
