"""The test segment never ships: a real zone whose policy keeps it, and a job on the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from ray_gpu import gpu_remote
from zones.errors import EgressDeniedError, UnknownNameError


@gpu_remote(columns=["label"])
def counts(batch: Any) -> Any:
    """Return how often each label is there."""
    return np.bincount(np.asarray(batch["label"]).astype(int), minlength=10)


@pytest.fixture(scope="module")
def zone(start_cluster: Callable[..., Any]) -> Iterator[Any]:
    """A session with the shipped open-data laboratory."""
    with start_cluster(zone="openlab") as cluster, cluster.attach("teaching") as session:
        yield cluster, session


def test_the_test_segment_stays(zone: Any) -> None:
    """Folds leave and are what the zone itself reads; whatever has a test row is refused, by the rule's name."""
    cluster, session = zone
    digits = session.read("digits")
    function = counts.options(session=session)

    folds = [f"train/fold-{number}" for number in range(1, 6)]
    for names in (folds[:1], folds[3:], ["train", *folds]):
        part = digits.segment(*names)
        found = function.map_reduce(part, lambda values: np.sum(values, axis=0))
        assert found.tolist() == np.bincount(part.to_arrow()["label"].to_numpy(), minlength=10).tolist()
        assert cluster.entries("decision")[-1]["segments"] == sorted({"train", *names})
    for refused in (digits, digits.segment("test"), digits.segment("train", "test"), digits.filter(["label", "==", 3])):
        with pytest.raises(EgressDeniedError) as caught:
            function.map_reduce(refused, sum)
        assert caught.value.rules == ["test-stays"]
    assert len(digits.segment("train")) + len(digits.segment("test")) == len(digits) == 1797


def test_overlap(zone: Any) -> None:
    """What two segments have in common is counted: nothing of the pictures, every label; a segment is all in itself."""
    _, session = zone
    digits = session.read("digits")
    train, test = digits.segment("train"), digits.segment("test")

    assert train.overlap(test) == 0
    assert train.overlap(test, ["label"]) == len(test)
    assert train.overlap(digits.segment("train/fold-1")) == len(digits.segment("train/fold-1"))
    with pytest.raises(UnknownNameError):
        train.overlap(test, ["lable"])


def test_names(zone: Any) -> None:
    """A session lists a data set's segments; another name is refused with the nearest."""
    _, session = zone

    assert session.segments("digits") == ["train", *(f"train/fold-{number}" for number in range(1, 6)), "test"]
    assert session.segments("diabetes") == []
    with pytest.raises(UnknownNameError, match=r"did you mean 'train'\?"):
        session.read("digits").segment("trian")
    with pytest.raises(ValueError, match="takes names, once"):
        session.read("digits").segment("train").segment("train")
