"""The pool behind the API, the CLI and maintenance, and what they ask of the database."""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, LiteralString, NamedTuple, Self, TypeVar

from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from orchestrator.config import Settings
from orchestrator.database.connection import Connection, connection_arguments, keep_text, named, translated
from orchestrator.errors import DatabaseUnavailable, OrchestratorError, ValidationError
from orchestrator.events import Submission, copy_row

T = TypeVar("T")

_POOL_TIMEOUT_S = 5.0

COPY_SUBMISSIONS: LiteralString = (
    "copy pg_temp.submission (n, id, scheduled_at, source, external_job_id, delivery_type, destination, payload,"
    " headers, max_retries, retry_policy, ordering_key, priority, spread, expires_at) from stdin"
)
"""For the lines of `copy_row`."""


class Submitted(NamedTuple):
    """What became of a submission: ``accepted``, ``duplicate``, or ``refused`` with field and reason.

    `id` is the one that the event is kept under, `status` the state that a duplicate is in.
    """

    id: str
    result: str
    field: str | None = None
    reason: str | None = None
    status: str | None = None


class Cancelled(NamedTuple):
    """``cancelled``, ``already_cancelled``, ``in_flight``, ``finished`` or ``not_found``, and the state it is in."""

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
    """Which events are meant; None does not narrow.

    `since`, inclusive, and `until`, exclusive, bound scheduled_at, or when a dead letter died: ISO 8601 with a zone.
    `reason` is a part of that of a dead letter.
    """

    source: str | None = None
    destination: str | None = None
    since: str | None = None
    until: str | None = None
    reason: str | None = None


ALL = Filter()


class ApiKey(NamedTuple):
    name: str
    scopes: frozenset[str]


class Database:
    """A pool of connections, and what the API and the CLI ask of the database.

    Every method raises DatabaseUnavailable when the database is away, after one more try on fresh connections:
    all of them may be repeated safely.
    """

    def __init__(self, settings: Settings, *, role: str) -> None:
        self._staged: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._pool = AsyncConnectionPool(
            settings.database_url,
            connection_class=Connection,
            kwargs=connection_arguments(settings.database_url, role),
            min_size=settings.pool_min_idle,
            max_size=settings.pool_max_size,
            timeout=_POOL_TIMEOUT_S,
            reconnect_timeout=10,
            configure=self._configure,
            name=role,
            open=False,
        )

    async def _configure(self, connection: Connection) -> None:
        keep_text(connection)

    async def __aenter__(self) -> Self:
        await self._pool.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.close()

    async def _run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        try:
            return await self._run_once(work)
        except DatabaseUnavailable as error:
            if isinstance(error.__cause__, PoolTimeout):
                raise
            await self._pool.check()  # drops connections that a restart of the server has broken
            return await self._run_once(work)

    async def _run_once(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        with translated():
            async with self._pool.connection() as connection:
                return await work(connection)

    async def rows(self, query: LiteralString, *values: object) -> list[TupleRow]:
        """What a query of this package's modules answers."""

        async def work(connection: Connection) -> list[TupleRow]:
            return await (await connection.execute(query, values)).fetchall()

        return await self._run(work)

    async def value(self, query: LiteralString, *values: object) -> Any:
        """The first column of its first row; None: it has none."""
        rows = await self.rows(query, *values)
        return rows[0][0] if rows else None

    async def submit(self, submissions: Sequence[Submission]) -> list[Submitted]:
        """Keeps the submissions, in one transaction; one answer each, in order.

        Raises ValidationError when the database refuses a value that no rule foresaw; nothing is kept then.
        """
        text = b"".join([copy_row(submission, n) for n, submission in enumerate(submissions)])

        async def work(connection: Connection) -> list[TupleRow]:
            if connection not in self._staged and not connection.pooled:
                await connection.execute("select orchestrator.open_staging()")
                self._staged.add(connection)
            async with connection.transaction(), connection.cursor() as cursor:
                if connection.pooled:
                    await cursor.execute("select orchestrator.open_staging()")
                async with cursor.copy(COPY_SUBMISSIONS) as copy:
                    await copy.write(text)
                await cursor.execute(
                    "select n, id::text, result, field, reason, status from orchestrator.submit_staged_with_status()"
                )
                return await cursor.fetchall()

        exceptions = {row[0]: Submitted(*row[1:]) for row in await self._run(work)}
        return [
            exceptions.get(n) or Submitted(submission.id, "accepted", status="scheduled")
            for n, submission in enumerate(submissions)
        ]

    async def event(self, event_id: str) -> bytes | None:
        """The event as JSON, with its state and outcomes."""
        value = await self.value("select orchestrator.get_event(%s::uuid)", event_id)
        return None if value is None else value.encode()

    async def events_by_external_id(
        self, external_job_id: str, *, limit: int, after: tuple[str, str] | None = None
    ) -> list[bytes]:
        """Events as JSON, newest first; `after` is (scheduled_at, id) of the last one of the page before."""
        rows = await self.rows(
            "select orchestrator.events_by_external_id(%s, %s, %s::timestamptz, %s::uuid)",
            external_job_id,
            limit,
            *(after or (None, None)),
        )
        return [row[0].encode() for row in rows]

    async def cancel(self, event_id: str) -> Cancelled:
        rows = await self.rows("select * from orchestrator.cancel_event(%s::uuid)", event_id)
        return Cancelled(*rows[0]) if rows else Cancelled(event_id, "not_found", None)

    async def cancel_external(self, external_job_id: str) -> list[Cancelled]:
        """Cancels every event with this external id; empty when there is none."""
        rows = await self.rows("select * from orchestrator.cancel_event(p_external_job_id => %s)", external_job_id)
        return [Cancelled(*row) for row in rows]

    async def reschedule(
        self, event_id: str | None, external_job_id: str | None, *, scheduled_at: str, expires_at: str | None = None
    ) -> Rescheduled | None:
        """Cancels an event and submits it anew for another time, both or neither; None when there is none.

        It is named by its id, or by its external id when it is the only live one of that name. Without `expires_at`
        it keeps its own.
        """
        rows = await self.rows(
            """select event_id, result, status, successor, field, reason from orchestrator.reschedule_event(
              %s::uuid, %s::timestamptz, %s, %s::timestamptz)""",
            event_id,
            scheduled_at,
            external_job_id,
            expires_at,
        )
        return Rescheduled(*rows[0]) if rows else None

    async def redrive(self, event_id: str) -> str | None:
        """Has a dead event tried again: ``redriven``, or ``expired``, which purged ones are too, or the status of one
        that is not dead; None: there is no such event.
        """
        rows = await self.rows("select result, status from orchestrator.redrive_event(%s::uuid)", event_id)
        return next((status if result == "not_dead" else result for result, status in rows), None)

    async def statistics(self) -> bytes:
        value: str = await self.value("select orchestrator.statistics()")
        return value.encode()

    async def statistics_by(self, by: Sequence[str], which: Filter, *, limit: int) -> list[bytes]:
        """Counts of what happened in the last hour, or in a range, by some of minute, source and destination; JSON.

        Raises ValidationError as `Destinations` does, with the field ``from`` for a range that holds no time.
        """
        with named():
            rows = await self.rows(
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

        Raises ValidationError for a destination that can be none, with the field ``name``.
        """
        with named():
            rows = await self.rows(
                """select orchestrator.list_dead_letters(
                  %s, %s::timestamptz, %s::uuid, %s, %s, %s::timestamptz, %s::timestamptz, %s)""",
                limit,
                *(after or (None, None)),
                *which,
            )
        return [row[0].encode() for row in rows]

    async def api_key(self, key_hash: bytes) -> ApiKey | None:
        rows = await self.rows("select name, scopes from orchestrator.find_api_key(%s)", key_hash)
        return ApiKey(rows[0][0], frozenset(rows[0][1])) if rows else None

    async def count_api_keys(self) -> int:
        return int(await self.value("select orchestrator.count_api_keys()"))

    async def create_api_key(self, name: str, key_hash: bytes, scopes: Sequence[str]) -> None:
        """Raises ValidationError when the name is taken or a scope unknown."""
        await self.rows("select orchestrator.create_api_key(%s, %s, %s)", name, key_hash, list(scopes))

    async def list_api_keys(self) -> list[bytes]:
        rows = await self.rows(
            """select json_build_object('name', name, 'scopes', scopes, 'created_at', created_at)
            from orchestrator.api_key order by name"""
        )
        return [row[0].encode() for row in rows]

    async def revoke_api_key(self, name: str) -> bool:
        return bool(await self.value("select orchestrator.revoke_api_key(%s)", name))

    async def ready(self) -> None:
        """Raises DatabaseUnavailable, or OrchestratorError when the schema, or a partition for today, is missing."""
        today = await self.value(
            "select orchestrator.now() between first_day and end_day from orchestrator.partition_bounds()"
        )
        if not today:
            raise OrchestratorError("no partition for today; run: orchestrator migrate")

    def pool_stats(self) -> dict[str, int]:
        return self._pool.get_stats()


async def submit_all(database: Database, submissions: Sequence[Submission]) -> list[Submitted]:
    """Submits in one transaction; a value that only the database refuses is found by bisecting, and refused alone.

    Raises DatabaseUnavailable. Halves that were already kept stay kept: submitting them again changes nothing.
    """
    try:
        return await database.submit(submissions)
    except ValidationError as error:
        if len(submissions) == 1:
            return [Submitted(submissions[0].id, "refused", error.field, error.reason)]
        middle = len(submissions) // 2
        first = await submit_all(database, submissions[:middle])
        return first + await submit_all(database, submissions[middle:])
