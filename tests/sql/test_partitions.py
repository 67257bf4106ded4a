"""Partitions: whatever the clock, an outage or somebody's hand did, an event has its place, and is delivered."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, event, results, seconds
from tests.support.upkeep import attached, detach, drop, exists, maintain, partition_name, waiting


@pytest.fixture
def client(client: Client) -> Client:
    """Three days back and ahead are enough, and make for a tenth of the work."""
    client.rows("select orchestrator.configure_retention(7, 3)")
    client.keep_three_days()
    return client


def days(first: int, last: int) -> set[str]:
    return {partition_name("event", NOON + timedelta(days=day)) for day in range(first, last + 1)}


def deliver(client: Client) -> list[str]:
    leases = client.claim_on()
    client.finish(results(leases))
    return sorted(lease.event_id for lease in leases)


# Maintenance that sleeps


@pytest.mark.parametrize("asleep", [7, 60, 380])
def test_an_event_that_is_due_has_its_place_however_long_maintenance_slept(client: Client, asleep: int) -> None:
    client.at(NOON + timedelta(days=asleep))
    now = client.schedule(scheduled_at=NOON + timedelta(days=asleep))
    tomorrow = client.schedule(scheduled_at=NOON + timedelta(days=asleep + 1))
    late = client.schedule(scheduled_at=NOON + timedelta(days=asleep - 7))
    assert waiting(client) == []
    assert deliver(client) == sorted([now, late])
    assert deliver(client.at(NOON + timedelta(days=asleep + 1))) == [tomorrow]
    maintain(client)
    assert days(asleep - 6, asleep + 4) <= attached(client)
    assert violations(client.connection, acknowledged=[now, tomorrow], finished=True) == []


@pytest.mark.parametrize("asleep", [45, 120])
def test_events_of_the_horizon_come_out_late_but_come_out(client: Client, asleep: int) -> None:
    """Those of days that were overslept, whose partitions nobody made."""
    away = [31, 40, 44, 44, 100]
    ids = [client.schedule(scheduled_at=NOON + timedelta(days=day)) for day in away]
    ended = client.schedule(scheduled_at=NOON + timedelta(days=35))
    client.cancel(ended)
    client.at(NOON + timedelta(days=asleep))
    assert client.claim() == []
    did = maintain(client)
    overdue = sorted(uid for uid, day in zip(ids, away, strict=True) if day <= asleep)
    assert did["horizon_moved"] >= len(overdue) + 1
    leases = client.claim_on()
    assert sorted(lease.event_id for lease in leases) == overdue
    assert {lease.due_at for lease in leases} == {client.value("select orchestrator.now()")}
    client.finish(results(leases))
    maintain(client)
    # What has been delivered is past retention: it goes at once, and what was not yet due stays.
    assert exists(client, partition_name("event", NOON + timedelta(days=31)))
    assert partition_name("event", NOON + timedelta(days=31)) not in attached(client)
    client.at(NOON + timedelta(days=121))
    maintain(client)
    assert deliver(client) == sorted(set(ids) - set(overdue))


def test_a_day_gets_its_partition_although_days_before_it_have_none(client: Client) -> None:
    """Asleep for 50 days; the event of today comes first, that of day 40 waits for maintenance."""
    early = client.schedule(scheduled_at=NOON + timedelta(days=40), external_job_id="j")
    client.at(NOON + timedelta(days=50))
    today = client.schedule(scheduled_at=NOON + timedelta(days=50))
    assert deliver(client) == [today]
    maintain(client)
    assert deliver(client) == [early]


# Somebody's hand


def test_payloads_and_arrays_of_a_day_are_not_analyzed(client: Client) -> None:
    """It would take longer than to analyze all other columns, and nothing is ever looked for in them."""
    client.rows("select orchestrator.create_partitions(%s, %s)", NOON.date(), (NOON + timedelta(days=60)).date())
    for parent in ("event", "delivered_batch"):
        analyzed = client.column(
            """select distinct a.attname::text from pg_inherits i join pg_attribute a on a.attrelid = i.inhrelid
            where i.inhparent = ('orchestrator.' || %s)::regclass and a.attnum > 0 and not a.attisdropped
              and a.attstattarget is distinct from 0""",
            parent,
        )
        assert "scheduled_at" in analyzed
        assert not {"payload", "headers", "ids", "started_us", "finished_us", "due_us"} & set(analyzed)


def test_a_day_that_was_detached_is_attached_again_and_its_events_delivered(client: Client) -> None:
    """All that happened meanwhile: a claim gave nothing of it, a submission went to the horizon."""
    ids = [client.schedule(external_job_id=str(n)) for n in range(3)]
    for parent in ("event", "outcome", "delivered_batch"):
        detach(client, parent, NOON)
    assert client.claim() == []
    meanwhile = client.schedule(external_job_id="meanwhile")
    other = client.schedule(scheduled_at=NOON - timedelta(days=1))
    assert deliver(client) == [other]
    assert waiting(client) == [meanwhile]
    assert maintain(client)["partitions_attached"] == 3
    client.at(NOON + seconds(60))
    assert deliver(client) == sorted([*ids, meanwhile])
    assert violations(client.connection, acknowledged=[*ids, other, meanwhile], finished=True) == []


def test_an_event_submitted_again_while_its_day_was_detached_exists_once(client: Client) -> None:
    item = event(external_job_id="j")
    [first] = client.submit(item)
    detach(client, "event", NOON)
    [second] = client.submit(item)
    assert second.id == first.id
    maintain(client)
    assert waiting(client) == []
    assert deliver(client) == [first.id]
    assert violations(client.connection, finished=True) == []


def test_an_old_day_that_was_detached_is_attached_again_only_for_live_events(client: Client) -> None:
    client.schedule(scheduled_at=NOON - timedelta(days=6))
    deliver(client)
    retried = client.schedule(scheduled_at=NOON - timedelta(days=5))
    client.finish(results(client.claim(), "retry"))
    for parent in ("event", "outcome", "delivered_batch"):
        for day in (6, 5):
            detach(client, parent, NOON - timedelta(days=day))
    client.at(NOON + timedelta(days=10))
    assert maintain(client)["partitions_attached"] == 3
    assert partition_name("event", NOON - timedelta(days=6)) not in attached(client)
    assert exists(client, partition_name("event", NOON - timedelta(days=6)))  # left alone
    assert deliver(client) == [retried]


@pytest.mark.parametrize("parent", ["event", "outcome", "delivered_batch"])
def test_half_a_day_that_was_detached_keeps_no_other_day_from_going(client: Client, parent: str) -> None:
    maintain(client)
    detach(client, parent, NOON - timedelta(days=7))
    client.at(NOON + timedelta(days=3))
    maintain(client)
    assert attached(client) & days(-7, -5) == set()


def test_a_day_that_was_dropped_is_made_again(client: Client) -> None:
    lost = client.schedule(max_retries=0)
    for parent in ("event", "outcome", "delivered_batch"):
        drop(client, parent, NOON)
    new = client.schedule()
    assert deliver(client) == [new]
    assert client.get(lost) is None
    # Nobody knows what it was: it is never delivered, and buried after its leases.
    for minute in range(1, 8):
        assert client.at(NOON + seconds(60 * minute)).claim() == []
    assert client.column("select event_id::text from orchestrator.dead_letter") == [lost]
    maintain(client)


def test_live_events_that_were_dropped_with_an_old_day_do_not_stop_claims(client: Client) -> None:
    """Their outcomes have no partition; without one the claim that comes to bury them would fail, for ever."""
    lost = client.schedule(scheduled_at=NOON - timedelta(days=5), max_retries=0)
    expiring = client.schedule(scheduled_at=NOON - timedelta(days=5), expires_at=(NOON + timedelta(days=6)).isoformat())
    for parent in ("event", "outcome", "delivered_batch"):
        drop(client, parent, NOON - timedelta(days=5))
    client.at(NOON + timedelta(days=5))
    uid = client.schedule(scheduled_at=NOON + timedelta(days=5))
    for minute in range(6):
        leases = client.at(NOON + timedelta(days=5, minutes=minute)).claim()
        assert [lease.event_id for lease in leases] == [uid]
    client.at(NOON + timedelta(days=6))
    [problem] = client.value("select orchestrator.run_maintenance()")["problems"]
    assert problem["step"] == "events_expired"
    maintain(client)
    assert [lease.event_id for lease in client.claim()] == [uid]
    assert sorted(client.column("select event_id::text from orchestrator.outcome")) == sorted([lost, expiring])
    maintain(client)
    assert partition_name("outcome", NOON - timedelta(days=5)) not in attached(client, "outcome")


# The clock


@pytest.mark.parametrize("back", [timedelta(hours=1), timedelta(days=1), timedelta(days=20)])
def test_a_clock_that_is_set_back_loses_nothing(client: Client, back: timedelta) -> None:
    far = client.schedule(scheduled_at=NOON + timedelta(days=33))
    client.at(NOON + timedelta(days=3))
    maintain(client)
    soon = client.schedule(scheduled_at=NOON + timedelta(days=3))
    again_at = NOON + timedelta(days=3) - back
    client.at(again_at)
    before = client.schedule(scheduled_at=again_at)
    assert waiting(client) == [far]
    maintain(client)
    assert deliver(client) == [before]
    client.at(NOON + timedelta(days=3))
    assert deliver(client) == [soon]
    client.at(NOON + timedelta(days=33))
    maintain(client)
    assert deliver(client) == [far]
    assert violations(client.connection, acknowledged=[far], clock_goes_forward=False, finished=True) == []


def test_days_detached_under_a_clock_a_year_ahead_can_be_attached_again(client: Client) -> None:
    done = client.schedule(external_job_id="done")
    assert deliver(client) == [done]
    live = client.schedule(scheduled_at=NOON + timedelta(days=1))
    far = client.schedule(scheduled_at=NOON + timedelta(days=367))
    client.at(NOON + timedelta(days=365))
    assert maintain(client)["partitions_detached"] == 6
    client.at(NOON + timedelta(days=365, minutes=59))
    assert maintain(client).get("partitions_dropped") is None
    assert client.get(done) is None

    client.at(NOON + seconds(60))
    now = client.schedule(scheduled_at=NOON + seconds(60))
    [again] = client.submit(event(external_job_id="done"))
    assert (again.id, again.result) == (done, "accepted")  # what it was is not to be seen: it is kept aside
    assert maintain(client)["partitions_attached"] == 6
    assert client.get(done)["status"] == "delivered"
    assert days(-7, 3) <= attached(client)
    assert deliver(client) == [now]
    maintain(client)
    assert client.rows("select * from orchestrator.retired_partition") == []
    assert deliver(client.at(NOON + timedelta(days=1))) == [live]
    assert deliver(client.at(NOON + timedelta(days=367))) == [far]


# pg_partman


def test_partitions_that_another_program_makes_are_not_made_ahead(client: Client) -> None:
    client.rows("select orchestrator.hand_partitions_to('pg_partman')")
    before = attached(client)
    client.at(NOON + timedelta(days=5))
    assert "partitions_created" not in maintain(client)
    assert attached(client) == before
    # An event that is due has its place all the same.
    client.at(NOON + timedelta(days=60))
    uid = client.schedule(scheduled_at=NOON + timedelta(days=60))
    assert deliver(client) == [uid]
    client.rows("select orchestrator.hand_partitions_to('maintenance')")
    assert maintain(client)["partitions_created"] > 10


@pytest.mark.parametrize("whom", ["somebody", "", None])
def test_partitions_are_handed_only_to_maintenance_or_pg_partman(client: Client, whom: Any) -> None:
    with pytest.raises(Exception, match="p_whom: expected maintenance or pg_partman"):
        client.rows("select orchestrator.hand_partitions_to(%s)", whom)


# Many at once


def test_sessions_that_need_the_same_new_day_at_once_make_it_once(connect: Connect, threads: Any) -> None:
    late = NOON + timedelta(days=60)
    clients = [connect().at(late) for _ in range(6)]
    answers = list(
        threads.map(lambda n: clients[n].submit(event(scheduled_at=late, external_job_id=str(n % 3))), range(6))
    )
    assert sorted(answer.result for [answer] in answers) == ["accepted"] * 3 + ["duplicate"] * 3
    assert waiting(clients[0]) == []
    assert len(clients[0].claim_on()) == 3


@pytest.mark.parametrize("call", ["create_partitions(current_date + 40, current_date + 41)", "run_maintenance(32)"])
def test_no_day_is_made_in_a_transaction_that_goes_on(client: Client, observer: Client, call: str) -> None:
    """Whoever submits beyond the last day would wait for its end."""
    last = client.value("select end_day from orchestrator.partition_bounds()")
    client.rows("begin")
    client.rows("select pg_sleep(1.01)")  # a transaction is known by its age
    try:
        answer = str(client.connection.execute(f"select orchestrator.{call}".encode()).fetchall())
    except psycopg.Error as error:
        answer = str(error)
    assert "not in a transaction that goes on" in answer
    observer.rows("set statement_timeout = '2 s'")
    observer.schedule(scheduled_at=last + timedelta(days=1))
    client.rows("rollback")
    client.connection.execute(f"select orchestrator.{call}".encode())
    assert client.value("select end_day from orchestrator.partition_bounds()") > last
