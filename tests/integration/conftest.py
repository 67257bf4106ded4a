"""What the tests of whole processes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.brokers import Kafka
from tests.support.ingesting import Topic
from tests.support.sql_client import Client


@pytest.fixture
def client(database_url: str) -> Iterator[Client]:
    """A session on this test's own database."""
    with Client(database_url) as client:
        yield client


@pytest.fixture
async def topic(kafka: Kafka) -> Topic:
    """A topic of four partitions with nothing in it."""
    return await Topic.new(kafka)
