"""Maintenance of the database: retention, its runs, its condition, and retired partitions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, LiteralString, NamedTuple

import msgspec
import psycopg
from psycopg import sql

from orchestrator.database.blocking import cut
from orchestrator.database.connection import (
    HOLDERS,
    BlockingConnection,
    Connection,
    connect,
    connect_blocking,
    is_lost,
    translated,
)
from orchestrator.database.gateway import Database
from orchestrator.errors import Blocked, DatabaseUnavailable, InDoubt
from orchestrator.settings import Settings, given

Buffer = bytes | bytearray | memoryview

_RUNS = 100
# Reads the same rows in the same order each time, so that an existing file can be recognised as the same.
_IN_ORDER = {"synchronize_seqscans": "off", "max_parallel_workers_per_gather": "0"}

_BATCHES = "delivered_batch_p"
_OUTCOMES = sql.SQL(
    "select o.* from {} b cross join lateral orchestrator.batch_outcomes(row(b.*)::orchestrator.delivered_batch) o"
)


class Retention(NamedTuple):
    """How long the database keeps events, and which partitions it makes; None: as it was told before."""

    retention_days: int | None
    partition_days_ahead: int | None
    max_schedule_ahead_days: int | None
    archive: bool | None

    @classmethod
    def of(cls, settings: Settings) -> Retention:
        """The values of the settings, defaults included."""
        return cls(
            settings.retention_days,
            settings.partition_days_ahead,
            settings.max_schedule_ahead_days,
            settings.archive_directory is not None,
        )

    @classmethod
    def given(cls, settings: Settings, environ: Mapping[str, str]) -> Retention:
        """The values that the environment sets: a command that runs once must not undo those of a service."""
        named = given(environ)
        return cls(
            settings.retention_days if "retention_days" in named else None,
            settings.partition_days_ahead if "partition_days_ahead" in named else None,
            settings.max_schedule_ahead_days if "max_schedule_ahead_days" in named else None,
            True if settings.archive_directory is not None else None,
        )


CONFIGURE: LiteralString = "select orchestrator.configure_retention(%s, %s, %s, %s)"
"""Takes a `Retention`."""


class MaintenanceProblem(NamedTuple):
    """A step of maintenance that failed, and was undone by itself."""

    step: str
    problem: str


@dataclass(slots=True)
class Upkeep:
    """What run_maintenance() did, in one run or several; `did` counts by kind of work.

    `skipped` says why nothing was done. `more`: there is more work to do at once.
    """

    runs: int = 0
    took_ms: float = 0.0
    more: bool = False
    skipped: str | None = None
    did: dict[str, int] = field(default_factory=dict)
    problems: list[MaintenanceProblem] = field(default_factory=list)

    def add(self, later: Upkeep) -> None:
        """Counts a later run in."""
        self.runs += later.runs
        self.took_ms += later.took_ms
        self.more = later.more
        self.skipped = later.skipped
        for name, count in later.did.items():
            self.did[name] = self.did.get(name, 0) + count
        self.problems += later.problems


class Condition(NamedTuple):
    """The condition of maintenance: how long ago it last ran, None if never, and which steps failed then.

    `horizon` is an estimate; `retired` counts detached partitions that are not dropped yet, `expiring` dead letters
    that retention drops within a day. Dead letters are counted up to 10,000.
    """

    age_s: float | None
    problems: list[dict[str, str]]
    days_ahead: float
    horizon: int
    retired: int
    dead_letters: int
    expiring: int


class Maintenance:
    """One connection, outside any transaction. Methods raise DatabaseUnavailable."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncGenerator[Maintenance, None]:
        async with await connect(settings, "maintain", lock_timeout="5s") as connection:
            yield cls(connection)

    async def configure(self, retention: Retention) -> None:
        """Sets retention and partitions from now on. Raises ValidationError when the database refuses.

        Raises Blocked, naming the session, when another session has changed them and not committed.
        """
        try:
            with translated():
                await self._connection.execute(CONFIGURE, retention)
        except Blocked as error:
            with translated():
                row = await (await self._connection.execute(HOLDERS)).fetchone()
            raise Blocked(f"{error}; {row[0] if row else ''}") from error.__cause__

    async def run(self) -> Upkeep:
        """Runs maintenance once, which is bounded work; skips it while another session runs it.

        Raises InDoubt when the connection ended before it answered.
        """
        try:
            with translated():
                cursor = await self._connection.execute("select orchestrator.run_maintenance()")
                row = await cursor.fetchone()
        except DatabaseUnavailable as error:
            if not is_lost(error):
                raise
            raise InDoubt(
                f"{error}; maintenance may have been done nevertheless: run it again, which is safe"
            ) from error
        assert row is not None
        return upkeep_of(msgspec.json.decode(row[0], type=dict[str, Any]))

    async def run_on(self) -> Upkeep:
        """Runs maintenance until there is no more work, a step fails, or it has run a hundred times."""
        told = await self.run()
        while told.more and not told.problems and told.runs < _RUNS:
            told.add(await self.run())
        return told


def upkeep_of(told: dict[str, Any]) -> Upkeep:
    """What run_maintenance() answers, as an `Upkeep`."""
    if "skipped" in told:
        return Upkeep(skipped=str(told["skipped"]))
    counts = {name: value for name, value in told.items() if type(value) is int and name not in ("run", "took_ms")}
    problems = [MaintenanceProblem(each["step"], each["problem"]) for each in told["problems"]]
    return Upkeep(1, told["took_ms"], told["more"], None, counts, problems)


async def condition(database: Database) -> Condition:
    """Reads the condition. Raises DatabaseUnavailable, and OrchestratorError when the login may not read it."""
    [row] = await database.rows(CONDITION)
    return Condition(*row)


# Ids begin with the scheduled time: the dead letters that retention drops next come first in the table's index.
CONDITION: LiteralString = """
select extract(epoch from n.now - (r.started_at + r.took))::float8
     , coalesce(r.problems, '[]')
     , extract(epoch from b.end_day - n.now)::float8 / 86400
     , (select greatest(0, c.reltuples)::bigint from pg_class c where c.oid = 'orchestrator.horizon'::regclass)
     , (select count(*) from orchestrator.retired_partition)
     , (select count(*) from (select from orchestrator.dead_letter limit 10000) d)
     , (select count(*) from (
         select from orchestrator.dead_letter d
         where d.event_id < orchestrator.first_id(
           (orchestrator.first_day_kept(n.now) + 1)::timestamp at time zone 'UTC')
         limit 10000) d)
from orchestrator.now() n (now)
cross join orchestrator.partition_bounds() b
left join lateral (select r.* from orchestrator.maintenance_run r order by r.run desc limit 1) r on true
"""


class Retired:
    """Detached partitions that wait to be archived. Its calls block: use it in a thread of its own.

    All methods raise DatabaseUnavailable.
    """

    def __init__(self, connection: BlockingConnection, holding: BlockingConnection | None) -> None:
        self._connection = connection
        self._holding = holding

    @classmethod
    @contextmanager
    def open(cls, settings: Settings) -> Iterator[Retired]:
        with ExitStack() as opened:
            with translated():
                connection = opened.enter_context(connect_blocking(settings.database_url, "archive", **_IN_ORDER))
            holding = None
            if connection.pooled:  # a lock lasts no longer than a transaction
                with translated():
                    holding = opened.enter_context(connect_blocking(settings.database_url, "archive"))
                    opened.enter_context(holding.transaction())
            yield cls(connection, holding)

    def take(self) -> bool:
        """Takes the archiver's lock until this is closed; False: another process archives."""
        with translated():
            if self._holding is not None:
                row = self._holding.execute(
                    "select pg_try_advisory_xact_lock(hashtext('orchestrator.archive'))"
                ).fetchone()
            else:
                row = self._connection.execute(
                    "select pg_try_advisory_lock(hashtext('orchestrator.archive'))"
                ).fetchone()
        return row == (True,)

    def names(self) -> list[str]:
        """The names of the tables."""
        with translated():
            return [row[0] for row in self._connection.execute("select name from orchestrator.partitions_to_archive()")]

    def columns(self, name: str) -> list[tuple[str, str]]:
        """Names and types of the columns of `rows`, in order: ``("scheduled_at", "timestamp with time zone")``."""
        with translated():
            return self._connection.execute(
                "select attname, format_type(atttypid, atttypmod) from pg_attribute"
                " where attrelid = format('orchestrator.%%I', %s::text)::regclass and attnum > 0 and not attisdropped"
                " order by attnum",
                ("outcome" if name.startswith(_BATCHES) else name,),
            ).fetchall()

    def rows(self, name: str, *, header: bool) -> Generator[Buffer, None, None]:
        """The table as COPY writes CSV, in UTF-8, a whole row at a time; delivered batches as rows of ``outcome``."""
        of = _OUTCOMES if name.startswith(_BATCHES) else sql.SQL("select * from {}")
        statement = sql.SQL("copy ({}) to stdout (format csv, header {}, encoding 'UTF8')").format(
            of.format(sql.Identifier("orchestrator", name)), sql.Literal(header)
        )
        connection = self._connection
        with translated(), connection.transaction(), connection.cursor() as cursor, cursor.copy(statement) as copy:
            yield from copy

    def archived(self, name: str) -> bool:
        """Gives the table up; False: it does not exist any more, or another process has given it up."""
        with translated():
            row = self._connection.execute("select orchestrator.archived_partition(%s)", (name,)).fetchone()
        return row == (True,)

    def cancel(self) -> None:
        """Cancels the running query; call it from another thread."""
        try:
            self._connection.cancel_safe(timeout=2.0)
        except psycopg.Error:  # the server does not answer
            cut(self._connection)
