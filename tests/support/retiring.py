"""Days past retention, with rows that are hard to write down."""

from __future__ import annotations

from datetime import datetime, timedelta

from orchestrator.database.maintenance import upkeep_of
from tests.support.sql_client import NOON, Client, event, results

OLD = NOON - timedelta(days=9)
"""A day that retention of a week has dropped."""
TEXTS = (
    "",
    " ",
    "\\N",
    "NULL",
    'say "hi", he\\she said;\tdone',
    "first\nsecond\r\nthird\rfourth",
    "before\n\\.\nafter",
    "né à Ωmega 🚀 \u2028 \u0001",
    "x" * 70_000,
)


def schedule_old_day(client: Client, *, at: datetime = OLD) -> list[str]:
    """Delivers events of an old day, whose rows hold all of `TEXTS`, empty strings and nulls; returns their ids."""
    client.at(at - timedelta(hours=1))
    client.rows("select orchestrator.create_partitions(%s, %s)", at.date(), at.date())
    ids = [
        client.schedule(scheduled_at=at, external_job_id=f"job {n} é", payload={"text": text}, headers={"X-N": str(n)})
        for n, text in enumerate(TEXTS)
    ]
    client.at(at)
    assert client.finish(results(client.claim())) == []
    for identity, text in zip(ids, TEXTS, strict=True):
        client.rows("update orchestrator.outcome set error = %s where event_id = %s", text, identity)
    client.at(None)
    return ids


def retire(client: Client, *, archive: bool = True) -> list[str]:
    """Detaches what retention does not keep any more; returns the names of the tables."""
    client.at(None).rows("select orchestrator.configure_retention(p_retention_days => 7, p_archive => %s)", archive)
    while (told := upkeep_of(client.value("select orchestrator.run_maintenance()"))).more:
        assert told.problems == []
    names: list[str] = client.column("select name from orchestrator.retired_partition order by 1")
    return names


def undeliverable(client: Client) -> str:
    """Schedules an event of the old day that nobody delivers, so that its day stays; returns its id."""
    client.at(OLD - timedelta(hours=1))
    identity = client.schedule(**event(scheduled_at=OLD, external_job_id="stays"))
    client.at(None)
    return identity
