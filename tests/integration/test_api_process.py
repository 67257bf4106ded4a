"""`orchestrator run`: the API's process beside the one that delivers, and what each keeps to itself."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import free_port, status, submission, until
from tests.support.dispatching import arrivals, assert_laws, finished, soon
from tests.support.processes import Spawned
from tests.support.receiver import HANG, Receiver
from tests.support.sql_client import Client
from tests.support.waiting import eventually


class Pair:
    """A process of `run`, and that of its API."""

    def __init__(self, process: Spawned, port: int) -> None:
        self.process = process
        self.port = port
        self.base_url = f"http://127.0.0.1:{port}"

    @property
    def api(self) -> psutil.Process:
        [api] = psutil.Process(self.process.pid).children()
        return api

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.base_url, timeout=30, trust_env=False)

    async def ready(self) -> None:
        async with self.client() as http:

            async def answers() -> bool:
                with suppress(httpx.TransportError):
                    return await status(http, "/ready") == 200
                return False

            await until(answers, 30)


@pytest.fixture
def run(spawn: Spawn) -> Callable[..., Pair]:
    def start(**given: str) -> Pair:
        port = free_port()
        return Pair(spawn("run", SERVER_PORT=str(port), **given), port)

    return start


async def test_a_busy_api_makes_no_event_late(run: Callable[..., Pair], client: Client, receiver: Receiver) -> None:
    pair = run()
    await pair.ready()
    pair.api.suspend()  # the worst a client could ever do to it
    due = soon(0.5)
    ids = client.schedule_many(50, scheduled_at=due, destination=receiver.url())
    requests = await receiver.wait_for(50)
    assert max(request.arrived_at for request in requests) - due.timestamp() < 2.0
    pair.api.resume()
    await finished(client, ids)
    await pair.ready()
    assert await pair.process.stop() == 0


async def test_an_api_that_dies_is_started_again_while_deliveries_go_on(
    run: Callable[..., Pair], client: Client, receiver: Receiver
) -> None:
    pair = run()
    await pair.ready()
    for _ in range(2):
        killed = pair.api.pid
        os.kill(killed, signal.SIGKILL)
        ids = client.schedule_many(5, scheduled_at=soon(0), destination=receiver.url())
        await finished(client, ids)
        await pair.ready()
        assert pair.api.pid != killed
    assert pair.process.log().count("the API ended; starting it again") == 2
    assert await pair.process.stop() == 0


async def test_the_api_ends_with_its_parent_however_that_ends(run: Callable[..., Pair]) -> None:
    for end in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        pair = run()
        await pair.ready()
        api = pair.api
        os.kill(pair.process.pid, end)
        assert await pair.process.wait() == (-signal.SIGKILL if end == signal.SIGKILL else 0)
        await eventually(lambda api=api: not api.is_running())  # type: ignore[misc, arg-type]
        assert "Traceback" not in pair.process.log()


async def test_a_second_signal_ends_both_processes_at_once(
    run: Callable[..., Pair], client: Client, receiver: Receiver
) -> None:
    pair = run()
    await pair.ready()
    api = pair.api
    client.schedule(scheduled_at=soon(0), destination=receiver.script("/hang", HANG))
    await receiver.wait_for(1, "/hang")
    os.kill(pair.process.pid, signal.SIGTERM)
    await pair.process.wait_for_log("a second signal")
    os.kill(pair.process.pid, signal.SIGTERM)
    assert await pair.process.wait(5) == 128 + signal.SIGTERM
    await eventually(lambda: not api.is_running())


async def test_metrics_of_both_processes_are_served_together(run: Callable[..., Pair], receiver: Receiver) -> None:
    pair = run()
    await pair.ready()
    async with pair.client() as http:
        event = submission(scheduled_at=soon(0).isoformat(), destination=receiver.url())
        assert (await http.post("/api/v1/events", json=event)).status_code == 201
        await receiver.wait_for(1)

        async def values() -> dict[tuple[str, str], float]:
            text = (await http.get("/metrics")).text
            return {
                (sample.name.removeprefix("orchestrator_"), sample.labels.get("status", "")): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.labels.get("route", "/api/v1/events") == "/api/v1/events"
            }

        async def all_told() -> bool:
            told = await values()
            return told["events_delivered_total", ""] == told["http_request_seconds_count", "201"] == 1.0

        await until(all_told)
        told = await values()
    assert told["build_info", ""] == told["events_received_total", ""] == 1
    parent = psutil.Process(pair.process.pid)
    both = parent.memory_info().rss + pair.api.memory_info().rss
    assert told["process_resident_memory_bytes", ""] == pytest.approx(both, rel=0.3)
    assert told["process_start_time_seconds", ""] == pytest.approx(
        psutil.Process(pair.process.pid).create_time(), abs=1
    )


async def test_health_says_so_when_the_process_that_delivers_does_not_answer(run: Callable[..., Pair]) -> None:
    pair = run()
    await pair.ready()
    async with pair.client() as http:
        assert await status(http, "/health") == 200
        pair.process.pause()

        async def down() -> bool:
            return await status(http, "/health") == 503

        await until(down, 20)
        assert await status(http, "/metrics") == 503
        pair.process.resume()

        async def up() -> bool:
            return await status(http, "/health") == 200

        await until(up)
    assert await pair.process.stop() == 0


async def test_run_ends_with_the_remedy_when_its_api_cannot_begin(run: Callable[..., Pair]) -> None:
    pair = run(ENVIRONMENT="production")
    assert await pair.process.wait() == 1
    assert pair.process.log().count("orchestrator keys create") == 1


@pytest.mark.parametrize("limit", [256, 1024])
async def test_idle_connections_that_fill_the_api_cost_no_event_its_first_attempt(
    run: Callable[..., Pair], client: Client, receiver: Receiver, limit: int
) -> None:
    pair = run(API_HEAD_TIMEOUT_SECONDS="60")
    resource.prlimit(pair.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
    await pair.ready()
    # More than there are descriptors, as long as the test may have so many itself.
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    writers = []
    try:
        for _ in range(min(limit + 80, ours - 300)):
            _, writer = await asyncio.open_connection("127.0.0.1", pair.port)
            writers.append(writer)
        ids = client.schedule_many(100, scheduled_at=soon(0.2), destination=receiver.url(), max_retries=0)
        began_s = time.monotonic()
        await pair.ready()
        assert time.monotonic() - began_s < 5
        await finished(client, ids)
    finally:
        for writer in writers:
            writer.transport.abort()
    assert arrivals(receiver.requests) == dict.fromkeys(ids, 1)
    assert client.column("select distinct attempt from orchestrator.outcomes") == [1]
    assert_laws(client, receiver.requests, ids)
    assert "Too many open files" not in pair.process.log()
    assert await pair.process.stop() == 0


async def test_deliveries_keep_within_the_descriptors_there_are(
    settings: MakeSettings, spawn: Spawn, client: Client, receiver: Receiver
) -> None:
    process = spawn("dispatch", HTTP_MAX_CONNECTIONS="400", HTTP_TIMEOUT_SECONDS="5")
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (256, 256))
    await process.wait_for_log("HTTP_MAX_CONNECTIONS: 400 are too many for 256 file descriptors")
    ids = client.schedule_many(300, scheduled_at=soon(0.2), destination=receiver.url(), max_retries=0)
    await finished(client, ids)
    assert arrivals(receiver.requests) == dict.fromkeys(ids, 1)
    assert client.column("select distinct attempt from orchestrator.outcomes") == [1]
    assert await process.stop() == 0
