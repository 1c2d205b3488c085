"""The main job on real data: fit, score, volume, the refusal, and what the ledger and the receipts say afterwards."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from ray_gpu import examples, functions
from ray_gpu.state import Layout
from zones.errors import EgressDeniedError, GrantRefusedError
from zones.keys import verify_node_signature
from zones.ledger import verify
from zones.model import canonical
from zones.vault import Vault

PURPOSE = "check the main job"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one session of the main job brought back."""

    session: str
    status: dict[str, Any]
    receipts: list[dict[str, Any]]
    features: list[str]
    classifier: Any
    coefficients: tuple[Any, ...]
    randhie: Any
    cancer: Any
    fitted: Any
    fitted_local: Any
    probabilities: Any
    probabilities_local: Any
    refused: EgressDeniedError


@pytest.fixture(scope="module")
def job(cluster: Any) -> Job:
    """Run fit, score and the refused call in one session, and end the session."""
    with cluster.attach(PURPOSE) as zone:
        data = zone.read("randhie", columns=examples.RANDHIE_COLUMNS)
        cancer = zone.read("breast_cancer")
        features = [name for name in zone.datasets["breast_cancer"] if name != "target"]
        classifier, coefficients = _classifier(cancer.to_arrow(), features)
        scored = cancer.select(features)
        wanted = [*examples.RANDHIE_COLUMNS, "record_number"]
        result = {
            "fitted": examples.statistics.map_reduce(data, examples.solve),
            "fitted_local": examples.solve([examples.statistics.local(data)]),
            "probabilities": examples.score.map(scored, *coefficients),
            "probabilities_local": examples.score.local(scored, *coefficients),
        }
        with pytest.raises(EgressDeniedError) as refused:
            examples.statistics.options(columns=wanted).map_reduce(zone.read("randhie"), examples.solve)
        status = zone.status()
        tables = {"randhie": data.to_arrow(), "cancer": cancer.to_arrow()}
    return Job(
        session=status["session"],
        status=status,
        receipts=zone.receipts,
        features=features,
        classifier=classifier,
        coefficients=coefficients,
        refused=refused.value,
        **tables,
        **result,
    )


def _classifier(table: Any, features: list[str]) -> tuple[Any, tuple[Any, ...]]:
    """Fit scikit-learn's logistic regression; return it, and its coefficients as :func:`examples.score` takes them."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    fitted.fit(_matrix(table, features), table["target"].to_numpy())
    scaler, model = fitted[0], fitted[1]
    return fitted, (model.coef_[0], float(model.intercept_[0]), scaler.mean_, scaler.scale_)


def _matrix(table: Any, features: list[str]) -> Any:
    return np.column_stack([table[name].to_numpy() for name in features])


# -- (a) fit ----------------------------------------------------------------------------------------


def test_fit_is_least_squares(job: Job) -> None:
    """Sums of 20,190 real rows, taken shard by shard on the nodes, solve to what NumPy gets from the whole table."""
    assert job.randhie.num_rows == 20_190
    table = job.randhie.to_pandas()
    outcome, regressors = table["mdvis"], table.drop(columns="mdvis")

    expected = np.linalg.lstsq(np.column_stack([np.ones(len(table)), regressors]), outcome, rcond=None)[0]

    np.testing.assert_allclose(job.fitted, expected, rtol=0, atol=1e-8)


def test_fit_is_what_runs_here(job: Job) -> None:
    """``f.local`` gives the coefficients that the nodes gave."""
    np.testing.assert_allclose(job.fitted, job.fitted_local, rtol=0, atol=1e-8)


# -- (b) score --------------------------------------------------------------------------------------


def test_score_is_scikit_learns(job: Job) -> None:
    """Every row's probability is scikit-learn's own, in the original order, although the rows were shuffled."""
    expected = job.classifier.predict_proba(_matrix(job.cancer, job.features))[:, 1]

    assert job.probabilities.shape == (569,)
    np.testing.assert_allclose(job.probabilities, expected, rtol=0, atol=1e-9)
    assert np.std(expected) > 0.3, "equal probabilities would say nothing about the order"


def test_score_is_what_runs_here(job: Job) -> None:
    """``f.local`` gives the probabilities that the nodes gave."""
    np.testing.assert_allclose(job.probabilities, job.probabilities_local, rtol=0, atol=1e-9)


def test_score_ran_on_two_actors(job: Job, cluster: Any) -> None:
    """Both GPU nodes had a lease of their own and served each call, and rows of the larger one went to both.

    The few shards of a small call go to whoever asks first.
    """
    assert {lease["node"] for lease in job.status["leases"]} == {"gpu-1", "gpu-2"}
    assert len({lease["lease"] for lease in job.status["leases"]}) == 2

    for dataset, rows in (("randhie", 20_190), ("breast_cancer", 569)):
        sent = _completed(cluster, job, dataset)
        assert set(sent) == {"gpu-1", "gpu-2"}
        assert sum(sent.values()) == rows
    assert min(_completed(cluster, job, "randhie").values()) > 0


def _completed(cluster: Any, job: Job, dataset: str) -> dict[str, int]:
    """Return rows sent to each node, by the ledger's completions of one data set."""
    intents = {entry["seq"]: entry for entry in cluster.entries("intent", session=job.session, dataset=dataset)}
    done = [entry for entry in cluster.entries("completion", outcome="done") if entry["intent"] in intents]
    return {entry["node"]: entry["rows"] for entry in done}


# -- (c) volume -------------------------------------------------------------------------------------


def test_volume_shows_progress_to_the_end(
    job: Job, cluster: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring a resampled table is exact in every row, with one progress line that ends at 100 % of the rows."""
    monkeypatch.setattr("ray_gpu.progress.QUIET_S", 0.0)
    with cluster.attach(PURPOSE) as zone:
        data = zone.read("breast_cancer_resampled", columns=job.features)
        probabilities = examples.score.options(shard_bytes=1 << 20).map(data, *job.coefficients)
        table = data.to_arrow()

    expected = job.classifier.predict_proba(_matrix(table, job.features))[:, 1]
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-9)
    shown = capsys.readouterr().err
    assert shown.endswith("\n")
    assert shown.count("\n") == 1
    last = shown.rstrip().rpartition("\r")[2]
    assert "100%" in last
    assert f"{table.num_rows:,} of {table.num_rows:,} rows" in last
    assert "MB/s" in last


# -- refused ----------------------------------------------------------------------------------------


def test_direct_identifier_is_refused(job: Job) -> None:
    """Asking for ``record_number`` is refused, with the column, the rule, its reason and what to do."""
    error = job.refused

    assert error.zone == "clinic"
    assert error.rules == ["no-direct-identifiers"]
    assert error.reasons == ["direct identifiers never leave the clinic"]
    for part in ("record_number", "direct-identifier", "no-direct-identifiers", error.reasons[0]):
        assert part in error.message


def test_refusal_is_in_the_ledger_and_sent_nothing(job: Job, cluster: Any) -> None:
    """The refusal is an entry of its own, and no intent rests on it."""
    (refusal,) = cluster.entries("decision", session=job.session, decision="refused")

    assert "record_number" in refusal["columns"]
    assert refusal["rules"] == ["no-direct-identifiers"]
    assert cluster.entries("intent", decision_entry=refusal["seq"]) == []
    assert not any("record_number" in entry["columns"] for entry in cluster.entries("intent"))


# -- what is left behind ----------------------------------------------------------------------------


def test_ledger_verifies(job: Job, cluster: Any) -> None:
    """The hash chain of the running gateway's ledger holds, to an entry after this session's end."""
    (end,) = cluster.entries("session-end", session=job.session)

    report = verify(cluster.ledger)

    assert report.zone == "clinic"
    assert report.entries >= end["seq"]


@pytest.mark.parametrize(
    ("dataset", "function", "columns", "rows"),
    [("randhie", examples.statistics, examples.RANDHIE_COLUMNS, 20_190), ("breast_cancer", examples.score, None, 569)],
    ids=["fit", "score"],
)
def test_ledger_says_everything(
    job: Job, cluster: Any, dataset: str, function: Any, columns: list[str] | None, rows: int
) -> None:
    """An intent names who, purpose, data set, columns, classes, rows, bytes, digests, pool, node, lease and time."""
    intents = cluster.entries("intent", session=job.session, dataset=dataset)

    assert {entry["node"] for entry in intents} == {"gpu-1", "gpu-2"}
    for entry in intents:
        assert (entry["person"], entry["groups"], entry["purpose"]) == ("dana", ["research"], PURPOSE)
        assert entry["columns"] == sorted(columns or job.features)
        assert set(entry["classes"]) <= {"internal", "confidential"}
        assert entry["rows"] == rows
        assert entry["bytes"] > rows * 8 * len(entry["columns"])
        assert entry["function"] == _digest(function)
        assert entry["policy_digest"] == job.status["policy_digest"]
        assert entry["pool"] == "shared"
        assert entry["lease"] in {lease["lease"] for lease in job.status["leases"]}
        assert entry["level"] == "strict" or entry["level"].startswith("degraded: ")
        assert 0 < time.time() - datetime.fromisoformat(entry["time"]).timestamp() < 3600


def _digest(function: Any) -> str:
    import hashlib

    return hashlib.sha256(functions.pack(function.__wrapped__)).hexdigest()


def test_intent_rests_on_an_earlier_decision(job: Job, cluster: Any) -> None:
    """Decision, intent and completion of a call come in this order, and name each other."""
    decisions = {entry["seq"]: entry for entry in cluster.entries("decision", session=job.session)}
    intents = {entry["seq"]: entry for entry in cluster.entries("intent", session=job.session)}
    completions = [entry for entry in cluster.entries("completion") if entry["intent"] in intents]

    assert all(decisions[entry["decision_entry"]]["decision"] == "allowed" for entry in intents.values())
    assert all(entry["decision_entry"] < number for number, entry in intents.items())
    assert {entry["intent"] for entry in completions} == set(intents)
    assert all(entry["intent"] < entry["seq"] for entry in completions)
    assert all(entry["bytes"] <= intents[entry["intent"]]["bytes"] for entry in completions)


def test_receipts_verify(job: Job, cluster: Any) -> None:
    """Each lease ended with a receipt that its node's custodian signed; together they count every shard."""
    authority = _node_ca(cluster)

    assert {signed["receipt"]["node"] for signed in job.receipts} == {"gpu-1", "gpu-2"}
    for signed in job.receipts:
        _verify(signed, authority)
    assert sum(signed["receipt"]["shards"] for signed in job.receipts) >= 8
    assert {signed["receipt"]["lease"] for signed in job.receipts} == {lease["lease"] for lease in job.status["leases"]}


def test_changed_receipt_does_not_verify(job: Job, cluster: Any) -> None:
    """A receipt that says one shard less is not the custodian's."""
    forged = copy.deepcopy(job.receipts[0])
    forged["receipt"]["shards"] -= 1

    with pytest.raises(GrantRefusedError):
        _verify(forged, _node_ca(cluster))


def test_receipts_are_in_the_ledger(job: Job, cluster: Any) -> None:
    """The zone keeps what the session was shown."""
    kept = [entry["receipt"] for entry in cluster.entries("lease-end", session=job.session)]

    assert sorted(map(_text, kept)) == sorted(map(_text, job.receipts))


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True)


def _verify(signed: dict[str, Any], authority: str) -> None:
    receipt = signed["receipt"]
    verify_node_signature(
        signed["certificate"], authority, receipt["node"], canonical(receipt), signed["signature"], int(time.time())
    )


def _node_ca(cluster: Any) -> str:
    """Ask Vault, as the person, for the CA of all nodes."""
    layout = Layout(cluster.state)
    public = json.loads((layout.zone("clinic") / "zone.json").read_text(encoding="utf-8"))
    person = json.loads(layout.person.read_text(encoding="utf-8"))
    vault = Vault(public["vault"], ca_file=public["vault_ca"])
    vault.login_userpass(person["user"], person["password"])
    return vault.node_ca()
