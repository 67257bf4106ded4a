"""What topics hold, read from their beginnings."""

from __future__ import annotations

from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from tests.support.kafka_clients import started
from tests.support.waiting import eventually

_IDLE_MS = 500


async def records(servers: str, topic: str) -> list[Any]:
    """Every record of the topic, in order within each partition."""
    consumer = AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest", enable_auto_commit=False)
    async with started(consumer):
        partitions: list[TopicPartition] = await eventually(lambda: _partitions(consumer, topic))
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        found: list[Any] = []
        while any([await consumer.position(each) < ends[each] for each in partitions]):
            for batch in (await consumer.getmany(timeout_ms=_IDLE_MS)).values():
                found += batch
        return found


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> list[TopicPartition]:
    await consumer._client.add_topic(topic)
    known = consumer.partitions_for_topic(topic) or ()
    return [TopicPartition(topic, partition) for partition in sorted(known)]


async def arrived(servers: str, topic: str, count: int, timeout_s: float = 20.0) -> list[Any]:
    """Waits until the topic holds so many records, and returns them."""

    async def enough() -> list[Any]:
        found = await records(servers, topic)
        assert len(found) >= count, f"{len(found)} records"
        return found

    return await eventually(enough, timeout_s, pause_s=0.1)


def headers(record: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in record.headers}
