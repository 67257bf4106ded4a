"""New events are submitted in one call, or directly; what that refuses is staged, and answered as ever."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any, LiteralString

import pytest

from orchestrator.database import Database
from orchestrator.database.copying import Route
from orchestrator.database.ingestion import Ingestion, Kept, Move, Reject
from orchestrator.errors import Blocked
from orchestrator.events.encoding import encode_row
from orchestrator.events.submission import Submission
from tests.conftest import MakeSettings
from tests.sql.test_submit import COUNTS, submission
from tests.support.copying import submit_directly
from tests.support.cutting_proxy import CuttingProxy
from tests.support.laws import violations
from tests.support.sql_client import NOON, Client
from tests.support.waiting import eventually

MANY = 200
LATER = NOON + timedelta(days=2)
_SIGNATURE = "select 'orchestrator.submit_batch'::regproc::regprocedure::text"
_FORBID_STAGING = """
create or replace function orchestrator.open_staging() returns void language plpgsql as $$
begin raise exception 'staged'; end $$
"""


WAYS = pytest.mark.parametrize("count", [MANY, 1001])  # in one call, directly


def batch(count: int = MANY, prefix: str = "job", **changes: Any) -> list[Submission]:
    return [submission(f"{prefix}-{n}", scheduled_at=LATER, **changes) for n in range(count)]


def rejected(n: int, field: str, reason: str) -> Reject:
    return Reject(0, n, None, b"value", field, reason)


async def ingest(ingestion: Ingestion, made: list[Submission], first: int = 0) -> Kept:
    rows = [encode_row(each, n) for n, each in enumerate(made)]
    moves = [Move(0, first or None, first + len(made), None, None)]
    return await ingestion.submit("topic", moves, rows, [], rejected)


@WAYS
async def test_a_batch_of_new_events_is_not_staged(settings: MakeSettings, client: Client, count: int) -> None:
    async with Database(settings(), role="test") as database:
        client.rows(_FORBID_STAGING)
        answers = await database.submit(batch(count))
        assert await database.submit([]) == []
    assert Counter(answer.result for answer in answers) == {"accepted": count}
    assert client.rows(COUNTS) == [(count, count)]


async def test_a_batch_of_many_bytes_goes_by_copy(settings: MakeSettings, client: Client) -> None:
    payload = b'"' + b"x" * 500_000 + b'"'
    async with Database(settings(), role="test") as database:
        client.rows(f"alter function {client.value(_SIGNATURE)} rename to unused")
        answers = await database.submit(batch(9, payload=payload))
    assert Counter(answer.result for answer in answers) == {"accepted": 9}
    assert client.value("select min(length(payload::text)) from orchestrator.event") == len(payload)


async def test_ingested_events_are_not_staged(settings: MakeSettings, client: Client) -> None:
    async with Ingestion.open(settings()) as ingestion:
        client.rows(_FORBID_STAGING)
        assert await ingest(ingestion, batch()) == (MANY, 0, 0)
    assert client.rows(COUNTS) == [(MANY, MANY)]


@WAYS
async def test_duplicates_and_mistakes_are_answered_one_by_one(
    settings: MakeSettings, client: Client, count: int
) -> None:
    made = batch(count)
    made[3:6] = [
        submission("far", scheduled_at=NOON + timedelta(days=401)),
        submission("policy", scheduled_at=LATER, retry_policy="unheard-of"),
        made[2],
    ]
    async with Database(settings(), role="test") as database:
        await database.submit([made[0]])
        for _ in range(3):  # by each route in turn
            answers = await database.submit(made)
            assert [answers[n].result for n in (0, 3, 4, 5)] == ["duplicate", "refused", "refused", "duplicate"]
            assert (answers[3].field, answers[4].field) == ("scheduled_at", "retry_policy")
    assert client.rows(COUNTS) == [(count - 3, count - 3)]
    assert violations(client.connection, acknowledged=[each.id for n, each in enumerate(made) if n not in (3, 4)]) == []


async def test_an_ingester_stages_what_cannot_go_directly(settings: MakeSettings, client: Client) -> None:
    made = batch()
    made[7] = submission("policy", scheduled_at=LATER, retry_policy="unheard-of")
    made[9] = made[8]
    async with Ingestion.open(settings()) as ingestion:
        assert await ingest(ingestion, made) == (MANY - 2, 1, 1)
        assert await ingest(ingestion, batch(prefix="next"), MANY) == (MANY, 0, 0)
        assert await ingest(ingestion, batch(prefix="last"), 2 * MANY) == (MANY, 0, 0)
    assert client.rows(COUNTS) == [(3 * MANY - 2, 3 * MANY - 2)]
    assert client.column("select field from orchestrator.reject") == ["retry_policy"]


@WAYS
@pytest.mark.parametrize("way", ["before", "during", "after"])
async def test_a_lost_reply_to_a_submission_is_answered_truly(
    settings: MakeSettings, database_url: str, client: Client, way: str, count: int
) -> None:
    async with (
        CuttingProxy(database_url) as proxy,
        Database(settings(DATABASE_URL=proxy.url), role="test") as database,
    ):
        {"before": proxy.cut_before, "during": proxy.cut_during, "after": proxy.cut_after}[way]("COMMIT")
        answers = await database.submit(batch(count))
        assert proxy.cuts == 1
        assert Counter(answer.result for answer in answers) == {"accepted": count}
        assert Counter(answer.result for answer in await database.submit(batch(count))) == {"duplicate": count}
    assert client.rows(COUNTS) == [(count, count)]


@WAYS
async def test_a_batch_that_another_session_holds_up_is_blocked_after_a_moment(
    settings: MakeSettings, client: Client, count: int
) -> None:
    made = batch(count)
    async with Database(settings(), role="test") as database:
        with client.transaction():
            submit_directly(client, made[5:6])
            with pytest.raises(Blocked):
                await database.submit(made)
        assert Counter(answer.result for answer in await database.submit(made)) == {
            "accepted": count - 1,
            "duplicate": 1,
        }


@WAYS
async def test_a_batch_that_is_cancelled_while_it_waits_is_blocked(
    settings: MakeSettings, client: Client, count: int
) -> None:
    """The lock timeout may call itself a cancel."""
    made = batch(count)
    cancel: LiteralString = """
    select pg_cancel_backend(pid) from pg_stat_activity
    where datname = current_database() and wait_event_type = 'Lock'
    """
    async with Database(settings(), role="test") as database:
        with client.transaction():
            submit_directly(client, made[5:6])
            waiting = asyncio.create_task(database.submit(made))
            await eventually(lambda: waiting.done() or client.rows(cancel))
            with pytest.raises(Blocked):
                await waiting


def test_after_failures_ever_more_batches_are_staged() -> None:
    route, rows = Route(), [encode_row(each, n) for n, each in enumerate(batch())]
    assert not route.is_direct(rows[:10])

    def staged_until_direct() -> int:
        staged = 0
        while not route.is_direct(rows):
            staged += 1
        return staged

    waits = []
    for _ in range(8):
        waits.append(staged_until_direct())
        route.note(False)
    assert waits == [0, 1, 3, 7, 15, 31, 63, 63]
    staged_until_direct()
    route.note(True)
    assert staged_until_direct() == 0
