"""Events that expire: no attempt begins then or later, whichever way they go, and however they came."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from orchestrator.dispatch.attempt import DELIVERED, Attempted
from orchestrator.dispatch.http.sender import Delivery
from tests.conftest import MakeSettings
from tests.integration.api_support import assert_problem, fields, submission, tomorrow
from tests.integration.cli_support import Call, answer, refused, told
from tests.support.brokers import Kafka
from tests.support.dispatching import dispatching, finished, soon, statuses
from tests.support.ingesting import Topic, feed, ingesting, read_to
from tests.support.ingesting import submission as record
from tests.support.receiver import Answer, Receiver
from tests.support.sql_client import HOST, Client
from tests.support.topics import arrived, headers
from tests.support.waiting import eventually


class Gate:
    """A sender that keeps its one connection busy until it is opened."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.opened = asyncio.Event()

    async def send(self, delivery: Delivery) -> Attempted:
        self.sent.append(delivery.event_id)
        await self.opened.wait()
        return Attempted(DELIVERED, 204)


# Delivering


async def test_an_event_that_expires_while_it_waits_for_a_connection_is_not_attempted(
    settings: MakeSettings, client: Client
) -> None:
    gate = Gate()
    async with dispatching(settings(HTTP_MAX_CONNECTIONS="1"), gate) as running:
        first = client.schedule(scheduled_at=soon(0))
        await eventually(lambda: gate.sent == [first])
        expires_at = soon(0.3)
        late = client.schedule(
            destination=f"{HOST}:1/", scheduled_at=soon(0), expires_at=expires_at.isoformat(), max_retries=9
        )
        other = client.schedule(destination=f"{HOST}:2/", scheduled_at=soon(0), expires_at=soon(60).isoformat())
        await eventually(lambda: running.value("events_held") == 2 and datetime.now(UTC) > expires_at)
        gate.opened.set()
        await finished(client, [first, late, other])
    assert statuses(client, [first, other]) == {"delivered": 2}
    assert client.status(late) == "expired"
    assert sorted(gate.sent) == sorted([first, other])
    assert running.value("events_released_total") == 1
    assert client.get(late)["outcomes"][-1]["result"] == "expired"


@pytest.mark.parametrize("kind", ["HTTP", "KAFKA"])
async def test_a_slot_under_a_rate_that_comes_after_the_expiry_is_not_used(
    settings: MakeSettings, client: Client, receiver: Receiver, kafka: Kafka, kind: str
) -> None:
    topic = kafka.unique("expiry")
    await kafka.create_topic(topic)
    destination = receiver.url("/hook") if kind == "HTTP" else topic
    name = f"127.0.0.1:{receiver.port}" if kind == "HTTP" else f"kafka:{topic}"
    client.rows("select orchestrator.configure_destination(%s, p_rate_per_second => 2)", name)
    async with dispatching(settings(**kafka.environ)) as running:
        ids = client.schedule_many(
            3, delivery_type=kind, destination=destination, scheduled_at=soon(0), expires_at=soon(0.3).isoformat()
        )
        await finished(client, ids)
    assert statuses(client, ids) == {"delivered": 1, "expired": 2}
    assert running.value("events_released_total") > 0
    if kind == "HTTP":
        assert len(receiver.requests) == 1
    else:
        [found] = await arrived(kafka.servers, topic, 1)
        assert client.status(headers(found)["orchestrator-event-id"]) == "delivered"


async def test_no_attempt_follows_a_failed_one_when_the_event_has_expired(
    settings: MakeSettings, client: Client, receiver: Receiver
) -> None:
    client.rows(
        "insert into orchestrator.retry_policy (name, schedule, jitter) values ('slow', array['0.6 s']::interval[], 0)"
    )
    broken = receiver.script("/broken", Answer(500), Answer(204))
    async with dispatching(settings()):
        event_id = client.schedule(
            destination=broken, scheduled_at=soon(0), expires_at=soon(0.5).isoformat(), retry_policy="slow"
        )
        await finished(client, [event_id])
    assert len(receiver.requests) == 1
    assert [result for _, result in client.outcomes(event_id)] == ["retried", "expired"]


# Submitting


async def test_an_expiry_is_submitted_alone_and_in_a_batch_and_shown_with_the_event(api: httpx.AsyncClient) -> None:
    expires_at = tomorrow() + timedelta(hours=1, microseconds=1)
    sent = submission(expires_at=expires_at.isoformat())
    one = (await api.post("/api/v1/events", json=sent)).json()["id"]
    many = (await api.post("/api/v1/events/batch", json={"events": [sent, sent | {"expires_at": None}]})).json()
    found = [
        (await api.get(f"/api/v1/events/{each}")).json()["expires_at"]
        for each in (one, *(result["id"] for result in many["results"]))
    ]
    assert [each and datetime.fromisoformat(each) for each in found] == [expires_at, expires_at, None]


async def test_an_expiry_that_is_not_after_the_scheduled_time_is_refused_everywhere(api: httpx.AsyncClient) -> None:
    at = tomorrow().isoformat()
    wrong = submission(scheduled_at=at, expires_at=at)
    assert fields(assert_problem(await api.post("/api/v1/events", json=wrong), 409, "refused")) == {"expires_at"}
    answer = (await api.post("/api/v1/events/batch", json={"events": [wrong, submission()]})).json()
    assert (answer["accepted"], answer["results"][0]["error"]["field"]) == (1, "expires_at")
    response = await api.post("/api/v1/events", json=submission(expires_at="soon"))
    assert fields(assert_problem(response, 422, "validation")) == {"expires_at"}


async def test_an_expiry_is_submitted_through_kafka(settings: MakeSettings, client: Client, topic: Topic) -> None:
    at, expires_at = soon(3600), soon(7200)
    records = [
        record(1, scheduled_at=at.isoformat(), expires_at=expires_at.isoformat()),
        record(2, scheduled_at=at.isoformat()),
        record(3, scheduled_at=at.isoformat(), expires_at=at.isoformat()),
    ]
    async with ingesting(settings(**topic.environ)):
        await read_to(client, topic.name, await feed(topic, records))
    kept = client.rows("select external_job_id, expires_at from orchestrator.event order by 1")
    assert kept == [("job-1", expires_at), ("job-2", None)]
    assert client.column("select field from orchestrator.reject") == ["expires_at"]


def test_an_expiry_is_an_option_of_submit(call: Call) -> None:
    event = ("submit", "--destination", "http://127.0.0.1:9/hook", "--payload", "1", "--at", "+1h")
    for options, hours in ((("--expires-in", "30m"), 0.5), (("--expires-at", "+2h"), 1)):
        kept = answer(call("get", answer(call(*event, *options, "--json"))["id"], "--json"))
        lasts = datetime.fromisoformat(kept["expires_at"]) - datetime.fromisoformat(kept["scheduled_at"])
        assert abs(lasts - timedelta(hours=hours)) < timedelta(seconds=5)
        assert "expires" in call("get", kept["id"]).stdout
    assert "expires_at: expected a time after scheduled_at" in refused(call(*event, "--expires-at", "now"))
    assert "expires_at: expected an RFC 3339 time" in refused(call(*event, "--expires-at", "noon"))
    assert "--expires-at: expected a time such as +10s" in refused(call(*event, "--expires-at", "+x"), 2)
    assert "give one of them" in refused(call(*event, "--expires-at", "+2h", "--expires-in", "1h"), 2)
    assert "expected a duration" in refused(call(*event, "--expires-in", "-1h"), 2)
    assert "scheduled_at: expected" in refused(call(*event[:-1], "noon", "--expires-in", "1h"))


def test_the_story_of_an_expired_event_says_so(call: Call, client: Client) -> None:
    event_id = client.schedule(scheduled_at=soon(-60), expires_at=soon(-30).isoformat())
    assert client.claim() == []
    story = told(call("get", event_id))
    assert f"event {event_id}  expired" in story
    assert re.search(r"Z +\+[^ ]+ [a-z]+ +expired", story)
    assert "attempt 1" not in story
