"""Events by their ids or in lists: looking, cancelling, rescheduling, redriving and counting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.database.connection import named
from orchestrator.database.pool import Pool


class Cancelled(NamedTuple):
    """What became of a cancel, and the state that the event is in.

    ``cancelled``, ``already_cancelled``, ``in_flight``, ``finished`` or ``not_found``.
    """

    id: str
    result: str
    status: str | None


class Rescheduled(NamedTuple):
    """What became of a reschedule, and the state that the event is in.

    ``rescheduled`` or ``already_rescheduled``: `successor` took its place; ``in_flight`` or ``finished``: too late;
    ``refused`` with field and reason.
    """

    id: str | None
    result: str
    status: str | None
    successor: str | None
    field: str | None
    reason: str | None


class Filter(NamedTuple):
    """Selects events or dead letters; None does not narrow.

    `since`, inclusive, and `until`, exclusive, bound an event's scheduled_at, or a dead letter's died_at; they are ISO
    8601 with a zone. `reason` is a part of a dead letter's reason.
    """

    source: str | None = None
    destination: str | None = None
    since: str | None = None
    until: str | None = None
    reason: str | None = None


ALL = Filter()


class EventCalls(Pool):
    """The part of `Database` that looks events up and changes them."""

    async def event(self, event_id: str) -> bytes | None:
        """The event as JSON, with its state and outcomes."""
        value = await self.value("select orchestrator.get_event(%s::uuid)", event_id)
        return None if value is None else value.encode()

    async def events_by_external_id(
        self, external_job_id: str, *, limit: int, after: tuple[str, str] | None = None
    ) -> list[bytes]:
        """Events as JSON, newest first; `after` is (scheduled_at, id) of the last one of the page before.

        A client asks for a name that it has just submitted. So only the pages after the first may be aged.
        """
        ask = self.rows if after is None else self.aged_rows
        rows = await ask(
            "select orchestrator.events_by_external_id(%s, %s, %s::timestamptz, %s::uuid)",
            external_job_id,
            limit,
            *(after or (None, None)),
        )
        return [row[0].encode() for row in rows]

    async def cancel(self, event_id: str) -> Cancelled:
        rows = await self.once("select * from orchestrator.cancel_event(%s::uuid)", event_id)
        return Cancelled(*rows[0]) if rows else Cancelled(event_id, "not_found", None)

    async def cancel_external(self, external_job_id: str) -> list[Cancelled]:
        """Cancels every event with this external id; empty when there is none."""
        rows = await self.once("select * from orchestrator.cancel_event(p_external_job_id => %s)", external_job_id)
        return [Cancelled(*row) for row in rows]

    async def reschedule(
        self, event_id: str | None, external_job_id: str | None, *, scheduled_at: str, expires_at: str | None = None
    ) -> Rescheduled | None:
        """Cancels an event and submits a successor for another time, both or neither; None: there is no such event.

        The event is named by its id, or by its external id if it is the only live one of that name. Without
        `expires_at` the successor keeps the event's own.
        """
        rows = await self.once(
            """select event_id, result, status, successor, field, reason from orchestrator.reschedule_event(
              %s::uuid, %s::timestamptz, %s, %s::timestamptz)""",
            event_id,
            scheduled_at,
            external_job_id,
            expires_at,
        )
        return Rescheduled(*rows[0]) if rows else None

    async def redrive(self, event_id: str) -> str | None:
        """Schedules a dead event for another attempt.

        ``redriven``, ``expired``, ``purged`` or ``refused``, or the status of an event that is not dead; None: there is
        no such event.
        """
        rows = await self.once("select result, status from orchestrator.redrive_event(%s::uuid)", event_id)
        return next((status if result == "not_dead" else result for result, status in rows), None)

    async def statistics(self) -> bytes:
        value: str = (await self.aged_rows("select orchestrator.statistics()"))[0][0]
        return value.encode()

    async def statistics_by(self, by: Sequence[str], which: Filter, *, limit: int) -> list[bytes]:
        """Counts of the last hour, or of a range, grouped by some of minute, source and destination; JSON.

        Raises ValidationError as `Destinations` does, with the field ``from`` for an empty range.
        """
        with named():
            rows = await self.aged_rows(
                """select row_to_json(s) from orchestrator.statistics_by(
                  coalesce(%s::timestamptz, %s::timestamptz - interval '1 hour'), %s::timestamptz, %s::text[], %s, %s) s
                order by s.minute, s.source, s.destination, s.name limit %s""",
                which.since,
                which.until,
                which.until,
                list(by),
                which.source,
                which.destination,
                limit,
            )
        return [row[0].encode() for row in rows]

    async def dead_letters(
        self, which: Filter = ALL, *, limit: int, after: tuple[str, str] | None = None
    ) -> list[bytes]:
        """Dead letters as JSON, newest first; `after` is (died_at, id) of the last one of the page before.

        Raises ValidationError for an impossible destination, with the field ``name``.
        """
        with named():
            rows = await self.aged_rows(
                """select orchestrator.list_dead_letters(
                  %s, %s::timestamptz, %s::uuid, %s, %s, %s::timestamptz, %s::timestamptz, %s)""",
                limit,
                *(after or (None, None)),
                *which,
            )
        return [row[0].encode() for row in rows]
