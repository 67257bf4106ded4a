"""Two instances of the API behind nginx, under load: neither a restart of each nor a kill fails a request."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.dev.operating_system import free_port
from tests.conftest import Spawn
from tests.integration.api_support import until
from tests.support.certificates import Authority
from tests.support.nginx import Nginx, configured, running
from tests.support.processes import Spawned
from tests.support.sql_client import Client
from tests.support.tools import tool
from tests.support.waiting import eventually

CLIENTS = 6
PATIENCE_S = 60.0

pytestmark = pytest.mark.timeout(300)


@dataclass
class Instance:
    """One of the API's processes; each start is on the same ports."""

    spawn: Spawn
    given: dict[str, str]
    port: int = field(default_factory=free_port)
    management: int = field(default_factory=free_port)

    async def start(self) -> None:
        ports = {"SERVER_PORT": str(self.port), "MANAGEMENT_SERVER_PORT": str(self.management)}
        self.process: Spawned = self.spawn("api", **self.given, **ports, LOG_LEVEL="WARNING")
        await until(self.is_ready, PATIENCE_S)

    async def is_ready(self) -> bool:
        assert self.process.returncode is None, self.process.log()
        async with httpx.AsyncClient(trust_env=False) as client:
            try:
                return (await client.get(f"http://127.0.0.1:{self.management}/ready")).status_code == 200
            except httpx.TransportError:
                return False


@dataclass
class Load:
    """Clients that submit and ask without a pause, each on a connection that it keeps."""

    faults: list[str] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    _numbers: Any = field(default_factory=itertools.count)
    _over: bool = False

    async def more(self, count: int) -> None:
        """Waits until so many more submissions have been acknowledged."""
        wanted = len(self.acknowledged) + count
        await eventually(lambda: len(self.acknowledged) >= wanted or self.faults, PATIENCE_S)
        assert not self.faults, self.faults[:3]

    def stop(self) -> None:
        self._over = True

    async def run(self, client: httpx.AsyncClient) -> None:
        while not self._over:
            try:
                await self._round(client)
            except httpx.HTTPError as error:
                self.faults.append(repr(error))

    async def _round(self, client: httpx.AsyncClient) -> None:
        one, *more = (self._event() for _ in range(3))
        answer = await client.post("/api/v1/events", json=one)
        if self._is_good(answer):
            self.acknowledged.append(answer.json()["id"])
            self._is_good(await client.get(f"/api/v1/events/{self.acknowledged[-1]}"))
        answer = await client.post("/api/v1/events/batch", json={"events": more})
        if self._is_good(answer):
            self.acknowledged += [result["id"] for result in answer.json()["results"]]
        self._is_good(await client.get("/api/v1/events/statistics"))

    def _event(self) -> dict[str, Any]:
        due = datetime.now(UTC) + timedelta(days=1)
        return {
            "source": "drill",
            "external_job_id": f"job-{next(self._numbers)}",
            "scheduled_at": due.isoformat(),
            "destination": "http://127.0.0.1:9/hook",
            "payload": {"a": 1},
        }

    def _is_good(self, answer: httpx.Response) -> bool:
        if answer.is_success:
            return True
        self.faults.append(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}")
        return False


@asynccontextmanager
async def loaded(nginx: Nginx, trusted: Path) -> AsyncIterator[Load]:
    """Half of the clients come over TLS. At the end none may have seen a fault."""
    load = Load()
    context = ssl.create_default_context(cafile=trusted)
    urls = [f"https://127.0.0.1:{nginx.tls}", f"http://127.0.0.1:{nginx.plain}"]
    clients = [
        httpx.AsyncClient(base_url=urls[number % 2], verify=context, trust_env=False, timeout=PATIENCE_S)
        for number in range(CLIENTS)
    ]
    tasks = [asyncio.create_task(load.run(client)) for client in clients]
    try:
        yield load
    finally:
        load.stop()
        await asyncio.gather(*tasks)
        for client in clients:
            await client.aclose()
    assert not load.faults, load.faults[:3]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "tls").mkdir()
    return Authority(str(tool("openssl")), tmp_path / "tls")


@pytest.mark.parametrize("drain_s", ["0", "0.5"])
async def test_a_restart_of_each_instance_and_a_kill_fail_no_request_and_lose_no_event(
    spawn: Spawn, database_url: str, authority: Authority, tmp_path: Path, drain_s: str
) -> None:
    given = {"DATABASE_URL": database_url, "DB_POOL_MAX_SIZE": "5", "SHUTDOWN_DRAIN_SECONDS": drain_s}
    instances = Instance(spawn, given), Instance(spawn, given)
    folder = tmp_path / "nginx"
    folder.mkdir()
    nginx = configured(folder, (instances[0].port, instances[1].port), authority.certificate("nginx"))
    await asyncio.gather(*(instance.start() for instance in instances))
    with running(nginx):
        async with loaded(nginx, authority.trusted) as load:
            await load.more(100)
            for instance in instances:
                assert await instance.process.stop(PATIENCE_S) == 0
                await load.more(60)
                await instance.start()
                await load.more(60)
            for instance in instances:
                await instance.process.kill()
                await load.more(60)
                await instance.start()
                await load.more(60)
        assert any(", " in each["upstream"] for each in nginx.requests())  # it had to repeat some
        used = {address for each in nginx.requests() for address in each["upstream"].split(", ")}
        assert used == {f"127.0.0.1:{instance.port}" for instance in instances}
    for instance in instances:
        assert await instance.process.stop(PATIENCE_S) == 0
    with Client(database_url) as client:
        kept = client.column("select id::text from orchestrator.event")
        jobs = client.value("select count(distinct external_job_id) from orchestrator.event")
    assert len(load.acknowledged) == len(set(load.acknowledged)) == jobs == len(kept)
    assert set(kept) == set(load.acknowledged)
