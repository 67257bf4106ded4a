"""What was given up may fail later: nobody hears of it as an error of this program."""

from __future__ import annotations

import asyncio
import gc
from contextlib import suppress
from typing import Any

import pytest
from aiokafka.errors import ProducerClosed
from aiokafka.structs import TopicPartition

from orchestrator.api.auth import Guard
from orchestrator.database import ApiKey
from orchestrator.errors import DatabaseUnavailable
from orchestrator.kafka.producer import Producer
from orchestrator.settings import Settings
from orchestrator.tasks import end

PLACE = TopicPartition("topic", 0)


@pytest.fixture
def complaints() -> list[str]:
    """What the event loop has complained of."""
    return []


@pytest.fixture(autouse=True)
async def listening(complaints: list[str]) -> Any:
    def note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        complaints.append(context["message"])

    asyncio.get_running_loop().set_exception_handler(note)
    yield
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def given_up(producer: Producer) -> None:
    batch = producer.create_batch()
    batch.append(timestamp=None, key=None, value=b"1")
    sent = await producer._message_accumulator.add_batch(batch, PLACE, 1)
    waiting = asyncio.ensure_future(sent)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting


async def test_a_batch_that_was_given_up_may_fail_when_its_producer_is_abandoned() -> None:
    producer = Producer(bootstrap_servers="127.0.0.1:1", acks="all", enable_idempotence=False)
    await given_up(producer)
    await producer.abandon()
    with pytest.raises(ProducerClosed):
        await producer._message_accumulator.add_batch(producer.create_batch(), PLACE, 1)


async def test_a_task_that_is_ended_may_fail_while_ending() -> None:
    async def fails_when_cancelled() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise DatabaseUnavailable("gone") from None

    task = asyncio.create_task(fails_when_cancelled())
    await asyncio.sleep(0)
    await end(task)


async def test_a_look_up_of_a_key_may_fail_when_its_requests_have_gone() -> None:
    began, proceed = asyncio.Event(), asyncio.Event()

    class Away:
        async def api_key(self, digest: bytes) -> ApiKey | None:
            began.set()
            await proceed.wait()
            raise DatabaseUnavailable("away")

    settings = Settings.from_env({"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"})
    guard = Guard(settings, Away())  # type: ignore[arg-type]
    scope = {"headers": [(b"x-api-key", b"orch_" + b"a" * 43)]}
    asking = asyncio.create_task(guard.require(scope, "read"))
    await began.wait()
    await end(asking)
    proceed.set()
    await asyncio.sleep(0.01)
