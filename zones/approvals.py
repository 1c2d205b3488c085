"""Functions that a zone's officer approved: one signed note each, in ``policies/<zone>/approved/``. Pure.

A function is named by the SHA-256 of what would be sent of it, so what was approved is what runs. Pickled functions
differ from process to process; ``ray_gpu.proposal`` says in which forms a function stays the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from zones import note as notes
from zones.note import VerifierKey

_HEAD = "ray-gpu approved function v1"
_NAME = re.compile(r"[!-~][ -~]{0,199}")
_FORM = re.compile(rf"{re.escape(_HEAD)}\nzone: (\S+)\nfunction: ([0-9a-f]{{64}})\nname: ({_NAME.pattern})\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """What an officer says: this function may be called in this zone."""

    zone: str
    #: SHA-256 of what is sent, hexadecimal.
    function: str
    #: For people.
    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"a function's name has 1 to 200 characters that can be printed, not {self.name[:40]!r}")

    def text(self) -> str:
        """Return what is signed."""
        return f"{_HEAD}\nzone: {self.zone}\nfunction: {self.function}\nname: {self.name}\n"


def approved(note: str, *, zone: str, officers: Sequence[VerifierKey]) -> Approval:
    """Return the approval in a note.

    Args:
        note: The file's content.
        zone: It must be for this one.
        officers: One of these must have signed it.

    Raises:
        ValueError: It is no approval, for another zone, or signed by no officer of these.
    """
    match = _FORM.fullmatch(notes.split(note)[0])
    if match is None:
        raise ValueError("this is no approval; write it with `ray-gpu policy approve`")
    if match[1] != zone:
        raise ValueError(f"it approves a function for zone {match[1]}, not {zone}; approve it for this zone")
    if not any(notes.signed_by(note, officer) for officer in officers):
        known = ", ".join(officer.name for officer in officers) or "nobody"
        raise ValueError(f"no officer in zone.yaml signed it as it is (officers: {known}); approve the function anew")
    return Approval(zone=match[1], function=match[2], name=match[3])
