"""A flow of events while another transaction holds a snapshot, so that vacuum cannot remove finished timers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import psycopg

from orchestrator.bench.delivery import drained
from orchestrator.bench.flow import by_period, delivered_by_period, maintaining, null_fleet, period_s, tell
from orchestrator.bench.workload import new_run, paced, submissions
from orchestrator.database import Database
from orchestrator.settings import Settings

_DESTINATIONS = 50


def run(database_url: str, minutes: float, per_s: float, dispatchers: int, *, floors: bool) -> dict[str, object]:
    """Null dispatchers claim and finish events that are due at once, at a given rate; reports claims by the minute.

    The snapshot is taken before the first event and held to the end. Without `floors`, dispatchers never raise floors.
    """
    seconds = 60 * minutes
    settings = Settings.from_env({"DATABASE_URL": database_url})
    with null_fleet(database_url, dispatchers, floors=floors) as fleet, _snapshot(database_url):
        began_s = time.time()
        asyncio.run(_flow(settings, round(per_s * seconds), per_s, seconds))
        submitted_s = time.time()
        finished_s = drained(database_url, None, 0, expected_s=seconds)
        claims = by_period(fleet.claims(), began_s, seconds)
        dead = _dead_timers(database_url)
    delivered = delivered_by_period(database_url, began_s, seconds)
    periods = [{**claim, **rate} for claim, rate in zip(claims, delivered, strict=True)]
    first, last = periods[0], periods[-1]
    return {
        "events": round(per_s * seconds),
        "rate_per_s": per_s,
        "floors": floors,
        "period_s": period_s(seconds),
        "periods": periods,
        "claim_p99_ratio": round((last["p99"] or 0.0) / (first["p99"] or 1.0), 2),
        "delivered_ratio": round((last["delivered_per_s"] or 0.0) / (first["delivered_per_s"] or 1.0), 3),
        "behind_s": round(finished_s - submitted_s, 3),
        "dead_timers": dead,
    }


@contextmanager
def _snapshot(database_url: str) -> Iterator[None]:
    """A snapshot, held by a session that does nothing else."""
    with psycopg.connect(database_url) as holding:
        holding.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holding.execute("select 1 from orchestrator.control")
        yield
        holding.rollback()


async def _flow(settings: Settings, events: int, per_s: float, seconds: float) -> None:
    run_name = new_run()
    async with Database(settings, role="bench") as database:

        async def send(first: int, count: int) -> None:
            now = datetime.now(UTC)
            made = submissions(
                count,
                lambda n: f"https://receiver-{n % _DESTINATIONS}.example.com/hooks",
                lambda _: now,
                f"{run_name}-{first}",
            )
            await database.submit(list(made))

        async def watch() -> None:
            while True:
                await asyncio.sleep(period_s(seconds))
                tell(f"held-snapshot: {await asyncio.to_thread(_dead_timers, settings.database_url)} dead timers")

        await maintaining(settings, paced(per_s, events, send), watch)


def _dead_timers(database_url: str) -> int:
    """The number that the statistics collector knows."""
    with psycopg.connect(database_url) as connection:
        row = connection.execute(
            "select n_dead_tup from pg_stat_user_tables where relid = 'orchestrator.timer'::regclass"
        ).fetchone()
    return int(row[0]) if row else 0
