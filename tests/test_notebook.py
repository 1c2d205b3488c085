"""Every notebook runs from top to bottom against a cluster, and says what its text promises."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets import default

ROOT = Path(__file__).parents[1]
#: What a run of each notebook shows, as its text announces.
SAYS = {
    "01_quickstart": [
        "20,190 rows",
        "equal to numpy.linalg.lstsq on the whole table: True",
        "569 rows; equal to scikit-learn, row by row: True",
        "held-out tumours are classified right: True",
        "kept: ['weights'] equal: True",
        "rule:   no-direct-identifiers",
        "reason: direct identifiers never leave the clinic",
        "the cause is the variable: tumours",
        "hello from the sandbox",
        "raised there: in look_around",
        "the ledger verifies, as zone clinic",
        "content changed",
    ],
    "02_train": [
        "weights equal to a training in the zone, to 1e-6: True",
        "of 114 tumours of the test part are classified right",
        "more than nine in ten: True",
        "after 20 epochs",
        "closed by the zone",
    ],
    "03_what_left_the_zone": [
        "equal to the mean in the zone: True",
        "rule:   no-direct-identifiers",
        "opens to the same bytes: True",
        "with one bit changed: sealed message did not open",
        "the ledger verifies, as zone clinic",
        "content changed",
        "as many shards as the call was cut into: True",
    ],
    "04_bring_your_own_data": [
        "frequency: 50",
        "the same as here: True",
        "what the cell did not name stayed there: True",
        "rule:   no-direct-identifiers",
        "[0.29 1.13 0.69 0.44]",
    ],
}
#: Cells whose output is a picture.
PLOTS = {"02_train": 1, "03_what_left_the_zone": 1}


class ThisPython(AsyncKernelManager):
    """Starts kernels of the interpreter that runs the tests, whatever kernels are installed, without a TCP port."""

    @default("transport")
    def _transport(self) -> str:
        return "ipc"

    @default("ip")
    def _sockets(self) -> str:
        return os.path.join(os.environ["JUPYTER_RUNTIME_DIR"], "k")

    @default("kernel_spec_manager")
    def _specs(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


@pytest.fixture(scope="module")
def executed(cluster: Any) -> Iterator[Callable[[str], Any]]:
    """Return what runs a notebook once against the shared cluster, and returns it with its outputs."""
    # Short, because Unix sockets are made below it; nothing of the user's Jupyter is read or written.
    scratch = Path(tempfile.mkdtemp(prefix="nb"))
    places = {name: scratch / name.lower() for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")}

    @functools.cache
    def execute(name: str) -> Any:
        notebook = committed(name)
        NotebookClient(notebook, timeout=120, kernel_manager_class=ThisPython, resources=_run_in(scratch)).execute()
        return notebook

    with pytest.MonkeyPatch.context() as patch:
        for name, place in {**places, "MPLCONFIGDIR": scratch / "mpl"}.items():
            place.mkdir()
            patch.setenv(name, str(place))
        patch.setenv("RAY_GPU_STATE", str(cluster.state))
        patch.setenv("RAY_GPU_PROGRESS", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        try:
            yield execute
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def committed(name: str) -> Any:
    """Return a notebook as it is in the repository."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]  # nbformat has no annotations here


def _run_in(directory: Path) -> dict[str, Any]:
    return {"metadata": {"path": str(directory)}}


def outputs(notebook: Any) -> list[Any]:
    """Return all outputs of a notebook's cells."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def shown(notebook: Any) -> str:
    """Return all text that the cells of a notebook put out."""
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs(notebook))


def test_all_are_here() -> None:
    """Every notebook of the directory is tried."""
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_runs_and_says(executed: Callable[[str], Any], name: str) -> None:
    """A notebook runs from top to bottom, and shows each result and plot that its text announces."""
    notebook = executed(name)

    assert [text for text in SAYS[name] if text not in shown(notebook)] == []
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) == PLOTS.get(name, 0)


def test_error_comes_back_as_its_own_type(executed: Callable[[str], Any]) -> None:
    """What the function was refused in the sandbox is raised in the notebook as an OSError about the file."""
    (line,) = [line for line in shown(executed("01_quickstart")).splitlines() if line.startswith("raised here:")]

    assert line.split()[2] in ("FileNotFoundError:", "PermissionError:")
    assert "/etc/passwd" in line


def test_ledger_has_the_session(executed: Callable[[str], Any], cluster: Any) -> None:
    """What the first notebook shows as sent is what the ledger has: rows as often as they went, and a refusal."""
    executed("01_quickstart")
    entries = cluster.entries()
    first = max(i for i, entry in enumerate(entries) if entry.get("purpose") == "quickstart" and "groups" not in entry)
    session = [entry for entry in entries[first:] if entry.get("session") == entries[first]["session"]]
    intents = {entry["seq"]: entry["dataset"] for entry in session if entry["kind"] == "intent"}
    rows = dict.fromkeys(intents.values(), 0)
    for entry in entries[first:]:
        if entry["kind"] == "completion" and entry["intent"] in intents:
            rows[intents[entry["intent"]]] += entry["rows"]

    # Scored once; 20 epochs over the larger part, and once over the other.
    assert rows == {"randhie": 20_190, "breast_cancer": 569 + 20 * 455 + 114, "": 0}
    assert [entry["columns"] for entry in session if entry.get("decision") == "refused"] == [["mdvis", "record_number"]]


@pytest.mark.parametrize("name", SAYS)
def test_committed_outputs(name: str) -> None:
    """A notebook is committed with the outputs of one run, in order, without errors or a machine's paths."""
    notebook = committed(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert "/tmp/" not in shown(notebook)
    assert [text for text in SAYS[name] if text not in shown(notebook)] == []
