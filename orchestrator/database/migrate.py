"""Brings a database up to this program's schema.

``sql/schema`` holds versioned files, applied once, in order; ``sql/functions``, ``sql/views`` and ``sql/roles.sql``
are repeatable, applied again when their text has changed. All of it happens in one transaction under an
advisory lock, so any number of replicas may migrate at once and a crash leaves nothing half done.

Before tables change, all of them are locked, which waits for those who use them, and has everybody else wait behind. So
a table is waited for only while no other is held, for no longer than two seconds, as PostgreSQL has its own autovacuum
give way after one; the others are to be had at once. Else all is let go, and tried again with the busy table first.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from orchestrator.database.blocking import OnConnected
from orchestrator.database.connection import BlockingConnection, connect_blocking, with_remedies
from orchestrator.database.customer import record_customer, require_customer
from orchestrator.database.maintenance import CONFIGURE, Retention
from orchestrator.errors import DatabaseUnavailable, InDoubt, OrchestratorError

_PATIENCE_S = 30.0
_LONG = "set local lock_timeout = '2 s'"
_SHORT = "set local lock_timeout = '100 ms'"  # a tenth of what makes a session look for deadlocks
_TABLES = """
select relname from pg_class
where relnamespace = 'orchestrator'::regnamespace and relkind in ('r', 'p') and not relispartition
  and relname <> 'migration'
order by array_position(array['event', 'outcome', 'delivered_batch', 'timer'], relname::text), relname
"""
_ALWAYS = ("functions/90_plans.sql", "roles.sql")  # applied when anything else is
_MAINTENANCE_TRIES = 100
_MAINTENANCE_PAUSE_S = 0.1
_LOCK = "select pg_advisory_xact_lock(hashtext('orchestrator.migrate'))"
_RECORD = """
insert into orchestrator.migration (file, checksum) values (%s, %s)
on conflict (file) do update set checksum = excluded.checksum, applied_at = clock_timestamp()
"""
_HOLDERS = """
select format('session %1$s (%2$s, %3$s) has a transaction open for %4$s s, now %5$s; end it: '
    'select pg_terminate_backend(%1$s)', a.pid, coalesce(a.usename, '?'), coalesce(nullif(a.application_name, ''), '?')
  , coalesce(extract(epoch from clock_timestamp() - a.xact_start)::bigint::text, '?'), coalesce(a.state, 'unknown'))
from pg_stat_activity a
where a.pid <> pg_backend_pid() and a.datname = current_database()
  and coalesce(a.xact_start, '-infinity') < clock_timestamp() - interval '2 s'
  and exists (select from pg_locks l join pg_class c on c.oid = l.relation
    where l.pid = a.pid and l.granted and c.relnamespace = to_regnamespace('orchestrator'))
union all
select format('prepared transaction %1$L is open; end it: rollback prepared %1$L', p.gid)
from pg_prepared_xacts p where p.database = current_database()
limit 5
"""
MINIMUM_VERSION = 180000


@dataclass(frozen=True)
class Report:
    """What a migration did: the files applied, in order, and the daily partitions made."""

    applied: list[str]
    partitions_created: int


@dataclass(frozen=True)
class _File:
    name: str
    text: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def migrate(
    database_url: str,
    *,
    days_ahead: int | None = None,
    retention: Retention | None = None,
    customer: str | None = None,
) -> Report:
    """Applies what is pending, and then makes partitions up to `days_ahead` days from now, None: as configured.

    A new schema is told of `retention` at once, before anybody could run its maintenance. `customer` is recorded as
    the one whose database this is.

    Raises DatabaseUnavailable when the server cannot be reached, OrchestratorError when the database is newer than
    this program, is another customer's, was migrated with another text of a versioned file, or is too old a server,
    when others did not let go of a table for half a minute, and when its owner may not make temporary tables.
    """
    with _connect(database_url) as connection:
        if connection.info.server_version < MINIMUM_VERSION:
            raise OrchestratorError(
                f"the server is PostgreSQL {connection.info.server_version // 10000}: expected 18 or newer; upgrade it"
            )
        if connection.execute("show transaction_read_only").fetchone() != ("off",):
            raise DatabaseUnavailable(
                "the database takes no writes: it is a standby, or default_transaction_read_only is on"
            )
        give_up = time.monotonic() + _PATIENCE_S
        busy: list[str] = []
        while True:
            began = time.monotonic()
            try:
                applied = _apply_pending(connection, retention, customer, busy)
                break
            except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as error:
                ended = time.monotonic()
                if ended > give_up:
                    raise OrchestratorError(f"nothing was changed: {_holders(connection)}") from error
                time.sleep(ended - began)  # others have waited as long
            except psycopg.OperationalError as error:
                if not connection.closed:
                    raise
                raise InDoubt(
                    f"the database went away, and may have been migrated all the same: {error}; run it again, which "
                    "changes nothing when all is up to date"
                ) from error
        return Report(applied, _make_partitions(connection, days_ahead))


def _apply_pending(
    connection: BlockingConnection, retention: Retention | None, customer: str | None, busy: list[str]
) -> list[str]:
    """`busy` are tables that others did not let go of, the last one first; it is added to when there is another."""
    with connection.transaction():
        connection.execute(_LOCK)
        _apply(connection, _bootstrap())
        pending = _pending(_versioned(), _repeatable(), _recorded(connection))
        if customer is not None:
            require_customer(connection, customer)
        if not pending and _rights_differ(connection):
            pending = _repeatable()[-1:]
        if any(file.name.startswith("schema/") for file in pending):
            _lock_tables(connection, busy)
        connection.execute(_LONG)
        connection.execute("set local check_function_bodies = off")
        for file in pending:
            _apply(connection, file)
            connection.execute(_RECORD, (file.name, file.checksum))
        if pending and retention is not None:
            connection.execute(CONFIGURE, retention)
        if customer is not None:
            record_customer(connection, customer)
        _require_staging(connection)
    return [file.name for file in pending]


def _lock_tables(connection: BlockingConnection, busy: list[str]) -> None:
    tables = [str(row[0]) for row in connection.execute(_TABLES)]
    connection.execute(_LONG)
    for table in sorted(tables, key=lambda table: busy.index(table) if table in busy else len(busy)):
        try:
            connection.execute(sql.SQL("lock table {}").format(sql.Identifier("orchestrator", table)))
        except psycopg.errors.LockNotAvailable:
            busy[:] = [table, *(other for other in busy if other != table)]
            raise
        connection.execute(_SHORT)


def _holders(connection: BlockingConnection) -> str:
    holders = [str(row[0]) for row in connection.execute(_HOLDERS)]
    return "; ".join(holders) or "tables are in use by many short transactions; try again when there is less to do"


def _make_partitions(connection: BlockingConnection, days_ahead: int | None) -> int:
    """In a transaction of its own, when no table is locked any more, and after a maintenance that runs just now."""
    for _ in range(_MAINTENANCE_TRIES):
        with connection.transaction():
            row = connection.execute("select orchestrator.run_maintenance(%s)", (days_ahead,)).fetchone()
        if row is not None and "skipped" not in row[0]:
            return int(row[0]["partitions_created"])
        time.sleep(_MAINTENANCE_PAUSE_S)
    return 0


def check(database_url: str, on_connected: OnConnected = lambda _: None) -> list[str]:
    """The files that `migrate` would apply; empty when the database is up to date. Changes nothing.

    ``roles.sql`` is pending, too, when rights are not as it left them. Raises as `migrate`.
    """
    with _connect(database_url) as connection:
        on_connected(connection)
        exists = connection.execute("select to_regclass('orchestrator.migration') is not null").fetchone()
        recorded = _recorded(connection) if exists and exists[0] else {}
        pending = _pending(_versioned(), _repeatable(), recorded)
        if not pending:
            _require_staging(connection)
            if _rights_differ(connection):
                pending = _repeatable()[-1:]
    return [file.name for file in pending]


def _rights_differ(connection: BlockingConnection) -> bool:
    """Whether somebody changed them, or a dump was restored without: only when no function is pending."""
    return bool(connection.execute("select from orchestrator.changed_rights() limit 1").fetchall())


def _require_staging(connection: BlockingConnection) -> None:
    row = connection.execute("select orchestrator.staging_problem()").fetchone()
    if row is not None and row[0] is not None:
        raise OrchestratorError(row[0])


def _connect(database_url: str) -> BlockingConnection:
    try:
        return connect_blocking(database_url, "migrate")
    except psycopg.OperationalError as error:
        raise DatabaseUnavailable(f"the database cannot be reached: {with_remedies(str(error))}") from error


def sql_directory() -> Path:
    """Where the SQL files are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "sql"
    return inside if inside.is_dir() else package.parent / "sql"


def _read(paths: list[Path]) -> list[_File]:
    root = sql_directory()
    return [_File(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def _bootstrap() -> _File:
    return _read([sql_directory() / "schema" / "0000_migration.sql"])[0]


def _versioned() -> list[_File]:
    return _read(sorted((sql_directory() / "schema").glob("*.sql"))[1:])


def _repeatable() -> list[_File]:
    root = sql_directory()
    return _read(
        [
            *sorted((root / "functions").glob("*.sql")),
            *sorted((root / "views").glob("*.sql")),
            root / "roles.sql",
        ]
    )


def _recorded(connection: BlockingConnection) -> dict[str, str]:
    rows = connection.execute("select file, checksum from orchestrator.migration").fetchall()
    return {str(file): str(checksum) for file, checksum in rows}


def _pending(versioned: list[_File], repeatable: list[_File], recorded: dict[str, str]) -> list[_File]:
    known = {file.name for file in versioned}
    newer = sorted(name for name in recorded if name.startswith("schema/") and name not in known)
    if newer:
        raise OrchestratorError(
            f"the database is newer than this program: it has {newer[-1]}; run the newer program's migrate"
        )
    for file in versioned:
        if recorded.get(file.name, file.checksum) != file.checksum:
            raise OrchestratorError(
                f"sql/{file.name} differs from what this database was migrated with; restore it, and add a new file"
            )
    changed = {file.name for file in repeatable if recorded.get(file.name) != file.checksum}
    if changed.isdisjoint(_ALWAYS):  # new functions need the rest of their pins, and their grants
        changed.update(_ALWAYS if changed else ())
    else:  # these add to what functions are made with: all are made anew
        changed.update(file.name for file in repeatable)
    pending = [file for file in versioned if file.name not in recorded]
    return pending + [file for file in repeatable if file.name in changed]


def _apply(connection: BlockingConnection, file: _File) -> None:
    try:
        connection.execute(file.text.encode())
    except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
        raise
    except psycopg.Error as error:
        raise OrchestratorError(f"sql/{file.name}: {error}".strip()) from error
