"""Cancelling: an event that nobody holds is gone, and a cancel that meets a claim knows who was first."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.sql_client import NOON, Cancel, Client, event, results, seconds


def test_a_scheduled_event_is_cancelled_and_never_claimed(client: Client) -> None:
    uid = client.schedule()
    assert client.cancel(uid) == [Cancel(uid, "cancelled", "cancelled")]
    assert client.claim() == []
    shown = client.get(uid)
    assert (shown["status"], shown["attempt"], shown["due_at"]) == ("cancelled", 0, None)
    assert [(o["attempt"], o["result"], o["started_at"]) for o in shown["outcomes"]] == [(0, "cancelled", None)]
    assert client.totals() == {"accepted": 1, "cancelled": 1}


def test_a_second_cancel_says_already_cancelled_and_changes_nothing(client: Client) -> None:
    uid = client.schedule()
    client.cancel(uid)
    before = client.get(uid)
    assert client.at(NOON + seconds(9)).cancel(uid) == [Cancel(uid, "already_cancelled", "cancelled")]
    assert client.get(uid) == before
    assert client.totals() == {"accepted": 1, "cancelled": 1}


def test_an_event_in_flight_is_not_cancelled(client: Client) -> None:
    uid = client.schedule()
    leases = client.claim()
    assert client.cancel(uid) == [Cancel(uid, "in_flight", "in_flight")]
    assert client.finish(results(leases)) == []
    assert client.outcomes(uid) == [(1, "delivered")]
    assert client.totals() == {"accepted": 1, "delivered": 1}


def test_an_event_waiting_for_its_next_attempt_is_cancelled(client: Client) -> None:
    uid = client.schedule()
    client.finish(results(client.claim(), "retry"))
    assert client.cancel(uid) == [Cancel(uid, "cancelled", "cancelled")]
    assert client.at(NOON + timedelta(hours=1)).claim() == []
    assert client.outcomes(uid) == [(1, "retried"), (1, "cancelled")]
    assert client.status(uid) == "cancelled"


def test_a_cancel_does_not_depend_on_the_clock_of_the_last_worker(client: Client) -> None:
    uid = client.schedule()
    ahead = (NOON + timedelta(hours=1)).timestamp()
    client.finish(results(client.claim(), "retry", started_at=ahead, finished_at=ahead))
    client.cancel(uid)
    assert client.status(uid) == "cancelled"
    assert [outcome["result"] for outcome in client.get(uid)["outcomes"]] == ["retried", "cancelled"]


def test_a_released_event_is_cancelled(client: Client) -> None:
    uid = client.schedule()
    client.release(client.claim())
    assert client.cancel(uid) == [Cancel(uid, "cancelled", "cancelled")]


def test_an_event_whose_lease_ran_out_is_cancelled_and_its_worker_fenced(client: Client) -> None:
    uid = client.schedule()
    leases = client.claim(worker=1)
    client.at(NOON + seconds(60))
    assert client.cancel(uid) == [Cancel(uid, "cancelled", "cancelled")]
    assert [answer.result for answer in client.finish(results(leases), worker=1)] == ["stale"]
    assert client.status(uid) == "cancelled"


@pytest.mark.parametrize(("kind", "status"), [("delivered", "delivered"), ("fail", "dead")])
def test_a_finished_event_is_not_cancelled(client: Client, kind: str, status: str) -> None:
    uid = client.schedule()
    client.finish(results(client.claim(), kind))
    assert client.cancel(uid) == [Cancel(uid, "finished", status)]
    assert client.status(uid) == status


@pytest.mark.parametrize("uid", [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), uuid.uuid4(), uuid.uuid1()])
def test_a_cancel_of_an_unknown_id_has_no_answer(client: Client, uid: uuid.UUID) -> None:
    client.schedule()
    assert client.cancel(str(uid)) == []
    assert client.get(str(uid)) is None


def test_a_cancel_of_an_unknown_id_of_a_known_instant_has_no_answer(client: Client) -> None:
    client.schedule()
    assert client.cancel(client.value("select orchestrator.random_event_id(%s)::text", NOON)) == []


def test_a_cancel_by_external_id_cancels_each_of_its_events_newest_first(client: Client) -> None:
    job = "job ü'\\"
    ids = {
        hour: client.schedule(external_job_id=job, scheduled_at=NOON + timedelta(hours=hour))
        for hour in (2, 0, 3, 1, 90)
    }
    other = client.schedule(external_job_id=job + " ")
    client.finish(results([lease for lease in client.claim() if lease.external_job_id == job]))
    leases = client.at(NOON + timedelta(hours=1)).claim()
    client.cancel(ids[3])
    assert client.cancel_external(job) == [
        Cancel(ids[90], "cancelled", "cancelled"),
        Cancel(ids[3], "already_cancelled", "cancelled"),
        Cancel(ids[2], "cancelled", "cancelled"),
        Cancel(ids[1], "in_flight", "in_flight"),
        Cancel(ids[0], "finished", "delivered"),
    ]
    assert [lease.event_id for lease in leases if lease.external_job_id == job] == [ids[1]]
    assert client.status(other) != "cancelled"


def test_a_cancel_by_an_external_id_shared_by_sources_cancels_events_of_all_sources(client: Client) -> None:
    ids = {client.schedule(external_job_id="j", source=source) for source in ("a", "b")}
    assert {answer.event_id for answer in client.cancel_external("j")} == ids


def test_a_cancel_of_an_unknown_external_id_has_no_answer(client: Client) -> None:
    client.schedule(external_job_id="j")
    assert client.cancel_external("k") == []
    assert client.cancel_external("") == []
    assert client.cancel_external("J") == []


@pytest.mark.parametrize("arguments", ["", "null, null", "gen_random_uuid(), 'j'"])
def test_a_cancel_takes_exactly_one_of_the_two_ids(client: Client, arguments: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="give either p_event_id or p_external_job_id"):
        client.connection.execute(f"select * from orchestrator.cancel_event({arguments})")


def test_answers_to_cancels_stay_right_under_a_generic_plan(client: Client) -> None:
    ids = [client.schedule(external_job_id=str(n)) for n in range(20)]
    for n, uid in enumerate(ids):
        assert (
            client.cancel(uid) if n % 2 else client.cancel_external(str(n)) == [Cancel(uid, "cancelled", "cancelled")]
        )


# Races: each waits until the other session is really blocked.


def test_a_cancel_that_waited_for_a_claim_sees_the_event_in_flight(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    claimer, canceller = connect(), connect()
    uid = claimer.schedule()
    claimer.rows("begin")
    leases = claimer.claim()
    later = threads.submit(canceller.cancel, uid)
    observer.wait_until_blocked(canceller)
    claimer.rows("commit")
    assert later.result(10) == [Cancel(uid, "in_flight", "in_flight")]
    assert claimer.finish(results(leases)) == []


def test_a_cancel_that_waited_for_a_claim_that_failed_wins(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    claimer, canceller = connect(), connect()
    uid = claimer.schedule()
    claimer.rows("begin")
    claimer.claim()
    later = threads.submit(canceller.cancel, uid)
    observer.wait_until_blocked(canceller)
    claimer.rows("rollback")
    assert later.result(10) == [Cancel(uid, "cancelled", "cancelled")]
    assert claimer.claim() == []


def test_a_claim_does_not_wait_for_a_cancel_and_finds_nothing_after_it(connect: Connect) -> None:
    claimer, canceller = connect(), connect()
    uid = claimer.schedule()
    claimer.rows("set lock_timeout = '1 ms'")
    canceller.rows("begin")
    canceller.cancel(uid)
    assert claimer.claim() == []
    canceller.rows("commit")
    assert claimer.claim() == []
    assert claimer.outcomes(uid) == [(0, "cancelled")]


@pytest.mark.parametrize(
    ("kind", "expected"), [("delivered", "finished"), ("fail", "finished"), ("retry", "cancelled")]
)
def test_a_cancel_that_waited_for_a_finish_sees_its_result(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor, kind: str, expected: str
) -> None:
    finisher, canceller = connect(), connect()
    uid = finisher.schedule()
    leases = finisher.claim()
    finisher.rows("begin")
    finisher.finish(results(leases, kind))
    later = threads.submit(canceller.cancel, uid)
    observer.wait_until_blocked(canceller)
    finisher.rows("commit")
    assert [answer.result for answer in later.result(10)] == [expected]


def test_a_finish_that_waited_for_a_cancel_is_stale(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    finisher, canceller = connect(), connect()
    uid = finisher.schedule()
    leases = finisher.claim()
    canceller.at(NOON + seconds(60)).rows("begin")
    assert [answer.result for answer in canceller.cancel(uid)] == ["cancelled"]
    later = threads.submit(finisher.finish, results(leases, "retry"))
    observer.wait_until_blocked(finisher)
    canceller.rows("commit")
    assert [answer.result for answer in later.result(10)] == ["stale"]
    assert observer.outcomes(uid) == [(1, "cancelled")]


def test_two_cancels_of_one_event_at_once_cancel_it_once(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    first, second = connect(), connect()
    uid = first.schedule()
    first.rows("begin")
    first.cancel(uid)
    later = threads.submit(second.cancel, uid)
    observer.wait_until_blocked(second)
    first.rows("commit")
    assert later.result(10) == [Cancel(uid, "already_cancelled", "cancelled")]
    assert observer.totals()["cancelled"] == 1


def test_two_cancels_of_the_same_external_id_do_not_deadlock(
    connect: Connect, observer: Client, threads: ThreadPoolExecutor
) -> None:
    blocker, first, second = connect(), connect(), connect()
    ids = sorted(
        str(answer.id) for answer in first.submit(*[event(external_job_id="j", source=str(n)) for n in range(20)])
    )
    blocker.rows("begin")
    blocker.rows("select from orchestrator.timer where event_id = %s for update", ids[10])
    cancels = []
    for canceller in (first, second):
        cancels.append(threads.submit(canceller.cancel_external, "j"))
        observer.wait_until_blocked(canceller)
    blocker.rows("rollback")
    told = [answer for cancel in cancels for answer in cancel.result(10)]
    assert sorted(answer.event_id for answer in told if answer.result == "cancelled") == ids
    assert sorted(answer.event_id for answer in told if answer.result == "already_cancelled") == ids


def test_cancels_and_claims_at_once_share_the_events_between_them(
    connect: Connect, threads: ThreadPoolExecutor
) -> None:
    claimer, canceller, other = connect(), connect(), connect()
    ids = claimer.schedule_many(200)

    def claim() -> set[str]:
        return {lease.event_id for _ in range(60) for lease in claimer.claim(5)}

    def cancel(session: Client, order: list[str]) -> set[str]:
        return {uid for uid in order for answer in session.cancel(uid) if answer.result == "cancelled"}

    claims = threads.submit(claim)
    cancels = [threads.submit(cancel, canceller, ids), threads.submit(cancel, other, ids[::-1])]
    given, first, second = claims.result(30), cancels[0].result(30), cancels[1].result(30)
    assert len(given) + len(first) + len(second) == len(given | first | second)
    given |= {lease.event_id for lease in claimer.claim()}
    assert given | first | second == set(ids)
    cancelled = claimer.column("select id::text from orchestrator.event_status where status = 'cancelled'")
    assert set(cancelled) == first | second
