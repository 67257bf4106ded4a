"""The API on a real socket, in the event loop of a test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

from orchestrator.api.server.server import serve
from orchestrator.database import Database
from orchestrator.dev.operating_system import free_port as free_port
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from tests.support.waiting import eventually


def tomorrow() -> datetime:
    return datetime.now(UTC).replace(microsecond=123456) + timedelta(days=1)


def submission(**changes: Any) -> dict[str, Any]:
    """A submission that is accepted, due tomorrow."""
    return {
        "source": "orders",
        "scheduled_at": tomorrow().isoformat(),
        "destination": "http://127.0.0.1:9/hook",
        "payload": {"a": 1},
    } | changes


@asynccontextmanager
async def running_api(
    settings: Settings, database: Database, metrics: Metrics | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that stops when the block ends."""
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(settings, database, metrics or Metrics(settings), stop=stop))
    base_url = f"http://127.0.0.1:{settings.server_port}"
    try:
        async with httpx.AsyncClient(base_url=base_url, timeout=30, trust_env=False) as client:
            await until(lambda: _starts(client, serving))
            yield client
    finally:
        stop.set()
        await serving


async def _starts(client: httpx.AsyncClient, serving: asyncio.Task[None]) -> bool:
    if serving.done():
        await serving  # raises why
    return await status(client, "/openapi.json") == 200


async def status(client: httpx.AsyncClient, path: str) -> int | None:
    """The status of GET `path`; None while nothing listens."""
    try:
        return (await client.get(path)).status_code
    except httpx.ConnectError:
        return None


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Waits until an asynchronous condition is true."""
    plain_or_not: Callable[[], bool | Awaitable[bool]] = condition
    await eventually(plain_or_not, timeout_s)


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """That the answer is a problem document of this kind; returns it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = json.loads(response.content)
    assert problem["type"] == f"urn:orchestrator:problem:{kind}"
    assert problem["status"] == status
    assert {"title", "detail", "instance"} <= problem.keys()
    return problem


def fields(problem: dict[str, Any]) -> set[str]:
    return {error["field"] for error in problem["errors"]}
