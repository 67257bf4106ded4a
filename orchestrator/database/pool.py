"""The connection pool of the API and the CLI: repeats calls that a lost connection cut short, each change once."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from types import TracebackType
from typing import Any, LiteralString, Self, TypeVar
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
    translated,
)
from orchestrator.database.customer import require_customer_of_session
from orchestrator.database.read_replica import ReadReplica
from orchestrator.database.rights import ABILITIES
from orchestrator.errors import (
    Blocked,
    DatabaseUnavailable,
    InDoubt,
    NotPermitted,
    OrchestratorError,
    ValidationError,
)
from orchestrator.settings import Settings
from orchestrator.tasks import within

T = TypeVar("T")

_log = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_TRIES = 3
_ANSWER_S = 120.0  # longer than any call takes
_CHECK_S = 1.0
_FULL_S = 5.0  # a disk that was full counts as full this long, unless a change succeeds
_CLOSE_S = 1.0  # for connections that are being opened
_NEW_S = 1.0
_LOOK = "whether it was done is not known, so look before you repeat it"

_ONCE = """
with answer as materialized ({}), kept as materialized (
  select orchestrator.keep_answer(%s, (select json_agg(a) from answer a)))
select a.* from kept cross join answer a
"""
_PATIENCE = "3s"
_LEFT_FOR_OTHERS = 3  # connections: two that submit, and one
_HOLDERS_S = 2.0


class Pool:
    """A pool of connections. `Database` adds the calls that its users make.

    Every method raises DatabaseUnavailable when the database is away, after two more tries on fresh connections;
    Blocked when another session's open transaction holds what it needs for longer than 3 seconds; NotPermitted when the
    login lacks a right. A change is made once, and its answer survives the loss of the reply: see `once`. InDoubt means
    that the change may have been made.

    `role` shows in pg_stat_activity; `needs` are the ABILITIES without which this process is not ready.
    `serves_clients`: this is the API's. Queries that may go to the replica of DATABASE_READ_URL do, while it is up to
    date, and no session of another customer's database is used, so that nothing is kept there before the process ends.
    """

    def __init__(
        self, settings: Settings, *, role: str, needs: Sequence[str] = (), serves_clients: bool = False
    ) -> None:
        has_replica = serves_clients and settings.database_read_url is not None
        self.replica = ReadReplica(settings, self.rows) if has_replica else None
        self._customer = settings.named_customer if serves_clients else None
        self._needs = [ABILITIES[ability] for ability in needs]
        self._turns = asyncio.Semaphore(max(1, settings.pool_max_size - _LEFT_FOR_OTHERS))
        self._doubtful = False
        self._full_at = -math.inf
        self._pool = _CheckedPool(
            settings.database_url,
            connection_class=Connection,
            kwargs=connection_arguments(settings.database_url, role, lock_timeout=_PATIENCE),
            min_size=settings.pool_min_idle,
            max_size=settings.pool_max_size,
            timeout=_TIMEOUT_S,
            reconnect_timeout=10,
            configure=self._configure,
            name=role,
            open=False,
        )

    async def _configure(self, connection: Connection) -> None:
        keep_text(connection)
        if self._customer is None:
            return
        try:
            await require_customer_of_session(connection, self._customer)
        except BaseException:
            await connection.close()
            raise

    async def __aenter__(self) -> Self:
        await self._pool.open()
        if self.replica is not None:
            await self.replica.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.replica is not None:
            await self.replica.__aexit__(kind, error, trace)
        await self._pool.close(timeout=_CLOSE_S)

    async def _run(
        self,
        work: Callable[[Connection], Awaitable[T]],
        again: Callable[[Connection], Awaitable[T]] | None = None,
        *,
        changes: bool = False,
        names_holders: bool = True,
    ) -> T:
        """Runs `work`; when the connection was lost or cannot write, runs `again` (default: `work`) on another.

        Nothing else tries again. Work that `changes` something must allow for it.
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
        """Runs a query that changes something once, however often it has to be sent; returns its rows.

        The database keeps the answer with the change (orchestrator.request), and is asked for it when the reply was
        lost. Columns are texts, numbers, booleans or arrays of those, which JSON gives back unchanged. `waits` says
        whether the query may have to wait for another session. One that does not, such as a pause, gets a connection
        even while those that do have theirs.
        """

        async def work(connection: Connection, request: UUID) -> list[Any]:
            return await (await connection.execute(_ONCE.format(query), (*values, request))).fetchall()

        return await self.done_once(work, waits=waits)

    async def done_once(
        self, work: Callable[[Connection, UUID], Awaitable[list[Any]]], *, waits: bool = True
    ) -> list[Any]:
        """As `once`, for work that calls keep_answer() itself, in its transaction."""
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
                    # The first run may still have been under way, and have committed meanwhile.
                    answer = None if connection.closed else await kept(connection)
                    if answer is None:
                        raise
            return answer

        async with self._turn() if waits else nullcontext():
            return await self._run(lambda connection: work(connection, request), again, changes=True)

    async def holders(self) -> str:
        """The sessions whose open transactions may hold this up, for an operator."""

        async def work(connection: Connection) -> str:
            row = await (await connection.execute(HOLDERS)).fetchone()
            return row[0] if row else ""

        try:
            return await within(_HOLDERS_S, self._run_once(work))
        except (OrchestratorError, TimeoutError):
            return "who it is could not be found out"

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None, None]:
        """Limits the calls that may wait for another session, so that some connections are left for the others."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await self._turns.acquire()
        except TimeoutError:
            raise DatabaseUnavailable("others wait for another session's open transaction already") from None
        try:
            yield
        finally:
            self._turns.release()

    async def rows(self, query: LiteralString, *values: object) -> list[TupleRow]:
        """The rows of a query that changes nothing; for this package's modules."""

        async def work(connection: Connection) -> list[TupleRow]:
            return await (await connection.execute(query, values)).fetchall()

        return await self._run(work)

    async def aged_rows(self, query: LiteralString, *values: object) -> list[TupleRow]:
        """As `rows`, but from the read replica while there is one that is up to date: they may be seconds old."""
        rows = None if self.replica is None else await self.replica.rows(query, values)
        return await self.rows(query, *values) if rows is None else rows

    async def value(self, query: LiteralString, *values: object) -> Any:
        """The first column of the first row; None: there is no row."""
        rows = await self.rows(query, *values)
        return rows[0][0] if rows else None

    async def ready(self) -> None:
        """Returns when the database can serve this process.

        Raises DatabaseUnavailable when it is away, takes no writes, or had a full disk in the last seconds;
        OrchestratorError when the schema or a partition for today is missing, or nobody can submit; NotPermitted when
        the login lacks a right that this process needs.
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


class _CheckedPool(AsyncConnectionPool[Connection]):
    @staticmethod
    async def check_connection(conn: Connection) -> None:
        """Raises when the connection does not answer within a second, or cannot write."""
        if not await within(_CHECK_S, _can_write(conn)) and _is_old(conn):
            await conn.close()
            raise psycopg.OperationalError("this session cannot write")


def _is_old(connection: Connection) -> bool:
    """Whether a session that cannot write should be given up: an old one may stay so when its server has changed.

    A new one shows the present state of its server, and another would show the same.
    """
    return time.monotonic() > connection._created_at + _NEW_S


async def _can_write(connection: Connection) -> bool:
    row = await (await connection.execute("show transaction_read_only")).fetchone()
    return row == ("off",)
