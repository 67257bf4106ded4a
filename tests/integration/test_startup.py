"""Processes that start while the database breaks: they wait, say for what, answer health checks, and can be stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from psycopg import sql

from orchestrator.database import Database
from orchestrator.errors import OrchestratorError
from orchestrator.runtime import Role, _Process
from orchestrator.settings import Settings
from orchestrator.startup import until_done
from orchestrator.tasks import within
from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import free_port, status, until
from tests.support.cutting_proxy import CuttingProxy
from tests.support.ingesting import Topic
from tests.support.sql_client import Client
from tests.support.waiting import eventually

ENDS_WITHIN_S = 4.0
STAGES: list[tuple[Role, str]] = [
    ("api", "orchestrator.migration"),
    ("api", "count_api_keys"),
    ("dispatch", "prove_writing"),
    ("dispatch", "register_worker"),
    ("dispatch", "claim_for_dispatch"),
    ("maintain", "configure_retention"),
    ("maintain", "run_maintenance"),
    ("run", "set_outbox"),
    ("ingest", "ingest_offsets"),
]


@asynccontextmanager
async def running(settings: Settings, role: Role) -> AsyncIterator[asyncio.Task[None]]:
    """A process in this one; at the end it is stopped, which must be soon and in order."""
    process = _Process(settings, role)
    task = asyncio.create_task(process.run(()))
    try:
        yield task
    finally:
        process._stop.set()
        began_s = time.monotonic()
        await asyncio.wait([task], timeout=30)
        assert time.monotonic() - began_s < ENDS_WITHIN_S
        await task


def waits(caplog: pytest.LogCaptureFixture) -> bool:
    said = ("waiting for the database", "the database is away", "the outbox waits for the database")
    return any(record.message.startswith(said) for record in caplog.records)


def environment(topic: Topic, role: Role) -> dict[str, str]:
    given = {"SERVER_PORT": str(free_port()), "MANAGEMENT_SERVER_PORT": str(free_port()), "ALLOW_ANONYMOUS": "false"}
    return given | (topic.environ if role in ("run", "ingest") else {})


@pytest.fixture
def key(database_url: str) -> None:
    """There is a key, without which an API that needs one does not start."""
    with Client(database_url) as client:
        client.rows("select orchestrator.create_api_key('laptop', %s, '{read}')", b"x" * 32)


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(("role", "stage"), STAGES)
async def test_a_start_that_is_cut_goes_on_when_the_database_is_back(
    settings: MakeSettings, database_url: str, topic: Topic, role: Role, stage: str
) -> None:
    async with CuttingProxy(database_url) as proxy:
        proxy.cut_at(stage)
        ours = settings(DATABASE_URL=proxy.url, **environment(topic, role))
        async with running(ours, role) as task, client(ours) as http:
            await eventually(lambda: proxy.cuts == 1, 15)
            await until(lambda: answers(http, "/health", 200))
            proxy.mend()
            await eventually(lambda: proxy.forwarded(stage) > 0, 15)
            await until(lambda: answers(http, "/ready", 200), 15)
            assert not task.done()


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(("role", "stage"), STAGES)
async def test_a_start_that_hears_nothing_any_more_can_be_stopped_at_once(
    settings: MakeSettings, database_url: str, topic: Topic, role: Role, stage: str
) -> None:
    async with CuttingProxy(database_url) as proxy:
        proxy.hang_at(stage)
        ours = settings(DATABASE_URL=proxy.url, **environment(topic, role))
        async with running(ours, role) as task, client(ours) as http:
            await eventually(lambda: proxy.cuts == 1, 15)
            assert not task.done()
            await until(lambda: answers(http, "/health", 200))


def client(settings: Settings) -> httpx.AsyncClient:
    base = f"http://127.0.0.1:{settings.management_port}"
    return httpx.AsyncClient(base_url=base, timeout=30, trust_env=False)


async def answers(http: httpx.AsyncClient, path: str, wanted: int) -> bool:
    return await status(http, path) == wanted


def one_connection(settings: Settings) -> Database:
    return Database(replace(settings, pool_min_idle=1, pool_max_size=1), role="test")


async def test_a_connection_attempt_that_hears_nothing_is_given_up_and_the_next_one_succeeds(
    settings: MakeSettings, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with CuttingProxy(database_url) as proxy, one_connection(settings(DATABASE_URL=proxy.url)) as database:
        proxy.hang_at("prove_writing")
        waiting = asyncio.create_task(until_done("readiness", database.ready, asyncio.Event(), answer_s=0.3))
        await eventually(lambda: proxy.cuts == 1)
        proxy.mend()
        await eventually(lambda: waits(caplog))
        [warning] = [r for r in caplog.records if r.message == "waiting for the database"][:1]
        assert (warning.__dict__["step"], warning.__dict__["error"]) == ("readiness", "no answer within 0.3 s")
        assert await asyncio.wait_for(waiting, 10)


async def test_connections_that_fell_silent_are_given_up_together(settings: MakeSettings, database_url: str) -> None:
    async with CuttingProxy(database_url) as proxy:
        few = replace(settings(DATABASE_URL=proxy.url), pool_min_idle=3, pool_max_size=3)
        async with Database(few, role="test") as database:
            await asyncio.gather(*[database.value("select pg_sleep(0.1)") for _ in range(3)])
            proxy.hang()
            with pytest.raises(TimeoutError):
                await within(0.2, database.ready())
            proxy.mend()
            await asyncio.wait_for(database.ready(), 8.0)
            assert database.pool_stats()["connections_lost"] == 2


async def test_a_process_that_never_hears_anything_is_not_deaf_to_sigterm(spawn: Spawn, database_url: str) -> None:
    async with CuttingProxy(database_url) as proxy:
        proxy.hang()
        process = spawn("run", DATABASE_URL=proxy.url)
        await process.wait_for_log("listening")
        began_s = time.monotonic()
        assert await process.stop() == 0
        assert time.monotonic() - began_s < ENDS_WITHIN_S


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"netloc": "nobody:wrong@{host}"}, 'password authentication failed for user "nobody"'),
        ({"path": "/absent"}, 'database "absent" does not exist'),
        ({"query": "options=-c%20nonsense_x%3D1"}, 'unrecognized configuration parameter "nonsense_x"'),
        ({"query": "options=-c%20work_mem%3Dmuch"}, 'invalid value for parameter "work_mem"'),
        ({"query": "options=-c%20max_connections%3D9"}, 'parameter "max_connections" cannot be'),
        ({"query": "options=--"}, "invalid command-line argument for server process"),
    ],
)
async def test_a_wrong_login_stops_the_start_by_name(
    settings: MakeSettings, database_url: str, change: dict[str, str], named: str
) -> None:
    url = urlsplit(database_url)
    changed = {part: text.format(host=url.netloc.rpartition("@")[2]) for part, text in change.items()}
    process = _Process(settings(DATABASE_URL=url._replace(**changed).geturl()), "maintain")
    with pytest.raises(OrchestratorError, match=f"DATABASE_URL: the server refuses it: .*{named}"):
        await process.run(())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("alter role {role} nologin", 'role "[^"]*" is not permitted to log in'),
        ("revoke connect on database {database} from public", 'permission denied for database "[^"]*"'),
    ],
)
async def test_a_login_that_may_not_connect_stops_the_start_by_name(
    settings: MakeSettings, database_url: str, change: str, named: str
) -> None:
    url = urlsplit(database_url)
    database = url.path.lstrip("/")
    names = {"role": sql.Identifier(f"guest_{database}"), "database": sql.Identifier(database)}
    with psycopg.connect(database_url, autocommit=True) as admin:
        admin.execute(sql.SQL("create role {role} login password 'secret'").format(**names))
        try:
            admin.execute(sql.SQL(change).format(**names))
            login = url._replace(netloc=f"guest_{database}:secret@{url.netloc.rpartition('@')[2]}").geturl()
            with pytest.raises(OrchestratorError, match=f"DATABASE_URL: the server refuses it: .*{named}"):
                await _Process(settings(DATABASE_URL=login), "maintain").run(())
        finally:
            admin.execute(sql.SQL("drop role {role}").format(**names))
