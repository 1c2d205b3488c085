"""Functions run in the environment that they ask for, if policy allows it, and see nothing else; what lacks is told."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from ray_gpu import gpu_remote
from ray_gpu.state import Layout
from tests.published import EXTRA, publish
from zones.environments import Environment
from zones.errors import FunctionRefusedError, PlacementError


@gpu_remote
def distributions(probe: str) -> dict[str, Any]:
    """Return what can be imported, and what is in the way of changing it."""
    import importlib.util
    import os

    spec = importlib.util.find_spec("numpy")
    place = os.path.dirname(os.path.dirname(spec.origin)) if spec and spec.origin else ""
    try:
        with open(os.path.join(place, "planted.py"), "w", encoding="utf-8") as file:
            file.write(probe)
        planted = "written"
    except OSError as error:
        planted = type(error).__name__
    with open("/tmp/planted.py", "w", encoding="utf-8") as file:
        written = file.write(probe)
    names = ["toolz", "hvac", "ray", "sklearn", "pip", "numpy", "ray_gpu"]
    seen = sorted(name for name in os.listdir(place) if name.endswith(".dist-info"))
    found = [name for name in names if importlib.util.find_spec(name)]
    return {"found": found, "planted": planted, "seen": seen, "written": written}


@gpu_remote
def first_of(rows: list[int]) -> int:
    """Use a package that the nodes' own Python has not."""
    import toolz  # type: ignore[import-not-found]  # published by the test

    return int(toolz.first(rows))


@gpu_remote(columns=["mdvis"])
def counted(batch: Any) -> int:
    """The same on data."""
    import toolz

    return int(toolz.count(batch["mdvis"]))


@pytest.fixture(scope="module")
def published(cluster: Any, built_environment: Path) -> Environment:
    """An environment that the operator publishes while the cluster runs."""
    return publish(built_environment, cluster)


def test_changed_is_not_served(cluster: Any, published: Environment) -> None:
    """Packages that somebody changed after they were built are not run; as they were, they are."""
    path = Layout(cluster.state).environments / published.digest / "site" / EXTRA / "functoolz.py"
    path.chmod(0o644)
    text = path.read_bytes()
    path.write_bytes(text + b"\n")
    with cluster.attach() as session:
        # A custodian compares what it serves once: nobody has asked for this one yet.
        asks = first_of.options(session=session, environment=published.digest)
        try:
            # Of each node, for another one could have it as it was.
            with pytest.raises(PlacementError, match=r"(is not as it was built.*`ray-gpu env list`.*){2}"):
                asks.remote([1]).result()
        finally:
            path.write_bytes(text)
            path.chmod(0o444)
        assert asks.remote([1]).result() == 1


def test_runs_there(cluster: Any, published: Environment) -> None:
    """A function sees the packages of the environment that it asked for and no others, and cannot add to them."""
    with cluster.attach() as session:
        own = distributions.options(session=session).remote("x").result()
        there = distributions.options(session=session, environment=published.digest).remote("x").result()
        assert first_of.options(session=session, environment=published.digest).remote([5, 6]).result() == 5
        (lease,) = [one for one in session.status()["leases"] if one["environment"] == published.digest]
        assert lease["differs"] == []

    # The nodes' own Python has all that this one has, and not what was published: each probe finds what is there.
    assert own["found"] == ["hvac", "ray", "sklearn", "pip", "numpy", "ray_gpu"]
    assert there["found"] == [EXTRA, "numpy", "ray_gpu"]
    assert len(there["seen"]) == len(published.packages)
    # Control: the same words can be written where sandboxes may write.
    assert (there["planted"], there["written"]) == (own["planted"], own["written"]) == ("OSError", 1)
    assert cluster.entries("intent")[-1]["environment_digest"] == published.digest
    receipts = [entry["receipt"]["receipt"] for entry in cluster.entries("lease-end") if entry["receipt"]]
    assert published.digest in [receipt["environment"] for receipt in receipts]


def test_modules_go_along(
    cluster: Any, published: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of one's own goes to it too, also one that has remote functions of its own."""
    text = (
        "from ray_gpu import gpu_remote\n@gpu_remote(num_gpus=0.5)\ndef last(x):\n import toolz\n return toolz.last(x)"
    )
    (tmp_path / "lasts.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    lasts = importlib.import_module("lasts")
    with cluster.attach() as session:
        there = {"session": session, "environment": published.digest, "modules": [lasts]}
        assert gpu_remote(**there)(lambda: importlib.import_module("lasts").last([4, 5])).remote().result() == 5


def test_lacks_a_module(cluster: Any, published: Environment) -> None:
    """What a function imports, and its environment has not, is told before anything of it, or of its data, leaves."""
    before = cluster.entries()[-1]["seq"]
    with cluster.attach() as session:
        data = session.read("randhie", columns=["mdvis"])
        with pytest.raises(
            FunctionRefusedError, match=r"counted imports toolz, and gpu-\d has no such module in .*env"
        ):
            counted.options(session=session).map_reduce(data, sum)
        with pytest.raises(FunctionRefusedError, match=r"first_of imports toolz.*nothing of the call left"):
            first_of.options(session=session).remote([1]).result()
        assert not [entry for entry in cluster.entries("intent") if entry["seq"] > before]
        # Control: where it is, both run.
        there = {"session": session, "environment": published.digest}
        assert counted.options(**there).map_reduce(data, sum) == 20190
    assert [entry for entry in cluster.entries("intent") if entry["seq"] > before]


def test_differences_are_listed(cluster: Any, published: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a notebook has in another version than an environment that is known is listed when it attaches."""
    from ray_gpu.environment import versions

    with cluster.attach() as session:
        first_of.options(session=session, environment=published.digest).remote([1]).result()
    other = {**versions(), "numpy": "1.99", "python": "3.99.7"}
    monkeypatch.setattr("ray_gpu.client.versions", lambda: other)
    before = cluster.entries()[-1]["seq"]
    with cluster.attach() as session:
        found = {one["digest"]: one for one in session.status()["environments"]}
        said = found[published.digest]
        assert said["nodes"]
        assert said["differs"] == [
            f"numpy 1.99 here, {versions()['numpy']} there", f"python 3.99 here, {published.python} there"
        ]  # fmt: skip
        assert "python 3.99 here" in session._repr_html_()
    assert not [entry for entry in cluster.entries("intent") if entry["seq"] > before]


def test_not_there(cluster: Any) -> None:
    """What no node has is told for each node, and who can change it."""
    with cluster.attach() as session, pytest.raises(PlacementError, match="does not have the environment 0000"):
        first_of.options(session=session, environment="0" * 64).remote([1]).result()
