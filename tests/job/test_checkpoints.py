"""What people keep in their zone between sessions: whole, theirs alone, and unreadable on the disk."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_gpu import Batch, gpu_remote
from ray_gpu.checkpoints import Checkpoints
from ray_gpu.state import Layout
from zones.errors import GatewayError, UnknownNameError, ValueRefusedError, VaultError

COLUMNS = ["mean_radius", "mean_texture", "target"]


@pytest.fixture
def zone(cluster: Any) -> Iterator[Any]:
    """A session of its own."""
    with cluster.attach("checkpoints") as session:
        yield session


def files(cluster: Any) -> list[Path]:
    """Return the files of all checkpoints."""
    return sorted((Layout(cluster.state).ledger("clinic").parent / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    "value",
    [np.arange(300_000.0), {"weights": [np.ones(3), None], "epoch": 7}, pa.table({"x": ["a", "b"]}), b"", "text"],
    ids=["array", "nested", "table", "empty", "text"],
)
def test_kept_between_sessions(cluster: Any, zone: Any, value: Any) -> None:
    """What one session saves another loads; saving again replaces it, forgetting removes it."""
    before, names = files(cluster), [one["name"] for one in zone.saved()]
    zone.save("a model", "before")
    zone.save("a model", value)
    with cluster.attach("later") as later:
        assert [one["name"] for one in later.saved()] == ["a model", *names]
        assert repr(later.load("a model")) == repr(value)
        later.forget("a model")
        later.forget("a model")
        with pytest.raises(UnknownNameError, match="a model"):
            later.load("a model")
    assert [one["name"] for one in zone.saved()] == names
    assert files(cluster) == before


def test_unreadable_on_the_disk(cluster: Any, zone: Any) -> None:
    """Neither value nor key is in the file, which is the gateway's alone; a changed one does not open, and says so."""
    canary = secrets.token_bytes(64)
    before = set(files(cluster))
    zone.save("secret", {"canary": canary})
    (file,) = set(files(cluster)) - before
    sealed = file.read_bytes()
    assert canary not in sealed
    assert file.stat().st_mode & 0o777 == 0o600
    for place in (len(sealed) - 1, len(sealed) - 70, 20):
        file.write_bytes(sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :])
        with pytest.raises((GatewayError, VaultError)):
            zone.load("secret")
    file.write_bytes(sealed)
    assert zone.load("secret") == {"canary": canary}
    zone.forget("secret")


def test_theirs_alone(cluster: Any, zone: Any, look_inside: Any, tmp_path: Path) -> None:
    """Another person's is not found by name, nor does Vault unwrap it for them under another name or person."""
    server = look_inside(cluster).vault()
    root = server.root_client()
    try:
        kept = Checkpoints(root, "clinic", tmp_path / "c")
        kept.save("dana", "mine", memoryview(b"value"))
        assert kept.load("dana", "mine") == b"value"
        with pytest.raises(UnknownNameError):
            kept.load("eve", "mine")
        assert kept.saved("eve") == []
        (file,) = (tmp_path / "c").iterdir()
        for person, name in (("eve", "mine"), ("dana", "other")):
            kept._path(person, name).write_bytes(file.read_bytes())
            with pytest.raises((GatewayError, VaultError)):
                kept.load(person, name)
    finally:
        root.revoke()


def test_refused(cluster: Any, zone: Any) -> None:
    """Names that are none and values that are no data are refused, and the one before stays."""
    zone.save("fine", 1)
    for name in ("", "x" * 101, "a\nb"):
        with pytest.raises(ValueRefusedError, match="1 to 100 characters"):
            zone.save(name, 1)
    with pytest.raises(ValueRefusedError, match="not data"):
        zone.save("fine", object())
    assert zone.load("fine") == 1
    with pytest.raises(UnknownNameError, match=r"fin.*did you mean 'fine'"):
        zone.load("fin")
    zone.forget("fine")


#: Mini-batches of an epoch.
STEPS = 4


@gpu_remote(columns=COLUMNS, concurrency=2, shard_bytes=64 << 10)
class Part:
    """Some of the rows, and least squares on them."""

    def __init__(self) -> None:
        self.x, self.y = np.empty((0, 2)), np.empty(0)

    def take(self, batch: Batch) -> int:
        """Keep rows for all epochs."""
        x = np.stack([np.asarray(batch["mean_radius"]) / 20, np.asarray(batch["mean_texture"]) / 30], axis=1)
        self.x, self.y = np.concatenate([self.x, x]), np.concatenate([self.y, np.asarray(batch["target"])])
        return len(self.y)

    def slope(self, weights: Any, epoch: int, step: int) -> dict[str, Any]:
        """Gradient over those rows here that are of a mini-batch, which follows from the row and the epoch."""
        mine = (self.x[:, 0] * 1e6 + epoch).astype(int) % STEPS == step
        x, y = self.x[mine], self.y[mine]
        return {"rows": len(y), "slope": x.T @ (x @ np.asarray(weights) - y)}


def trained(zone: Any, weights: Any, epochs: range) -> Any:
    """Train for some epochs on two GPU actors; their gradients are averaged in the zone."""
    made: Any = Part
    with made.options(session=zone).remote() as parts:
        kept = parts.take.map_reduce(zone.read("breast_cancer"), sorted)
        assert len(kept) > 1
        for epoch in epochs:
            for step in range(STEPS):
                found = parts.slope.every(weights, epoch, step)
                assert len(found) == 2
                weights = weights - 0.5 * sum(one["slope"] for one in found) / sum(one["rows"] for one in found)
    return weights


def least_squares_here(table: Any, epochs: int) -> Any:
    """The same training on the whole table, in this process."""
    here, weights = Part(), np.zeros(2)
    here.take(Batch(table))
    for epoch in range(epochs):
        for step in range(STEPS):
            found = here.slope(weights, epoch, step)
            weights = weights - 0.5 * found["slope"] / found["rows"]
    return weights


def test_training_resumes(cluster: Any, zone: Any) -> None:
    """Mini-batch training on two actors that goes on from a checkpoint, in another session, ends as one here does."""
    zone.save("run 1", {"weights": trained(zone, np.zeros(2), range(3)), "epoch": 3})
    with cluster.attach("resume") as later:
        kept = later.load("run 1")
        resumed = trained(later, kept["weights"], range(kept["epoch"], 5))
        later.forget("run 1")

    assert np.allclose(resumed, least_squares_here(zone.read("breast_cancer").to_arrow(), 5), rtol=0, atol=1e-9)
    assert np.linalg.norm(resumed - kept["weights"]) > 1e-3
