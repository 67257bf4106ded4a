"""What the tests of whole processes share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from click.testing import Result

from orchestrator.database import Database
from tests.conftest import MakeSettings
from tests.integration.api_support import running_api
from tests.integration.cli_support import Call, invoke
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


@pytest.fixture
async def api(settings: MakeSettings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API on this test's own database, which takes bodies of up to 10,000 bytes."""
    chosen = settings(MAX_BODY_BYTES="10000", MAX_PAYLOAD_BYTES="10000")
    async with Database(chosen, role="api") as database, running_api(chosen, database) as client:
        yield client


@pytest.fixture
def call(environ: Callable[..., dict[str, str]]) -> Call:
    """Runs ``orchestrator …`` in a wide terminal, on this test's own database."""

    def run(*arguments: str, typed: str | None = None) -> Result:
        return invoke(*arguments, typed=typed, env=environ() | {"COLUMNS": "160"})

    return run
