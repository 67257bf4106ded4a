"""The database as Python sees it: the only module that names SQL functions.

`Database` is the pool behind the API, the CLI and maintenance. `Leases` is a dispatcher's view, on connections
of its own, where neither a claim nor a finish ever waits for a pool.
"""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, LiteralString, NamedTuple, Self, TypeVar

import msgspec
import psycopg
from psycopg import AsyncConnection, errors
from psycopg.rows import TupleRow
from psycopg.types.string import TextLoader
from psycopg_pool import AsyncConnectionPool

from orchestrator.config import Settings
from orchestrator.errors import DatabaseUnavailable, OrchestratorError, ValidationError
from orchestrator.events import Submission, copy_row

Connection = AsyncConnection[TupleRow]
T = TypeVar("T")

NOTIFY_CHANNEL = "orchestrator_due"
_CONNECT_TIMEOUT_S = 5
_POOL_TIMEOUT_S = 5.0
_AWAY = (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction)
_NOT_MIGRATED = (
    errors.UndefinedFunction,
    errors.UndefinedTable,
    errors.InvalidSchemaName,
    errors.UndefinedColumn,
)
# A dead peer is noticed within a minute; the default is two hours.
_KEEPALIVE = {
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_COPY: LiteralString = "copy pg_temp.submission from stdin"


class Submitted(NamedTuple):
    """What became of a submission: ``accepted``, ``duplicate``, or ``refused`` with field and reason."""

    id: str
    result: str
    field: str | None = None
    reason: str | None = None


class Cancelled(NamedTuple):
    """``cancelled``, ``already_cancelled``, ``in_flight``, ``finished`` or ``not_found``, and the state it is in."""

    id: str
    result: str
    status: str | None


class ApiKey(NamedTuple):
    name: str
    scopes: frozenset[str]


class Claimed(msgspec.Struct, gc=False):
    """A leased event. `due_at` and `lease_until` are Unix seconds by the database's clock; JSON stays text."""

    event_id: str
    attempt: int
    due_at: float
    lease_until: float
    scheduled_at: str
    destination: str
    headers: str | None
    payload: str


class Finished(msgspec.Struct, gc=False):
    """The result of an attempt: ``delivered``, ``retry`` or ``fail``; times in Unix seconds by the database's clock."""

    event_id: str
    attempt: int
    result: str
    status_code: int | None
    started_at: float
    finished_at: float
    error: str | None
    response: str | None
    retry_after_s: float | None


class NotDelivered(NamedTuple):
    """What `Leases.finish` made of a result: ``retried`` (due again at `due_at`), ``dead`` or ``stale``."""

    event_id: str
    result: str
    due_at: float | None


@contextmanager
def translated() -> Iterator[None]:
    """Raises what psycopg raises as this product's errors."""
    try:
        yield
    except _AWAY as error:
        raise DatabaseUnavailable(f"the database is away: {_first_line(error)}") from error
    except _NOT_MIGRATED as error:
        raise OrchestratorError(
            f"the database lacks this program's schema ({_first_line(error)}); run: orchestrator migrate"
        ) from error
    except errors.InsufficientPrivilege as error:
        raise OrchestratorError(f"{_first_line(error)}; grant the user one of the roles in sql/roles.sql") from error
    except (psycopg.DataError, psycopg.IntegrityError) as error:
        raise ValidationError(error.diag.column_name or "value", _first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _connection_arguments(role: str) -> dict[str, Any]:
    return {
        "autocommit": True, "connect_timeout": _CONNECT_TIMEOUT_S, "application_name": f"orchestrator {role}",
        "options": "-c timezone=UTC -c datestyle=ISO -c extra_float_digits=1", **_KEEPALIVE,
    }  # fmt: skip


async def connect(settings: Settings, role: str) -> Connection:
    """A connection outside any pool. Raises DatabaseUnavailable."""
    with translated():
        connection = await AsyncConnection.connect(settings.database_url, **_connection_arguments(role))
    _keep_text(connection)
    return connection


def _keep_text(connection: Connection) -> None:
    """Loads these types as the text the server sends: nothing here computes with them."""
    for name in ("uuid", "json", "timestamptz"):
        connection.adapters.register_loader(name, TextLoader)


class Database:
    """A pool of connections, and what the API and the CLI ask of the database.

    Every method raises DatabaseUnavailable when the database is away, after one more try on fresh connections:
    all of them may be repeated safely.
    """

    def __init__(self, settings: Settings, *, role: str) -> None:
        self._staged: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._pool = AsyncConnectionPool(
            settings.database_url,
            kwargs=_connection_arguments(role),
            min_size=settings.pool_min_idle,
            max_size=settings.pool_max_size,
            timeout=_POOL_TIMEOUT_S,
            reconnect_timeout=10,
            configure=self._configure,
            name=role,
            open=False,
        )

    async def _configure(self, connection: Connection) -> None:
        _keep_text(connection)

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
        except DatabaseUnavailable:
            await self._pool.check()  # drops connections that a restart of the server has broken
            return await self._run_once(work)

    async def _run_once(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        with translated():
            async with self._pool.connection() as connection:
                return await work(connection)

    async def _all(self, query: LiteralString, *values: object) -> list[TupleRow]:
        async def work(connection: Connection) -> list[TupleRow]:
            return await (await connection.execute(query, values)).fetchall()

        return await self._run(work)

    async def _value(self, query: LiteralString, *values: object) -> Any:
        rows = await self._all(query, *values)
        return rows[0][0] if rows else None

    async def submit(self, submissions: Sequence[Submission]) -> list[Submitted]:
        """Keeps the submissions, in one transaction; one answer each, in order.

        Raises ValidationError when the database refuses a value that no rule foresaw; nothing is kept then.
        """
        text = b"".join([copy_row(submission, n) for n, submission in enumerate(submissions)])

        async def work(connection: Connection) -> list[TupleRow]:
            if connection not in self._staged:
                await connection.execute("select orchestrator.open_staging()")
                self._staged.add(connection)
            async with connection.transaction(), connection.cursor() as cursor:
                async with cursor.copy(_COPY) as copy:
                    await copy.write(text)
                await cursor.execute("select n, result, field, reason from orchestrator.submit_staged()")
                return await cursor.fetchall()

        exceptions = {n: (result, field, reason) for n, result, field, reason in await self._run(work)}
        if not exceptions:
            return [Submitted(submission.id, "accepted") for submission in submissions]
        return [
            Submitted(submission.id, *exceptions.get(n, ("accepted", None, None)))
            for n, submission in enumerate(submissions)
        ]

    async def event(self, event_id: str) -> bytes | None:
        """The event as JSON, with its state and outcomes."""
        value = await self._value("select orchestrator.get_event(%s::uuid)", event_id)
        return None if value is None else value.encode()

    async def events_by_external_id(
        self, external_job_id: str, *, limit: int, after: tuple[str, str] | None = None
    ) -> list[bytes]:
        """Events as JSON, newest first; `after` is (scheduled_at, id) of the last one of the page before."""
        rows = await self._all(
            "select orchestrator.events_by_external_id(%s, %s, %s::timestamptz, %s::uuid)",
            external_job_id,
            limit,
            *(after or (None, None)),
        )
        return [row[0].encode() for row in rows]

    async def cancel(self, event_id: str) -> Cancelled:
        rows = await self._all("select * from orchestrator.cancel_event(%s::uuid)", event_id)
        return Cancelled(*rows[0]) if rows else Cancelled(event_id, "not_found", None)

    async def cancel_external(self, external_job_id: str) -> list[Cancelled]:
        """Cancels every event with this external id; empty when there is none."""
        rows = await self._all("select * from orchestrator.cancel_event(p_external_job_id => %s)", external_job_id)
        return [Cancelled(*row) for row in rows]

    async def statistics(self) -> bytes:
        value: str = await self._value("select orchestrator.statistics()")
        return value.encode()

    async def backlog(self) -> int:
        """Events that are due and not claimed, counted up to 10,000 a lane."""
        return int(await self._value("select orchestrator.backlog()"))

    async def dead_letters(self, *, limit: int, after: tuple[str, str] | None = None) -> list[bytes]:
        """Dead letters as JSON, newest first; `after` is (died_at, id) of the last one of the page before."""
        rows = await self._all(
            "select orchestrator.list_dead_letters(%s, %s::timestamptz, %s::uuid)",
            limit,
            *(after or (None, None)),
        )
        return [row[0].encode() for row in rows]

    async def run_maintenance(self, *, days_ahead: int) -> bytes:
        """Makes partitions and folds statistics; says what it did, as JSON."""
        value: str = await self._value("select orchestrator.run_maintenance(%s)", days_ahead)
        return value.encode()

    async def api_key(self, key_hash: bytes) -> ApiKey | None:
        rows = await self._all("select name, scopes from orchestrator.find_api_key(%s)", key_hash)
        return ApiKey(rows[0][0], frozenset(rows[0][1])) if rows else None

    async def count_api_keys(self) -> int:
        return int(await self._value("select orchestrator.count_api_keys()"))

    async def create_api_key(self, name: str, key_hash: bytes, scopes: Sequence[str]) -> None:
        """Raises ValidationError when the name is taken or a scope unknown."""
        await self._all("select orchestrator.create_api_key(%s, %s, %s)", name, key_hash, list(scopes))

    async def list_api_keys(self) -> list[bytes]:
        rows = await self._all(
            """select json_build_object('name', name, 'scopes', scopes, 'created_at', created_at)
            from orchestrator.api_key order by name"""
        )
        return [row[0].encode() for row in rows]

    async def revoke_api_key(self, name: str) -> bool:
        return bool(await self._value("select orchestrator.revoke_api_key(%s)", name))

    async def ready(self) -> None:
        """Raises DatabaseUnavailable, or OrchestratorError when the schema, or a partition for today, is missing."""
        today = await self._value(
            "select orchestrator.now() between first_day and end_day from orchestrator.partition_bounds()"
        )
        if not today:
            raise OrchestratorError("no partition for today; run: orchestrator migrate")

    def pool_stats(self) -> dict[str, int]:
        return self._pool.get_stats()


class Leases:
    """Claiming, finishing and releasing, on two connections, so that neither waits for the other."""

    def __init__(self, claiming: Connection, finishing: Connection, worker: int) -> None:
        self._claiming = claiming
        self._finishing = finishing
        self.worker = worker

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, worker_name: str, worker: int | None) -> AsyncGenerator[Leases, None]:
        """Connects; registers the process as a worker unless it has a number already."""
        async with (
            await connect(settings, "dispatch") as claiming,
            await connect(settings, "dispatch") as finishing,
        ):
            if worker is None:
                with translated():
                    row = await (
                        await claiming.execute("select orchestrator.register_worker(%s)", (worker_name,))
                    ).fetchone()
                worker = row[0] if row else 0
            yield cls(claiming, finishing, worker)

    async def claim(self, batch: int, *, lease_s: float, lookahead_s: float) -> tuple[float, list[Claimed]]:
        """Leases up to `batch` events due within `lookahead_s`; also the database's time, read before claiming."""
        with translated():
            cursor = await self._claiming.execute(_CLAIM, (batch, self.worker, lease_s, lookahead_s))
            rows = await cursor.fetchall()
        database_now: float = rows[0][0]
        if rows[0][1] is None:
            return database_now, []
        return database_now, [Claimed(*row[1:]) for row in rows]

    async def next_due_at(self) -> float | None:
        """When the next event that nobody holds is due, in Unix seconds."""
        with translated():
            row = await (
                await self._claiming.execute("select extract(epoch from orchestrator.next_due_at())::float8")
            ).fetchone()
        return row[0] if row else None

    async def finish(self, results: Sequence[Finished]) -> list[NotDelivered]:
        """Records results; answers those not delivered. Raises ValidationError for a text the database refuses."""
        ordered = sorted(results, key=_event_id)
        with translated():
            cursor = await self._finishing.execute(
                _FINISH,
                (
                    _array([r.event_id for r in ordered]),
                    _array([str(r.attempt) for r in ordered]),
                    _array([r.result for r in ordered]),
                    _array([str(r.status_code or "null") for r in ordered]),
                    _array([repr(r.started_at) for r in ordered]),
                    _array([repr(r.finished_at) for r in ordered]),
                    [r.error for r in ordered] if any(r.error for r in ordered) else None,
                    [r.response for r in ordered] if any(r.response for r in ordered) else None,
                    _array([str(r.retry_after_s if r.retry_after_s is not None else "null") for r in ordered]),
                    self.worker,
                ),
            )
            return [NotDelivered(*row) for row in await cursor.fetchall()]

    async def release(self, leases: Sequence[Claimed]) -> int:
        """Hands leases back unused; returns how many were still held."""
        ordered = sorted(leases, key=_event_id)
        with translated():
            cursor = await self._finishing.execute(
                "select orchestrator.release_events(%s::uuid[], %s::integer[])",
                (
                    _array([lease.event_id for lease in ordered]),
                    _array([str(lease.attempt) for lease in ordered]),
                ),
            )
            row = await cursor.fetchone()
        return row[0] if row else 0


def _event_id(item: Claimed | Finished) -> str:
    return item.event_id


def _array(values: list[str]) -> str:
    """A PostgreSQL array literal of values that need no quotes: a tenth of the cost of adapting a list."""
    return "{" + ",".join(values) + "}"


_CLAIM: LiteralString = """
select extract(epoch from n.at)::float8, c.event_id, c.attempt, extract(epoch from c.due_at)::float8
     , extract(epoch from c.lease_until)::float8, c.scheduled_at, c.destination, c.headers, c.payload
from (select orchestrator.now() as at offset 0) n
left join lateral orchestrator.claim_due_events(%s, %s, make_interval(secs => %s), make_interval(secs => %s)) c on true
"""
_FINISH: LiteralString = """
select event_id, result, extract(epoch from due_at)::float8 from orchestrator.finish_events(
  %s::uuid[], %s::integer[], %s::text[], %s::integer[], %s::float8[], %s::float8[], %s::text[], %s::text[],
  %s::float8[], %s)
"""
