"""The running server: health, ports, limits, stopping, and a database that goes away."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import httpx
import pytest

import orchestrator.database.pool
from orchestrator.api.routes import health
from orchestrator.api.server.server import serve, serve_management
from orchestrator.database import Database
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.errors import OrchestratorError
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.integration.api_support import assert_problem, free_port, running_api, status, submission, until

LIVENESS = ("/health", "/actuator/health/liveness")
READINESS = ("/ready", "/actuator/health", "/actuator/health/readiness")
METRICS = ("/metrics", "/actuator/prometheus")


@pytest.fixture
def chosen(settings: MakeSettings) -> Settings:
    return settings()


@pytest.fixture
async def database(chosen: Settings) -> AsyncIterator[Database]:
    async with Database(chosen, role="api") as database:
        yield database


async def test_health_and_metrics_are_served_under_both_vocabularies(chosen: Settings, database: Database) -> None:
    async with running_api(chosen, database) as client:
        for path in (*LIVENESS, *READINESS):
            response = await client.get(path)
            assert response.status_code == 200
            assert response.json()["status"] == "UP"
        await client.post("/api/v1/events", json=submission())
        for path in METRICS:
            response = await client.get(path)
            assert response.headers["content-type"].startswith("text/plain")
            lines = response.text.splitlines()
            received = next(line for line in lines if line.startswith("orchestrator_events_received_total{"))
            assert received.endswith(" 1.0")
            assert 'channel="http"' in received
            assert any(
                line.startswith("orchestrator_http_request_seconds_count{")
                and 'route="/api/v1/events"' in line
                and 'status="201"' in line
                for line in lines
            )


async def test_metrics_know_routes_and_methods_but_no_paths(chosen: Settings, database: Database) -> None:
    async with running_api(chosen, database) as client:
        await client.get("/nothing/secret-path")
        await client.get("/api/v1/events/external/secret-job")
        await client.request("PROPFIND", "/health")
        text = (await client.get("/metrics")).text
        assert "secret" not in text
        assert 'route="none"' in text
        assert 'route="/api/v1/events/external/{external_job_id}"' in text
        assert 'method="other"' in text


async def test_with_a_management_port_health_and_metrics_are_only_there(settings: MakeSettings) -> None:
    port = free_port()
    chosen = settings(MANAGEMENT_SERVER_PORT=str(port))
    async with Database(chosen, role="api") as database, running_api(chosen, database) as client:
        for path in (*LIVENESS, *READINESS, *METRICS):
            assert_problem(await client.get(path), 404, "not-found")
            assert (await client.get(f"http://127.0.0.1:{port}{path}")).status_code == 200
        assert_problem(await client.get(f"http://127.0.0.1:{port}/api/v1/events/statistics"), 404, "not-found")
        assert not {"/health", "/metrics"} & (await client.get("/openapi.json")).json()["paths"].keys()


async def test_a_process_without_an_api_serves_health_alone(chosen: Settings, database: Database) -> None:
    stop = asyncio.Event()
    serving = asyncio.create_task(serve_management(chosen, database, Metrics(chosen), stop=stop))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{chosen.server_port}", trust_env=False) as client:
        await until(lambda: _is(200, client, "/ready"))
        assert await status(client, "/openapi.json") == 404
    stop.set()
    await serving


async def _is(expected: int, client: httpx.AsyncClient, path: str) -> bool:
    return await status(client, path) == expected


@pytest.mark.parametrize("name", ["SERVER_PORT", "MANAGEMENT_SERVER_PORT"])
async def test_a_port_that_is_taken_is_an_error_that_names_the_setting(settings: MakeSettings, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        chosen = settings(**{name: str(taken)})
        async with Database(chosen, role="api") as database:
            with pytest.raises(
                OrchestratorError, match=f"^{name}: cannot listen on 127.0.0.1:{taken}: another process"
            ):
                await serve(chosen, database, Metrics(chosen), stop=asyncio.Event())


async def test_requests_under_way_are_finished_before_the_server_stops(chosen: Settings, database: Database) -> None:
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(chosen, database, Metrics(chosen), stop=stop))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{chosen.server_port}", trust_env=False) as client:
        await until(lambda: _is(200, client, "/health"))
    reader, writer = await asyncio.open_connection("127.0.0.1", chosen.server_port)
    raw = json.dumps(submission()).encode()
    head = (
        f"POST /api/v1/events HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
    )
    writer.write(head.encode() + b"Expect: 100-continue\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 100")  # so the request has begun
    stop.set()
    await until(lambda: _refuses_connections(chosen.server_port))
    assert not serving.done()
    writer.write(raw)
    answer = await reader.read()
    assert b"HTTP/1.1 201" in answer
    writer.close()
    await serving
    assert json.loads(await database.statistics())["scheduled"] == 1


async def test_a_stopping_server_answers_what_was_on_its_way_and_ends_the_connection(
    chosen: Settings, database: Database
) -> None:
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(chosen, database, Metrics(chosen), stop=stop))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{chosen.server_port}", trust_env=False) as client:
        await until(lambda: _is(200, client, "/health"))
        new, begun, kept = [await asyncio.open_connection("127.0.0.1", chosen.server_port) for _ in range(3)]
        kept[1].write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        begun[1].write(b"GET /health HTTP/1.1\r\n")
        assert b"connection: close" not in await kept[0].readuntil(b"}}}")
        await until(lambda: _is(200, client, "/health"))  # so that the server has read what has begun
    stop.set()
    for _, writer in (new, kept):
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n")
    await until(lambda: _refuses_connections(chosen.server_port))
    begun[1].write(b"Host: a\r\n\r\n")
    for reader, writer in (new, begun, kept):
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"\r\nconnection: close\r\n" in answer
        writer.close()
    await serving


async def test_during_a_drain_the_server_takes_requests_and_is_not_ready(settings: MakeSettings) -> None:
    chosen = settings(SHUTDOWN_DRAIN_SECONDS="1.5")
    stop = asyncio.Event()
    async with Database(chosen, role="api") as database:
        serving = asyncio.create_task(serve(chosen, database, Metrics(chosen), stop=stop))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{chosen.server_port}", trust_env=False) as client:
            await until(lambda: _is(200, client, "/ready"))
            stop.set()
            await until(lambda: _is(503, client, "/ready"))
            answer = await client.post("/api/v1/events", json=submission())
            assert (answer.status_code, answer.headers["connection"]) == (201, "close")
            assert not serving.done()
        await serving
    assert await _refuses_connections(chosen.server_port)


async def _refuses_connections(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionResetError:  # it was let in just before
        return False
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_a_request_that_never_ends_does_not_hold_up_the_stop(settings: MakeSettings) -> None:
    chosen = settings(SHUTDOWN_TIMEOUT_SECONDS="1")
    async with Database(chosen, role="api") as database, running_api(chosen, database):
        reader, writer = await asyncio.open_connection("127.0.0.1", chosen.server_port)
        writer.write(
            b"POST /api/v1/events HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n"
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 100")
    writer.close()


async def test_a_body_that_stays_away_is_a_408(settings: MakeSettings) -> None:
    chosen = settings(API_BODY_TIMEOUT_SECONDS="0.2")
    async with Database(chosen, role="api") as database, running_api(chosen, database):
        reader, writer = await asyncio.open_connection("127.0.0.1", chosen.server_port)
        writer.write(
            b"POST /api/v1/events HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        answer = await reader.read()  # to the end: a connection whose body stays away is closed
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"urn:orchestrator:problem:timeout" in answer


async def test_a_client_that_goes_away_in_the_middle_harms_nobody(chosen: Settings, database: Database) -> None:
    async with running_api(chosen, database) as client:
        _, writer = await asyncio.open_connection("127.0.0.1", chosen.server_port)
        writer.write(
            b"POST /api/v1/events HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        await writer.drain()
        writer.close()

        async def noted() -> bool:
            return 'status="499"' in (await client.get("/metrics")).text

        await until(noted)
        assert (await client.post("/api/v1/events", json=submission())).status_code == 201


async def test_while_the_database_is_away_requests_are_503_and_the_process_lives(
    postgres_server: EmbeddedPostgres, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CACHE_S", 0.0)
    monkeypatch.setattr(orchestrator.database.pool, "_TIMEOUT_S", 0.5)
    chosen = settings(DATABASE_URL=postgres_server.url("orchestrator"))
    async with Database(chosen, role="api") as database, running_api(chosen, database) as client:
        await asyncio.to_thread(postgres_server.stop)
        requests = [
            client.post("/api/v1/events", json=submission()),
            client.post("/api/v1/events/batch", json={"events": [submission()]}),
            client.get("/api/v1/events/statistics"),
        ]
        for response in await asyncio.gather(*requests):
            assert_problem(response, 503, "unavailable")
            assert int(response.headers["retry-after"]) >= 1
        for path in LIVENESS:
            assert (await client.get(path)).status_code == 200
        for path in READINESS:
            response = await client.get(path)
            assert response.status_code == 503
            assert response.json()["status"] == response.json()["checks"]["database"]["status"] == "DOWN"
        await asyncio.to_thread(postgres_server.start)

        async def works_again() -> bool:
            return (await client.post("/api/v1/events", json=submission())).status_code == 201

        await until(works_again, 30)
        assert (await client.get("/ready")).status_code == 200


async def test_a_database_without_the_schema_is_not_ready_and_the_reason_says_what_to_do(
    empty_database_url: str, settings: MakeSettings
) -> None:
    chosen = settings(DATABASE_URL=empty_database_url)
    async with Database(chosen, role="api") as database, running_api(chosen, database) as client:
        response = await client.get("/ready")
        assert response.status_code == 503
        assert "orchestrator migrate" in response.json()["checks"]["database"]["reason"]


async def test_readiness_asks_the_database_once_however_many_ask(chosen: Settings, database: Database) -> None:
    asked = 0
    original = database.ready

    async def counting() -> None:
        nonlocal asked
        asked += 1
        await original()

    database.ready = counting  # type: ignore[method-assign]
    async with running_api(chosen, database) as client:
        responses = await asyncio.gather(*(client.get("/ready") for _ in range(20)))
    assert {response.status_code for response in responses} == {200}
    assert asked == 1
