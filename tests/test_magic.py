"""``%%gpu_remote`` in a notebook: what goes out, what comes back, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import ray_gpu
from zones.errors import EgressDeniedError, FunctionRefusedError


@pytest.fixture(scope="module")
def shell(cluster: Any) -> Iterator[Any]:
    """A notebook's shell with a session."""
    made = InteractiveShell.instance()
    ray_gpu.load_ipython_extension(made)
    with cluster.attach("magic") as zone:
        made.user_ns.update(zone=zone, np=np)
        yield made
    InteractiveShell.clear_instance()


def run(shell: Any, line: str, cell: str) -> None:
    """Run one cell."""
    shell.run_cell_magic("gpu_remote", line, cell)


def test_variables_out_and_back(shell: Any) -> None:
    """Named inputs are there, named outputs come back, and nothing else changes here."""
    shell.user_ns.update(a=np.arange(3.0), b=2.0, c=None)
    run(shell, "-i a,b -o total,text", "c = 'there'\ntotal = float((a * b).sum())\ntext = '''two\n  lines'''\n")

    assert shell.user_ns["total"] == 6.0
    assert shell.user_ns["text"] == "two\n  lines"
    assert shell.user_ns["c"] is None


def test_data(shell: Any) -> None:
    """A handle's rows are the batch: all at once, or shard by shard with one row back for each."""
    zone = shell.user_ns["zone"]
    shell.user_ns["people"] = zone.read("breast_cancer", columns=["mean_radius"])
    expected = shell.user_ns["people"].to_arrow()["mean_radius"].to_numpy()
    run(shell, "--data people -o mean", "mean = float(batch['mean_radius'].mean())")
    shell.user_ns["factor"] = 3.0
    run(shell, "-d people -i factor --map -o scaled concurrency=1", "scaled = batch['mean_radius'] * factor")

    assert shell.user_ns["mean"] == pytest.approx(expected.mean())
    assert np.array_equal(shell.user_ns["scaled"], expected * 3.0)


def test_functions_and_modules_go_along(shell: Any) -> None:
    """What the cell calls of the notebook travels with it."""
    shell.run_cell("def twice(x):\n    return np.float64(x) * 2\n")
    run(shell, "-o found", "found = float(twice(4))")

    assert shell.user_ns["found"] == 8.0


def test_refused(shell: Any) -> None:
    """Data does not travel unnamed, policy holds as for any call, and a wrong line says how to write it."""
    shell.user_ns["secret"] = np.arange(10)
    with pytest.raises(FunctionRefusedError) as captured:
        run(shell, "-o x", "x = float(secret.sum())")
    assert captured.value.variable == "secret"
    shell.user_ns["records"] = shell.user_ns["zone"].read("randhie", columns=["record_number"])
    with pytest.raises(EgressDeniedError):
        run(shell, "-d records -o x", "x = len(batch)")
    for line, match in (
        ("-i missing", "no variable 'missing'"),
        ("--map -o x", "--map needs --data"),
        ("-i 3x", "no variable's name"),
        ("-o x gpus", "name=value"),
        ("--wrong", "unrecognized arguments"),
    ):
        with pytest.raises(UsageError, match=match):
            run(shell, line, "x = 1")
    with pytest.raises(TypeError, match="did you mean 'num_gpus'"):
        run(shell, "-o x num_gpu=1", "x = 1")
    with pytest.raises(UsageError, match="no Python"):
        run(shell, "-o x", "x = (")


def test_tracebacks_show_the_cell(shell: Any) -> None:
    """What the cell raises is raised here, and the traceback from there shows its line."""
    with pytest.raises(ZeroDivisionError) as raised:
        run(shell, "-o x", "zero = 0\nx = 1 / zero\n")

    assert "gpu_remote cell" in str(raised.value.__cause__.text)  # type: ignore[union-attr]  # of RemoteError


def test_cards(shell: Any) -> None:
    """Session, nodes, calls and receipts show themselves in a notebook, every text escaped."""
    zone = shell.user_ns["zone"]
    card, nodes = zone._repr_html_(), zone.nodes()._repr_html_()
    call = ray_gpu.gpu_remote(lambda: 3, session=zone).remote()
    call.result()

    for text in ("clinic", zone.person, "magic", "carrier"):
        assert text in card
    assert "gpu-1" in nodes
    assert "1 of 1" in nodes or "0 of 1" in nodes
    assert "gpu-1" in repr(zone.nodes())
    assert "done" in call._repr_html_()
    from ray_gpu import cards

    assert "&lt;b&gt;" in cards.table(("<b>",), [("<b>",)], title="<b>")
    assert "<b>" not in cards.table((), [("<b>",)])
