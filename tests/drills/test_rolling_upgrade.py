"""Every process of the version before is replaced by one of this version, one by one, under load over REST and Kafka.

Nothing is lost, nothing is early, and only what a killed dispatcher held arrives twice.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.database.migrate import check
from orchestrator.dev.operating_system import free_port
from tests.conftest import Spawn
from tests.integration.api_support import until
from tests.integration.test_upgrade import Previous, previous
from tests.support.brokers import Kafka
from tests.support.certificates import Authority
from tests.support.dispatching import arrivals, assert_laws, soon
from tests.support.ingesting import Topic, producing
from tests.support.nginx import configured, running
from tests.support.processes import Spawned
from tests.support.receiver import Receiver
from tests.support.sql_client import Client
from tests.support.tools import tool
from tests.support.waiting import eventually

__all__ = ["previous"]

PATIENCE_S = 90.0
QUICK = {
    "SCHEDULER_LOOKAHEAD_MS": "500",
    "HTTP_TIMEOUT_SECONDS": "2",
    "SCHEDULER_LEASE_SECONDS": "8",
    "DB_POOL_MAX_SIZE": "5",
    "LOG_LEVEL": "WARNING",
}

pytestmark = pytest.mark.timeout(600)


@dataclass
class Role:
    """One process, of whichever version; each start is on the same ports."""

    name: str
    port: int = field(default_factory=free_port)
    management: int = field(default_factory=free_port)
    process: Spawned | None = None

    async def start(self, spawn: Callable[..., Spawned]) -> None:
        ports = {"SERVER_PORT": str(self.port), "MANAGEMENT_SERVER_PORT": str(self.management)}
        self.process = process = spawn(self.name, **ports)

        async def is_ready() -> bool:
            assert process.returncode is None, process.log()
            async with httpx.AsyncClient(trust_env=False) as client:
                try:
                    return (await client.get(f"http://127.0.0.1:{self.management}/ready")).status_code == 200
                except httpx.TransportError:
                    return False

        await until(is_ready, PATIENCE_S)

    async def end(self, *, kill: bool = False) -> None:
        assert self.process is not None
        if kill:
            await self.process.kill()
        else:
            assert await self.process.stop(PATIENCE_S) == 0, self.process.log()


class Load:
    """Submits over REST and to the topic, a little ahead of time; `acknowledged` are the external ids."""

    def __init__(self, topic: Topic, hook: str) -> None:
        self.acknowledged: list[str] = []
        self.faults: list[str] = []
        self._topic = topic
        self._hook = hook
        self._over = False

    def stop(self) -> None:
        self._over = True

    async def rest(self, url: str) -> None:
        number = 0
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=PATIENCE_S) as client:
            while not self._over:
                number += 1
                events = [self._event(f"rest-{number}-{part}") for part in range(2)]
                try:
                    answer = await client.post("/api/v1/events/batch", json={"events": events})
                except httpx.HTTPError as error:
                    self.faults.append(repr(error))
                    continue
                if answer.is_success:
                    self.acknowledged += [event["external_job_id"] for event in events]
                else:
                    self.faults.append(f"{answer.status_code} {answer.text}")
                await asyncio.sleep(0.05)

    async def kafka(self) -> None:
        number = 0
        async with producing(self._topic) as producer:
            while not self._over:
                number += 1
                event = self._event(f"kafka-{number}")
                await producer.send_and_wait(self._topic.name, json.dumps(event).encode())
                self.acknowledged.append(event["external_job_id"])
                await asyncio.sleep(0.03)

    def _event(self, job: str) -> dict[str, Any]:
        return {
            "source": "drill",
            "external_job_id": job,
            "scheduled_at": soon(1.5).isoformat(),
            "destination": self._hook,
            "payload": {"job": job},
        }


async def test_every_process_is_replaced_under_load_and_nothing_is_lost_or_early(
    previous: Previous, spawn: Spawn, receiver: Receiver, kafka: Kafka, tmp_path: Path
) -> None:
    for name in ("nginx", "tls"):
        (tmp_path / name).mkdir()
    certificate = Authority(str(tool("openssl")), tmp_path / "tls").certificate("nginx")
    topic = await Topic.new(kafka)
    url = previous.environ["DATABASE_URL"]
    given = QUICK | topic.environ

    def old(*arguments: str, **ports: str) -> Spawned:
        return previous.spawn(*arguments, **given, **ports)

    def new(*arguments: str, **ports: str) -> Spawned:
        return spawn(*arguments, DATABASE_URL=url, **given, **ports)

    await previous.command("migrate")
    roles = [Role(name) for name in ("dispatch", "dispatch", "ingest", "ingest", "api", "api")]
    await asyncio.gather(*(role.start(old) for role in roles))
    nginx = configured(tmp_path / "nginx", (roles[4].port, roles[5].port), certificate)
    load = Load(topic, receiver.url("/hook"))
    with running(nginx), Client(url) as client:
        tasks = [asyncio.create_task(load.rest(f"http://127.0.0.1:{nginx.plain}")), asyncio.create_task(load.kafka())]

        async def progress() -> None:
            """Waits until events that are submitted from now on have arrived."""
            begun = len(load.acknowledged)
            await eventually(lambda: len(load.acknowledged) > begun + 20, PATIENCE_S)
            job = load.acknowledged[-1]
            await eventually(lambda: _has(receiver, job), PATIENCE_S)
            assert not load.faults, load.faults[:3]

        async def migrated() -> None:
            migrating = new("migrate")
            assert await migrating.wait(PATIENCE_S) == 0, migrating.log()

        try:
            await progress()
            await migrated()
            assert check(url) == []
            await progress()  # by programs of the version before, on the new schema
            maintain = Role("maintain")
            await maintain.start(new)
            for number, role in enumerate(roles):
                if number == len(roles) // 2:  # functions are applied again beneath both versions
                    client.rows("update orchestrator.migration set checksum = '' where file not like 'schema/%'")
                    await migrated()
                await role.end()
                await role.start(new)
                await progress()
            once = arrivals(receiver.requests)
            assert set(once.values()) == {1}
            for role in (roles[0], roles[2], roles[4]):
                await role.end(kill=True)
                await progress()
                await role.start(new)
        finally:
            load.stop()
            await asyncio.gather(*tasks)
        assert not load.faults, load.faults[:3]

        def all_are_kept() -> bool:
            kept = set(client.column("select external_job_id from orchestrator.event"))
            assert kept >= set(load.acknowledged), set(load.acknowledged) - kept
            return True

        await eventually(all_are_kept, PATIENCE_S)
        await eventually(lambda: client.value("select count(*) from orchestrator.timer") == 0, PATIENCE_S)
        for role in (*roles, maintain):
            await role.end()
        ids = client.column("select id::text from orchestrator.event")
        jobs = client.column("select external_job_id from orchestrator.event")
        assert len(jobs) == len(set(jobs))
        assert set(jobs) == set(load.acknowledged)
        assert client.value("select count(*) from orchestrator.reject") == 0
        assert Counter(client.column("select status from orchestrator.event_status")) == {"delivered": len(ids)}
        assert_laws(client, receiver.requests, ids)
        found = arrivals(receiver.requests)
        assert set(found) == set(ids)
        # What arrived twice was leased twice: by the dispatcher that was killed, and after its lease.
        leased_again = set(client.column("select event_id::text from orchestrator.outcomes where attempt > 1"))
        assert {identity for identity, times in found.items() if times > 1} <= leased_again
        assert client.value("select problems from orchestrator.maintenance_run order by run desc limit 1") == []


def _has(receiver: Receiver, job: str) -> bool:
    return any(f'"{job}"'.encode() in request.body for request in reversed(receiver.requests))
