"""Working hours, as in ``mon-fri 07:00-19:00 Europe/Berlin``. Pure, but for the host's time zones."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, time, timedelta
from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = "|".join(_DAYS)
_FORM = re.compile(rf"((?:{_DAY})(?:[-,](?:{_DAY}))*) ([0-2]\d:[0-5]\d)-([0-2]\d:[0-5]\d) (\S+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """The days of a week, and the time of those days, in which something may be done."""

    #: As it was written.
    text: str
    #: 0 is Monday.
    days: frozenset[int]
    #: Minutes after midnight: the first, and the first that is over again.
    start: int
    stop: int
    #: Name of the time zone.
    zone: str
    #: Hours that must be as well.
    also: Hours | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``days from-to zone``; days are names, lists and ranges of them, as in ``mon-wed,fri``.

        Raises:
            ValueError: *text* is not in that form, ends before it begins, or names no time zone of this host.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"hours are written as in 'mon-fri 07:00-19:00 Europe/Berlin', not {text!r}")
        start, stop = _minutes(match[2]), _minutes(match[3])
        if not start < stop <= 24 * 60:
            raise ValueError(f"hours begin before they end, by 24:00, on one day; not {text!r}")
        try:
            ZoneInfo(match[4])
        except (OSError, ValueError, ZoneInfoNotFoundError):
            raise ValueError(f"there is no time zone {match[4]!r}; use a name such as Europe/Berlin") from None
        return cls(text=text, days=_days(match[1]), start=start, stop=stop, zone=match[4])

    def end(self, now: datetime) -> datetime | None:
        """Return when the hours end that *now*, an aware time, is within, in UTC; ``None`` outside of all."""
        local = now.astimezone(ZoneInfo(self.zone))
        minute = 60 * local.hour + local.minute
        if local.weekday() not in self.days or not self.start <= minute < self.stop:
            return None
        day = local.date() + timedelta(days=self.stop // (24 * 60))
        stop = self.stop % (24 * 60)
        over = datetime.combine(day, time(stop // 60, stop % 60), ZoneInfo(self.zone)).astimezone(UTC)
        if self.also is None:
            return over
        other = self.also.end(now)
        return other and min(over, other)

    def within(self, other: Hours) -> Hours:
        """Return the hours that are both these and the *other* ones."""
        if self == other:
            return self
        inner = other if self.also is None else self.also.within(other)
        return replace(self, text=f"{self.text} and {other.text}", also=inner)

    def __str__(self) -> str:
        return self.text


def _minutes(text: str) -> int:
    return 60 * int(text[:2]) + int(text[3:])


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, *last = (_DAYS.index(name) for name in part.split("-"))
        if len(last) > 1 or (last and last[0] < first):
            raise ValueError(f"a range of days goes from an earlier to a later day of the week, not {part!r}")
        found |= set(range(first, (last or [first])[0] + 1))
    return frozenset(found)
