"""A column of event is also in every other place that must know it: one that is forgotten is named here."""

from __future__ import annotations

import json
import re

import pytest

from orchestrator.events.encoding import COLUMNS
from orchestrator.events.fields import FIELDS
from tests.support.sql_client import Client, results

NOT_STAGED = {"created_at", "predecessor"}
IN_JSON = {field.column: field.name for field in FIELDS}
"""The names of columns in JSON, where the two differ."""
NOT_IN_DEAD_LETTERS = {"created_at", "priority", "spread", "expires_at", "predecessor"}


def _columns(client: Client, relation: str) -> set[str]:
    query = "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 and not attisdropped"
    return set(client.column(query, relation))


def _missing(client: Client, there: set[str], but: set[str] | None = None) -> set[str]:
    return _columns(client, "orchestrator.event") - there - (but or set())


@pytest.fixture
def dead(client: Client) -> str:
    client.rows("select orchestrator.set_outbox(array['dlq'])")
    event = client.schedule(max_retries=0)
    client.finish(results(client.claim(), "fail"))
    return event


@pytest.mark.parametrize("relation", ["horizon", "stored_event", "event_status"])
def test_every_column_of_an_event_is_a_column_of(client: Client, relation: str) -> None:
    assert _missing(client, _columns(client, f"orchestrator.{relation}")) == set()


@pytest.mark.parametrize("relation", ["pg_temp.submission", "orchestrator.submission_aside"])
def test_every_column_of_an_event_is_a_column_of_what_is_staged(client: Client, relation: str) -> None:
    client.rows("select orchestrator.open_staging()")
    assert _missing(client, _columns(client, relation), NOT_STAGED) == set()


@pytest.mark.parametrize(
    ("function", "target", "but"),
    [
        ("insert_plain", "orchestrator.event", set[str]()),
        ("insert_each", "orchestrator.horizon", set[str]()),
        ("reschedule_event", "pg_temp.submission", NOT_STAGED),
        ("submit_events", "pg_temp.submission", NOT_STAGED),
        ("set_aside_staged", "orchestrator.submission_aside", NOT_STAGED),
        ("submit_set_aside", "pg_temp.submission", NOT_STAGED),
    ],
)
def test_every_column_of_an_event_is_written_by(client: Client, function: str, target: str, but: set[str]) -> None:
    text = client.value("select prosrc from pg_proc where proname = %s", function)
    [columns] = re.findall(rf"insert into {re.escape(target)}\s*\(([^)]*)\)", text)
    assert _missing(client, set(re.findall(r"\w+", columns)), but) == set()


def test_every_column_of_an_event_can_be_copied_directly(client: Client) -> None:
    assert _missing(client, set(COLUMNS), NOT_STAGED) == set()
    allowed = """select a.attname from pg_attribute a
      where a.attrelid = 'orchestrator.event'::regclass and a.attnum > 0 and not a.attisdropped
        and has_column_privilege('orchestrator_submit', a.attrelid, a.attnum, 'insert')"""
    assert set(client.column(allowed)) == {*COLUMNS, "created_at"}


def test_as_event_and_the_horizon_take_the_columns_of_an_event_in_their_order(client: Client) -> None:
    in_order = client.column(
        "select attname from pg_attribute"
        " where attrelid = 'orchestrator.event'::regclass and attnum > 0 order by attnum"
    )
    parameters = client.value("select proargnames from pg_proc where proname = 'as_event'")
    assert [name.removeprefix("p_") for name in parameters] == in_order
    text = client.value("select prosrc from pg_proc where proname = 'as_event'")
    assert re.findall(r"\bp_(\w+)", text) == in_order
    text = client.value("select prosrc from pg_proc where proname = 'insert_each'")
    [columns] = re.findall(r"insert into orchestrator.horizon\s*\(([^)]*)\)", text)
    assert re.findall(r"\w+", columns) == in_order


def test_every_column_of_an_event_is_in_the_table_of_fields(client: Client) -> None:
    assert _missing(client, set(IN_JSON), NOT_STAGED | {"id"}) == set()


def test_every_field_can_be_submitted_through_sql(client: Client) -> None:
    names = {field.name for field in FIELDS}
    assert set(client.value("select orchestrator.submission_fields()")) == names
    parameters = client.value("select proargnames from pg_proc where proname = 'schedule_event'")
    assert {name.removeprefix("p_") for name in parameters} == set(IN_JSON)


def test_every_column_of_an_event_is_a_key_of_what_get_event_answers(client: Client) -> None:
    event = client.schedule()
    keys = client.value("select orchestrator.get_event(%s)", event).keys()
    assert {IN_JSON.get(column, column) for column in _columns(client, "orchestrator.event")} - keys == set()


def test_every_column_of_an_event_that_its_consumers_need_is_a_key_of_its_dead_letter(
    client: Client, dead: str
) -> None:
    [message] = client.column("select value from orchestrator.outbox where kind = 'dlq'")
    keys = json.loads(bytes(message)).keys()
    assert json.loads(bytes(message))["id"] == dead
    assert _missing(client, set(keys), NOT_IN_DEAD_LETTERS) == set()
