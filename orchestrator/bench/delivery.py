"""Deliveries over HTTP by real dispatcher processes: a backlog, a herd, and a steady flow."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Literal, LiteralString

import psycopg

from orchestrator.bench import lifecycle
from orchestrator.bench.processes import Receiver, product, receiver, rss_mib, wait_until
from orchestrator.bench.workload import chunks, judged, new_run, paced, spread, submissions
from orchestrator.database import Database
from orchestrator.errors import OrchestratorError
from orchestrator.events.submission import Submission
from orchestrator.settings import Settings

DESTINATIONS = 50
_STAGED = 2500
_SUBMITTERS = 2
_DRAIN_S = 300.0
_DRAIN_PER_S = 1000
_HERD_LEAD_S = 4.0
_STEADY_PER_S = 1000


def deliver_http(database_url: str, events: int, dispatchers: int) -> dict[str, object]:
    """Drains a backlog that is due before the dispatchers start. Timed from the first arrival to the last finish."""
    with receiver() as target:
        due = spread(datetime.now(UTC) - timedelta(minutes=2), 1.0, events)
        made = submissions(events, lambda n: f"{target.url}/{n % DESTINATIONS}", due, new_run())
        due_s = asyncio.run(submit(database_url, made))
        with dispatching(database_url, dispatchers, []) as processes:
            finished_s = drained(database_url, target, events)
            memory = max(rss_mib(process) for process in processes)
        arrivals = target.arrivals()
        seconds = finished_s - arrivals[0][1]
        result = rates(events, seconds) | judged(due_s, arrivals)
        return result | {"lateness_ms": None, "rss_mib": {"dispatch": memory}}


def herd(database_url: str, events: int, dispatchers: int) -> dict[str, object]:
    """Events due at one instant, submitted before. Timed from that instant to the last finish."""
    with receiver() as target, dispatching(database_url, dispatchers, []) as processes:
        at = datetime.now(UTC) + timedelta(seconds=_HERD_LEAD_S + events / 25_000)
        made = submissions(events, lambda n: f"{target.url}/{n % DESTINATIONS}", lambda n: at, new_run())
        due_s = asyncio.run(submit(database_url, made))
        submitted_s = at.timestamp() - time.time()
        finished_s = drained(database_url, target, events)
        memory = max(rss_mib(process) for process in processes)
        result = rates(events, finished_s - at.timestamp()) | judged(due_s, target.arrivals())
        return result | {"submitted_ahead_s": round(submitted_s, 3), "rss_mib": {"dispatch": memory}}


def herd_null(database_url: str, events: int, dispatchers: int, *, bare: bool) -> dict[str, object]:
    """The same with deliveries that do nothing; lateness is that of the recorded start of each attempt.

    With `bare`, the clients of `lifecycle` then claim and finish a second herd, without dispatchers.
    """
    with dispatching(database_url, dispatchers, ["orchestrator.bench.null_dispatcher"]) as processes:
        at = datetime.now(UTC) + timedelta(seconds=_HERD_LEAD_S + events / 25_000)
        due_s = asyncio.run(submit(database_url, _herd(events, at)))
        submitted_s = at.timestamp() - time.time()
        finished_s = drained(database_url, None, events)
        memory = max(rss_mib(process) for process in processes)
    with psycopg.connect(database_url) as connection, connection.cursor("started") as started:
        started.itersize = 10_000
        started.execute(
            "select event_id::text, extract(epoch from started_at)::float8 from orchestrator.outcomes"
            " where scheduled_at = %s and result = 'delivered'",
            (at,),
        )
        judgement = judged(due_s, ((row[0], row[1]) for row in started))
    result = rates(events, finished_s - at.timestamp()) | judgement
    if bare:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("vacuum orchestrator.timer")  # as empty as lifecycle finds it
        asyncio.run(submit(database_url, _herd(events, datetime.now(UTC))))
        seconds = lifecycle.claim_and_finish(Settings.from_env({"DATABASE_URL": database_url}), lifecycle.BATCH)
        result |= {"claim_finish_per_s": round(events / seconds)}
    return result | {"submitted_ahead_s": round(submitted_s, 3), "rss_mib": {"dispatch": memory}}


def _herd(events: int, at: datetime) -> Iterator[Submission]:
    return submissions(
        events, lambda n: f"https://receiver-{n % DESTINATIONS}.example.com/hooks", lambda n: at, new_run()
    )


def steady(database_url: str, events: int, dispatchers: int) -> dict[str, object]:
    """1,000 events a second, submitted 0.1 to 2 s before they are due; lateness is measured at their arrival."""
    with receiver() as target, dispatching(database_url, dispatchers, []) as processes:
        due_s = asyncio.run(_flow(database_url, target, events))
        drained(database_url, target, events)
        memory = max(rss_mib(process) for process in processes)
        seconds = events / _STEADY_PER_S
        return rates(events, seconds) | judged(due_s, target.arrivals()) | {"rss_mib": {"dispatch": memory}}


def rates(events: int, seconds: float) -> dict[str, object]:
    return {"seconds": round(seconds, 3), "events_per_s": round(events / seconds)}


@contextmanager
def dispatching(
    database_url: str, count: int, module: Sequence[str], given: Mapping[str, str] | None = None
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Dispatcher processes that are ready to claim; `given` are further settings."""
    environ = {
        "HTTP_MAX_CONNECTIONS": "64",
        "HTTP_ALLOW_NETWORKS": "127.0.0.0/8",
        "WEBHOOK_SECRETS": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "LOG_LEVEL": "WARNING",
    }
    environ = {**environ, **os.environ, **(given or {}), "DATABASE_URL": database_url}
    with psycopg.connect(database_url, autocommit=True) as watching, ExitStack() as running:
        before = _workers(watching)
        arguments = list(module) or ["orchestrator", "dispatch"]
        processes = [running.enter_context(product(arguments, environ)) for _ in range(count)]
        wait_until(lambda: _workers(watching) >= before + count, "starting the dispatchers", 30.0 + 4.0 * count)
        yield processes


def _workers(connection: psycopg.Connection) -> int:
    row = connection.execute("select count(*) from orchestrator.worker").fetchone()
    return int(row[0]) if row else 0


async def submit(database_url: str, made: Iterable[Submission]) -> dict[str, float]:
    """Submits events while it makes them; returns event id → Unix time at which it is due."""
    due_s: dict[str, float] = {}
    batches = chunks(made, _STAGED)

    async def client(database: Database) -> None:
        for batch in batches:
            due_s.update((each.id, each.scheduled_at.timestamp()) for each in batch)
            await database.submit(batch)

    settings = Settings.from_env({"DATABASE_URL": database_url})
    async with Database(settings, role="bench") as database, asyncio.TaskGroup() as clients:
        for _ in range(_SUBMITTERS):
            clients.create_task(client(database))
    return due_s


async def _flow(database_url: str, target: Receiver, events: int) -> dict[str, float]:
    """Submits on time even if the database is slow; fails if it cannot keep up."""
    due_s: dict[str, float] = {}
    run = new_run()
    async with Database(Settings.from_env({"DATABASE_URL": database_url}), role="bench") as database:

        async def send(first: int, count: int) -> None:
            soon = _soon_after(datetime.now(UTC))
            made = list(submissions(count, lambda n: f"{target.url}/{n % DESTINATIONS}", soon, f"{run}-{first}"))
            due_s.update((each.id, each.scheduled_at.timestamp()) for each in made)
            await database.submit(made)

        await paced(_STEADY_PER_S, events, send)
    return due_s


def _soon_after(now: datetime) -> Callable[[int], datetime]:
    return lambda _: now + timedelta(microseconds=random.randrange(100_000, 2_000_000))


def drained(
    database_url: str,
    target: Receiver | None,
    events: int,
    of: Literal["timer", "outbox"] = "timer",
    expected_s: float = 0.0,
) -> float:
    """Waits until every event is finished in the database, or published; returns the Unix time of that."""
    # While there are timers, the last by key is found at once; a scan would read all pages of those that have gone.
    last: dict[str, LiteralString] = {
        "timer": "select not exists (select from orchestrator.timer order by event_id desc limit 1)",
        "outbox": "select not exists (select from orchestrator.outbox)",
    }
    all_gone: dict[str, LiteralString] = {
        "timer": "select count(*) = 0 from orchestrator.timer",
        "outbox": "select count(*) = 0 from orchestrator.outbox",
    }
    timeout_s = _DRAIN_S + events / _DRAIN_PER_S + expected_s
    if target is not None:
        wait_until(lambda: target.count() >= events, f"delivering {events} events", timeout_s)
    with psycopg.connect(database_url, autocommit=True) as watching:

        def holds(condition: LiteralString) -> bool:
            row = watching.execute(condition).fetchone()
            return row is not None and bool(row[0])

        watching.execute("set enable_seqscan = off")
        wait_until(lambda: holds(last[of]), f"finishing {events} events", timeout_s, 0.01 if target else 0.05)
        ended_s = time.time()
        watching.execute("set enable_seqscan = on")
        if not holds(all_gone[of]):
            raise OrchestratorError(f"bench: rows of {of} are left that its index does not show")
    return ended_s
