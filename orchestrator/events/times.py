"""The times of an event: how they are written, and which are kept. SQL's twin is orchestrator.as_time()."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated

import msgspec

EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
LATEST = datetime(2200, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
EXPECTED_TIME = "an RFC 3339 time with a zone, such as 2026-01-31T09:00:00Z"
_SHORT_TIME = re.compile(
    r"([0-9-]{10}[Tt ][0-9]{2}:[0-9]{2})(:[0-9]{2}(?:\.[0-9]+)?)?([Zz]|[+-][0-9]{2}(?::?[0-9]{2})?)"
)
ScheduledAt = Annotated[datetime, msgspec.Meta(tz=True)]


def usual_time(text: str) -> str:
    """A time without seconds, or with an offset of hours alone, with both; any other text as it is.

    Clients of PostgreSQL write times so. SQL's twin of what is read in the end is orchestrator.as_time().
    """
    found = _SHORT_TIME.fullmatch(text)
    if found is None:
        return text
    minute, second, zone = found.groups()
    return f"{minute}{second or ':00'}{zone}{':00' if len(zone) == 3 else ''}"


def time_of(text: object) -> datetime:
    """The time that an RFC 3339 text with a zone names, rounded to the microsecond. Raises ValueError."""
    return msgspec.convert(usual_time(text) if isinstance(text, str) else text, ScheduledAt)


def with_usual_time(raw: bytes | msgspec.Raw) -> bytes:
    """`usual_time` of a JSON value; one that is no string stays as it is."""
    try:
        text = msgspec.json.decode(raw, type=str)
    except msgspec.DecodeError:
        return bytes(raw)
    usual = usual_time(text)
    return bytes(raw) if usual == text else msgspec.json.encode(usual)


def in_utc(at: datetime) -> datetime:
    """The same time without its zone, which may be one that PostgreSQL does not know; at the ends of time, about."""
    try:
        return at.astimezone(UTC)
    except OverflowError:
        return EARLIEST if at.year == 1 else LATEST


def scheduled_at_fault(at: datetime) -> str | None:
    if EARLIEST <= at <= LATEST:
        return None
    return f"expected a time from 1970 to 2200, got {at.isoformat()}"


def expires_at_fault(expires_at: datetime, scheduled_at: datetime) -> str | None:
    if expires_at > scheduled_at:
        return scheduled_at_fault(expires_at)
    return f"expected a time after scheduled_at, {scheduled_at.isoformat()}, got {expires_at.isoformat()}"
