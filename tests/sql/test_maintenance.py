"""Maintenance: partitions, and that it can run at any time, from anywhere, beside everything else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.sql.conftest import Connect
from tests.support.sql_client import NOON, Client, event, results
from tests.support.upkeep import detach, drop, maintain

TODAY = NOON.date()
PARTITIONS = """
select parent.relname, child.relname, pg_get_expr(child.relpartbound, child.oid)
from pg_inherits i join pg_class parent on parent.oid = i.inhparent join pg_class child on child.oid = i.inhrelid
where parent.relkind = 'p' and parent.relname = any ('{event,outcome,delivered_batch}') order by 1, 2
"""

NOTHING = {
    "restore_settled": 0, "statistics_folded": 0, "events_expired": 0, "orderings_advanced": 0,
    "destinations_forgotten": 0, "timers_moved": 0, "floors_lowered": 0, "partitions_dropped": 0, "horizon_moved": 0,
    "runs_forgotten": 0, "requests_forgotten": 0, "partitions_attached": 0, "partitions_created": 0,
    "partitions_detached": 0, "dead_letters_dropped": 0,
}  # fmt: skip


def did(report: dict[str, Any]) -> dict[str, int]:
    """What a maintenance did, which must have met with no problem."""
    assert report["problems"] == []
    return {name: count for name, count in report.items() if name in NOTHING and count}


def expected(first: date, last: date) -> list[tuple[str, str, str]]:
    days = [first + timedelta(days=n) for n in range((last - first).days + 1)]
    return [
        (
            parent,
            f"{parent}_p{day:%Y%m%d}",
            f"FOR VALUES FROM ('{day} 00:00:00+00') TO ('{day + timedelta(days=1)} 00:00:00+00')",
        )
        for parent in ("delivered_batch", "event", "outcome")
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
    assert did(report) == {"partitions_created": 18}
    assert report["more"] is True
    assert partitions(bare) == expected(TODAY - timedelta(days=2), TODAY + timedelta(days=3))


@pytest.mark.parametrize("hour", ["00:00:00", "23:59:59.999999"])
def test_the_day_of_maintenance_is_that_of_the_clock(bare: Client, hour: str) -> None:
    bare.at(datetime.fromisoformat(f"2032-02-28T{hour}+00:00"))
    bare.rows("select orchestrator.run_maintenance(2, 1)")
    assert partitions(bare) == expected(date(2032, 2, 27), date(2032, 3, 1))


def test_maintenance_by_default_keeps_a_month_ahead_and_a_week_behind(bare: Client) -> None:
    bare.rows("select orchestrator.run_maintenance()")
    assert partitions(bare) == expected(TODAY - timedelta(days=7), TODAY + timedelta(days=30))


def test_maintenance_again_does_nothing_and_a_day_later_makes_that_day(bare: Client) -> None:
    bare.rows("delete from orchestrator.maintenance_run")  # of the real clock, which may be before or after NOON
    bare.rows("select orchestrator.run_maintenance(5, 1)")
    report = bare.value("select orchestrator.run_maintenance()")
    assert (did(report), report["more"]) == ({}, False)
    assert set(report) == set(NOTHING) | {"run", "took_ms", "more", "problems"}
    bare.at(NOON + timedelta(days=1))
    assert did(bare.value("select orchestrator.run_maintenance()")) == {"partitions_created": 3}
    assert did(bare.value("select orchestrator.run_maintenance()")) == {"partitions_detached": 3}
    assert did(bare.value("select orchestrator.run_maintenance()")) == {}
    assert partitions(bare) == expected(TODAY, TODAY + timedelta(days=6))


def test_partitions_carry_the_indexes_and_comments_of_their_parents(client: Client) -> None:
    rows = client.rows(
        """select parent.relname, count(*) from pg_inherits i join pg_class parent on parent.oid = i.inhparent
        where parent.relkind = 'I' group by 1 order by 1"""
    )
    assert dict(rows) == dict.fromkeys(
        ("delivered_batch_ids", "event_external_job_id", "event_pkey", "outcome_event_id"), 38
    )
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
    reports = list(threads.map(lambda session: session.value("select orchestrator.run_maintenance(10, 1)"), sessions))
    assert [report["partitions_created"] for report in reports if report.get("partitions_created")] == [36]
    assert partitions(bare) == expected(TODAY - timedelta(days=1), TODAY + timedelta(days=10))


def test_maintenance_and_submits_and_claims_do_not_wait_for_each_other(connect: Connect) -> None:
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
    assert maintainer.value("select orchestrator.run_maintenance(60)")["partitions_created"] == 90

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


def test_folding_beside_new_statistics_loses_no_count(connect: Connect) -> None:
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
    runs = bare.value("select count(*) from orchestrator.maintenance_run")
    bare.rows("begin")
    bare.rows("select orchestrator.run_maintenance()")
    bare.rows("rollback")
    assert partitions(bare) == []
    assert bare.value("select count(*) from orchestrator.maintenance_run") == runs


def test_dropping_a_day_takes_its_events_and_outcomes_and_leaves_other_days(client: Client) -> None:
    """What retention does: whole partitions go, and nothing trips over what is gone."""
    old = client.schedule(scheduled_at=NOON - timedelta(days=3), external_job_id="j")
    client.finish(results(client.claim()))
    new = client.schedule(external_job_id="j")
    day = TODAY - timedelta(days=3)
    for parent in ("event", "outcome", "delivered_batch"):
        client.connection.execute(
            sql.SQL("drop table {}").format(sql.Identifier("orchestrator", f"{parent}_p{day:%Y%m%d}"))
        )
    assert client.get(old) is None
    assert client.cancel(old) == []
    assert [row["id"] for row in client.column("select orchestrator.events_by_external_id('j')")] == [new]


# Killed, failing, and recorded


def expiring(client: Client, connect: Connect) -> None:
    client.schedule(expires_at=(NOON + timedelta(seconds=1)).isoformat())


def waiting_behind(client: Client, connect: Connect) -> None:
    client.schedule_many(2, ordering_key="k")
    client.claim_on()
    client.rows("delete from orchestrator.timer where lane >= 0")


def rerouted(client: Client, connect: Connect) -> None:
    client.rows("select orchestrator.configure_destination('receiver.example')")


def hidden(client: Client, connect: Connect) -> None:
    client.schedule()
    client.rows("update orchestrator.control set floors = array_fill('2100-01-01'::timestamptz, array[64])")


def retired(client: Client, connect: Connect) -> None:
    client.rows("select orchestrator.configure_retention(1)")
    for _ in range(2):
        client.at(NOON - timedelta(hours=2)).rows("select orchestrator.run_maintenance()")


def detached(client: Client, connect: Connect) -> None:
    detach(client, "event", NOON)


def lacking(client: Client, connect: Connect) -> None:
    drop(client, "event", NOON + timedelta(days=3))


def nothing(client: Client, connect: Connect) -> None:
    client.schedule(scheduled_at=NOON + timedelta(days=50))


ORDERINGS = """select pg_advisory_xact_lock(hashtext('orchestrator.ordering')
, orchestrator.ordering_lock_number(t.ordering))
from orchestrator.timer t where t.lane < 0"""
RETIRED = """do $$ begin execute format('lock table orchestrator.%I in access share mode',
(select min(name) from orchestrator.retired_partition)); end $$"""
HORIZON = "select pg_advisory_xact_lock_shared(hashtext('orchestrator.horizon'))"


@pytest.mark.parametrize(
    ("step", "prepare", "hold"),
    [
        ("statistics_folded", nothing, "lock table orchestrator.statistic_label in share mode"),
        ("events_expired", expiring, "lock table orchestrator.outcome in share mode"),
        ("orderings_advanced", waiting_behind, ORDERINGS),
        ("destinations_forgotten", nothing, "lock table orchestrator.destination in access exclusive mode"),
        ("timers_moved", rerouted, "select 1 from orchestrator.control for update"),
        ("floors_lowered", hidden, "select pg_advisory_xact_lock(hashtext('orchestrator.floors'))"),
        ("partitions_dropped", retired, RETIRED),
        ("horizon_moved", nothing, "lock table orchestrator.horizon in share mode"),
        ("runs_forgotten", nothing, "lock table orchestrator.maintenance_run in share mode"),
        ("partitions_attached", detached, HORIZON),
        ("partitions_created", lacking, HORIZON),
    ],
)
def test_maintenance_that_is_killed_in_a_step_leaves_nothing_behind_and_can_run_again(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor, step: str, prepare: Any, hold: Any
) -> None:
    client, holder, maintainer = connect(), connect(), connect()
    prepare(client, connect)
    for session in (client, maintainer):
        session.at(NOON + timedelta(seconds=2))
    kept = """select (select count(*) from orchestrator.maintenance_run), (select count(*) from orchestrator.timer)
    , (select count(*) from orchestrator.horizon), (select count(*) from orchestrator.retired_partition)
    , (select count(*) from pg_inherits), (select sum(value) from orchestrator.statistic)"""
    before = client.rows(kept)
    holder.rows("begin")
    holder.rows(hold)
    running = threads.submit(maintainer.value, "select orchestrator.run_maintenance()")
    observer.wait_until_blocked(maintainer)
    assert observer.value("select pg_terminate_backend(%s, 10000)", maintainer.pid)
    with pytest.raises(psycopg.OperationalError):
        running.result(10)
    holder.rows("rollback")
    assert client.rows(kept) == before
    report = client.value("select orchestrator.run_maintenance()")
    assert report["problems"] == []
    if prepare not in (nothing, rerouted):
        assert report[step] > 0
    maintain(client)
    assert maintain(client) in ({}, {"orderings_advanced": 1})


def test_a_failing_step_is_reported_and_the_other_steps_are_done(client: Client) -> None:
    client.schedule()
    lacking(client, lambda: client)
    client.rows(
        """create function public.refuse() returns trigger language plpgsql
        as $$ begin raise exception 'no more room'; end $$"""
    )
    client.rows(
        """create trigger refuse before insert on orchestrator.statistic_folded
        for each row execute function public.refuse()"""
    )
    report = client.value("select orchestrator.run_maintenance()")
    assert report["problems"] == [{"step": "statistics_folded", "problem": "no more room"}]
    assert (report["statistics_folded"], report["partitions_created"]) == (0, 1)
    assert client.totals() == {"accepted": 1}
    [problems] = client.column("select problems from orchestrator.maintenance_run where run = %s", report["run"])
    assert problems == report["problems"]
    client.rows("drop trigger refuse on orchestrator.statistic_folded")
    assert did(client.value("select orchestrator.run_maintenance()")) == {"statistics_folded": 1}
    assert client.totals() == {"accepted": 1}


def test_a_step_that_waits_for_a_lock_gives_up_and_leaves_other_steps_time(connect: Connect) -> None:
    client, holder = connect(), connect()
    lacking(client, connect)
    holder.rows("begin")
    holder.rows("lock table orchestrator.destination in access exclusive mode")
    report = client.value("select orchestrator.run_maintenance()")
    assert "destinations_forgotten" in {problem["step"] for problem in report["problems"]}
    assert all("lock timeout" in problem["problem"] for problem in report["problems"])
    assert report["partitions_created"] == 1


def test_each_run_of_maintenance_leaves_a_row(client: Client) -> None:
    client.rows("delete from orchestrator.maintenance_run")
    client.schedule()
    report = client.value("select orchestrator.run_maintenance()")
    [(run, started_at, took, done, problems)] = client.rows(
        "select run, started_at, took, did, problems from orchestrator.maintenance_run"
    )
    assert (run, started_at, problems) == (report["run"], NOON, [])
    assert timedelta(0) < took <= timedelta(milliseconds=report["took_ms"] + 1)
    assert done == {name: report[name] for name in NOTHING if name in report}
    client.at(NOON + timedelta(days=6)).rows("select orchestrator.run_maintenance()")
    assert client.value("select count(*) from orchestrator.maintenance_run") == 2
    client.at(NOON + timedelta(days=7, seconds=1))
    assert client.value("select orchestrator.run_maintenance()")["runs_forgotten"] == 1


def test_maintenance_does_bounded_work_and_says_when_to_call_again(client: Client) -> None:
    client.rows("select orchestrator.configure_retention(1)")
    client.at(NOON + timedelta(days=3))
    reports = [client.value("select orchestrator.run_maintenance()") for _ in range(12)]
    assert [report["more"] for report in reports] == [True] * 10 + [False] * 2
    assert [report["partitions_created"] for report in reports] == [9] + [0] * 11
    assert [report["partitions_detached"] for report in reports] == [0] + [3] * 9 + [0] * 2


def test_maintenance_refuses_a_snapshot_and_names_the_remedy(client: Client) -> None:
    client.rows("set default_transaction_isolation = serializable")
    with pytest.raises(
        psycopg.errors.InvalidTransactionState, match="expected the isolation level read committed"
    ) as told:
        client.rows("select orchestrator.run_maintenance()")
    assert "set default_transaction_isolation = 'read committed'" in str(told.value.diag.message_hint)
