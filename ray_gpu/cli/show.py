"""What people see: how strong everything is, processes, nodes, ledger entries, receipts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ray_gpu import attaching, embedded
from ray_gpu.arrays import STAND_IN
from ray_gpu.cli import processes
from ray_gpu.controls import CONTROLS
from ray_gpu.sandbox import boundary
from ray_gpu.state import Layout
from zones.errors import LedgerCorruptError
from zones.ledger import read
from zones.model import sandbox_level

#: From here on tables have a column more.
WIDE = 110
_STAND_IN_ID = "numpy-stand-in"


# -- how strong everything is -------------------------------------------------------------------


def missing(document: Mapping[str, Any] | None) -> list[str]:
    """Return the ids of all controls that are missing, the sandbox's own first.

    Args:
        document: From :func:`ray_gpu.embedded.running`; ``None`` for a cluster that this process is about to start.
    """
    if document is None:
        sandbox, zone = list(boundary.degradations()), ["embedded-vault"]
        zone += [] if os.geteuid() == 0 else ["self-enforced"]
        zone += ["uncaged-ray"] if boundary.survey().mode == "none" else []
        zone += ["shared-network"]
    else:
        sandbox, zone = list(document["sandbox_degradations"]), list(document["degradations"])
    return list(dict.fromkeys([*sandbox, *zone, *([] if boundary.gpu_devices() else [_STAND_IN_ID])]))


def degraded_line(ids: Sequence[str]) -> Text:
    """Return the line that says how strong everything is. It begins with ``degraded:`` and is never folded."""
    level = "strict" if sandbox_level(ids) == "strict" else "degraded"
    text = f"degraded: {', '.join(ids) or 'nothing'} (sandbox level: {level})"
    return Text(text, style="yellow" if ids else "green", no_wrap=True, overflow="ignore")


def meanings(ids: Iterable[str]) -> Table:
    """Return one line for each missing control: what its absence means."""
    table = _grid("dim yellow", "dim")
    for item in ids:
        known = CONTROLS.get(item)
        table.add_row(f"  {item}", known.meaning if known else "This version does not know it.")
    return table


def device() -> str:
    """Return what computes on this machine: the GPU's name, or that NumPy stands in for one."""
    name = boundary.device_hint()
    return STAND_IN if name == "numpy stand-in" else name


# -- status -------------------------------------------------------------------------------------


def status(console: Console, state: Path) -> bool:
    """Show what runs in a state directory; return whether anything does."""
    document = embedded.running(Layout(state))
    if document is None or "nodes" not in document:
        console.print(f"nothing runs in {state}; start it with [bold]ray-gpu up[/]", soft_wrap=True)
        return False
    ids = missing(document)
    console.print(degraded_line(ids), soft_wrap=True)
    console.print(meanings(ids))
    carried = f"zone [bold]{document['zone']}[/], carrier {document['carrier']}"
    console.print(f"\n{carried}; Ray at {document['address']}; computes with: {device()}")
    with attaching.attach(document["zone"], purpose="status", state_dir=state) as session:
        card = session.status()
    console.print(nodes(card["nodes"]))
    console.print(process_table(processes.rows(document), wide=console.width >= WIDE))
    return True


def nodes(found: Iterable[Mapping[str, Any]], *, computing: bool = True) -> Table:
    """Return the table of Ray's nodes; with what they compute with, where all of them are on this machine."""
    table = _table("node", "labels", ">free", *(["computes with"] if computing else []))
    for node in sorted(found, key=lambda item: str(item["name"])):
        what = labels(node["labels"]) + ("" if node["alive"] else " (gone)")
        free = f"{node['gpus_free']:g} of {node['gpus']:g}" if node["gpus"] else ""
        computes = device() if node["gpus"] else "nothing"
        table.add_row(node["name"], what.strip(), free, *([computes] if computing else []))
    return table


def labels(found: Mapping[str, str]) -> str:
    """Return our labels of a node but for its name: ``"zone=clinic"``, ``"pool=shared"``, nothing for a head."""
    ours = {key.removeprefix("ray-gpu-"): value for key, value in found.items() if key.startswith("ray-gpu-")}
    return ", ".join(f"{key}={value}" for key, value in sorted(ours.items()) if key != "node")


def process_table(rows: Iterable[processes.Row], *, wide: bool) -> RenderableType:
    """Return the table of processes: names, uids, what confines them, and, where there is room, what they hold.

    Those of one name that are confined alike share a line.
    """
    table = _table("process", "where", "uid", "confined by", *(["holds"] if wide else []))
    alike: dict[tuple[str, str], list[processes.Row]] = {}
    for row in rows:
        alike.setdefault((row.name, row.confined_by), []).append(row)
    for (name, confined_by), group in alike.items():
        count = sum(row.count for row in group)
        places = dict.fromkeys(row.where for row in group)
        uids = _ranges({row.uid for row in group})
        held = [processes.HOLDS[name]] if wide else []
        shown = name if count == 1 else f"{name} ({count})"
        table.add_row(shown, ", ".join(places), uids, confined_by, *held)
    landlock = ", Landlock on top" if "no-landlock" not in boundary.degradations() else ""
    return Group(table, Text(f"as the kernel tells in /proc{landlock}", style="dim"))


def _ranges(numbers: set[int]) -> str:
    """Return numbers as text, neighbours as a range: ``"0, 61001-61003"``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# -- ledger and receipts ------------------------------------------------------------------------


def ledger(console: Console, path: Path, last: int) -> None:
    """Show a ledger's last entries.

    Raises:
        LedgerCorruptError: An entry does not verify; those before it were shown.
    """
    found, broken = [], None
    try:
        for entry in read(path):
            found.append(entry)
    except LedgerCorruptError as error:
        broken = error
    console.print(entries_table(found[-last:]))
    if broken is not None:
        raise broken


def entries_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of ledger entries, each in words: what was decided, intended and done."""
    days = {str(entry["time"])[:10] for entry in entries}
    # One day goes into the heading; several stand in each line.
    heading, start = (days.pop(), 11) if len(days) == 1 else ("UTC", 0)
    table = _table(">#", heading, "entry", "what it says")
    for entry in entries:
        style = "bold red" if entry.get("decision") == "refused" else None
        time = str(entry["time"])[start:19].replace("T", " ")
        table.add_row(str(entry["seq"]), time, _name(entry), _words(entry), style=style)
    return table


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["decision"] if entry["kind"] == "decision" else entry["kind"])


def _words(entry: Mapping[str, Any]) -> str:
    """Say in words what an entry records."""
    kind, node = entry["kind"], entry.get("node") or "a node"
    if kind == "decision":
        return f"{_data(entry)}: {', '.join(entry['rules'])}"
    if kind == "intent":
        return f"{entry.get('dataset') or 'arguments'} to {node}, up to {size(entry['bytes'])}"
    if kind == "completion":
        rows = f"{entry['rows']:,} rows, " if entry["rows"] else ""
        return f"of {entry['intent']}: {rows}{size(entry['bytes'])} to {node}, {entry['outcome']}"
    if kind == "recovered":
        return f"of {entry['intent']}: at most {size(entry['at_most_bytes'])} went to {node}"
    if kind == "repaired":
        if not entry["kept"]:
            return "its -wal was gone: what that held is unknown"
        return f"{size(entry['dropped_bytes'])} of its end left out, kept in {entry['kept']}"
    if kind == "lease-end":
        return f"{node}, {entry.get('outcome')}, {'its receipt' if entry.get('receipt') else 'without a receipt'}"
    if kind == "policy":
        return f"from here on: {entry['policy_digest'][:12]}, {len(entry['files'])} files"
    if kind == "checkpoint":
        return f"signed: the {str(entry['note']).split(chr(10))[1]} entries before"
    purpose = f", purpose: {entry['purpose']}" if entry.get("purpose") else ""
    return f"zone {entry['zone']}" if kind == "opened" else f"{entry.get('person', '')}{purpose}"


def _data(entry: Mapping[str, Any]) -> str:
    if not entry.get("dataset"):
        return "arguments" if entry.get("columns") == ["<arguments>"] else f"a table, {entry.get('rows', 0):,} rows"
    return f"{entry['dataset']}, {len(entry['columns'])} columns, {entry['rows']:,} rows"


def left_table(entries: Sequence[Mapping[str, Any]]) -> tuple[Table, int]:
    """Return what left, by data set, and how many bytes that were: intents joined with their completions."""
    intents = {entry["seq"]: entry for entry in entries if entry["kind"] == "intent"}
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for entry in entries:
        if entry["kind"] == "completion" and (intent := intents.get(entry["intent"])):
            found.setdefault((intent["dataset"] or "arguments", len(intent["columns"])), []).append(entry)
    table, total = _table("data", ">columns", ">rows", "to", ">sealed bytes"), 0
    for (name, columns), done in found.items():
        nodes_there = ", ".join(sorted({entry["node"] for entry in done}))
        sent = sum(entry["bytes"] for entry in done)
        table.add_row(name, str(columns), f"{sum(entry['rows'] for entry in done):,}", nodes_there, f"{sent:,}")
        total += sent
    return table, total


def receipts_table(receipts: Iterable[Mapping[str, Any]]) -> tuple[Table, int]:
    """Return the receipts as a table, and how many sealed bytes the nodes received."""
    table, received = _table("node", "computed with", "sandbox", ">calls", ">shards", ">in", ">out"), 0
    for signed in receipts:
        receipt = signed["receipt"]
        received += receipt["received_bytes"]
        counts = (f"{receipt['calls']:,}", f"{receipt['shards']:,}")
        sizes = (size(receipt["received_bytes"]), size(receipt["sent_bytes"]))
        level = sandbox_level(receipt["degradations"]).partition(":")[0]
        table.add_row(receipt["node"], receipt["device"], level, *counts, *sizes)
    return table, received


def size(count: int) -> str:
    """Return a number of bytes for people: ``"306.5 MB"``."""
    if count < 1000:
        return f"{count} bytes"
    value, unit = count / 1e3, "kB"
    for larger in ("MB", "GB", "TB"):
        if value >= 999.95:
            value, unit = value / 1e3, larger
    return f"{value:,.1f} {unit}"


# -- tables that stay readable at 80 columns ----------------------------------------------------


def _table(*columns: str) -> Table:
    """Return a table without frame; a column whose name begins with ``>`` is aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=right)
    return table


def _grid(*styles: str) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for style in styles:
        table.add_column(style=style)
    table.columns[0].no_wrap = True
    return table
