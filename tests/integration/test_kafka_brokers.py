"""The brokers that tests, the demo and `orchestrator dev` start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from orchestrator.dev.kafka import temporary_broker
from orchestrator.errors import OrchestratorError
from tests.support.brokers import Kafka, KafkaBroker
from tests.support.waiting import eventually


async def produce(kafka: Kafka, topic: str, *values: bytes) -> None:
    async with AIOKafkaProducer(
        bootstrap_servers=kafka.servers, acks="all", enable_idempotence=kafka.idempotent
    ) as producer:
        for value in values:
            await producer.send_and_wait(topic, value)


async def consume(kafka: Kafka, topic: str, count: int) -> list[bytes]:
    found: list[bytes] = []
    async with AIOKafkaConsumer(topic, bootstrap_servers=kafka.servers, auto_offset_reset="earliest") as consumer:
        while len(found) < count:
            found.append((await consumer.getone()).value)
    return found


async def test_records_sent_to_a_broker_arrive(kafka: Kafka) -> None:
    topic = kafka.unique("arrive")
    await kafka.create_topic(topic, 2)
    await produce(kafka, topic, b"1", b"2", b"3")
    assert sorted(await consume(kafka, topic, 3)) == [b"1", b"2", b"3"]


async def test_a_broker_that_is_killed_comes_back_with_its_address_and_data(kafka_broker: KafkaBroker) -> None:
    await kafka_broker.create_topic("kept")
    await produce(kafka_broker, "kept", b"1")
    kafka_broker.kill()
    kafka_broker.start()
    if not kafka_broker.keeps_data:
        await kafka_broker.create_topic("kept")
    await produce(kafka_broker, "kept", b"2")
    expected = [b"1", b"2"] if kafka_broker.keeps_data else [b"2"]
    assert await consume(kafka_broker, "kept", len(expected)) == expected


@pytest.mark.parametrize("kind", ["maven", "wheel"])
async def test_a_broker_ends_with_its_owner_even_when_that_is_killed(kind: str, tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from orchestrator.dev.kafka import temporary_broker\n"
        f"broker = temporary_broker({kind!r}, parent=Path(sys.argv[1])).start()\n"
        "print(broker.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    try:
        temporary_broker(kind, parent=tmp_path).close()
    except OrchestratorError as error:
        pytest.skip(str(error))
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        broker = psutil.Process(int(owner.stdout.readline()))
        os.kill(owner.pid, signal.SIGKILL)
    await eventually(lambda: not broker.is_running() or broker.status() == psutil.STATUS_ZOMBIE, 20)
    await eventually(lambda: not list(tmp_path.iterdir()))


def test_a_kind_of_broker_that_does_not_exist_is_refused() -> None:
    with pytest.raises(OrchestratorError, match="docker, maven, wheel"):
        temporary_broker("carrier pigeon")
