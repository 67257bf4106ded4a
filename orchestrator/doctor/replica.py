"""Check of the read replica."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psycopg

from orchestrator.database.connection import BlockingConnection, connect_blocking
from orchestrator.database.read_replica import POSITION, Position, misfit
from orchestrator.doctor.finding import Finding, ok, problem, warning
from orchestrator.errors import UnusableDatabase, first_line
from orchestrator.settings import Settings, database_url

_PATIENCE_S = 3.0
_PAUSE_S = 0.1


def replica_findings(primary: BlockingConnection, settings: Settings) -> Iterator[Finding]:
    """Whether the replica of DATABASE_READ_URL follows the database of `primary`, and how closely."""
    url = settings.database_read_url
    if url is None:
        return
    masked = database_url.masked(url)
    try:
        replica = connect_blocking(url, "doctor", statement_timeout="15s")
    except (psycopg.OperationalError, UnusableDatabase) as error:
        yield problem(
            "read replica", f"cannot reach {masked}: {first_line(error)}", "start it, or correct DATABASE_READ_URL"
        )
        return
    with replica:
        began_s = time.monotonic()
        first = _position(replica)
        wanted = _position(primary)
        fault = misfit(wanted, first)
        if fault is not None:
            yield problem("read replica", f"{masked}: {fault}", "correct DATABASE_READ_URL, or build the replica again")
            return
        while (behind := (wanted.position or 0) - (_position(replica).position or 0)) > 0:
            if time.monotonic() > began_s + _PATIENCE_S:
                yield warning(
                    "read replica",
                    f"{masked} is behind, by {behind:,} bytes of the write-ahead log after {_PATIENCE_S:g} s",
                    "see pg_stat_wal_receiver there and pg_stat_replication on the primary, which answers meanwhile",
                )
                return
            time.sleep(_PAUSE_S)
        yield ok("read replica", f"{masked} caught up within {time.monotonic() - began_s:.1f} s")


def _position(connection: BlockingConnection) -> Position:
    row = connection.execute(POSITION).fetchone()
    assert row is not None
    return Position(*row)
