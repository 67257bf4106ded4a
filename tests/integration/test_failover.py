"""A database that answers and takes no writes: read-only for a while, a standby, and a standby that is promoted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from psycopg import sql

from orchestrator.database import Database, migrate
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.errors import DatabaseUnavailable
from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import free_port, running_api, status, submission, until
from tests.integration.cli_support import invoke
from tests.support.dispatching import assert_laws, dispatching, soon, statuses
from tests.support.ingesting import Topic, feed, ingesting
from tests.support.ingesting import submission as record
from tests.support.receiver import Receiver
from tests.support.sql_client import Client
from tests.support.standby import both, promote, standby_of
from tests.support.waiting import eventually


def set_read_only(client: Client, action: str) -> None:
    """Sessions of this database that begin from now on are read-only, or not, and stay so; others end."""
    client.rows("set default_transaction_read_only = off")
    name = sql.Identifier(client.value("select current_database()"))
    client.connection.execute(sql.SQL("alter database {} " + action).format(name))


async def test_the_api_recovers_at_once_when_the_database_takes_writes_again(
    settings: MakeSettings, client: Client
) -> None:
    ours = settings()
    async with Database(ours, role="api") as database, running_api(ours, database) as api:

        async def answers(posts: int, ready: int) -> bool:
            posted = await api.post("/api/v1/events", json=submission())
            return (posted.status_code, await status(api, "/ready")) == (posts, ready)

        assert await answers(201, 200)
        set_read_only(client, "set default_transaction_read_only = on")
        client.rows(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name ~ 'orchestrator'"
        )
        await until(lambda: answers(503, 503))
        assert "takes no writes: default_transaction_read_only is on" in (await api.get("/ready")).text
        assert (await api.get("/api/v1/events/statistics")).status_code == 200
        assert (await api.get("/health")).status_code == 200
        set_read_only(client, "reset default_transaction_read_only")
        # The sessions that were opened meanwhile are read-only for as long as they last.
        await until(lambda: answers(201, 200), 4.0)
        posted = await asyncio.gather(*[api.post("/api/v1/events", json=submission()) for _ in range(50)])
        assert {answer.status_code for answer in posted} == {201}


async def test_the_api_is_not_ready_while_the_disk_of_the_database_is_full(
    settings: MakeSettings, client: Client
) -> None:
    ours = settings()
    async with Database(ours, role="api") as database, running_api(ours, database) as api:
        assert await status(api, "/ready") == 200
        client.rows(
            "create function full_disk() returns trigger language plpgsql as "
            "$$ begin raise exception 'could not extend file' using errcode = 'disk_full'; end $$"
        )
        client.rows("create trigger full_disk before insert on orchestrator.timer execute function full_disk()")
        assert (await api.post("/api/v1/events", json=submission())).status_code == 503
        await until(lambda: is_ready(api, 503))
        assert "its disk is full" in (await api.get("/ready")).text
        client.rows("drop trigger full_disk on orchestrator.timer")
        assert (await api.post("/api/v1/events", json=submission())).status_code == 201
        await until(lambda: is_ready(api, 200))


async def is_ready(http: httpx.AsyncClient, wanted: int) -> bool:
    return await status(http, "/ready") == wanted


async def test_commands_that_must_write_say_that_they_cannot(client: Client, settings: MakeSettings) -> None:
    set_read_only(client, "set default_transaction_read_only = on")
    url = settings().database_url
    with pytest.raises(DatabaseUnavailable, match="takes no writes"):
        migrate.migrate(url)
    doctor = invoke("doctor", env={"DATABASE_URL": url, "COLUMNS": "200"})
    assert doctor.exit_code == 1
    assert "the database takes no writes: default_transaction_read_only is on" in doctor.output


async def test_a_standby_is_not_ready_until_it_is_promoted(
    settings: MakeSettings, postgres_server: EmbeddedPostgres
) -> None:
    with standby_of(postgres_server) as standby:
        any_of_both = both(standby, postgres_server, "orchestrator")
        for command in (["migrate"], ["maintain", "--once"], ["keys", "create", "laptop", "--scope", "read"]):
            done = await asyncio.to_thread(invoke, *command, env={"DATABASE_URL": any_of_both})
            assert done.exit_code == 0, done.output
        async with Database(settings(DATABASE_URL=standby.url("orchestrator")), role="api") as database:
            with pytest.raises(DatabaseUnavailable, match="it is a standby"):
                await database.ready()
            await asyncio.to_thread(promote, standby)
            await database.ready()


class Load:
    """Submissions over HTTP, one after another, until it is told to stop."""

    def __init__(self, http: httpx.AsyncClient, destination: str) -> None:
        self._http = http
        self._destination = destination
        self._numbers = iter(range(1_000_000))
        self.acknowledged: dict[str, str] = {}
        self.refused: set[str] = set()
        self.last_s = 0.0

    async def submit_on(self) -> None:
        for n in self._numbers:
            name = f"job-{n}"
            body = submission(external_job_id=name, scheduled_at=soon(0.2).isoformat(), destination=self._destination)
            answer = await self._http.post("/api/v1/events", json=body)
            if answer.status_code == 503:
                self.refused.add(name)
                await asyncio.sleep(0.05)
                continue
            assert answer.status_code == 201, answer.text
            self.acknowledged[name] = answer.json()["id"]
            self.last_s = time.monotonic()


@asynccontextmanager
async def loading(http: httpx.AsyncClient, destination: str) -> AsyncIterator[Load]:
    load = Load(http, destination)
    tasks = [asyncio.create_task(load.submit_on()) for _ in range(4)]
    try:
        yield load
    finally:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError), outcome


async def test_a_standby_that_is_promoted_under_load_takes_over_within_seconds_and_nothing_is_lost(
    spawn: Spawn, settings: MakeSettings, postgres_server: EmbeddedPostgres, receiver: Receiver, topic: Topic
) -> None:
    port = free_port()
    with standby_of(postgres_server) as standby:
        url = both(standby, postgres_server, "orchestrator")
        spawn("api", DATABASE_URL=url, SERVER_PORT=str(port))
        reading = settings(DATABASE_URL=url, **topic.environ)
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as http,
            dispatching(settings(DATABASE_URL=url)),
            ingesting(reading),
        ):
            await until(lambda: is_ready(http, 200), 20)
            records = [record(n, scheduled_at=soon(0).isoformat(), destination=receiver.url()) for n in range(40)]
            await feed(topic, records[:20])
            async with loading(http, receiver.url()) as load:
                await receiver.wait_for(100)
                await asyncio.to_thread(postgres_server.kill)
                await until(lambda: is_ready(http, 503))
                before = len(load.acknowledged)
                await asyncio.to_thread(promote, standby)
                promoted_s = time.monotonic()
                await eventually(lambda: len(load.acknowledged) > before)
                await until(lambda: is_ready(http, 200))
                assert time.monotonic() - promoted_s < 8.0
                await feed(topic, records[20:])
                await eventually(lambda: len(load.acknowledged) > before + 100)
            ids = list(load.acknowledged.values())
            with Client(standby.url("orchestrator")) as client:
                fed = "select id::text from orchestrator.event where source = 'tests'"
                await eventually(lambda: len(client.column(fed)) == 40)
                ids += client.column(fed)
                await eventually(lambda: client.value("select count(*) from orchestrator.timer") == 0, 60)
                assert statuses(client, ids) == {"delivered": len(ids)}
                assert_laws(client, receiver.requests, ids)
