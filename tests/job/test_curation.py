"""A derived data set at work: its rows go to the GPUs, and the ledger says what they come from; else nothing leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ray_gpu import curation, gpu_remote
from ray_gpu.state import Layout
from zones.config import load_zone
from zones.errors import ConfigError, EgressDeniedError

COLUMNS = ["lncoins", "lpi", "physlm", "disea", "many_visits"]
FORBID = """
@id("no-visits")
@reason("visits stay for now")
forbid (principal, action == Action::"egress", resource)
when { context.dataset == "randhie" && context.columns.contains("mdvis") };
"""


@gpu_remote(columns=COLUMNS)
def total(batch: Any) -> Any:
    """Return how many rows there are, and how many of them have the label."""
    label = np.asarray(batch["many_visits"])
    return np.array([len(label), label.sum()])


def derive(cluster: Any) -> None:
    """Do what `ray-gpu data derive` does."""
    zone = load_zone(cluster.policies, "clinic")
    for _ in curation.derive_outdated(zone, cluster.policies, Layout(cluster.state).data("clinic")):
        pass


def test_derived_data_leaves(cluster: Any) -> None:
    """A call on a segment of a derived data set is right, and its decision names each parent's digest and step."""
    derive(cluster)
    with cluster.attach("lineage") as session:
        train = session.read("randhie_features").segment("train")
        rows, labelled = total.options(session=session).map_reduce(train, lambda parts: np.sum(parts, axis=0))
        local = train.to_arrow()["many_visits"].to_numpy()
        parent = session.read("randhie_labelled")
        total.options(session=session).map_reduce(parent, lambda parts: np.sum(parts, axis=0))
    decision, further = cluster.entries("decision")[-2:]
    chain = [decision["lineage"]["derived"]]
    while chain[-1]["parents"][0]["lineage"]:
        chain.append(chain[-1]["parents"][0]["lineage"])

    assert (rows, labelled) == (len(local), local.sum())
    assert decision["segments"] == ["train"]
    assert [(one["dataset"], one["step"]) for one in chain] == [
        ("randhie_features", "features"),
        ("randhie_labelled", "label"),
        ("randhie_clean", "clean"),
    ]
    assert chain[0]["digest"] == decision["dataset_digest"]
    assert chain[1]["digest"] == chain[0]["parents"][0]["digest"] == further["dataset_digest"]
    assert chain[2]["parents"][0]["dataset"] == "randhie"


def test_it_outranks_no_parent(fresh_cluster: Callable[..., Any], copy_policies: Callable[..., Any]) -> None:
    """A rule about a column of the first data set keeps all that was made of it; without it, all of it leaves: above.

    And once that data set is another file, what came of the old one is refused, and the error says what to do.
    """
    permit = '@id("research-may-send")'
    cluster = fresh_cluster(policies=copy_policies({"clinic/egress.cedar": (permit, FORBID + permit)}))
    derive(cluster)
    data = Layout(cluster.state).data("clinic") / "randhie.arrow"
    with cluster.attach() as session:
        function = total.options(session=session)
        with pytest.raises(EgressDeniedError) as caught:
            function.map_reduce(session.read("randhie_features"), len)
        data.write_bytes(data.read_bytes() + b" ")
        with pytest.raises(ConfigError, match="randhie, which it was derived from, was changed since"):
            function.map_reduce(session.read("randhie_features"), len)

    assert caught.value.rules == ["no-visits"]
    assert "randhie, which randhie_features comes from" in caught.value.message
    assert [one["decision"] for one in cluster.entries("decision")] == ["refused"]
    assert cluster.entries("intent") == []
