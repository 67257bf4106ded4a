"""Connections to PostgreSQL, and this product's errors in place of psycopg's."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, LiteralString, Self

import psycopg
from psycopg import AsyncConnection, AsyncCursor, AsyncTransaction, Cursor, IsolationLevel, Transaction, errors
from psycopg.abc import Params, QueryNoTemplate
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow
from psycopg.types.string import TextLoader
from psycopg_pool import PoolTimeout

from orchestrator.database.session import MARK, SESSION, Session
from orchestrator.errors import (
    Blocked,
    DatabaseUnavailable,
    NotPermitted,
    OrchestratorError,
    UnusableDatabase,
    ValidationError,
    first_line,
)
from orchestrator.settings import Settings

HOLDERS: LiteralString = "select coalesce(orchestrator.holders_text(), 'it has ended by now')"
"""Names the sessions whose open transactions may hold a call up."""

_AWAY = (psycopg.OperationalError, psycopg.InterfaceError)
_ENDED = {"57P01", "57P02", "57P03", "57P05", "08000", "08003", "08006"}
_NOT_MIGRATED = (
    errors.UndefinedFunction,
    errors.UndefinedTable,
    errors.InvalidSchemaName,
    errors.UndefinedColumn,
)


@contextmanager
def translated() -> Iterator[None]:
    """Raises this product's errors in place of psycopg's."""
    try:
        yield
    except errors.LockNotAvailable as error:
        raise Blocked(f"another session's open transaction holds what is needed: {first_line(error)}") from error
    except errors.QueryCanceled as error:  # see pass_on_cancel() in SQL: a lock timeout may call itself that
        raise Blocked(f"the call waited too long for another session, or was cancelled: {first_line(error)}") from error
    except errors.ReadOnlySqlTransaction as error:
        raise DatabaseUnavailable(f"the database takes no writes: {first_line(error)}") from error
    except _AWAY as error:
        raise DatabaseUnavailable(f"the database is away: {with_remedies(first_line(error))}") from error
    except _NOT_MIGRATED as error:
        raise OrchestratorError(
            f"the database lacks this program's schema ({first_line(error)}); run: orchestrator migrate"
        ) from error
    except errors.InsufficientPrivilege as error:
        raise NotPermitted(f"{first_line(error)}; {_remedy(error)}") from error
    except (psycopg.DataError, psycopg.IntegrityError) as error:
        raise ValidationError(error.diag.column_name or "value", first_line(error)) from error


def _remedy(error: errors.InsufficientPrivilege) -> str:
    if "create temporary tables" in str(error):
        return "grant temporary on the database to who owns the schema: submissions go through one"
    return "grant the user one of the roles in sql/roles.sql; after a restore without rights, run: orchestrator migrate"


# What libpq says of TLS, and what to do.
_TLS_FAULTS = {
    "certificate verify failed": "give the authority of the server's certificate as sslrootcert in DATABASE_URL; if it "
    "is that one, the certificate has expired: renew it on the server",
    "does not match host name": "name the server in DATABASE_URL as its certificate does",
    "root certificate file": "mount the file that sslrootcert names in DATABASE_URL",
    "server does not support SSL": "turn on ssl in the server's configuration",
}


def with_remedies(text: str) -> str:
    """The text of an error, in which each line that tells of a fault of TLS ends with what to do."""
    return "\n".join(line + _tls_remedy(line) for line in text.strip().splitlines())


def _tls_remedy(line: str) -> str:
    return next((f"; {remedy}" for fault, remedy in _TLS_FAULTS.items() if fault in line), "")


def is_lost(error: OrchestratorError) -> bool:
    """Whether the connection ended without an answer, so that what was sent over it may have been done."""
    cause = error.__cause__
    if not isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError) or isinstance(cause, PoolTimeout):
        return False
    # Errors of the server have a code; those that libpq finds by itself have none.
    return cause.sqlstate is None or cause.sqlstate in _ENDED


def is_worth_another_try(error: OrchestratorError) -> bool:
    """Whether another try may succeed at once, on another connection or in another transaction."""
    cause = error.__cause__
    return is_lost(error) or isinstance(
        cause, (errors.ReadOnlySqlTransaction, errors.DeadlockDetected, errors.SerializationFailure)
    )


@contextmanager
def named() -> Iterator[None]:
    """Raises refusals of SQL functions with a field: their text names it before a colon."""
    try:
        yield
    except ValidationError as error:
        if not isinstance(error.__cause__, errors.InvalidParameterValue):
            raise
        field, _, reason = error.reason.partition(": ")
        raise ValidationError(field, reason) from error.__cause__


class Connection(AsyncConnection[TupleRow]):
    """A connection with the settings of `SESSION`; open it with the arguments of `connection_arguments`.

    `pooled`: there is a pooler in between, so that each transaction may get another session of the server. Then no
    setting outlasts a transaction, each transaction begins by making its settings, and a statement outside of any gets
    one of its own.
    """

    session: Session
    pooled = False

    @classmethod
    async def connect(cls, conninfo: str = "", *, session: Session, **arguments: Any) -> Self:  # type: ignore[override]
        """Raises as psycopg does, and UnusableDatabase for a database that cannot keep every text."""
        try:
            connection = await super().connect(conninfo, **{**arguments, **_options(conninfo, session)})
        except psycopg.OperationalError as error:
            if not _refuses_options(error):
                raise
            _without_options.add(conninfo)
            connection = await super().connect(conninfo, **{**arguments, **_options(conninfo, session)})
        try:
            _require_utf8(connection.info)
        except UnusableDatabase:
            await connection.close()
            raise
        connection.session = session
        connection.pooled = _is_pooled(connection.info)
        if connection.pooled:
            connection.prepare_threshold = None
            await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
            await connection.set_deferrable(False)
        return connection

    async def execute(self, query: QueryNoTemplate, params: Params | None = None, **how: Any) -> AsyncCursor[TupleRow]:  # type: ignore[override]
        if not self.pooled or self.info.transaction_status != TransactionStatus.IDLE:
            return await super().execute(query, params, **how)
        async with self.transaction():
            return await super().execute(query, params, **how)

    @asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncGenerator[AsyncTransaction, None]:
        begins = self.pooled and self.info.transaction_status == TransactionStatus.IDLE
        with _kept_together():
            async with super().transaction(savepoint_name, force_rollback) as transaction:
                if begins:
                    await super().execute(self.session.for_transaction.encode())
                yield transaction


class BlockingConnection(psycopg.Connection[TupleRow]):
    """`Connection` for code outside an event loop."""

    session: Session
    pooled = False

    @classmethod
    def connect(cls, conninfo: str = "", *, session: Session, **arguments: Any) -> Self:  # type: ignore[override]
        """Raises as `Connection.connect` does."""
        try:
            connection = super().connect(conninfo, **{**arguments, **_options(conninfo, session)})
        except psycopg.OperationalError as error:
            if not _refuses_options(error):
                raise
            _without_options.add(conninfo)
            connection = super().connect(conninfo, **{**arguments, **_options(conninfo, session)})
        try:
            _require_utf8(connection.info)
        except UnusableDatabase:
            connection.close()
            raise
        connection.session = session
        connection.pooled = _is_pooled(connection.info)
        if connection.pooled:
            connection.prepare_threshold = None
            connection.isolation_level = IsolationLevel.READ_COMMITTED
            connection.deferrable = False
        return connection

    def execute(self, query: QueryNoTemplate, params: Params | None = None, **how: Any) -> Cursor[TupleRow]:  # type: ignore[override]
        if not self.pooled or self.info.transaction_status != TransactionStatus.IDLE:
            return super().execute(query, params, **how)
        with self.transaction():
            return super().execute(query, params, **how)

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Generator[Transaction, None, None]:
        begins = self.pooled and self.info.transaction_status == TransactionStatus.IDLE
        with _kept_together(), super().transaction(savepoint_name, force_rollback) as transaction:
            if begins:
                super().execute(self.session.for_transaction.encode())
            yield transaction


_without_options: set[str] = set()  # addresses of poolers that refuse start-up options


def _options(conninfo: str, session: Session) -> dict[str, str]:
    # Empty rather than absent: otherwise libpq would take options from its environment or the address.
    return {"options": "" if conninfo in _without_options else session.options}


def _refuses_options(error: psycopg.OperationalError) -> bool:
    """Whether a pooler takes no start-up options, or an old server does not know all of them."""
    unknown = re.search(r'unrecognized configuration parameter "(\w+)"', str(error))
    return "unsupported startup parameter" in str(error) or (unknown is not None and unknown[1].lower() in SESSION)


@contextmanager
def _kept_together() -> Iterator[None]:
    """Raises UnusableDatabase when a pooler allows no transactions."""
    try:
        yield
    except psycopg.OperationalError as error:
        if "statement pooling mode" not in str(error):
            raise
        raise UnusableDatabase(
            f"a pooler is between that allows no transactions ({first_line(error)}): expected transaction or session "
            "mode; set pool_mode = transaction for this database, or name the server itself in DATABASE_URL"
        ) from error


def _is_pooled(info: psycopg.ConnectionInfo) -> bool:
    name, value = MARK
    return info.parameter_status(name) != value


def _require_utf8(info: psycopg.ConnectionInfo) -> None:
    encoding = info.parameter_status("server_encoding")
    if encoding not in (None, "UTF8"):
        raise UnusableDatabase(
            f"database {info.dbname} has the encoding {encoding}: expected UTF8, which holds every text; make one: "
            "create database … encoding 'UTF8' locale 'C.UTF-8' template template0; name it in DATABASE_URL, and "
            "bring over what this one holds with pg_dump and pg_restore"
        )


def connection_arguments(url: str, role: str, **settings: str) -> dict[str, Any]:
    """The arguments of every connection; `role` shows in pg_stat_activity.

    `settings` are the session's settings that differ from `SESSION`.
    """
    session = Session.of(url, role, **settings)
    return {"autocommit": True, "session": session, **session.parameters}


async def connect(settings: Settings, role: str, **differing: str) -> Connection:
    """A connection outside any pool, see `connection_arguments`. Raises DatabaseUnavailable and UnusableDatabase."""
    url = settings.database_url
    with translated():
        connection = await Connection.connect(url, **connection_arguments(url, role, **differing))
    keep_text(connection)
    return connection


def connect_blocking(url: str, role: str, **differing: str) -> BlockingConnection:
    """As `connect`, for code outside an event loop; raises what psycopg raises, and UnusableDatabase."""
    return BlockingConnection.connect(url, **connection_arguments(url, role, **differing))


def keep_text(connection: Connection) -> None:
    """Loads these types as the text that the server sends: this program does not compute with them."""
    for name in ("uuid", "json", "timestamptz"):
        connection.adapters.register_loader(name, TextLoader)
