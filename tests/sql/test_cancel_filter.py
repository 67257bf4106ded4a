"""Cancelling by filter: source, destination and time, in a bounded walk that meets every event once."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, LiteralString, NamedTuple

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, event, results, seconds, wait_for
from tests.support.upkeep import maintain

FAR = NOON + timedelta(days=50)


class Swept(NamedTuple):
    seen: int
    matched: int
    cancelled: int
    in_flight: int
    examples: list[str]
    next_after: str | None


def cancel(
    client: Client,
    source: str | None = None,
    destination: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    dry_run: bool = False,
    limit: int | None = 10000,
    after: str | None = None,
) -> Swept:
    [row] = client.rows(
        "select * from orchestrator.cancel_events(%s, %s, %s, %s, %s, %s, %s)",
        source, destination, since, until, dry_run, limit, after,
    )  # fmt: skip
    seen, matched, cancelled, in_flight, examples, next_after = row
    return Swept(seen, matched, cancelled, in_flight, [str(uid) for uid in examples], next_after and str(next_after))


def walk(client: Client, limit: int, **filters: Any) -> list[Swept]:
    told = [cancel(client, limit=limit, **filters)]
    while told[-1].next_after:
        told.append(cancel(client, limit=limit, after=told[-1].next_after, **filters))
    return told


def cancelled(client: Client) -> set[str]:
    return {str(uid) for uid in client.column("select id from orchestrator.event_status where status = 'cancelled'")}


def mixed(client: Client) -> dict[str, dict[str, Any]]:
    """60 events of three sources, three destinations, and times on both sides of the horizon."""
    chance = random.Random(5)
    items = [
        {
            "source": chance.choice(["ocean", "air", "land"]),
            "destination": chance.choice(["https://a.example/x", "https://b.example:8443/y", "https://A.example/z"]),
            "scheduled_at": chance.choice([NOON, FAR]) + seconds(chance.randrange(100)),
        }
        for _ in range(60)
    ]
    answers = sorted(client.submit(*[event(**item) for item in items]))
    return {str(answer.id): item for answer, item in zip(answers, items, strict=True)}


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({"source": "air"}, lambda item: item["source"] == "air"),
        ({"destination": "a.example"}, lambda item: item["destination"].lower().startswith("https://a.")),
        ({"destination": "b.example:8443"}, lambda item: item["destination"].startswith("https://b.")),
        ({"since": NOON + seconds(50)}, lambda item: item["scheduled_at"] >= NOON + seconds(50)),
        ({"until": FAR + seconds(50)}, lambda item: item["scheduled_at"] < FAR + seconds(50)),
        (
            {"since": NOON + seconds(20), "until": FAR + seconds(30), "source": "sea", "destination": "a.example"},
            lambda item: False,
        ),
        (
            {"since": NOON + seconds(20), "until": FAR + seconds(80), "source": "ocean"},
            lambda item: item["source"] == "ocean" and NOON + seconds(20) <= item["scheduled_at"] < FAR + seconds(80),
        ),
    ],
)
def test_events_that_match_every_filter_are_cancelled_and_no_others(
    client: Client, filters: dict[str, Any], wanted: Any
) -> None:
    items = mixed(client)
    expected = {uid for uid, item in items.items() if wanted(item)}
    for limit in (1, 10000, 7):
        dry = walk(client, limit, dry_run=True, **filters)
        assert sum(one.matched for one in dry) == len(expected)
        assert max(one.seen for one in dry) <= limit
    assert cancelled(client) == set()
    told = walk(client, limit, **filters)
    assert cancelled(client) == expected
    assert sum(one.matched for one in dry) == sum(one.matched for one in told) == len(expected)
    assert sum(one.cancelled for one in told) == len(expected)
    assert sum(one.cancelled for one in dry) == 0
    assert [one.seen for one in dry] == [one.seen for one in told]
    assert max(one.seen for one in told) <= limit
    assert [one.examples for one in dry] == [one.examples for one in told]
    assert all(set(one.examples) <= expected and len(one.examples) <= 10 for one in told)
    assert client.totals().get("cancelled", 0) == len(expected)
    assert walk(client, limit, **filters)[0].matched == 0
    assert violations(client.connection, acknowledged=items) == []


def test_times_of_a_filter_are_exact_to_the_microsecond(client: Client) -> None:
    instant = timedelta(microseconds=1)
    ids = [client.schedule(scheduled_at=NOON + n * instant) for n in range(4)]
    told = cancel(client, since=NOON + instant, until=NOON + 3 * instant)
    assert set(told.examples) == set(ids[1:3])
    assert cancelled(client) == set(ids[1:3])


def test_attempts_under_way_go_on_and_are_counted(client: Client) -> None:
    ids = client.schedule_many(5, source="air")
    leases = client.claim(2)
    dry = cancel(client, source="air", dry_run=True)
    told = cancel(client, source="air")
    assert (dry.matched, dry.cancelled, dry.in_flight) == (5, 0, 2)
    assert (told.matched, told.cancelled, told.in_flight) == (5, 3, 2)
    assert client.finish(results(leases)) == []
    assert cancelled(client) == set(ids) - {lease.event_id for lease in leases}


def test_a_failed_event_is_cancelled_before_its_next_attempt(client: Client) -> None:
    client.schedule_many(3, source="air")
    client.finish(results(client.claim(), "retry"))
    assert cancel(client, source="air").cancelled == 3
    statistics = client.statistics()
    assert (statistics["live"], statistics["retrying"]) == (0, 0)


def test_a_walk_visits_each_earlier_event_once_while_other_events_come_and_go(connect: Connect) -> None:
    client, other = connect(), connect()
    ids = [client.schedule(source="air", scheduled_at=NOON + seconds(n)) for n in range(30)]
    seen, after = 0, None
    for n in range(100):
        told = cancel(client, source="air", limit=4, after=after)
        seen += told.cancelled
        after = told.next_after
        if after is None:
            break
        other.schedule(source="land", scheduled_at=NOON + seconds(n))
        other.schedule(source="air", scheduled_at=NOON - timedelta(hours=1))  # behind the walk
        maintain(other)
    assert cancelled(client) == set(ids)
    assert seen == 30


def test_the_next_event_of_an_ordering_key_goes_when_the_first_is_cancelled(client: Client) -> None:
    client.schedule(source="air", ordering_key="k", scheduled_at=NOON - seconds(1))
    client.finish(results(client.claim_on(), "retry", retry_after=3600))
    behind = client.schedule(source="land", ordering_key="k")
    assert client.claim_on() == []
    assert cancel(client, source="air").cancelled == 1
    assert [lease.event_id for lease in client.claim_on()] == [behind]


def test_kafka_topics_are_destinations(client: Client) -> None:
    ids = client.schedule_many(2, delivery_type="KAFKA", destination="orders")
    client.schedule_many(3, delivery_type="KAFKA", destination=...)
    client.schedule_many(3, destination="https://orders/")
    assert cancel(client, destination="kafka:orders").cancelled == 2
    assert cancelled(client) == set(ids)
    assert cancel(client, destination="kafka:").cancelled == 3


def test_a_limit_of_cancelling_out_of_bounds_is_refused(client: Client) -> None:
    for limit in (0, -1, 100_001, None):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_limit: expected 1 to 100000"):
            cancel(client, source="air", limit=limit)


def test_a_filter_must_be_given(client: Client) -> None:
    uid = client.schedule()
    with pytest.raises(
        psycopg.errors.InvalidParameterValue,
        match="cancel_events: give p_source, p_destination, p_from or p_until",
    ):
        cancel(client)
    assert client.status(uid) == "scheduled"


def test_a_dry_run_takes_no_lock_and_a_sweep_leaves_out_locked_events(connect: Connect) -> None:
    client, holder = connect(), connect()
    uid = client.schedule(source="air")
    holder.rows("begin")
    holder.rows("select 1 from orchestrator.timer where event_id = %s for update", uid)
    client.rows("set lock_timeout = '1 ms'")
    assert cancel(client, source="air", dry_run=True).matched == 1
    client.rows("reset lock_timeout")
    swept = cancel(client, source="air")
    assert (swept.matched, swept.cancelled, swept.in_flight) == (1, 0, 0)
    holder.rows("rollback")
    assert cancel(client, source="air").cancelled == 1


def test_a_sweep_that_is_cancelled_while_it_waits_changes_nothing(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    client, holder = connect(), connect()
    locked, free = [client.schedule(source="air") for _ in range(2)]
    holder.rows("begin")
    holder.rows("select 1 from orchestrator.timer where event_id = %s for update", locked)
    swept = threads.submit(cancel, client, source="air")
    observer.wait_until_blocked(client)
    observer.rows("select pg_cancel_backend(%s)", client.pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        swept.result(10)
    holder.rows("rollback")
    assert [observer.status(uid) for uid in (locked, free)] == ["scheduled"] * 2


def test_a_sweep_leaves_out_locked_events_though_the_lock_timeout_calls_itself_a_cancel(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    """It does when it fires between two waits for one row; here the cancel comes from outside."""
    client, holder, next_holder = connect(), connect(), connect()
    locked, free = [client.schedule(source="air") for _ in range(2)]
    lock: LiteralString = "select 1 from orchestrator.timer where event_id = %s for update"
    for each in (holder, next_holder):
        each.rows("begin")
    holder.rows(lock, locked)
    next_locked = threads.submit(next_holder.rows, lock, locked)
    observer.wait_until_blocked(next_holder)
    began_s = time.monotonic()
    swept = threads.submit(cancel, client, source="air")
    observer.wait_until_blocked(client)
    wait_for(lambda: time.monotonic() > began_s + 0.7)
    holder.rows("rollback")
    next_locked.result(10)
    wait_for(lambda: time.monotonic() > began_s + 1.2)
    observer.rows("select pg_cancel_backend(%s)", client.pid)
    assert swept.result(10).cancelled == 1
    next_holder.rows("rollback")
    assert [observer.status(uid) for uid in (locked, free)] == ["scheduled", "cancelled"]
