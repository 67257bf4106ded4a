"""docs/guides/moving.md says what is so: its variables, its requests, and the SQL that moves jobs to and fro."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from orchestrator.settings import DATABASE_PARTS, SETTINGS, Settings
from orchestrator.settings.kinds import Setting
from tests.support.processes import ROOT
from tests.support.sql_client import Client

PAGE = (ROOT / "docs" / "guides" / "moving.md").read_text()
ALL = (*SETTINGS.values(), *DATABASE_PARTS.values())
BY_NAME: dict[str, Setting] = {name: setting for setting in ALL for name in setting.names}
# What the systems name that deployments move from.
NAMED = """
    DB_HOST DB_PORT DB_NAME DB_USER DB_PASSWORD KAFKA_BOOTSTRAP_SERVERS KAFKA_PARTITIONS SCHEDULER_POLL_INTERVAL_MS
    SCHEDULER_BATCH_SIZE CLEANUP_RETENTION_DAYS DEPLOYMENT_NAME CUSTOMER_NAME SERVER_PORT BATCH_SIZE EXECUTION_INTERVAL
    KAFKA_CONSUMER_CONCURRENCY CUSTOMER_MAX_PARALLEL DB_POOL_MAX_SIZE DB_POOL_MIN_IDLE ENVIRONMENT DATABASE_URL
    DATABASE_USERNAME DATABASE_PASSWORD KAFKA_TOPIC_SUBMISSION KAFKA_TOPIC_SCHEDULED KAFKA_TOPIC_READY
    KAFKA_TOPIC_TIMESTAMP KAFKA_TOPIC_PROCESSING KAFKA_TOPIC_DLQ KAFKA_CONSUMER_GROUP KAFKA_STREAMS_APP_ID REDIS_HOST
    LOG_LEVEL LOG_FILE WORKFLOW_RETRY_MAX_ATTEMPTS WORKFLOW_TIMEOUT_DEFAULT_SECONDS OUTBOX_PUBLISH_INTERVAL
    MANAGEMENT_SERVER_PORT
"""


def section(heading: str) -> str:
    return PAGE.partition(f"\n{heading}\n")[2].partition("\n#")[0]


def rows(heading: str) -> list[list[list[str]]]:
    """The table of a section: for each row, what stands as code in each cell."""
    lines = [line for line in section(heading).splitlines() if line.startswith("| ")]
    return [[re.findall("`([^`]+)`", cell) for cell in line.strip("|").split("|")] for line in lines[1:]]


READ = rows("### Read as they are")
UNUSED = [name for row in rows("### Accepted, and without effect") for name in row[0]]


@pytest.mark.parametrize("row", READ, ids=lambda row: row[0][0])
def test_a_variable_that_is_read_is_a_name_of_the_setting_beside_it(row: list[list[str]]) -> None:
    for name in row[0]:
        assert BY_NAME[name].name == (row[1][0] if row[1] else name)


@pytest.mark.parametrize("name", UNUSED)
def test_a_variable_without_effect_is_accepted_and_reported(name: str) -> None:
    [notice] = Settings.from_env({name: "x"}).notices
    assert notice.startswith(f"{name}: no effect; ")


def test_every_name_of_earlier_systems_is_on_the_page() -> None:
    on_page = set(re.findall("`([A-Z_]+)`", PAGE))
    others = {name for setting in ALL for name in setting.names[1:]}
    assert on_page >= others
    assert on_page >= set(NAMED.split())


def test_the_requests_are_those_that_the_api_answers() -> None:
    reference = (ROOT / "docs" / "reference" / "api.md").read_text()
    requests = [request for row in rows("## Endpoint by endpoint") for request in row[0]]
    assert len(requests) > 10
    for request in requests:
        assert f"### {request.replace('externalJobId', 'external_job_id')}\n" in reference


def blocks(heading: str, language: str) -> list[str]:
    return [
        re.sub("^   ", "", block, flags=re.MULTILINE)
        for block in re.findall(rf"^ *```{language}\n(.*?)^ *```", section(heading), re.MULTILINE | re.DOTALL)
    ]


def example() -> str:
    """The jobs of the page, due within MAX_SCHEDULE_AHEAD_DAYS of today."""
    [csv] = blocks("## Move the pending jobs", "csv")
    return csv.replace("2030-01-31", f"{datetime.now(UTC) + timedelta(days=2):%Y-%m-%d}")


def load(client: Client, csv: str) -> dict[str, int]:
    """Runs the statements of the page on these jobs; the number of rows with each result."""
    table, copy, statements = blocks("## Move the pending jobs", "sql")
    found = re.fullmatch(r"\\copy (\w+) from '\S+' with (\(.*\))\n", copy)
    assert found is not None
    cursor: Any = client.connection.cursor()
    cursor.execute("drop table if exists pending, loaded")
    cursor.execute(table)
    with cursor.copy(f"copy {found[1]} from stdin with {found[2]}") as into:
        into.write(csv)
    *before, counting = [each for each in statements.split(";\n") if each.strip()]
    for statement in before:
        cursor.execute(statement)
    return {result: count for result, _, _, count in cursor.execute(counting).fetchall()}


def test_pending_jobs_are_loaded_once_and_unfit_ones_are_refused_by_reason(database_url: str) -> None:
    csv = example()
    day = f"{datetime.now(UTC) + timedelta(days=3):%Y-%m-%d}"
    more = "".join(
        f'more-{n},orders,{day}T00:00:00Z,HTTP,https://example.com/hook,"{{""n"": {n}, ""none"": null}}",3\n'
        for n in range(2500)
    )
    wrong = f"wrong,orders,{day}T00:00:00Z,HTTP,no-url,{{}},3\n"
    with Client(database_url) as client:
        assert load(client, csv + more + wrong) == {"accepted": 2502, "refused": 1}
        assert load(client, csv + more) == {"duplicate": 2502}
        assert client.rows("select payload::jsonb from orchestrator.event_status where external_job_id = 'more-7'") == [
            ({"n": 7, "none": None},)
        ]


def test_what_is_not_delivered_can_go_back(database_url: str) -> None:
    csv = example()
    undelivered, positions = blocks("## Roll back", "sql")
    [offset] = blocks("## Cut over", "sql")
    with Client(database_url) as client:
        load(client, csv)
        client.rows("select * from orchestrator.cancel_event(p_external_job_id => 'order-18')")
        cursor: Any = client.connection.cursor()
        [back] = cursor.execute(undelivered).fetchall()
        assert back[:2] == ("order-17", "orders")
        assert [column.name for column in cursor.description] == csv.partition("\n")[0].split(",")
        cursor.execute(offset)
        assert cursor.execute(positions).fetchall() == [("ocean.event.submissions", 0, 123456)]
