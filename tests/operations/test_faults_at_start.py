"""What is wrong when a deployment starts: it stops with one line that says so, or waits, and can be seen to wait."""

from __future__ import annotations

import asyncio
import shutil
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.database import migrate as migrations
from orchestrator.database.migrate import migrate, sql_directory
from orchestrator.dev.operating_system import free_port
from orchestrator.dev.postgres import EmbeddedPostgres
from orchestrator.errors import OrchestratorError
from orchestrator.runtime import _Process
from orchestrator.settings import Settings
from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import status, until
from tests.integration.cli_support import invoke
from tests.support.brokers import KafkaBroker
from tests.support.receiver import Receiver
from tests.support.sql_client import Client

PATIENCE_S = 60.0


def api_of(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)


async def answers(http: httpx.AsyncClient, path: str, wanted: int) -> None:
    async def answered() -> bool:
        return await status(http, path) == wanted

    await until(answered, PATIENCE_S)


def event(receiver: Receiver, job: str) -> dict[str, Any]:
    return {
        "source": "tests",
        "external_job_id": job,
        "scheduled_at": datetime.now(UTC).isoformat(),
        "destination": receiver.url(f"/{job}"),
        "payload": {},
    }


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"SERVER_PORT": "80800"}, "SERVER_PORT: expected a whole number from 1 to 65535, got '80800'"),
        ({"KAFKA_BOOTSTRAP_SERVERS": "kafka"}, "KAFKA_BOOTSTRAP_SERVERS: expected a comma-separated list of host:port"),
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_USERNAME": "u"}, "KAFKA_SASL_PASSWORD: required"),
        ({"DB_PASSWORD_FILE": "/run/secrets/lost"}, "DB_PASSWORD_FILE: '/run/secrets/lost' does not exist"),
    ],
)
async def test_a_wrong_missing_or_lost_setting_stops_the_start_in_one_line(
    spawn: Spawn, given: dict[str, str], complaint: str
) -> None:
    process = spawn("run", DATABASE_URL="postgresql://127.0.0.1:1/none", **given)
    assert await process.wait(PATIENCE_S) == 2
    [line] = process.log().splitlines()
    assert line.startswith(f"Error: {complaint}")


async def test_a_secret_that_is_lost_stops_no_process_that_runs_but_the_next_start(
    spawn: Spawn, database_url: str, tmp_path: Path
) -> None:
    secret = tmp_path / "url"
    secret.write_text(f"{database_url}\n")
    given = {"DATABASE_URL": "", "DATABASE_URL_FILE": str(secret)}
    port = free_port()
    process = spawn("run", SERVER_PORT=str(port), **given)
    async with api_of(port) as http:
        await answers(http, "/ready", 200)
        secret.unlink()
        assert await status(http, "/ready") == 200
    assert await process.stop() == 0
    again = spawn("run", **given)
    assert await again.wait(PATIENCE_S) == 2
    assert again.log().startswith(f"Error: DATABASE_URL_FILE: '{secret}' does not exist; mount the secret there")
    found = invoke("doctor", env=given)
    assert found.exit_code == 1
    assert "DATABASE_URL_FILE" in found.stdout


async def test_a_start_without_a_database_waits_visibly_and_goes_on(
    spawn: Spawn, postgres_server: EmbeddedPostgres
) -> None:
    url, port = postgres_server.url("orchestrator"), free_port()
    postgres_server.stop()
    process = spawn("run", DATABASE_URL=url, SERVER_PORT=str(port))
    await process.wait_for_log("waiting for the database", PATIENCE_S)
    async with api_of(port) as http:
        await answers(http, "/health", 200)
        await answers(http, "/ready", 503)
        postgres_server.start()
        await answers(http, "/ready", 200)
    assert await process.stop() == 0


async def test_a_start_without_kafka_serves_what_needs_none_and_goes_on_when_it_is_there(
    spawn: Spawn, database_url: str, kafka_broker: KafkaBroker, receiver: Receiver
) -> None:
    customer, port = kafka_broker.unique("late"), free_port()
    given = kafka_broker.environ | {"CUSTOMER_NAME": customer, "DATABASE_URL": database_url}
    kafka_broker.stop()
    process = spawn("run", SERVER_PORT=str(port), **given)
    with Client(database_url) as client:
        async with api_of(port) as http:
            await answers(http, "/ready", 200)
            await process.wait_for_log("Kafka is away; trying again", PATIENCE_S)
            # What is in the database is delivered, and the API says what it cannot do.
            client.schedule(destination=receiver.url("/kept"), scheduled_at=datetime.now(UTC))
            await receiver.wait_for(1, "/kept", PATIENCE_S)
            refused = await http.post("/api/v1/events", json=event(receiver, "late"))
            assert refused.status_code == 503, refused.text
            found = await asyncio.to_thread(partial(invoke, "doctor", "--json", env=given))
            assert '"level":"problem","check":"kafka"' in found.stdout
            kafka_broker.start()
            for name in (f"{customer}.event.submissions", f"{customer}.process-kafka-message"):
                await kafka_broker.create_topic(name)

            async def accepted() -> bool:
                return (await http.post("/api/v1/events", json=event(receiver, "late"))).status_code in (200, 202)

            await until(accepted, PATIENCE_S)
            await receiver.wait_for(1, "/late", PATIENCE_S)
    assert await process.stop() == 0


async def test_a_migration_that_fails_in_a_rollout_leaves_the_old_programs_at_work_and_the_new_ones_out(
    spawn: Spawn,
    settings: MakeSettings,
    database_url: str,
    receiver: Receiver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()
    old = spawn("run", DATABASE_URL=database_url, SERVER_PORT=str(port))
    async with api_of(port) as http:
        await answers(http, "/ready", 200)
        # The next release brings two files, the second of which fails.
        release = shutil.copytree(sql_directory(), tmp_path / "sql")
        monkeypatch.setattr(migrations, "sql_directory", lambda: release)
        (release / "schema" / "9998_more.sql").write_text("create table orchestrator.more (n integer);\n")
        (release / "schema" / "9999_most.sql").write_text("select 1 / 0;\n")
        with pytest.raises(OrchestratorError, match=r"^sql/schema/9999_most\.sql: division by zero"):
            migrate(database_url)
        with pytest.raises(
            OrchestratorError, match=r"not migrated: schema/9998_more.sql, .* run: orchestrator migrate"
        ):
            await _Process(settings(DATABASE_URL=database_url), "dispatch").run(())
        await delivers(http, receiver, "after-the-failure")
        # Mended and run again, it completes; the old program goes on beside the new one.
        (release / "schema" / "9999_most.sql").write_text("alter table orchestrator.more add column m integer;\n")
        assert migrate(database_url).applied[:2] == ["schema/9998_more.sql", "schema/9999_most.sql"]
        await delivers(http, receiver, "after-the-upgrade")
        await a_new_program_starts(settings(DATABASE_URL=database_url))
    assert await old.stop() == 0


async def delivers(http: httpx.AsyncClient, receiver: Receiver, job: str) -> None:
    assert (await http.post("/api/v1/events", json=event(receiver, job))).status_code == 201
    await receiver.wait_for(1, f"/{job}", PATIENCE_S)


async def a_new_program_starts(settings: Settings) -> None:
    process = _Process(settings, "dispatch")

    async def stop(_: Any) -> None:
        """Runs beside the parts once all are ready, and ends all of them."""

    await process.run((stop,))
