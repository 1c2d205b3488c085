"""`ray-gpu data derive`: steps run in the zone, what they make stands beside what it comes from, and ages with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pytest
from click.testing import CliRunner

from ray_gpu import curation, data_files, demo_data, source
from ray_gpu.cli.main import cli
from ray_gpu.embedded import shipped_policies
from tests.zones.test_config import edit
from zones.config import load_zone
from zones.errors import ConfigError, UnknownNameError
from zones.model import Zone

NAMES = ["randhie_clean", "randhie_labelled", "randhie_features"]


@pytest.fixture(scope="module")
def randhie() -> pa.Table:
    """The shipped data, which is slow to make."""
    return demo_data.randhie()


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """A copy of the shipped policies."""
    return Path(shutil.copytree(shipped_policies(), tmp_path / "policies"))


@pytest.fixture
def directory(tmp_path: Path, randhie: pa.Table) -> Path:
    """A data directory with the first parent in it."""
    path = tmp_path / "data"
    path.mkdir()
    write(path / "randhie.arrow", randhie)
    return path


def write(path: Path, table: pa.Table) -> None:
    """Write an Arrow file in place of another."""
    with pa.OSFile(f"{path}.new", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(f"{path}.new", path)


def clinic(policies: Path) -> Zone:
    """Load the zone."""
    return load_zone(policies, "clinic")


def derive(policies: Path, directory: Path) -> list[str]:
    """Derive what has to be, and return its names."""
    return [name for name, made in curation.derive_outdated(clinic(policies), policies, directory) if made]


def test_derive(policies: Path, directory: Path, randhie: pa.Table) -> None:
    """Each is made after those that it comes from, once, and its rows have the columns again that were carried."""
    assert derive(policies, directory) == NAMES
    assert derive(policies, directory) == []

    found = source.from_catalog(clinic(policies), directory, {"dataset": "randhie_features"}, None)
    kept = randhie.filter(pa.compute.is_in(randhie["physlm"], value_set=pa.array([0.0, 1.0])))
    assert found.table["record_number"].to_pylist() == kept["record_number"].to_pylist()
    assert found.table["many_visits"].to_pylist() == [int((visits or 0) > 5) for visits in kept["mdvis"].to_pylist()]
    assert abs(found.table["lpi"].to_numpy().mean()) < 1e-9
    assert not found.table.schema.metadata


def test_written_beside_it(policies: Path, directory: Path) -> None:
    """Step, version, digests and rows, of parents and theirs; whoever keeps the data alone may read the files."""
    derive(policies, directory)
    found = source.from_catalog(clinic(policies), directory, {"dataset": "randhie_features"}, None)
    chain = [found.lineage]
    while chain[-1] is not None:
        chain.append(chain[-1]["parents"][0]["lineage"])

    assert [one["step"] for one in chain[:-1] if one] == ["features", "label", "clean"]
    assert [one["parents"][0]["rows"] for one in chain[:-1] if one] == [19_138, 19_138, 20_190]
    first = chain[-2]
    assert first is not None
    assert first["parents"][0]["digest"] == data_files.digest(clinic(policies).datasets["randhie"], directory)
    modes = {path.stat().st_mode & 0o777 for path in directory.iterdir() if path.name.startswith("randhie_")}
    assert modes == {0o600}


def test_same_bytes(policies: Path, directory: Path) -> None:
    """The same step makes the same file of the same data."""
    derive(policies, directory)
    before = {name: (directory / clinic(policies).datasets[name].path).read_bytes() for name in NAMES}
    for name in NAMES:
        (directory / clinic(policies).datasets[name].path).unlink()

    assert derive(policies, directory) == NAMES
    assert before == {name: (directory / clinic(policies).datasets[name].path).read_bytes() for name in NAMES}


def test_ages_with_its_parents(policies: Path, directory: Path, randhie: pa.Table) -> None:
    """When the first parent is changed, what comes from it is refused until it was derived again."""
    derive(policies, directory)
    write(directory / "randhie.arrow", randhie.slice(1))
    with pytest.raises(ConfigError, match="randhie, which it was derived from, was changed since") as caught:
        source.from_catalog(clinic(policies), directory, {"dataset": "randhie_features"}, None)

    assert "ray-gpu data derive" in caught.value.message
    assert derive(policies, directory) == NAMES
    assert source.from_catalog(clinic(policies), directory, {"dataset": "randhie_features"}, None).rows < 19_138 + 1


def test_not_derived_yet(policies: Path, directory: Path) -> None:
    """A call on what nobody derived says so."""
    with pytest.raises(ConfigError, match="randhie_clean cannot be used: it was not derived yet"):
        source.from_catalog(clinic(policies), directory, {"dataset": "randhie_labelled"}, None)


@pytest.mark.parametrize("name", ["randhie_features.parquet", "randhie_features.parquet.lineage.json"])
def test_changed_file(policies: Path, directory: Path, name: str) -> None:
    """A file that somebody else put there, or one without its lineage, is refused."""
    derive(policies, directory)
    (directory / name).write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"its file was changed|not written beside it"):
        source.from_catalog(clinic(policies), directory, {"dataset": "randhie_features"}, None)


def test_a_changed_step_has_another_version(policies: Path, directory: Path) -> None:
    """A step that was changed makes nothing under its old version, and what it made is refused; a new one makes it."""
    derive(policies, directory)
    steps, catalog = policies / "clinic" / "steps.py", policies / "clinic" / "catalog.yaml"
    edit(steps, "MANY_VISITS = 5", "MANY_VISITS = 9")
    with pytest.raises(ConfigError, match="step label was changed since, but not its version"):
        source.from_catalog(clinic(policies), directory, {"dataset": "randhie_features"}, None)
    with pytest.raises(ConfigError, match="raise its version"):
        derive(policies, directory)

    edit(steps, "@step(version=1)\ndef label", "@step(version=2)\ndef label")
    edit(catalog, "step: label\n      version: 1", "step: label\n      version: 2")
    assert derive(policies, directory) == NAMES[1:]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    return known.set_column", "    raise ValueError('no')\n    return known.set_column", "ValueError: no"),
        ("    return known.set_column", "    return None\n    return known.set_column", "returned NoneType"),
        (
            "    return known.set_column",
            "    return known.drop_columns(['row'])\n    return known.set_column",
            "column row",
        ),
        (
            "    return known.set_column",
            "    return known.drop_columns(['lpi'])\n    return known.set_column",
            "columns",
        ),
        (
            "    return known.set_column",
            "    return known.set_column(5, 'row', pc.add(known['row'], 99999))\n    return known.set_column",
            "numbers of rows that it was not given",
        ),
        ("import pyarrow as pa\n", "import pyarrow as pa\nimport nowhere\n", "ModuleNotFoundError"),
    ],
)
def test_a_step_that_fails(policies: Path, directory: Path, old: str, new: str, message: str) -> None:
    """What a step does wrong is said, and neither a file nor a part of one is left."""
    edit(policies / "clinic" / "steps.py", old, new)
    with pytest.raises(ConfigError, match=message):
        derive(policies, directory)

    assert sorted(path.name for path in directory.iterdir()) == ["randhie.arrow"]


def test_a_step_does_not_get_what_is_carried(policies: Path, directory: Path) -> None:
    """The number of a person is not among the columns that a step is given."""
    edit(
        policies / "clinic" / "steps.py",
        "    known = years",
        "    assert not years.column_names, years.column_names\n    known = years",
    )
    with pytest.raises(ConfigError, match="failed: AssertionError") as caught:
        derive(policies, directory)

    assert "'lpi', 'physlm', 'disea', 'row']" in caught.value.message
    assert "record_number" not in caught.value.message


LABELLED = """
  labelled:
    path: further/labelled.arrow
    derived:
      step: choose
      version: 1
      reads: {randhie_features: {columns: [record_number], segments: [train]}}
    columns: {record_number: direct-identifier, round: direct-identifier}
"""
CHOOSE = """

@step(version=1)
def choose(years: pa.Table) -> pa.Table:
    numbers = pc.unique(years["record_number"]).slice(0, 3)
    return pa.table({"record_number": numbers, "round": pa.array([1, 1, 2])})
"""
FIRST = """
  first_round:
    path: first_round.arrow
    derived:
      step: taken
      version: 1
      reads: {randhie_features: {columns: [lpi], segments: [train/round-1]}}
    columns: {lpi: confidential}
"""
TAKEN = """

@step(version=1)
def taken(years: pa.Table) -> pa.Table:
    return years
"""
PARTS = "parts: {train: 80, test: 20}"
ROUNDS = f"{PARTS}\n      within:\n        train: {{rounds: 2, by: record_number, listed_in: labelled}}"


def test_rounds_of_a_step(policies: Path, directory: Path) -> None:
    """A step lists who is labelled next, of all that train; what reads a round is made after it, and ages with it.

    It also ages with how the catalog divides what it reads.
    """
    steps, catalog = policies / "clinic" / "steps.py", policies / "clinic" / "catalog.yaml"
    steps.write_text(steps.read_text() + CHOOSE + TAKEN)
    edit(catalog, PARTS, ROUNDS)
    # The reader of a round stands before what lists it.
    catalog.write_text(catalog.read_text() + FIRST + LABELLED)
    if os.geteuid() == 0:
        os.chown(directory, 65534, 65534)

    assert derive(policies, directory) == [*NAMES, "labelled", "first_round"]
    made = json.loads((directory / "first_round.arrow.lineage.json").read_text())
    assert made["rows"] == 2
    assert list(made["parents"][0]["listed"]) == ["labelled"]
    owners = {path.stat().st_uid for path in (directory, directory / "further", directory / "further/labelled.arrow")}
    assert len(owners) == 1

    edit(steps, "pa.array([1, 1, 2])", "pa.array([2, 1, 2])")
    edit(steps, "@step(version=1)\ndef choose", "@step(version=2)\ndef choose")
    edit(catalog, "step: choose\n      version: 1", "step: choose\n      version: 2")
    with pytest.raises(ConfigError, match="labelled cannot be used"):
        source.from_catalog(clinic(policies), directory, {"dataset": "first_round"}, None)
    assert derive(policies, directory) == ["labelled", "first_round"]

    edit(catalog, PARTS, "parts: {train: 50, test: 50}")
    why = curation.outdated(clinic(policies), directory, "labelled")
    assert "divides what it was derived from in another way" in why


def test_a_list_that_changed(policies: Path, directory: Path) -> None:
    """What was made of a round is outdated once another file lists the rounds."""
    steps, catalog = policies / "clinic" / "steps.py", policies / "clinic" / "catalog.yaml"
    steps.write_text(steps.read_text() + TAKEN)
    edit(catalog, PARTS, ROUNDS)
    plain = "    columns: {record_number: direct-identifier, round: internal}\n"
    catalog.write_text(f"{catalog.read_text()}{FIRST}\n  labelled:\n    path: labelled.arrow\n{plain}")
    derive_first = curation.derive_outdated(clinic(policies), policies, directory, ["randhie_features"])
    assert len(list(derive_first)) == 3
    train = source.from_catalog(
        clinic(policies), directory, {"dataset": "randhie_features", "segments": ["train"]}, None
    )
    numbers = train.table["record_number"].to_pylist()
    write(directory / "labelled.arrow", pa.table({"record_number": numbers[:3], "round": [1, 1, 2]}))
    assert derive(policies, directory) == ["first_round"]
    write(directory / "labelled.arrow", pa.table({"record_number": numbers[:1], "round": [1]}))

    with pytest.raises(ConfigError, match="labelled, which it was derived from, was changed since"):
        source.from_catalog(clinic(policies), directory, {"dataset": "first_round"}, None)


def test_rounds_that_come_from_themselves(policies: Path) -> None:
    """A list that is made of what it lists is refused."""
    steps, catalog = policies / "clinic" / "steps.py", policies / "clinic" / "catalog.yaml"
    steps.write_text(steps.read_text() + CHOOSE)
    edit(catalog, PARTS, ROUNDS)
    catalog.write_text(catalog.read_text() + LABELLED.replace("[train]", "[train/unlabelled]"))
    with pytest.raises(ConfigError, match="comes from labelled itself"):
        clinic(policies)


def test_order(policies: Path) -> None:
    """What is asked for comes with what it comes from; other names are refused."""
    zone = clinic(policies)

    assert curation.order(zone) == NAMES
    assert curation.order(zone, ["randhie_labelled"]) == NAMES[:2]
    for name in ("randhie", "randhie_claen"):
        with pytest.raises(UnknownNameError):
            curation.order(zone, [name])


def test_commands(policies: Path, directory: Path) -> None:
    """What a person sees: what was derived, what is up to date, and why something is not."""
    where = ["--policies", str(policies), "--data", str(directory)]
    run = CliRunner()
    before = run.invoke(cli, ["data", "lineage", "clinic", *where])
    derived = run.invoke(cli, ["data", "derive", "clinic", *where])
    again = run.invoke(cli, ["data", "derive", "clinic", "randhie_clean", *where])
    after = run.invoke(cli, ["data", "lineage", "clinic", *where])

    assert "not derived yet" in before.output
    assert "derived: randhie_clean: 19,138 rows by clean version 1" in derived.output
    assert again.output == "up to date: randhie_clean\n"
    assert "randhie_features: features version 1: up to date" in after.output
    assert "randhie: 20,190 rows, mdvis, lncoins, lpi, physlm, disea, past the step: record_number" in after.output


def test_main(policies: Path, directory: Path) -> None:
    """The program that an embedded cluster runs derives as well, and says what stops it."""
    for name in ("breast_cancer", "breast_cancer_resampled"):
        (directory / f"{name}.arrow").touch()
    curation.main(["clinic", str(policies), str(directory)])
    document = json.loads((directory / "randhie_clean.arrow.lineage.json").read_text())
    edit(policies / "clinic" / "steps.py", "MANY_VISITS = 5", "MANY_VISITS = 9")

    assert document["rows"] == 19_138
    with pytest.raises(SystemExit, match="raise its version"):
        curation.main(["clinic", str(policies), str(directory)])
