"""Fixtures shared by all tests. Nothing starts before a test asks for it.

Each worker of pytest-xdist has a PostgreSQL server of its own (0.6 s to start), or uses the one of
TEST_DATABASE_URL, whose user must be allowed to create databases and roles. Each test has a database of
its own, cloned from a template that was migrated once. One Kafka broker is shared by all workers (brokers.py).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.database.migrate import migrate
from orchestrator.dev.operating_system import free_port
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.settings import Settings
from tests.support.brokers import Kafka, KafkaBroker, SharedBrokerHold, description, fetch, own_broker, shared_broker
from tests.support.databases import Databases, temporary_server
from tests.support.exploring import Exploration, load_profile
from tests.support.processes import Spawned
from tests.support.receiver import Receiver

MakeSettings = Callable[..., Settings]
Spawn = Callable[..., Spawned]

load_profile()

_EXPLORATION = pytest.StashKey[Exploration]()
_HOLD = pytest.StashKey[SharedBrokerHold]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_EXPLORATION] = Exploration()
    if not hasattr(config, "workerinput"):  # which only workers of pytest-xdist have
        fetch()
        config.stash[_HOLD] = SharedBrokerHold()


def pytest_unconfigure(config: pytest.Config) -> None:
    hold = config.stash.get(_HOLD, None)
    if hold is not None:
        hold.release()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_EXPLORATION].begin(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.stash[_EXPLORATION].is_over():
        pytest.skip("the time to explore is up")


def pytest_report_header() -> str:
    return f"kafka: {description()}"


@pytest.fixture(scope="session")
def kafka() -> Kafka:
    """A broker that all tests share."""
    return shared_broker()


@pytest.fixture
def kafka_broker() -> Iterator[KafkaBroker]:
    """A broker of this test's own, to be stopped, killed and paused."""
    with own_broker() as broker:
        yield broker


@pytest.fixture(scope="session")
def databases() -> Iterator[Databases]:
    """Makes databases on the shared server."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        databases = Databases(given)
        yield databases
        databases.close()
    else:
        with temporary_server() as server:
            yield Databases(server.url())


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str]:
    """A database of this test's own, with the whole schema and nothing in it."""
    with databases.migrated() as url:
        yield url


@pytest.fixture
def empty_database_url(databases: Databases) -> Iterator[str]:
    """A database of this test's own without the schema, for tests of migrating."""
    with databases.empty() as url:
        yield url


@pytest.fixture
def postgres_server() -> Iterator[EmbeddedPostgres]:
    """A server of this test's own, to be stopped and killed; its database ``orchestrator`` has the schema."""
    with temporary_server() as server:
        migrate(server.ensure_database("orchestrator"))
        yield server


@pytest.fixture
def environ(request: pytest.FixtureRequest) -> Callable[..., dict[str, str]]:
    """Makes the environment of a process: this test's database, a free port, local receivers allowed, what is given.

    ``environ(DATABASE_URL=…)`` needs no database of the test's own, and none is made.
    """

    def make(**given: str) -> dict[str, str]:
        if "DATABASE_URL" not in given:
            given["DATABASE_URL"] = request.getfixturevalue("database_url")
        ours = {
            "HTTP_ALLOW_NETWORKS": "127.0.0.0/8,::1/128",
            "SERVER_HOST": "127.0.0.1",
            "SERVER_PORT": str(free_port()),
        }
        return ours | given

    return make


@pytest.fixture
def settings(environ: Callable[..., dict[str, str]]) -> MakeSettings:
    """Makes Settings from environment variables: ``settings(SCHEDULER_BATCH_SIZE="10")``."""

    def make(**given: str) -> Settings:
        return Settings.from_env(environ(**given))

    return make


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A webhook receiver on a real socket, in the test's own event loop."""
    async with Receiver() as receiver:
        yield receiver


@pytest.fixture
def spawn(environ: Callable[..., dict[str, str]], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Spawn]:
    """Starts ``python -m orchestrator …``: ``spawn("dispatch", SCHEDULER_LEASE_SECONDS="2")``.

    The processes end with the test, and when it fails its report shows what they printed.
    """
    started: list[Spawned] = []

    def start(*arguments: str, **given: str) -> Spawned:
        log_file = tmp_path / f"process-{len(started) + 1}.log"
        started.append(Spawned(arguments, environ(**given), log_file))
        return started[-1]

    yield start
    for process in started:
        process.discard()
        request.node.add_report_section("teardown", f"log of {process.name}", process.log())
