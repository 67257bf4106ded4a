"""The pool behind the API, the CLI and maintenance, and what they ask of the database."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from types import TracebackType
from typing import Any, LiteralString, NamedTuple, Self, TypeVar
from uuid import UUID, uuid4

import msgspec
import psycopg
from psycopg import errors
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

from orchestrator.database.connection import (
    HOLDERS,
    Connection,
    connection_arguments,
    is_lost,
    is_worth_another_try,
    keep_text,
    named,
    translated,
)
from orchestrator.database.rights import ABILITIES
from orchestrator.errors import (
    Blocked,
    DatabaseUnavailable,
    InDoubt,
    NotPermitted,
    OrchestratorError,
    ValidationError,
)
from orchestrator.events.copying import copy_row
from orchestrator.events.fields import FIELDS
from orchestrator.events.submission import Submission
from orchestrator.settings import Settings
from orchestrator.tasks import within

T = TypeVar("T")

_log = logging.getLogger(__name__)

_POOL_TIMEOUT_S = 5.0
_TRIES = 3
_ANSWER_S = 120.0  # longer than anything that is asked takes
_CHECK_S = 1.0
_FULL_S = 5.0  # how long a disk that was full counts as full, unless something is kept
_CLOSE_S = 1.0  # for connections that are being opened
_NEW_S = 1.0
_SLICE_BYTES = 1 << 20
_LOOK = "whether it was done is not known, so look before you repeat it"

_ONCE = """
with answer as materialized ({}), kept as materialized (
  select orchestrator.keep_answer(%s, (select json_agg(a) from answer a)))
select a.* from kept cross join answer a
"""
_PATIENCE = "3s"
_LEFT_FOR_OTHERS = 3  # connections: two that submit, and one
_HOLDERS_S = 2.0
_HASTE: LiteralString = "set local lock_timeout = '20 ms'"
_APART_S = 2.0  # for finding out which submissions of a batch are blocked

_SUBMIT: LiteralString = (
    "select n, id::text, result, field, reason, status from orchestrator.try_submit_staged_with_status()"
)
_SUBMIT_HASTILY: LiteralString = (
    "select n, id::text, result, field, reason, status from orchestrator.submit_staged_with_status()"
)
_COLUMNS = {"id": "id"} | {field.name: field.column for field in FIELDS}
COPY_SUBMISSIONS: LiteralString = (
    f"copy pg_temp.submission (n, {', '.join(_COLUMNS[name] for name in Submission.__struct_fields__)}) from stdin"
)
"""For the lines of `copy_row`."""


class Submitted(NamedTuple):
    """What became of a submission: ``accepted``, ``duplicate``, or ``refused`` with field and reason.

    `id` is the one that the event is kept under, `status` the state that a duplicate is in. ``blocked``, by
    `submit_all` alone: another session has an uncommitted event of that id, and nothing was kept.
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

    Every method raises DatabaseUnavailable when the database is away, after two more tries on fresh connections, and
    Blocked when another session's open transaction holds what it needs for longer than 3 seconds. What changes
    something is done once, and answers what it did, although the reply to its commit was lost: see `once`. InDoubt: it
    may have been done. NotPermitted: the login lacks a right.

    `role` shows in pg_stat_activity; `needs`, of ABILITIES, are those without which this process is not ready.
    """

    def __init__(self, settings: Settings, *, role: str, needs: Sequence[str] = ()) -> None:
        self._needs = [ABILITIES[ability] for ability in needs]
        self._staged: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._turns = asyncio.Semaphore(max(1, settings.pool_max_size - _LEFT_FOR_OTHERS))
        self._doubtful = False
        self._full_at = -math.inf
        self._pool = _Pool(
            settings.database_url,
            connection_class=Connection,
            kwargs=connection_arguments(settings.database_url, role, lock_timeout=_PATIENCE),
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
        await self._pool.close(timeout=_CLOSE_S)

    async def _run(
        self,
        work: Callable[[Connection], Awaitable[T]],
        again: Callable[[Connection], Awaitable[T]] | None = None,
        *,
        changes: bool = False,
        names_holders: bool = True,
    ) -> T:
        """Runs `work`, and `again`, or else `work` again, when the connection was lost or cannot write.

        This is the one place where anything is tried again. What `changes` something must bear it.
        """
        in_doubt = False
        for tries_left in range(_TRIES - 1, -1, -1):
            try:
                if self._doubtful:
                    self._doubtful = False
                    await self._pool.check()
                answer = await self._run_once(work)
            except TimeoutError:
                in_doubt = changes
                problem: OrchestratorError = DatabaseUnavailable(f"the database has not answered in {_ANSWER_S:g} s")
                break
            except Blocked as error:
                problem = error
                if names_holders:
                    problem = Blocked(f"{error}; {await self.holders()}")
                    problem.__cause__ = error.__cause__
                break
            except OrchestratorError as error:
                if isinstance(error.__cause__, errors.DiskFull):
                    self._full_at = time.monotonic()
                in_doubt = in_doubt or (changes and is_lost(error))
                problem = error
                if not tries_left or not is_worth_another_try(error):
                    break
                await self._pool.check()  # drops connections that a restart has broken, or that cannot write
                work = again or work
            else:
                if changes:
                    self._full_at = -math.inf
                return answer
        if in_doubt and not isinstance(problem, ValidationError):
            raise InDoubt(f"{problem}; {_LOOK}") from problem
        raise problem

    async def _run_once(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        with translated():
            async with self._pool.connection() as connection:
                try:
                    async with asyncio.timeout(_ANSWER_S):
                        return await work(connection)
                except errors.ReadOnlySqlTransaction:
                    if _is_old(connection):
                        await connection.close()
                    raise
                except (asyncio.CancelledError, TimeoutError):
                    self._doubtful = True  # if this one does not answer, the others may not either
                    raise

    async def once(self, query: LiteralString, *values: object, waits: bool = True) -> list[Any]:
        """The rows that a query answers which changes something, done once however often it has to be sent.

        The answer is kept with the change (orchestrator.request), and asked for when its reply was lost. Columns are
        texts, numbers, booleans or arrays of those: what JSON gives back as it was. `waits`: whether it may have to
        wait for another session; what does not, such as a pause, does not wait for those that do either.
        """

        async def work(connection: Connection, request: UUID) -> list[Any]:
            return await (await connection.execute(_ONCE.format(query), (*values, request))).fetchall()

        return await self.done_once(work, waits=waits)

    async def done_once(
        self, work: Callable[[Connection, UUID], Awaitable[list[Any]]], *, waits: bool = True
    ) -> list[Any]:
        """As `once`, for work that gives its answer to keep_answer() by itself, in its transaction."""
        request = uuid4()

        async def kept(connection: Connection) -> list[Any] | None:
            row = await (await connection.execute("select orchestrator.kept_answer(%s)", (request,))).fetchone()
            if row is None or row[0] is None:
                return None
            return [tuple(each.values()) for each in msgspec.json.decode(row[0], type=list[dict[str, Any]])]

        async def again(connection: Connection) -> list[Any]:
            answer = await kept(connection)
            if answer is None:
                try:
                    return await work(connection, request)
                except psycopg.Error:
                    # The first run may have been under way still, and have committed meanwhile.
                    answer = None if connection.closed else await kept(connection)
                    if answer is None:
                        raise
            return answer

        async with self._turn() if waits else nullcontext():
            return await self._run(lambda connection: work(connection, request), again, changes=True)

    async def holders(self) -> str:
        """The sessions whose open transactions may be in the way, for an operator."""

        async def work(connection: Connection) -> str:
            row = await (await connection.execute(HOLDERS)).fetchone()
            return row[0] if row else ""

        try:
            return await within(_HOLDERS_S, self._run_once(work))
        except (OrchestratorError, TimeoutError):
            return "who it is could not be found out"

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        """For what may wait for another session: some connections are left for all else."""
        try:
            async with asyncio.timeout(_POOL_TIMEOUT_S):
                await self._turns.acquire()
        except TimeoutError:
            raise DatabaseUnavailable("others wait for another session's open transaction already") from None
        try:
            yield
        finally:
            self._turns.release()

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

        Raises ValidationError when the database refuses a value that no rule foresaw, and Blocked when one of them has
        waited for another session for 250 ms; nothing is kept then.
        """
        return await self._submit(submissions, _SUBMIT)

    async def submit_hastily(self, submissions: Sequence[Submission]) -> list[Submitted] | None:
        """As `submit`, but waits for no other session for longer than 20 ms; None: one does, and none is kept."""
        try:
            return await self._submit(submissions, _SUBMIT_HASTILY, _HASTE)
        except Blocked:
            return None

    async def _submit(
        self, submissions: Sequence[Submission], submit: LiteralString, first: LiteralString | None = None
    ) -> list[Submitted]:
        text = await _copied(submissions)
        answered: list[TupleRow] | None = None

        async def work(connection: Connection) -> list[TupleRow]:
            nonlocal answered
            before = answered
            if connection not in self._staged and not connection.pooled:
                await connection.execute("select orchestrator.open_staging()")
                self._staged.add(connection)
            async with connection.transaction(), connection.cursor() as cursor:
                if connection.pooled:
                    await cursor.execute("select orchestrator.open_staging()")
                if first is not None:
                    await cursor.execute(first)
                async with cursor.copy(COPY_SUBMISSIONS) as copy:
                    await copy.write(text)
                await cursor.execute(submit)
                answered = await cursor.fetchall()
            # The reply to a commit may have been lost: then all that was new to that run is a duplicate to this one.
            return answered if before is None or _are_new(before, answered, len(submissions)) else before

        rows = await self._run(work, changes=True, names_holders=first is None)
        exceptions = {row[0]: Submitted(*row[1:]) for row in rows}
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
        rows = await self.once("select * from orchestrator.cancel_event(%s::uuid)", event_id)
        return Cancelled(*rows[0]) if rows else Cancelled(event_id, "not_found", None)

    async def cancel_external(self, external_job_id: str) -> list[Cancelled]:
        """Cancels every event with this external id; empty when there is none."""
        rows = await self.once("select * from orchestrator.cancel_event(p_external_job_id => %s)", external_job_id)
        return [Cancelled(*row) for row in rows]

    async def reschedule(
        self, event_id: str | None, external_job_id: str | None, *, scheduled_at: str, expires_at: str | None = None
    ) -> Rescheduled | None:
        """Cancels an event and submits it anew for another time, both or neither; None when there is none.

        It is named by its id, or by its external id when it is the only live one of that name. Without `expires_at`
        it keeps its own.
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
        """Has a dead event tried again: ``redriven``, or ``expired``, ``purged`` or ``refused``, or the status of one
        that is not dead; None: there is no such event.
        """
        rows = await self.once("select result, status from orchestrator.redrive_event(%s::uuid)", event_id)
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
        await self.once("select orchestrator.create_api_key(%s, %s, %s)", name, key_hash, list(scopes))

    async def list_api_keys(self) -> list[bytes]:
        rows = await self.rows(
            """select json_build_object('name', name, 'scopes', scopes, 'created_at', created_at)
            from orchestrator.api_key order by name"""
        )
        return [row[0].encode() for row in rows]

    async def revoke_api_key(self, name: str) -> bool:
        [(revoked,)] = await self.once("select orchestrator.revoke_api_key(%s)", name)
        return bool(revoked)

    async def ready(self) -> None:
        """Raises DatabaseUnavailable, also when it takes no writes, or has had no room for one in the last seconds;
        OrchestratorError when the schema, or a partition for today, is missing, or nobody can submit; NotPermitted
        when this login may not do what it is for.
        """
        [(today, staging, user, lacking)] = await self.rows(
            """
            select orchestrator.now() between first_day and end_day, orchestrator.staging_problem(), current_user,
              array(select n from unnest(%s::text[]) n where not has_function_privilege(to_regprocedure(n), 'execute'))
            from orchestrator.prove_writing() cross join orchestrator.partition_bounds()
            """,
            [ability.function for ability in self._needs],
        )
        if staging is not None:
            raise OrchestratorError(staging)
        if lacking:
            roles = ", ".join(ability.role for ability in self._needs if ability.function in lacking)
            raise NotPermitted(f"user {user} may not call {', '.join(lacking)}; grant {roles} to {user}")
        if not today:
            raise OrchestratorError("no partition for today; run: orchestrator migrate")
        if time.monotonic() < self._full_at + _FULL_S:
            raise DatabaseUnavailable("the database takes no writes: its disk is full")

    def pool_stats(self) -> dict[str, int]:
        return self._pool.get_stats()


def _are_new(before: Sequence[TupleRow], now: Sequence[TupleRow], count: int) -> bool:
    """Whether something that was new to the run before is so to this one: then that one was undone."""
    exceptions = {row[0] for row in before}
    duplicates = {row[0] for row in now if row[2] == "duplicate"}
    return any(n not in duplicates for n in range(count) if n not in exceptions)


class _Pool(AsyncConnectionPool[Connection]):
    @staticmethod
    async def check_connection(conn: Connection) -> None:
        """Raises when the connection does not answer within moments, or cannot write."""
        if not await within(_CHECK_S, _can_write(conn)) and _is_old(conn):
            await conn.close()
            raise psycopg.OperationalError("this session cannot write")


def _is_old(connection: Connection) -> bool:
    """Whether a session that cannot write should be given up: it may stay so, whatever its server is by now.

    A new one says how the server is, and another would say the same.
    """
    return time.monotonic() > connection._created_at + _NEW_S


async def _can_write(connection: Connection) -> bool:
    row = await (await connection.execute("show transaction_read_only")).fetchone()
    return row == ("off",)


async def _copied(submissions: Sequence[Submission]) -> bytes:
    """The lines of all; others get on in between when that is many MiB."""
    rows = []
    size_bytes = 0
    for n, submission in enumerate(submissions):
        row = copy_row(submission, n)
        rows.append(row)
        size_bytes += len(row)
        if size_bytes > _SLICE_BYTES:
            size_bytes = 0
            await asyncio.sleep(0)
    return b"".join(rows)


async def submit_all(database: Database, submissions: Sequence[Submission]) -> list[Submitted]:
    """Submits in one transaction; a value that only the database refuses is found by bisecting, and refused alone.

    What waits for another session's open transaction is set aside, as blocked, and all others are kept. Raises
    DatabaseUnavailable. Halves that were already kept stay kept: submitting them again changes nothing.
    """
    try:
        return await database.submit(submissions)
    except Blocked as error:
        _log.warning("submissions are set aside", extra={"error": str(error)})
        return await submit_free(database, submissions)
    except ValidationError as error:
        if len(submissions) == 1:
            return [Submitted(submissions[0].id, "refused", error.field, error.reason)]
        middle = len(submissions) // 2
        first = await submit_all(database, submissions[:middle])
        return first + await submit_all(database, submissions[middle:])


async def submit_free(
    database: Database, submissions: Sequence[Submission], deadline_s: float | None = None
) -> list[Submitted]:
    """As `submit_all`, but waits for no other session: by bisecting it finds what is blocked, in about two seconds.

    What was not looked at by then (`deadline_s`, monotonic) is blocked, too.
    """
    if deadline_s is None:
        deadline_s = time.monotonic() + _APART_S
    elif time.monotonic() > deadline_s:
        return [_blocked(submission) for submission in submissions]
    try:
        kept = await database.submit_hastily(submissions)
        if kept is not None:
            return kept
        if len(submissions) == 1:
            return [_blocked(submissions[0])]
    except ValidationError as error:
        if len(submissions) == 1:
            return [Submitted(submissions[0].id, "refused", error.field, error.reason)]
    middle = len(submissions) // 2
    first = await submit_free(database, submissions[:middle], deadline_s)
    return first + await submit_free(database, submissions[middle:], deadline_s)


def _blocked(submission: Submission) -> Submitted:
    return Submitted(submission.id, "blocked", "id", "another session holds it in a transaction that is open")
