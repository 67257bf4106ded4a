"""SQL only: submit by COPY, claim, finish; and the sizes of the tables afterwards."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Barrier
from typing import LiteralString

import psycopg

from orchestrator.bench.workload import chunks, new_run, spread, submissions
from orchestrator.database import Leases, connect, submit_direct
from orchestrator.dispatch.attempt import DELIVERED, Attempted, finished
from orchestrator.errors import OrchestratorError
from orchestrator.events.encoding import EncodedRow, encode_row
from orchestrator.events.submission import Submission
from orchestrator.settings import Settings

DESTINATIONS = 50
BATCH = 1000
"""Size of a claim."""
_STAGED = 5000
_STAGED_AT_ONCE = 100
_MOST_DAYS = 100
_CLIENTS = 2
_START_S = 30.0


def run(database_url: str, events: int, batch: int) -> dict[str, object]:
    """The whole life of `events` events with two clients, in rates, WAL bytes an event, and sizes at the end.

    The rows of COPY are made beforehand, outside the measured time, half a million at once. At the end the day of all
    events is retired and dropped; ``retire_ms`` and ``drop_ms`` are the durations of those steps of maintenance.
    """
    started = datetime.now(UTC) - timedelta(minutes=10)
    made = submissions(
        events,
        lambda n: f"https://receiver-{n % DESTINATIONS}.example.com/hooks",
        spread(started, 300, events),
        new_run(),
    )
    settings = Settings.from_env({"DATABASE_URL": database_url})
    with psycopg.connect(database_url, autocommit=True) as watching:
        before = _wal(watching)
        submit_s = sum(asyncio.run(_submit(settings, rows)) for rows in _rows(made))
        between = _wal(watching)
        finish_s = claim_and_finish(settings, batch)
        after = _wal(watching)
        left = watching.execute("select count(*) from orchestrator.timer").fetchone()
        submit_per_s, finish_per_s = events / submit_s, events / finish_s
        return {
            "seconds": round(submit_s + finish_s, 3),
            "events_per_s": round(1 / (1 / submit_per_s + 1 / finish_per_s)),
            "submit_per_s": round(submit_per_s),
            "claim_finish_per_s": round(finish_per_s),
            "wal_bytes_per_event": round((after - before) / events),
            "wal_bytes_per_event_submit": round((between - before) / events),
            "lost": left[0] if left else events,
            "bytes": {name: _size(watching, name) for name in ("event", "timer", "outcome", "delivered_batch")},
            **_dropped(watching, started),
        }


def _rows(made: Iterator[Submission]) -> Iterator[list[list[EncodedRow]]]:
    """The rows of COPY, some transactions' worth at a time, so that memory stays bounded."""
    staged = chunks(made, _STAGED)
    while rows := [
        [encode_row(submission, n) for n, submission in enumerate(chunk)]
        for chunk in itertools.islice(staged, _STAGED_AT_ONCE)
    ]:
        yield rows


def _wal(connection: psycopg.Connection) -> int:
    row = connection.execute("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')").fetchone()
    return int(row[0]) if row else 0


def _size(connection: psycopg.Connection, table: str) -> dict[str, int]:
    """Bytes of a table with all its partitions, and of their indexes."""
    row = connection.execute(
        "select sum(pg_table_size(relid)), sum(pg_indexes_size(relid)) from pg_partition_tree(%s::regclass)",
        (f"orchestrator.{table}",),
    ).fetchone()
    if row is None or row[0] is None:  # it has no partitions
        row = connection.execute(
            "select pg_table_size(t), pg_indexes_size(t) from (select %s::regclass as t) t", (f"orchestrator.{table}",)
        ).fetchone()
    return {"table": int(row[0]), "indexes": int(row[1])} if row else {}


def _dropped(connection: psycopg.Connection, scheduled: datetime) -> dict[str, float | None]:
    """Milliseconds that it takes to retire the events' day, and to drop it, once retention is over."""
    name = f"event_p{scheduled:%Y%m%d}"
    retention = connection.execute("select retention_days from orchestrator.control").fetchone()
    over = scheduled + timedelta(days=retention[0] + 2 if retention else 0)
    retire_ms = _until(
        connection,
        "select * from orchestrator.retire_partition(%s)",
        over,
        "select exists (select from orchestrator.retired_partition where name = %s)",
        name,
    )
    drop_ms = _until(
        connection,
        "select * from orchestrator.drop_partitions(%s)",
        over + timedelta(hours=2),
        "select to_regclass('orchestrator.' || %s) is null",
        name,
    )
    return {"retire_ms": retire_ms, "drop_ms": drop_ms}


def _until(
    connection: psycopg.Connection, step: LiteralString, at: datetime, done: LiteralString, name: str
) -> float | None:
    """Repeats a step of maintenance, at that time, until it has done its work; returns how long that call took."""
    for _ in range(_MOST_DAYS):
        began_s = time.perf_counter()
        connection.execute(step, (at,))
        took_s = time.perf_counter() - began_s
        row = connection.execute(done, (name,)).fetchone()
        if row and row[0]:
            return round(1000 * took_s, 1)
    return None


async def _submit(settings: Settings, rows: list[list[EncodedRow]]) -> float:
    waiting = rows[::-1]

    async def client() -> None:
        async with await connect(settings, "bench") as connection:
            while waiting:
                batch = waiting.pop()
                async with connection.transaction():
                    if not await submit_direct(connection, batch):
                        raise OrchestratorError("bench: a batch was not accepted")

    return await _timed(client)


def claim_and_finish(settings: Settings, batch: int) -> float:
    """Each client is a process of its own, as dispatchers are. Timed from when all are connected."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(_CLIENTS + 1)
    with ProcessPoolExecutor(_CLIENTS, context, _keep_barrier, (start,)) as processes:
        clients = [processes.submit(_client, settings, batch) for _ in range(_CLIENTS)]
        start.wait(_START_S)
        began_s = time.perf_counter()
        for client in clients:
            client.result()
        return time.perf_counter() - began_s


_start: Barrier


def _keep_barrier(start: Barrier) -> None:
    global _start  # a barrier can be handed to a process only while it starts
    _start = start


def _client(settings: Settings, batch: int) -> None:
    async def work() -> None:
        async with Leases.open(settings, "bench", None) as leases:
            attempted = Attempted(DELIVERED, 200)
            await asyncio.to_thread(_start.wait, _START_S)
            while claimed := (await leases.claim(batch, lease_s=60, lookahead_s=0))[1]:
                now_s = time.time()
                results = [finished(event, attempted, now_s, 0.0) for event in claimed]
                if odd := await leases.finish(results):
                    raise OrchestratorError(f"bench: a result was refused: {odd[0]}")

    asyncio.run(work())


async def _timed(client: Callable[[], Coroutine[None, None, None]]) -> float:
    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for _ in range(_CLIENTS):
            clients.create_task(client())
    return time.perf_counter() - began_s
