"""zones.approvals and zones.note: which functions an officer signed, and nobody else."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.zones.test_config import SHIPPED, edit
from zones import note as notes
from zones.approvals import Approval, approved
from zones.config import approval_path, load_zone
from zones.errors import ConfigError
from zones.note import SigningKey, VerifierKey

OLGA, OTHER = SigningKey.generate("olga"), SigningKey.generate("olga")
APPROVAL = Approval(zone="clinic", function="ab" * 32, name="total")


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """The shipped policies with an officer and an approval."""
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "policies"))
    edit(folder / "clinic/zone.yaml", "shuffle: rows", f"shuffle: rows\nofficers: [{OLGA.verifier}]")
    write(folder, OLGA.sign(APPROVAL.text()))
    return folder


def write(folder: Path, note: str) -> Path:
    """Write an approval."""
    path = folder / approval_path("clinic", APPROVAL.function)
    path.parent.mkdir(exist_ok=True)
    path.write_text(note)
    return path


def test_approved(policies: Path) -> None:
    """An officer's approval is the zone's, and a part of the policy's digest."""
    zone = load_zone(policies, "clinic")

    assert zone.approved == {APPROVAL.function: "total"}
    (policies / approval_path("clinic", APPROVAL.function)).unlink()
    assert load_zone(policies, "clinic").approved == {}
    assert load_zone(policies, "clinic").policy_digest != zone.policy_digest


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (OTHER.sign(APPROVAL.text()), r"no officer in zone\.yaml signed it as it is \(officers: olga\)"),
        (OLGA.sign(APPROVAL.text()).replace("ab" * 32, "ac" * 32), "no officer"),
        (OLGA.sign(APPROVAL.text()).replace("total", "other"), "no officer"),
        (OLGA.sign(Approval(zone="trading", function="ab" * 32, name="total").text()), "for zone trading, not clinic"),
        (OLGA.sign("ray-gpu.ledger/clinic\n1\nAAAA\n"), "this is no approval"),
        (APPROVAL.text(), "this is no signed note"),
    ],
    ids=["another's", "another function", "another name", "another zone", "another note", "unsigned"],
)
def test_refused(policies: Path, note: str, message: str) -> None:
    """Whatever no officer signed for this zone approves nothing; file and reason are said, and all else holds."""
    path = write(policies, note)

    zone = load_zone(policies, "clinic")

    assert zone.approved == {}
    (problem,) = zone.disapproved
    assert problem.startswith(f"{path}: ")
    assert re.search(message, problem)


def test_no_officers(policies: Path) -> None:
    """To take back all that a key signed, it is taken out of zone.yaml: that holds, and approves nothing any more."""
    edit(policies / "clinic/zone.yaml", f"officers: [{OLGA.verifier}]", "officers: []")

    zone = load_zone(policies, "clinic")

    assert (zone.approved, len(zone.disapproved)) == ({}, 1)
    assert "officers: nobody" in zone.disapproved[0]


def test_two_officers(policies: Path) -> None:
    """Several officers may sign; two of one name may not be."""
    ben = SigningKey.generate("ben")
    write(policies, ben.sign(APPROVAL.text()))
    line = edit(policies / "clinic/zone.yaml", f"[{OLGA.verifier}]", f"[{OLGA.verifier}, {ben.verifier}]")

    assert load_zone(policies, "clinic").approved == {APPROVAL.function: "total"}
    edit(policies / "clinic/zone.yaml", str(ben.verifier), str(OTHER.verifier))
    with pytest.raises(ConfigError, match=rf"zone\.yaml:{line}: .*two keys have the name olga"):
        load_zone(policies, "clinic")


def test_keys() -> None:
    """A private key is written and read in the form of signed notes; it signs what its public one verifies."""
    again = SigningKey.parse(f"{OLGA.text}\n")
    note = again.sign("text\n")

    assert again.verifier == OLGA.verifier == VerifierKey.parse(str(OLGA.verifier))
    assert notes.signed_by(note, OLGA.verifier)
    assert not notes.signed_by(note, OTHER.verifier)
    assert approved(OLGA.sign(APPROVAL.text()), zone="clinic", officers=[OLGA.verifier]) == APPROVAL
    assert "KEY" not in repr(OLGA)


@pytest.mark.parametrize("text", ["", str(OLGA.verifier), OLGA.text[:-8], OLGA.text.replace("+", "-")])
def test_no_key(text: str) -> None:
    """What is no private key says how to make one."""
    with pytest.raises(ValueError, match="ray-gpu policy officer"):
        SigningKey.parse(text)


def test_key_names() -> None:
    """A name that signed notes cannot have is refused."""
    with pytest.raises(ValueError, match="neither spaces nor plus signs"):
        SigningKey.generate("olga smith")


@pytest.mark.parametrize("name", ["", "a\nfunction: 00", "x" * 201, "caf\u00e9", " x"])
def test_names(name: str) -> None:
    """A name that a note cannot hold on one line is refused before anything is written."""
    with pytest.raises(ValueError, match="characters that can be printed"):
        Approval(zone="clinic", function="ab" * 32, name=name)
