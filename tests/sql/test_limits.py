"""What a claim gives under limits, breakers, pauses, priorities, spreads and ordering keys."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from orchestrator.events.destination_name import destination_name
from tests.support.sql_client import HOST, NOON, Client, Lease, Result, results, seconds

NAME = HOST.removeprefix("https://")
OTHER = "https://other.example/hook"


def configure(client: Client, name: str = NAME, **given: Any) -> None:
    given["p_name"] = name
    arguments = ", ".join(f"{key} => %({key})s" for key in given)
    client.connection.execute(f"select orchestrator.configure_destination({arguments})".encode(), given)


def lane(client: Client, name: str = NAME) -> Any:
    [row] = client.rows("select breaker, openings, held_by, parallel_now from orchestrator.lane where name = %s", name)
    return row


def again_at(client: Client) -> float | None:
    text: str = client.value("select current_setting('orchestrator.claim_again_at')")
    return float(text) if text else None


def start_at(client: Client, count: int, **given: Any) -> list[timedelta]:
    """When each of a claim's attempts may start, from `NOON`."""
    rows = client.rows(
        "select start_at from orchestrator.claim_due_events(%s, p_lookahead => %s) order by 1",
        count,
        given.get("lookahead", timedelta(0)),
    )
    return [at - NOON for (at,) in rows]


def fail(client: Client, leases: list[Lease], at: datetime, status_code: int | None = 503) -> None:
    moment = at.timestamp()
    client.finish(results(leases, "retry", status_code=status_code, started_at=moment, finished_at=moment))


# Names


@pytest.mark.parametrize(
    ("kind", "destination", "name"),
    [
        ("HTTP", "https://Hooks.Example.com:443/a:443?b#c", "hooks.example.com"),
        ("HTTP", "http://hooks.example.com:443", "hooks.example.com:443"),
        ("HTTP", "http://a.example:80?x", "a.example"),
        ("HTTP", "https://a.example:8080/", "a.example:8080"),
        ("HTTP", "http://[::1]:80/x", "[::1]"),
        ("HTTP", "http://Kafka:9092/connectors", "kafka.:9092"),
        ("HTTP", "http://kafka/connectors", "kafka"),
        ("KAFKA", "Orders", "kafka:Orders"),
        ("KAFKA", None, "kafka:"),
    ],
)
def test_a_destination_has_one_name_in_the_database_and_in_dispatchers(
    client: Client, kind: str, destination: str | None, name: str
) -> None:
    assert client.value("select orchestrator.destination_name(%s, %s)", kind, destination) == name
    assert destination_name(kind, destination) == name


# Rates


def test_a_rate_gives_its_burst_at_once_and_then_a_slot_each_interval(client: Client) -> None:
    configure(client, p_rate_per_second=10, p_burst=3)
    client.schedule_many(20)
    assert start_at(client, 20) == [timedelta(0)] * 3
    assert start_at(client, 20) == []
    assert start_at(client.at(NOON + seconds(0.25)), 20) == [seconds(0.25)] * 2
    assert start_at(client.at(NOON + seconds(10)), 20) == [seconds(10)] * 3


def test_a_claim_with_a_lookahead_takes_the_slots_of_that_time(client: Client) -> None:
    configure(client, p_rate_per_second=10)
    client.schedule_many(20)
    assert start_at(client, 20, lookahead=seconds(0.5)) == [seconds(n / 10) for n in range(6)]
    assert again_at(client) == pytest.approx((NOON + seconds(0.35)).timestamp())
    assert start_at(client.at(NOON + seconds(0.35)), 20, lookahead=seconds(0.5)) == [
        seconds(0.6),
        seconds(0.7),
        seconds(0.8),
    ]


def test_no_slot_is_spent_on_an_event_that_is_not_due(client: Client) -> None:
    configure(client, p_rate_per_second=1)
    client.schedule(scheduled_at=NOON + seconds(5))
    assert start_at(client, 5, lookahead=seconds(10)) == []
    assert again_at(client) == pytest.approx((NOON + seconds(4.95)).timestamp())
    client.schedule()
    assert start_at(client, 5, lookahead=seconds(10)) == [timedelta(0)]


def test_a_burst_of_more_than_a_month_of_the_rate_is_refused(client: Client) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="burst: expected no more than 30 days of the rate"):
        configure(client, p_rate_per_second=1e-6, p_burst=1_000_000)


def test_a_long_lookahead_gives_each_slot_once(client: Client) -> None:
    configure(client, p_rate_per_second=1)
    client.schedule_many(200)
    given = [at for _ in range(3) for at in start_at(client, 50, lookahead=seconds(60))]
    assert given == [seconds(n) for n in range(11)]


def test_other_lanes_are_not_held_back_by_a_rate(client: Client) -> None:
    configure(client, p_rate_per_second=1)
    client.schedule_many(50)
    client.schedule_many(50, destination=OTHER)
    assert len(client.claim(100)) == 51


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_rate_survives_a_step_of_the_clock(client: Client, hours: int) -> None:
    configure(client, p_rate_per_second=10, p_burst=5)
    client.at(NOON - timedelta(hours=2)).schedule_many(100)
    client.rows("update orchestrator.timer set due_at = %s", NOON - timedelta(hours=2))
    assert len(client.at(NOON).claim(100)) == 5
    client.at(NOON + timedelta(hours=hours))
    assert len(client.claim(100)) == 5
    assert client.claim(100) == []


# Bounds


def test_a_bound_counts_what_is_under_way_in_all_workers(client: Client) -> None:
    configure(client, p_max_parallel=4)
    client.schedule_many(10)
    first, second = client.claim(3, worker=1), client.claim(10, worker=2)
    assert (len(first), len(second)) == (3, 1)
    assert client.claim(10, worker=3) == []
    client.finish(results(first[:2]), worker=1)
    assert len(client.claim(10, worker=3)) == 2
    client.release(second)
    assert len(client.claim(10, worker=3)) == 1


def test_a_bound_heals_when_the_leases_of_a_dead_worker_run_out(client: Client) -> None:
    configure(client, p_max_parallel=4)
    client.schedule_many(10)
    assert len(client.claim(10, lease_s=30)) == 4
    assert client.at(NOON + seconds(29)).claim(10) == []
    assert len(client.at(NOON + seconds(30)).claim(10)) == 4


def test_the_default_bound_holds_for_destinations_without_a_bound(client: Client) -> None:
    configure(client, p_timeout="3 s")
    client.schedule_many(10)
    client.schedule_many(10, destination=OTHER)
    rows = client.rows("select lane from orchestrator.claim_due_events(100, p_max_parallel => 2)")
    assert sorted(row[0] > 63 for row in rows) == [False] * 10 + [True] * 2


def test_an_adaptive_bound_shrinks_by_refusals_and_grows_by_successes(client: Client) -> None:
    configure(client, p_max_parallel=10, p_adaptive=True, p_breaker_failures=1000)
    client.schedule_many(200)
    leases = client.claim(100)
    assert len(leases) == 10
    fail(client, leases, NOON, 429)
    assert lane(client)[3] == pytest.approx(7)
    client.at(NOON + seconds(0.5))
    leases = client.claim(100)
    assert len(leases) == 7
    client.finish(results(leases))
    assert lane(client)[3] == pytest.approx(8)


# Breakers


def opened(client: Client, **given: Any) -> None:
    if given:
        configure(client, **given)
    client.schedule_many(40)
    fail(client, client.claim(10), NOON)
    assert lane(client)[:2] == ("open", 1)
    assert client.claim() == [], "all have moved to the destination's own lane"


def test_ten_failures_in_a_row_open_the_breaker_of_a_destination_never_configured(client: Client) -> None:
    opened(client)
    client.schedule(destination=OTHER)
    assert [lease.destination for lease in client.claim()] == [OTHER]
    assert client.claim() == []
    assert again_at(client) == pytest.approx((NOON + seconds(5)).timestamp())
    attempts = client.column("select attempt from orchestrator.timer")
    assert attempts.count(None) == 30, "those that wait spend no attempt"


def test_a_finish_of_the_version_before_that_waited_for_the_migration_counts_its_failures(client: Client) -> None:
    """Its text goes on with the names that its functions had."""
    ids = client.schedule_many(3)
    shared = client.value("select min(lane) from orchestrator.timer")
    lanes = client.value("select orchestrator.watch_lanes(%s, %s::uuid[])", [shared, 99, shared], ids)
    assert lanes[1] == 99
    assert lanes[0] == lanes[2] > 63
    moment = NOON.timestamp()
    given = [[lanes[0]] * 10, [False] * 10, [500] * 10, [moment] * 10, [moment] * 10]
    client.value("select orchestrator.note_results(%s, %s, %s, %s::float8[], %s::float8[])", *given)
    assert client.value("select breaker from orchestrator.lane where lane = %s", lanes[0]) == "open"


def test_an_open_breaker_tries_one_event_and_closes_when_that_is_delivered(client: Client) -> None:
    opened(client)
    client.at(NOON + seconds(5))
    [tried] = client.claim()
    assert client.claim() == []
    assert lane(client)[0] == "half_open"
    at = (NOON + seconds(6)).timestamp()
    client.at(NOON + seconds(6)).finish(results([tried], started_at=at, finished_at=at))
    assert lane(client)[:2] == ("closed", 0)
    assert len(client.claim()) == 39


def test_each_failed_trial_doubles_the_cooldown_of_a_breaker_up_to_its_bound(client: Client) -> None:
    opened(client, p_breaker_cooldown="5 s", p_breaker_max_cooldown="15 s", p_retry_policy="default")
    now = NOON
    for cooldown in (5, 10, 15, 15):
        now += seconds(cooldown)
        assert client.at(now - timedelta(microseconds=1)).claim() == []
        fail(client, client.at(now).claim(), now)
        assert lane(client)[0] == "open"


def test_results_of_earlier_attempts_do_not_decide_the_trial_of_a_half_open_breaker(client: Client) -> None:
    client.schedule_many(40)
    late = client.claim(2)
    fail(client, client.claim(10), NOON)
    assert client.claim() == []
    client.at(NOON + seconds(5))
    [tried] = client.claim(lease_s=30)
    client.finish(results(late[:1], started_at=NOON.timestamp(), finished_at=NOON.timestamp() + 5))
    fail(client, late[1:], NOON)
    assert lane(client)[0] == "half_open"
    fail(client, [tried], NOON + seconds(5))
    assert lane(client)[:2] == ("open", 2)


def test_a_trial_of_a_half_open_breaker_whose_worker_vanished_is_repeated(client: Client) -> None:
    opened(client)
    client.at(NOON + seconds(5)).claim(lease_s=30)
    assert client.at(NOON + seconds(34)).claim() == []
    assert len(client.at(NOON + seconds(35)).claim()) == 1


def test_a_trial_of_a_half_open_breaker_that_is_handed_back_is_repeated_at_once(client: Client) -> None:
    opened(client)
    client.release(client.at(NOON + seconds(5)).claim())
    assert len(client.claim()) == 1


def test_a_breaker_opens_when_half_of_enough_attempts_fail(client: Client) -> None:
    configure(client, p_breaker_minimum=20, p_breaker_ratio=0.5)
    client.schedule_many(100)
    at = NOON.timestamp()
    for n in range(9):
        pair = client.claim(2)
        client.finish(
            [
                Result(pair[0].event_id, 1, "retry", 500, at, at + n),
                Result(pair[1].event_id, 1, "delivered", 200, at, at + n),
            ]
        )
    assert lane(client)[0] == "closed"
    pair = client.claim(2)
    client.finish(
        [Result(pair[0].event_id, 1, "retry", 500, at, at), Result(pair[1].event_id, 1, "delivered", 200, at, at)]
    )
    assert lane(client)[0] == "open"


def test_refusals_of_the_event_itself_do_not_open_a_breaker(client: Client) -> None:
    configure(client)
    client.schedule_many(50)
    client.finish(results(client.claim(50), "fail", status_code=404))
    assert lane(client)[0] == "closed"


def test_a_clock_set_back_does_not_prolong_a_cooldown(client: Client) -> None:
    opened(client)
    client.rows("update orchestrator.timer set due_at = due_at - interval '2 hours'")
    assert len(client.at(NOON - timedelta(hours=1)).claim()) == 1


# Lanes


def test_waiting_events_move_to_the_lane_of_their_destination(client: Client) -> None:
    ids = client.schedule_many(30)
    client.schedule_many(5, destination=OTHER)
    configure(client, p_rate_per_second=1000, p_burst=4)
    for _ in range(3):
        client.claim(100)
    assert (
        client.value("select count(*) from orchestrator.timer where event_id = any (%s::uuid[]) and attempt > 0", ids)
        == 4
    )
    client.rows("select orchestrator.run_maintenance()")
    assert client.value("select rerouted_by is null from orchestrator.control")
    client.rows("select orchestrator.delete_destination(%s)", NAME)
    assert len(client.at(NOON + seconds(1)).claim(100)) == 26


def test_maintenance_moves_events_that_no_claim_has_visited_and_removes_empty_lanes(client: Client) -> None:
    client.schedule_many(30, scheduled_at=NOON + seconds(3600))
    configure(client, "*.example", p_max_parallel=3)
    assert client.value("select orchestrator.run_maintenance()")["timers_moved"] == 30
    assert client.column("select distinct lane > 63 from orchestrator.timer") == [True]
    client.rows("select orchestrator.delete_destination('*.example')")
    assert client.value("select orchestrator.run_maintenance()")["timers_moved"] == 30
    client.rows("select orchestrator.delete_destination('*.example')")
    client.rows("select orchestrator.run_maintenance()")
    assert client.value("select count(*) from orchestrator.lane") == 64


def test_an_exact_name_beats_patterns_and_the_closest_pattern_beats_others(client: Client) -> None:
    for name in ("*.example", "*r.example", NAME):
        configure(client, name, p_max_parallel=5)
    client.schedule()
    client.schedule(destination=OTHER)
    client.schedule(destination="https://else.example")
    found = client.column("select l.name from orchestrator.timer t join orchestrator.lane l using (lane) order by 1")
    assert sorted(found) == ["*.example", "*r.example", NAME]


def test_an_unconfigured_destination_is_forgotten_when_it_has_recovered(client: Client) -> None:
    client.schedule_many(3)
    leases = client.claim()
    fail(client, leases[:1], NOON)
    assert client.column("select name from orchestrator.destination") == [NAME]
    client.at(NOON + seconds(599)).rows("select orchestrator.run_maintenance()")
    assert client.column("select name from orchestrator.destination") == [NAME]
    client.at(NOON + seconds(601)).rows("select orchestrator.run_maintenance()")
    assert client.column("select name from orchestrator.destination") == []
    assert len(client.claim()) == 3


def lane_mate(client: Client) -> str:
    """Another destination in the shared lane of NAME."""
    return next(
        f"https://twin-{n}.example"
        for n in range(10_000)
        if client.value("select orchestrator.lane_for(%s) = orchestrator.lane_for(%s)", f"twin-{n}.example", NAME)
    )


@pytest.mark.parametrize(
    ("backlog", "others", "batch", "served"),
    [(900, 3, 100, 3), (1500, 300, 1000, 250)],
    ids=["all", "a quarter of the claim"],
)
def test_a_lane_mate_of_a_destination_with_a_great_backlog_is_served_at_once(
    client: Client, backlog: int, others: int, batch: int, served: int
) -> None:
    """Both in one shared lane: the other's events are the youngest that are due."""
    twin = lane_mate(client)
    client.schedule_many(backlog, scheduled_at=NOON - seconds(60))
    client.at(NOON).schedule_many(others, destination=twin)
    client.at(NOON + seconds(1))
    assert [lease.destination for lease in client.claim(batch)].count(twin) == served


def test_a_claim_that_moves_timers_to_their_dedicated_lane_goes_on_to_those_behind_them(client: Client) -> None:
    twin = lane_mate(client)
    client.schedule_many(100)
    client.at(NOON + seconds(0.1)).schedule_many(5, destination=twin)
    configure(client, p_rate_per_second=1)
    assert [lease.destination for lease in client.claim(20)].count(twin) == 5


def test_the_lane_mates_of_a_flood_do_not_wait_for_those_of_them_that_are_under_way(client: Client) -> None:
    twin = lane_mate(client)
    client.at(NOON - seconds(60)).schedule_many(900, scheduled_at=NOON - seconds(60))
    client.at(NOON).schedule_many(100, destination=twin)
    client.at(NOON + seconds(1))
    for _ in range(4):
        assert [lease.destination for lease in client.claim(100)].count(twin) == 25


# Pauses


def test_no_event_is_claimed_while_everything_is_paused(client: Client) -> None:
    client.schedule()
    client.rows("select orchestrator.pause_all()")
    assert client.claim() == []
    client.at(NOON + seconds(2)).rows("select orchestrator.resume_all()")
    [(waited,)] = client.rows("select waited from orchestrator.claim_due_events(1)")
    assert waited == {"pause": 2000}


def test_a_paused_destination_waits_and_other_destinations_do_not(client: Client) -> None:
    client.schedule()
    client.schedule(destination=OTHER)
    client.rows("select orchestrator.pause_destination(%s)", NAME)
    assert [lease.destination for lease in client.claim()] == [OTHER]
    client.at(NOON + seconds(3)).rows("select orchestrator.resume_destination(%s)", NAME)
    [(waited,)] = client.rows("select waited from orchestrator.claim_due_events(1)")
    assert waited == {"pause": 3000}


def test_an_outcome_says_why_its_event_waited(client: Client) -> None:
    configure(client, p_rate_per_second=1)
    uid = client.schedule_many(2)[1]
    client.claim()
    [row] = client.at(NOON + seconds(1)).rows(
        "select event_id, attempt, waited::text from orchestrator.claim_due_events(5)"
    )
    client.rows(
        """select orchestrator.finish_events(array[%s], array[%s], '{delivered}', p_claimed_at => array[%s],
        p_waited => array[%s])""",
        row[0], row[1], (NOON + seconds(1)).timestamp(), row[2],
    )  # fmt: skip
    [outcome] = client.get(str(row[0]))["outcomes"]
    assert (outcome["waited"], outcome["claimed_at"]) == ({"rate": 1000}, (NOON + seconds(1)).isoformat())
    assert uid


# Priorities and spreads


def test_higher_priorities_go_first_within_a_lane(client: Client) -> None:
    for priority in (0, -3, 9, 0, 4):
        client.schedule(priority=priority)
    given = [lease.event_id for _ in range(5) for lease in client.claim(1)]
    shown: dict[str, int] = dict(client.rows("select id::text, coalesce(priority, 0) from orchestrator.event"))
    assert [shown[uid] for uid in given] == [9, 4, 0, 0, -3]


def test_a_priority_takes_no_share_from_other_lanes(client: Client) -> None:
    client.schedule_many(50, priority=9)
    client.schedule_many(50, destination=OTHER)
    taken = [lease.destination for lease in client.claim(20)]
    assert taken.count(OTHER) == 10


def test_an_event_s_spread_shifts_it_alike_each_time_and_never_back(client: Client) -> None:
    uid = client.schedule(external_job_id="a", spread_seconds=100)
    shift = client.value("select due_at - scheduled_at from orchestrator.timer")
    assert timedelta(0) <= shift < timedelta(seconds=100)
    client.cancel(uid)
    client.rows("delete from orchestrator.event")
    client.schedule(external_job_id="a", spread_seconds=100)
    assert client.value("select due_at - scheduled_at from orchestrator.timer") == shift


@pytest.mark.parametrize("before", [True, False])
def test_a_destination_s_spread_holds_for_earlier_and_later_events(client: Client, before: bool) -> None:
    if before:
        client.schedule_many(40)
    configure(client, p_spread="100 s")
    if not before:
        client.schedule_many(40)
    assert len(client.claim(100) + client.claim(100)) < 5
    due = client.column("select due_at - scheduled_at from orchestrator.timer order by 1")
    assert due[-1] > seconds(60)
    assert due[0] < seconds(40)
    assert len(client.at(NOON + seconds(100)).claim(100)) >= 35


# Ordering keys


def test_events_of_a_key_go_one_at_a_time_in_order_wherever_they_go(client: Client) -> None:
    ids = [
        client.schedule(ordering_key="k", scheduled_at=NOON - seconds(n), destination=[HOST, OTHER][n % 2], priority=n)
        for n in range(6)
    ][::-1]
    given = []
    for _ in range(6):
        [lease] = client.claim()
        assert client.claim() == []
        given.append(lease.event_id)
        client.finish(results([lease]))
    assert given == ids


def test_a_failed_event_holds_back_the_later_events_of_its_key(client: Client) -> None:
    first, second = (client.schedule(ordering_key="k", scheduled_at=NOON - seconds(2 - n)) for n in range(2))
    [lease] = client.claim()
    fail(client, [lease], NOON)
    assert [each.event_id for each in client.at(NOON + seconds(60)).claim()] == [first]
    assert second != first


def test_an_earlier_event_submitted_while_a_later_one_is_in_flight_waits_for_it(client: Client) -> None:
    client.schedule(ordering_key="k")
    [lease] = client.claim()
    earlier = client.schedule(ordering_key="k", scheduled_at=NOON - seconds(60))
    assert client.claim() == []
    fail(client, [lease], NOON)
    assert [each.event_id for each in client.claim()] == [earlier]


@pytest.mark.parametrize("end", ["cancel", "fail", "lost"])
def test_the_next_event_of_a_key_goes_on_however_the_first_ends(client: Client, end: str) -> None:
    first = client.schedule(ordering_key="k", scheduled_at=NOON - seconds(1), max_retries=0)
    second = client.schedule(ordering_key="k")
    leases = client.claim()
    if end == "cancel":
        client.release(leases)
        assert client.cancel(first)[0].result == "cancelled"
    elif end == "fail":
        client.finish(results(leases, "fail"))
    else:
        for minute in range(1, 7):
            client.at(NOON + seconds(60 * minute)).claim()
    assert [each.event_id for each in client.claim()] == [second]


def test_a_dead_event_blocks_its_key_if_its_retry_policy_says_so(client: Client) -> None:
    client.rows("insert into orchestrator.retry_policy (name, dead_blocks) values ('strict', true)")
    first = client.schedule(ordering_key="k", scheduled_at=NOON - seconds(1), retry_policy="strict")
    second = client.schedule(ordering_key="k", retry_policy="strict")
    client.finish(results(client.claim(), "fail"))
    assert client.claim() == []
    client.rows("select orchestrator.redrive_event(%s)", first)
    [lease] = client.claim()
    assert lease.event_id == first
    client.finish(results([lease], "fail"))
    assert client.claim() == []
    assert client.value("select orchestrator.pass_dead_letter(%s)", first)
    assert [each.event_id for each in client.claim()] == [second]
