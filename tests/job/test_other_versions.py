"""A notebook of another Python, or with other libraries, than the nodes: found out before anything leaves, or shown."""

from __future__ import annotations

from typing import Any

import pytest

from ray_gpu import gpu_remote
from ray_gpu.environment import versions
from zones.errors import PlacementError


@gpu_remote(placement_timeout_s=20)
def three() -> int:
    """Return a number."""
    return 3


def test_another_python(inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions travel as bytecode: where no node has the notebook's Python, the error says which has what, at once."""
    monkeypatch.setattr("ray_gpu.client.versions", lambda: {**versions(), "python": "3.99.1"})
    before = len(inside.cluster.entries("intent"))
    says = r"gpu-1: its Python is 3\.1\d\.\d+ and this notebook's 3\.99.*use Python 3\.1\d here"
    with inside.cluster.attach("another python") as zone, pytest.raises(PlacementError, match=says) as raised:
        three.options(session=zone).remote().result()
    assert "gpu-2" in str(raised.value)
    assert len(inside.cluster.entries("intent")) == before


def test_other_libraries(inside: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Other versions of what data travels by are shown with each lease, and calls are made; alike ones are not."""
    monkeypatch.setattr("ray_gpu.client.versions", lambda: {**versions(), "numpy": "1.99"})
    with inside.cluster.attach("other libraries") as zone:
        assert three.options(session=zone).remote().result() == 3
        (lease,) = zone.status()["leases"]
        assert lease["differs"] == [f"numpy 1.99 here, {versions()['numpy']} there"]
        assert "numpy 1.99 here" in zone._repr_html_()
    monkeypatch.undo()
    capsys.readouterr()
    with inside.cluster.attach("the same") as zone:
        three.options(session=zone).remote().result()
        assert [lease["differs"] for lease in zone.status()["leases"]] == [[]]


def test_other_imports(inside: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line says in what a function's imports differ before anything of it leaves, and says it once in a session."""
    import sklearn
    import sklearn.base

    monkeypatch.setenv("RAY_GPU_PROGRESS", "1")
    version = sklearn.__version__

    def name() -> str:
        return str(sklearn.base.BaseEstimator.__name__)

    with inside.cluster.attach("other imports") as zone:
        monkeypatch.setattr(sklearn, "__version__", "0.99")
        packed = gpu_remote(session=zone)(name)
        assert packed.remote().result() == "BaseEstimator"
        said = capsys.readouterr().err
        assert f"sklearn 0.99 here, {version} there" in said
        assert packed.remote().result() == "BaseEstimator"
        assert "sklearn" not in capsys.readouterr().err
        assert f"sklearn 0.99 here, {version} there" in zone.status()["leases"][0]["differs"]
