"""Expiry: no attempt begins from expires_at on, and the event ends as expired."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.sql.conftest import Connect
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, event, results, seconds
from tests.support.upkeep import maintain

EXPIRY = NOON + seconds(60)
MICROSECOND = timedelta(microseconds=1)


def perishable(client: Client, **changes: Any) -> str:
    return client.schedule(**{"expires_at": EXPIRY.isoformat()} | changes)


def test_a_claim_says_when_an_event_expires(client: Client) -> None:
    perishable(client)
    client.schedule()
    assert sorted(lease.expires_at is None for lease in client.claim()) == [False, True]
    client.at(EXPIRY - MICROSECOND)
    assert client.claim() == []


def test_an_event_is_claimed_until_its_expiry_and_not_after(client: Client) -> None:
    uid = perishable(client)
    leases = client.at(EXPIRY - MICROSECOND).claim()
    assert [(lease.event_id, lease.expires_at) for lease in leases] == [(uid, EXPIRY)]
    client.release(leases)
    assert client.at(EXPIRY).claim() == []
    shown = client.get(uid)
    assert (shown["status"], shown["expires_at"], shown["attempt"]) == ("expired", EXPIRY.isoformat(), 1)
    assert [(one["result"], one["attempt"], one["worker"]) for one in shown["outcomes"]] == [("expired", 1, None)]
    assert client.totals() == {"accepted": 1, "expired": 1}
    assert client.statistics()["live"] == 0
    assert client.rows("select * from orchestrator.dead_letter") == []
    assert violations(client.connection, acknowledged=[uid], finished=True) == []


def test_a_lookahead_leases_an_event_that_expires_soon_after_it_is_due(client: Client) -> None:
    """An attempt that waits for its due time must still find it alive: the lease is to be handed back."""
    uid = perishable(client, scheduled_at=NOON + seconds(5), expires_at=(NOON + seconds(6)).isoformat())
    [lease] = client.claim(lookahead_s=10)
    assert (lease.event_id, lease.expires_at) == (uid, NOON + seconds(6))


@pytest.mark.parametrize("state", ["paused", "retrying", "behind its key", "breaker"])
def test_maintenance_ends_expired_events_that_no_claim_visits(client: Client, state: str) -> None:
    changes: dict[str, Any] = {}
    if state == "paused":
        client.rows("select orchestrator.pause_all()")
    elif state == "behind its key":
        client.schedule(ordering_key="k", scheduled_at=NOON - seconds(1))
        client.claim(lease_s=3600)
        changes["ordering_key"] = "k"
    elif state == "breaker":
        client.rows("select orchestrator.configure_destination('receiver.example')")
        client.rows(
            "update orchestrator.lane set breaker = 'open', open_until = %s where lane > 63", NOON + timedelta(hours=1)
        )
    uid = perishable(client, **changes)
    if state == "retrying":
        client.finish(results(client.claim(), "retry", retry_after=3000))
    if state == "behind its key":
        assert client.claim_on() == []
    client.at(EXPIRY - MICROSECOND)
    assert "events_expired" not in maintain(client)
    client.at(EXPIRY)
    assert client.claim_on() == []
    assert client.status(uid) != "expired"
    assert maintain(client)["events_expired"] == 1
    assert client.status(uid) == "expired"
    assert client.statistics()["retrying"] == 0
    assert violations(client.connection, acknowledged=[uid]) == []


def test_an_attempt_under_way_goes_on_beyond_the_expiry(client: Client) -> None:
    uid = perishable(client)
    leases = client.claim(lease_s=300)
    client.at(EXPIRY)
    assert "events_expired" not in maintain(client)
    assert client.status(uid) == "in_flight"
    assert client.finish(results(leases)) == []
    assert client.status(uid) == "delivered"


def test_a_retry_that_comes_too_late_is_not_made(client: Client) -> None:
    uid = perishable(client, max_retries=9)
    client.finish(results(client.claim(), "retry"))
    client.at(EXPIRY + timedelta(hours=2))
    assert client.claim() == []
    assert client.outcomes(uid) == [(1, "retried"), (1, "expired")]
    assert client.totals() == {"accepted": 1, "retried": 1, "expired": 1}


def test_an_expired_event_lets_the_next_of_its_ordering_key_go(client: Client) -> None:
    perishable(client, ordering_key="k", scheduled_at=NOON - seconds(1))
    client.finish(results(client.claim_on(), "retry", retry_after=3600))
    behind = client.schedule(ordering_key="k")
    assert client.claim_on() == []
    client.at(EXPIRY)
    maintain(client)
    assert [lease.event_id for lease in client.claim_on()] == [behind]


def test_a_worker_that_vanished_does_not_make_an_expired_event_a_dead_one(client: Client) -> None:
    uid = perishable(client, max_retries=0)
    for minute in range(6):
        assert client.at(NOON + seconds(10 * minute)).claim(lease_s=10)
    client.at(EXPIRY).claim()
    assert client.outcomes(uid) == [(6, "expired")]
    assert client.rows("select * from orchestrator.dead_letter") == []


def test_an_expiry_writes_a_message_to_the_outbox(client: Client) -> None:
    client.rows("select orchestrator.set_outbox('{timestamp,dlq}')")
    perishable(client)
    maintain(client.at(EXPIRY))
    [(kind, value)] = client.rows("select kind, convert_from(value, 'UTF8')::json from orchestrator.outbox")
    assert (kind, value["result"]) == ("timestamp", "expired")


def test_many_events_expire_in_bounded_steps(client: Client) -> None:
    client.schedule_many(25, expires_at=EXPIRY.isoformat())
    client.at(EXPIRY)
    assert [client.value("select orchestrator.expire_events(10)") for _ in range(4)] == [10, 10, 5, 0]
    assert client.totals() == {"accepted": 25, "expired": 25}


def test_two_sessions_that_expire_events_at_once_end_each_once(connect: Connect) -> None:
    first, second = connect(), connect()
    first.schedule_many(6, expires_at=EXPIRY.isoformat())
    for session in (first, second):
        session.at(EXPIRY).rows("set lock_timeout = '1 s'")
    first.rows("begin")
    assert first.value("select orchestrator.expire_events(3)") == 3
    assert second.claim() == []
    first.rows("commit")
    assert first.totals() == {"accepted": 6, "expired": 6}
    assert first.value("select count(*) from orchestrator.outcome") == 6


def test_an_expiry_must_be_after_the_scheduled_time(client: Client) -> None:
    for answer in client.submit(*[event(expires_at=at.isoformat()) for at in (NOON - seconds(1), NOON)]):
        assert (answer.result, answer.field) == ("refused", "expires_at")
        assert f"expected a time after scheduled_at {NOON.isoformat()}" in str(answer.reason)


def test_an_expiry_that_is_no_time_is_refused(client: Client) -> None:
    wrong = ["tomorrow", "2030-01-31T08:00:00", "2030-13-31T08:00:00Z", 5, {}, ""]
    answers = client.submit(*[event(expires_at=each) for each in wrong])
    assert [(answer.result, answer.field) for answer in answers] == [("refused", "expires_at")] * len(wrong)


def test_schedule_event_takes_an_expiry(client: Client) -> None:
    uid = client.value(
        "select orchestrator.schedule_event('https://receiver.example', '1', p_expires_at => %s)::text", EXPIRY
    )
    assert client.get(uid)["expires_at"] == EXPIRY.isoformat()


def test_an_expired_event_may_be_cancelled_until_it_has_ended(client: Client) -> None:
    uid = perishable(client)
    client.at(EXPIRY)
    assert [answer.result for answer in client.cancel(uid)] == ["cancelled"]
    assert "events_expired" not in maintain(client)
