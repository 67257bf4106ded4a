"""Claiming: who gets which events, when, and for how long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.sql_client import HOST, NOON, Client, event, results, seconds


def hosts_by_lane(client: Client) -> dict[int, str]:
    """A destination for each of the 64 lanes."""
    rows = client.rows(
        """select distinct on (lane) lane, url from generate_series(1, 2000) n
        cross join lateral (values ('https://host-' || n || '.example/x')) u (url)
        cross join lateral (select orchestrator.lane_for(orchestrator.destination_name('HTTP', url))) l (lane)
        order by lane"""
    )
    assert len(rows) == 64
    return dict(rows)


def lanes(client: Client, leases: Any) -> Counter[int]:
    return Counter(
        client.column(
            "select lane from orchestrator.timer where event_id = any (%s::uuid[])", [x.event_id for x in leases]
        )
    )


# What a claim gives


def test_a_dispatchers_claim_gives_what_claim_due_events_gives(client: Client) -> None:
    client.rows(
        "select orchestrator.configure_destination('https://rate.example', p_rate_per_second => 2, p_burst => 1)"
    )
    client.rows("select orchestrator.configure_destination('https://slow.example', p_timeout => '90 s')")
    client.submit(
        *[event(external_job_id=f"plain-{n}", scheduled_at=NOON + seconds(n / 1000)) for n in range(40)],
        *[event(external_job_id=f"rate-{n}", destination="https://rate.example/x") for n in range(3)],
        event(destination="https://slow.example/x"),
        event(ordering_key="key", external_job_id="job", headers={"x": "y"}, correlation_id="c"),
        event(expires_at=(NOON + seconds(300)).isoformat(), priority=3),
        event(scheduled_at=NOON - timedelta(days=1)),
    )
    with client.connection.transaction(force_rollback=True):
        expected = {lease.event_id: lease for lease in client.claim(lookahead_s=5)}
    with client.connection.transaction(force_rollback=True):
        leases, claim = client.claim_for_dispatch(lookahead_s=5)
        again_at = client.claim_again_at()
        places: dict[object, str] = dict(client.rows("select event_id, ctid from orchestrator.timer"))
    assert claim.due_at == NOON.timestamp()
    assert claim.start_at == (again_at and again_at.timestamp())
    assert len(leases) == len(expected) == 47
    limited = 0
    for lease in leases:
        other = expected[str(lease.event_id)]
        start_at, lease_until = lease.start_at or lease.due_at, lease.lease_until or claim.lease_until
        assert (lease.attempt, lease.lane, lease.options, lease.waited) == other[1:2] + other[13:16]
        assert (lease.due_at, start_at, lease_until) == tuple(
            at.timestamp() for at in (other.due_at, other.start_at, other.lease_until)
        )
        assert lease.expires_at == (other.expires_at and other.expires_at.timestamp())
        assert lease.key == (other.ordering_key or other.external_job_id)
        for name in (
            "scheduled_at",
            "delivery_type",
            "destination",
            "headers",
            "payload",
            "correlation_id",
            "traceparent",
        ):
            assert getattr(lease, name) == getattr(other, name)
        assert lease.timer in (None, places[lease.event_id])
        limited += lease.timer is None
    assert 1 <= limited <= 4  # those whose leases were prolonged have moved
    plain = [lease.due_at for lease in leases if lease.key and lease.key.startswith("plain")]
    assert plain == sorted(plain)


def test_a_claim_by_hand_needs_no_argument_but_the_batch(client: Client) -> None:
    uid = client.schedule(external_job_id="j", headers={"X-A": "1"})
    [row] = client.rows(
        """select event_id::text, attempt, due_at, lease_until, scheduled_at, source, external_job_id, delivery_type,
          destination, headers, payload from orchestrator.claim_due_events(10)"""
    )
    assert row == (
        uid, 1, NOON, NOON + seconds(60), NOON, "tests", "j", "HTTP", f"{HOST}/hook", {"X-A": "1"}, {"n": 1},
    )  # fmt: skip
    assert client.rows("select * from orchestrator.claim_due_events(10)") == []


def test_no_event_is_claimed_before_it_is_due(client: Client) -> None:
    client.schedule(scheduled_at=NOON + seconds(1))
    assert client.claim() == []
    assert client.at(NOON + seconds(1) - timedelta(microseconds=1)).claim() == []
    assert len(client.at(NOON + seconds(1)).claim()) == 1


def test_the_lookahead_claims_what_is_due_within_it_and_leases_from_its_end(client: Client) -> None:
    for due_s in (0, 1.5, 1.6):
        client.schedule(scheduled_at=NOON + seconds(due_s))
    leases = client.claim(lookahead_s=1.5, lease_s=30)
    assert sorted(lease.due_at for lease in leases) == [NOON, NOON + seconds(1.5)]
    assert {lease.lease_until for lease in leases} == {NOON + seconds(31.5)}


def test_a_batch_takes_what_is_due_first_of_a_lane_in_its_order(client: Client) -> None:
    for due_s in (5, 3, 1, 4, 2):
        client.schedule(scheduled_at=NOON + seconds(due_s))
    client.at(NOON + seconds(10))
    assert [(lease.due_at - NOON).seconds for lease in client.claim(3)] == [1, 2, 3]
    assert [(lease.due_at - NOON).seconds for lease in client.claim(3)] == [4, 5]


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_claims_of_any_size_hand_out_every_event_once(client: Client, batch: int) -> None:
    ids = [client.schedule(destination=f"https://host-{n}.example") for n in range(50)]
    claimed = []
    while leases := client.claim(batch):
        assert len(leases) <= batch
        claimed += [lease.event_id for lease in leases]
    assert sorted(claimed) == sorted(ids)


def test_the_worker_of_a_lease_is_shown(client: Client) -> None:
    worker = client.value("select orchestrator.register_worker('ocean pod-1')")
    uid = client.schedule()
    client.claim(worker=worker)
    assert client.rows("select status, worker, lease_until from orchestrator.event_status where id = %s", uid) == [
        ("in_flight", worker, NOON + seconds(60))
    ]


def test_every_registered_worker_has_a_number_of_its_own(client: Client) -> None:
    assert len({client.value("select orchestrator.register_worker('same')") for _ in range(5)} | {0}) == 6


# Fairness


def test_a_batch_is_shared_equally_among_lanes_that_have_enough(client: Client) -> None:
    for url in list(hosts_by_lane(client).values())[:5]:
        client.schedule_many(100, destination=url)
    assert sorted(lanes(client, client.claim(52)).values()) == [10, 10, 10, 11, 11]


def test_one_lane_with_nearly_everything_does_not_hold_up_the_others(client: Client) -> None:
    flood, *others = list(hosts_by_lane(client).items())[:10]
    client.schedule_many(1000, destination=flood[1], scheduled_at=NOON - seconds(60))
    for _, url in others:
        client.schedule(destination=url)
    counted = lanes(client, client.claim(100))
    assert counted == {flood[0]: 91} | {lane: 1 for lane, _ in others}


def test_the_share_that_a_small_lane_leaves_goes_to_other_lanes(client: Client) -> None:
    small, middle, large = list(hosts_by_lane(client).items())[:3]
    client.schedule_many(2, destination=small[1])
    client.schedule_many(30, destination=middle[1])
    client.schedule_many(300, destination=large[1])
    assert lanes(client, client.claim(90)) == {small[0]: 2, middle[0]: 30, large[0]: 58}


def test_a_batch_smaller_than_the_number_of_lanes_serves_all_lanes_one_after_another(client: Client) -> None:
    for url in hosts_by_lane(client).values():
        client.schedule_many(2, destination=url)
    batches = [client.claim(8) for _ in range(16)]
    assert [len(leases) for leases in batches] == [8] * 16
    assert sorted(lanes(client, batches[0]).values()) == [1] * 8
    assert lanes(client, [lease for leases in batches for lease in leases]) == Counter(list(range(64)) * 2)


def test_no_lane_is_preferred_by_small_batches(client: Client) -> None:
    for url in list(hosts_by_lane(client).values())[:8]:
        client.schedule_many(200, destination=url)
    counted = lanes(client, [lease for _ in range(200) for lease in client.claim(4)])
    # 100 each; a deviation of 40 has a chance of about 1e-7.
    assert all(60 <= count <= 140 for count in counted.values()), counted


def test_lanes_whose_events_are_all_in_flight_do_not_use_up_a_small_batch(client: Client) -> None:
    by_lane = hosts_by_lane(client)
    for url in list(by_lane.values())[1:]:
        client.schedule(destination=url)
    assert len(client.claim(63)) == 63
    client.schedule_many(30, destination=by_lane[0])
    for _ in range(10):
        assert len(client.claim(3)) == 3


def test_a_destination_s_path_and_the_case_of_its_host_do_not_change_its_lane(client: Client) -> None:
    assert len(set(client.column(
        """select orchestrator.lane_for(orchestrator.destination_name('HTTP', url)) from unnest(
          array['https://A.example:8443/x', 'http://a.example:8443', 'https://a.EXAMPLE:8443/y?z#q']) url"""
    ))) == 1  # fmt: skip


# Leases


def test_a_lease_keeps_other_workers_away_until_it_has_run_out(client: Client) -> None:
    uid = client.schedule()
    client.claim(lease_s=30)
    assert client.at(NOON + seconds(30) - timedelta(microseconds=1)).claim() == []
    [lease] = client.at(NOON + seconds(30)).claim(lease_s=30)
    assert (lease.event_id, lease.attempt, lease.due_at) == (uid, 2, NOON)
    assert lease.lease_until == NOON + seconds(60)


def test_a_worker_that_vanishes_does_not_cost_an_event_its_delivery(client: Client) -> None:
    uid = client.schedule(max_retries=0)
    client.claim(worker=4)
    [lease] = client.at(NOON + seconds(60)).claim(worker=5)
    assert lease.attempt == 2
    client.finish(results([lease], "delivered"), worker=5)
    assert client.status(uid) == "delivered"


def test_a_failure_after_lost_leases_is_final_when_the_retries_are_spent(client: Client) -> None:
    uid = client.schedule(max_retries=0)
    client.claim()
    client.finish(results(client.at(NOON + seconds(60)).claim(), "retry"))
    assert client.status(uid) == "dead"


def test_an_event_whose_leases_all_run_out_dies_in_the_end(client: Client) -> None:
    uid = client.schedule(max_retries=1)
    given = []
    for minute in range(9):
        given += [lease.attempt for lease in client.at(NOON + seconds(60 * minute)).claim(worker=minute)]
    assert given == [1, 2, 3, 4, 5, 6, 7]
    assert client.status(uid) == "dead"
    [(attempts, reason)] = client.rows("select attempts, reason from orchestrator.dead_letters where id = %s", uid)
    assert attempts == 7
    assert "leases ran out" in reason
    [outcome] = client.get(uid)["outcomes"]
    assert (outcome["attempt"], outcome["result"], outcome["error"], outcome["started_at"]) == (7, "dead", reason, None)
    assert client.totals() == {"accepted": 1, "dead": 1}


def test_events_that_a_claim_ends_take_no_place_in_its_batch(client: Client) -> None:
    client.schedule_many(20, max_retries=0)
    for minute in range(6):
        assert len(client.at(NOON + seconds(60 * minute)).claim(20)) == 20
    ids = client.schedule_many(10)
    leases = client.at(NOON + seconds(360)).claim(10)
    assert sorted(lease.event_id for lease in leases) == sorted(ids)


def test_a_lease_that_ran_out_is_no_longer_in_flight(client: Client) -> None:
    uid = client.schedule()
    client.claim()
    assert client.status(uid) == "in_flight"
    assert client.at(NOON + seconds(60)).status(uid) == "scheduled"
    statistics = client.statistics()
    assert (statistics["in_flight"], statistics["scheduled"], statistics["backlog"]) == (0, 1, 1)


# next_due_at and backlog


def test_next_due_at_is_the_first_event_that_nobody_holds(client: Client) -> None:
    assert client.value("select orchestrator.next_due_at()") is None
    for n, due_s in enumerate((30, 10, 20)):
        client.schedule(scheduled_at=NOON + seconds(due_s), destination=f"https://host-{n}.example")
    next_due = "select orchestrator.next_due_at()"
    assert client.value(next_due) == NOON + seconds(10)
    client.at(NOON + seconds(10)).claim()
    assert client.value(next_due) == NOON + seconds(20)
    assert client.at(NOON + seconds(70)).value(next_due) == NOON + seconds(10)


def test_the_backlog_counts_events_that_are_due_and_not_leased(client: Client) -> None:
    client.schedule_many(5)
    client.schedule(scheduled_at=NOON + seconds(1))
    assert client.value("select orchestrator.backlog()") == 5
    client.claim(2)
    assert client.value("select orchestrator.backlog()") == 3


# Several at once


def test_two_sessions_claim_at_once_without_overlap_or_loss(connect: Connect, threads: ThreadPoolExecutor) -> None:
    clients = [connect() for _ in range(4)]
    ids = []
    for n in range(20):
        ids += clients[0].schedule_many(100, destination=f"https://host-{n}.example")

    def drain(client: Client) -> list[str]:
        claimed = []
        while leases := client.claim(37):
            claimed += [lease.event_id for lease in leases]
        return claimed

    shares = list(threads.map(drain, clients))
    # A claim may pass over what another has locked: whatever is left must be there for the next one.
    shares.append(drain(clients[0]))
    assert sorted(uid for share in shares for uid in share) == sorted(ids)


@pytest.mark.parametrize(
    "holding",
    [
        lambda holder: holder.claim(1),
        lambda holder: holder.rows("select * from orchestrator.timer limit 1 for update"),
        lambda holder: holder.cancel(str(holder.value("select event_id from orchestrator.timer limit 1"))),
    ],
    ids=["a claim", "a lock", "a cancel"],
)
def test_a_claim_does_not_wait_for_a_transaction_that_holds_a_timer(
    connect: Connect, holding: Callable[[Client], object]
) -> None:
    holder, other = connect(), connect()
    ids = holder.schedule_many(3)
    holder.rows("begin")
    holding(holder)
    other.rows("set lock_timeout = '1 ms'")
    claimed = [lease.event_id for lease in other.claim()]
    assert len(claimed) == 2
    holder.rows("rollback")
    assert sorted(claimed + [lease.event_id for lease in other.claim()]) == sorted(ids)


def test_a_claim_that_is_rolled_back_spends_nothing(client: Client) -> None:
    client.schedule()
    client.rows("begin")
    client.claim()
    client.rows("rollback")
    assert [lease.attempt for lease in client.claim()] == [1]


def test_a_timer_that_another_worker_claimed_meanwhile_is_not_given_twice(
    connect: Connect, threads: ThreadPoolExecutor
) -> None:
    """All want the same few rows: each claim runs into those that others are just taking."""
    clients = [connect() for _ in range(4)]
    clients[0].schedule_many(40, max_retries=100)

    def drain(client: Client) -> list[tuple[str, int]]:
        return [(lease.event_id, lease.attempt) for _ in range(50) for lease in client.claim(5)]

    given = [pair for pairs in threads.map(drain, clients) for pair in pairs]
    assert len(given) == len(set(given)) == 40


def test_attempts_of_one_event_are_never_given_twice_while_leases_run_out(
    connect: Connect, threads: ThreadPoolExecutor
) -> None:
    clients = [connect().at(None) for _ in range(4)]
    clients[0].schedule_many(20, max_retries=100, scheduled_at=NOON - timedelta(days=1))

    def churn(client: Client) -> list[tuple[str, int]]:
        return [(lease.event_id, lease.attempt) for _ in range(60) for lease in client.claim(5, lease_s=0.002)]

    given = [pair for pairs in threads.map(churn, clients) for pair in pairs]
    assert len(given) == len(set(given))
    for uid in {uid for uid, _ in given}:
        attempts = sorted(attempt for other, attempt in given if other == uid)
        assert attempts == list(range(1, len(attempts) + 1))


# Nonsense


@pytest.mark.parametrize("batch", [0, -1, 10_001, None])
def test_a_batch_out_of_range_is_an_error_that_says_so(client: Client, batch: int | None) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_batch: expected 1 to 10000"):
        client.rows("select * from orchestrator.claim_due_events(%s::integer)", batch)


@pytest.mark.parametrize(
    ("lease", "lookahead"), [("0 s", "0 s"), ("-1 s", "0 s"), (None, "0 s"), ("60 s", "-1 s"), ("60 s", None)]
)
def test_a_lease_or_lookahead_out_of_range_is_an_error_that_says_so(
    client: Client, lease: str | None, lookahead: str | None
) -> None:
    client.schedule()
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="p_lease, p_lookahead"):
        client.rows("select * from orchestrator.claim_due_events(1, 0, %s::interval, %s::interval)", lease, lookahead)
    assert [lease.attempt for lease in client.claim()] == [1]


def test_the_largest_batch_takes_ten_thousand_events(client: Client) -> None:
    client.submit(*[event() for _ in range(10_001)])
    leases = client.claim(10_000)
    assert len({lease.event_id for lease in leases}) == 10_000
    assert client.finish(results(sorted(leases))) == []
    assert len(client.claim(10_000)) == 1


def test_events_submitted_overdue_keep_their_order(client: Client) -> None:
    """All of them are due at once."""
    minutes = [n * 37 % 100 for n in range(100)]
    client.submit(*[event(external_job_id=f"{n}", scheduled_at=NOON - timedelta(minutes=n)) for n in minutes])
    leases = client.claim(60)
    assert {lease.due_at for lease in leases} == {NOON}
    times = [lease.scheduled_at for lease in leases]
    assert times == sorted(times)
