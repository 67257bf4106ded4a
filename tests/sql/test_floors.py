"""Floors: they rise past what is done, whoever holds a snapshot, and never past what is due."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, event, results, seconds
from tests.support.upkeep import maintain, moved

FLOORS = "select distinct unnest(floors)::text from orchestrator.control"


def raise_at(client: Client, *moments: float) -> list[datetime]:
    """Raises the floors at these seconds after noon; the floors of shared lanes then, the lowest first."""
    for moment in moments:
        client.at(NOON + seconds(moment)).rows("select orchestrator.raise_floors()")
    return floors(client)


def floors(client: Client) -> list[datetime]:
    shown: list[str] = client.column(FLOORS)
    return sorted(datetime.fromisoformat(text) for text in shown if text != "-infinity")


def claimed(client: Client) -> set[str]:
    return {lease.event_id for lease in client.claim_on()}


def test_floors_rise_to_the_time_before_which_no_timer_is_left(client: Client) -> None:
    client.schedule_many(5)
    client.finish(results(client.claim()))
    assert raise_at(client, 1) == []  # it only marks the time
    assert raise_at(client, 2) == [NOON + seconds(1)]
    assert raise_at(client, 3.5) == [NOON + seconds(2)]


def test_a_floor_stays_at_the_first_timer_of_its_lane_leased_or_not(client: Client) -> None:
    client.schedule(scheduled_at=NOON)
    leases = client.claim(lease_s=100)
    assert raise_at(client, 1, 2, 3) == [NOON, NOON + seconds(2)]
    client.release(leases)
    leases = client.claim()
    assert len(leases) == 1
    client.finish(results(leases))
    assert raise_at(client, 4, 5, 6) == [NOON + seconds(5)]


def test_an_attempt_keeps_its_place_under_a_bound_while_floors_rise(client: Client) -> None:
    client.rows("select orchestrator.configure_destination('receiver.example', p_max_parallel => 2)")
    maintain(client)
    client.schedule(scheduled_at=NOON)
    first = client.claim(lease_s=600)
    for second in range(1, 60):
        raise_at(client, second)
        client.schedule(scheduled_at=NOON + seconds(second))
        leases = client.claim()
        assert len(leases) == 1
        assert client.claim() == []
        client.finish(results(leases))
    client.schedule_many(3, scheduled_at=NOON + seconds(59))
    assert len(client.claim()) == 1
    client.finish(results(first))
    assert len(client.claim()) == 1
    floor = client.value("select floor from orchestrator.lane where name = 'receiver.example'")
    assert floor == NOON


def test_floors_rise_at_most_once_a_second(client: Client) -> None:
    raise_at(client, 1, 2)
    assert raise_at(client, 2.1, 2.5, 2.89) == [NOON + seconds(1)]
    assert raise_at(client, 2.91) == [NOON + seconds(2)]


def test_two_sessions_that_raise_floors_do_not_wait_for_each_other(connect: Connect) -> None:
    first, second = connect(), connect()
    raise_at(first, 1)
    first.at(NOON + seconds(2)).rows("begin")
    first.rows("select orchestrator.raise_floors()")
    second.rows("set lock_timeout = '1 ms'")
    assert raise_at(second, 3) == []
    first.rows("commit")
    assert raise_at(second, 4) == [NOON + seconds(2)]


@pytest.mark.parametrize("how", ["snapshot", "writer elsewhere", "reader of timer"])
def test_floors_rise_although_another_session_holds_a_snapshot(connect: Connect, how: str) -> None:
    client, holder = connect(), connect()
    client.schedule_many(3)
    holder.rows("begin isolation level repeatable read")
    if how == "writer elsewhere":
        holder.rows("insert into orchestrator.retry_policy (name) values ('unrelated')")
    else:
        holder.rows("select count(*) from orchestrator.timer")
    client.finish(results(client.claim()))
    assert raise_at(client, 1, 2, 3) == [NOON + seconds(2)]
    holder.rows("rollback")


def test_a_session_with_a_snapshot_raises_no_floor(connect: Connect) -> None:
    """It would not see what others wrote since."""
    client, other = connect(), connect()
    client.rows("begin isolation level repeatable read")
    client.rows("select 1")
    uid = other.schedule()
    raise_at(client, 1, 2, 3)
    client.rows("commit")
    assert claimed(other) == {uid}
    assert claimed(client.at(NOON + timedelta(minutes=5))) == {uid}


# What somebody writes meanwhile


def write_submission(client: Client) -> str:
    return client.schedule()


def write_retry(client: Client) -> str:
    [lease] = client.claim_on()
    client.finish(results([lease], "retry"))
    return lease.event_id


def write_redrive(client: Client) -> str:
    [uid] = client.column("select event_id::text from orchestrator.dead_letter")
    client.rows("select orchestrator.redrive_event(%s)", uid)
    return str(uid)


def write_reschedule(client: Client) -> str:
    [uid] = client.column("select event_id::text from orchestrator.timer")
    return moved(client, uid, NOON - timedelta(hours=1))


def write_move(client: Client) -> str:
    [uid] = client.column("select id::text from orchestrator.horizon")
    day = (NOON + timedelta(days=40)).date()
    client.rows("select orchestrator.create_partitions(%s, %s)", day, day)
    assert client.value("select orchestrator.move_horizon()") == 1
    return str(uid)


@pytest.mark.parametrize(
    ("prepare", "write", "at"),
    [
        (lambda client: None, write_submission, NOON),
        (lambda client: client.schedule(retry_policy="at-once"), write_retry, NOON),
        (lambda client: client.schedule() and client.finish(results(client.claim(), "fail")), write_redrive, NOON),
        (lambda client: client.schedule(scheduled_at=NOON + timedelta(hours=1)), write_reschedule, NOON),
        (lambda client: client.schedule(scheduled_at=NOON + timedelta(days=40)), write_move, NOON + timedelta(days=41)),
    ],
    ids=["submit", "retry", "redrive", "reschedule", "move"],
)
@pytest.mark.parametrize("marked", [False, True])
def test_an_event_committed_after_floors_rose_is_found(
    connect: Connect, prepare: Callable[[Client], Any], write: Callable[[Client], str], at: datetime, marked: bool
) -> None:
    """Begun before the time was marked, or after."""
    writer, raiser = connect(), connect()
    writer.rows("insert into orchestrator.retry_policy (name, jitter, schedule) values ('at-once', 0, '{0 s}')")
    prepare(writer)
    offset = (at - NOON).total_seconds()
    if marked:
        raise_at(raiser, offset - 1)
    writer.at(at).rows("begin")
    uid = write(writer)
    for moment in (1, 2, 3, 10):
        raise_at(raiser, offset + moment)
    writer.rows("commit")
    raise_at(raiser, offset + 11, offset + 12, offset + 13)
    assert violations(raiser.connection) == []
    assert claimed(raiser) == {uid}


def test_a_dedicated_lane_has_a_floor_too(client: Client) -> None:
    client.rows("select orchestrator.configure_destination('own.example')")
    maintain(client)
    client.schedule_many(3, destination="https://own.example/")
    client.finish(results(client.claim_on()))
    raise_at(client, 1, 20, 40)
    [(floor, own)] = client.rows(
        "select (select floor from orchestrator.lane where lane > 63), own_floor from orchestrator.control"
    )
    assert NOON < floor <= NOON + seconds(20)
    assert NOON < own <= NOON + seconds(20)
    late = client.schedule(destination="https://own.example/", scheduled_at=NOON + seconds(15))
    assert claimed(client) == {late}


@pytest.mark.parametrize("waits_s", [30, 3600])
def test_an_event_that_waits_for_its_ordering_key_in_a_dedicated_lane_is_found(client: Client, waits_s: int) -> None:
    client.rows("select orchestrator.configure_destination('own.example')")
    maintain(client)
    ids = [
        client.schedule(destination="https://own.example/", ordering_key="k", scheduled_at=NOON + seconds(n))
        for n in range(2)
    ]
    client.at(NOON + seconds(1))
    leases = client.claim_on(lease_s=7200)
    raise_at(client, 2, 20, waits_s)
    client.finish(results(leases))
    raise_at(client, waits_s + 20, waits_s + 40)
    assert claimed(client) == {ids[1]}


@pytest.mark.parametrize("deep", [False, True])
def test_an_event_that_moves_to_another_lane_is_found(client: Client, deep: bool) -> None:
    """Given a lane, and losing it, with events of before the floors in it."""
    ids = {client.schedule(destination=f"https://{host}.example/") for host in ("own", "other", "third")}
    raise_at(client, 1, 2, 3)
    if deep:
        client.rows("select orchestrator.configure_destination('*.example')")
    client.rows("select orchestrator.configure_destination('own.example')")
    ids.add(client.schedule(destination="https://own.example/"))
    raise_at(client, 4, 5, 6)
    maintain(client)
    raise_at(client, 7, 8, 9)
    assert violations(client.connection) == []
    client.rows("select orchestrator.delete_destination('own.example')")
    ids.add(client.schedule(destination="https://own.example/"))
    raise_at(client, 10, 11, 12)
    maintain(client)
    raise_at(client, 13, 14, 15)
    assert violations(client.connection) == []
    assert claimed(client) == ids


@pytest.mark.parametrize("back", [0.5, 5 * 86400])
@pytest.mark.parametrize("raises", [False, True])
def test_a_clock_that_is_set_back_hides_nothing(client: Client, back: float, raises: bool) -> None:
    raise_at(client, 1, 2, 3)
    now = 3 - back
    client.at(NOON + seconds(now))
    uid = client.schedule(scheduled_at=NOON - timedelta(days=6))
    if raises:
        raise_at(client, now + 0.1, now + 1.2, now + 2.5)
    assert claimed(client) == {uid}


def test_an_event_of_a_new_priority_is_found(connect: Connect) -> None:
    client, writer = connect(), connect()
    raise_at(client, 1, 2, 3)
    writer.at(NOON + seconds(3)).rows("begin")
    uid = writer.schedule(priority=5)
    raise_at(client, 4, 5, 6)
    writer.rows("commit")
    raise_at(client, 7, 8, 9)
    assert claimed(client) == {uid}


def test_maintenance_lowers_a_floor_that_hides_a_timer_changed_by_hand(client: Client) -> None:
    raise_at(client, 1, 60, 120)
    uid = client.schedule(scheduled_at=NOON)
    client.rows("update orchestrator.timer set due_at = %s", NOON)
    assert claimed(client) == set()
    assert maintain(client)["floors_lowered"] == 1
    assert claimed(client) == {uid}


# Any history


@pytest.mark.parametrize("seed", range(4))
def test_no_history_of_open_transactions_leaves_a_due_event_below_a_floor(connect: Connect, seed: int) -> None:
    """Six sessions that begin, write and end their transactions in any order, and floors that rise in between."""
    chance = random.Random(seed)
    raiser = connect()
    raiser.rows("insert into orchestrator.retry_policy (name, jitter, schedule) values ('at-once', 0, '{0 s}')")
    sessions = [connect() for _ in range(6)]
    for session in sessions:
        session.rows("set lock_timeout = '20 ms'")
    open_since: dict[int, bool] = {}
    now = NOON

    def write(session: Client) -> None:
        kind = chance.choice(["submit", "submit", "claim", "redrive", "reschedule", "configure", "cancel"])
        if kind == "submit":
            session.submit(
                *[
                    event(
                        scheduled_at=now + seconds(chance.choice([-3600, -1, 0, 0, 1, 5])), retry_policy="at-once",
                        destination=f"https://{chance.choice('abcd')}.example/", max_retries=1,
                        ordering_key=chance.choice([..., ..., "k", "l"]), priority=chance.choice([0, 0, 3]),
                    )
                    for _ in range(chance.randrange(1, 4))
                ]
            )  # fmt: skip
        elif kind == "claim":
            leases = session.claim(chance.choice([1, 10]), lease_s=chance.choice([2, 30]))
            kinds = [chance.choice(["delivered", "retry", "fail"]) for _ in leases]
            kept = [one for lease, kind in zip(leases, kinds, strict=True) for one in results([lease], kind)]
            session.finish(kept[: chance.randrange(len(kept) + 1)])
        elif kind == "redrive":
            session.rows("select orchestrator.redrive_dead_letters(p_limit => 3)")
        elif kind == "configure":
            name = f"{chance.choice('ab')}.example"
            if chance.random() < 0.5:
                session.rows("select orchestrator.configure_destination(%s)", name)
            else:
                session.rows("select orchestrator.delete_destination(%s)", name)
        else:
            [uid] = session.column("select event_id::text from orchestrator.timer order by random() limit 1") or [None]
            if uid and kind == "cancel":
                session.cancel(uid)
            elif uid:
                session.rows("select orchestrator.reschedule_event(%s, %s)", uid, now - seconds(10))

    for step in range(100):
        now += seconds(chance.choice([0, 0.3, 1, 1]))
        for session in (raiser, *sessions):
            session.at(now)
        number = chance.randrange(6)
        session = sessions[number]
        move = chance.choice(["begin", "write", "write", "end", "raise", "raise", "maintain"])
        try:
            if move == "raise":
                raiser.rows("select orchestrator.raise_floors()")
            elif move == "maintain" and not open_since and chance.random() < 0.3:
                raiser.rows("select orchestrator.run_maintenance()")
            elif move == "begin" and number not in open_since:
                session.rows("begin")
                open_since[number] = True
            elif move == "end" and open_since.pop(number, False):
                session.rows(chance.choice(["commit", "commit", "rollback"]))
            elif move == "write":
                write(session)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.UniqueViolation):
            if open_since.pop(number, False):
                session.rows("rollback")
        if step % 10 == 0:
            assert [one for one in violations(raiser.connection) if "floor" in one] == []
    for number in open_since:
        sessions[number].rows("commit")
    now += seconds(60)
    for session in (raiser, *sessions):
        session.at(now)
    raiser.rows("select orchestrator.raise_floors()")
    for _ in range(30):
        raiser.at(now := now + seconds(1))
        raiser.rows("select orchestrator.raise_floors()")
        raiser.finish(results(raiser.claim_on()))
        if chance.random() < 0.1:
            maintain(raiser)
    assert raiser.rows("select * from orchestrator.timer where due_at <= %s", now) == []


def test_floors_wait_for_slow_writers(connect: Connect, threads: ThreadPoolExecutor) -> None:
    """By the running clock: transactions that stay open for up to two seconds beside claims and rising floors."""
    writers, claimer, raiser = [connect() for _ in range(8)], connect(), connect()
    for session in (*writers, claimer, raiser):
        session.at(None)

    def write(number: int) -> int:
        chance = random.Random(number)
        done = 0
        for _ in range(4):
            with writers[number].transaction():
                if chance.random() < 0.5:
                    writers[number].rows("select pg_sleep(%s)", chance.random() * 0.4)
                done += len(writers[number].schedule_many(3, scheduled_at=NOON - timedelta(days=1)))
                writers[number].rows("select pg_sleep(%s)", chance.random() * 0.5 + (number == 0))
        return done

    writing = [threads.submit(write, number) for number in range(8)]
    taken = 0
    while not all(job.done() for job in writing):
        raiser.rows("select orchestrator.raise_floors()")
        leases = claimer.claim(20)
        claimer.finish(results(leases))
        taken += len(leases)
    expected = sum(job.result() for job in writing)
    leases = claimer.claim(1000)
    claimer.finish(results(leases))
    assert taken + len(leases) == expected
    assert violations(claimer.connection, finished=True) == []
