"""Bulk changes by bounded calls: the caller repeats a call until no event is left to look at."""

from __future__ import annotations

from typing import LiteralString, NamedTuple

from orchestrator.database.connection import named
from orchestrator.database.event_calls import Filter
from orchestrator.database.gateway import Database


class Swept(NamedTuple):
    """How many events one call has looked at (`seen`), how many of them matched, and how many it changed (`done`).

    A dry run changes none. `next_after`, and for a redrive `next_start_at`, go into the next call; None: that was the
    last one. `in_flight` counts those that matched but cannot be cancelled. `examples` are ids of some that matched.
    """

    seen: int
    matched: int
    done: int
    in_flight: int
    examples: list[str]
    next_after: str | None
    next_start_at: str | None = None


class Sweeps:
    """Each call looks at no more than `limit`.

    Raises DatabaseUnavailable, and ValidationError for an impossible filter; a destination's field is ``name``.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def cancel(self, which: Filter, *, limit: int, dry_run: bool = False, after: str | None = None) -> Swept:
        """Cancels live events, in order of scheduled_at; the filter must not be empty."""
        narrowing = which.source, which.destination, which.since, which.until
        return await self._one(dry_run, _CANCEL, *narrowing, dry_run, limit, after)

    async def redrive(
        self,
        which: Filter,
        *,
        limit: int,
        dry_run: bool = False,
        after: str | None = None,
        rate: float | None = None,
        start_at: str | None = None,
    ) -> Swept:
        """Schedules dead events for another attempt: `rate` a second from `start_at` on, by default all at once."""
        return await self._one(dry_run, _REDRIVE, *which, rate, dry_run, limit, after, start_at)

    async def purge(self, which: Filter, *, limit: int, dry_run: bool = False, after: str | None = None) -> Swept:
        """Removes dead letters; the filter must not be empty. Their events stay, and stay dead."""
        return await self._one(dry_run, _PURGE, *which, dry_run, limit, after)

    async def _one(self, dry_run: bool, query: LiteralString, *values: object) -> Swept:
        ask = self._database.rows if dry_run else self._database.once
        with named():
            [row] = await ask(query, *values)
        return Swept(*row)


_CANCEL: LiteralString = """
select seen, matched, cancelled, in_flight, examples, next_after from orchestrator.cancel_events(
  %s, %s, %s::timestamptz, %s::timestamptz, %s, %s, %s::uuid)
"""
_REDRIVE: LiteralString = """
select seen, matched, redriven, 0 as in_flight, examples, next_after, to_json(next_start_at) #>> '{}' as next_start_at
from orchestrator.redrive_dead_letters(
  %s, %s, %s::timestamptz, %s::timestamptz, %s, %s::float8, %s, %s, %s::uuid, %s::timestamptz)
"""
_PURGE: LiteralString = """
select seen, matched, purged, 0 as in_flight, examples, next_after from orchestrator.purge_dead_letters(
  %s, %s, %s::timestamptz, %s::timestamptz, %s, %s, %s, %s::uuid)
"""
