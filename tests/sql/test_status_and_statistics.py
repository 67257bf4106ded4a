"""What the database says of its events: states, histories, pages and totals."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests.support.sql_client import HOST, NOON, Client, event, results, seconds


def one_of_each(client: Client) -> dict[str, str]:
    """An event in every state, by that state; the clock ends a minute after noon."""
    ids = {"dead": client.schedule(), "delivered": client.schedule(), "retrying": client.schedule()}
    kinds = {ids["dead"]: "fail", ids["delivered"]: "delivered", ids["retrying"]: "retry"}
    for lease in client.claim():
        client.finish(results([lease], kinds[lease.event_id], error="refused", status_code=409))
    client.at(NOON + seconds(60))
    client.rows("update orchestrator.timer set due_at = %s", NOON + seconds(90))
    ids["in_flight"] = client.schedule(scheduled_at=NOON + seconds(30))
    client.claim(worker=client.value("select orchestrator.register_worker('w')"))
    ids["scheduled"] = client.schedule(scheduled_at=NOON + seconds(300))
    ids["cancelled"] = client.schedule(scheduled_at=NOON + seconds(300))
    client.cancel(ids["cancelled"])
    return ids


def test_every_state_is_shown_as_itself(client: Client) -> None:
    ids = one_of_each(client)
    shown: dict[str, str] = dict(client.rows("select id::text, status from orchestrator.event_status"))
    assert shown == {uid: status for status, uid in ids.items()}
    assert {status: client.get(uid)["status"] for status, uid in ids.items()} == {status: status for status in ids}


def test_the_view_says_when_each_event_is_due_and_which_worker_leases_it(client: Client) -> None:
    ids = one_of_each(client)
    rows = client.rows(
        """select status, attempt, due_at, lease_until, worker, last_status_code, last_error
        from orchestrator.event_status"""
    )
    assert {status: rest for status, *rest in rows} == {
        "scheduled": [0, NOON + seconds(300), None, None, None, None],
        "in_flight": [1, NOON + seconds(60), NOON + seconds(120), 1, None, None],
        "retrying": [1, NOON + seconds(90), None, None, 409, "refused"],
        "delivered": [1, None, None, None, 409, "refused"],
        "dead": [1, None, None, None, 409, "refused"],
        "cancelled": [0, None, None, None, None, None],
    }
    assert len(ids) == len(rows)


def test_an_event_without_a_timer_or_an_end_would_be_shown_as_lost(client: Client) -> None:
    ids = [client.schedule(max_retries=5), client.schedule()]
    client.finish([result for result in results(client.claim(), "retry") if result.event_id == ids[0]])
    client.rows("delete from orchestrator.timer")
    assert [client.status(uid) for uid in ids] == ["lost", "lost"]


def test_the_history_of_an_event_is_complete_and_in_order(client: Client) -> None:
    uid = client.schedule(
        external_job_id="j", headers={"X-A": "ä"}, max_retries=3, retry_policy="default", payload=[1, {"b": None}]
    )
    worker = client.value("select orchestrator.register_worker('ocean pod-7')")
    for attempt, (kind, code) in enumerate([("retry", 503), ("retry", None), ("delivered", 200)]):
        client.at(NOON + timedelta(hours=attempt))
        started = (NOON + timedelta(hours=attempt, seconds=1)).timestamp()
        client.finish(
            results(
                client.claim(worker=worker), kind, status_code=code, started_at=started, finished_at=started + 0.5,
                error=None if code == 200 else f"error {attempt}",
            ),
            worker=worker,
        )  # fmt: skip
    shown = client.get(uid)
    outcomes = shown.pop("outcomes")
    assert shown == {
        "id": uid,
        "source": "tests",
        "external_job_id": "j",
        "scheduled_at": NOON.isoformat(),
        "delivery_type": "HTTP",
        "destination": f"{HOST}/hook",
        "ordering_key": None,
        "priority": 0,
        "spread_seconds": None,
        "spread_ms": None,
        "waits_for": None,
        "payload": [1, {"b": None}],
        "headers": {"X-A": "ä"},
        "max_retries": 3,
        "retry_policy": "default",
        "expires_at": None,
        "correlation_id": None,
        "traceparent": None,
        "predecessor": None,
        "successor": None,
        "created_at": NOON.isoformat(),
        "status": "delivered",
        "attempt": 3,
        "due_at": None,
    }
    assert [(o["attempt"], o["result"], o["status_code"], o["error"], o["worker"]) for o in outcomes] == [
        (1, "retried", 503, "error 0", "ocean pod-7"),
        (2, "retried", None, "error 1", "ocean pod-7"),
        (3, "delivered", 200, None, "ocean pod-7"),
    ]
    assert outcomes[0]["started_at"] == (NOON + seconds(1)).isoformat()
    assert outcomes[0]["lateness_ms"] == 1000
    assert all(outcome["due_at"] < outcome["started_at"] < outcome["finished_at"] for outcome in outcomes)


def test_answers_are_in_utc_whatever_the_session_s_time_zone(client: Client) -> None:
    uid = client.schedule(external_job_id="j")
    client.finish(results(client.claim(), "fail"))
    in_utc = [
        client.get(uid),
        client.value("select orchestrator.events_by_external_id('j')"),
        client.value("select orchestrator.list_dead_letters()"),
    ]
    client.rows("set timezone = 'Asia/Kolkata'")
    client.rows("set datestyle = 'SQL, DMY'")
    assert in_utc == [
        client.get(uid),
        client.value("select orchestrator.events_by_external_id('j')"),
        client.value("select orchestrator.list_dead_letters()"),
    ]
    assert client.value("select orchestrator.statistics()")["at"] == NOON.isoformat()
    assert in_utc[0]["scheduled_at"] == in_utc[2]["died_at"] == NOON.isoformat()


def test_the_status_of_an_unknown_event_is_null(client: Client) -> None:
    assert client.get("00000000-0000-7000-8000-000000000000") is None
    assert client.value("select orchestrator.get_event(null)") is None


def test_two_events_of_one_millisecond_are_told_apart(client: Client) -> None:
    at = [NOON + timedelta(microseconds=n) for n in (0, 1, 999, 1000)]
    ids = [client.schedule(external_job_id="j", scheduled_at=moment) for moment in at]
    assert [client.get(uid)["scheduled_at"] for uid in ids] == [
        client.value("select to_json(%s::timestamptz)", moment) for moment in at
    ]


# Paging


def pages(client: Client, query: Any, *arguments: Any, last: Any, size: int) -> list[Any]:
    seen: list[Any] = []
    after: tuple[Any, ...] = (None, None)
    while page := client.column(query, *arguments, size, *after):
        assert len(page) <= size
        seen += page
        after = last(page[-1])
    return seen


@pytest.mark.parametrize("size", [1, 3, 100])
def test_pages_of_an_external_id_show_each_event_once_newest_first(client: Client, size: int) -> None:
    for hour in (5, 1, 3):
        for source in ("a", "b", "c"):
            client.schedule(external_job_id="j", source=source, scheduled_at=NOON + timedelta(hours=hour))
    client.schedule(external_job_id="other")
    shown = pages(
        client,
        "select orchestrator.events_by_external_id(%s, %s, %s::timestamptz, %s::uuid)",
        "j",
        last=lambda row: (row["scheduled_at"], row["id"]),
        size=size,
    )
    keys = [(row["scheduled_at"], row["id"]) for row in shown]
    assert len(keys) == 9
    assert keys == sorted(set(keys), reverse=True)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_pages_of_dead_letters_show_each_event_once_newest_first(client: Client, size: int) -> None:
    for hour in range(3):
        client.at(NOON + timedelta(hours=hour)).schedule_many(3, external_job_id=None)
        client.finish(results(client.claim(), "fail", error=f"reason {hour}"))
    shown = pages(
        client,
        "select orchestrator.list_dead_letters(%s, %s::timestamptz, %s::uuid)",
        last=lambda row: (row["died_at"], row["id"]),
        size=size,
    )
    keys = [(row["died_at"], row["id"]) for row in shown]
    assert len(keys) == 9
    assert keys == sorted(set(keys), reverse=True)
    assert {(row["reason"], row["attempts"], row["destination"]) for row in shown} == {
        (f"reason {hour}", 1, f"{HOST}/hook") for hour in range(3)
    }


def test_an_event_that_arrives_between_pages_moves_no_other_event(client: Client) -> None:
    for hour in range(4):
        client.schedule(external_job_id="j", scheduled_at=NOON + timedelta(hours=hour))
    query = "select orchestrator.events_by_external_id('j', 2, %s::timestamptz, %s::uuid)"
    first = client.column(query, None, None)
    client.schedule(external_job_id="j", scheduled_at=NOON + timedelta(hours=9))
    second = client.column(query, first[-1]["scheduled_at"], first[-1]["id"])
    hours = [NOON + timedelta(hours=hour) for hour in (3, 2, 1, 0)]
    assert [row["scheduled_at"] for row in first + second] == [moment.isoformat() for moment in hours]


def test_external_ids_are_compared_exactly(client: Client) -> None:
    jobs = ["j", "J", " j", "j ", "%", "_", "\\", "é", "e\u0301"]
    for job in jobs:
        client.schedule(external_job_id=job)
    for job in jobs:
        shown = client.column("select orchestrator.events_by_external_id(%s)", job)
        assert [row["external_job_id"] for row in shown] == [job]


# Statistics

TOTALS = (
    "accepted", "duplicate", "rejected", "delivered", "retried", "dead", "cancelled", "redriven", "rescheduled",
    "expired", "purged",
)  # fmt: skip


def counts(client: Client) -> dict[str, Any]:
    statistics: dict[str, Any] = client.statistics()
    return {name: statistics[name] for name in ("scheduled", "retrying", "in_flight", "backlog", "dead_letters")}


def test_statistics_of_an_empty_database_are_all_zero(client: Client) -> None:
    assert client.statistics() == {
        "live": 0,
        "scheduled": 0,
        "retrying": 0,
        "in_flight": 0,
        "backlog": 0,
        "oldest_due_at": None,
        "next_due_at": None,
        "dead_letters": 0,
        "paused_at": None,
        "destinations_paused": 0,
        "breakers_open": 0,
        "totals": dict.fromkeys(TOTALS, 0),
        "at": NOON.isoformat(),
    }


def test_statistics_agree_with_the_states_of_the_events(client: Client) -> None:
    one_of_each(client)
    client.release(client.claim(lookahead_s=30))
    shown: dict[str, int] = dict(client.rows("select status, count(*) from orchestrator.event_status group by 1"))
    assert shown == {"scheduled": 1, "retrying": 1, "in_flight": 1, "delivered": 1, "dead": 1, "cancelled": 1}
    assert counts(client) == {"scheduled": 1, "retrying": 1, "in_flight": 1, "backlog": 0, "dead_letters": 1}
    assert client.totals() == {"accepted": 6, "delivered": 1, "retried": 1, "dead": 1, "cancelled": 1}
    client.at(NOON + seconds(120))
    assert counts(client) == {"scheduled": 2, "retrying": 1, "in_flight": 0, "backlog": 2, "dead_letters": 1}
    shown = dict(client.rows("select status, count(*) from orchestrator.event_status group by 1"))
    assert (shown["scheduled"], shown["retrying"]) == (2, 1)


def test_statistics_show_the_oldest_due_and_the_next_due_time(client: Client) -> None:
    client.schedule(scheduled_at=NOON + seconds(60))
    assert client.statistics()["oldest_due_at"] is None
    assert client.statistics()["next_due_at"] == (NOON + seconds(60)).isoformat()
    client.schedule(scheduled_at=NOON - timedelta(days=1))
    assert client.statistics()["oldest_due_at"] == NOON.isoformat()
    client.claim()
    assert client.statistics()["oldest_due_at"] is None


def test_totals_are_exact_before_and_after_folding(client: Client) -> None:
    expected = dict.fromkeys(TOTALS, 0)
    for minute in range(5):
        client.at(NOON + timedelta(minutes=minute))
        for n in range(minute + 1):
            batch = [event(external_job_id=f"{minute}-{n}-{m}") for m in range(6)]
            client.submit(*batch)
            client.submit(batch[0])
            leases = client.claim(5)
            kinds = ["delivered", "delivered", "fail", "retry", "retry"]
            for lease, kind in zip(leases, kinds, strict=True):
                client.finish(results([lease], kind))
            held = {lease.event_id for lease in leases}
            client.cancel(
                next(uid for uid in client.column("select event_id::text from orchestrator.timer") if uid not in held)
            )
            done = {"accepted": 6, "duplicate": 1, "delivered": 2, "dead": 1, "retried": 2, "cancelled": 1}
            expected = {name: count + done.get(name, 0) for name, count in expected.items()}
        assert client.statistics()["totals"] == expected
        if minute % 2:
            folded = client.value("select orchestrator.run_maintenance()")["statistics_folded"]
            assert folded > 0
            assert client.statistics()["totals"] == expected
    client.value("select orchestrator.run_maintenance()")
    assert client.rows("select minute, name from orchestrator.statistic_folded group by 1, 2 having count(*) > 1") == []
    assert client.value("select orchestrator.run_maintenance()")["statistics_folded"] == 0
    assert client.statistics()["totals"] == expected


# The clock


def test_the_clock_can_be_set_for_a_session_or_a_transaction(client: Client) -> None:
    now = "select orchestrator.now()"
    assert client.value(now) == NOON
    with client.transaction():
        client.rows("set local orchestrator.now = '2031-05-06T07:08:09.000001Z'")
        assert client.value(now).isoformat() == "2031-05-06T07:08:09.000001+00:00"
    assert client.value(now) == NOON


def test_the_clock_runs_within_a_transaction_unless_it_is_set(client: Client) -> None:
    client.at(None)
    with client.transaction():
        first, second = client.value("select orchestrator.now()"), client.value("select orchestrator.now()")
    assert first < second
    client.rows("reset orchestrator.now")
    assert client.value("select abs(extract(epoch from orchestrator.now() - clock_timestamp())) < 1")


def test_a_clock_that_is_no_time_is_an_error(client: Client) -> None:
    client.rows("set orchestrator.now = 'half past nine'")
    with pytest.raises(psycopg.errors.InvalidDatetimeFormat):
        client.claim()


def test_answers_are_valid_json(client: Client) -> None:
    one_of_each(client)
    for text in client.column("select orchestrator.get_event(id)::text from orchestrator.event"):
        assert isinstance(json.loads(text), dict)
