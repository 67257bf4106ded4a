"""Half an hour of mixed work: does any table or index grow, and do claims slow down?"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from orchestrator.bench.delivery import drained
from orchestrator.bench.flow import by_period, delivered_by_period, maintaining, null_fleet, period_s, tell
from orchestrator.bench.processes import rss_mib
from orchestrator.bench.workload import lateness, new_run, paced, submissions
from orchestrator.database import Database
from orchestrator.settings import Settings

_DESTINATIONS = 50
_FAIL_EVERY = 20
_CANCEL_EVERY = 50
_LATER_WITHIN_S = 600.0
_LATER_SHARE = 1 / 3  # of the whole, where that is shorter
_CANCELLED_AFTER_S = (1.0, 5.0)
_LARGE_BYTES = 1 << 20
_COMPARED = 5
"""Periods at the start and at the end whose medians are compared, or as many as there are."""


def run(database_url: str, minutes: float, per_s: float, dispatchers: int) -> dict[str, object]:
    """Events at a given rate: half are due within 2 s, half within ten minutes; one in 50 is cancelled before that.

    One attempt in 20 fails and is retried after the default delays. The dispatchers are real except for their
    deliveries, which do nothing: two cores cannot serve 2,000 requests a second as well. Sizes are taken each minute.

    Judgement begins when as many events end as are submitted: after ten minutes, or a third of a shorter run.
    ``timer_bytes_per_live_byte`` is the most of any minute since; half of each page is kept free, so 2 is the least.
    """
    seconds = 60 * minutes
    later_s = min(_LATER_WITHIN_S, _LATER_SHARE * seconds)
    settings = Settings.from_env({"DATABASE_URL": database_url})
    sizes: list[dict[str, Any]] = []
    with null_fleet(database_url, dispatchers, fail_every=_FAIL_EVERY) as fleet:

        def look() -> None:
            sizes.append(_sizes(database_url))
            since_s = time.time() - period_s(seconds)
            claims = lateness([claim.seconds for claim in fleet.claims() if claim.at_s >= since_s])
            tell(f"soak: {json.dumps({**sizes[-1], 'claim_ms': claims})}")

        look()
        began_s = time.time()
        cancelled = asyncio.run(_flow(settings, round(per_s * seconds), per_s, seconds, later_s, look))
        submitted_s = time.time()
        finished_s = drained(database_url, None, 0, expected_s=seconds)
        look()
        claims = by_period(fleet.claims(), began_s, seconds)
        memory = max(rss_mib(process) for process in fleet.processes)
    periods = [
        {**claim, **rate}
        for claim, rate in zip(claims, delivered_by_period(database_url, began_s, seconds), strict=True)
    ]
    settled = math.ceil(later_s / period_s(seconds))
    steady = sizes[settled + 1 : -1]  # the last sample is at the end
    return {
        "events": round(per_s * seconds),
        "rate_per_s": per_s,
        "period_s": period_s(seconds),
        "counts": _counts(database_url) | {"cancels": cancelled},
        "periods": periods,
        "sizes": sizes,
        "timer_bytes_per_live_byte": max(each["timer_bytes_per_live_byte"] or 0.0 for each in steady),
        "index_growth": {
            name: round(size / steady[0]["indexes"].get(name, _LARGE_BYTES), 2)
            for name, size in steady[-1]["indexes"].items()
        },
        "claim_p50_drift": drift([each["p50"] for each in periods[settled:]]),
        "claim_p99_drift": drift([each["p99"] for each in periods[settled:]]),
        "drained_s": round(finished_s - submitted_s, 3),
        "rss_mib": {"dispatch": memory},
    }


def drift(values: Sequence[float | None]) -> float | None:
    """The share by which the last few periods are above the first few."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    count = max(1, min(_COMPARED, len(known) // 2))
    return round(statistics.median(known[-count:]) / statistics.median(known[:count]) - 1, 3)


async def _flow(
    settings: Settings, events: int, per_s: float, seconds: float, later_s: float, look: Callable[[], None]
) -> int:
    """Submits and cancels; returns how many were cancelled."""
    run_name = new_run()
    cancelled = 0
    async with Database(settings, role="bench") as database:

        async def send(first: int, count: int) -> None:
            nonlocal cancelled
            made = list(
                submissions(
                    count,
                    lambda n: f"https://receiver-{(first + n) % _DESTINATIONS}.example.com/hooks",
                    _due(datetime.now(UTC), first, later_s),
                    f"{run_name}-{first}",
                )
            )
            await database.submit(made)
            await asyncio.sleep(random.uniform(*_CANCELLED_AFTER_S))
            for n, each in enumerate(made):
                if _is_cancelled(first + n):
                    answer = await database.cancel(each.id)
                    cancelled += answer.result == "cancelled"

        async def watch() -> None:
            while True:
                await asyncio.sleep(period_s(seconds))
                await asyncio.to_thread(look)

        await maintaining(settings, paced(per_s, events, send), watch)
    return cancelled


def _is_cancelled(n: int) -> bool:
    return n % _CANCEL_EVERY == 0


def _due(now: datetime, first: int, later_s: float) -> Callable[[int], datetime]:
    """The due times of the events; events to be cancelled are due after their cancel."""

    def due(n: int) -> datetime:
        if _is_cancelled(first + n):
            return now + timedelta(
                seconds=random.uniform(3 * _CANCELLED_AFTER_S[1], 3 * _CANCELLED_AFTER_S[1] + later_s)
            )
        return now + timedelta(seconds=random.uniform(0.1, 2.0) if n % 2 else random.uniform(0.1, later_s))

    return due


def _sizes(database_url: str) -> dict[str, Any]:
    """Of the timers: live rows, their bytes, the bytes of the table, dead rows; and the largest relations."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        row = connection.execute(_TIMERS).fetchone()
        indexes = connection.execute(_INDEXES, (_LARGE_BYTES,)).fetchall()
        tables = connection.execute(_TABLES, (_LARGE_BYTES,)).fetchall()
    live, live_bytes, table, dead = row if row else (0, 0, 0, 0)
    return {
        "at_s": round(time.time()),
        "live": live,
        "live_bytes": live_bytes,
        "timer_bytes": table,
        "timer_bytes_per_live_byte": round(table / live_bytes, 2) if live_bytes else None,
        "dead": dead,
        "indexes": dict(indexes),
        "tables": dict(tables),
    }


def _counts(database_url: str) -> dict[str, int]:
    """The outcomes of the events and their attempts."""
    with psycopg.connect(database_url) as connection:
        return dict(connection.execute("select result, count(*) from orchestrator.outcomes group by 1").fetchall())


# A row takes its own bytes, as a composite value does, and a line pointer of four.
_TIMERS = """
select count(*), coalesce(sum(pg_column_size(t.*) + 4), 0)::bigint
     , pg_relation_size('orchestrator.timer')
     , (select n_dead_tup from pg_stat_user_tables where relid = 'orchestrator.timer'::regclass)
from orchestrator.timer t
"""
# Those that do not belong to a day: what grows there is never dropped.
_INDEXES = """
select c.relname, pg_relation_size(c.oid)
from pg_class c join pg_index i on i.indexrelid = c.oid join pg_class t on t.oid = i.indrelid
where c.relnamespace = 'orchestrator'::regnamespace and c.relkind = 'i' and not t.relispartition
  and pg_relation_size(c.oid) >= %s
order by 1
"""
_TABLES = """
select c.relname, pg_table_size(c.oid) from pg_class c
where c.relnamespace = 'orchestrator'::regnamespace and c.relkind = 'r' and not c.relispartition
  and pg_table_size(c.oid) >= %s
order by 1
"""
