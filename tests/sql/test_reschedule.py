"""Rescheduling: a cancel and a submission in one, linked both ways."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from orchestrator.events.submission import bucket, event_id
from tests.sql.conftest import Connect
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, event, results, seconds
from tests.support.upkeep import maintain, moved, reschedule, reschedule_external

SOON = NOON + timedelta(hours=1)
LATER = NOON + timedelta(hours=2)
FAR = NOON + timedelta(days=50)
FARTHER = NOON + timedelta(days=60)

COPIED = (
    "source", "external_job_id", "delivery_type", "destination", "payload", "headers", "max_retries", "retry_policy",
    "ordering_key", "priority", "spread_seconds",
)  # fmt: skip


def intact(client: Client, ids: list[str]) -> bool:
    return violations(client.connection, acknowledged=ids) == []


@pytest.mark.parametrize(("before", "after"), [(SOON, LATER), (LATER, SOON), (SOON, FAR), (FAR, SOON), (FAR, FARTHER)])
def test_an_event_takes_place_at_another_time(client: Client, before: datetime, after: datetime) -> None:
    client.rows("select orchestrator.configure_retention(60)")
    uid = client.schedule(
        scheduled_at=before, external_job_id="j", headers={"X-A": "ä"}, payload=[1, {"b": None}], max_retries=7,
        retry_policy="default", ordering_key="k", priority=4, spread_seconds=60,
    )  # fmt: skip
    client.at(NOON + seconds(60))
    successor = moved(client, uid, after)
    assert successor == event_id("tests", "j", after, "k")
    old, new = client.get(uid), client.get(successor)
    assert (old["status"], old["successor"], old["predecessor"]) == ("rescheduled", successor, None)
    assert (new["status"], new["successor"], new["predecessor"]) == ("scheduled", None, uid)
    assert (new["scheduled_at"], new["created_at"]) == (after.isoformat(), (NOON + seconds(60)).isoformat())
    assert {name: old[name] for name in COPIED} == {name: new[name] for name in COPIED}
    [outcome] = old["outcomes"]
    assert (outcome["result"], outcome["attempt"], outcome["successor"]) == ("rescheduled", 0, successor)
    assert client.totals() == {"accepted": 2, "rescheduled": 1}
    assert client.statistics()["live"] == 1
    assert intact(client, [uid, successor])

    maintain(client.at(NOON + timedelta(days=35)))
    assert [client.get(one)["status"] for one in (uid, successor)] == ["rescheduled", "scheduled"]
    client.at(after + seconds(60))
    assert [lease.event_id for lease in client.claim_on()] == [successor]
    assert intact(client, [uid, successor])


def test_a_rescheduled_event_is_not_delivered_at_its_old_time(client: Client) -> None:
    uid = client.schedule(scheduled_at=SOON)
    successor = moved(client, uid, LATER)
    assert client.at(SOON).claim() == []
    assert [lease.event_id for lease in client.at(LATER).claim()] == [successor]


def test_a_successor_begins_with_attempt_one(client: Client) -> None:
    uid = client.schedule(max_retries=1)
    client.finish(results(client.claim(), "retry"))
    assert client.status(uid) == "retrying"
    successor = moved(client, uid, SOON)
    assert client.outcomes(uid) == [(1, "retried"), (1, "rescheduled")]
    client.at(SOON)
    for attempt in (1, 2):
        [lease] = client.claim()
        assert (lease.event_id, lease.attempt) == (successor, attempt)
        client.finish(results([lease], "retry"))
        client.at(SOON + timedelta(days=1))
    assert client.status(successor) == "dead"
    statistics = client.statistics()
    assert (statistics["live"], statistics["retrying"]) == (0, 0)
    assert client.totals() == {"accepted": 2, "rescheduled": 1, "retried": 2, "dead": 1}


@pytest.mark.parametrize("state", ["in_flight", "delivered", "dead", "cancelled", "rescheduled", "expired"])
def test_an_event_in_flight_or_ended_is_left_alone(client: Client, state: str) -> None:
    uid = client.schedule(expires_at=SOON.isoformat())
    if state in ("in_flight", "delivered", "dead"):
        leases = client.claim()
        if state != "in_flight":
            client.finish(results(leases, "delivered" if state == "delivered" else "fail"))
    elif state == "cancelled":
        client.cancel(uid)
    elif state == "rescheduled":
        moved(client, uid, NOON + seconds(60))
    else:
        client.at(SOON).claim()
    before = client.get(uid)
    [answer] = reschedule(client, uid, LATER, LATER + seconds(1))
    assert (answer.event_id, answer.status, answer.successor) == (uid, state, before["successor"])
    assert answer.result == ("in_flight" if state == "in_flight" else "finished")
    assert client.get(uid) == before
    assert client.value("select count(*) from orchestrator.event where scheduled_at = %s", LATER) == 0


def test_a_lease_that_ran_out_does_not_prevent_rescheduling(client: Client) -> None:
    uid = client.schedule()
    leases = client.claim()
    client.at(NOON + seconds(60))
    successor = moved(client, uid, SOON)
    assert [answer.result for answer in client.finish(results(leases))] == ["stale"]
    assert intact(client, [uid, successor])


# Again


@pytest.mark.parametrize("job", ["j", None])
@pytest.mark.parametrize("after", [LATER, FAR])
def test_a_repeated_reschedule_is_done_once(client: Client, job: str | None, after: datetime) -> None:
    uid = client.schedule(scheduled_at=SOON, external_job_id=job)
    successor = moved(client, uid, after)
    for _ in range(2):
        [answer] = reschedule(client, uid, after)
        assert answer == (uid, "already_rescheduled", "rescheduled", successor, None, None)
    [other] = reschedule(client, uid, after + seconds(1))
    assert (other.result, other.status) == ("finished", "rescheduled")
    assert client.totals() == {"accepted": 2, "rescheduled": 1}


def test_a_repeated_reschedule_by_external_id_is_done_once(client: Client) -> None:
    """The name is the successor's by then."""
    uid = client.schedule(scheduled_at=SOON, external_job_id="j")
    answers = [reschedule_external(client, "j", LATER) for _ in range(3)]
    [first] = answers[0]
    assert (first.event_id, first.result) == (uid, "rescheduled")
    assert answers[1:] == [[(uid, "already_rescheduled", "rescheduled", first.successor, None, None)]] * 2
    [second] = reschedule_external(client, "j", LATER + seconds(1))
    assert (second.event_id, second.result) == (first.successor, "rescheduled")
    assert client.totals() == {"accepted": 3, "rescheduled": 2}


def test_a_chain_of_successors_keeps_all_of_its_links(client: Client) -> None:
    chain = [client.schedule(scheduled_at=SOON)]
    for minute in range(1, 5):
        chain.append(moved(client, chain[-1], SOON + timedelta(minutes=minute)))
    shown = [client.get(uid) for uid in chain]
    assert [one["predecessor"] for one in shown] == [None, *chain[:-1]]
    assert [one["successor"] for one in shown] == [*chain[1:], None]
    assert intact(client, chain)


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("job", [None, "j"])
def test_a_successor_keeps_the_bucket(client: Client, key: str | None, job: str | None) -> None:
    chain = [client.schedule(scheduled_at=SOON, external_job_id=job, ordering_key=key)]
    for at in (LATER, SOON, LATER, FAR):
        chain.append(moved(client, chain[-1], at))
    assert len(set(chain)) == 5
    assert len({bucket(uid) for uid in chain}) == 1


# Back


def test_an_external_id_names_the_last_successor(client: Client) -> None:
    first = client.schedule(scheduled_at=SOON, external_job_id="j")
    last = moved(client, moved(client, first, LATER), SOON)
    client.cancel(last)
    [answer] = reschedule_external(client, "j", FAR)
    assert (answer.event_id, answer.result, answer.status, answer.successor) == (last, "finished", "cancelled", None)


@pytest.mark.parametrize("times", [(SOON, LATER), (SOON, FAR), (FAR, FARTHER)])
@pytest.mark.parametrize("by_name", [False, True])
def test_an_event_may_come_back_to_a_time_that_it_had(
    client: Client, times: tuple[datetime, datetime], by_name: bool
) -> None:
    first = client.schedule(scheduled_at=times[0], external_job_id="j")
    chain = [first]
    for turn in range(1, 6):
        answers = [
            reschedule_external(client, "j", times[turn % 2])
            if by_name
            else reschedule(client, chain[-1], times[turn % 2])
            for _ in range(2)
        ]
        assert [answer.result for [answer] in answers] == ["rescheduled", "already_rescheduled"]
        assert answers[0][0].successor == answers[1][0].successor
        chain.append(str(answers[0][0].successor))
    assert len(set(chain)) == 6
    assert chain[1] == event_id("tests", "j", times[1])
    assert [client.get(uid)["status"] for uid in chain] == ["rescheduled"] * 5 + ["scheduled"]
    for at, uid in zip(times, chain, strict=False):
        [again] = client.submit(event(scheduled_at=at, external_job_id="j"))
        assert (again.id, again.result, again.status) == (uid, "duplicate", "rescheduled")
    assert intact(client, chain)
    client.at(times[1])
    maintain(client)
    assert [lease.event_id for lease in client.claim_on()] == chain[-1:]


def test_a_time_to_which_another_event_came_back_is_refused(client: Client) -> None:
    first = client.schedule(scheduled_at=SOON, external_job_id="j")
    there = moved(client, moved(client, first, LATER), SOON)
    other = client.schedule(scheduled_at=FAR, external_job_id="j")
    [answer] = reschedule(client, other, SOON)
    assert (answer.result, answer.field) == ("refused", "scheduled_at")
    assert there in str(answer.reason)


def test_of_two_events_that_come_back_to_one_time_at_once_one_is_refused(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    first, second = connect(), connect()
    one = moved(first, first.schedule(scheduled_at=SOON, external_job_id="j"), LATER)
    other = first.schedule(scheduled_at=FAR, external_job_id="j")
    first.rows("begin")
    there = moved(first, one, SOON)
    later = threads.submit(reschedule, second, other, SOON)
    observer.wait_until_blocked(second)
    first.rows("commit")
    [answer] = later.result(10)
    assert (answer.result, answer.field) == ("refused", "scheduled_at")
    assert there in str(answer.reason)
    assert intact(observer, [one, other, there])


# Refused


def test_the_time_that_an_event_already_has_is_refused(client: Client) -> None:
    uid = client.schedule(scheduled_at=SOON, external_job_id="j")
    [answer] = reschedule(client, uid, SOON)
    assert (answer.result, answer.field) == ("refused", "scheduled_at")
    assert f"scheduled for then already: {uid}" in str(answer.reason)
    assert client.status(uid) == "scheduled"


def test_an_event_without_an_external_id_may_be_rescheduled_to_its_own_time(client: Client) -> None:
    uid = client.schedule(scheduled_at=SOON)
    assert moved(client, uid, SOON) != uid


@pytest.mark.parametrize("after", [LATER, FAR])
@pytest.mark.parametrize("ended", [False, True])
def test_a_time_at_which_an_event_has_a_twin_is_refused(client: Client, after: datetime, ended: bool) -> None:
    uid = client.schedule(scheduled_at=SOON, external_job_id="j")
    twin = client.schedule(scheduled_at=after, external_job_id="j")
    if ended:
        client.cancel(twin)
    before = [client.get(one) for one in (uid, twin)]
    [answer] = reschedule(client, uid, after)
    assert (answer.result, answer.field, answer.successor) == ("refused", "scheduled_at", None)
    assert twin in str(answer.reason)
    assert [client.get(one) for one in (uid, twin)] == before


@pytest.mark.parametrize(("offset", "named"), [(-8, "is before the first day kept"), (401, "more than 400 days ahead")])
@pytest.mark.parametrize("before", [SOON, FAR])
def test_a_time_that_cannot_be_submitted_is_refused(client: Client, offset: int, named: str, before: datetime) -> None:
    uid = client.schedule(scheduled_at=before)
    [answer] = reschedule(client, uid, NOON + timedelta(days=offset))
    assert (answer.result, answer.status, answer.field) == ("refused", "scheduled", "scheduled_at")
    assert named in str(answer.reason)
    assert client.status(uid) == "scheduled"
    assert client.totals() == {"accepted": 1}


def test_an_event_rescheduled_into_the_past_is_due_at_once(client: Client) -> None:
    uid = client.schedule(scheduled_at=SOON)
    successor = moved(client, uid, NOON - timedelta(days=1))
    assert [(lease.event_id, lease.due_at) for lease in client.claim()] == [(successor, NOON)]


def test_an_event_whose_retry_policy_is_gone_is_not_rescheduled(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name) values ('gone')")
    uid = client.schedule(scheduled_at=SOON, retry_policy="gone")
    client.rows("delete from orchestrator.retry_policy where name = 'gone'")
    [answer] = reschedule(client, uid, LATER)
    assert (answer.result, answer.field) == ("refused", "retry_policy")
    assert client.status(uid) == "scheduled"


def test_a_successor_keeps_the_expiry_unless_another_is_given(client: Client) -> None:
    expiry = LATER.isoformat()
    uid = client.schedule(expires_at=expiry)
    kept = moved(client, uid, SOON)
    assert client.get(kept)["expires_at"] == expiry
    for wrong in (None, LATER):
        [answer] = reschedule(client, kept, LATER, wrong)
        assert (answer.result, answer.field) == ("refused", "expires_at")
    later = moved(client, kept, LATER, LATER + seconds(1))
    assert client.get(later)["expires_at"] == (LATER + seconds(1)).isoformat()
    assert intact(client, [uid, kept, later])


def test_an_external_id_of_several_live_events_is_refused(client: Client) -> None:
    ids = [client.schedule(scheduled_at=at, external_job_id="j") for at in (SOON, FAR)]
    [answer] = reschedule_external(client, "j", LATER)
    assert (answer.result, answer.field) == ("refused", "external_job_id")
    assert "names 2 events" in str(answer.reason)
    client.cancel(ids[0])
    [answer] = reschedule_external(client, "j", LATER)
    assert (answer.event_id, answer.result) == (ids[1], "rescheduled")


def test_rescheduling_an_unknown_event_returns_no_row(client: Client) -> None:
    assert reschedule(client, "00000000-0000-7000-8000-000000000000", SOON) == []
    assert reschedule_external(client, "nobody", SOON) == []


def test_a_reschedule_must_name_one_event_and_a_time(client: Client) -> None:
    uid = client.schedule(external_job_id="j")
    for arguments in (f"'{uid}', now(), 'j'", "null, now()", f"'{uid}', null"):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="reschedule_event: give"):
            client.connection.execute(f"select * from orchestrator.reschedule_event({arguments})")


# Beside others


def test_rescheduling_lets_the_next_event_of_the_ordering_key_go(client: Client) -> None:
    first, second = (client.schedule(scheduled_at=NOON + seconds(n), ordering_key="k") for n in range(2))
    client.at(NOON + seconds(1))
    leases = client.claim_on()
    client.finish(results(leases, "retry", retry_after=3600))
    assert [lease.event_id for lease in leases] == [first]
    assert client.claim_on() == []
    successor = moved(client, first, SOON)
    leases = client.claim_on()
    assert [lease.event_id for lease in leases] == [second]
    client.finish(results(leases))
    assert [lease.event_id for lease in client.at(SOON).claim_on()] == [successor]


def test_two_reschedules_at_once_make_one_successor(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    first, second = connect(), connect()
    for before in (SOON, FAR):
        uid = first.schedule(scheduled_at=before)
        first.rows("begin")
        [one] = reschedule(first, uid, LATER)
        later = threads.submit(reschedule, second, uid, LATER)
        observer.wait_until_blocked(second)
        first.rows("commit")
        assert later.result(10) == [(uid, "already_rescheduled", "rescheduled", one.successor, None, None)]
        assert intact(observer, [uid])


@pytest.mark.parametrize("other", ["claim", "cancel", "submit"])
def test_a_reschedule_that_waited_for_another_operation_sees_its_effect(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor, other: str
) -> None:
    """A claim, a cancel, or a submission of the very successor is under way; the reschedule waits and then knows."""
    first, second = connect(), connect()
    uid = first.schedule(external_job_id="j")
    first.rows("begin")
    if other == "claim":
        assert len(first.claim()) == 1
    elif other == "cancel":
        first.cancel(uid)
    else:
        first.schedule(external_job_id="j", scheduled_at=SOON)
    later = threads.submit(reschedule, second, uid, SOON)
    observer.wait_until_blocked(second)
    first.rows("commit")
    [answer] = later.result(10)
    assert (answer.result, answer.status) == {
        "claim": ("in_flight", "in_flight"),
        "cancel": ("finished", "cancelled"),
        "submit": ("refused", "scheduled"),
    }[other]
    assert intact(observer, [uid])


def test_a_claim_takes_no_event_that_another_session_is_rescheduling(connect: Connect) -> None:
    first, second = connect(), connect()
    uid = first.schedule()
    first.rows("begin")
    reschedule(first, uid, SOON)
    second.rows("set lock_timeout = '1 s'")
    assert second.claim() == []
    first.rows("rollback")
    assert [lease.event_id for lease in second.claim()] == [uid]


def test_many_sessions_that_reschedule_at_once_leave_one_live_event_of_each(
    connect: Connect, threads: ThreadPoolExecutor
) -> None:
    clients = [connect() for _ in range(6)]
    clients[0].submit(*[event(external_job_id=str(n), scheduled_at=SOON) for n in range(8)])

    def work(number: int) -> set[str]:
        seen = set()
        for turn in range(12):
            at = SOON + timedelta(minutes=turn) if turn % 4 else FAR + timedelta(minutes=turn)
            if number == 5 and turn % 3 == 0:
                clients[number].rows("select orchestrator.run_maintenance(45)")
            for job in range(8):
                seen |= {answer.result for answer in reschedule_external(clients[number], str(job), at)}
        return seen

    answered = set[str]().union(*threads.map(work, range(6)))
    # finished: somebody else's reschedule came first, and made a successor after this one had looked for the name
    assert answered <= {"rescheduled", "already_rescheduled", "refused", "finished"}
    live = clients[0].rows(
        """select external_job_id, count(*) filter (where status = 'scheduled') from orchestrator.event_status
        group by 1 order by 1"""
    )
    assert live == [(str(n), 1) for n in range(8)]
    assert violations(clients[0].connection) == []
    assert clients[0].statistics()["live"] == 8


# What others are told


def test_the_outbox_tells_of_both_the_event_and_its_successor(client: Client) -> None:
    client.rows("select orchestrator.set_outbox('{scheduled,timestamp}')")
    uid = client.schedule(scheduled_at=SOON, external_job_id="j")
    client.rows("delete from orchestrator.outbox")
    successor = moved(client, uid, LATER)
    told: list[Any] = client.rows("select kind, convert_from(value, 'UTF8') from orchestrator.outbox order by kind")
    assert [(kind, json.loads(value)["id"]) for kind, value in told] == [("scheduled", successor), ("timestamp", uid)]
    assert json.loads(told[1][1])["result"] == "rescheduled"


def test_dispatchers_are_notified_of_a_successor_that_is_due_soon(connect: Connect) -> None:
    client, listener = connect(), connect()
    uid = client.schedule(scheduled_at=LATER)
    listener.rows("listen orchestrator_due")
    moved(client, uid, NOON + seconds(5))
    [told] = listener.connection.notifies(timeout=5, stop_after=1)
    assert float(told.payload) == (NOON + seconds(5)).timestamp()
