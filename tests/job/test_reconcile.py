"""An auditor beside the gateway: what the kernel counted is what the ledger says, and so do the nodes' receipts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ray_gpu import gpu_remote
from ray_gpu.cli.main import cli
from zones.errors import EgressDeniedError
from zones.ledger import read
from zones.pictures import amount
from zones.receipts import check

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the kernel tells root alone what it counted")


@gpu_remote(columns=["mdvis", "lncoins"])
def total(batch: Any) -> float:
    """Return a sum."""
    return float(batch["mdvis"].sum() + batch["lncoins"].sum())


@gpu_remote
def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def watching(out: Path) -> subprocess.Popen[bytes]:
    """Count in the background."""
    command = [sys.executable, "-c", "from ray_gpu.cli.main import main; main()", "audit", "watch", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (out.exists() and out.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    return process


def compared(cluster: Any, counts: Path) -> Any:
    """Compare."""
    return CliRunner().invoke(cli, ["audit", "reconcile", str(counts), "--from", str(cluster.ledger)])


def test_to_the_byte(
    cluster: Any, tmp_path: Path, look_inside: Callable[[Any], Any], wait_until: Callable[..., None]
) -> None:
    """Calls of every kind are in the ledger as the kernel counted them; one byte beside them is not, and is found."""
    counts = tmp_path / "counts.jsonl"
    with watching(counts) as process:
        try:
            with cluster.attach() as session:
                data = session.read("randhie", columns=["mdvis", "lncoins"])
                assert np.isfinite(total.options(session=session).map_reduce(data, sum))
                assert [add.options(session=session).remote(i, 1).result() for i in range(20)] == list(range(1, 21))
                time.sleep(4)  # a heartbeat is framing too
            sessions = {entry["session"] for entry in cluster.entries("lease-end")[-2:]}
            fits = compared(cluster, counts)
            assert fits.exit_code == 0, fits.output
            assert "2 of 2 connections fit to the byte" in fits.output
            assert len(sessions) == 1

            with cluster.attach() as session:
                add.options(session=session).remote(1, 1).result()
                for peer in peers(look_inside(cluster).gateway()):
                    with socket.create_connection(peer) as planted:
                        planted.sendall(b"x")
            # The kernel takes the connection down once the other end is closed as well.
            wait_until(lambda: compared(cluster, counts).exit_code == 1, "the planted byte to be counted")
            found = compared(cluster, counts)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)

    assert found.exit_code == 1
    assert "no lease of the ledger: 1 bytes left that the ledger does not have" in " ".join(found.output.split())


def peers(gateway: int) -> list[tuple[str, int]]:
    """Return what the gateway is connected to: the lease's keeper, and perhaps Vault."""
    listed = subprocess.run(["ss", "-Htnp", "state", "established"], capture_output=True, text=True, check=True).stdout
    found = [line.split()[3].rpartition(":") for line in listed.splitlines() if f"pid={gateway}," in line]
    return [(address, int(port)) for address, _, port in found]


def test_receipts(cluster: Any, tmp_path: Path, look_inside: Callable[[Any], Any]) -> None:
    """An auditor checks every receipt with the nodes' CA alone; each change of one is found."""
    with cluster.attach() as session:
        assert add.options(session=session).remote(1, 2).result() == 3
    inside = look_inside(cluster)
    root = inside.vault().root_client()
    ca = tmp_path / "ca.pem"
    ca.write_text(root.node_ca())
    root.revoke()

    said = CliRunner().invoke(cli, ["audit", "receipts", str(cluster.ledger), "--node-ca", str(ca)])
    assert said.exit_code == 0, said.output
    entries = list(read(cluster.ledger))
    place = max(number for number, entry in enumerate(entries) if entry["kind"] == "lease-end" and entry["receipt"])
    for change, problem in CHANGES:
        changed = json.loads(json.dumps(entries))
        change(changed[place], changed[place]["receipt"]["receipt"])
        found = {one.seq: one.problem for one in check(changed, ca.read_text())}
        assert problem in found[entries[place]["seq"]]
    receipt = entries[place]["receipt"]["receipt"]
    assert set(receipt["controls"]).isdisjoint(receipt["degradations"])
    assert "no-seccomp" in receipt["controls"]


def test_report(cluster: Any, tmp_path: Path) -> None:
    """The report of a real ledger has its data sets, nodes and refusals, and says what was checked; no file is lost."""
    with cluster.attach(purpose="a report's purpose") as session:
        total.options(session=session).map_reduce(session.read("randhie", columns=["mdvis", "lncoins"]), sum)
        with pytest.raises(EgressDeniedError):
            total.options(session=session, columns=["record_number"]).map_reduce(session.read("randhie"), list)
    out = tmp_path / "report.html"
    command = ["audit", "report", str(cluster.ledger), "--out", str(out)]
    done, again = (CliRunner().invoke(cli, command) for _ in range(2))

    assert done.exit_code == 0, done.output
    text = out.read_text()
    entries = list(read(cluster.ledger))
    sent = sum(entry["bytes"] for entry in entries if entry["kind"] == "completion")
    assert f"<b>{amount(sent)}</b>bytes left" in text
    for word in ("randhie", "gpu-1", "gpu-2", "no-direct-identifiers", "report&#x27;s purpose", "are the same"):
        assert word in text
    assert (again.exit_code, out.read_text()) == (2, text)


#: What is changed in an entry or its receipt, and what is then said.
CHANGES: list[tuple[Callable[[Any, Any], object], str]] = [
    (lambda entry, receipt: receipt.update(calls=receipt["calls"] + 1), "signature"),
    (lambda entry, receipt: receipt["controls"].append("swap-on"), "signature"),
    (lambda entry, receipt: entry.update(node="gpu-9"), "signature is not that of node gpu-9"),
    (lambda entry, receipt: entry.update(lease="another"), "about another lease"),
    (lambda entry, receipt: entry["grant"].update(gpu_milli=1), "other terms"),
    (lambda entry, receipt: entry.update(controls=entry["controls"] + 1), "bytes, and by the ledger"),
]
