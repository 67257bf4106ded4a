"""Statistics: exact in sum, by whatever they are asked for, folded or not, however old."""

from __future__ import annotations

import random
from collections import Counter
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from tests.sql.conftest import Connect
from tests.support.sql_client import NOON, Client, event, results, seconds
from tests.support.upkeep import maintain, reschedule

FAR = NOON + timedelta(days=50)
ALL_TIME = (NOON - timedelta(days=100), NOON + timedelta(days=1000))


def by(
    client: Client,
    *columns: str,
    since: datetime | None = ALL_TIME[0],
    until: datetime | None = ALL_TIME[1],
    source: str | None = None,
    destination: str | None = None,
) -> list[Any]:
    return client.rows(
        "select * from orchestrator.statistics_by(%s, %s, %s, %s, %s)", since, until, list(columns), source, destination
    )


def sums(client: Client, *columns: str, **given: Any) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for _, name, _, _, value in by(client, *columns, **given):
        counted[name] += value
    return dict(counted)


def statuses(client: Client) -> dict[str, int]:
    shown: dict[str, int] = dict(client.rows("select status, count(*) from orchestrator.event_status group by 1"))
    return {name: shown.get(name, 0) for name in ("scheduled", "retrying", "in_flight")}


def live(client: Client) -> dict[str, int]:
    statistics = client.statistics()
    assert statistics["live"] == sum(statistics[name] for name in ("scheduled", "retrying", "in_flight"))
    return {name: statistics[name] for name in ("scheduled", "retrying", "in_flight")}


@pytest.mark.parametrize("seed", range(3))
def test_counts_agree_with_the_states_after_any_history(client: Client, seed: int) -> None:
    chance = random.Random(seed)
    client.rows("select orchestrator.configure_retention(60)")
    held: list[Any] = []
    ids: list[str] = []
    now = NOON
    ended: Counter[str] = Counter()

    def submit() -> None:
        answers = client.submit(
            *[
                event(
                    source=chance.choice(["air", "sea"]), destination=f"https://{chance.choice('abc')}.example/",
                    scheduled_at=chance.choice([now, now, now + seconds(20), FAR]), max_retries=chance.randrange(3),
                    expires_at=chance.choice([..., (FAR + timedelta(days=1)).isoformat()]),
                )
                for _ in range(chance.randrange(1, 9))
            ]
        )  # fmt: skip
        ids.extend(str(answer.id) for answer in answers)
        ended["accepted"] += len(answers)

    def finish() -> None:
        chance.shuffle(held)
        batch = [held.pop() for _ in range(min(len(held), 4))]
        client.finish(
            [result for lease in batch for result in results([lease], chance.choice(["delivered", "retry", "fail"]))]
        )

    def end() -> None:
        uid = chance.choice(ids)
        if chance.random() < 0.5:
            ended["cancelled"] += sum(answer.result == "cancelled" for answer in client.cancel(uid))
        else:
            [answer] = reschedule(client, uid, now + seconds(chance.randrange(1, 90)))
            if answer.result == "rescheduled":
                ids.append(str(answer.successor))
                ended["rescheduled"] += 1
                ended["accepted"] += 1

    def revive() -> None:
        ended["redriven"] += client.value("select redriven from orchestrator.redrive_dead_letters(p_limit => 2)")

    submit()
    for _ in range(60):
        now += seconds(chance.choice([0, 1, 15, 61]))
        client.at(now)
        move = chance.choice([submit, finish, end, revive, None, "claim", "claim"])
        if move == "claim":
            held.extend(client.claim_on(chance.choice([2, 50]), lookahead_s=chance.choice([0, 10])))
        elif move is None:
            client.rows("select orchestrator.run_maintenance()")
        else:
            move()  # type: ignore[operator]
        assert live(client) == statuses(client)
    totals = client.totals()
    assert {name: totals.get(name, 0) for name in ended} == dict(ended)
    now = FAR + timedelta(days=2)
    client.at(now)
    assert live(client) == statuses(client)
    maintain(client)
    assert live(client) == statuses(client)
    assert client.totals()["accepted"] == totals["accepted"]
    for columns in ([], ["minute"], ["source"], ["destination"], ["minute", "source", "destination"]):
        assert sums(client, *columns) == client.totals()


def busy(client: Client, minutes: int) -> None:
    """Some of everything in each of so many minutes."""
    for minute in range(minutes):
        client.at(NOON + timedelta(minutes=minute))
        batch = [event(source=source, destination=f"https://{host}.example/") for source in "ps" for host in "xy"]
        client.submit(*batch, event(source="p", external_job_id="one"))
        [first, second, *others] = client.claim_on()
        client.finish([*results([first], "retry"), *results([second], "fail"), *results(others, "delivered")])


def test_counts_are_grouped_by_minute_source_and_destination(client: Client) -> None:
    client.schedule_many(3, source="air", destination="https://a.example/x")
    client.schedule_many(2, source="sea", destination="https://B.example:443/y")
    client.finish(results(client.claim_on()))
    client.at(NOON + seconds(61))
    minute = NOON + timedelta(minutes=1)
    client.schedule_many(4, source="air", delivery_type="KAFKA", destination="t")
    for fold in (False, True):
        if fold:
            maintain(client)
        assert by(client, "minute", "source", "destination") == [
            (NOON, "accepted", "air", "a.example", 3),
            (NOON, "accepted", "sea", "b.example", 2),
            (NOON, "delivered", "air", "a.example", 3),
            (NOON, "delivered", "sea", "b.example", 2),
            (minute, "accepted", "air", "kafka:t", 4),
        ]
        assert by(client, "source") == [
            (None, "accepted", "air", None, 7),
            (None, "accepted", "sea", None, 2),
            (None, "delivered", "air", None, 3),
            (None, "delivered", "sea", None, 2),
        ]
        assert by(client) == [(None, "accepted", None, None, 9), (None, "delivered", None, None, 5)]
        assert by(client, "destination", source="air") == [
            (None, "accepted", None, "a.example", 3),
            (None, "accepted", None, "kafka:t", 4),
            (None, "delivered", None, "a.example", 3),
        ]
        assert by(client, destination="b.example") == [
            (None, "accepted", None, None, 2),
            (None, "delivered", None, None, 2),
        ]
        assert by(client, since=NOON + timedelta(minutes=1)) == [(None, "accepted", None, None, 4)]
        assert by(client, until=NOON + timedelta(minutes=1)) == [
            (None, "accepted", None, None, 5),
            (None, "delivered", None, None, 5),
        ]


def test_counts_are_those_of_the_last_hour_by_default(client: Client) -> None:
    client.schedule()
    client.at(NOON + timedelta(minutes=59)).schedule()
    client.at(NOON + timedelta(minutes=61, seconds=1))
    assert by(client, since=None, until=None) == [(None, "accepted", None, None, 1)]


@pytest.mark.parametrize("later", [timedelta(hours=4), timedelta(days=1), timedelta(days=9), timedelta(days=400)])
def test_old_counts_lose_detail_and_keep_their_sum(client: Client, later: timedelta) -> None:
    busy(client, 7)
    client.at(NOON + timedelta(minutes=59))
    client.schedule(source="late")
    totals = client.totals()
    maintain(client)
    detail = by(client, "source", "destination")
    client.at(NOON + later)
    for _ in range(2):
        client.rows("select orchestrator.fold_statistics(orchestrator.now())")
        assert sums(client) == totals
        assert client.totals() == totals
        minutes = {row[0] for row in by(client, "minute")}
        if later < timedelta(days=2):
            assert minutes == {NOON}
            assert by(client, "source", "destination") == detail
        elif later > timedelta(days=8):
            assert minutes == {NOON.replace(hour=0)}
            assert {(row[2], row[3]) for row in by(client, "source", "destination")} == {("", "")}


def test_hours_that_maintenance_slept_through_are_folded_all_the_same(client: Client) -> None:
    busy(client, 5)
    totals = client.totals()
    maintain(client.at(NOON + timedelta(days=9)))
    assert sums(client, "minute") == totals == client.totals()


def test_folding_again_changes_nothing(client: Client) -> None:
    busy(client, 3)
    maintain(client)
    before = client.rows("select * from orchestrator.statistic_folded order by 1, 2, 3, 4")
    for _ in range(3):
        assert client.value("select orchestrator.fold_statistics(orchestrator.now())") == 0
    assert client.rows("select * from orchestrator.statistic_folded order by 1, 2, 3, 4") == before


def test_counts_folded_in_parts_become_one_row_each(client: Client) -> None:
    for _ in range(3):
        client.schedule(source="air")
        maintain(client)
    assert client.rows("select minute, name, source, destination, value from orchestrator.statistic_folded") == [
        (NOON, "accepted", "air", "receiver.example", 3)
    ]


def test_pairs_of_source_and_destination_beyond_a_thousand_are_counted_together(client: Client) -> None:
    client.submit(*[event(destination=f"https://h{n}.example/") for n in range(1200)])
    client.schedule_many(5, destination="https://often.example/")
    maintain(client)
    rows = by(client, "destination")
    assert len(rows) == 1001
    assert sum(row[4] for row in rows) == 1205
    told = {row[3]: row[4] for row in rows}
    assert (told["often.example"], told["*"]) == (5, 201)
    assert client.totals() == {"accepted": 1205}
    client.at(NOON + timedelta(hours=5))
    maintain(client)
    assert sum(row[4] for row in by(client, "destination")) == 1205


def test_deltas_written_during_a_fold_are_not_lost(connect: Connect) -> None:
    folder, other = connect(), connect()
    other.schedule_many(3)
    folder.rows("begin")
    folder.rows("select orchestrator.fold_statistics(orchestrator.now())")
    other.schedule_many(2)
    other.finish(results(other.claim(1)))
    assert other.totals() == {"accepted": 5, "delivered": 1}
    folder.rows("commit")
    maintain(other)
    assert sums(other, "source") == other.totals() == {"accepted": 5, "delivered": 1}


def test_other_columns_and_empty_ranges_of_time_are_refused(client: Client) -> None:
    for wrong in (["hour"], ["minute", "name"], ["source; drop table event"]):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="expected minute, source and destination"):
            by(client, *wrong)
    for until in (NOON, NOON - seconds(1)):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="expected a time before until"):
            by(client, since=NOON, until=until)


def test_leases_and_retries_of_an_upgraded_database_are_counted_too(client: Client) -> None:
    """Timers of before know neither their source nor whether they were tried."""
    client.schedule_many(3)
    client.rows("update orchestrator.timer set source = null, retrying = null")
    client.finish(results(client.claim(2), "retry"))
    assert live(client) == {"scheduled": 1, "retrying": 2, "in_flight": 0}
    client.at(NOON + timedelta(hours=2))
    client.finish(results(client.claim()))
    assert live(client) == {"scheduled": 0, "retrying": 0, "in_flight": 0}
    maintain(client)
    assert by(client, "source", "destination", source="") == [
        (None, "delivered", "", "", 3),
        (None, "retried", "", "", 2),
    ]
