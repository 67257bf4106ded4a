"""What metrics ask about the state of the database."""

from __future__ import annotations

import pytest

from tests.sql.conftest import Connect
from tests.support.sql_client import HOST, NOON, Client, results, seconds, wait_for


def oldest(client: Client) -> object:
    return client.value("select orchestrator.oldest_due_at()")


def signs(client: Client) -> dict[str, float]:
    names = client.column("select unnest(proargnames) from pg_proc where proname = 'vital_signs'")
    [row] = client.rows("select * from orchestrator.vital_signs()")
    return dict(zip(names, row, strict=True))


def held(client: Client, most: int = 50) -> list[tuple[str, str, float]]:
    return client.rows("select name, reason, seconds from orchestrator.held_destinations(%s)", most)


def test_the_oldest_due_event_is_the_first_that_nobody_has_leased(client: Client) -> None:
    assert oldest(client) is None
    client.schedule(scheduled_at=NOON + seconds(10))
    client.schedule(scheduled_at=NOON + seconds(20))
    assert oldest(client) is None
    assert signs(client)["oldest_due_seconds"] == 0
    client.at(NOON + seconds(30))
    assert oldest(client) == NOON + seconds(10)
    assert signs(client)["oldest_due_seconds"] == 20
    client.claim(batch=1)
    assert oldest(client) == NOON + seconds(20)
    client.claim()
    assert oldest(client) is None


def test_an_event_whose_lease_has_run_out_is_due_again(client: Client) -> None:
    client.schedule(scheduled_at=NOON)
    client.claim()
    client.at(NOON + seconds(3600))
    assert signs(client)["oldest_due_seconds"] == 3600


@pytest.mark.parametrize(
    ("hold", "free"),
    [
        ("select orchestrator.pause_all()", "select orchestrator.resume_all()"),
        (f"select orchestrator.pause_destination('{HOST}')", f"select orchestrator.resume_destination('{HOST}')"),
    ],
)
def test_what_a_pause_holds_back_is_not_overdue(client: Client, hold: str, free: str) -> None:
    client.schedule(scheduled_at=NOON)
    client.at(NOON + seconds(60))
    client.rows(hold)
    client.claim()  # moves its timer to the lane that is paused
    assert oldest(client) is None
    client.rows(free)
    assert oldest(client) == NOON


def test_what_an_open_breaker_holds_back_is_not_overdue(client: Client) -> None:
    client.rows("select orchestrator.configure_destination(%s, p_breaker_failures => 3)", HOST)
    client.schedule(scheduled_at=NOON)
    client.rows(
        "update orchestrator.lane set breaker = 'open', opened_at = %s, open_until = %s where lane > 63",
        NOON,
        NOON + seconds(300),
    )
    client.at(NOON + seconds(60))
    assert client.claim() == []  # it may move the timer to the lane of its destination
    assert oldest(client) is None
    assert held(client) == [("receiver.example", "breaker", 60)]
    client.at(NOON + seconds(301))
    assert oldest(client) == NOON


def test_what_waits_for_its_turn_under_a_rate_is_not_overdue_unless_nobody_claims_any_more(client: Client) -> None:
    client.rows("select orchestrator.configure_destination(%s, p_rate_per_second => 1)", HOST)
    client.schedule_many(50, scheduled_at=NOON)
    client.at(NOON + seconds(10))
    leases = client.claim()
    assert 0 < len(leases) < 50
    assert oldest(client) is None
    client.at(NOON + seconds(60))
    assert oldest(client) == NOON


def test_events_that_fall_due_within_a_time_are_counted_up_to_a_bound(client: Client) -> None:
    client.schedule(scheduled_at=NOON)  # due already
    client.schedule_many(3, scheduled_at=NOON + seconds(60))
    client.schedule_many(4, scheduled_at=NOON + seconds(61), ordering_key="k")
    soon = "select orchestrator.due_soon(%s, %s)"
    assert client.value(soon, seconds(60), 100_000) == 3
    assert client.value(soon, seconds(61), 100_000) == 7
    assert client.value(soon, seconds(61), 5) == 5
    assert client.value(soon, seconds(0), 5) == 0


def test_held_destinations_are_those_paused_or_with_an_open_breaker_the_oldest_first(client: Client) -> None:
    assert held(client) == []
    client.rows("select orchestrator.pause_destination('a.example')")
    client.at(NOON + seconds(10))
    client.rows("select orchestrator.pause_destination('b.example')")
    client.at(NOON + seconds(30))
    assert held(client) == [("a.example", "paused", 30), ("b.example", "paused", 20)]
    assert held(client, 1) == [("a.example", "paused", 30)]
    client.rows("select orchestrator.resume_destination('a.example')")
    assert held(client) == [("b.example", "paused", 20)]


def test_a_pause_that_only_a_note_tells_of_holds_its_destination(client: Client, connect: Connect) -> None:
    client.rows("select orchestrator.ensure_dedicated_lane('receiver.example', true)")
    other = connect()
    with other.transaction():
        other.rows("select from orchestrator.destination for update")
        client.rows("select orchestrator.pause_destination(%s)", HOST)
        assert client.value("select count(*) from orchestrator.control_note") == 1
        assert held(client) == [("receiver.example", "paused", 0)]


def test_a_transaction_that_is_left_open_ages_the_horizon_of_vacuum(client: Client, connect: Connect) -> None:
    assert signs(client)["xmin_seconds"] < 60
    other = connect()
    with other.transaction():
        other.rows("set transaction isolation level repeatable read")
        other.rows("select count(*) from orchestrator.timer")
        first = signs(client)["xmin_transactions"]
        client.schedule_many(3)
        assert signs(client)["xmin_transactions"] > first
        wait_for(lambda: signs(client)["xmin_seconds"] > 0.2)
    wait_for(lambda: signs(client)["xmin_seconds"] < 0.2)


def test_the_size_of_the_table_of_timers_and_the_sessions_are_told(client: Client) -> None:
    client.schedule_many(100)
    found = signs(client)
    assert found["timer_bytes"] > 0
    assert found["timer_index_bytes"] > 0
    assert found["connections"] >= 1
    assert found["max_connections"] == client.value("select current_setting('max_connections')::integer")
    # Counts of the server's own, told a moment after.
    client.rows("select pg_stat_force_next_flush()")
    wait_for(lambda: signs(client)["timers"] >= 100)


def test_a_claim_says_how_many_of_its_events_had_been_leased_before_without_a_result(client: Client) -> None:
    def expired() -> int:
        lane = client.rows("select * from orchestrator.claim_for_dispatch(10, 0, '60 s', '0 s')")[-1][11]
        return lane or 0

    ids = client.schedule_many(3, scheduled_at=NOON)
    assert expired() == 0
    client.at(NOON + seconds(61))
    assert expired() == 3
    assert expired() == 0
    client.at(NOON + seconds(122))
    client.claim(batch=1)  # by somebody else
    assert expired() == 2
    lease = client.rows("select event_id::text, attempt from orchestrator.timer")
    client.rows(
        "select orchestrator.release_events(%s::uuid[], %s)", [each[0] for each in lease], [each[1] for each in lease]
    )
    assert expired() == 0, "leases that were handed back did not run out"
    assert len(ids) == 3


def test_a_failed_attempt_is_no_lease_that_ran_out(client: Client) -> None:
    client.schedule(scheduled_at=NOON, max_retries=3)
    client.finish(results(client.claim(), "retry"))
    client.at(NOON + seconds(3600))
    assert client.rows("select * from orchestrator.claim_for_dispatch(10, 0, '60 s', '0 s')")[-1][11] is None


def test_the_outbox_tells_how_many_messages_wait_and_since_when(client: Client) -> None:
    backlog = "select pending, oldest_seconds from orchestrator.outbox_backlog()"
    assert client.rows(backlog) == [(0, 0)]
    for late in (30, 10):
        client.rows("insert into orchestrator.outbox (created_at, kind) values (%s, 'dlq')", NOON - seconds(late))
    assert client.rows(backlog) == [(2, 30)]
