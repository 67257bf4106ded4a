"""Events delivered to topics of a real broker: what arrives, and what happens when it cannot."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any, cast

import pytest

from orchestrator.dispatch import kafka_deliveries as module
from orchestrator.kafka.partitions import partition_of
from tests.conftest import MakeSettings, Spawn
from tests.support.brokers import Kafka, KafkaBroker
from tests.support.dispatching import dispatching, finished, soon, statuses
from tests.support.receiver import HANG, Receiver
from tests.support.sql_client import Client, event
from tests.support.topics import arrived, headers, records
from tests.support.waiting import eventually

SHORT = {
    "HTTP_TIMEOUT_SECONDS": "2",
    "SCHEDULER_LOOKAHEAD_MS": "500",
    "SCHEDULER_LEASE_SECONDS": "9",
    "SCHEDULER_POLL_INTERVAL_MS": "100",
}
NOWHERE = "127.0.0.1:9"  # the discard port, where nobody listens


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    with Client(database_url) as client:
        yield client


def to_kafka(topic: str | None, **changes: Any) -> dict[str, Any]:
    return event(**{"delivery_type": "KAFKA", "destination": topic, "scheduled_at": soon(0)} | changes)


def submitted(client: Client, *events: dict[str, Any]) -> list[str]:
    answers = client.submit(*events)
    assert {answer.result for answer in answers} == {"accepted"}, answers
    return [str(answer.id) for answer in answers]


def outcomes(client: Client, event_id: str) -> list[Any]:
    return cast(list[Any], client.get(event_id)["outcomes"])


def ids(found: list[Any]) -> Counter[str]:
    return Counter(headers(record)["orchestrator-event-id"] for record in found)


def quick_policy(client: Client) -> None:
    client.rows(
        "insert into orchestrator.retry_policy (name, schedule, jitter) values ('quick', '{200 ms}'::interval[], 0)"
    )


async def test_a_record_carries_the_payload_the_key_and_the_identifying_headers(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    topic = kafka.unique("orders")
    await kafka.create_topic(topic, 3)
    given = {"tenant": "blue", "X-Trace": "value", "orchestrator-attempt": "99", "Content-Type": "text/plain"}
    due = soon(0.3)
    (event_id,) = submitted(client, to_kafka(topic, external_job_id="job-7", payload={"n": [1, "ü"]}, scheduled_at=due))
    # The API refuses headers that are ours to set, but an owner of the tables can write what he likes.
    client.rows("update orchestrator.event set headers = %s", json.dumps(given))
    async with dispatching(settings(**kafka.environ)):
        await finished(client, [event_id])
    (record,) = await arrived(kafka.servers, topic, 1)
    assert json.loads(record.value) == {"n": [1, "ü"]}
    assert record.value.decode() == client.value("select payload::text from orchestrator.event")
    assert record.key == b"job-7"
    found = headers(record)
    assert datetime.fromisoformat(found.pop("orchestrator-scheduled-at")) == due
    assert found == {
        "tenant": "blue",
        "X-Trace": "value",
        "orchestrator-event-id": event_id,
        "orchestrator-attempt": "1",
        "content-type": "application/json",
    }
    assert record.timestamp >= int(due.timestamp() * 1000)
    (outcome,) = outcomes(client, event_id)
    assert (outcome["result"], outcome["status_code"], outcome["error"]) == ("delivered", None, None)


async def test_a_record_carries_what_its_event_is_followed_by(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    topic = kafka.unique("orders")
    await kafka.create_topic(topic, 1)
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    event = to_kafka(topic, headers={"Traceparent": "own", "a": "b"}, correlation_id="order 7", traceparent=trace)
    ids = submitted(client, event)
    async with dispatching(settings(**kafka.environ)):
        await finished(client, ids)
    (record,) = await arrived(kafka.servers, topic, 1)
    found = {name: value for name, value in headers(record).items() if not name.startswith("orchestrator-")}
    assert found == {
        "a": "b",
        "x-correlation-id": "order 7",
        "traceparent": trace,
        "content-type": "application/json",
    }


async def test_an_event_for_an_invalid_topic_dies_at_its_first_attempt(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    chosen = settings(**kafka.environ, CUSTOMER_NAME=kafka.unique("ocean"), KAFKA_ALLOW_TOPICS="orders")
    topics = [chosen.topic_processing, chosen.topic_dlq, chosen.topic_submission, "reminders"]
    kept = submitted(client, *(to_kafka(f"kept-{n}", max_retries=5) for n in range(len(topics))))
    # As a client of the staging table could have kept them, or a program of before.
    for event_id, topic in zip(kept, topics, strict=True):
        client.rows("update orchestrator.event set destination = %s where id = %s", topic, event_id)
    async with dispatching(chosen):
        await finished(client, kept)
    assert set(statuses(client, kept)) == {"dead"}
    for event_id, topic in zip(kept, topics, strict=True):
        (outcome,) = outcomes(client, event_id)
        assert outcome["error"].startswith("destination: expected ")
        assert topic in outcome["error"]


async def test_the_ordering_key_decides_the_partition_as_the_java_client_would(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    topic = kafka.unique("ordered")
    await kafka.create_topic(topic, 5)
    due = soon(0.5)
    events = [
        to_kafka(
            topic,
            ordering_key=f"customer-{n % 10}" if n % 11 else None,
            external_job_id=f"job-{n}" if n % 7 else None,
            payload={"n": n},
            scheduled_at=due + n * timedelta(milliseconds=2),
        )
        for n in range(300)
    ]
    event_ids = submitted(client, *events)
    async with dispatching(settings(**kafka.environ)):
        await finished(client, event_ids)
    found = await arrived(kafka.servers, topic, 300)
    assert ids(found) == dict.fromkeys(event_ids, 1)
    for record in found:
        n = json.loads(record.value)["n"]
        key = events[n]["ordering_key"] or events[n]["external_job_id"]
        assert record.key == (None if key is None else key.encode())
        if key is not None:
            assert record.partition == partition_of(key.encode(), 5)
    for customer in range(10):
        numbers = [json.loads(r.value)["n"] for r in found if r.key == f"customer-{customer}".encode()]
        assert numbers == sorted(numbers)


async def test_an_event_without_a_topic_goes_to_the_ready_topic(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    topic = kafka.unique("ready")
    await kafka.create_topic(topic, 1)
    (event_id,) = submitted(client, to_kafka(None))
    async with dispatching(settings(**kafka.environ, KAFKA_TOPIC_READY=topic)):
        await finished(client, [event_id])
    assert ids(await records(kafka.servers, topic)) == {event_id: 1}


async def test_a_missing_topic_is_tried_again_until_it_exists_while_others_go_on(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    if kafka.makes_topics:
        pytest.skip("this broker makes any topic that is asked for")
    quick_policy(client)
    missing, there = kafka.unique("missing"), kafka.unique("there")
    await kafka.create_topic(there, 2)
    waiting = submitted(client, *[to_kafka(missing, retry_policy="quick", max_retries=90) for _ in range(20)])
    async with dispatching(settings(**kafka.environ)):
        await eventually(lambda: outcomes(client, waiting[0]))
        good = submitted(client, *[to_kafka(there) for _ in range(50)])
        await finished(client, good)
        assert outcomes(client, waiting[0])[0]["result"] == "retried"
        assert outcomes(client, waiting[0])[0]["error"] == f"{missing}: no such topic"
        await kafka.create_topic(missing, 1)
        await finished(client, waiting)
    assert ids(await records(kafka.servers, missing)) == dict.fromkeys(waiting, 1)
    assert ids(await records(kafka.servers, there)) == dict.fromkeys(good, 1)


async def test_a_record_too_large_for_its_topic_dies_with_the_reason_and_alone(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    topic = kafka.unique("large")
    await kafka.create_topic(topic, 1)
    noise = random.Random(1).randbytes(750_000).hex()  # lz4 makes nothing of it
    good = submitted(client, *[to_kafka(topic) for _ in range(40)])
    (bad,) = submitted(client, to_kafka(topic, payload=noise))
    good += submitted(client, *[to_kafka(topic) for _ in range(40)])
    async with dispatching(settings(**kafka.environ)):
        await finished(client, [*good, bad])
        good += submitted(client, *[to_kafka(topic) for _ in range(20)])
        await finished(client, good)
    if client.status(bad) == "delivered":
        pytest.skip("this broker takes records of any size")
    (outcome,) = outcomes(client, bad)
    assert outcome["result"] == "dead"
    assert "is larger than max.message.bytes allows" in outcome["error"]
    assert ids(await records(kafka.servers, topic)) == dict.fromkeys(good, 1)
    attempts = client.column("select attempt from orchestrator.outcomes where event_id = any (%s::uuid[])", good)
    assert set(attempts) == {1}


async def test_a_topic_of_small_records_gets_batches_that_it_takes(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    topic = kafka.unique("small")
    await kafka.create_topic(topic, 1, {"max.message.bytes": "2000"})
    noise = random.Random(2)
    good = submitted(client, *[to_kafka(topic, payload=noise.randbytes(200).hex()) for _ in range(60)])
    (bad,) = submitted(client, to_kafka(topic, payload=noise.randbytes(2000).hex()))
    async with dispatching(settings(**kafka.environ)):
        await finished(client, [*good, bad], 30)
    found = await records(kafka.servers, topic)
    if bad in ids(found):
        pytest.skip("this broker takes records of any size")
    assert ids(found) == dict.fromkeys(good, 1)
    assert statuses(client, [*good, bad]) == {"delivered": 60, "dead": 1}


async def test_an_event_whose_headers_cannot_be_sent_dies_alone(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    """The API refuses such events, but an owner of the tables can write what he likes."""
    topic = kafka.unique("odd")
    await kafka.create_topic(topic, 1)
    odd, good = submitted(client, *[to_kafka(topic, headers={"a": "b"}, scheduled_at=soon(1)) for _ in range(2)])
    client.rows("""update orchestrator.event set headers = '{"a": 1}' where id = %s""", odd)
    async with dispatching(settings(**kafka.environ)):
        await finished(client, [odd, good])
    assert statuses(client, [odd, good]) == {"dead": 1, "delivered": 1}
    assert outcomes(client, odd)[0]["error"].startswith("headers: cannot be sent: ")


async def test_an_event_for_kafka_waits_for_a_dispatcher_that_has_kafka(
    settings: MakeSettings, client: Client, kafka: Kafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UNCONFIGURED", module._UNCONFIGURED._replace(retry_after_s=0.2))
    quick_policy(client)
    topic = kafka.unique("later")
    await kafka.create_topic(topic, 1)
    (event_id,) = submitted(client, to_kafka(topic, retry_policy="quick", max_retries=90))
    async with dispatching(settings()):
        await eventually(lambda: outcomes(client, event_id))
    assert outcomes(client, event_id)[0]["error"] == "KAFKA_BOOTSTRAP_SERVERS is not set for this dispatcher"
    async with dispatching(settings(**kafka.environ)):
        await finished(client, [event_id])
    assert ids(await records(kafka.servers, topic)) == {event_id: 1}


async def test_connections_for_http_do_not_bound_deliveries_to_kafka(
    settings: MakeSettings, client: Client, kafka: Kafka, receiver: Receiver
) -> None:
    topic = kafka.unique("beside")
    await kafka.create_topic(topic, 4)
    hanging = receiver.script("/hanging", HANG)
    submitted(client, event(scheduled_at=soon(0), destination=hanging))
    async with dispatching(
        settings(**kafka.environ, HTTP_MAX_CONNECTIONS="1", SHUTDOWN_TIMEOUT_SECONDS="1")
    ) as running:
        await receiver.wait_for(1)
        event_ids = submitted(client, *[to_kafka(topic) for _ in range(500)])
        await finished(client, event_ids)
        await eventually(lambda: running.value("events_delivered_total") == 500)


async def test_without_a_broker_deliveries_over_http_run_and_those_to_kafka_are_tried_again(
    settings: MakeSettings, client: Client, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    (to_topic,) = submitted(client, to_kafka("anything"))
    async with dispatching(settings(KAFKA_BOOTSTRAP_SERVERS=NOWHERE, SCHEDULER_POLL_INTERVAL_MS="100")):
        over_http = submitted(client, event(scheduled_at=soon(0), destination=receiver.url()))
        await finished(client, over_http)
        (outcome,) = await eventually(lambda: outcomes(client, to_topic))
    assert outcome["result"] == "retried"
    assert outcome["error"].startswith(f"KAFKA_BOOTSTRAP_SERVERS: no broker answers at {NOWHERE}")
    due_in_s = client.value("select extract(epoch from due_at - clock_timestamp())::float8 from orchestrator.timer")
    assert due_in_s > 5  # an outage must not use up the attempts


async def test_deliveries_are_taken_up_again_when_the_broker_is_back(
    settings: MakeSettings, client: Client, kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AWAY_S", 0.3)
    quick_policy(client)
    await kafka_broker.create_topic("events", 3)
    many = {"retry_policy": "quick", "max_retries": 100}
    async with dispatching(settings(**kafka_broker.environ, **SHORT)):
        before = submitted(client, *[to_kafka("events", **many) for _ in range(50)])
        await finished(client, before)
        await asyncio.to_thread(kafka_broker.kill)
        during = submitted(client, *[to_kafka("events", **many) for _ in range(50)])
        await eventually(lambda: outcomes(client, during[-1]), 20)
        await asyncio.to_thread(kafka_broker.start)
        if not kafka_broker.keeps_data:
            await kafka_broker.create_topic("events", 3)
        await finished(client, during, 40)
        after = submitted(client, *[to_kafka("events", **many) for _ in range(50)])
        await finished(client, after, 40)
    found = ids(await records(kafka_broker.servers, "events"))
    assert set(found) >= {*during, *after}
    assert statuses(client, [*before, *during, *after]) == {"delivered": 150}


async def test_while_a_broker_hangs_deliveries_over_http_go_on(
    settings: MakeSettings,
    client: Client,
    kafka_broker: KafkaBroker,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MAX_IN_FLIGHT", 100)
    monkeypatch.setattr(module, "_AWAY_S", 0.5)
    quick_policy(client)
    await kafka_broker.create_topic("events", 2)
    many = {"retry_policy": "quick", "max_retries": 100}
    async with dispatching(settings(**kafka_broker.environ, **SHORT)):
        await finished(client, submitted(client, to_kafka("events")))
        kafka_broker.pause()
        try:
            stuck = submitted(client, *[to_kafka("events", **many) for _ in range(1500)])
            over_http = submitted(client, *[event(scheduled_at=soon(0), destination=receiver.url()) for _ in range(50)])
            await finished(client, over_http, 30)
        finally:
            kafka_broker.resume()
        await finished(client, stuck, 60)
    assert set(ids(await records(kafka_broker.servers, "events"))) >= set(stuck)


async def test_a_broker_that_is_killed_while_it_receives_loses_nothing(
    settings: MakeSettings, client: Client, kafka_broker: KafkaBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kafka_broker.keeps_data:
        pytest.skip("this broker forgets everything when it is killed")
    monkeypatch.setattr(module, "_AWAY_S", 0.3)
    quick_policy(client)
    await kafka_broker.create_topic("events", 6)
    first = soon(0.5)
    event_ids = submitted(
        client,
        *[
            to_kafka(
                "events",
                retry_policy="quick",
                max_retries=100,
                external_job_id=f"job-{n}",
                scheduled_at=first + n * timedelta(milliseconds=2),
            )
            for n in range(3000)
        ],
    )
    async with dispatching(settings(**kafka_broker.environ, SCHEDULER_BATCH_SIZE="500")) as running:

        def have_arrived(share: float) -> bool:
            return running.value("events_delivered_total") >= share * len(event_ids)

        for share in (0.2, 0.5):
            await eventually(partial(have_arrived, share), 30)
            await asyncio.to_thread(kafka_broker.kill)
            await asyncio.to_thread(kafka_broker.start)
        await finished(client, event_ids, 60)
    assert statuses(client, event_ids) == {"delivered": 3000}
    assert set(ids(await records(kafka_broker.servers, "events"))) == set(event_ids)


async def test_a_killed_dispatcher_loses_nothing(spawn: Spawn, client: Client, kafka: Kafka) -> None:
    topic = kafka.unique("killed")
    await kafka.create_topic(topic, 4)
    first = soon(1)
    event_ids = submitted(
        client, *[to_kafka(topic, scheduled_at=first + n * timedelta(milliseconds=1)) for n in range(2000)]
    )
    process = spawn("dispatch", **kafka.environ, **SHORT, SCHEDULER_BATCH_SIZE="500")
    await eventually(lambda: client.value("select count(*) from orchestrator.outcomes") > 200, 20)
    await process.kill()
    spawn("dispatch", **kafka.environ, **SHORT, SCHEDULER_BATCH_SIZE="500")
    await finished(client, event_ids, 30)
    assert statuses(client, event_ids) == {"delivered": 2000}
    assert set(ids(await records(kafka.servers, topic))) == set(event_ids)


async def test_a_stop_delivers_records_under_way_and_hands_other_events_back(
    spawn: Spawn, client: Client, kafka: Kafka
) -> None:
    topic = kafka.unique("stopped")
    await kafka.create_topic(topic, 4)
    event_ids = submitted(client, *[to_kafka(topic) for _ in range(1500)])
    held = submitted(client, *[to_kafka(topic, scheduled_at=soon(9)) for _ in range(20)])
    process = spawn("dispatch", **kafka.environ, SCHEDULER_LOOKAHEAD_MS="10000", SCHEDULER_LEASE_SECONDS="60")
    await eventually(lambda: client.value("select count(*) from orchestrator.outcomes") > 100, 20)
    assert await process.stop() == 0
    assert client.value("select count(*) from orchestrator.timer where lease_until is not null") == 0
    assert client.value("select count(*) from orchestrator.timer where event_id = any (%s::uuid[])", held) == 20
    assert client.value("select count(*) from orchestrator.outcomes where event_id = any (%s::uuid[])", held) == 0
    found = ids(await records(kafka.servers, topic))
    assert set(found.values()) == {1}
    assert statuses(client, event_ids)["delivered"] == len(found)


async def test_every_event_is_delivered_without_idempotence_too(
    settings: MakeSettings, client: Client, kafka: Kafka
) -> None:
    topic = kafka.unique("plain")
    await kafka.create_topic(topic, 3)
    event_ids = submitted(client, *[to_kafka(topic, external_job_id=f"job-{n}") for n in range(1000)])
    async with dispatching(settings(**kafka.environ | {"KAFKA_IDEMPOTENCE": "false"})):
        await finished(client, event_ids)
    assert ids(await records(kafka.servers, topic)) == dict.fromkeys(event_ids, 1)
