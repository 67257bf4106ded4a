"""`orchestrator dev` with the broker that it brings: events go through Kafka, and all begins anew with each run."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import httpx
import psycopg
import pytest

from orchestrator.dev import kafka_wheel
from orchestrator.dev.environment import is_free
from tests.conftest import Spawn
from tests.support.processes import Spawned
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(kafka_wheel.unavailable() is not None, reason=f"{kafka_wheel.unavailable()}")


async def addresses(process: Spawned) -> dict[str, str]:
    await process.wait_for_log('"kafka"', 30)
    line = next(line for line in process.log().splitlines() if line.startswith('{"api"'))
    found: dict[str, str] = json.loads(line)
    return found


async def test_an_event_goes_through_kafka_in_every_run_with_the_same_database(spawn: Spawn) -> None:
    for run in ("first", "second"):
        process = spawn("dev", "--json")
        where = await addresses(process)
        event = {"source": run, "scheduled_at": datetime.now(UTC).isoformat(), "payload": {"run": run}}
        async with httpx.AsyncClient() as client:
            response = await client.post(where["api"], json=event | {"destination": f"{where['receiver']}/{run}"})
        assert response.status_code == 202, response.text
        await process.wait_for_log(f"webhook /{run}", 30)
        assert await process.stop() == 0


async def test_an_event_accepted_before_a_stop_is_kept(spawn: Spawn, database_url: str) -> None:
    process = spawn("dev", "--json")
    where = await addresses(process)
    event = {"source": "tests", "scheduled_at": (datetime.now(UTC) + timedelta(hours=1)).isoformat(), "payload": 1}
    async with httpx.AsyncClient() as client:
        for n in range(20):
            body = event | {"destination": where["receiver"], "external_job_id": f"{n}"}
            response = await client.post(where["api"], json=body)
            assert response.status_code == 202, response.text
    assert await process.stop() == 0
    with psycopg.connect(database_url) as connection:
        assert connection.execute("select count(*) from orchestrator.event").fetchone() == (20,)


async def test_two_runs_with_one_database_share_a_broker(spawn: Spawn) -> None:
    first, second = (spawn("dev", "--json") for _ in range(2))
    assert (await addresses(first))["kafka"] == (await addresses(second))["kafka"]
    assert [await process.stop() for process in (first, second)] == [0, 0]


async def test_runs_after_one_that_was_killed_share_a_broker_that_runs(spawn: Spawn) -> None:
    killed = spawn("dev", "--json")
    await addresses(killed)
    await killed.kill()
    first, second = (spawn("dev", "--json") for _ in range(2))
    where = [(await addresses(process))["kafka"] or "" for process in (first, second)]
    assert where[0] == where[1]
    host, _, port = where[0].rpartition(":")
    assert not is_free(host, int(port))
    assert [await process.stop() for process in (first, second)] == [0, 0]


async def test_dev_uses_the_brokers_that_are_given(spawn: Spawn) -> None:
    process = spawn("dev", "--json", KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert await process.wait() == 1
    await eventually(lambda: "Error: KAFKA_BOOTSTRAP_SERVERS: no broker answers at 127.0.0.1:1" in process.log())
