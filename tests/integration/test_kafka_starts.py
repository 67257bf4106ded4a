"""A client of Kafka that is no longer wanted before it has started leaves no connection behind."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiokafka.conn import AIOKafkaConnection

from orchestrator.ingest.source import Source
from orchestrator.kafka.client import started_producer
from orchestrator.kafka.topics import create_topics, log_bounds
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.support.brokers import Kafka
from tests.support.ingesting import Topic

_REQUESTS = (1, 2, 3)  # on the first connection the versions that the broker knows, and the brokers; then on another


async def producer(settings: Settings) -> None:
    async with started_producer(settings, "test"):
        pass


async def source(settings: Settings) -> None:
    async with Source.open(settings, settings.topic_submission, settings.kafka_group):
        pass


async def bounds(settings: Settings) -> None:
    await log_bounds(settings, settings.topic_submission, 4)


async def topics(settings: Settings) -> None:
    await create_topics(settings)


async def cancelled_at(request_number: int, work: Awaitable[None]) -> None:
    """Cancels the work while that request to a broker is under way."""
    send = AIOKafkaConnection.send
    sent = 0

    def cancels(connection: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent == request_number:
            asyncio.get_running_loop().call_soon(task.cancel)
        return send(connection, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AIOKafkaConnection, "send", cancels)
        task = asyncio.ensure_future(work)
        await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("request_number", _REQUESTS)
@pytest.mark.parametrize("client", [producer, source, bounds, topics])
async def test_cancelled_at_any_request_of_its_start(
    kafka: Kafka, settings: MakeSettings, client: Callable[[Settings], Awaitable[None]], request_number: int
) -> None:
    ours = settings(**(await Topic.new(kafka)).environ)
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # or it is an error, and the loop does not hear of it
        await cancelled_at(request_number, client(ours))
        gc.collect()
    assert complaints == []
