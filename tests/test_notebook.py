"""The first notebook runs from top to bottom against a cluster, and says what its text promises."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from traitlets import default

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "notebooks" / "01_quickstart.ipynb"


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
def executed(cluster: Any) -> Iterator[Any]:
    """The notebook with the outputs of a run against the shared cluster."""
    # Short, because Unix sockets are made below it; nothing of the user's Jupyter is read or written.
    scratch = Path(tempfile.mkdtemp(prefix="nb"))
    places = {name: scratch / name.lower() for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    with pytest.MonkeyPatch.context() as patch:
        for name, place in places.items():
            place.mkdir()
            patch.setenv(name, str(place))
        patch.setenv("RAY_GPU_STATE", str(cluster.state))
        patch.setenv("RAY_GPU_PROGRESS", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        notebook = committed()
        client = NotebookClient(notebook, timeout=120, kernel_manager_class=ThisPython, resources=_run_in(scratch))
        try:
            client.execute()
            yield notebook
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def committed() -> Any:
    """Return the notebook as it is in the repository."""
    return nbformat.read(QUICKSTART, as_version=4)  # type: ignore[no-untyped-call]  # nbformat has no annotations here


def _run_in(directory: Path) -> dict[str, Any]:
    return {"metadata": {"path": str(directory)}}


def shown(notebook: Any) -> str:
    """Return all text that the cells of a notebook put out."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "20,190 rows",
        "equal to numpy.linalg.lstsq on the whole table: True",
        "569 rows; equal to scikit-learn, row by row: True",
        "rule:   no-direct-identifiers",
        "reason: direct identifiers never leave the clinic",
        "the cause is the variable: tumours",
        "hello from the sandbox",
        "raised there: in look_around",
        "the ledger verifies, as zone clinic",
        "content changed",
    ],
)
def test_says(executed: Any, text: str) -> None:
    """A run of the notebook shows each result that its text announces."""
    assert text in shown(executed)


def test_error_comes_back_as_its_own_type(executed: Any) -> None:
    """What the function was refused in the sandbox is raised in the notebook as an OSError about the file."""
    (line,) = [line for line in shown(executed).splitlines() if line.startswith("raised here:")]

    assert line.split()[2] in ("FileNotFoundError:", "PermissionError:")
    assert "/etc/passwd" in line


def test_ledger_has_the_session(executed: Any, cluster: Any) -> None:
    """What the notebook shows as sent is what the ledger has: both data sets, every row once, and one refusal."""
    entries = cluster.entries()
    first = max(i for i, entry in enumerate(entries) if entry.get("purpose") == "quickstart" and "groups" not in entry)
    session = entries[first:]
    intents = {entry["seq"]: entry["dataset"] for entry in session if entry["kind"] == "intent"}
    rows = dict.fromkeys(intents.values(), 0)
    for entry in session:
        if entry["kind"] == "completion" and entry["intent"] in intents:
            rows[intents[entry["intent"]]] += entry["rows"]

    assert rows == {"randhie": 20_190, "breast_cancer": 569, "": 0}
    assert [entry["columns"] for entry in session if entry.get("decision") == "refused"] == [["mdvis", "record_number"]]


def test_committed_outputs() -> None:
    """The notebook is committed with the outputs of one run, in order, without errors or a machine's paths."""
    notebook = committed()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert "/tmp/" not in shown(notebook)
    assert "equal to numpy.linalg.lstsq on the whole table: True" in shown(notebook)
