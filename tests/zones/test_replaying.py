"""zones.replaying: what was decided is what the policy of its time says, or is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ray_gpu.cli.main import cli
from zones.budget import Egress
from zones.config import load_zone
from zones.errors import LedgerError
from zones.ledger import Ledger, read
from zones.model import EgressRequest
from zones.policy import Policy
from zones.replaying import entry, replay
from zones.review import completed

SHIPPED = Path(__file__).parents[2] / "policies"
ASKED = EgressRequest(zone="clinic", pool="shared", person="dana", groups=frozenset({"research"}), dataset="randhie")
COLUMNS = (frozenset({"mdvis"}), frozenset({"mdvis", "record_number"}))


def load(policies: Path) -> Policy:
    """Load the clinic's policy."""
    return Policy.load(policies, load_zone(policies, "clinic"))


@pytest.fixture
def closed(tmp_path: Path) -> Policy:
    """The clinic's policy after a change: another team sends."""
    policies = Path(shutil.copytree(SHIPPED, tmp_path / "policies"))
    file = policies / "clinic/egress.cedar"
    file.write_text(file.read_text().replace('Group::"research"', 'Group::"nursing"'))
    return load(policies)


def decide(ledger: Ledger, policy: Policy, columns: frozenset[str], **wrong: Any) -> None:
    """Write a decision as a gateway does; *wrong* says in what it is not what the policy decided."""
    request = completed(policy.zone, replace(ASKED, columns=columns))
    decision = replace(policy.decide(request), **wrong)
    ledger.decided(Egress(request=request, session="s", policy_digest=policy.zone.policy_digest), decision)


@pytest.fixture
def path(tmp_path: Path, closed: Policy) -> Path:
    """A ledger of two runs under two versions of the policy."""
    path = tmp_path / "ledger.sqlite"
    for policy in (load(SHIPPED), closed):
        with Ledger.open(path, zone="clinic") as ledger:
            ledger.append(entry(policy))
            for columns in COLUMNS:
                decide(ledger, policy, columns)
    return path


def test_as_written_down(path: Path) -> None:
    """Every decision is made again by the policy of its time, also after that policy was changed."""
    found = list(replay(read(path)))

    assert [one.same for one in found] == [True] * 4
    assert [one.allowed for one in found] == [True, False, False, False]
    done = CliRunner().invoke(cli, ["audit", "replay", str(path)])
    assert (done.exit_code, done.output) == (0, "4 of 4 decisions are as the policy of their time has them\n")


@pytest.mark.parametrize(
    "wrong",
    [{"allowed": True}, {"rules": ("research-may-send",)}, {"allowed": True, "rules": ("research-may-send",)}],
    ids=["answer", "rules", "both"],
)
def test_not_as_the_policy_says(path: Path, closed: Policy, wrong: dict[str, Any]) -> None:
    """A decision that its policy does not make, by answer or rules, is named, though the ledger verifies."""
    with Ledger.open(path, zone="clinic") as ledger:
        decide(ledger, closed, COLUMNS[0], **wrong)
    found = list(replay(read(path)))

    assert [one.seq for one in found if not one.same] == [10]
    done = CliRunner().invoke(cli, ["audit", "replay", str(path)])
    assert done.exit_code == 1
    assert "entry 10: written down as " in done.output
    assert "4 of 5 decisions" in done.output


def kept(policy: Policy, **changes: Any) -> dict[str, Any]:
    """Return a policy's entry, changed."""
    return {**entry(policy), **changes}


def test_policy_that_is_not_there(tmp_path: Path, closed: Policy) -> None:
    """A decision without its policy before it, or with another than it names, cannot be made again, and is named."""
    shipped = load(SHIPPED)
    other, outside = {**entry(closed)["files"]}, {**entry(shipped)["files"], "../outside": "x"}
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([], "entry 2 rests on a policy that the ledger does not hold"),
        ([entry(closed)], "entry 3 rests on a policy that the ledger does not hold"),
        ([kept(shipped, files=other)], "entry 2 holds another policy than the one whose digest it names"),
        ([kept(shipped, files={})], "entry 2 holds a policy that cannot be read"),
        ([kept(shipped, files=outside)], "entry 2 holds a policy file with a path outside"),
    ]
    for number, (before, message) in enumerate(cases):
        path = tmp_path / f"{number}.sqlite"
        with Ledger.open(path, zone="clinic") as ledger:
            for one in before:
                ledger.append(one)
            decide(ledger, shipped, COLUMNS[0])
        with pytest.raises(LedgerError, match=message):
            list(replay(read(path)))
    assert not (tmp_path.parent / "outside").exists()


def test_large_policy(tmp_path: Path) -> None:
    """A policy of more bytes than other entries may have is kept; a decision of that size is not."""
    policy = load(SHIPPED)
    large = {**entry(policy)["files"], "clinic/more.txt": "x" * (1 << 20)}
    with Ledger.open(tmp_path / "ledger.sqlite", zone="clinic") as ledger:
        ledger.append(kept(policy, files=large))
        with pytest.raises(ValueError, match="bytes"):
            ledger.append({"kind": "session-start", "person": "p" * (1 << 20), "session": "s"})
