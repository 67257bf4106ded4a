"""Whose database this is: `migrate` records the customer, and a process of another one does not start."""

from __future__ import annotations

from typing import LiteralString

import psycopg

from orchestrator.database.blocking import OnConnected
from orchestrator.database.connection import BlockingConnection, Connection, connect_blocking, translated
from orchestrator.errors import OrchestratorError

_IS_MIGRATED: LiteralString = "select to_regproc('orchestrator.customer') is not null"
_CUSTOMER: LiteralString = "select orchestrator.customer()"


def customer_of(connection: BlockingConnection) -> str | None:
    """The customer on record; None also before the database is migrated."""
    if connection.execute(_IS_MIGRATED).fetchone() != (True,):
        return None
    row = connection.execute(_CUSTOMER).fetchone()
    return None if row is None else row[0]


async def require_customer_of_session(connection: Connection, customer: str) -> None:
    """As `require_customer`, in an event loop."""
    if await (await connection.execute(_IS_MIGRATED)).fetchone() == (True,):
        row = await (await connection.execute(_CUSTOMER)).fetchone()
        _require(None if row is None else row[0], customer)


def require_customer(connection: BlockingConnection, customer: str) -> None:
    """Raises OrchestratorError when the database is another customer's."""
    _require(customer_of(connection), customer)


def _require(recorded: str | None, customer: str) -> None:
    if recorded not in (None, customer):
        raise OrchestratorError(
            f"CUSTOMER_NAME: expected {recorded}, whose database this is, got {customer}; correct CUSTOMER_NAME or "
            f"DATABASE_URL. To hand the database over: {handing_over(customer)}"
        )


def handing_over(customer: str) -> str:
    """The statement that makes the database this customer's."""
    quoted = customer.replace("'", "''")
    return f"select orchestrator.set_customer('{quoted}')"


def record_customer(connection: BlockingConnection, customer: str) -> None:
    """Records the customer of a database that has none."""
    if customer_of(connection) is None:
        connection.execute("select orchestrator.set_customer(%s)", (customer,))


def check_customer(database_url: str, customer: str, on_connected: OnConnected) -> None:
    """As `require_customer`, on a connection of its own. Raises DatabaseUnavailable."""
    with translated(), connect_blocking(database_url, "customer") as connection:
        on_connected(connection)
        try:
            require_customer(connection, customer)
        except psycopg.errors.InsufficientPrivilege:
            return  # this login may do nothing here; its calls will say so
