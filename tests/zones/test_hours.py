"""zones.hours: when calls may be made, also where clocks are put forward."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from zones.hours import Hours

OFFICE = Hours.parse("mon-fri 07:00-19:00 Europe/Berlin")
#: A Wednesday.
DAY = (2026, 3, 25)


def berlin(hour: int, minute: int = 0, day: tuple[int, int, int] = DAY) -> datetime:
    """Return a time on a clock in Berlin."""
    return datetime(*day, hour, minute, tzinfo=ZoneInfo("Europe/Berlin"))


@pytest.mark.parametrize(
    ("now", "within"),
    [
        (berlin(6, 59), False),
        (berlin(7), True),
        (berlin(18, 59), True),
        (berlin(19), False),
        (datetime(*DAY, 6, 0, tzinfo=UTC), True),
        (datetime(*DAY, 5, 59, tzinfo=UTC), False),
        (berlin(12, day=(2026, 3, 28)), False),
        # The clock is put forward on the 29th: the same hour in Berlin is another one in UTC.
        (datetime(2026, 3, 30, 5, 0, tzinfo=UTC), True),
    ],
)
def test_within(now: datetime, within: bool) -> None:
    """A time counts where the zone is, on its days and within its hours."""
    assert (OFFICE.end(now) is not None) is within


def test_end() -> None:
    """The end is that of the same day, in UTC; 24:00 is the next day's beginning."""
    assert OFFICE.end(berlin(8)) == datetime(*DAY, 18, 0, tzinfo=UTC)
    assert Hours.parse("wed 00:00-24:00 UTC").end(berlin(8)) == datetime(2026, 3, 26, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("mon-fri 07:00-19:00 UTC", {0, 1, 2, 3, 4}),
        ("mon,wed-thu,sun 07:00-19:00 UTC", {0, 2, 3, 6}),
        ("sat 07:00-19:00 UTC", {5}),
    ],
)
def test_days(text: str, days: set[int]) -> None:
    """Days are names, lists and ranges."""
    assert Hours.parse(text).days == days


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("always", "are written as in"),
        ("mon-fri 7-19 UTC", "are written as in"),
        ("mon 19:00-07:00 UTC", "begin before they end"),
        ("mon 07:00-25:00 UTC", "begin before they end"),
        ("fri-mon 07:00-19:00 UTC", "from an earlier to a later"),
        ("mon-wed-fri 07:00-19:00 UTC", "from an earlier to a later"),
        ("mon 07:00-19:00 Europe/Berlyn", "no time zone 'Europe/Berlyn'"),
        ("mon 07:00-19:00 ../etc/passwd", "no time zone"),
    ],
)
def test_refused(text: str, message: str) -> None:
    """What is no hours says how they are written."""
    with pytest.raises(ValueError, match=message):
        Hours.parse(text)
