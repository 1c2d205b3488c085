"""``ray-gpu demo``: the main job on real data, shown so that a person sees what happened."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import ray_gpu
from ray_gpu import embedded
from ray_gpu.cli import show
from ray_gpu.client import Session
from ray_gpu.examples import RANDHIE_COLUMNS, least_squares, score, solve, statistics
from ray_gpu.state import Layout
from zones.errors import EgressDeniedError, ZoneError
from zones.ledger import read, verify
from zones.model import sandbox_level


def run(console: Console, state: Path, *, keep: bool, rows: int | None) -> None:
    """Run the demo; whatever it started is stopped when it ends, however it ends."""
    with cluster(console, state, keep=keep) as document:
        first = len(list(read(_ledger(state, document))))
        with ray_gpu.attach(document["zone"], purpose="demo", state_dir=state) as zone:
            _degraded(console, document)
            console.print(f"attached as [bold]{zone.person}[/] to zone [bold]{zone.zone}[/]")
            _fit(console, zone)
            _score(console, zone)
            _volume(console, zone, rows)
            _refusal(console, zone)
            leases = zone.status()["leases"]
        _where(console, leases)
        _receipts(console, zone)
        _what_left(console, _ledger(state, document), first)
    console.print("\neverything that this demo started is stopped" if not keep else "\nthe cluster goes on running")
    _degraded(console, document)


@contextlib.contextmanager
def cluster(console: Console, state: Path, *, keep: bool) -> Iterator[dict[str, Any]]:
    """Use the cluster that runs in *state*, or start one and stop it afterwards."""
    layout = Layout(state)
    document = embedded.running(layout)
    if document is not None and "nodes" in document:
        console.print("using the cluster that runs already")
        yield document
        return
    started = time.monotonic()
    plan = embedded.Plan(state=str(state), policies=str(embedded.shipped_policies()))
    with console.status("starting") as line:
        document = embedded.up(plan, line.update)
    try:
        _degraded(console, document)
        console.print(f"started in {time.monotonic() - started:.1f} s: Vault (OpenBao), three raylets "
                      "(one CPU node of the zone, two GPU nodes), two custodians, one gateway, one relay")
        yield document
    finally:
        if not keep:
            embedded.down(layout)


def _degraded(console: Console, document: dict[str, Any]) -> None:
    console.print(show.degraded_line(document["degradations"], document["sandbox_degradations"]), style="yellow")


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/]")


def _fit(console: Console, zone: Session) -> None:
    _heading(console, "(a) fit: ordinary least squares on the RAND Health Insurance Experiment")
    data = zone.read("randhie", columns=RANDHIE_COLUMNS)
    started = time.monotonic()
    fitted = statistics.map_reduce(data, solve)
    took = time.monotonic() - started
    table = data.to_arrow()
    whole = least_squares(table)
    local = solve([statistics.local(data)])
    console.print(f"{table.num_rows:,} real person-years, {len(RANDHIE_COLUMNS)} columns; per-shard sums on the nodes, "
                  f"solved in the zone; {took:.2f} s with attaching")
    _equal(console, "coefficients against numpy.linalg.lstsq on the whole table", fitted, whole, 1e-8)
    _equal(console, "coefficients against f.local(data)", fitted, local, 1e-8)


def _score(console: Console, zone: Session) -> None:
    _heading(console, "(b) score: a classifier's probability for every row of breast_cancer")
    features = _features(zone)
    classifier, coefficients = _classifier(zone, features)
    data = zone.read("breast_cancer", columns=features)
    call = score.options(columns=features)
    probabilities = call.map(data, *coefficients)
    table = data.to_arrow()
    own = classifier.predict_proba(np.column_stack([table[name].to_numpy() for name in features]))[:, 1]
    console.print(f"{table.num_rows} real rows, {len(features)} columns, shuffled before they left and put back in order")
    _equal(console, "probabilities against scikit-learn's own, row by row", probabilities, own, 1e-9)
    _equal(console, "probabilities against f.local(data)", probabilities, call.local(data, *coefficients), 1e-12)


def _volume(console: Console, zone: Session, rows: int | None) -> None:
    _heading(console, "(c) volume: the same scoring over 1,250,000 rows resampled from the real 569")
    features = _features(zone)
    _, coefficients = _classifier(zone, features)
    data = zone.read("breast_cancer_resampled", columns=features)
    if rows is not None:
        data = data.split(rows / 1_250_000)[0]
    started = time.monotonic()
    probabilities = score.options(columns=features).map(data, *coefficients)
    took = time.monotonic() - started
    size = len(probabilities) * len(features) * 8
    console.print(f"{len(probabilities):,} resampled rows, {size / 1e6:,.0f} MB in {took:.2f} s: "
                  f"[bold]{size / took / 1e6:,.0f} MB/s[/], decided, written down, shuffled, padded, sealed and opened")
    sample = np.random.default_rng(0).integers(0, len(probabilities), 1000)
    table = data.to_arrow().take(sample)
    matrix = np.column_stack([table[name].to_numpy() for name in features])
    expected = 1 / (1 + np.exp(-((matrix - coefficients[2]) / coefficients[3] @ coefficients[0] + coefficients[1])))
    _equal(console, "1,000 rows drawn at random, computed here", probabilities[sample], expected, 1e-9)


def _refusal(console: Console, zone: Session) -> None:
    _heading(console, "refused: a column that may not leave")
    try:
        statistics.options(columns=[*RANDHIE_COLUMNS, "record_number"]).map_reduce(zone.read("randhie"), solve)
    except EgressDeniedError as error:
        console.print(f"[green]refused[/], as it must be: {error.message}", soft_wrap=True)
        return
    raise ZoneError("the demo asked for record_number and policy let it leave; check policies/clinic/egress.cedar")


def _features(zone: Session) -> list[str]:
    return [name for name in zone.datasets["breast_cancer"] if name != "target"]


def _classifier(zone: Session, features: list[str]) -> tuple[Any, tuple[Any, ...]]:
    """Fit scikit-learn's logistic regression inside the zone; return it and what scoring needs of it."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - slow, and only the demo needs it
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415 - as above
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415 - as above

    table = zone.read("breast_cancer").to_arrow()
    matrix = np.column_stack([table[name].to_numpy() for name in features])
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(matrix, table["target"].to_numpy())
    scaler, model = pipeline[0], pipeline[1]
    return pipeline, (model.coef_[0], float(model.intercept_[0]), scaler.mean_, scaler.scale_)


def _equal(console: Console, what: str, got: Any, expected: Any, tolerance: float) -> None:
    difference = float(np.max(np.abs(np.asarray(got) - np.asarray(expected))))
    if not difference <= tolerance:
        raise ZoneError(f"{what}: differs by {difference:.1e}, more than {tolerance:.0e}; the result is wrong")
    console.print(f"[green]equal[/]: {what}: largest difference {difference:.1e} (allowed {tolerance:.0e})")


def _where(console: Console, leases: list[dict[str, Any]]) -> None:
    _heading(console, "where it ran")
    table = Table()
    for column in ("node", "computes with", "sandbox", "lease"):
        table.add_column(column)
    for lease in leases:
        table.add_row(lease["node"], lease["device"], sandbox_level(lease["degradations"]), lease["lease"])
    console.print(table)


def _receipts(console: Console, zone: Session) -> None:
    _heading(console, "receipts, signed by each node's custodian and verified by the gateway")
    for signed in zone.receipts:
        receipt = signed["receipt"]
        console.print(f"{receipt['node']}: {receipt['calls']} calls, {receipt['shards']} shards, "
                      f"{receipt['received_bytes']:,} sealed bytes in, {receipt['sent_bytes']:,} out; "
                      f"{receipt['exit']}; signature {signed['signature'][:16]}…")


def _what_left(console: Console, path: Path, first: int) -> None:
    _heading(console, "what left the zone, in the zone's own ledger")
    console.print(show.entries_table(list(read(path))[first:]))
    report = verify(path)
    console.print(f"[green]the ledger verifies[/]: {report.entries} entries, head {report.head}", soft_wrap=True)
    console.print(f"try it: copy {path}, change a byte, and run `ray-gpu audit verify COPY`", soft_wrap=True, style="dim")


def _ledger(state: Path, document: dict[str, Any]) -> Path:
    return Layout(state).ledger(document["zone"])
