"""Maintenance: partitions, and that it can run at any time, from anywhere, beside everything else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from psycopg import sql

from tests.sql.conftest import Connect
from tests.support.sql_client import NOON, Client, event, results

TODAY = NOON.date()
PARTITIONS = """
select parent.relname, child.relname, pg_get_expr(child.relpartbound, child.oid)
from pg_inherits i join pg_class parent on parent.oid = i.inhparent join pg_class child on child.oid = i.inhrelid
where parent.relkind = 'p' and parent.relname = any ('{event,outcome}') order by 1, 2
"""

NOTHING = {"partitions_created": 0, "statistics_folded": 0, "destinations_forgotten": 0, "timers_moved": 0}


def expected(first: date, last: date) -> list[tuple[str, str, str]]:
    days = [first + timedelta(days=n) for n in range((last - first).days + 1)]
    return [
        (
            parent,
            f"{parent}_p{day:%Y%m%d}",
            f"FOR VALUES FROM ('{day} 00:00:00+00') TO ('{day + timedelta(days=1)} 00:00:00+00')",
        )
        for parent in ("event", "outcome")
        for day in days
    ]


def partitions(client: Client) -> list[Any]:
    with client.transaction():
        client.rows("set local timezone = 'UTC'")
        client.rows("set local datestyle = 'ISO'")
        return client.rows(PARTITIONS)


@pytest.fixture
def bare(connect: Connect) -> Client:
    """A session on a database that has lost its partitions."""
    client = connect()
    for name in client.column(
        "select inhrelid::regclass::text from pg_inherits i join pg_class c on c.oid = i.inhrelid where c.relkind = 'r'"
    ):
        client.connection.execute(sql.SQL("drop table {}").format(sql.Identifier(*name.split("."))))
    assert partitions(client) == []
    return client


@pytest.mark.parametrize("timezone", ["UTC", "Pacific/Kiritimati", "America/Los_Angeles", "Europe/Berlin"])
@pytest.mark.parametrize("datestyle", ["ISO, MDY", "German", "SQL, DMY"])
def test_partitions_are_utc_days_wherever_the_session_is(bare: Client, timezone: str, datestyle: str) -> None:
    bare.rows("select set_config('timezone', %s, false), set_config('datestyle', %s, false)", timezone, datestyle)
    report = bare.value("select orchestrator.run_maintenance(3, 2)")
    assert report == NOTHING | {"partitions_created": 12}
    assert partitions(bare) == expected(TODAY - timedelta(days=2), TODAY + timedelta(days=3))


@pytest.mark.parametrize("hour", ["00:00:00", "23:59:59.999999"])
def test_the_day_is_that_of_the_clock(bare: Client, hour: str) -> None:
    bare.at(datetime.fromisoformat(f"2032-02-28T{hour}+00:00"))
    bare.rows("select orchestrator.run_maintenance(2, 1)")
    assert partitions(bare) == expected(date(2032, 2, 27), date(2032, 3, 1))


def test_maintenance_by_default_keeps_a_month_ahead_and_a_week_behind(bare: Client) -> None:
    bare.rows("select orchestrator.run_maintenance()")
    assert partitions(bare) == expected(TODAY - timedelta(days=7), TODAY + timedelta(days=30))


def test_maintenance_again_does_nothing_and_a_day_later_makes_that_day(bare: Client) -> None:
    bare.rows("select orchestrator.run_maintenance(5, 0)")
    report = bare.value("select orchestrator.run_maintenance(5, 0)")
    assert report == NOTHING
    bare.at(NOON + timedelta(days=1))
    assert bare.value("select orchestrator.run_maintenance(5, 0)")["partitions_created"] == 2
    assert partitions(bare) == expected(TODAY, TODAY + timedelta(days=6))


def test_partitions_carry_the_indexes_and_comments_of_their_parents(client: Client) -> None:
    rows = client.rows(
        """select parent.relname, count(*) from pg_inherits i join pg_class parent on parent.oid = i.inhparent
        where parent.relkind = 'I' group by 1 order by 1"""
    )
    assert dict(rows) == {"event_external_job_id": 38, "event_pkey": 38, "outcome_event_id": 38}
    assert client.value("select count(*) from pg_index where not indisvalid") == 0


def test_events_of_the_last_and_the_first_moment_of_a_day_are_in_its_partition(client: Client) -> None:
    midnight = NOON.replace(hour=0)
    moments = [
        midnight - timedelta(microseconds=1),
        midnight,
        midnight + timedelta(days=1, microseconds=-1),
        midnight + timedelta(days=1),
    ]
    client.submit(*[event(scheduled_at=moment) for moment in moments])
    assert client.rows(
        "select e.scheduled_at, relname from orchestrator.event e join pg_class c on c.oid = e.tableoid order by 1"
    ) == [(moment, f"event_p{moment.astimezone(UTC):%Y%m%d}") for moment in moments]


def test_a_second_maintenance_at_the_same_time_is_skipped_without_waiting(connect: Connect) -> None:
    first, second = connect(), connect()
    first.rows("begin")
    first.rows("select orchestrator.run_maintenance(40)")
    second.rows("set lock_timeout = '1 ms'")
    assert list(second.value("select orchestrator.run_maintenance(40)")) == ["skipped"]
    first.rows("commit")
    assert second.value("select orchestrator.run_maintenance(40)")["partitions_created"] == 0


def test_many_maintenances_at_once_make_each_partition_once(
    bare: Client, connect: Connect, threads: ThreadPoolExecutor
) -> None:
    sessions = [connect() for _ in range(6)]
    reports = list(threads.map(lambda session: session.value("select orchestrator.run_maintenance(10, 0)"), sessions))
    assert [report["partitions_created"] for report in reports if report.get("partitions_created")] == [22]
    assert partitions(bare) == expected(TODAY, TODAY + timedelta(days=10))


def test_maintenance_does_not_wait_for_submits_and_claims_nor_they_for_it(connect: Connect) -> None:
    maintainer, submitter, claimer, reader = (connect() for _ in range(4))
    ids = claimer.schedule_many(2)
    claimer.rows("begin")
    leases = claimer.claim(1)
    submitter.rows("begin")
    submitter.submit(event(external_job_id="before"))
    reader.rows("begin")
    assert reader.status(ids[0])

    maintainer.rows("set lock_timeout = '1 s'")
    maintainer.rows("begin")
    assert maintainer.value("select orchestrator.run_maintenance(60)")["partitions_created"] == 60

    for session in (submitter, claimer, reader):
        session.rows("set lock_timeout = '1 s'")
    submitter.submit(event(external_job_id="during"))
    submitter.rows("commit")
    assert len(claimer.claim(1)) == 1
    assert claimer.finish(results(leases)) == []
    claimer.rows("commit")
    assert reader.value("select orchestrator.statistics()")["totals"]["accepted"] == 4
    maintainer.rows("commit")
    [answer] = submitter.submit(event(scheduled_at=NOON + timedelta(days=59)))
    assert answer.result == "accepted"


def test_a_day_that_got_its_partition_takes_the_events_refused_before(client: Client) -> None:
    far = event(scheduled_at=NOON + timedelta(days=31), external_job_id="j")
    assert [answer.result for answer in client.submit(far)] == ["refused"]
    client.rows("select orchestrator.create_partitions(%s, %s)", TODAY + timedelta(days=31), TODAY + timedelta(days=31))
    assert [answer.result for answer in client.submit(far)] == ["accepted"]


def test_folding_beside_new_statistics_loses_none(connect: Connect) -> None:
    folder, other = connect(), connect()
    for n in range(4):
        other.submit(event(external_job_id=str(n)))
    folder.rows("begin")
    assert folder.value("select orchestrator.run_maintenance()")["statistics_folded"] == 4
    other.submit(event(external_job_id="during"))
    assert other.totals() == {"accepted": 5}
    folder.rows("commit")
    assert other.totals() == {"accepted": 5}


def test_maintenance_that_is_rolled_back_leaves_nothing(bare: Client) -> None:
    bare.rows("begin")
    bare.rows("select orchestrator.run_maintenance()")
    bare.rows("rollback")
    assert partitions(bare) == []
    [answer] = bare.submit(event())
    assert (answer.result, answer.field) == ("refused", "scheduled_at")


def test_dropping_a_day_takes_its_events_and_outcomes_and_leaves_the_others(client: Client) -> None:
    """What retention will do: whole partitions go, and nothing trips over what is gone."""
    old = client.schedule(scheduled_at=NOON - timedelta(days=3), external_job_id="j")
    client.finish(results(client.claim()))
    new = client.schedule(external_job_id="j")
    day = TODAY - timedelta(days=3)
    for parent in ("event", "outcome"):
        client.connection.execute(
            sql.SQL("drop table {}").format(sql.Identifier("orchestrator", f"{parent}_p{day:%Y%m%d}"))
        )
    assert client.get(old) is None
    assert client.cancel(old) == []
    assert [row["id"] for row in client.column("select orchestrator.events_by_external_id('j')")] == [new]
