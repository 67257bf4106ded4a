"""Brings a database up to this program's schema.

``sql/schema`` holds versioned files, applied once, in order; ``sql/functions``, ``sql/views`` and ``sql/roles.sql``
are repeatable, applied again when their text has changed. All of it happens in one transaction under an
advisory lock, so any number of replicas may migrate at once and a crash leaves nothing half done.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg.rows import TupleRow

from orchestrator.errors import DatabaseUnavailable, OrchestratorError

_LOCK = "select pg_advisory_xact_lock(hashtext('orchestrator.migrate'))"
_RECORD = """
insert into orchestrator.migration (file, checksum) values (%s, %s)
on conflict (file) do update set checksum = excluded.checksum, applied_at = clock_timestamp()
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


def migrate(database_url: str, *, days_ahead: int = 30) -> Report:
    """Applies what is pending and makes partitions up to `days_ahead` days from now.

    Raises DatabaseUnavailable when the server cannot be reached, OrchestratorError when the database is
    newer than this program, was migrated with another text of a versioned file, or is too old a server.
    """
    with _connect(database_url) as connection:
        if connection.info.server_version < MINIMUM_VERSION:
            raise OrchestratorError(
                f"the server is PostgreSQL {connection.info.server_version // 10000}: expected 18 or newer; upgrade it"
            )
        with connection.transaction():
            connection.execute(_LOCK)
            _apply(connection, _bootstrap())
            pending = _pending(_versioned(), _repeatable(), _recorded(connection))
            connection.execute("set local check_function_bodies = off")
            for file in pending:
                _apply(connection, file)
                connection.execute(_RECORD, (file.name, file.checksum))
            row = connection.execute(
                "select (orchestrator.run_maintenance(%s) ->> 'partitions_created')::integer", (days_ahead,)
            ).fetchone()
    return Report([file.name for file in pending], row[0] or 0 if row else 0)


def check(database_url: str) -> list[str]:
    """The files that `migrate` would apply; empty when the database is up to date. Changes nothing."""
    with _connect(database_url) as connection:
        exists = connection.execute("select to_regclass('orchestrator.migration') is not null").fetchone()
        recorded = _recorded(connection) if exists and exists[0] else {}
    return [file.name for file in _pending(_versioned(), _repeatable(), recorded)]


def _connect(database_url: str) -> psycopg.Connection[TupleRow]:
    try:
        return psycopg.connect(
            database_url,
            autocommit=True,
            connect_timeout=10,
            application_name="orchestrator migrate",
            options="-c client_min_messages=warning -c timezone=UTC",
        )
    except psycopg.OperationalError as error:
        raise DatabaseUnavailable(f"the database cannot be reached: {error}".strip()) from error


def sql_directory() -> Path:
    """Where the SQL files are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
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


def _recorded(connection: psycopg.Connection[TupleRow]) -> dict[str, str]:
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
    changed = [file for file in repeatable if recorded.get(file.name) != file.checksum]
    if changed and changed[-1].name != "roles.sql":
        changed.append(repeatable[-1])  # new functions need their grants
    return [file for file in versioned if file.name not in recorded] + changed


def _apply(connection: psycopg.Connection[TupleRow], file: _File) -> None:
    try:
        connection.execute(file.text.encode())
    except psycopg.Error as error:
        raise OrchestratorError(f"sql/{file.name}: {error}".strip()) from error
