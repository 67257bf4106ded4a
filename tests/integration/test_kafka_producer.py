"""The producer: what it acknowledges is kept, it outlives refusals, and it ends although brokers are away."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from aiokafka.errors import MessageSizeTooLargeError, ProducerClosed

from orchestrator.errors import KafkaUnavailable
from orchestrator.kafka.client import kafka_errors, started_producer
from tests.conftest import MakeSettings
from tests.support.brokers import Kafka, KafkaBroker

NO_DATABASE = "postgresql://nobody@127.0.0.1:1/none"
ENDS_WITHIN_S = 15.0


def others() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {asyncio.current_task()}


async def test_a_refused_record_does_not_stop_later_records(kafka: Kafka, settings: MakeSettings) -> None:
    if kafka.makes_topics:
        pytest.skip(f"{kafka.name} takes records of any size")
    topic = kafka.unique("small")
    await kafka.create_topic(topic, 1, {"max.message.bytes": "2000"})
    async with started_producer(settings(DATABASE_URL=NO_DATABASE, **kafka.environ), "test") as producer:
        first = await producer.send_and_wait(topic, b"first")
        for _ in range(2):
            with pytest.raises(MessageSizeTooLargeError):
                await producer.send_and_wait(topic, os.urandom(5000))
        after = [await producer.send(topic, b"after") for _ in range(10)]
        offsets = [(await each).offset for each in after]
    assert [first.offset, *offsets] == list(range(11))


async def test_a_producer_delivers_sent_records_before_it_ends(kafka: Kafka, settings: MakeSettings) -> None:
    topic = kafka.unique("flushed")
    await kafka.create_topic(topic)
    ours = settings(DATABASE_URL=NO_DATABASE, **kafka.environ)
    async with started_producer(ours, "test", linger_ms=1000) as producer:
        sent = [await producer.send(topic, b"%d" % number) for number in range(100)]
    assert [(await each).offset for each in sent] == list(range(100))


@pytest.mark.parametrize("way", ["killed", "hanging"])
@pytest.mark.parametrize("idempotent", [True, False])
async def test_a_producer_ends_although_the_broker_is_away(
    kafka_broker: KafkaBroker, settings: MakeSettings, way: str, idempotent: bool
) -> None:
    if idempotent and not kafka_broker.idempotent:
        pytest.skip(f"{kafka_broker.name} has no idempotent producers")
    await kafka_broker.create_topic("topic", 3)
    given = {**kafka_broker.environ, "KAFKA_IDEMPOTENCE": str(idempotent).lower()}
    async with started_producer(settings(DATABASE_URL=NO_DATABASE, **given), "test") as producer:
        await producer.send_and_wait("topic", b"arrives")
        if way == "killed":
            kafka_broker.kill()
        else:
            kafka_broker.pause()
        lost = [await producer.send("topic", b"%d" % number) for number in range(100)]
        began_s = time.monotonic()
    assert time.monotonic() - began_s < ENDS_WITHIN_S
    assert {type(each.exception()) for each in lost} == {ProducerClosed}
    assert not others()


@pytest.mark.parametrize("way", ["down", "hanging"])
async def test_a_producer_reports_within_bounded_time_that_the_broker_is_away(
    kafka_broker: KafkaBroker, settings: MakeSettings, way: str
) -> None:
    if way == "down":
        kafka_broker.stop()
    else:
        kafka_broker.pause()
    began_s = time.monotonic()
    with pytest.raises(KafkaUnavailable, match=kafka_broker.servers):
        async with started_producer(settings(DATABASE_URL=NO_DATABASE, **kafka_broker.environ), "test"):
            pass
    assert time.monotonic() - began_s < ENDS_WITHIN_S


async def test_a_producer_goes_on_when_the_broker_comes_back(kafka_broker: KafkaBroker, settings: MakeSettings) -> None:
    if not kafka_broker.keeps_data:
        pytest.skip(f"{kafka_broker.name} forgets its topics")
    await kafka_broker.create_topic("topic")
    async with started_producer(settings(DATABASE_URL=NO_DATABASE, **kafka_broker.environ), "test") as producer:
        await producer.send_and_wait("topic", b"before")
        kafka_broker.kill()
        waiting = await producer.send("topic", b"meanwhile")
        await asyncio.to_thread(kafka_broker.start)
        assert (await waiting).offset == 1
        assert (await producer.send_and_wait("topic", b"after")).offset == 2


async def test_brokers_that_are_away_become_one_error() -> None:
    with pytest.raises(KafkaUnavailable, match="KAFKA_BOOTSTRAP_SERVERS"), kafka_errors():
        raise TimeoutError
    with pytest.raises(MessageSizeTooLargeError), kafka_errors():
        raise MessageSizeTooLargeError
