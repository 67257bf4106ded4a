"""SQL alone: submit by COPY, claim, finish."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Barrier

import psycopg

from orchestrator.bench.workload import chunks, new_run, spread, submissions
from orchestrator.config import Settings
from orchestrator.database import COPY_SUBMISSIONS, Finished, Leases, connect
from orchestrator.errors import OrchestratorError
from orchestrator.events import copy_row

DESTINATIONS = 50
BATCH = 1000
"""Size of a claim."""
_STAGED = 5000
_CLIENTS = 2
_START_S = 30.0


def run(database_url: str, events: int, batch: int) -> dict[str, object]:
    """The whole life of `events` events with two clients, in rates, and WAL bytes an event."""
    started = datetime.now(UTC) - timedelta(minutes=10)
    made = submissions(
        events,
        lambda n: f"https://receiver-{n % DESTINATIONS}.example.com/hooks",
        spread(started, 300, events),
        new_run(),
    )
    texts = [b"".join(copy_row(submission, n) for n, submission in enumerate(chunk)) for chunk in chunks(made, _STAGED)]
    settings = Settings.from_env({"DATABASE_URL": database_url})
    with psycopg.connect(database_url, autocommit=True) as watching:
        before = _wal(watching)
        submit_s = asyncio.run(_submit(settings, texts))
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
    }


def _wal(connection: psycopg.Connection) -> int:
    row = connection.execute("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')").fetchone()
    return int(row[0]) if row else 0


async def _submit(settings: Settings, texts: list[bytes]) -> float:
    waiting = texts[::-1]

    async def client() -> None:
        async with await connect(settings, "bench") as connection, connection.cursor() as cursor:
            await cursor.execute("select orchestrator.open_staging()")
            while waiting:
                text = waiting.pop()
                async with connection.transaction():
                    async with cursor.copy(COPY_SUBMISSIONS) as copy:
                        await copy.write(text)
                    await cursor.execute("select * from orchestrator.submit_staged()")
                    if refused := await cursor.fetchone():
                        raise OrchestratorError(f"bench: a submission was not accepted: {refused}")

    return await _timed(client)


def claim_and_finish(settings: Settings, batch: int) -> float:
    """With each client in a process of its own, as dispatchers are. Timed from when all are connected."""
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
            await asyncio.to_thread(_start.wait, _START_S)
            while claimed := (await leases.claim(batch, lease_s=60, lookahead_s=0))[1]:
                now_s = time.time()
                results = [
                    Finished(event.event_id, event.attempt, "delivered", 200, now_s, now_s, None, None, None, now_s)
                    for event in claimed
                ]
                if odd := await leases.finish(results):
                    raise OrchestratorError(f"bench: a result was not taken: {odd[0]}")

    asyncio.run(work())


async def _timed(client: Callable[[], Coroutine[None, None, None]]) -> float:
    began_s = time.perf_counter()
    async with asyncio.TaskGroup() as clients:
        for _ in range(_CLIENTS):
            clients.create_task(client())
    return time.perf_counter() - began_s
