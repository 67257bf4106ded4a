"""Connections, and psycopg's errors as this product's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import AsyncConnection, errors
from psycopg.rows import TupleRow
from psycopg.types.string import TextLoader
from psycopg_pool import PoolTimeout

from orchestrator.config import Settings
from orchestrator.errors import DatabaseUnavailable, OrchestratorError, ValidationError

Connection = AsyncConnection[TupleRow]

_CONNECT_TIMEOUT_S = 5
_AWAY = (psycopg.OperationalError, psycopg.InterfaceError)
_ENDED = {"57P01", "57P02", "57P03", "57P05", "08000", "08003", "08006"}
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


@contextmanager
def translated() -> Iterator[None]:
    """Raises what psycopg raises as this product's errors."""
    try:
        yield
    except errors.ReadOnlySqlTransaction as error:
        raise DatabaseUnavailable(f"the database takes no writes: {_first_line(error)}") from error
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


def is_lost(error: DatabaseUnavailable) -> bool:
    """Whether the connection ended, so that what was sent over it may have been done: nothing answered."""
    cause = error.__cause__
    if not isinstance(cause, psycopg.Error) or isinstance(cause, PoolTimeout):
        return False
    # Connections that the server ends say so; what libpq finds by itself has no code.
    return cause.sqlstate is None or cause.sqlstate in _ENDED


def is_worth_another_try(error: DatabaseUnavailable) -> bool:
    """Whether the same may succeed at once: on another connection, or in another transaction."""
    cause = error.__cause__
    return is_lost(error) or isinstance(
        cause, (errors.ReadOnlySqlTransaction, errors.DeadlockDetected, errors.SerializationFailure)
    )


@contextmanager
def named() -> Iterator[None]:
    """Raises the refusals of functions, which say what they refuse before a colon, with that as their field."""
    try:
        yield
    except ValidationError as error:
        if not isinstance(error.__cause__, errors.InvalidParameterValue):
            raise
        field, _, reason = error.reason.partition(": ")
        raise ValidationError(field, reason) from error.__cause__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def connection_arguments(role: str) -> dict[str, Any]:
    """What every connection is opened with; `role` shows in pg_stat_activity."""
    return {
        "autocommit": True, "connect_timeout": _CONNECT_TIMEOUT_S, "application_name": f"orchestrator {role}",
        "options": "-c timezone=UTC -c datestyle=ISO -c extra_float_digits=1", **_KEEPALIVE,
    }  # fmt: skip


async def connect(settings: Settings, role: str) -> Connection:
    """A connection outside any pool. Raises DatabaseUnavailable."""
    with translated():
        connection = await AsyncConnection.connect(settings.database_url, **connection_arguments(role))
    keep_text(connection)
    return connection


def keep_text(connection: Connection) -> None:
    """Loads these types as the text the server sends: nothing here computes with them."""
    for name in ("uuid", "json", "timestamptz"):
        connection.adapters.register_loader(name, TextLoader)
