"""Two customers from one image, side by side on one database server and one broker: neither sees anything of the other.

They run from their files in ops/deployments; only addresses and ports are those of the test.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import httpx
import psycopg
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from orchestrator.api.auth import key_hash, new_key
from orchestrator.dev.operating_system import free_port
from orchestrator.settings import Settings
from orchestrator.settings.env_file import read_env_file
from tests.conftest import Spawn
from tests.integration.api_support import until
from tests.integration.cli_support import invoke, told
from tests.operations.test_deployments import most_connections
from tests.support.brokers import Kafka, KafkaBroker
from tests.support.databases import Databases
from tests.support.kafka_clients import started
from tests.support.processes import ROOT, Spawned
from tests.support.receiver import Answer, Receiver
from tests.support.sql_client import Client
from tests.support.topics import arrived, headers, records
from tests.support.waiting import eventually

EVENTS = 12
PATIENCE_S = 90.0
OUT = ("event.ready", "event.dlq")
pytestmark = pytest.mark.timeout(400)


class Customer:
    """One deployment: its settings, its process, and a client of its API."""

    def __init__(self, name: str, database_url: str, kafka: Kafka, receiver: Receiver) -> None:
        self.name = name
        self.kafka = kafka
        self.receiver = receiver
        self.key = new_key()
        self.port = free_port()
        self.environ = {
            **read_env_file(ROOT / "ops" / "deployments" / f"{name}.env"),
            **kafka.environ,
            "DATABASE_URL": database_url,
            "SERVER_HOST": "127.0.0.1",
            "SERVER_PORT": str(self.port),
            "HTTP_ALLOW_NETWORKS": "127.0.0.0/8",
        }
        self.process: Spawned
        self.database: Client
        self.api: httpx.AsyncClient

    @asynccontextmanager
    async def prepared(self) -> AsyncIterator[None]:
        """With schema, topics and a key."""
        for command in (("migrate",), ("topics", "create")):
            told(await asyncio.to_thread(partial(invoke, *command, env=self.environ)))
        base, bearer = f"http://127.0.0.1:{self.port}", {"Authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(base_url=base, headers=bearer, timeout=30, trust_env=False) as api:
            with Client(self.environ["DATABASE_URL"]) as database:
                self.api, self.database = api, database
                database.rows("select orchestrator.create_api_key('test', %s, '{admin}')", key_hash(self.key))
                yield

    def event(self, job: str, **changes: Any) -> dict[str, Any]:
        """A submission that is due at once; those of two customers differ in where they go and what they carry."""
        return {
            "source": "tests",
            "external_job_id": job,
            "scheduled_at": DUE.isoformat(),
            "destination": self.receiver.url(f"/{self.name}"),
            "payload": {"customer": self.name, "job": job},
        } | changes

    async def submit(self, *events: dict[str, Any]) -> None:
        answer = await self.api.post("/api/v1/events/batch", json={"events": events})
        assert answer.status_code == 202, answer.text
        assert answer.json()["rejected"] == 0

    async def produce(self, *values: bytes) -> None:
        async with started(AIOKafkaProducer(bootstrap_servers=self.kafka.servers)) as producer:
            for value in values:
                await producer.send_and_wait(f"{self.name}.event.submissions", value)

    def jobs_received(self) -> list[str]:
        bodies = [json.loads(each.body) for each in self.receiver.received(f"/{self.name}")]
        assert {body["customer"] for body in bodies} <= {self.name}
        return sorted(body["job"] for body in bodies)

    async def received(self, jobs: list[str]) -> None:
        await eventually(lambda: set(jobs) <= set(self.jobs_received()), PATIENCE_S)

    async def record_values(self, tail: str) -> list[Any]:
        return [json.loads(each.value) for each in await records(self.kafka.servers, f"{self.name}.{tail}")]


DUE = datetime.now(UTC) - timedelta(seconds=1)


@pytest.fixture
def two_databases(databases: Databases) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(databases.empty()) for _ in range(2)]


@pytest.fixture
async def customers(
    two_databases: list[str], kafka_broker: KafkaBroker, receiver: Receiver, spawn: Spawn
) -> AsyncIterator[list[Customer]]:
    async with AsyncExitStack() as stack:
        both = [
            Customer(name, url, kafka_broker, receiver)
            for name, url in zip(("ocean", "air"), two_databases, strict=True)
        ]
        for each in both:
            await stack.enter_async_context(each.prepared())
            each.process = spawn("run", **each.environ)
        for each in both:
            await each.process.wait_for_log('"ready"', PATIENCE_S)
            await until(partial(_is_ready, each.api), PATIENCE_S)
        yield both


async def _is_ready(api: httpx.AsyncClient) -> bool:
    try:
        return (await api.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def test_nothing_of_one_customer_appears_in_another(
    customers: list[Customer], receiver: Receiver, spawn: Spawn
) -> None:
    ocean, air = customers
    by_rest = [f"rest-{n}" for n in range(EVENTS)]
    by_kafka = [f"kafka-{n}" for n in range(EVENTS)]
    to_ready = [f"ready-{n}" for n in range(EVENTS)]
    ready = {"delivery_type": "KAFKA", "destination": None}

    async def load(customer: Customer) -> None:
        await customer.submit(*map(customer.event, by_rest), *(customer.event(job, **ready) for job in to_ready))
        await customer.produce(*(json.dumps(customer.event(job)).encode() for job in by_kafka))

    await asyncio.gather(*map(load, customers))
    # Of ocean alone: a dead event, and a record that cannot become one.
    broken = receiver.script("/broken", Answer(500))
    await ocean.submit(ocean.event("dead", destination=broken, max_retries=0))
    await ocean.produce(b"nonsense")

    await asyncio.gather(*(each.received([*by_rest, *by_kafka]) for each in customers))
    await arrived(ocean.kafka.servers, "ocean.event.dlq", 2, PATIENCE_S)
    for customer in customers:
        name = customer.name
        await arrived(customer.kafka.servers, f"{name}.event.ready", EVENTS, PATIENCE_S)
        # Events: both have the same jobs, each with its own payload, delivered once to its own receiver.
        assert customer.jobs_received() == sorted([*by_rest, *by_kafka])
        stored = customer.database.rows("select external_job_id, payload ->> 'customer' from orchestrator.event")
        own_only = ["dead"] if customer is ocean else []
        assert sorted(job for job, _ in stored) == sorted([*by_rest, *by_kafka, *to_ready, *own_only])
        assert {owner for _, owner in stored} == {name}
        # Topics: what is written to a topic is this customer's.
        values = await customer.record_values("event.ready")
        assert sorted(value["job"] for value in values) == sorted(to_ready)
        assert {value["customer"] for value in values} == {name}
        for record in await records(customer.kafka.servers, f"{name}.event.dlq"):
            assert customer is ocean, record.value
            assert headers(record)["orchestrator-kind"] in ("dead", "reject")
        # Dead letters and rejects.
        assert customer.database.column("select count(*) from orchestrator.dead_letter") == [len(own_only)]
        assert customer.database.column("select count(*) from orchestrator.reject") == [len(own_only)]
        # Positions, in the database and as Kafka is told.
        topics = set(customer.database.column("select topic from orchestrator.ingest_offset"))
        assert topics
        assert topics <= {f"{name}.event.submissions", f"{name}.process-kafka-message"}
        assert await committed_topics(customer) <= topics
        # Metrics and log lines.
        metrics = (await customer.api.get("/metrics")).text
        own = [line for line in metrics.splitlines() if line.startswith("orchestrator_")]
        assert own
        assert all(f'customer="{name}"' in line and f'deployment="event-scheduler-{name}"' in line for line in own)
        lines = [json.loads(line) for line in customer.process.log().splitlines()]
        assert {(line["customer"], line["deployment"]) for line in lines} == {(name, f"event-scheduler-{name}")}
        assert not any(f"{other.name}." in json.dumps(lines) for other in customers if other is not customer)

    # A key of one is no key of the other.
    stranger = await air.api.get("/api/v1/events/statistics", headers={"Authorization": f"Bearer {ocean.key}"})
    assert stranger.status_code == 401
    await a_pause_of_one_leaves_the_other(ocean, air)
    await notifications_stay_in_their_database(ocean, air)
    await a_process_on_the_wrong_database_does_not_start(ocean, air, spawn)
    for customer in customers:
        no_more_connections_than_the_sizes_say(customer)


async def committed_topics(customer: Customer) -> set[str]:
    """The topics of which this customer's group has told Kafka a position; it does so now and then."""
    async with started(AIOKafkaAdminClient(bootstrap_servers=customer.kafka.servers)) as admin:

        async def found() -> set[str]:
            offsets = await admin.list_consumer_group_offsets(f"event-scheduler-{customer.name}")
            return {partition.topic for partition, position in offsets.items() if position.offset >= 0}

        return await eventually(found, PATIENCE_S, pause_s=0.2)


def no_more_connections_than_the_sizes_say(customer: Customer) -> None:
    settings = Settings.from_env(customer.environ)
    sessions = customer.database.rows(
        "select application_name, count(*) from pg_stat_activity where datname = current_database()"
        " and application_name like 'orchestrator%' group by 1"
    )
    counted = {str(name): int(count) for name, count in sessions}
    assert sum(counted.values()) <= most_connections(settings), counted


async def a_pause_of_one_leaves_the_other(ocean: Customer, air: Customer) -> None:
    ocean.database.rows("select orchestrator.pause_all()")
    ocean.database.rows("select orchestrator.configure_destination(%s, p_max_parallel => 1)", _host(ocean))
    for each in (ocean, air):
        await each.submit(each.event("paused"))
    await air.received(["paused"])
    assert "paused" not in ocean.jobs_received()
    assert air.database.column("select count(*) from orchestrator.destination where max_parallel is not null") == [0]
    ocean.database.rows("select orchestrator.resume_all()")
    await ocean.received(["paused"])


def _host(customer: Customer) -> str:
    return customer.receiver.url("").removeprefix("http://")


async def notifications_stay_in_their_database(ocean: Customer, air: Customer) -> None:
    async with AsyncExitStack() as stack:
        heard: dict[str, list[str]] = {"ocean": [], "air": []}
        for each in (ocean, air):
            session = await psycopg.AsyncConnection.connect(each.environ["DATABASE_URL"], autocommit=True)
            await stack.enter_async_context(session)
            await session.execute("listen orchestrator_due")
            task = asyncio.create_task(_listen(session, heard[each.name]))
            stack.callback(task.cancel)
        await ocean.submit(ocean.event("heard"))
        await eventually(lambda: heard["ocean"], PATIENCE_S)
        await ocean.received(["heard"])
        assert heard["air"] == []
        await air.submit(air.event("heard"))
        await eventually(lambda: heard["air"], PATIENCE_S)


async def _listen(session: psycopg.AsyncConnection[Any], heard: list[str]) -> None:
    async for notification in session.notifies():
        heard.append(notification.payload)


async def a_process_on_the_wrong_database_does_not_start(ocean: Customer, air: Customer, spawn: Spawn) -> None:
    process = spawn("ingest", **(air.environ | {"DATABASE_URL": ocean.environ["DATABASE_URL"]}))
    assert await process.wait(PATIENCE_S) == 1
    assert "CUSTOMER_NAME: expected ocean, whose database this is, got air" in process.log()
