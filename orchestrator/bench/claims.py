"""What one claim takes, by the number of destinations that there are."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

import psycopg

from orchestrator.bench.delivery import submit
from orchestrator.bench.limits import configure
from orchestrator.bench.workload import lateness, new_run, spread, submissions

CONFIGURED = 1000
_UNCONFIGURED_FEW, _UNCONFIGURED_MANY = 50, 100_000
_SMALL, _LARGE = 100, 1000
_ROUNDS = 200
_SMALL_A_ROUND = 2
_RATE_PER_S, _BURST, _MAX_PARALLEL = 50.0, 50, 50
_WORKER = 0


def run(database_url: str, events: int) -> dict[str, object]:
    """Milliseconds of claims of 100 and of 1,000 in turn, by one client that finishes them at once.

    Each case has `events` waiting, or as many as it claims. Configured is either the one destination that all of them
    are for, or one of 1,000 destinations, or all of these: then a tenth have a rate that is soon used up, and a tenth
    a bound.
    """
    waiting = max(events, _ROUNDS * (_LARGE + _SMALL_A_ROUND * _SMALL))
    few = _case(database_url, "few", _UNCONFIGURED_FEW, waiting)
    many = _case(database_url, "many", _UNCONFIGURED_MANY, waiting)
    names = [_name("limits", n) for n in range(CONFIGURED)]
    configure(database_url, names[0])
    alone = _case(database_url, "limits", 1, waiting)
    one = _case(database_url, "limits", CONFIGURED, waiting)
    configure(database_url, *names[1::10], rate_per_second=_RATE_PER_S, burst=_BURST)
    configure(database_url, *names[2::10], max_parallel=_MAX_PARALLEL)
    configure(database_url, *(name for n, name in enumerate(names) if n % 10 not in (1, 2)))
    every = _case(database_url, "limits", CONFIGURED, waiting)
    return {
        f"unconfigured_{_UNCONFIGURED_FEW}": few,
        f"unconfigured_{_UNCONFIGURED_MANY}": many,
        "unconfigured_ratio": _ratios(few, many),
        "configured_1": alone,
        f"configured_1_of_{CONFIGURED}": one,
        f"configured_{CONFIGURED}": every,
        "configured_ratio": _ratios(alone, every),
        f"configured_ratio_to_1_of_{CONFIGURED}": _ratios(one, every),
    }


def _name(kind: str, n: int) -> str:
    return f"{kind}-{n}.example.com"


Times = dict[str, dict[str, float | None]]


def _case(database_url: str, kind: str, destinations: int, events: int) -> Times:
    """Percentiles in milliseconds by the size of the claim; nothing that can be claimed is left afterwards."""
    due = spread(datetime.now(UTC) - timedelta(minutes=10), 300, events)
    made = submissions(events, lambda n: f"https://{_name(kind, n % destinations)}/hooks", due, new_run())
    asyncio.run(submit(database_url, made))
    taken: dict[int, list[float]] = {_SMALL: [], _LARGE: []}
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("vacuum (analyze) orchestrator.timer")
        for _ in range(_ROUNDS):
            for batch in (*[_SMALL] * _SMALL_A_ROUND, _LARGE):
                taken[batch].append(_claim(connection, batch)[1])
        while _claim(connection, _LARGE)[0]:
            pass
    return {str(batch): lateness(seconds) for batch, seconds in taken.items()}


def _claim(connection: psycopg.Connection, batch: int) -> tuple[int, float]:
    """Claims, and finishes: how many events the claim gave, and how long it took."""
    began_s = time.perf_counter()
    row = connection.execute(
        "select array_agg(event_id), array_agg(attempt::integer) from orchestrator.claim_due_events(%s, %s)",
        (batch, _WORKER),
        prepare=True,
    ).fetchone()
    took_s = time.perf_counter() - began_s
    if row is None or row[0] is None:
        return 0, took_s
    connection.execute(
        "select orchestrator.finish_events(%s, %s, array_fill('delivered'::text, array[%s]))",
        (row[0], row[1], len(row[0])),
        prepare=True,
    )
    return len(row[0]), took_s


def _ratios(few: Times, many: Times) -> dict[str, dict[str, float]]:
    """How many times as long a claim took with many."""
    return {
        batch: {each: round((many[batch][each] or 0) / (few[batch][each] or 1), 2) for each in ("p50", "p99")}
        for batch in few
    }
