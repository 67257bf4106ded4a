"""A database knows its customer: whoever is set to another one by mistake is told so, and changes nothing."""

from __future__ import annotations

import json

import pytest

from orchestrator.database import Database
from orchestrator.errors import OrchestratorError
from orchestrator.runtime import Role, _Process
from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import running_api, submission
from tests.integration.cli_support import invoke, refused, told
from tests.support.sql_client import Client

OCEAN, AIR = {"CUSTOMER_NAME": "ocean"}, {"CUSTOMER_NAME": "air"}
WRONG = (
    "CUSTOMER_NAME: expected ocean, whose database this is, got air; correct CUSTOMER_NAME or DATABASE_URL. "
    "To hand the database over: select orchestrator.set_customer('air')"
)


@pytest.fixture
def oceans(empty_database_url: str) -> str:
    """A database that ocean has migrated."""
    told(invoke("migrate", env=OCEAN | {"DATABASE_URL": empty_database_url}))
    return empty_database_url


def test_migrating_records_the_customer_once(oceans: str) -> None:
    with Client(oceans) as client:
        assert client.column("select name from orchestrator.customer") == ["ocean"]
        before = client.rows("select file, applied_at from orchestrator.migration order by file")
        assert refused(invoke("migrate", env=AIR | {"DATABASE_URL": oceans})) == WRONG
        assert client.rows("select file, applied_at from orchestrator.migration order by file") == before
        for unnamed in ({}, {"CUSTOMER_NAME": "default"}, OCEAN):
            told(invoke("migrate", env=unnamed | {"DATABASE_URL": oceans}))
        assert client.column("select name from orchestrator.customer") == ["ocean"]


def test_a_database_that_was_migrated_without_a_name_gets_one_later(database_url: str) -> None:
    with Client(database_url) as client:
        told(invoke("migrate", env={"DATABASE_URL": database_url}))
        assert client.column("select orchestrator.customer()") == [None]
        told(invoke("migrate", env=AIR | {"DATABASE_URL": database_url}))
        assert client.column("select orchestrator.customer()") == ["air"]


@pytest.mark.parametrize("role", ["run", "api", "dispatch", "maintain"])
async def test_a_process_of_another_customer_does_not_start(settings: MakeSettings, oceans: str, role: Role) -> None:
    process = _Process(settings(DATABASE_URL=oceans, **AIR), role)
    with pytest.raises(OrchestratorError) as caught:
        await process.run(())
    assert str(caught.value) == WRONG


async def test_an_api_keeps_nothing_in_the_database_of_another_customer(settings: MakeSettings, oceans: str) -> None:
    wrong = settings(DATABASE_URL=oceans, ALLOW_ANONYMOUS="true", **AIR)
    async with Database(wrong, role="api", serves_clients=True) as database, running_api(wrong, database) as http:
        assert (await http.post("/api/v1/events", json=submission())).status_code == 503
        assert (await http.get("/ready")).status_code == 503
    with Client(oceans) as client:
        assert client.value("select count(*) from orchestrator.event") == 0


async def test_processes_of_the_customer_and_those_without_a_name_start(spawn: Spawn, oceans: str) -> None:
    with Client(oceans) as client:
        wrong = spawn("dispatch", DATABASE_URL=oceans, **AIR)
        assert await wrong.wait() == 1
        assert WRONG in wrong.log()
        for given in (OCEAN, {}):
            process = spawn("dispatch", DATABASE_URL=oceans, **given)
            await process.wait_for_log("ready")
            assert await process.stop() == 0
        client.rows("select orchestrator.set_customer('air')")
        process = spawn("dispatch", DATABASE_URL=oceans, **AIR)
        await process.wait_for_log("ready")
        assert await process.stop() == 0


@pytest.mark.parametrize(
    ("given", "level", "what"),
    [
        (AIR, "problem", "this is the database of ocean, and CUSTOMER_NAME is air: processes do not start"),
        (OCEAN, "ok", "this is the database of ocean"),
        ({}, "ok", "this is the database of ocean"),
    ],
)
def test_doctor_says_whose_database_it_is(oceans: str, given: dict[str, str], level: str, what: str) -> None:
    findings = json.loads(invoke("doctor", "--json", env={"DATABASE_URL": oceans, **given}).stdout)["findings"]
    assert [(each["level"], each["what"]) for each in findings if each["check"] == "customer"] == [(level, what)]


def test_a_name_with_a_quote_is_handed_over_by_the_statement_that_is_shown(oceans: str) -> None:
    line = refused(invoke("migrate", env={"CUSTOMER_NAME": "o'brien", "DATABASE_URL": oceans}))
    with Client(oceans) as client:
        client.rows(line.rpartition("To hand the database over: ")[2])
        assert client.column("select orchestrator.customer()") == ["o'brien"]
        client.rows("select orchestrator.set_customer(null)")
        assert client.column("select orchestrator.customer()") == [None]
