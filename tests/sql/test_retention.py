"""Retention: whole days go, never one with work left, and nobody waits for it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, event, results, seconds
from tests.support.upkeep import attached, exists, maintain, moved, partition_name

DAY = NOON - timedelta(days=1)
LATER = NOON + timedelta(days=1)  # when retention of a day lets go of DAY
BLOCKED_S = 0.1


@pytest.fixture
def client(client: Client) -> Client:
    """Keeps a day."""
    client.rows("select orchestrator.configure_retention(1, 1)")
    client.keep_three_days()
    return client


def gone(client: Client) -> bool:
    parents = ("event", "outcome", "delivered_batch")
    return not any(partition_name(parent, DAY) in attached(client, parent) for parent in parents)


def test_a_finished_day_is_detached_and_its_table_dropped_an_hour_later(client: Client) -> None:
    uid = client.schedule(scheduled_at=DAY, external_job_id="j")
    client.finish(results(client.claim()))
    maintain(client.at(NOON + timedelta(hours=11, minutes=59)))
    assert client.get(uid)["status"] == "delivered"
    assert maintain(client.at(LATER - timedelta(hours=12)))["partitions_detached"] == 3
    assert gone(client)
    assert client.get(uid) is None
    assert client.cancel(uid) == []
    assert client.column("select orchestrator.events_by_external_id('j')") == []
    assert exists(client, partition_name("event", DAY))
    maintain(client.at(LATER - timedelta(hours=11, seconds=1)))
    assert exists(client, partition_name("event", DAY))
    assert maintain(client.at(LATER - timedelta(hours=11)))["partitions_dropped"] == 3
    assert not exists(client, partition_name("event", DAY))
    assert not exists(client, partition_name("outcome", DAY))
    [answer] = client.submit(event(scheduled_at=DAY, external_job_id="j"))
    assert (answer.result, answer.field) == ("refused", "scheduled_at")
    assert client.totals() == {"accepted": 1, "delivered": 1}


def test_no_day_goes_before_a_retention_is_configured(connect: Connect) -> None:
    """As in a database whose schema was of before there was retention."""
    client = connect().at(NOON + timedelta(days=100))
    client.rows("update orchestrator.control set retention_days = null")
    assert "partitions_detached" not in maintain(client)
    client.rows("select orchestrator.configure_retention(7)")
    assert maintain(client)["partitions_detached"] > 30


@pytest.mark.parametrize("state", ["scheduled", "retrying", "in_flight", "waiting", "redriven"])
def test_a_day_with_a_live_event_stays_whole(client: Client, state: str) -> None:
    done = client.schedule(scheduled_at=DAY)
    client.finish(results(client.claim()))
    uid = client.schedule(scheduled_at=DAY, ordering_key="k")
    if state in ("retrying", "redriven"):
        client.finish(results(client.claim(), "retry" if state == "retrying" else "fail"))
    elif state == "in_flight":
        client.claim(lease_s=3 * 86400)
    elif state == "waiting":
        client.cancel(uid)
        client.schedule(scheduled_at=DAY - seconds(1), ordering_key="k")
        uid = client.schedule(scheduled_at=DAY, ordering_key="k")
        client.claim(lease_s=3 * 86400)
    if state == "redriven":
        client.rows("select orchestrator.redrive_event(%s)", uid)
    maintain(client.at(LATER))
    assert not gone(client)
    assert client.get(done)["status"] == "delivered"
    client.at(LATER + timedelta(days=2))
    for _ in range(2):
        client.finish(results(client.claim_on()))
    maintain(client)
    assert gone(client)


def test_a_day_whose_events_are_still_in_the_horizon_stays(client: Client) -> None:
    """The day was made by hand, and maintenance has not moved its events yet."""
    day = NOON + timedelta(days=5)
    uid = client.schedule(scheduled_at=day)
    client.rows("select orchestrator.create_partitions(%s, %s)", day.date(), day.date())
    client.at(NOON + timedelta(days=30))
    assert client.rows("select * from orchestrator.retire_partition(orchestrator.now())") != [(0, 0)]
    client.rows("select * from orchestrator.retire_partition(orchestrator.now())")
    for _ in range(5):
        client.rows("select * from orchestrator.retire_partition(orchestrator.now())")
    assert attached(client) == {partition_name("event", day)}
    maintain(client)
    assert [lease.event_id for lease in client.claim()] == [uid]


def test_dead_letters_go_with_their_day_and_no_longer_hold_back_their_ordering_key(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name, dead_blocks) values ('strict', true)")
    keyed: dict[str, Any] = {"ordering_key": "k", "retry_policy": "strict"}
    client.schedule(scheduled_at=DAY, **keyed)
    client.schedule(scheduled_at=DAY)
    client.finish(results(client.claim_on(), "fail"))
    behind = client.schedule(**keyed)
    assert client.claim_on() == []
    client.at(LATER)
    assert client.claim_on() == []
    assert client.statistics()["dead_letters"] == 2
    assert maintain(client)["dead_letters_dropped"] == 2
    assert client.statistics()["dead_letters"] == 0
    assert client.column("select orchestrator.list_dead_letters()") == []
    assert [lease.event_id for lease in client.claim_on()] == [behind]


def test_links_to_a_rescheduled_event_that_has_gone_remain_readable(client: Client) -> None:
    uid = client.schedule(scheduled_at=DAY)
    successor = moved(client, uid, LATER + timedelta(days=1))
    maintain(client.at(LATER))
    assert client.get(uid) is None
    assert client.get(successor)["predecessor"] == uid
    assert violations(client.connection, acknowledged=[successor]) == []


# Archive


def test_a_day_is_not_dropped_before_it_was_archived(client: Client) -> None:
    client.rows("select orchestrator.configure_retention(p_archive => true)")
    client.schedule(scheduled_at=DAY)
    client.finish(results(client.claim()))
    maintain(client.at(LATER))
    tables = [partition_name(parent, DAY) for parent in ("event", "outcome", "delivered_batch")]
    assert set(tables) <= set(client.column("select name from orchestrator.partitions_to_archive()"))
    client.at(LATER + timedelta(days=30))
    maintain(client)
    assert all(exists(client, table) for table in tables)
    noted = "select orchestrator.archived_partition(%s)"
    assert [client.value(noted, tables[0]), client.value(noted, tables[0]), client.value(noted, "event")] == [
        True, False, False,
    ]  # fmt: skip
    assert tables[0] not in client.column("select name from orchestrator.partitions_to_archive()")
    assert client.value("select count(*) from orchestrator.event_p" + f"{DAY:%Y%m%d}") == 1
    maintain(client)
    assert [exists(client, table) for table in tables] == [False, True, True]
    client.rows("select orchestrator.configure_retention(p_archive => false)")
    for _ in range(3):
        maintain(client)
    assert not exists(client, tables[1])


def test_few_tables_are_dropped_in_one_call(client: Client) -> None:
    maintain(client)
    maintain(client.at(NOON + timedelta(days=8)))
    client.at(NOON + timedelta(days=8, hours=1))
    dropped = [client.value("select orchestrator.run_maintenance()")["partitions_dropped"] for _ in range(4)]
    assert dropped[0] == 6
    assert max(dropped) == 6
    assert client.rows("select * from orchestrator.retired_partition") == []


# Configuration


KEEPING_NOTHING = [
    ("0", "p_retention_days: expected 1 to 36500 days, got 0"),
    ("-1", "p_retention_days: expected 1 to 36500 days, got -1"),
    ("36501", "p_retention_days"),
    ("null, 0", "p_partition_days_ahead: expected 1 to 400 days, got 0"),
    ("null, -5", "p_partition_days_ahead"),
    ("null, 401", "p_partition_days_ahead"),
    ("null, null, 0", "p_max_schedule_ahead_days"),
    ("null, 30, 29", "p_max_schedule_ahead_days: expected 30 (partition_days_ahead) to 36500 days, got 29"),
]


def test_a_retention_that_keeps_nothing_is_refused_and_changes_nothing(client: Client) -> None:
    kept = "select retention_days, partition_days_ahead, max_schedule_ahead_days, archive from orchestrator.control"
    before = client.rows(kept)
    for given, named in KEEPING_NOTHING:
        with pytest.raises(psycopg.errors.InvalidParameterValue) as refusal:
            client.connection.execute(f"select orchestrator.configure_retention({given})")
        assert str(refusal.value).startswith(named)
    assert client.rows(kept) == before


def test_maintenance_refuses_a_retention_that_keeps_nothing(client: Client) -> None:
    before = attached(client)
    for arguments, named in [
        ("30, 0", "p_retention_days"),
        ("0, 7", "p_partition_days_ahead"),
        ("30, -1", "p_retention_days"),
    ]:
        with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"^{named}: expected 1 to"):
            client.connection.execute(f"select orchestrator.run_maintenance({arguments})")
    assert attached(client) == before


# Locks


def test_a_day_that_a_session_reads_is_left_for_the_next_run(client: Client, connect: Connect) -> None:
    reader, writer = connect(), connect()
    reader.rows("begin")
    reader.rows("select count(*) from orchestrator.event")
    client.at(LATER)
    client.rows("select orchestrator.run_maintenance()")
    report = client.value("select orchestrator.run_maintenance()")
    assert [problem["step"] for problem in report["problems"]] == ["partitions_detached"]
    assert "lock timeout" in report["problems"][0]["problem"]
    assert not gone(client)
    writer.rows("set lock_timeout = '100 ms'")
    assert writer.submit(event())[0].result == "accepted"
    reader.rows("commit")
    maintain(client)
    assert gone(client)


@pytest.mark.parametrize("prepared", [False, True])
def test_days_go_whichever_protocol_the_client_uses(client: Client, prepared: bool) -> None:
    """By the extended protocol a transaction begins a little before its only statement."""
    client.at(LATER)
    client.rows("select orchestrator.run_maintenance()")
    query = "select orchestrator.run_maintenance(%s)"
    cursor = client.connection.execute(query, [1], prepare=prepared)
    [(report,)] = cursor.fetchall()
    assert (report["problems"], report["partitions_detached"]) == ([], 3)


def test_no_day_goes_in_a_transaction_that_goes_on(client: Client) -> None:
    """Its locks would last as long; whoever wants that is told."""
    client.at(LATER)
    client.rows("select orchestrator.run_maintenance()")
    with client.transaction():
        client.rows("select pg_sleep(0.11)")  # a transaction is known by its age
        report = client.value("select orchestrator.run_maintenance()")
        assert [problem["step"] for problem in report["problems"]] == ["partitions_detached"]
        assert "call run_maintenance() outside of any" in report["problems"][0]["problem"]
    assert not gone(client)
    maintain(client)
    assert gone(client)


def test_a_redrive_at_the_same_time_keeps_its_day_or_finds_it_gone(client: Client, connect: Connect) -> None:
    redriver = connect()
    uid = client.schedule(scheduled_at=DAY)
    client.finish(results(client.claim(), "fail"))
    client.at(LATER)
    redriver.at(LATER).rows("begin")
    redriver.rows("select orchestrator.redrive_event(%s)", uid)
    client.rows("select orchestrator.run_maintenance()")
    client.rows("set statement_timeout = '5 s'")
    report = client.value("select orchestrator.run_maintenance()")
    assert [problem["step"] for problem in report["problems"]] in ([], ["partitions_detached"])
    redriver.rows("commit")
    maintain(client)
    assert not gone(client)
    assert [lease.event_id for lease in client.claim()] == [uid]


def test_claims_and_submissions_are_not_held_up_while_days_come_and_go(
    client: Client, connect: Connect, threads: ThreadPoolExecutor
) -> None:
    """The longest call of each of four busy sessions, while 20 runs make, fill, detach and drop a day each.

    No lock may be held for 100 ms. What a call takes besides is the machine's: the longest of the same sessions
    while no maintenance runs, which is allowed for twice.
    """
    sessions = [connect() for _ in range(4)]
    clock = NOON
    quiet, stop = threading.Event(), threading.Event()
    longest = {"alone": 0.0, "beside": 0.0}

    def busy(number: int) -> int:
        calls = 0
        while not stop.is_set():
            session = sessions[number].at(clock)
            when = "beside" if quiet.is_set() else "alone"
            began = time.perf_counter()
            session.submit(*[event(scheduled_at=clock)] * 5)
            submitted = time.perf_counter()
            leases = session.claim(5)
            longest[when] = max(longest[when], submitted - began, time.perf_counter() - submitted)
            session.finish(results(leases))
            calls += 1
        return calls

    running = [threads.submit(busy, number) for number in range(4)]
    until = time.monotonic() + 1
    while time.monotonic() < until and not any(job.done() for job in running):
        time.sleep(0.01)
    quiet.set()
    did: dict[str, int] = {}
    for turn in range(1, 21):
        clock = NOON + timedelta(days=turn // 2, hours=turn % 2 * 2)
        client.at(clock)
        for _ in range(2):
            report = client.value("select orchestrator.run_maintenance()")
            for name in ("partitions_created", "partitions_detached", "partitions_dropped"):
                did[name] = did.get(name, 0) + report[name]
    stop.set()
    assert sum(job.result(30) for job in running) > 20
    assert did["partitions_created"] >= 10
    assert did["partitions_detached"] >= 4
    assert did["partitions_dropped"] >= 4
    assert longest["beside"] <= BLOCKED_S + 2 * longest["alone"], longest
