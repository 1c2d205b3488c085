"""``ray-gpu demo``: the main job on real data, shown so that a person sees what happened."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import ray_gpu
from ray_gpu import embedded
from ray_gpu.cli import processes, show
from ray_gpu.client import Session
from ray_gpu.examples import RANDHIE_COLUMNS, least_squares, score, solve, statistics
from ray_gpu.handle import Handle
from ray_gpu.state import Layout
from zones.errors import ClusterError, EgressDeniedError, ZoneError
from zones.ledger import read, verify

#: Rows of the volume job that are computed a second time, in the zone, to compare.
_SAMPLE_ROWS = 1000
_IDENTIFIER = "record_number"


def run(console: Console, plan: embedded.Plan, *, keep: bool, rows: int | None) -> None:
    """Run the demo. A cluster that it started is stopped when it ends, however it ends, unless it is to be kept.

    Raises:
        ZoneError: Something failed, or a result is not equal to what NumPy or scikit-learn give.
    """
    layout = Layout(Path(plan.state))
    found = embedded.running(layout)
    ids = show.missing(found)
    console.print(show.degraded_line(ids), soft_wrap=True)
    console.print(show.meanings(ids))
    with cluster(console, plan, stop=not keep) as document:
        ledger = layout.ledger(document["zone"])
        first = sum(1 for _ in read(ledger))
        with ray_gpu.attach(document["zone"], purpose="demo", state_dir=plan.state) as zone:
            console.print(f"attached to zone [bold]{zone.zone}[/] as [bold]{zone.person}[/], logged in at Vault")
            console.print(f"the nodes compute with: {show.device()}")
            with _progress(wanted=False):
                _fit(console, zone)
                _score(console, zone)
            _volume(console, zone, rows)
            _refusal(console, zone, ledger)
            _where(console, document)
        _what_left(console, zone, list(read(ledger))[first:], ledger)
        ids = show.missing(document)
    _farewell(console, ledger, stopped=found is None and not keep)
    console.print(show.degraded_line(ids), soft_wrap=True)


@contextlib.contextmanager
def cluster(console: Console, plan: embedded.Plan, *, stop: bool) -> Iterator[dict[str, Any]]:
    """Use the cluster that runs already, or start one and, if *stop*, end it afterwards."""
    layout = Layout(Path(plan.state))
    document = embedded.running(layout)
    if document is not None and document["zone"] != plan.zone:
        raise ClusterError(
            f"zone {document['zone']}'s cluster runs in {layout.root}; stop it (ray-gpu down), or name another --state",
            node="",
            reason="another zone",
        )
    if document is not None and "nodes" in document:
        console.print(f"\nusing the cluster that runs in {layout.root}", soft_wrap=True)
        yield document
        return
    started = time.monotonic()
    document = None
    try:
        with console.status("starting") as line:
            # Ends with this program, whatever ends that: a closed terminal, a kill.
            document = embedded.up(plan, line.update, tied=stop)
        took = time.monotonic() - started
        console.print(f"\nstarted in {took:.1f} s: zone {document['zone']}, two nodes outside it, and a Vault")
        yield document
    finally:
        if stop and document is not None:
            with console.status("stopping: shredding lease keys, ending every process"):
                embedded.down(layout)


@contextlib.contextmanager
def _progress(*, wanted: bool) -> Iterator[None]:
    """Show progress lines or not, for as long as this lasts."""
    before = os.environ.get("RAY_GPU_PROGRESS")
    if not wanted:
        os.environ["RAY_GPU_PROGRESS"] = "0"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("RAY_GPU_PROGRESS", None)
        else:
            os.environ["RAY_GPU_PROGRESS"] = before


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


def _fit(console: Console, zone: Session) -> None:
    _heading(console, "(a) Fit: least squares on the RAND Health Insurance Experiment")
    data = zone.read("randhie", columns=RANDHIE_COLUMNS)
    started = time.monotonic()
    fitted = statistics.map_reduce(data, solve)
    took = time.monotonic() - started
    table = data.to_arrow()
    console.print(
        f"{table.num_rows:,} real person-years, {len(RANDHIE_COLUMNS)} columns: sums per shard on the nodes, "
        f"solved in the zone. {took:.1f} s from asking for two leases to the result."
    )
    _equal(console, "numpy.linalg.lstsq on the whole table", fitted, least_squares(table), 1e-8)
    _equal(console, "f.local(data), the same function run here", fitted, solve([statistics.local(data)]), 1e-8)


def _score(console: Console, zone: Session) -> None:
    _heading(console, "(b) Score: a classifier's probability for every row of breast_cancer")
    features = _features(zone)
    classifier, coefficients = _classifier(zone, features)
    data = zone.read("breast_cancer", columns=features)
    call = score.options(columns=features)
    probabilities = call.map(data, *coefficients)
    table = data.to_arrow()
    own = classifier.predict_proba(np.column_stack([table[name].to_numpy() for name in features]))[:, 1]
    console.print(f"{table.num_rows} real rows, {len(features)} columns: shuffled before they left, back in order.")
    _equal(console, "scikit-learn's own, row by row", probabilities, own, 1e-9)
    _equal(console, "f.local(data), the same function run here", probabilities, call.local(data, *coefficients), 1e-9)


def _volume(console: Console, zone: Session, rows: int | None) -> None:
    features = _features(zone)
    _, coefficients = _classifier(zone, features)
    data = zone.read("breast_cancer_resampled", columns=features)
    whole = len(data)
    if rows is not None and rows < whole:
        data = data.split(rows / whole)[0]
    real = len(zone.read("breast_cancer"))
    _heading(console, f"(c) Volume: the same over {len(data):,} rows, resampled from the {real} real ones")
    started = time.monotonic()
    probabilities = score.options(columns=features).map(data, *coefficients)
    took = time.monotonic() - started
    size = len(probabilities) * len(features) * 8
    console.print(
        f"{len(probabilities):,} resampled rows, {size / 1e6:,.0f} MB in {took:.2f} s: "
        f"[bold]{size / took / 1e6:,.0f} MB/s[/], decided, written down, shuffled, padded, sealed and opened."
    )
    _check_sample(console, data, probabilities, coefficients)


def _check_sample(console: Console, data: Handle, probabilities: Any, coefficients: tuple[Any, ...]) -> None:
    """Compare rows drawn at random with what NumPy computes of them here."""
    weights, intercept, mean, scale = coefficients
    sample = np.random.default_rng(0).integers(0, len(probabilities), _SAMPLE_ROWS)
    table = data.to_arrow().take(sample)
    matrix = np.column_stack([table[name].to_numpy() for name in table.column_names])
    expected = 1 / (1 + np.exp(-((matrix - mean) / scale @ weights + intercept)))
    _equal(console, f"NumPy's own for {_SAMPLE_ROWS:,} rows drawn at random", probabilities[sample], expected, 1e-9)


def _refusal(console: Console, zone: Session, ledger: Path) -> None:
    _heading(console, "Refused: a column that may not leave")
    columns = [*RANDHIE_COLUMNS, _IDENTIFIER]
    try:
        statistics.options(columns=columns).map_reduce(zone.read("randhie"), solve)
    except EgressDeniedError as error:
        entry = max(entry["seq"] for entry in read(ledger) if entry.get("decision") == "refused")
        console.print(
            f"asked for {_IDENTIFIER} ({zone.datasets['randhie'][_IDENTIFIER]}), with {len(columns) - 1} others"
        )
        for rule, reason in zip(error.rules, error.reasons, strict=True):
            console.print(f"[green]refused[/] by rule [bold]{rule}[/]: {reason}", soft_wrap=True)
        console.print(f"so nothing left the zone; the refusal is entry {entry} of its ledger")
        return
    raise ZoneError(f"the demo asked for {_IDENTIFIER} and policy let it leave; check policies/clinic/egress.cedar")


def _features(zone: Session) -> list[str]:
    return [name for name in zone.datasets["breast_cancer"] if name != "target"]


def _classifier(zone: Session, features: list[str]) -> tuple[Any, tuple[Any, ...]]:
    """Fit scikit-learn's logistic regression inside the zone; return it and what scoring needs of it."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - slow, and only the demo needs it
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415 - as above
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415 - as above

    table = zone.read("breast_cancer").to_arrow()
    matrix = np.column_stack([table[name].to_numpy() for name in features])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
        matrix, table["target"].to_numpy()
    )
    scaler, model = pipeline[0], pipeline[1]
    return pipeline, (model.coef_[0], float(model.intercept_[0]), scaler.mean_, scaler.scale_)


def _equal(console: Console, what: str, got: Any, expected: Any, tolerance: float) -> None:
    difference = float(np.max(np.abs(np.asarray(got) - np.asarray(expected))))
    if not difference <= tolerance:
        raise ZoneError(
            f"not equal to {what}: differs by {difference:.1e}, more than {tolerance:.0e}; the result is wrong"
        )
    off = f"{difference:.0e}" if difference else "0"
    console.print(f"[green]equal[/] to {what} (off by {off}, limit {tolerance:.0e})")


def _where(console: Console, document: Mapping[str, Any]) -> None:
    _heading(console, "Where it ran: each lease on a node has a keeper and a sandbox of its own")
    console.print(show.process_table(processes.rows(document), wide=console.width >= show.WIDE))


def _what_left(console: Console, zone: Session, entries: Sequence[Mapping[str, Any]], ledger: Path) -> None:
    _heading(console, "What left the zone, as its own ledger has it")
    left, sent = show.left_table(entries)
    console.print(left)
    console.print("\nA decision and an intent were on disk before the first byte of each:")
    console.print(show.entries_table(entries))
    _heading(console, "What the nodes say: receipts that their custodians signed, verified")
    table, received = show.receipts_table(zone.receipts)
    console.print(table)
    more = received - sent
    console.print(
        f"The receipts count {received:,} sealed bytes in, the ledger {sent:,} out"
        + (f": the {more:,} more are greetings and heartbeats, without data." if 0 < more < 1 << 20 else ".")
    )
    report = verify(ledger)
    console.print()
    console.print(f"[green]the ledger verifies[/]: {report.entries} entries, head {report.head}", soft_wrap=True)


def _farewell(console: Console, ledger: Path, *, stopped: bool) -> None:
    command = sys.argv[0] if os.path.basename(sys.argv[0]) == "ray-gpu" else "ray-gpu"
    if not stopped:
        console.print(f"\nthe cluster goes on running; stop it with: {command} down\n", soft_wrap=True)
        return
    console.print("\neverything that this demo started is stopped; the ledger stays. Change a byte in a copy of it:")
    console.print(f"  {command} audit copy --from {ledger} copy.sqlite", soft_wrap=True, style="dim")
    console.print("""  LC_ALL=C sed -i 's/"rows":569/"rows":568/' copy.sqlite""", soft_wrap=True, style="dim")
    console.print(f"  {command} audit verify copy.sqlite\n", soft_wrap=True, style="dim")
