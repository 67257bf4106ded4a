"""Calls of the SQL functions that end, move and keep events, for tests."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any, NamedTuple

from psycopg import sql

from tests.support.sql_client import Client

TELLS = ("run", "took_ms", "more", "problems")


def maintain(client: Client, problems: list[Any] | None = None) -> dict[str, int]:
    """Runs maintenance until there is nothing more to do at once; what it did in all, without the zeros.

    `problems`, by default none, must be those of each run.
    """
    did: Counter[str] = Counter()
    for _ in range(200):
        report = client.value("select orchestrator.run_maintenance()")
        assert report["problems"] == (problems or [])
        did.update({name: count for name, count in report.items() if name not in TELLS and count})
        if not report["more"]:
            return dict(did)
    raise AssertionError(f"maintenance comes to no end: {report}")


class Rescheduled(NamedTuple):
    event_id: str
    result: str
    status: str | None
    successor: str | None
    field: str | None
    reason: str | None


def reschedule(
    client: Client, event_id: str, scheduled_at: datetime | None, expires_at: datetime | None = None
) -> list[Rescheduled]:
    return _rescheduled(
        client.rows(
            "select * from orchestrator.reschedule_event(%s::uuid, %s, null, %s)", event_id, scheduled_at, expires_at
        )
    )


def reschedule_external(client: Client, external_job_id: str, scheduled_at: datetime | None) -> list[Rescheduled]:
    return _rescheduled(
        client.rows("select * from orchestrator.reschedule_event(null, %s, %s)", scheduled_at, external_job_id)
    )


def _rescheduled(rows: list[Any]) -> list[Rescheduled]:
    return [
        Rescheduled(str(uid), result, status, str(successor) if successor else None, *rest)
        for uid, result, status, successor, *rest in rows
    ]


def moved(client: Client, event_id: str, scheduled_at: datetime, expires_at: datetime | None = None) -> str:
    """Reschedules an event, which must be possible; the id of its successor."""
    [answer] = reschedule(client, event_id, scheduled_at, expires_at)
    assert answer.result == "rescheduled", answer
    assert answer.successor is not None
    return answer.successor


def waiting(client: Client) -> list[str]:
    """Ids of what is in the horizon, the earliest first."""
    return [str(uid) for uid in client.column("select id from orchestrator.horizon order by id")]


def partition_name(parent: str, day: datetime) -> str:
    return f"{parent}_p{day:%Y%m%d}"


def attached(client: Client, parent: str = "event") -> set[str]:
    """Names of the partitions of a table."""
    return set(
        client.column(
            """select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
            where i.inhparent = ('orchestrator.' || %s)::regclass""",
            parent,
        )
    )


def detach(client: Client, parent: str, day: datetime) -> None:
    client.connection.execute(
        sql.SQL("alter table {} detach partition {}").format(
            sql.Identifier("orchestrator", parent), sql.Identifier("orchestrator", partition_name(parent, day))
        )
    )


def drop(client: Client, parent: str, day: datetime) -> None:
    client.connection.execute(
        sql.SQL("drop table {}").format(sql.Identifier("orchestrator", partition_name(parent, day)))
    )


def exists(client: Client, name: str) -> bool:
    found: bool = client.value("select to_regclass('orchestrator.' || %s) is not null", name)
    return found
