"""The forecast of backlogs, against a simulation that goes through every bucket one after the other."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any, NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.databases import Databases
from tests.support.sql_client import NOON, Client, event, seconds

API = "https://api.example/hook"
NEVER = timedelta(days=365)


class Bucket(NamedTuple):
    destination: str
    at: datetime
    due: int
    starts: int
    capacity: float | None
    backlog: int
    late: int
    drained_at: datetime | None


def forecast(
    client: Client, *, bucket_s: float = 60, until_s: float = 3600, destination: str | None = None
) -> list[Bucket]:
    rows = client.rows(
        "select * from orchestrator.backlog_forecast(make_interval(secs => %s), make_interval(secs => %s), %s)",
        bucket_s,
        until_s,
        destination,
    )
    return [Bucket(*row) for row in rows]


def configure(client: Client, name: str = "api.example", rate: float | None = None) -> None:
    client.value("select orchestrator.configure_destination(%s, %s::float8)", name, rate)


def due(buckets: list[Bucket]) -> dict[str, int]:
    """Seconds from `NOON` to a bucket's beginning, and what is due in it."""
    return {f"{bucket.destination} {(bucket.at - NOON).total_seconds():g}": bucket.due for bucket in buckets}


# Against a simulation


class Destination(NamedTuple):
    """What one destination takes, from `opens` after now on, and when its events are due, in seconds from now."""

    rate: Fraction | None
    opens: timedelta
    due: list[float]


_RATES = st.none() | st.sampled_from([Fraction(1, 8), Fraction(1, 3), Fraction(1), Fraction(5, 2), Fraction(7)])
_DESTINATIONS = st.builds(
    Destination,
    _RATES,
    st.sampled_from([timedelta(0), timedelta(0), timedelta(0), seconds(7.5), seconds(60), seconds(1000), NEVER]),
    st.lists(
        st.sampled_from([0, 0.5, 1, 3, 10, 10, 10, 29.999, 60, 61.25, 119, 240]).map(lambda s: s - 10), max_size=40
    ),
)


def simulated(
    name: str, destination: Destination, now: datetime, first: datetime, size: timedelta, count: int
) -> list[Bucket]:
    """Every bucket in turn, from `first` on: what waits, and what falls due, less what may begin."""
    arrivals = Counter((max(now, now + seconds(s)) - first) // size for s in destination.due)
    opens_at = now + destination.opens
    waiting, buckets = Fraction(0), []
    for n in range(count):
        at, ends = first + n * size, first + (n + 1) * size
        open_s = Fraction((ends - min(ends, max(at, opens_at))) // timedelta(microseconds=1), 1_000_000)
        found = waiting
        if destination.rate is None:
            capacity = None if ends > opens_at else Fraction(0)
            waiting = Fraction(0) if capacity is None else found + arrivals[n]
        else:
            capacity = destination.rate * open_s
            waiting = max(Fraction(0), found + arrivals[n] - capacity)
        before, after = _whole(found), _whole(waiting)
        starts = before + arrivals[n] - after
        drained_at = None
        if after and destination.opens < NEVER:
            takes_s = 0 if destination.rate is None else float(waiting / destination.rate)
            drained_at = max(ends, opens_at) + seconds(takes_s)
        if arrivals[n] or starts:
            capacity_s = None if capacity is None else float(capacity)
            buckets.append(
                Bucket(name, at, arrivals[n], starts, capacity_s, after, min(after, arrivals[n]), drained_at)
            )
    return buckets


def _whole(amount: Fraction) -> int:
    return math.floor(amount + Fraction(1, 10**6))


@pytest.fixture(scope="module")
def shared(databases: Databases) -> Iterator[Client]:
    with databases.migrated() as url, Client(url) as client:
        client.at(NOON).keep_three_days()
        yield client


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    destinations=st.lists(_DESTINATIONS, min_size=1, max_size=3),
    past_s=st.sampled_from([0, 0, 0.25, 13.5, 59.999]),
    bucket_s=st.sampled_from([1, 7, 10, 60, 90]),
    buckets=st.integers(1, 40),
)
def test_the_forecast_is_what_a_simulation_of_every_bucket_gives(
    shared: Client, destinations: list[Destination], past_s: float, bucket_s: int, buckets: int
) -> None:
    now, size = NOON + seconds(past_s), seconds(bucket_s)
    with shared.connection.transaction(force_rollback=True):
        shared.at(now - timedelta(hours=1))
        made: list[dict[str, Any]] = []
        for n, destination in enumerate(destinations):
            configure(shared, f"h{n}.example", None if destination.rate is None else float(destination.rate))
            made += [
                event(destination=f"https://h{n}.example/", scheduled_at=now + seconds(s)) for s in destination.due
            ]
            if destination.opens == NEVER:
                shared.rows("select * from orchestrator.pause_destination(%s)", f"h{n}.example")
            elif destination.opens:
                shared.rows(
                    "update orchestrator.lane set breaker = 'open', open_until = %s where name = %s",
                    now + destination.opens,
                    f"h{n}.example",
                )
        shared.submit(*made)
        shared.at(now)
        first = shared.value("select date_bin(%s, %s, '2000-01-01 00:00:00+00')", size, now)
        until_s = (first + buckets * size - now).total_seconds()
        found = forecast(shared, bucket_s=bucket_s, until_s=until_s)
    expected = [
        bucket
        for n, destination in enumerate(destinations)
        for bucket in simulated(f"h{n}.example", destination, now, first, size, buckets)
    ]
    assert [bucket[:4] + bucket[5:7] for bucket in found] == [bucket[:4] + bucket[5:7] for bucket in expected]
    for bucket, by_model in zip(found, expected, strict=True):
        assert bucket.capacity == (None if by_model.capacity is None else pytest.approx(by_model.capacity, abs=1e-5))
        assert (bucket.drained_at is None) == (by_model.drained_at is None)
        if bucket.drained_at and by_model.drained_at:
            assert abs(bucket.drained_at - by_model.drained_at) < timedelta(milliseconds=1)


def test_events_drain_one_after_the_other_as_the_forecast_says(client: Client) -> None:
    """The fluid model against claims themselves: 300 events at noon, two a second."""
    configure(client, rate=2)
    client.schedule_many(300, destination=API)
    by_bucket = {(bucket.at - NOON).total_seconds(): bucket for bucket in forecast(client, bucket_s=10, until_s=300)}
    claimed = 0
    for n in range(2 * 300):
        claimed += len(client.at(NOON + seconds(n / 2)).claim_on(lease_s=3600))
        if (n + 1) % 20 == 0 and claimed < 300:
            bucket = by_bucket[(n + 1) / 2 - 10]
            assert abs(bucket.backlog - (300 - claimed)) <= 1
    assert claimed == 300
    assert by_bucket[0].drained_at == NOON + seconds(150)


# What counts, and where


def test_overdue_events_count_as_due_now_and_later_ones_in_their_bucket(client: Client) -> None:
    client.at(NOON - timedelta(days=1)).schedule_many(3, destination=API, scheduled_at=NOON - timedelta(hours=3))
    for after_s in (0, 59.999999, 60, 3599, 3600):
        client.schedule(destination=API, scheduled_at=NOON + seconds(after_s))
    client.at(NOON)
    assert due(forecast(client)) == {"api.example 0": 5, "api.example 60": 1, "api.example 3540": 1}


def test_buckets_begin_at_whole_multiples_of_their_size(client: Client) -> None:
    client.schedule(destination=API, scheduled_at=NOON + seconds(45))
    client.schedule(destination=API, scheduled_at=NOON + seconds(75))
    client.at(NOON + seconds(31))
    assert due(forecast(client, until_s=60)) == {"api.example 0": 1, "api.example 60": 1}


def test_a_leased_event_does_not_count_until_its_lease_runs_out(client: Client) -> None:
    client.schedule_many(5, destination=API)
    client.claim(3)
    assert due(forecast(client)) == {"api.example 0": 2}
    client.at(NOON + seconds(60))
    assert due(forecast(client)) == {"api.example 60": 5}


def test_an_event_behind_its_ordering_key_counts_when_it_is_due(client: Client) -> None:
    client.schedule_many(4, destination=API, ordering_key="k")
    client.claim_on()
    assert client.value("select count(*) from orchestrator.timer where lane < 0") >= 1
    assert due(forecast(client)) == {"api.example 0": 3}


def test_hosts_and_topics_are_told_apart(client: Client) -> None:
    client.schedule(destination=API)
    client.schedule_many(2, destination="https://api.example:8443/x")
    client.schedule_many(3, destination="orders", delivery_type="KAFKA")
    client.schedule_many(4, destination=None, delivery_type="KAFKA")
    assert due(forecast(client)) == {
        "api.example 0": 1,
        "api.example:8443 0": 2,
        "kafka: 0": 4,
        "kafka:orders 0": 3,
    }


def test_the_hosts_of_a_pattern_share_its_rate(client: Client) -> None:
    configure(client, "*.shop.example", rate=1)
    configure(client, "c.shop.example")
    for host in "abc":
        client.schedule_many(60, destination=f"https://{host}.shop.example/")
    buckets = forecast(client)
    assert due(buckets) == {"*.shop.example 0": 120, "*.shop.example 60": 0, "c.shop.example 0": 60}
    assert [(bucket.starts, bucket.backlog, bucket.late) for bucket in buckets] == [
        (60, 60, 60),
        (60, 0, 0),
        (60, 0, 0),
    ]
    for name in ("a.shop.example", "https://b.shop.example/x", "*.shop.example"):
        assert due(forecast(client, destination=name)) == {"*.shop.example 0": 120, "*.shop.example 60": 0}
    assert due(forecast(client, destination="c.shop.example")) == {"c.shop.example 0": 60}


def test_a_forecast_can_be_of_one_host_alone(client: Client) -> None:
    client.schedule(destination=API)
    client.schedule(destination="https://other.example/")
    assert due(forecast(client, destination="other.example")) == {"other.example 0": 1}
    assert forecast(client, destination="none.example") == []


@pytest.mark.parametrize("name", ["api.example", "*.example"])
def test_a_forecast_takes_account_of_a_spread_that_was_set_later(client: Client, name: str) -> None:
    client.schedule_many(600, destination=API, scheduled_at=NOON + seconds(600))
    assert due(forecast(client)) == {"api.example 600": 600}
    client.value("select orchestrator.configure_destination(%s, p_spread => '10 min')", name)
    buckets = forecast(client)
    assert [(bucket.at - NOON).total_seconds() for bucket in buckets] == [600 + 60 * n for n in range(10)]
    assert all(30 <= bucket.due <= 90 for bucket in buckets)
    assert sum(bucket.due for bucket in buckets) == 600
    # And so claims do.
    client.at(NOON + seconds(600)).claim_on()
    later = client.value("select count(*) from orchestrator.timer where due_at > %s", NOON + seconds(660))
    assert later == 600 - buckets[0].due


def test_no_event_starts_while_everything_is_paused(client: Client) -> None:
    configure(client, rate=100)
    client.schedule_many(5, destination=API)
    client.schedule_many(5, destination="https://free.example/", scheduled_at=NOON + seconds(90))
    client.rows("select * from orchestrator.pause_all()")
    assert [(bucket.starts, bucket.capacity, bucket.backlog, bucket.drained_at) for bucket in forecast(client)] == [
        (0, 0, 5, None)
    ] * 2


def test_a_rate_so_low_that_it_never_drains_is_no_error(client: Client) -> None:
    configure(client, rate=0.000001)
    client.schedule_many(5000, destination=API)
    [bucket] = forecast(client, bucket_s=86_400, until_s=604_800)[:1]
    assert (bucket.due, bucket.drained_at) == (5000, None)


def test_a_forecast_covers_a_week_of_minutes(client: Client) -> None:
    configure(client, rate=1 / 120)
    client.schedule_many(5000, destination=API)
    buckets = forecast(client, until_s=604_800)
    assert sum(bucket.starts for bucket in buckets) == pytest.approx(604_800 / 120, abs=41)
    assert buckets[-1].at < NOON + timedelta(days=7, minutes=1)


def test_a_forecast_without_due_events_is_empty(client: Client) -> None:
    assert forecast(client) == []


@pytest.mark.parametrize(
    ("bucket", "until", "complaint"),
    [
        ("0.5 s", "1 hour", "bucket: expected 1 s to 1 day, got 00:00:00.5"),
        ("0 s", "1 hour", "bucket: expected 1 s to 1 day"),
        ("-1 min", "1 hour", "bucket: expected 1 s to 1 day"),
        ("2 days", "7 days", "bucket: expected 1 s to 1 day"),
        ("1 month", "7 days", "bucket: expected 1 s to 1 day"),
        ("infinity", "7 days", "bucket: expected 1 s to 1 day, got infinity"),
        (None, "1 hour", "bucket: expected 1 s to 1 day, got null"),
        ("1 min", "0 s", "until: expected more than 0 and at most 7 days, got 00:00:00"),
        ("1 min", "8 days", "until: expected more than 0 and at most 7 days"),
        ("1 min", "infinity", "until: expected more than 0 and at most 7 days"),
        ("1 min", None, "until: expected more than 0 and at most 7 days, got null"),
        ("1 s", "7 days", "bucket: expected at most 10080 of them, got 00:00:01 in 7 days"),
    ],
)
def test_wrong_arguments_of_a_forecast_are_refused(
    client: Client, bucket: str | None, until: str | None, complaint: str
) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
        client.rows("select * from orchestrator.backlog_forecast(%s::interval, %s::interval)", bucket, until)
    assert complaint in str(refused.value)


# As one document


def document(client: Client, limit: int = 100) -> Any:
    return client.value("select orchestrator.forecast(p_limit => %s)", limit)


def test_the_document_sums_up_the_herd(client: Client) -> None:
    configure(client, rate=1)
    client.schedule_many(200, destination=API, scheduled_at=NOON + seconds(120))
    client.schedule_many(300, destination="https://free.example/", scheduled_at=NOON + seconds(120))
    client.schedule_many(10, destination="https://free.example/", scheduled_at=NOON + seconds(10))
    client.rows("set timezone = 'Asia/Kolkata'")
    found = document(client)
    at = [(NOON + seconds(60 * n)).isoformat() for n in range(7)]
    assert (found["at"], found["due"], found["late"], found["peak_at"], found["peak_due"]) == (
        at[0],
        510,
        140,
        at[2],
        500,
    )
    assert found["buckets"][:3] == [
        {"at": at[0], "due": 10, "starts": 10},
        {"at": at[2], "due": 500, "starts": 360},
        {"at": at[3], "due": 0, "starts": 60},
    ]
    limited, free = found["destinations"]
    buckets = limited.pop("buckets")
    assert limited == {
        "name": "api.example",
        "rate_per_second": 1,
        "max_parallel": None,
        "state": "ok",
        "due": 200,
        "late": 140,
        "late_from": at[2],
        "late_until": at[3],
        "latest_seconds": 140,
        "peak_at": at[2],
        "peak_due": 200,
        "peak_backlog": 140,
        "left_over": 0,
        "drained_at": (NOON + seconds(320)).isoformat(),
    }
    assert [(bucket["starts"], bucket["backlog"]) for bucket in buckets] == [(60, 140), (60, 80), (60, 20), (20, 0)]
    assert (free["name"], free["late"], free["rate_per_second"], free["drained_at"]) == ("free.example", 0, None, None)


def test_the_document_is_empty_when_nothing_is_due(client: Client) -> None:
    found = document(client)
    assert (found["due"], found["late"], found["peak_at"], found["buckets"], found["destinations"]) == (
        0,
        0,
        None,
        [],
        [],
    )


def test_the_document_names_destinations_that_stand_still(client: Client) -> None:
    client.schedule(destination=API)
    client.rows("select * from orchestrator.pause_destination('api.example')")
    [paused] = document(client)["destinations"]
    assert (paused["state"], paused["left_over"], paused["drained_at"], paused["latest_seconds"]) == (
        "paused",
        1,
        None,
        None,
    )
    client.rows("select * from orchestrator.pause_all()")
    assert document(client)["paused_at"] == NOON.isoformat()


def test_the_document_names_the_destinations_with_most_late_events(client: Client) -> None:
    by_host: dict[str, int] = defaultdict(int)
    for n in range(8):
        by_host[f"h{n}.example"] = n + 1
        client.schedule_many(n + 1, destination=f"https://h{n}.example/")
    configure(client, "h2.example", rate=0.001)
    found = document(client, limit=3)
    assert [each["name"] for each in found["destinations"]] == ["h2.example", "h7.example", "h6.example"]
    assert (found["others"], found["due"]) == (5, sum(by_host.values()))
