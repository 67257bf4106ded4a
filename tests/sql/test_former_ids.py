"""Ids by the formula of before, which had no bucket: what is kept under one keeps it, and is not kept again."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from orchestrator.events.submission import event_id
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, event, results
from tests.support.upkeep import maintain, moved, reschedule

SOON = NOON + timedelta(hours=1)
FAR = NOON + timedelta(days=50)


@pytest.fixture
def client(client: Client) -> Client:
    """On a database that programs of before may use, or have used."""
    client.rows("update orchestrator.control set former_ids_until = %s", NOON + timedelta(days=31))
    return client


def former(at: datetime, client: Client, job: str = "j") -> str:
    return str(client.value("select orchestrator.former_event_id('tests', %s, %s)", job, at))


def stage_as_before(client: Client, at: datetime, *jobs: str, key: str | None = None) -> list[Any]:
    """What a program of before does; what it is answered of those that became no new event."""
    with client.transaction():
        client.rows("select orchestrator.open_staging()")
        for n, job in enumerate(jobs or ("j",)):
            client.rows(
                """insert into pg_temp.submission
                  (n, id, scheduled_at, source, external_job_id, delivery_type, destination, payload, max_retries
                  , ordering_key)
                values (%s, %s, %s, 'tests', %s, 'HTTP', 'https://receiver.example/hook', '{"n": 1}', 3, %s)""",
                n, former(at, client, job), at, job, key,
            )  # fmt: skip
        return client.rows("select n, id::text, result from orchestrator.submit_staged()")


def test_a_new_database_looks_for_no_former_ids(databases: Any) -> None:
    with databases.migrated() as url, Client(url) as client:
        assert client.value("select former_ids_until from orchestrator.control") is None


def test_a_known_former_id_is_reproduced(client: Client) -> None:
    found = client.value(
        "select orchestrator.former_event_id('orders', 'job-1', '2026-01-31T09:00:00.123456Z'::timestamptz)::text"
    )
    assert found == "019c1347-d2fb-705e-a717-2a27dd38d28f"


@pytest.mark.parametrize("at", [SOON, FAR])
@pytest.mark.parametrize("key", [None, "client-7"])
def test_an_event_kept_under_a_former_id_makes_its_repetition_a_duplicate_with_that_id(
    client: Client, at: datetime, key: str | None
) -> None:
    uid = former(at, client)
    assert stage_as_before(client, at, key=key) == []
    again = event(scheduled_at=at, external_job_id="j", ordering_key=key)
    for state in ("scheduled", "cancelled"):
        answers = client.submit(again, event(scheduled_at=at, external_job_id="other"), again)
        assert [(a.id, a.result, a.status) for a in answers[::2]] == [(uid, "duplicate", state)] * 2
        assert answers[1].id == event_id("tests", "other", at)
        client.cancel(uid)
    assert stage_as_before(client, at, key=key) == [(0, uid, "duplicate")]
    assert client.totals()["accepted"] == 2
    assert violations(client.connection, acknowledged=[uid]) == []


@pytest.mark.parametrize("at", [SOON, FAR])
@pytest.mark.parametrize("key", [None, "client-7"])
def test_an_older_program_does_not_keep_an_event_twice(client: Client, at: datetime, key: str | None) -> None:
    uid = client.schedule(scheduled_at=at, external_job_id="j", ordering_key=key)
    assert stage_as_before(client, at, "j", "new", key=key) == [(0, uid, "duplicate")]
    assert client.status(former(at, client, "new")) == "scheduled"
    assert client.totals() == {"accepted": 2, "duplicate": 1}


@pytest.mark.parametrize("at", [SOON, FAR])
@pytest.mark.parametrize("key", [None, "client-7"])
@pytest.mark.parametrize("first", ["before", "now"])
def test_either_id_finds_the_event(client: Client, at: datetime, key: str | None, first: str) -> None:
    """A program of the other version may have told its client the other one."""
    here, other = event_id("tests", "j", at, key), former(at, client)
    client.schedule(scheduled_at=at, external_job_id="beside", ordering_key=key)
    if first == "now":
        client.schedule(scheduled_at=at, external_job_id="j", ordering_key=key)
    else:
        stage_as_before(client, at, key=key)
        here, other = other, here
    assert [client.get(uid)["id"] for uid in (here, other)] == [here] * 2
    assert client.get(former(at, client, "nobody")) is None
    assert [(answer.event_id, answer.result) for answer in client.cancel(other)] == [(here, "cancelled")]


def test_either_id_redrives_the_event(client: Client) -> None:
    uid = client.schedule(external_job_id="j")
    client.finish(results(client.claim(), "fail"))
    redriven = client.rows("select event_id::text, result from orchestrator.redrive_event(%s)", former(NOON, client))
    assert redriven == [(uid, "redriven")]


def test_another_ordering_key_makes_another_event_than_a_former_id(client: Client) -> None:
    stage_as_before(client, SOON, key="client-7")
    assert client.schedule(scheduled_at=SOON, external_job_id="j", ordering_key="client-8")
    assert client.schedule(scheduled_at=SOON, external_job_id="j")


def test_an_event_with_a_former_id_is_rescheduled_to_the_id_of_a_submission(client: Client) -> None:
    stage_as_before(client, SOON)
    uid = former(SOON, client)
    successor = moved(client, uid, FAR)
    assert successor == event_id("tests", "j", FAR)
    back = moved(client, successor, SOON)
    assert back not in (uid, event_id("tests", "j", SOON))
    [answer] = client.submit(event(scheduled_at=SOON, external_job_id="j"))
    assert (answer.id, answer.result, answer.status) == (uid, "duplicate", "rescheduled")
    assert violations(client.connection, acknowledged=[uid, successor, back]) == []


def test_an_event_with_a_current_id_may_come_back_to_a_time_that_it_had(client: Client) -> None:
    first = client.schedule(scheduled_at=SOON, external_job_id="j")
    back = moved(client, moved(client, first, FAR), SOON)
    assert (client.get(back)["scheduled_at"], client.status(first)) == (SOON.isoformat(), "rescheduled")


def test_a_time_that_an_event_with_a_former_id_has_is_refused(client: Client) -> None:
    stage_as_before(client, SOON)
    uid = client.schedule(scheduled_at=FAR, external_job_id="j")
    [answer] = reschedule(client, uid, SOON)
    assert (answer.result, answer.field) == ("refused", "scheduled_at")
    assert former(SOON, client) in str(answer.reason)


def test_older_programs_extend_the_time_in_which_former_ids_are_looked_for(client: Client) -> None:
    stage_as_before(client, FAR)
    assert client.value("select former_ids_until from orchestrator.control") >= FAR
    [answer] = client.submit(event(scheduled_at=FAR, external_job_id="j"))
    assert answer.result == "duplicate"


def test_former_ids_are_looked_for_until_the_last_of_their_days_is_gone(client: Client) -> None:
    stage_as_before(client, SOON)
    client.rows("update orchestrator.control set former_ids_until = %s", SOON)
    client.at(SOON)
    client.finish(results(client.claim()))
    for days, looked_for in ((0, True), (7, True), (9, False)):
        maintain(client.at(SOON + timedelta(days=days)))
        assert (client.value("select former_ids_until from orchestrator.control") is not None) == looked_for, days
