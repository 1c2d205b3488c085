"""zones.config: policy files say what they mean, or nothing starts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from zones.config import endpoint_allowed, load_zone, zone_names
from zones.errors import ConfigError, UnknownNameError
from zones.hours import Hours
from zones.model import NodeShare, Obligations, Padding, Shuffle, SmallBytes

SHIPPED = Path(__file__).parents[2] / "policies"


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """A copy of the shipped policies that a test may break."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "policies"))


def edit(path: Path, old: str, new: str) -> int:
    """Replace *old*, which stands once in *path*, and return its 1-based line."""
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))
    return text[: text.index(old)].count("\n") + 1


def test_clinic() -> None:
    """The shipped clinic says what the demo relies on."""
    zone = load_zone(SHIPPED, "clinic")

    assert zone.classes == ("public", "internal", "confidential", "direct-identifier")
    assert zone.default_class == "direct-identifier"
    assert zone.small_bytes == SmallBytes(classification="internal", max_bytes=65536, max_session_bytes=4194304)
    assert zone.pools == ("shared",)
    assert zone.datasets["randhie"].columns["record_number"] == "direct-identifier"
    assert list(zone.datasets)[:3] == ["randhie", "breast_cancer", "breast_cancer_resampled"]
    assert all(dataset.derived for name, dataset in zone.datasets.items() if name.startswith("randhie_"))
    assert zone.obligations.shuffle is Shuffle.ROWS
    assert "embedded-vault" in zone.obligations.accepted_degradations
    assert zone.rank("public") < zone.rank("direct-identifier")


def test_every_shipped_zone_loads() -> None:
    """Both shipped zones load."""
    assert zone_names(SHIPPED) == ["clinic", "openlab", "trading"]
    assert [load_zone(SHIPPED, name).name for name in zone_names(SHIPPED)] == ["clinic", "openlab", "trading"]


@pytest.mark.parametrize(("dataset", "module"), [("randhie", "clinic"), ("macrodata", "trading")])
def test_catalog_names_the_real_columns(dataset: str, module: str) -> None:
    """The catalog lists statsmodels' columns in their order, and the made-up one after them."""
    datasets = pytest.importorskip("statsmodels.datasets", reason="statsmodels is not installed (extra demo)")
    real = list(getattr(datasets, dataset).load_pandas().data.columns)

    columns = list(load_zone(SHIPPED, module).datasets[dataset].columns)

    assert columns == real + (["record_number"] if dataset == "randhie" else [])


def test_catalog_names_the_real_breast_cancer_columns() -> None:
    """The catalog lists scikit-learn's features in their order, then the target."""
    sklearn = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed (extra demo)")
    real = [name.replace(" ", "_") for name in sklearn.load_breast_cancer().feature_names]

    datasets = load_zone(SHIPPED, "clinic").datasets

    assert list(datasets["breast_cancer"].columns) == [*real, "target"]
    assert datasets["breast_cancer_resampled"].columns == datasets["breast_cancer"].columns


def test_unknown_zone() -> None:
    """An unknown zone is refused with the names that exist and the nearest."""
    with pytest.raises(UnknownNameError, match=r"did you mean 'clinic'\?") as caught:
        load_zone(SHIPPED, "clinc")

    assert (caught.value.kind, caught.value.name) == ("zone", "clinc")
    assert caught.value.known == ["clinic", "openlab", "trading"]


@pytest.mark.parametrize("name", ["pools", "vault", "..", "../policies/clinic", "", "clinic/"])
def test_a_path_is_no_zone(name: str) -> None:
    """Only a directory with a zone.yaml is a zone; no name leads elsewhere."""
    with pytest.raises(UnknownNameError):
        load_zone(SHIPPED, name)


BROKEN = [
    ("zone.yaml", "max_lease_s: 3600", "max_leese_s: 3600", r"unknown key 'max_leese_s' \(did you mean"),
    ("zone.yaml", "max_lease_s: 3600", "max_lease_s: 1h", "valid integer"),
    ("zone.yaml", "max_lease_s: 3600", "max_lease_s: 0", "greater than 0"),
    ("zone.yaml", "max_lease_s: 3600", "max_lease_s: 999999", "less than or equal to 86400"),
    ("zone.yaml", "max_lease_s: 3600", "pools: [other]", "stands here twice"),
    ("zone.yaml", "max_lease_s: 3600", "1: 3600", "a key must be text"),
    ("zone.yaml", "max_lease_s: 3600", "max_lease_s: !!python/name:os.system x", "could not determine a constructor"),
    ("zone.yaml", "max_lease_s: 3600", "max_lease_s: 2001-99-99", "month must be"),
    ("zone.yaml", "shuffle: rows", "shuffle: blocks(0)", "shuffle is rows, none or blocks"),
    ("zone.yaml", "shuffle: rows", "padding: thick", "'fine' or 'coarse'"),
    ("zone.yaml", "shuffle: rows", "max_rows: 0", "greater than 0"),
    ("zone.yaml", "shuffle: rows", "min_shards: 0", "greater than or equal to 1"),
    ("zone.yaml", "shuffle: rows", "max_node_share: {percent: 100}", "less than or equal to 99"),
    ("zone.yaml", "shuffle: rows", "max_node_share: {percent: 50, window_s: 1}", "greater than or equal to 60"),
    ("zone.yaml", "shuffle: rows", "max_node_share: 50%", "valid dictionary"),
    ("zone.yaml", "shuffle: rows", "gateways: 0", "greater than or equal to 1"),
    ("zone.yaml", "shuffle: rows", "max_node_share: {percent: 2}\ngateways: 3", "3 gateways divide it"),
    ("zone.yaml", "    shuffle: blocks(16)", "    max_node_share: {percent: 1}\ngateways: 2", "2 gateways divide it"),
    ("zone.yaml", "shuffle: rows", "exclusive_gpu: 1", "valid boolean"),
    ("zone.yaml", "shuffle: rows", "gpu_kinds: []", "at least 1"),
    ("zone.yaml", "shuffle: rows", "environments: [latest]", "named by its digest"),
    ("zone.yaml", "shuffle: rows", "resident_shards: 1", "valid boolean"),
    ("zone.yaml", "shuffle: rows", "max_session_s: 0", "greater than 0"),
    ("zone.yaml", "shuffle: rows", "hours: mon-fri", "are written as in"),
    ("zone.yaml", "shuffle: rows", "purposes: [care, care]", "care stands here twice"),
    ("zone.yaml", "shuffle: rows", "reviewed_functions_only: yes please", "valid boolean"),
    ("zone.yaml", "shuffle: rows", "officers: [olga]", r"name\+id\+base64"),
    ("zone.yaml", "default_class: direct-identifier", "default_class: internal", "must be the highest class"),
    ("zone.yaml", "default_class: direct-identifier", "default_class: secret", "no class 'secret'"),
    ("zone.yaml", "  classification: internal", "  classification: internl", r"no class 'internl' \(did you mean"),
    ("zone.yaml", "  max_bytes: 65536", "  max_byte: 65536", r"unknown key 'max_byte' \(did you mean 'max_bytes'"),
    ("zone.yaml", "  max_bytes: 65536", "  max_bytes: true", "valid integer"),
    ("zone.yaml", "pools: [shared]", "pools: [shard]", r"pool 'shard' has no policy .* \(did you mean 'shared'"),
    ("zone.yaml", "pools: [shared]", "pools: []", "at least 1"),
    ("zone.yaml", "pools: [shared]", "pools: [shared, shared]", "shared stands here twice"),
    ("zone.yaml", "pools: [shared]", "pools: [../clinic/egress]", "must be 1 to 40 characters"),
    ("zone.yaml", '"127.0.0.0/8:20000-65535"', '"localhost:20000-65535"', "does not appear to be an IPv4"),
    ("zone.yaml", '"127.0.0.0/8:20000-65535"', '"127.0.0.0/8:20000"', "network:first-last"),
    ("zone.yaml", '"127.0.0.0/8:20000-65535"', '"127.0.0.0/8:9-3"', "network:first-last"),
    ("zone.yaml", "  - swap-on ", "  - no-cgroup ", "no-cgroup stands here twice"),
    ("zone.yaml", "  - swap-on ", "  - swap-of ", r"no degradation 'swap-of' \(did you mean 'swap-on'"),
    ("zone.yaml", "  - swap-on ", "  - core-limit ", "no degradation 'core-limit'"),
    ("zone.yaml", "    shuffle: blocks(16)", "    accepted_degradations: [no-cgroups]", "did you mean 'no-cgroup'"),
    ("zone.yaml", "  - datasets: [breast_cancer_resampled]", "  - datasets: [breast]", "no data set 'breast'"),
    ("zone.yaml", "    shuffle: blocks(16)", "    shufle: blocks(16)", r"unknown key 'shufle' \(did you mean"),
    ("catalog.yaml", "      mdvis: confidential ", "      mdvis: confidental ", "no class 'confidental'"),
    ("catalog.yaml", "      lncoins: internal ", "      mdvis: internal ", "mdvis stands here twice"),
    ("catalog.yaml", "    path: randhie.arrow", "    path: ../randhie.arrow", "relative to the zone's data directory"),
    ("catalog.yaml", "    path: randhie.arrow", "    path: /randhie.arrow", "relative to the zone's data directory"),
    ("catalog.yaml", "    path: randhie.arrow", "    path: randhie.pickle", "relative to the zone's data directory"),
    ("catalog.yaml", "    same_columns_as: breast_cancer", "    same_columns_as: brest_cancer", "did you mean"),
    (
        "catalog.yaml",
        "    same_columns_as: breast_cancer",
        "    same_columns_as: breast_cancer_resampled",
        "no data set with columns",
    ),
]


@pytest.mark.parametrize(
    ("file", "old", "new", "message"), BROKEN, ids=[f"{row[0]}:{row[2].strip()}" for row in BROKEN]
)
def test_broken_file(policies: Path, file: str, old: str, new: str, message: str) -> None:
    """A file that does not say what it must is refused with its name and the line of the mistake."""
    load_zone(policies, "clinic")
    path = policies / "clinic" / file
    line = edit(path, old, new)

    with pytest.raises(ConfigError, match=message) as caught:
        load_zone(policies, "clinic")

    assert (caught.value.file, caught.value.line) == (str(path), line)
    assert f"{path}:{line}: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("[]\n", 1),
        ("datasets:\n  a: [\n", 3),
        ("datasets: {}\n---\ndatasets: {}\n", 2),
        ("datasets:\n  a: &a\n    path: a.arrow\n    columns: {x: public}\n  b: *a\n", 5),
        ("datasets:\n  a:\n    path: a.arrow\n", 2),
        ("datasets:\n  a:\n    path: a.arrow\n    columns: {}\n", 4),
        ("datasets:\n  a:\n    path: a.arrow\n    columns: {on: public, yes: public}\n", 4),
        ("datasets:\n  a: \0\n", 2),
        ("[" * 10000, 1),
    ],
    ids=[
        "empty",
        "no mapping",
        "cut off",
        "two documents",
        "alias",
        "no columns",
        "empty columns",
        "bool as name",
        "control character",
        "too deep",
    ],
)
def test_broken_catalog(policies: Path, text: str, line: int) -> None:
    """A catalog that is not one plain document is refused with the line."""
    path = policies / "clinic" / "catalog.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        load_zone(policies, "clinic")

    assert (caught.value.file, caught.value.line) == (str(path), line)


def test_not_utf8(policies: Path) -> None:
    """A file that is not UTF-8 is refused with the line."""
    path = policies / "clinic" / "egress.cedar"
    path.write_bytes(b"// one\n// two \xff\n")

    with pytest.raises(ConfigError, match="UTF-8") as caught:
        load_zone(policies, "clinic")

    assert (caught.value.file, caught.value.line) == (str(path), 2)


FILES = ["clinic/zone.yaml", "clinic/catalog.yaml", "clinic/egress.cedar", "schema.cedarschema", "pools/shared.cedar"]


@pytest.mark.parametrize("file", FILES)
def test_missing_file(policies: Path, file: str) -> None:
    """Every file is needed: without it the zone does not load."""
    (policies / file).unlink()

    with pytest.raises(UnknownNameError if file.endswith("zone.yaml") else ConfigError):
        load_zone(policies, "clinic")


@pytest.mark.parametrize("file", FILES)
def test_digest_covers(policies: Path, file: str) -> None:
    """One more byte in any file that decides changes the policy digest."""
    before = load_zone(policies, "clinic").policy_digest
    assert load_zone(policies, "clinic").policy_digest == before

    (policies / file).write_bytes((policies / file).read_bytes() + b"\n")

    assert load_zone(policies, "clinic").policy_digest != before


def test_digest_of_another_zone(policies: Path) -> None:
    """Another zone's files do not change the policy digest."""
    before = load_zone(policies, "clinic").policy_digest

    (policies / "trading" / "zone.yaml").write_text("")

    assert load_zone(policies, "clinic").policy_digest == before


def test_obligation_rules_inherit(policies: Path) -> None:
    """A rule keeps the zone's value for what it leaves out, and overrides the rest."""
    path = policies / "clinic" / "zone.yaml"
    edit(path, "    shuffle: blocks(16)", "    pools: [shared]\n    accepted_degradations: []")

    (rule,) = load_zone(policies, "clinic").obligation_rules

    assert (rule.pools, rule.datasets) == (frozenset({"shared"}), frozenset({"breast_cancer_resampled"}))
    assert (rule.obligations.shuffle, rule.obligations.max_lease_s) == (Shuffle.ROWS, 3600)
    assert rule.obligations.accepted_degradations == frozenset()


def test_all_obligations(policies: Path) -> None:
    """Every key of zone.yaml becomes what a decision demands; a rule's own value beats the zone's."""
    path = policies / "clinic" / "zone.yaml"
    written = """shuffle: none
padding: coarse
max_rows: 1000
min_shards: 4
max_node_share: {percent: 60}
exclusive_gpu: true
gpu_kinds: ["NVIDIA H100*", "NVIDIA H200*"]
environments: [DIGEST]
max_session_s: 28800
hours: mon-fri 07:00-19:00 Europe/Berlin
purposes: [care]
resident_shards: true
reviewed_functions_only: true"""
    edit(path, "shuffle: rows", written.replace("DIGEST", "0a" * 32))
    edit(path, "    shuffle: blocks(16)", "    max_rows: 10\n    max_node_share: {percent: 10, window_s: 60}")

    zone = load_zone(policies, "clinic")
    (rule,) = zone.obligation_rules

    assert zone.obligations == Obligations(
        shuffle=Shuffle.NONE,
        padding=Padding.COARSE,
        max_rows=1000,
        min_shards=4,
        max_node_share=NodeShare(percent=60, window_s=86400),
        accepted_degradations=zone.obligations.accepted_degradations,
        exclusive_gpu=True,
        gpu_kinds=("NVIDIA H100*", "NVIDIA H200*"),
        environments=frozenset({"0a" * 32}),
        resident_shards=True,
        max_lease_s=3600,
        max_session_s=28800,
        hours=Hours.parse("mon-fri 07:00-19:00 Europe/Berlin"),
        purposes=frozenset({"care"}),
        reviewed_functions_only=True,
    )
    share = NodeShare(percent=10, window_s=60)
    assert rule.obligations == replace(zone.obligations, max_rows=10, max_node_share=share)


def test_gateways_divide_a_share(policies: Path) -> None:
    """Each of a zone's gateways may give a node its part of the bound, rounded down; with one that is all of it."""
    path = policies / "clinic/zone.yaml"
    edit(path, "shuffle: rows", "max_node_share: {percent: 61, window_s: 3600}")
    alone = load_zone(policies, "clinic")
    edit(path, "max_node_share:", "gateways: 2\nmax_node_share:")
    divided = load_zone(policies, "clinic")

    assert (alone.gateways, divided.gateways) == (1, 2)
    assert alone.obligations.max_node_share == NodeShare(percent=61, window_s=3600)
    assert divided.obligations.max_node_share == NodeShare(percent=30, window_s=3600)
    assert divided.obligation_rules[0].obligations.max_node_share == NodeShare(percent=30, window_s=3600)


def test_shuffle_blocks() -> None:
    """``blocks(16)`` becomes blocks of 16 rows."""
    (rule,) = load_zone(SHIPPED, "clinic").obligation_rules

    assert (rule.obligations.shuffle, rule.obligations.block_rows) == (Shuffle.BLOCKS, 16)


@pytest.mark.parametrize(
    ("host", "port", "allowed"),
    [
        ("127.0.0.1", 20000, True),
        ("127.9.9.9", 65535, True),
        ("127.0.0.1", 19999, False),
        ("128.0.0.1", 20000, False),
        ("::1", 20000, False),
        ("localhost", 20000, False),
        ("127.0.0.1.evil", 20000, False),
        ("", 20000, False),
    ],
)
def test_endpoint(host: str, port: int, allowed: bool) -> None:
    """A data connection goes to an address and port that zone.yaml lists, and to no name."""
    assert endpoint_allowed(["127.0.0.0/8:20000-65535"], host, port) is allowed
