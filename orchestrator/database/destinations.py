"""Destinations: settings, rate limits (GCRA), pauses and circuit breakers, and the forecast of their backlogs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, LiteralString, NamedTuple

import msgspec
from psycopg.types.json import Jsonb

from orchestrator.database.connection import named
from orchestrator.database.gateway import Database
from orchestrator.errors import ValidationError

SETTING_COLUMNS = (
    *("rate_per_second", "burst", "max_parallel", "adaptive", "timeout", "retry_policy", "signing_secret"),
    *("secret_headers", "spread", "breaker_failures", "breaker_ratio", "breaker_minimum", "breaker_window"),
    *("breaker_cooldown", "breaker_max_cooldown"),
)
"""The settings of a destination, as columns of table destination; times in seconds."""
_TIME_COLUMNS = frozenset({"timeout", "spread", "breaker_window", "breaker_cooldown", "breaker_max_cooldown"})

_CONFIGURE: LiteralString = """
select orchestrator.destination_json(d.name)::text, d.waiting, d.overlaps, d.note
from orchestrator.configure_destination(%s, %s::float8, %s::integer, %s::integer, %s::boolean, make_interval(secs => %s)
  , %s::text, %s::text, %s::jsonb, make_interval(secs => %s), %s::integer, %s::float8, %s::integer
  , make_interval(secs => %s), make_interval(secs => %s), make_interval(secs => %s), %s::text[]) d
"""
_LARGEST_INTEGER = 2**31 - 1
_LONGEST_S = 1e9


class Standstills(NamedTuple):
    """Since when everything is paused, and how many destinations are paused, or have a breaker that is not closed."""

    paused_at: str | None
    destinations_paused: int
    breakers_open: int


class Destinations:
    """What operators ask the database about destinations. Answers are JSON as text.

    Every method raises DatabaseUnavailable, and ValidationError for what cannot be; `field` is then ``name``, a
    setting of `SETTING_COLUMNS`, ``bucket`` or ``until``.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(self, *, limit: int, after: str | None = None) -> list[bytes]:
        """Destinations by name; `after` is the name of the last one of the page before."""
        return await self._rows("select orchestrator.list_destinations(%s, %s)", limit, after)

    async def get(self, name: str) -> bytes | None:
        return await self._row("select orchestrator.get_destination(%s)", name)

    async def governing(self, name: str) -> str | None:
        """The destination whose limits hold for a host or topic: itself, or a pattern; None when none do."""
        with named():
            found: str | None = await self._database.value("select orchestrator.destination_for(%s)", name)
        return found

    async def configure(self, name: str, settings: Mapping[str, Any], clear: Sequence[str] = ()) -> bytes:
        """Sets what `settings` holds, resets what `clear` names to its default, and leaves the rest.

        Answers the destination, how many events wait for it, other destinations that overlap, and a note.
        """
        values = [_checked(name, settings.get(name)) for name in SETTING_COLUMNS]
        with named():
            [(kept, waiting, overlaps, note)] = await self._database.once(_CONFIGURE, name, *values, list(clear))
        told = {"destination": msgspec.Raw(kept.encode()), "waiting": waiting, "overlaps": overlaps, "note": note}
        return msgspec.json.encode(told)

    async def delete(self, name: str) -> bytes | None:
        """None when it was not configured."""
        return await self._changed("select row_to_json(d)::text from orchestrator.delete_destination(%s) d", name)

    async def pause(self, name: str) -> bytes:
        told = await self._changed(
            "select row_to_json(d)::text from orchestrator.pause_destination(%s) d", name, waits=False
        )
        assert told is not None
        return told

    async def resume(self, name: str) -> bytes | None:
        """None when there is no such destination."""
        return await self._changed(
            "select row_to_json(d)::text from orchestrator.resume_destination(%s) d", name, waits=False
        )

    async def close_breaker(self, name: str) -> bytes | None:
        """None when there is no such destination."""
        return await self._changed(
            "select row_to_json(d)::text from orchestrator.close_breaker(%s) d", name, waits=False
        )

    async def pause_all(self) -> bytes:
        told = await self._changed("select row_to_json(a)::text from orchestrator.pause_all() a", waits=False)
        assert told is not None
        return told

    async def resume_all(self) -> bytes:
        told = await self._changed("select row_to_json(a)::text from orchestrator.resume_all() a", waits=False)
        assert told is not None
        return told

    async def forecast(self, *, bucket_s: float, until_s: float, destination: str | None = None) -> bytes:
        [told] = await self._rows(
            "select orchestrator.forecast(make_interval(secs => %s), make_interval(secs => %s), %s)",
            _checked("bucket", bucket_s),
            _checked("until", until_s),
            destination,
            aged=True,
        )
        return told

    async def standstills(self) -> Standstills:
        [row] = await self._database.rows(
            "select paused_at, destinations_paused, breakers_open from orchestrator.standstills()"
        )
        return Standstills(*row)

    async def _rows(self, query: LiteralString, *values: object, aged: bool = False) -> list[bytes]:
        """The texts that a query answers; `aged` ones may come from the read replica."""
        ask = self._database.aged_rows if aged else self._database.rows
        with named():
            return [row[0].encode() for row in await ask(query, *values)]

    async def _changed(self, query: LiteralString, *values: object, waits: bool = True) -> bytes | None:
        """Runs a query that changes something; returns the one text that it answers, None when it answers no row."""
        with named():
            rows = await self._database.once(query, *values, waits=waits)
        return rows[0][0].encode() if rows else None

    async def _row(self, query: LiteralString, *values: object) -> bytes | None:
        with named():
            value: str | None = await self._database.value(query, *values)
        return None if value is None else value.encode()


def _checked(name: str, value: Any) -> Any:
    """The value as the database takes it. Refuses what no type there holds; the database checks the rest."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise ValidationError(name, f"expected a smaller number, got {value}")
    is_time = name in _TIME_COLUMNS or name not in SETTING_COLUMNS
    if is_time and value is not None and not math.fabs(value) <= _LONGEST_S:
        raise ValidationError(name, f"expected seconds, got {value}")
    return Jsonb(value) if isinstance(value, dict) else value
