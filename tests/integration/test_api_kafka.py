"""The API with Kafka: accepted is what the brokers have acknowledged, and nothing else."""

from __future__ import annotations

import asyncio
import json
import random
import string
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

import httpx
import psycopg
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from orchestrator.database import Database
from orchestrator.events.ids import EVENT_ID_HEADER
from orchestrator.events.parsing import parse_submission
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.integration.api_support import assert_problem, fields, running_api, submission, until
from tests.support.brokers import Kafka, KafkaBroker

PARTITIONS = 3


class Queue(NamedTuple):
    """The API, and the topic that it puts submissions on."""

    client: httpx.AsyncClient
    settings: Settings

    async def post(self, **changes: Any) -> httpx.Response:
        return await self.client.post("/api/v1/events", json=submission(**changes))

    async def post_batch(self, *events: dict[str, Any]) -> httpx.Response:
        return await self.client.post("/api/v1/events/batch", json={"events": list(events)})

    async def records(self) -> list[ConsumerRecord]:
        """All that is on the topic."""
        assert self.settings.kafka_servers is not None
        return await records_of(self.settings.kafka_servers, self.settings.topic_submission)


async def records_of(servers: str, topic: str) -> list[ConsumerRecord]:
    found: list[ConsumerRecord] = []
    async with AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
        partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
        consumer.assign(partitions)
        left = sum((await consumer.end_offsets(partitions)).values())
        while len(found) < left:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                found += records
    return found


OpenQueue = Callable[..., Any]


@pytest.fixture
def open_queue(settings: MakeSettings) -> OpenQueue:
    """Serves the API with a submission topic of its own; ``async with open_queue(environ) as queue``."""

    @asynccontextmanager
    async def start(environ: dict[str, str], **given: str) -> AsyncIterator[Queue]:
        chosen = settings(**environ, **given)
        async with Database(chosen, role="api") as database, running_api(chosen, database) as client:
            yield Queue(client, chosen)

    return start


@pytest.fixture
async def queue(kafka: Kafka, open_queue: OpenQueue) -> AsyncIterator[Queue]:
    topic = kafka.unique("submissions")
    await kafka.create_topic(topic, PARTITIONS)
    async with open_queue(kafka.environ, KAFKA_TOPIC_SUBMISSION=topic) as queue:
        yield queue


def id_header(record: ConsumerRecord) -> str | None:
    value = dict(record.headers).get(EVENT_ID_HEADER)
    return None if value is None else value.decode()


async def test_an_accepted_event_is_on_the_topic_as_it_was_submitted(queue: Queue) -> None:
    changes = {"ordering_key": "tenant-7", "headers": {"X-A": "é"}, "max_retries": 9, "payload": {"b": 1.50, "a": []}}
    changes |= {"priority": -2, "spread_seconds": 0.00001}
    sent = json.dumps(submission(external_job_id="job-1", **changes)).encode()
    response = await queue.client.post("/api/v1/events", content=sent, headers={"Content-Type": "application/json"})
    assert response.status_code == 202
    answer = response.json()
    assert (answer["status"], answer["duplicate"], answer["external_job_id"]) == ("accepted", False, "job-1")
    assert response.headers["location"] == f"/api/v1/events/{answer['id']}"
    (record,) = await queue.records()
    expected = parse_submission(sent, queue.settings)
    assert answer["id"] == expected.id
    assert parse_submission(record.value, queue.settings) == expected
    assert (record.key, id_header(record)) == (b"tenant-7", None)


async def test_the_id_of_an_event_without_an_external_id_travels_in_a_header(queue: Queue) -> None:
    answer = (await queue.post(delivery_type="KAFKA", destination=None)).json()
    (record,) = await queue.records()
    assert id_header(record) == answer["id"]
    assert record.key == answer["id"].encode()
    assert "destination" not in json.loads(record.value)


async def test_events_of_one_external_id_go_to_one_partition_without_an_ordering_key(queue: Queue) -> None:
    events = [submission(external_job_id="job", payload=n) for n in range(20)]
    assert (await queue.post_batch(*events)).status_code == 202
    records = await queue.records()
    assert len({record.partition for record in records}) == 1
    assert [json.loads(record.value)["payload"] for record in records] == list(range(20))


async def test_a_batch_answers_for_each_event_and_puts_the_valid_ones_on_the_topic(queue: Queue) -> None:
    response = await queue.post_batch(submission(), submission(source=""), submission(external_job_id="x"))
    assert response.status_code == 202
    answer = response.json()
    assert (answer["accepted"], answer["duplicates"], answer["rejected"]) == (2, 0, 1)
    first, second, third = answer["results"]
    assert second["error"]["field"] == "source"
    assert {each["status"] for each in (first, third)} == {"accepted"}
    assert [id_header(record) for record in await queue.records() if record.key != b"x"] == [first["id"]]


async def test_a_submission_that_breaks_a_rule_never_reaches_the_topic(queue: Queue) -> None:
    assert_problem(await queue.post(destination="nowhere"), 422, "validation")
    assert (await queue.post_batch(submission(payload="\x00"))).status_code == 200
    assert await queue.records() == []


async def test_events_of_many_requests_at_once_are_each_on_the_topic_once(queue: Queue) -> None:
    singles = [queue.post() for _ in range(200)]
    batches = [queue.post_batch(*[submission() for _ in range(100)]) for _ in range(5)]
    responses = await asyncio.gather(*singles, *batches)
    assert {response.status_code for response in responses} == {202}
    answers = [response.json() for response in responses]
    ids = [each["id"] for answer in answers for each in answer.get("results", [answer])]
    assert sorted(filter(None, map(id_header, await queue.records()))) == sorted(ids)


async def test_an_event_that_no_broker_takes_is_refused_alone(
    kafka: Kafka, open_queue: OpenQueue, settings: MakeSettings
) -> None:
    if not kafka.transactions:
        pytest.skip(f"{kafka.name} takes records of any size")
    topic = kafka.unique("submissions")
    await kafka.create_topic(topic, PARTITIONS)
    huge = "".join(random.choices(string.ascii_letters, k=3_000_000))
    limits = {"MAX_PAYLOAD_BYTES": "4000000", "KAFKA_TOPIC_SUBMISSION": topic}
    async with open_queue(kafka.environ, **limits) as queue:
        problem = assert_problem(await queue.post(payload=huge), 413, "too-large")
        assert fields(problem) == {"payload"}
        assert "max.message.bytes" in problem["detail"]
        answer = (await queue.post_batch(submission(), submission(payload=huge), submission())).json()
        assert (answer["accepted"], answer["rejected"]) == (2, 1)
        assert answer["results"][1]["error"]["field"] == "payload"
        assert (await queue.post()).status_code == 202
        assert len(await queue.records()) == 3


async def test_a_topic_that_does_not_exist_is_answered_with_503(kafka: Kafka, open_queue: OpenQueue) -> None:
    if kafka.makes_topics:
        pytest.skip(f"{kafka.name} makes topics by itself")
    async with open_queue(kafka.environ, KAFKA_TOPIC_SUBMISSION=kafka.unique("missing")) as queue:
        assert_problem(await queue.post(), 503, "unavailable")


# Kafka is away


def assert_unavailable(response: httpx.Response) -> None:
    problem = assert_problem(response, 503, "unavailable")
    assert int(response.headers["retry-after"]) >= 1
    assert "Kafka" in problem["detail"]


NO_KAFKA = {"KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}


async def test_the_api_serves_without_kafka_and_refuses_submissions(open_queue: OpenQueue) -> None:
    async with open_queue(NO_KAFKA) as queue:
        async with asyncio.timeout(5):
            assert_unavailable(await queue.post())
            assert_unavailable(await queue.post_batch(submission()))
        assert (await queue.client.get("/ready")).status_code == 200
        assert (await queue.client.get("/api/v1/events/statistics")).json()["totals"]["accepted"] == 0


async def test_submissions_go_to_the_database_while_kafka_is_away_if_so_configured(
    open_queue: OpenQueue, database_url: str
) -> None:
    async with open_queue(NO_KAFKA, SUBMIT_FALLBACK="database") as queue:
        sent = submission(external_job_id="job")
        response = await queue.client.post("/api/v1/events", json=sent)
        assert (response.status_code, response.json()["status"]) == (201, "scheduled")
        again = await queue.client.post("/api/v1/events", json=sent)
        assert (again.status_code, again.json()["id"]) == (200, response.json()["id"])
        batch = await queue.post_batch(sent, submission())
        assert (batch.status_code, batch.json()["accepted"], batch.json()["duplicates"]) == (200, 1, 1)
    with psycopg.connect(database_url) as connection:
        assert connection.execute("select count(*) from orchestrator.event").fetchone() == (2,)


async def test_submissions_are_accepted_again_when_kafka_is_there(
    kafka_broker: KafkaBroker, open_queue: OpenQueue
) -> None:
    kafka_broker.stop()
    async with open_queue(kafka_broker.environ) as queue:
        assert_unavailable(await queue.post())
        kafka_broker.start()
        await kafka_broker.create_topic(queue.settings.topic_submission, PARTITIONS)
        await until(lambda: accepted(queue.post()), 20)
        assert len(await queue.records()) == 1


async def accepted(posted: Awaitable[httpx.Response]) -> bool:
    return (await posted).status_code == 202


@pytest.mark.timeout(180)
async def test_events_accepted_before_the_broker_is_killed_are_there_when_it_is_back(
    kafka_broker: KafkaBroker, open_queue: OpenQueue
) -> None:
    if not kafka_broker.keeps_data:
        pytest.skip(f"{kafka_broker.name} keeps nothing when it is killed")
    async with open_queue(kafka_broker.environ) as queue:
        await kafka_broker.create_topic(queue.settings.topic_submission, PARTITIONS)
        answered: dict[int, set[str]] = {202: set(), 503: set()}
        killed = asyncio.Event()

        async def client(name: int) -> None:
            number = 0
            while not killed.is_set() or number < 5:
                job = f"{name}-{number}"
                number += 1
                status = (await queue.post(external_job_id=job)).status_code
                answered[status].add(job)

        async with asyncio.TaskGroup() as clients:
            for name in range(16):
                clients.create_task(client(name))
            await until(lambda: holds(len(answered[202]) >= 200))
            kafka_broker.kill()
            killed.set()
        assert answered[503]
        kafka_broker.start()
        jobs = [json.loads(record.value)["external_job_id"] for record in await queue.records()]
        assert answered[202] <= set(jobs)
        await until(lambda: accepted(queue.post()), 20)


async def holds(condition: bool) -> bool:
    return condition


@pytest.mark.timeout(120)
async def test_an_event_of_unknown_outcome_has_the_same_id_in_kafka_and_in_the_database(
    kafka_broker: KafkaBroker, open_queue: OpenQueue, database_url: str
) -> None:
    async with open_queue(kafka_broker.environ, SUBMIT_FALLBACK="database") as queue:
        await kafka_broker.create_topic(queue.settings.topic_submission, PARTITIONS)
        # Each partition has a leader that the API knows: what has none is not sent before its time is over.
        named = [submission(external_job_id=f"{n}") for n in range(20 * PARTITIONS)]
        assert (await queue.post_batch(*named)).status_code == 202
        kafka_broker.pause()
        try:
            response = await queue.post(payload="unnamed")
        finally:
            kafka_broker.resume()
        assert response.status_code == 201
        kept = response.json()["id"]

        async def both() -> bool:
            with suppress(Exception):
                return kept in map(id_header, await queue.records())
            return False

        await until(both, 20)
    with psycopg.connect(database_url) as connection:
        ids = connection.execute("select id::text from orchestrator.event").fetchall()
    assert ids == [(kept,)]
