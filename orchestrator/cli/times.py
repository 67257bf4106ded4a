"""Times and durations in options: RFC 3339, or relative to now."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import click

_PARTS = r"(?=\d)(?:(\d{1,5})d)?(?:(\d{1,6})h)?(?:(\d{1,7})m)?(?:(\d{1,8}(?:\.\d{1,6})?)s)?"
_DURATION = re.compile(_PARTS)
_RELATIVE = re.compile(rf"([+-]){_PARTS}")
_EXPECTED_TIME = "an RFC 3339 time with a zone, such as 2026-01-31T09:00:00Z, or now, +1h30m, -2d and the like"


def relative(text: str) -> datetime | None:
    """The time that ``now``, ``+10s``, ``-1h30m`` and the like mean; None for any other text."""
    if text == "now":
        return datetime.now(UTC)
    found = _RELATIVE.fullmatch(text)
    if found is None:
        return None
    sign, *parts = found.groups()
    return datetime.now(UTC) + (-1 if sign == "-" else 1) * _summed(parts)


def _summed(parts: Sequence[str | None]) -> timedelta:
    days, hours, minutes, seconds = (float(part or 0) for part in parts)
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def a_time(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    """The callback of an option that takes a time; the result is in UTC."""
    if value is None or (at := relative(value)) is not None:
        return None if value is None else at
    from orchestrator.events.times import in_utc, time_of

    try:
        return in_utc(time_of(value))
    except ValueError:
        raise click.BadParameter(f"expected {_EXPECTED_TIME}, got {value[:80]!r}") from None


def a_duration(ctx: click.Context, param: click.Parameter, value: str | None) -> timedelta | None:
    """The callback of an option that takes a duration."""
    if value is None:
        return None
    found = _DURATION.fullmatch(value.removeprefix("+"))
    if found is None or not (duration := _summed(found.groups())):
        raise click.BadParameter(f"expected a duration such as 10s, 5m, 1h30m or 2d, got {value[:80]!r}")
    return duration
