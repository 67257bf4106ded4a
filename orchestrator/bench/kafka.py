"""Kafka in the benchmarks: a broker, a fast way to make records, and the arrival times of deliveries."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from orchestrator.bench.workload import new_run
from orchestrator.dev.kafka import temporary_broker
from orchestrator.events.ids import EVENT_ID_HEADER
from orchestrator.kafka.client import client_arguments
from orchestrator.kafka.topics import create_topics
from orchestrator.settings import Settings

PARTITIONS = 24
_BATCH_BYTES = 32 * 1024
_READ_TIMEOUT_S = 60.0

Record = tuple[bytes, bytes]
"""Key and value."""


@contextmanager
def broker(database_url: str) -> Iterator[dict[str, str]]:
    """Settings for processes that use this database and a broker: that of the environment, or a new one."""
    name = f"bench-{new_run()}"  # topics and a group that are new
    ours = {"DATABASE_URL": database_url, "CUSTOMER_NAME": name, "DEPLOYMENT_NAME": name, "LOG_LEVEL": "WARNING"}
    environ = {**os.environ, **ours, "KAFKA_PARTITIONS": str(PARTITIONS)}
    logging.getLogger("aiokafka").setLevel("CRITICAL")  # topics so new that they have no leader yet
    if environ.get("KAFKA_BOOTSTRAP_SERVERS"):
        yield environ
        return
    with temporary_broker() as running:
        yield environ | running.environ


async def create_target(settings: Settings, topic: str) -> None:
    """The topics of the product, and a topic to deliver to, whose records carry the time of their arrival."""
    await create_topics(settings)
    admin = AIOKafkaAdminClient(**client_arguments(settings, "bench"))
    await admin.start()
    try:
        configs = {"message.timestamp.type": "LogAppendTime"}
        await admin.create_topics([NewTopic(topic, PARTITIONS, 1, topic_configs=configs)])
    finally:
        await admin.close()


async def fill(settings: Settings, topic: str, partitions: Mapping[int, Iterator[Record]]) -> None:
    """Appends records to each partition, in batches like those of a producer."""
    async with (
        AIOKafkaProducer(
            **client_arguments(settings, "bench"), acks=1, compression_type="lz4", max_batch_size=_BATCH_BYTES
        ) as producer,
        asyncio.TaskGroup() as filling,
    ):
        for partition, records in partitions.items():
            filling.create_task(_fill(producer, topic, partition, records))


async def _fill(producer: AIOKafkaProducer, topic: str, partition: int, records: Iterator[Record]) -> None:
    batch = producer.create_batch()
    for key, value in records:
        if batch.append(timestamp=None, key=key, value=value) is None:
            await (await producer.send_batch(batch, topic, partition=partition))
            batch = producer.create_batch()
            batch.append(timestamp=None, key=key, value=value)
    if batch.record_count():
        await (await producer.send_batch(batch, topic, partition=partition))


async def arrivals(settings: Settings, topic: str) -> list[tuple[str, float]]:
    """Event id and Unix time of every record in the topic, in the order of arrival."""
    found: list[tuple[str, float]] = []
    async with AIOKafkaConsumer(**client_arguments(settings, "bench"), auto_offset_reset="earliest") as consumer:
        partitions = [TopicPartition(topic, n) for n in range(PARTITIONS)]
        consumer.assign(partitions)
        left = sum((await consumer.end_offsets(partitions)).values())
        async with asyncio.timeout(_READ_TIMEOUT_S):
            while left > 0:
                for records in (await consumer.getmany(timeout_ms=1000)).values():
                    left -= len(records)
                    found += [(_event_id(record.headers), record.timestamp / 1000) for record in records]
    return sorted(found, key=lambda each: each[1])


def _event_id(headers: Sequence[tuple[str, bytes]]) -> str:
    return dict(headers)[EVENT_ID_HEADER].decode()
