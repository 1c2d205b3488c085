"""The example with PyTorch: as accurate as it says, the same as in the zone, resumed exactly, in an environment too."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ray_gpu import gpu_remote
from ray_gpu.arrays import column_of
from ray_gpu.environment_store import Store
from ray_gpu.state import Layout

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "build/torch.txt"
SEEDS = (1, 2, 3)
#: Least share of the test digits that are classified right, and most by which a training in the zone may do better.
ACCURACY, DIFFERENCE = 0.97, 0.005

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None or not LOCK.exists(),
        reason="PyTorch is not installed: `make torch` adds it, and runs the example with it",
    ),
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("digits_cnn", ROOT / "examples/digits_cnn.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def openlab(start_cluster: Callable[..., Any]) -> Iterator[Any]:
    """A cluster of the zone that has the digits."""
    with start_cluster(zone="openlab") as cluster:
        yield cluster


@pytest.mark.parametrize("seed", SEEDS)
def test_accuracy(openlab: Any, example: ModuleType, seed: int) -> None:
    """Trained remotely it classifies 97 % of the test digits right, and as many, to half a percent, trained here."""
    with openlab.attach("teaching") as zone:
        test = example.rows_here(seed, zone.read("digits").segment(example.TEST))
        there = test.accuracy(example.train_remotely(zone, seed))
        here = test.accuracy(example.train_here(zone, seed))
    sys.stdout.write(f"seed {seed}: {there:.2%} of {len(test.keys)} remotely, {here:.2%} here\n")
    assert there >= ACCURACY
    assert abs(there - here) <= DIFFERENCE
    # Of the digits the four folds left, and the test segment, by policy, cannot.
    left = {name for entry in openlab.entries("decision") for name in entry["segments"]}
    assert left == {"train", *example.TRAIN}


def test_resumes(openlab: Any, example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after five epochs and started again it ends with the weights of a training without interruption."""
    monkeypatch.setattr(example, "EPOCHS", 10)
    said: list[str] = []
    with openlab.attach("teaching") as zone:
        keep, saved = zone.save, []

        def save_five(name: str, state: Any) -> None:
            keep(name, state)
            saved.append(name)
            if len(saved) == 5:
                raise KeyboardInterrupt

        monkeypatch.setattr(zone, "save", save_five)
        with pytest.raises(KeyboardInterrupt):
            example.train_remotely(zone, 1, say=said.append)
        monkeypatch.undo()
        monkeypatch.setattr(example, "EPOCHS", 10)
    with openlab.attach("teaching") as zone:
        resumed = example.train_remotely(zone, 1, say=said.append)
        assert np.allclose(resumed, example.train_here(zone, 1), atol=1e-6)
        assert not zone.saved()
    assert said == ["seed 1: begins with epoch 1", "seed 1: begins with epoch 6"]


def place_of_torch() -> str:
    """Return where PyTorch was imported from."""
    import torch

    return str(torch.__file__)


def test_in_an_environment(openlab: Any, example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator publishes PyTorch; the zone's scientist asks for it by its digest, and nothing is copied by hand."""
    monkeypatch.setattr(example, "EPOCHS", 2)
    found = Store(Layout(openlab.state).environments).build(LOCK)
    assert "torch" in found.modules
    with openlab.attach("teaching") as zone:
        weights = example.train_remotely(zone, 2, environment=found.digest)
        assert np.allclose(weights, example.train_here(zone, 2), atol=1e-6)
        where = gpu_remote(session=zone, environment=found.digest)(place_of_torch).remote().result()
    assert where.startswith(str(Layout(openlab.state).environments / found.digest))
    assert openlab.entries("intent")[-1]["environment_digest"] == found.digest


def test_tensors_in_and_out(openlab: Any) -> None:
    """A tensor is data without a copy, rows of several dimensions too; a result is a tensor's memory without one."""
    import torch

    images = torch.arange(24, dtype=torch.float32).reshape(4, 3, 2)
    assert column_of(images).flatten().flatten().buffers()[1].address == images.data_ptr()

    with openlab.attach("marriage study") as zone:
        doubled = gpu_remote(session=zone)(lambda batch: batch["array"] * 2)
        found = doubled.map(images)
        assert torch.equal(torch.from_numpy(found), images * 2)
        assert torch.from_numpy(found).data_ptr() == found.__array_interface__["data"][0]
        assert torch.equal(torch.asarray(doubled.local(images)), images * 2)
