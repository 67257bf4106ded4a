"""A small batch in one call: it keeps and answers what a staged one does."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from psycopg.errors import (
    DataError,
    LockNotAvailable,
    NotNullViolation,
    ObjectNotInPrerequisiteState,
    RaiseException,
)

from tests.sql.conftest import Connect
from tests.sql.test_direct_submission import staged_and_undone, varied, written
from tests.sql.test_submit import COUNTS, submission, submit_staged
from tests.support.copying import submit_in_one_call
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client, seconds

_FORBID_STAGING = """
create or replace function orchestrator.open_staging() returns void language plpgsql as $$
begin raise exception 'staged'; end $$
"""
_CALL = "select * from orchestrator.submit_batch"


@pytest.mark.parametrize("dedicated", [False, True])
def test_one_call_writes_what_a_staged_submission_writes(client: Client, dedicated: bool) -> None:
    made = varied()
    staged = staged_and_undone(client, made, dedicated)
    client.rows(_FORBID_STAGING)
    assert submit_in_one_call(client, made) == {}
    assert written(client) == staged
    assert len(staged[1]) == len(made)
    assert violations(client.connection, acknowledged=[each.id for each in made]) == []


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"destination": "nowhere"},
        {"scheduled_at": NOON + timedelta(days=60)},
        {"scheduled_at": NOON + timedelta(days=401)},
        {"scheduled_at": NOON - timedelta(days=365)},
        {"max_retries": 101},
        {"retry_policy": "unheard-of"},
        {"headers": b"[]"},
        {"delivery_type": "SMTP"},
        {"source": ""},
        {"ordering_key": ""},
        {"priority": 10},
        {"expires_at": NOON},
        {"correlation_id": " "},
        {"traceparent": "00-0-0-01"},
    ],
)
def test_whatever_is_not_plain_is_answered_as_when_it_is_staged(client: Client, other: dict[str, Any]) -> None:
    submit_staged(client, [submission("kept")])
    made = [submission("b"), submission("other", **other), submission("kept"), submission("b", max_retries=1)]
    with client.transaction() as _, client.connection.transaction(force_rollback=True):
        answers = submit_staged(client, made)
        staged = written(client)
    assert submit_in_one_call(client, made) == answers
    assert answers[2] == answers[3] == ("duplicate", None)
    assert written(client) == staged
    client.rows("begin")  # the staging table is empty again
    assert client.value("select count(*) from pg_temp.submission") == 0
    client.rows("rollback")


@pytest.mark.parametrize(
    "state",
    [
        "select orchestrator.set_outbox(array['scheduled'])",
        "update orchestrator.control set former_ids_until = '2100-01-01'",
    ],
)
def test_what_only_staging_does_is_staged(client: Client, state: str) -> None:
    client.connection.execute(state.encode())
    assert submit_in_one_call(client, [submission("a"), submission("b")]) == {}
    assert client.rows(COUNTS) == [(2, 2)]
    assert client.value("select count(*) from orchestrator.outbox") == (2 if "outbox" in state else 0)
    client.rows(_FORBID_STAGING)
    with pytest.raises(RaiseException, match="staged"):
        submit_in_one_call(client, [submission("c")])


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        (
            "array[%(id)s]::uuid[], array[%(at)s], '{3}', '{2}', '{tests}', '{HTTP}', '{https://a.b}', '{j}', '{1}'",
            None,
        ),
        ("array[%(id)s]::uuid[], array[%(at)s], '{}', '{1}', '{tests}', '{HTTP}', '{https://a.b}', '{j}', '{1}'", None),
        (
            "array[%(id)s]::uuid[], array[%(at)s], '{3,3}', '{1,1}', '{t}', '{HTTP}', '{https://a.b}', '{j}', '{1}'",
            None,
        ),
        ("array[%(id)s]::uuid[], array[%(at)s], '{3}', '{1}', '{t}', '{HTTP}', '{https://a.b}', '{j}', '{}'", None),
        (
            "array[%(id)s]::uuid[], array[%(at)s], '{3}', '{1}', '{t}', '{HTTP}', '{https://a.b}', '{j}', '{x}'",
            DataError,
        ),
        ("array[null]::uuid[], '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}'", None),
    ],
)
def test_arrays_that_do_not_fit_are_refused(client: Client, arrays: str, error: type[Exception] | None) -> None:
    values = {"id": submission("a").id, "at": NOON}
    with pytest.raises(error or NotNullViolation):
        client.connection.execute(f"{_CALL}({arrays})".encode(), values)
    assert client.rows(COUNTS) == [(0, 0)]


@pytest.mark.parametrize("nothing", ["null", "'{}'"])
def test_nothing_is_no_event(client: Client, nothing: str) -> None:
    assert client.connection.execute(f"{_CALL}({', '.join([nothing] * 9)})".encode()).fetchall() == []
    assert client.rows(COUNTS) == [(0, 0)]


def test_a_role_that_submits_may_call_it_and_its_staging_table_is_checked(client: Client) -> None:
    client.set_role("orchestrator_submit")
    assert submit_in_one_call(client, [submission("a")]) == {}
    assert submit_in_one_call(client, [submission("a"), submission("b")]) == {0: ("duplicate", None)}
    client.rows("reset role")
    client.rows("drop table pg_temp.submission")
    client.set_role("orchestrator_submit")
    client.rows("create temp table submission (n integer)")
    with pytest.raises(ObjectNotInPrerequisiteState, match="staging table"):
        submit_in_one_call(client, [submission("a"), submission("c")])
    assert submit_in_one_call(client, [submission("d")]) == {}
    client.rows("reset role")
    assert client.rows(COUNTS) == [(3, 3)]


def test_it_waits_for_another_session_no_longer_than_a_quarter_of_a_second(connect: Connect) -> None:
    first, second = connect(), connect()
    second.rows("set lock_timeout = 0")
    with first.transaction():
        submit_in_one_call(first, [submission("shared")])
        with pytest.raises(LockNotAvailable):
            submit_in_one_call(second, [submission("own"), submission("shared")])
    assert second.value("show lock_timeout") == "0"
    assert second.rows(COUNTS) == [(1, 1)]
    assert submit_in_one_call(second, [submission("own"), submission("shared")]) == {1: ("duplicate", None)}


def test_a_new_priority_is_noted_and_what_is_due_soon_is_told(client: Client, connect: Connect) -> None:
    listening = connect()
    listening.rows("listen orchestrator_due")
    submit_in_one_call(client, [submission("soon", scheduled_at=NOON + seconds(5), priority=6), submission("a")])
    [told] = listening.connection.notifies(timeout=10, stop_after=1)
    assert float(told.payload) == NOON.timestamp()
    assert 6 in client.value("select priorities from orchestrator.control")
