"""A physical replica that answers queries, as long as what it knows is not too old.

How old that is follows from positions in the write-ahead log alone, so that neither clocks nor an idle primary mislead:
whatever the primary had committed when it was asked for its position, a replica that has replayed up to there has, too.
A replica whose connection to the primary is broken falls behind by this measure; by the time of its last transaction it
would not.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import LiteralString, NamedTuple, Self

import psycopg
from psycopg import errors
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool

from orchestrator.database.connection import Connection, connection_arguments, keep_text
from orchestrator.errors import OrchestratorError, first_line
from orchestrator.settings import Settings, database_url
from orchestrator.tasks import end, within

Ask = Callable[[LiteralString], Awaitable[list[TupleRow]]]

POSITION: LiteralString = """
select (select system_identifier from pg_catalog.pg_control_system())
  , (select oid::bigint from pg_catalog.pg_database where datname = pg_catalog.current_database())
  , pg_catalog.pg_is_in_recovery(), pg_catalog.pg_postmaster_start_time()::text
  , pg_catalog.pg_wal_lsn_diff(
      case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()
        else pg_catalog.pg_current_wal_flush_lsn() end, '0/0')::bigint
"""
"""Which database of which cluster a session is in, and up to which position it knows everything; see `Position`."""

_CHECK_S = 0.5
_ASKING_S = 2.0
_CONNECTION_S = 1.0
_ANSWER_S = 120.0
_REST_S = 5.0  # a replica that has failed a query is left alone for this long
_CONNECTIONS = 10
_POSITIONS = 1200  # ten minutes of them
_BUSY = (errors.SerializationFailure, errors.QueryCanceled)  # what was read there has been vacuumed away meanwhile

_log = logging.getLogger(__name__)


class Position(NamedTuple):
    """A row of `POSITION`. `position` counts bytes of the write-ahead log; None on a replica that has replayed none."""

    cluster: int
    database: int
    in_recovery: bool
    started: str
    position: int | None


def misfit(primary: Position, replica: Position) -> str | None:
    """Why `replica` cannot answer for `primary`, whatever its age; None: it can. Ask the replica first."""
    if (primary.cluster, primary.database) != (replica.cluster, replica.database):
        return "it is no physical replica of the database of DATABASE_URL"
    if not replica.in_recovery and primary.started != replica.started:
        return "it takes writes itself, so it follows no primary any more"
    if (replica.position or 0) > (primary.position or 0):
        return "it knows what the database of DATABASE_URL does not, which was restored or failed over without it"
    return None


class ReadReplica:
    """The replica of DATABASE_READ_URL. Use it as a context manager; `primary` asks the database of DATABASE_URL."""

    def __init__(self, settings: Settings, primary: Ask) -> None:
        assert settings.database_read_url is not None
        url = settings.database_read_url
        self._url = url
        self.address = database_url.address(url)
        self._max_lag_s = settings.database_read_max_lag_s
        self._primary = primary
        self._known: deque[tuple[int, float]] = deque(maxlen=_POSITIONS)
        self._as_of = -math.inf
        self._rests_until = -math.inf
        self._fault: str | None = "it has not been asked yet"
        self._told_in_use: bool | None = None
        self._began = time.monotonic()
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            url,
            connection_class=Connection,
            kwargs=connection_arguments(url, "api read"),
            min_size=0,
            max_size=min(_CONNECTIONS, settings.pool_max_size),
            timeout=_CONNECTION_S,
            reconnect_timeout=0,
            configure=_configure,
            name="read replica",
            open=False,
        )

    async def __aenter__(self) -> Self:
        await self._pool.open()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end(self._watching)
        await self._pool.close(timeout=_CONNECTION_S)

    @property
    def lag_s(self) -> float:
        """How old its knowledge may be: half a second more than it is; NaN: unknown."""
        return math.nan if self._fault is not None or self._as_of == -math.inf else time.monotonic() - self._as_of

    @property
    def in_use(self) -> bool:
        """Whether queries go to it; otherwise they go to the primary."""
        now = time.monotonic()
        return self._fault is None and now >= self._rests_until and now - self._as_of <= self._max_lag_s

    async def rows(self, query: LiteralString, values: Sequence[object]) -> list[TupleRow] | None:
        """The rows of a query that changes nothing; None: ask the primary."""
        if not self.in_use:
            return None
        try:
            async with asyncio.timeout(_ANSWER_S), self._pool.connection() as connection:
                return await (await connection.execute(query, values)).fetchall()
        except _BUSY:
            return None
        except (psycopg.Error, OrchestratorError, TimeoutError) as error:
            if not isinstance(error, psycopg.DataError):  # then it is the query's fault, as the primary will say
                self._rests_until = time.monotonic() + _REST_S
                self._tell(f"it failed a query: {first_line(error)}")
            return None

    async def _watch(self) -> None:
        while True:
            try:
                # Not one of the pool, which would log each failure to connect.
                async with await within(_ASKING_S, self._connect()) as connection:
                    while True:
                        self._fault = await self._look(connection)
                        self._tell_what_holds()
                        await asyncio.sleep(_CHECK_S)
            except TimeoutError:
                self._fault = f"no answer within {_ASKING_S:g} s"
            except (psycopg.Error, OrchestratorError) as error:
                self._fault = first_line(error)
            self._tell_what_holds()
            await asyncio.sleep(_CHECK_S)

    async def _connect(self) -> Connection:
        return await Connection.connect(self._url, **connection_arguments(self._url, "replica check"))

    async def _look(self, connection: Connection) -> str | None:
        """Asks both servers where they are. Returns why the replica is of no use, or None."""
        replica = await within(_ASKING_S, _position(connection))
        asked_at = time.monotonic()
        [row] = await within(_ASKING_S, self._primary(POSITION))
        primary = Position(*row)
        reason = misfit(primary, replica)
        if reason is not None or replica.position is None or primary.position is None:
            self._known.clear()
            self._as_of = -math.inf
            return reason or "it has replayed nothing yet"
        while self._known and self._known[0][0] <= replica.position:
            self._as_of = self._known.popleft()[1]
        self._known.append((primary.position, asked_at))
        return None

    def _tell_what_holds(self) -> None:
        if self._fault is not None:
            self._tell(self._fault)
        elif self.in_use:
            self._tell(None)
        elif time.monotonic() >= max(self._rests_until, self._began + self._max_lag_s):
            self._tell(f"it is behind by more than DATABASE_READ_MAX_LAG_SECONDS ({self._max_lag_s:g})")

    def _tell(self, fault: str | None) -> None:
        """Logs when queries begin to go elsewhere."""
        if (fault is None) == self._told_in_use:
            return
        self._told_in_use = fault is None
        about = {"replica": self.address}
        if fault is None:
            _log.info("the read replica answers queries", extra=about)
        else:
            _log.warning("the primary answers queries in place of the read replica: %s", fault, extra=about)


async def _position(connection: Connection) -> Position:
    row = await (await connection.execute(POSITION)).fetchone()
    assert row is not None
    return Position(*row)


async def _configure(connection: Connection) -> None:
    keep_text(connection)
