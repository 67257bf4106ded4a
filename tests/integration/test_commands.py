"""Commands on the processing topic: each is carried out once and answered once, whatever happens on the way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from tests.conftest import MakeSettings
from tests.support.cutting_proxy import CuttingProxy
from tests.support.ingesting import Topic, feed, ingesting, read_to
from tests.support.sql_client import NOON, Client, results


@pytest.fixture
async def ingester(settings: MakeSettings, topic: Topic) -> AsyncIterator[None]:
    async with ingesting(settings(**topic.environ)):
        yield


async def commanded(client: Client, topic: Topic, *values: Any) -> list[dict[str, Any]]:
    """Sends commands, bytes as they are, and returns all answers so far, in order."""
    sent = [value if isinstance(value, bytes | None) else json.dumps(value).encode() for value in values]
    commands = Topic(topic.kafka, topic.commands, "")
    await read_to(client, topic.commands, await feed(commands, sent, partition=0))
    answers = client.column("select value from orchestrator.outbox where kind = 'answer' order by message")
    return [json.loads(answer) for answer in answers]


@pytest.mark.usefixtures("ingester")
async def test_a_cancel_is_carried_out_and_answered_for_each_event_it_names(client: Client, topic: Topic) -> None:
    first, second, third = client.schedule(), *(client.schedule(external_job_id="job", source=s) for s in "ab")
    by_id, by_job, again = await commanded(
        client,
        topic,
        {"id": "c1", "command": "cancel", "event_id": first},
        {"id": "c2", "command": "cancel", "external_job_id": "job"},
        {"command": "cancel", "event_id": first.upper()},
    )
    assert (by_id["id"], by_id["command"], by_id["event_id"]) == ("c1", "cancel", first)
    assert by_id["results"] == [{"event_id": first, "result": "cancelled", "status": "cancelled"}]
    assert {each["event_id"] for each in by_job["results"]} == {second, third}
    assert {each["result"] for each in by_job["results"]} == {"cancelled"}
    assert (again["id"], again["results"][0]["result"]) == (None, "already_cancelled")
    assert {client.status(each) for each in (first, second, third)} == {"cancelled"}
    keys = client.column("select key from orchestrator.outbox where kind = 'answer' order by message")
    assert keys == [first.encode(), b"job", first.encode()]


@pytest.mark.usefixtures("ingester")
async def test_a_redrive_has_a_dead_event_tried_again(client: Client, topic: Topic) -> None:
    dead, waiting = client.schedule(max_retries=0), client.schedule(scheduled_at=NOON + timedelta(days=1))
    client.rows("update orchestrator.timer set due_at = orchestrator.now() where event_id = %s", dead)
    client.finish(results(client.claim(), "fail", error="gone", started_at=0.0, finished_at=0.0))
    assert client.status(dead) == "dead"
    answers = await commanded(
        client,
        topic,
        *[{"command": "redrive", "event_id": each} for each in (dead, waiting, "01a1fc26-a899-79b6-971f-839400252e5c")],
    )
    assert [[each["result"] for each in answer["results"]] for answer in answers] == [["redriven"], ["not_dead"], []]
    assert client.status(dead) == "retrying"


@pytest.mark.usefixtures("ingester")
async def test_a_reschedule_is_carried_out_once_and_answered_with_the_successor(client: Client, topic: Topic) -> None:
    at, expires_at = NOON + timedelta(days=1, microseconds=1), NOON + timedelta(days=2)
    first, other = client.schedule(), client.schedule(external_job_id="job", scheduled_at=NOON + timedelta(hours=13))
    command = {"id": "r", "command": "reschedule", "scheduled_at": at.isoformat()}
    by_id, again, by_job, refused = await commanded(
        client,
        topic,
        command | {"event_id": first, "expires_at": expires_at.isoformat()},
        command | {"event_id": first},
        command | {"external_job_id": "job", "scheduled_at": f"{at:%Y-%m-%dt%H:%M:%S.%fz}"},
        command | {"external_job_id": "job", "scheduled_at": "2150-01-31T09:00:00Z"},
    )
    (result,) = by_id["results"]
    assert (result["event_id"], result["result"], result["status"]) == (first, "rescheduled", "rescheduled")
    successor = client.get(result["successor"])
    assert (successor["predecessor"], successor["status"]) == (first, "scheduled")
    assert datetime.fromisoformat(successor["scheduled_at"]) == at
    assert datetime.fromisoformat(successor["expires_at"]) == expires_at
    assert again["results"] == [result | {"result": "already_rescheduled"}]
    (result,) = by_job["results"]
    assert (result["event_id"], result["result"]) == (other, "rescheduled")
    (result,) = refused["results"]
    assert (result["result"], result["field"], result["successor"]) == ("refused", "scheduled_at", None)
    assert "400 days ahead" in result["reason"]
    assert client.value("select count(*) from orchestrator.reject") == 0


@pytest.mark.usefixtures("ingester")
async def test_a_command_that_is_wrong_is_answered_with_the_problem_and_kept_as_a_reject(
    client: Client, topic: Topic
) -> None:
    event_id = client.schedule()
    reschedule = {"id": "r", "command": "reschedule", "event_id": event_id, "scheduled_at": "2030-01-31T09:00:00Z"}
    wrong: list[tuple[Any, str | None, str, str]] = [
        ({"id": "w1", "command": "signal", "event_id": event_id}, "w1", "command", "cancel, redrive or reschedule"),
        ({"id": "w2", "command": "cancel"}, "w2", "event_id", "either"),
        ({"id": "w3", "command": "cancel", "event_id": event_id, "external_job_id": "x"}, "w3", "event_id", "either"),
        ({"id": "w4", "command": "cancel", "event_id": "7"}, "w4", "event_id", "UUID"),
        ({"id": "w5", "command": "cancel", "event_id": event_id, "when": "now"}, "w5", "when", "unknown field"),
        ({"id": 6, "command": "cancel", "event_id": event_id}, None, "id", "a string"),
        (reschedule | {"scheduled_at": None}, "r", "scheduled_at", "required by reschedule"),
        (reschedule | {"scheduled_at": "tomorrow"}, "r", "scheduled_at", "an RFC 3339 time with a zone"),
        (reschedule | {"scheduled_at": "2026-01-31T09:00:00"}, "r", "scheduled_at", "an RFC 3339 time with a zone"),
        (reschedule | {"scheduled_at": 1769850000}, "r", "scheduled_at", "a string"),
        (reschedule | {"scheduled_at": "9999-12-31T23:59:59-01:00"}, "r", "scheduled_at", "from 1970 to 2200"),
        (reschedule | {"expires_at": reschedule["scheduled_at"]}, "r", "expires_at", "after scheduled_at"),
        ({"id": "c", "command": "cancel", "event_id": event_id, "expires_at": "x"}, "c", "expires_at", "alone"),
        (b'{"id": "w7"', None, "body", "JSON"),
        (b"\xff", None, "body", "UTF-8"),
        (b"\x00", None, "body", "JSON"),
        ({"id": "w10", "command": "cancel", "external_job_id": "a\0b"}, "w10", "body", "u0000"),
        (None, None, "body", "without a value"),
    ]
    *answers, last = await commanded(
        client, topic, *[value for value, *_ in wrong], {"id": "right", "command": "cancel", "event_id": event_id}
    )
    for answer, (_, given, field, reason) in zip(answers, wrong, strict=True):
        assert (answer["id"], answer["problem"]["field"], answer["results"]) == (given, field, [])
        assert reason in answer["problem"]["reason"]
    assert (last["id"], last["results"][0]["result"], last["problem"]) == ("right", "cancelled", None)
    rejects = client.rows('select topic, "offset", field from orchestrator.reject order by 2')
    assert rejects == [(topic.commands, offset, field) for offset, (_, _, field, _) in enumerate(wrong)]


async def test_a_command_whose_commit_reply_is_lost_is_carried_out_and_answered_once(
    settings: MakeSettings, client: Client, topic: Topic, database_url: str
) -> None:
    event_id = client.schedule()
    async with (
        CuttingProxy(database_url) as proxy,
        ingesting(settings(DATABASE_URL=proxy.url, **topic.environ)) as running,
    ):
        proxy.cut_after("COMMIT")
        [answer] = await commanded(client, topic, {"command": "cancel", "event_id": event_id})
        assert answer["results"][0]["result"] == "cancelled"
        answers = await commanded(client, topic, {"command": "cancel", "event_id": event_id})
        assert [each["results"][0]["result"] for each in answers] == ["cancelled", "already_cancelled"]
        assert proxy.cuts == 1
        assert running.value("ingest_conflicts_total") == 0
