"""Queries of the API that a real streaming replica answers while it is up to date, and the primary otherwise."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
from click.testing import Result

from orchestrator.database import Database
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.settings import Settings
from tests.conftest import MakeSettings
from tests.integration.api_support import running_api, submission, until
from tests.integration.cli_support import invoke
from tests.support.sql_client import Client
from tests.support.standby import promote, standby_of

QUERIES = {
    "/api/v1/events/statistics": "statistics",
    "/api/v1/events/statistics?by=source": "statistics_by",
    "/api/v1/dead-letters": "list_dead_letters",
    "/api/v1/forecast": "forecast",
}


@pytest.fixture
def standby(postgres_server: EmbeddedPostgres) -> Iterator[EmbeddedPostgres]:
    """A replica that the primary does not wait for."""
    with standby_of(postgres_server, synchronous=False) as standby:
        yield standby


class Api:
    """An API whose queries may go to a replica, and what it says of that replica."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def series(self, name: str) -> float:
        text = (await self.http.get("/metrics")).text
        found = re.search(rf"^orchestrator_read_replica_{name}{{.*}} (\S+)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1])

    async def uses_the_replica(self, wanted: bool) -> None:
        async def agrees() -> bool:
            return await self.series("in_use") == wanted

        await until(agrees, 30)


@asynccontextmanager
async def reading_api(settings: Settings) -> AsyncIterator[Api]:
    async with (
        Database(settings, role="api", serves_clients=True) as database,
        running_api(settings, database) as http,
    ):
        yield Api(http)


@pytest.fixture
def both(settings: MakeSettings, postgres_server: EmbeddedPostgres, standby: EmbeddedPostgres) -> Settings:
    return settings(
        DATABASE_URL=postgres_server.url("orchestrator"),
        DATABASE_READ_URL=standby.url("orchestrator"),
        DATABASE_READ_MAX_LAG_SECONDS="3",
    )


async def test_a_replica_answers_what_may_be_seconds_old(both: Settings, standby: EmbeddedPostgres) -> None:
    async with reading_api(both) as api:
        await api.uses_the_replica(True)
        with Client(standby.url("orchestrator")) as replica:
            for query, function in QUERIES.items():
                answer = await api.http.get(query)
                assert answer.status_code == 200, answer.text
                last = replica.column(
                    "select query from pg_stat_activity where application_name = 'orchestrator api read'"
                )
                assert any(f"orchestrator.{function}(" in statement for statement in last), (query, last)
        assert 0.0 <= await api.series("lag_seconds") <= 3.0


async def test_what_a_client_has_just_submitted_is_found_at_once(both: Settings, standby: EmbeddedPostgres) -> None:
    async with reading_api(both) as api:
        await api.uses_the_replica(True)
        with Client(standby.url("orchestrator")) as replica:
            replica.rows("select pg_wal_replay_pause()")
        posted = (await api.http.post("/api/v1/events", json=submission(external_job_id="new"))).json()
        for path in (f"/api/v1/events/{posted['id']}", "/api/v1/events/external/new"):
            assert (await api.http.get(path)).json()["id"] == posted["id"]
        [event] = (await api.http.get("/api/v1/events/external/new/all")).json()["events"]
        assert event["id"] == posted["id"]


async def test_the_primary_answers_while_the_replica_is_behind(
    both: Settings, standby: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with reading_api(both) as api:
        await api.uses_the_replica(True)
        with Client(standby.url("orchestrator")) as replica:
            replica.rows("select pg_wal_replay_pause()")
            assert (await api.http.post("/api/v1/events", json=submission(source="late"))).status_code == 201
            await api.uses_the_replica(False)
            assert await api.series("lag_seconds") > 3.0
            assert (await api.http.get("/api/v1/forecast")).status_code == 200
            found = doctor(both)
            assert "is behind, by" in found.output
            replica.rows("select pg_wal_replay_resume()")
        await api.uses_the_replica(True)
    told = [record.getMessage() for record in caplog.records if "read replica" in record.getMessage()]
    assert told == [
        "the read replica answers queries",
        "the primary answers queries in place of the read replica: it is behind by more than "
        "DATABASE_READ_MAX_LAG_SECONDS (3)",
        "the read replica answers queries",
    ]


async def test_the_primary_answers_while_the_replica_is_gone(both: Settings, standby: EmbeddedPostgres) -> None:
    async with reading_api(both) as api:
        await api.uses_the_replica(True)
        standby.kill()
        for query in QUERIES:  # the first ones are asked of the replica
            assert (await api.http.get(query)).status_code == 200
        await api.uses_the_replica(False)
        assert (await api.http.get("/ready")).status_code == 200
        found = doctor(both)
        assert found.exit_code == 1
        assert "cannot reach" in found.output
        standby.start()
        await api.uses_the_replica(True)


async def test_a_replica_that_lost_its_primary_falls_behind(
    both: Settings, postgres_server: EmbeddedPostgres, standby: EmbeddedPostgres
) -> None:
    async with reading_api(both) as api:
        await api.uses_the_replica(True)
        with Client(standby.url("postgres")) as replica:
            replica.rows("alter system set primary_conninfo = ''")
            replica.rows("select pg_reload_conf()")
            await until(lambda: _has_no_receiver(replica))
        assert (await api.http.post("/api/v1/events", json=submission())).status_code == 201
        await api.uses_the_replica(False)


async def _has_no_receiver(replica: Client) -> bool:
    return replica.rows("select 1 from pg_stat_wal_receiver") == []


async def test_a_replica_that_was_promoted_is_not_asked(both: Settings, standby: EmbeddedPostgres) -> None:
    async with reading_api(both) as api:
        await api.uses_the_replica(True)
        promote(standby)
        await api.uses_the_replica(False)
        assert "it takes writes itself" in doctor(both).output


async def test_another_database_is_no_replica(
    settings: MakeSettings, postgres_server: EmbeddedPostgres, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = settings(DATABASE_URL=postgres_server.url("orchestrator"), DATABASE_READ_URL=database_url)
    fault = "it is no physical replica of the database of DATABASE_URL"

    async def noticed() -> bool:
        return f"the primary answers queries in place of the read replica: {fault}" in caplog.messages

    async with reading_api(wrong) as api:
        await until(noticed)
        assert await api.series("in_use") == 0.0
        assert (await api.http.get("/api/v1/forecast")).status_code == 200
    found = doctor(wrong)
    assert found.exit_code == 1
    assert fault in found.output


def doctor(settings: Settings) -> Result:
    urls = {"DATABASE_URL": settings.database_url, "DATABASE_READ_URL": settings.database_read_url or ""}
    return invoke("doctor", env=urls | {"COLUMNS": "300"})
