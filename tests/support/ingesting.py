"""An ingester in the test's own process, what is fed to it, and what it is judged by."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c_py

from orchestrator.ingest import ingest
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from tests.support.brokers import Kafka
from tests.support.cutting_proxy import CuttingProxy
from tests.support.kafka_clients import started
from tests.support.sql_client import Client
from tests.support.waiting import eventually

DUE = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0)


def submission(n: int, **changes: Any) -> bytes:
    """Submission number n; a change to ... leaves the field out."""
    fields: dict[str, Any] = {
        "source": "tests",
        "external_job_id": f"job-{n}",
        "scheduled_at": DUE.isoformat(),
        "destination": "https://receiver.example/hook",
        "payload": {"n": n},
    } | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


class Topic(NamedTuple):
    """A topic of a test's own, and one for commands beside it."""

    kafka: Kafka
    name: str
    commands: str

    @classmethod
    async def new(cls, kafka: Kafka, partitions: int = 4, **config: str) -> Topic:
        topic = cls(kafka, kafka.unique("submissions"), kafka.unique("commands"))
        await topic.create(partitions, **config)
        await kafka.create_topic(topic.commands)
        return topic

    async def create(self, partitions: int = 4, **config: str) -> None:
        await self.kafka.create_topic(self.name, partitions, config)

    async def delete(self) -> None:
        await self.kafka.delete_topic(self.name)

    @property
    def environ(self) -> dict[str, str]:
        """Settings of an ingester that reads it, with a short session so that tests need not wait long."""
        return self.kafka.environ | {
            "KAFKA_TOPIC_SUBMISSION": self.name,
            "KAFKA_TOPIC_PROCESSING": self.commands,
            "KAFKA_CONSUMER_GROUP": self.name,
            "KAFKA_SESSION_TIMEOUT_MS": "2000",
        }

    async def committed(self, partitions: int = 4) -> dict[int, int]:
        """What the group has told the brokers, by partition."""
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.kafka.servers, group_id=self.name, enable_auto_commit=False, auto_offset_reset="none"
        )
        async with started(consumer):
            found = [await consumer.committed(TopicPartition(self.name, number)) for number in range(partitions)]
            return {number: offset for number, offset in enumerate(found) if offset is not None}


@asynccontextmanager
async def admin(kafka: Kafka) -> AsyncIterator[AIOKafkaAdminClient]:
    async with started(AIOKafkaAdminClient(bootstrap_servers=kafka.servers)) as client:
        yield client


@asynccontextmanager
async def producing(topic: Topic, **arguments: Any) -> AsyncIterator[AIOKafkaProducer]:
    async with started(AIOKafkaProducer(bootstrap_servers=topic.kafka.servers, linger_ms=5, **arguments)) as producer:
        yield producer


async def feed(
    topic: Topic,
    values: Iterable[bytes | None],
    *,
    partition: int | None = None,
    headers: Sequence[tuple[str, bytes]] = (),
    **arguments: Any,
) -> list[tuple[int, int]]:
    """Produces records; returns partition and offset of each. Without a partition, each record goes to the next."""
    async with producing(topic, **arguments) as producer:
        count = len(await producer.partitions_for(topic.name))
        sent = [
            await producer.send(
                topic.name, value, key=b"key", partition=n % count if partition is None else partition, headers=headers
            )
            for n, value in enumerate(values)
        ]
        places = await asyncio.gather(*sent)
    return [(place.partition, place.offset) for place in places]


class Ingesting:
    """An ingester at work."""

    def __init__(self, settings: Settings) -> None:
        self.metrics = Metrics(settings)
        self.stop = asyncio.Event()
        self.task = asyncio.create_task(ingest(settings, self.metrics, self.stop))

    def value(self, name: str, **labels: str) -> float:
        """The sum of a series' values: ``value("events_duplicate_total")``."""
        return value(self.metrics, name, **labels)


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return sum(
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"orchestrator_{name}" and labels.items() <= sample.labels.items()
    )


@asynccontextmanager
async def ingesting(settings: Settings) -> AsyncIterator[Ingesting]:
    """An ingester that is stopped when the block ends."""
    running = Ingesting(settings)
    try:
        yield running
    finally:
        running.stop.set()
        await running.task


async def read_to(client: Client, topic: str, places: Iterable[tuple[int, int]], timeout_s: float = 30.0) -> None:
    """Waits until the database stands behind every one of the records."""
    ends: dict[int, int] = {}
    for partition, offset in places:
        ends[partition] = max(ends.get(partition, 0), offset + 1)

    def stands_there() -> bool:
        stand_at = positions(client, topic)
        assert all(stand_at.get(partition, 0) >= end for partition, end in ends.items()), (stand_at, ends)
        return True

    await eventually(stands_there, timeout_s)


def positions(client: Client, topic: str) -> dict[int, int]:
    rows = client.rows("select partition, next_offset from orchestrator.ingest_offset where topic = %s", topic)
    return dict(rows)


def assert_exact(client: Client, *, accepted: int, duplicates: int = 0, rejected: int = 0) -> None:
    """Every record was counted once, and what was counted is there."""
    expected = {"accepted": accepted, "duplicate": duplicates, "rejected": rejected}
    totals = client.totals()
    assert {name: totals.get(name, 0) for name in expected} == expected
    assert client.value("select count(*) from orchestrator.event") == accepted
    assert client.value("select count(*) from orchestrator.timer") == accepted
    assert client.value("select count(*) from orchestrator.reject") == rejected


def jobs(client: Client) -> set[str]:
    return set(client.column("select external_job_id from orchestrator.event"))


async def waits_for_lock(client: Client) -> int:
    """Waits until a batch is being written and waits for a lock; returns the process id of its session."""
    waiting = """
        select pid from pg_stat_activity where datname = current_database() and state = 'active'
          and application_name = 'orchestrator ingest' and wait_event_type = 'Lock'"""
    pid: int = await eventually(lambda: client.value(waiting), 20)
    return pid


class LastCutProxy(CuttingProxy):
    """Lets nobody in again after it has cut: what was committed then stays unknown to the process behind it."""

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.cuts:
            await super()._forward(reader, writer)


async def feed_unreadable(topic: Topic, partition: int) -> int:
    """Appends a record whose header's name is not UTF-8, which clients in other languages can do; its offset."""
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1000,
    )
    builder.append(0, round(time.time() * 1000), b"key", b"{}", [("name", b"value")])
    data = bytearray(builder.build()).replace(b"name", b"n\xffme")
    data[17:21] = struct.pack(">I", calc_crc32c_py(data[21:]))
    async with producing(topic) as producer:
        request = ProduceRequest(
            transactional_id=None, required_acks=-1, timeout=10_000, topics=[(topic.name, [(partition, bytes(data))])]
        )
        await producer.partitions_for(topic.name)
        leader = producer.client.cluster.leader_for_partition(TopicPartition(topic.name, partition))
        answer = await producer.client.send(leader, request)
    [(_, [(_, code, offset, *_)])] = answer.topics
    assert code == 0
    return int(offset)
