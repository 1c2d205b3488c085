"""The policy that a gateway decides by: read at its start, and anew when its files change. This module reads files.

A new version is in force once it was read whole, checked and written down; until then, and when it does not hold, the
old one stays. Decisions are remembered by their policy's digest, so those of an old version fall with it; a call that
runs ends under the decision that it began with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from zones.config import load_zone
from zones.errors import LedgerUnavailableError, ZoneError
from zones.policy import Policy

#: File, and what changes when it is written, replaced or made anew.
_Stamp = tuple[str, int, int, int]


class InForce:
    """One zone's policy.

    Args:
        directory: Policies directory.
        zone: The zone's name.

    Attributes:
        policy: What is in force.
        problem: Why files that changed are not; ``""`` when they are.

    Raises:
        ConfigError: A file is missing or wrong.
        UnknownNameError: The directory describes no such zone.
    """

    def __init__(self, directory: Path, zone: str) -> None:
        self._directory, self._zone = directory, zone
        self._seen = self._stamps()
        self.policy = self._load()
        self.problem = ""

    def refresh(self, adopt: Callable[[Policy], None]) -> None:
        """Look whether files changed since the last look; put a new version in force.

        Args:
            adopt: Called with it before, to write it down.
        """
        stamps = self._stamps()
        if stamps == self._seen:
            return
        try:
            policy = self._load()
            if policy.zone.policy_digest != self.policy.zone.policy_digest:
                adopt(policy)
            self.policy, self.problem = policy, ""
        except LedgerUnavailableError as error:
            # Looked at again next time: the files are fine.
            self._report(error.message)
            return
        except ZoneError as error:
            self._report(error.message)
        self._seen = stamps

    def _report(self, problem: str) -> None:
        if problem != self.problem:
            sys.stderr.write(f"the policy's files changed, and the old version stays: {problem}\n")
        self.problem = problem

    def _load(self) -> Policy:
        return Policy.load(self._directory, load_zone(self._directory, self._zone))

    def _stamps(self) -> list[_Stamp]:
        found = []
        zone = self._directory / self._zone
        for folder in (self._directory, zone, zone / "approved", self._directory / "pools"):
            for path in sorted(folder.glob("*.*")):
                try:
                    status = path.stat()
                except OSError:
                    continue
                found.append((str(path), status.st_mtime_ns, status.st_size, status.st_ino))
        return found
