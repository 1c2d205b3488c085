"""`ray-gpu policy`: what an officer sees."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ray_gpu.cli.main import cli
from zones.budget import Egress
from zones.config import load_zone
from zones.ledger import Ledger
from zones.model import EgressRequest
from zones.policy import Policy
from zones.review import completed

SHIPPED = Path(__file__).parents[1] / "policies"


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """A copy of the shipped policies that a test may change."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "policies"))


def run(*arguments: object) -> Result:
    """Run a command of `ray-gpu policy`."""
    return CliRunner().invoke(cli, ["policy", *map(str, arguments)])


def change(file: Path, old: str, new: str) -> None:
    """Replace the one place where a file has a text."""
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_check(policies: Path) -> None:
    """What is shipped is fine; what is wrong is named with file and line."""
    good = run("check")
    change(policies / "clinic/egress.cedar", "context.classes.contains", "context.clases.contains")
    bad, other = run("check", "--policies", policies), run("check", "--policies", policies, "trading")

    assert (good.exit_code, good.output.splitlines()[0]) == (0, "ok: clinic: 6 data sets, 5 rules, pools: shared")
    assert bad.exit_code == 1
    assert f"{policies}/clinic/egress.cedar:13: " in bad.output.replace("\n", "")
    assert other.exit_code == 0


def test_no_zone(tmp_path: Path) -> None:
    """A directory that describes no zone is not fine."""
    assert run("check", "--policies", tmp_path).exit_code == 2
    assert run("check", "clinc").exit_code == 1
    assert "clinic" in run("check", "clinc").output
    assert run("check", "../clinic").exit_code == 2


def test_test(policies: Path) -> None:
    """Golden decisions hold as shipped; the one that a change breaks is named, with what was expected and decided."""
    good = run("test")
    change(policies / "trading/egress.cedar", 'when { context.purpose != "" };', ";")
    bad = run("test", "--policies", policies)

    assert (good.exit_code, good.output.splitlines()[-1]) == (0, "trading: 5 of 5 golden decisions hold")
    assert bad.exit_code == 1
    assert "decisions.yaml:11: without a purpose nothing leaves" in bad.output
    assert "expected refused by default; decided allowed by quants-may-send, shared-admits-zones" in bad.output
    assert "trading: 4 of 5 golden decisions hold" in bad.output


def test_explain() -> None:
    """A refusal names the rule, where it stands, what would have it allowed, and whom to ask."""
    columns = ["--columns", "mdvis, record_number"]
    refused = run("explain", "clinic", "--dataset", "randhie", *columns, "--team", "research")
    allowed = run("explain", "trading", "--dataset", "macrodata", "--team", "quants", "--purpose", "inflation")

    assert refused.exit_code == allowed.exit_code == 0
    assert refused.output.startswith("refused: team research sends randhie: mdvis, record_number ")
    assert "rule no-direct-identifiers: direct identifiers never leave the clinic" in refused.output
    assert "egress.cedar:13)" in refused.output
    assert "without column record_number\n" in refused.output
    assert "ask the zone's security officer to change policies/clinic/egress.cedar" in refused.output
    assert allowed.output.startswith("allowed: ")
    assert "on the condition that shuffle: rows\n" in allowed.output


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        (["--dataset", "randhi"], "randhie"),
        (["--dataset", "randhie", "--columns", "mdvs"], "mdvis"),
        (["--pool", "shard"], "shared"),
    ],
)
def test_explain_what_does_not_exist(wrong: list[str], near: str) -> None:
    """A name that does not exist is refused with the nearest that does."""
    done = run("explain", "clinic", *wrong)

    assert done.exit_code == 1
    assert f"did you mean '{near}'" in done.output or f"did you mean {near}" in done.output


def test_diff(policies: Path) -> None:
    """Nothing differs between copies; who gained and who lost is said by name; a zone that is new as well."""
    same = run("diff", SHIPPED, policies)
    change(policies / "clinic/catalog.yaml", "hlthp: confidential", "hlthp: direct-identifier")
    change(policies / "trading/egress.cedar", 'resource == Pool::"shared"\n)\nwhen', "resource\n)\nwhen")
    change(policies / "trading/egress.cedar", 'Group::"quants"', 'Group::"risk"')
    shutil.copytree(policies / "trading", policies / "lab")
    found = run("diff", SHIPPED, policies)

    assert (same.exit_code, len(same.output.splitlines())) == (0, 3)
    assert found.exit_code == 1
    lines = found.output.splitlines()
    assert "  team research loses randhie: hlthp to pool shared, always" in lines
    assert "  team risk gains <arguments> to pool shared, for any stated purpose" in lines
    assert "  team quants loses <arguments> to pool shared, for any stated purpose" in lines
    assert "zone lab is new: read it whole" in lines
    assert run("diff", SHIPPED, policies, "--zone", "trading").exit_code == 1
    assert "clinic" not in run("diff", SHIPPED, policies, "--zone", "trading").output


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[[], Path]:
    """Return what writes a ledger of the clinic with an allowed and a refused decision, both real."""

    def write() -> Path:
        path, zone = tmp_path / "clinic.ledger", load_zone(SHIPPED, "clinic")
        policy = Policy.load(SHIPPED, zone)
        with Ledger.open(path, zone="clinic") as writer:
            for columns in ({"mdvis"}, {"mdvis", "record_number"}):
                asked = EgressRequest(
                    zone="clinic",
                    pool="shared",
                    person="dana",
                    groups=frozenset({"research"}),
                    dataset="randhie",
                    columns=frozenset(columns),
                )
                request = completed(zone, asked)
                egress = Egress(request=request, session="s", policy_digest=zone.policy_digest)
                writer.decided(egress, policy.decide(request))
        return path

    return write


def test_simulate(policies: Path, ledger: Callable[[], Path]) -> None:
    """A ledger's decisions are as they were under the same policy, and shown one by one under another."""
    path = ledger()
    same = run("simulate", path)
    change(policies / "clinic/egress.cedar", 'Group::"research"', 'Group::"nursing"')
    found = run("simulate", path, "--policies", policies)

    assert (same.exit_code, same.output) == (0, "0 of 2 decisions would change\n")
    assert found.exit_code == 1
    assert "  entry 2: dana: team research sends randhie: mdvis " in found.output
    assert "was allowed, would be refused by default" in found.output
    assert "1 of 2 decisions would change" in found.output
