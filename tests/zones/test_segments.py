"""zones.segments: each row is always in the same segment, whatever else there is; parts make up the whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.zones.test_config import SHIPPED, edit
from zones.config import load_zone
from zones.errors import ConfigError, UnknownNameError
from zones.model import EgressRequest, Segments
from zones.policy import Policy
from zones.review import completed, explain
from zones.segments import assign, columns, leaves, names, rounds, touched

NESTED = Segments(
    parts={"train": 70, "validation": 10, "test": 20},
    within={
        "train": Segments(parts={"fold-1": 1, "fold-2": 1, "fold-3": 1}),
        "test": Segments(parts={"a": 50, "b": 50}),
    },
)


def where(segments: Segments, rows: int, **given_columns: Any) -> list[str]:
    """Return the segment of each row."""
    arrays = {name: pa.array(values) for name, values in given_columns.items()}
    return assign(segments, "d", rows, arrays.__getitem__)


def test_names() -> None:
    """Segments have names with those of what they are a part of; choosing one touches what is in it and around it."""
    assert list(names(NESTED))[:5] == ["train", "train/fold-1", "train/fold-2", "train/fold-3", "validation"]
    assert leaves(NESTED, ["train/fold-1", "test"]) == ["train/fold-1", "test/a", "test/b"]
    assert touched(NESTED, ["train/fold-1"]) == {"train", "train/fold-1"}
    assert touched(NESTED, ["test"]) == {"test", "test/a", "test/b"}
    assert columns(Segments(parts={"a": 1}, by="x", within={"a": Segments(parts={"b": 1}, stratify="y")})) == {"x", "y"}
    with pytest.raises(UnknownNameError, match=r"no segment 'trian' \(did you mean 'train'\?\)"):
        leaves(NESTED, ["trian"])


@given(rows=st.integers(0, 400))
def test_by_row(rows: int) -> None:
    """Without a column the percents are exact to a row, in parts of parts as well."""
    counts = Counter(name.partition("/")[0] for name in where(NESTED, rows))

    for part, percent in NESTED.parts.items():
        assert abs(counts[part] - percent / 100 * rows) <= 1
    folds = Counter(name for name in where(NESTED, rows) if name.startswith("train"))
    assert max(folds.values(), default=0) - min(folds.values(), default=0) <= 1 or len(folds) < 3


def test_the_same_everywhere() -> None:
    """What a catalog says is the same on every host for ever: these are written down here."""
    found = where(Segments(parts={"train": 50, "test": 50}, by="k"), 7, k=["a", "b", "f", "d", None, "i", "a"])
    numbers = where(Segments(parts={"train": 50, "test": 50}), 8)

    assert found == BY_VALUE
    assert numbers == BY_NUMBER


BY_VALUE = ["train", "train", "test", "test", "train", "train", "train"]
BY_NUMBER = ["train", "test", "train", "train", "test", "test", "train", "test"]


@given(values=st.lists(st.integers(0, 30), max_size=80), more=st.lists(st.integers(0, 60), max_size=30))
def test_by_value(values: list[int], more: list[int]) -> None:
    """Rows with one value are in one segment; rows that are added later move no others."""
    segments = Segments(parts={"train": 60, "test": 40}, by="k")
    found, longer = (where(segments, len(some), k=pa.array(some, pa.int64())) for some in (values, values + more))
    of_value: dict[int, set[str]] = {}
    for value, name in zip(values + more, longer, strict=True):
        of_value.setdefault(value, set()).add(name)

    assert all(len(names_) == 1 for names_ in of_value.values())
    assert longer[: len(found)] == found


def test_by_value_is_near_the_percents() -> None:
    """Of many values, about so many as the percents say are in each part; and no order of the values shows."""
    found = np.array(where(Segments(parts={"train": 70, "test": 30}, by="k"), 20_000, k=np.arange(20_000)))

    assert abs((found == "train").mean() - 0.7) < 0.01
    assert abs((found[:10_000] == "train").mean() - (found[10_000:] == "train").mean()) < 0.02


def test_stratified() -> None:
    """Within each value of the other column the percents hold to a row, however rare it is."""
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    found = np.array(where(Segments(parts={"train": 70, "test": 30}, stratify="y"), 1000, y=labels))

    for label, count in ((0, 900), (1, 90), (2, 10)):
        assert (found[labels == label] == "train").sum() == count * 7 // 10
    unbalanced = np.array(where(Segments(parts={"train": 70, "test": 30}), 1000))
    assert (unbalanced == "train").sum() == 700


def test_stratified_by_value() -> None:
    """Groups stay together, and each stratum's groups are cut to the percents."""
    groups = np.repeat(np.arange(200), 5)
    labels = (groups % 2).astype(np.int64)
    segments = Segments(parts={"train": 50, "test": 50}, by="k", stratify="y")
    found = np.array(where(segments, 1000, k=groups, y=labels))

    for group in range(200):
        assert len(set(found[groups == group])) == 1
    for label in (0, 1):
        assert (found[labels == label] == "train").mean() == 0.5


# -- catalog and policy -------------------------------------------------------------------------------


ROUNDS = Segments(
    parts={"train": 50, "test": 50},
    by="k",
    within={"train": Segments(parts=rounds(2), by="k", listed_in="labelled")},
)
#: Of the values 0 to 9, those that hash to train: written down, as above.
TRAIN = [
    k
    for k, name in enumerate(where(Segments(parts={"train": 50, "test": 50}, by="k"), 10, k=range(10)))
    if name == "train"
]


def in_rounds(listed: dict[Any, Any], values: Any = range(10), numbers: Any = None) -> list[str]:
    """Return the segment of each of ten values, of which some are listed with their round."""
    labelled = pa.array(list(listed)), pa.array(list(listed.values()) if numbers is None else numbers)
    return assign(ROUNDS, "d", len(values), {"k": pa.array(values)}.__getitem__, lambda name, by: labelled)


def test_rounds() -> None:
    """What is listed is in its round, what is not is unlabelled; a later round moves its own rows and no others."""
    first, second, third = TRAIN[:3]
    before, after = in_rounds({first: 1}), in_rounds({first: 1, second: 2, third: 2})

    assert {name for k, name in enumerate(before) if k not in TRAIN} == {"test"}
    assert [before[k] for k in TRAIN[:4]] == ["train/round-1", *["train/unlabelled"] * 3]
    assert [after[k] for k in TRAIN[:4]] == ["train/round-1", "train/round-2", "train/round-2", "train/unlabelled"]
    assert [k for k in range(10) if before[k] != after[k]] == [second, third]
    assert set(in_rounds({}, numbers=pa.array([], pa.int64()))) == {"train/unlabelled", "test"}
    assert in_rounds({first: 1}, [first, first, None])[:2] == ["train/round-1"] * 2


@pytest.mark.parametrize(
    ("listed", "numbers", "message"),
    [
        ({TRAIN[0]: 3}, None, "rounds 1 to 2, and it has others"),
        ({TRAIN[0]: 0}, None, "rounds 1 to 2, and it has others"),
        ({TRAIN[0]: None}, [None], "a value is null"),
        ({"x": 1}, None, "not of the types wanted"),
        ({TRAIN[0]: "one"}, None, "not of the types wanted"),
        ({TRAIN[0]: 1, next(k for k in range(10) if k not in TRAIN): 2}, None, "1 of its values of k are of no row"),
        ({99: 1}, None, "1 of its values of k are of no row of d/train"),
    ],
)
def test_no_rounds(listed: dict[Any, Any], numbers: Any, message: str) -> None:
    """What cannot be rounds of these rows is refused: above all, rows of the test segment are in no round."""
    with pytest.raises(ConfigError, match=message):
        in_rounds(listed, numbers=numbers)


def test_listed_twice() -> None:
    """A value is in one round."""
    twice = pa.array([TRAIN[0]] * 2), pa.array([1, 2])
    with pytest.raises(ConfigError, match="stands there twice"):
        assign(ROUNDS, "d", 10, {"k": pa.array(range(10))}.__getitem__, lambda name, by: twice)


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """A copy of the shipped policies that a test may break."""
    import shutil

    return Path(shutil.copytree(SHIPPED, tmp_path / "policies"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{train: 80, test: 20}", "{train: 80, test: 30}", "make 110, not 100"),
        ("{train: 80, test: 20}", "{train: 100}", "at least 2"),
        ("{train: 80, test: 20}", "{train: 80, te/st: 20}", "must be 1 to 40 characters"),
        ("{folds: 5, stratify: label}", "{folds: 1}", "greater than or equal to 2"),
        ("{folds: 5, stratify: label}", "{by: label}", "either parts with percents, or a number of folds"),
        ("{folds: 5, stratify: label}", "{rounds: 2, by: label}", "rounds have listed_in"),
        ("{folds: 5, stratify: label}", "{folds: 2, listed_in: fair}", "rounds have listed_in"),
        ("{folds: 5, stratify: label}", "{rounds: 2, listed_in: fair}", "rounds are by a column"),
        (
            "{folds: 5, stratify: label}",
            "{rounds: 2, listed_in: fair, by: label, within: {unlabelled: {folds: 2}}}",
            "rounds are divided no further",
        ),
        (
            "{folds: 5, stratify: label}",
            "{rounds: 2, listed_in: fiar, by: label}",
            r"no data set 'fiar' \(did you mean",
        ),
        ("{folds: 5, stratify: label}", "{rounds: 2, listed_in: fair, by: label}", "no column 'label'"),
        ("{folds: 5, stratify: label}", "{folds: 5, stratify: lable}", r"no column 'lable' \(did you mean 'label'"),
        ("        train: {folds", "        trian: {folds", r"no part 'trian' \(did you mean 'train'"),
    ],
)
def test_catalog(policies: Path, old: str, new: str, message: str) -> None:
    """What is wrong in a catalog's segments is said with file and line."""
    edit(policies / "openlab/catalog.yaml", old, new)

    with pytest.raises(ConfigError, match=rf"catalog\.yaml:\d+: .*{message}"):
        load_zone(policies, "openlab")


def test_rule_about_no_segment(policies: Path) -> None:
    """A rule about a segment that no data set has would never hold: it is refused, with its line."""
    edit(policies / "openlab/egress.cedar", 'contains("test")', 'contains("tset")')

    with pytest.raises(
        ConfigError, match=r"egress\.cedar:\d+: rule test-stays: no segments 'tset'.*did you mean 'test'"
    ):
        Policy.load(policies, load_zone(policies, "openlab"))


OPENLAB = Policy.load(SHIPPED, load_zone(SHIPPED, "openlab"))


def asked(*segments: str, dataset: str = "digits") -> EgressRequest:
    """Return a student's question."""
    return completed(
        OPENLAB.zone,
        EgressRequest(
            zone="openlab", pool="shared", person="x", groups=frozenset({"students"}), dataset=dataset,
            segments=frozenset(segments),
        ),
    )  # fmt: skip


def test_the_test_segment_never_leaves() -> None:
    """Whatever has a row of it is refused: itself, all rows, it beside others; the others are not."""
    for some in ((), ("test",), ("train", "test"), ("train/fold-1", "test")):
        assert OPENLAB.decide(asked(*some)).rules == ("test-stays",)
    for some in (("train",), ("train/fold-1", "train/fold-5")):
        assert OPENLAB.decide(asked(*some)).allowed


def test_segments_cannot_be_left_out() -> None:
    """A request that names no segment of a data set that has some is refused, and one that names another's."""
    from dataclasses import replace

    for changed in ((), ("trian",), ("train", "other")):
        decision = OPENLAB.decide(replace(asked("train"), segments=frozenset(changed)))
        assert (decision.allowed, decision.rules) == (False, ("default",))
    assert not OPENLAB.decide(replace(asked(dataset="diabetes"), segments=frozenset({"train"}))).allowed


def test_explained() -> None:
    """For a refusal because of a segment, the other ones are named as a way."""
    assert "from segment train alone" in explain(OPENLAB, asked()).ways
