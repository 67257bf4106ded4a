"""Everything works through PgBouncer, which hands a session of the server to another client after each transaction."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import psycopg
import pytest

from orchestrator.database import Database
from orchestrator.database.ingestion import Ingestion, Move, OffsetsMovedError, Reject
from orchestrator.database.maintenance import Maintenance, Retention, Retired
from orchestrator.database.migrate import check, migrate
from orchestrator.database.outbox import Outbox
from orchestrator.errors import UnusableDatabase
from orchestrator.events.parsing import parse_submission, submission_row
from orchestrator.maintenance.archive import archive
from tests.conftest import MakeSettings, Spawn
from tests.integration.api_support import running_api, submission
from tests.integration.cli_support import invoke
from tests.support.dispatching import dispatching, finished, soon, statuses
from tests.support.ingesting import submission as submission_bytes
from tests.support.pooler import pgbouncer
from tests.support.receiver import Receiver
from tests.support.retiring import retire, schedule_old_day
from tests.support.sql_client import Client

MODES = [("transaction", ""), ("transaction", "options,extra_float_digits"), ("session", "options")]


@pytest.fixture(params=MODES, ids=lambda mode: "-".join(filter(None, mode)))
def pooled_url(request: pytest.FixtureRequest, database_url: str) -> Iterator[str]:
    """This test's database through PgBouncer: it refuses settings, or takes and forgets them."""
    mode, ignore = request.param
    with pgbouncer(database_url, mode=mode, pool_size=30, ignore=ignore) as url:
        yield url


async def test_two_hundred_submissions_at_once_are_kept_and_delivered_through_a_pooler(
    settings: MakeSettings, pooled_url: str, client: Client, receiver: Receiver
) -> None:
    chosen = settings(DATABASE_URL=pooled_url, SCHEDULER_POLL_INTERVAL_MS="200")
    async with Database(chosen, role="api") as database, running_api(chosen, database) as api:
        due = soon(1).isoformat()

        async def post(n: int) -> httpx.Response:
            body = submission(external_job_id=f"José € {n}", destination=receiver.url(), scheduled_at=due)
            return await api.post("/api/v1/events", json=body)

        answers = await asyncio.gather(*[post(n) for n in range(200)])
        assert Counter(answer.status_code for answer in answers) == {201: 200}
        ids = [answer.json()["id"] for answer in answers]
        async with dispatching(chosen):
            await finished(client, ids, 30.0)
        assert statuses(client, ids) == {"delivered": 200}
        assert len(receiver.requests) == 200
        assert (await api.get("/ready")).status_code == 200
        assert (await api.get("/api/v1/events/external/José € 7")).json()["status"] == "delivered"
        late = await api.post("/api/v1/events", json=submission(external_job_id="late"))
        assert (await api.delete(f"/api/v1/events/{late.json()['id']}")).json()["result"] == "cancelled"


async def test_a_pooler_s_sessions_keep_nothing_of_one_client_for_the_next(
    settings: MakeSettings, database_url: str
) -> None:
    with pgbouncer(database_url, mode="transaction", pool_size=1) as url:
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as other:
            for foreign in ("statement_timeout = 5", "array_nulls = off", "timezone = 'Asia/Kolkata'"):
                other.execute(f"set {foreign}".encode())
        async with Database(settings(DATABASE_URL=url), role="api") as database:
            event = parse_submission(submission_bytes(1), settings())
            assert [answer.result for answer in await database.submit([event])] == ["accepted"]
            told = await database.rows("select '{null}'::int[], current_setting('timezone'), pg_sleep(0.01)::text")
            assert told == [([None], "UTC", "")]


async def test_ingestion_maintenance_and_the_outbox_work_through_a_pooler(
    settings: MakeSettings, pooled_url: str, client: Client
) -> None:
    chosen = settings(DATABASE_URL=pooled_url, PARTITION_DAYS_AHEAD="33")
    assert check(pooled_url) == []
    assert migrate(pooled_url).applied == []
    async with Outbox.open(chosen) as outbox, Maintenance.open(chosen) as maintenance:
        await outbox.switch(["scheduled"])
        await maintenance.configure(Retention.of(chosen))
        told = await maintenance.run_on()
        assert (told.problems, told.did["partitions_created"]) == ([], 9)

        async with Ingestion.open(chosen) as ingestion:
            rows = [submission_row(submission_bytes(n), chosen, n) for n in range(20)]
            rows[7] = msgspec.structs.replace(rows[7], fields=rows[7].fields.replace(b"job-7", b"job-\xff"))
            moves = [Move(0, None, 20, 19, 0)]
            kept = await ingestion.submit("topic", moves, rows, [], _rejected)
            assert kept == (19, 0, 1)
            assert (await ingestion.positions("topic"))[0].next_offset == 20
            with pytest.raises(OffsetsMovedError):
                await ingestion.submit("topic", moves, rows, [], _rejected)

        async with outbox.batch(100, 0) as messages:
            assert len(messages) == 19
            await outbox.published(messages)
        async with outbox.batch(100, messages[-1].floor) as messages:
            assert messages == []
    assert client.value("select count(*) from orchestrator.event") == 19


async def test_only_one_process_at_a_time_archives_through_a_pooler(
    settings: MakeSettings, database_url: str, client: Client, tmp_path: Path
) -> None:
    schedule_old_day(client)
    names = retire(client)
    with pgbouncer(database_url, mode="transaction") as url:
        chosen = settings(DATABASE_URL=url, ARCHIVE_DIRECTORY=str(tmp_path))
        with Retired.open(chosen) as retired:
            assert retired.take()
            assert (await archive(chosen)).files == []
        archived = await archive(chosen)
    assert (archived.problems, len(archived.files)) == ([], len(names))


async def test_a_dispatcher_behind_a_pooler_says_that_it_only_polls(
    spawn: Spawn, database_url: str, client: Client, receiver: Receiver
) -> None:
    with pgbouncer(database_url, mode="transaction") as url:
        process = spawn("dispatch", DATABASE_URL=url, SCHEDULER_POLL_INTERVAL_MS="200")
        await process.wait_for_log("not listening, only polling")
        submitted = client.value("select orchestrator.schedule_event(%s, '{}')", receiver.url())
        await finished(client, [str(submitted)])
        result = await asyncio.to_thread(invoke, "doctor", env={"DATABASE_URL": url, "COLUMNS": "200"})
        assert "connections go through a pooler" in result.stdout


async def test_a_pooler_in_statement_mode_is_refused_by_name(spawn: Spawn, database_url: str) -> None:
    with pgbouncer(database_url, mode="statement") as url:
        process = spawn("api", DATABASE_URL=url)
        with pytest.raises(UnusableDatabase, match="set pool_mode = transaction"):
            migrate(url)
        assert await process.wait() == 1
        assert "set pool_mode = transaction" in process.log()
        told = await asyncio.to_thread(invoke, "doctor", env={"DATABASE_URL": url, "COLUMNS": "300"})
        assert "set pool_mode = transaction" in told.stdout, told.output


def _rejected(n: int, field: str, reason: str) -> Reject:
    return Reject(0, n, None, b"", field, reason)
