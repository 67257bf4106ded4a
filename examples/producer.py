"""Submits events through Kafka: each record of the submission topic becomes one event, exactly once.

    KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:19092 python examples/producer.py https://example.com/hook 3

Needs aiokafka. The topic is KAFKA_TOPIC_SUBMISSION, whose name by default is scheduled-event-submission.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import UTC, datetime, timedelta

from aiokafka import AIOKafkaProducer

SERVERS = os.environ["KAFKA_BOOTSTRAP_SERVERS"]
TOPIC = os.environ.get("KAFKA_TOPIC_SUBMISSION", "scheduled-event-submission")


async def main(destination: str, count: int) -> None:
    # With acks="all" a record that was acknowledged outlives a broker; an idempotent producer keeps their order.
    producer = AIOKafkaProducer(bootstrap_servers=SERVERS, acks="all", enable_idempotence=True)
    await producer.start()
    try:
        for n in range(count):
            # A record holds what POST /api/v1/events takes. What breaks a rule becomes a reject, and stops no other.
            event = {
                "source": "examples",
                "external_job_id": f"order-{n}/reminder",
                "scheduled_at": (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
                "destination": destination,
                "payload": {"order": n},
            }
            # The key decides the partition. Events that are to stay in order have an ordering_key, and it as the key.
            await producer.send_and_wait(TOPIC, json.dumps(event).encode(), key=f"order-{n}".encode())
    finally:
        await producer.stop()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
