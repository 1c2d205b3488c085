"""ray_gpu.in_force: a new version of a policy is in force once it holds and is written down; else the old one stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_gpu.in_force import InForce
from zones.errors import ConfigError, LedgerUnavailableError, UnknownNameError
from zones.policy import Policy


@pytest.fixture
def policies(copy_policies: Callable[..., Path]) -> Path:
    """A copy of the shipped policies."""
    return copy_policies()


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text, as an editor does: by another file in its place."""
    text = file.read_text()
    assert old in text
    draft = file.with_suffix(".draft")
    draft.write_text(text.replace(old, new))
    os.replace(draft, file)


class Adopted(list[str]):
    """Keeps the digests of what was adopted."""

    def __call__(self, policy: Policy) -> None:
        """Adopt."""
        self.append(policy.zone.policy_digest)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("clinic/egress.cedar", 'Group::"research"', 'Group::"nursing"'),
        ("clinic/catalog.yaml", "hlthp: confidential", "hlthp: internal"),
        ("clinic/zone.yaml", "max_lease_s: 3600", "max_lease_s: 60"),
        ("pools/shared.cedar", '["clinic", ', "["),
        ("schema.cedarschema", "// What zone", "// Which zone"),
    ],
)
def test_new_version(policies: Path, file: str, old: str, new: str) -> None:
    """A change of any file of the zone or its pools is found, adopted once, and in force afterwards."""
    found, adopted = InForce(policies, "clinic"), Adopted()
    before = found.policy
    found.refresh(adopted)
    assert (found.policy, adopted) == (before, [])

    edit(policies / file, old, new)
    found.refresh(adopted)
    found.refresh(adopted)

    assert adopted == [found.policy.zone.policy_digest]
    assert adopted != [before.zone.policy_digest]
    assert found.problem == ""


def test_other_zones_file(policies: Path) -> None:
    """A change of another zone's files is none of this one's."""
    found, adopted = InForce(policies, "clinic"), Adopted()
    edit(policies / "trading/egress.cedar", 'Group::"quants"', 'Group::"risk"')
    found.refresh(adopted)

    assert adopted == []


def test_version_that_does_not_hold(policies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is wrong, or gone, leaves the old version in force, and is said once; mended, it is in force."""
    found, adopted = InForce(policies, "clinic"), Adopted()
    before, file = found.policy, policies / "clinic/egress.cedar"
    edit(file, "context.classes.contains", "context.clases.contains")
    found.refresh(adopted)
    found.refresh(adopted)

    assert (found.policy, adopted) == (before, [])
    assert f"{file}:13: " in found.problem
    assert capsys.readouterr().err.count("the old version stays") == 1

    (policies / "clinic/zone.yaml").rename(policies / "zone.yaml")
    found.refresh(adopted)
    assert (found.policy, adopted) == (before, [])
    (policies / "zone.yaml").rename(policies / "clinic/zone.yaml")
    edit(file, "context.clases.contains", "context.classes.contains")
    edit(file, 'Group::"research"', 'Group::"nursing"')
    found.refresh(adopted)
    assert adopted == [found.policy.zone.policy_digest]
    assert found.problem == ""


def test_ledger_that_cannot_be_written(policies: Path) -> None:
    """What cannot be written down is not in force, and is tried again though no file changes any more."""
    found, adopted = InForce(policies, "clinic"), Adopted()
    before = found.policy
    edit(policies / "clinic/egress.cedar", 'Group::"research"', 'Group::"nursing"')

    def full(_: Policy) -> None:
        raise LedgerUnavailableError("the disk is full")

    found.refresh(full)
    assert (found.policy, found.problem) == (before, "the disk is full")
    found.refresh(adopted)
    assert adopted == [found.policy.zone.policy_digest]


def test_start(policies: Path) -> None:
    """At the start a policy has to hold."""
    with pytest.raises(UnknownNameError):
        InForce(policies, "nowhere")
    (policies / "clinic/egress.cedar").unlink()
    with pytest.raises(ConfigError):
        InForce(policies, "clinic")
