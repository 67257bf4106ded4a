"""Duration of a claim, by the number of destinations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta

import psycopg

from orchestrator.bench.delivery import submit
from orchestrator.bench.limits import configure
from orchestrator.bench.processes import another_database
from orchestrator.bench.workload import lateness, new_run, spread, submissions

_SIZES = (100, 100, 1000)
"""Claims of a round."""
_ROUNDS = 200
_WORKER = 0
_CONFIGURED = 1000
_RATE_PER_S, _BURST, _MAX_PARALLEL = 50.0, 50, 50

Times = dict[str, dict[str, float | None]]


def run(database_url: str, events: int) -> dict[str, object]:
    """Milliseconds of claims of 100 and of 1,000 by one client that finishes them at once; each case has `events`.

    Every case has its own database on the same server. The cases take turns, so that a machine that is slow for a
    while is slow for all of them. `configured_1` is the only destination, `configured_1_of_1000` one among 999 others.
    Of `configured_1000`, a tenth have a rate limit that is soon used up, and a tenth have max_parallel.
    """
    waiting = max(events, _ROUNDS * sum(_SIZES))
    cases: dict[str, tuple[int, Callable[[str], None]]] = {
        "unconfigured_50": (50, lambda url: None),
        "unconfigured_100000": (100_000, lambda url: None),
        "configured_1": (1, lambda url: configure(url, _name(0))),
        "configured_1_of_1000": (_CONFIGURED, lambda url: configure(url, _name(0))),
        "configured_1000": (_CONFIGURED, _configure_all),
    }
    with ExitStack() as databases:
        clients = {
            name: databases.enter_context(_backlog(database_url, name, waiting, *case)) for name, case in cases.items()
        }
        taken: dict[str, dict[str, list[float]]] = {name: {str(batch): [] for batch in _SIZES} for name in clients}
        for _ in range(_ROUNDS):
            for name, client in clients.items():
                for batch in _SIZES:
                    taken[name][str(batch)].append(claim(client, batch))
    times = {name: {batch: lateness(seconds) for batch, seconds in sizes.items()} for name, sizes in taken.items()}
    return {
        **times,
        "unconfigured_ratio": _ratios(times["unconfigured_50"], times["unconfigured_100000"]),
        "configured_ratio": _ratios(times["configured_1"], times["configured_1000"]),
        "configured_ratio_to_1_of_1000": _ratios(times["configured_1_of_1000"], times["configured_1000"]),
    }


def _name(n: int) -> str:
    return f"receiver-{n}.example.com"


def _configure_all(url: str) -> None:
    names = [_name(n) for n in range(_CONFIGURED)]
    configure(url, *names[::10], rate_per_second=_RATE_PER_S, burst=_BURST)
    configure(url, *names[1::10], max_parallel=_MAX_PARALLEL)
    configure(url, *(name for n, name in enumerate(names) if n % 10 > 1))


@contextmanager
def _backlog(
    database_url: str, name: str, events: int, destinations: int, prepare: Callable[[str], None]
) -> Iterator[psycopg.Connection]:
    """A client of a new database, in which events of `destinations` destinations are due."""
    with another_database(database_url, name) as url:
        prepare(url)
        due = spread(datetime.now(UTC) - timedelta(minutes=10), 300, events)
        made = submissions(events, lambda n: f"https://{_name(n % destinations)}/hooks", due, new_run())
        asyncio.run(submit(url, made))
        with psycopg.connect(url, autocommit=True) as client:
            client.execute("select orchestrator.run_maintenance()")  # claims need not look for timers to move
            client.execute("vacuum (analyze) orchestrator.timer")
            yield client


def claim(client: psycopg.Connection, batch: int) -> float:
    """Claims and finishes; returns how long the claim took."""
    began_s = time.perf_counter()
    row = client.execute(
        "select array_agg(event_id), array_agg(attempt::integer) from orchestrator.claim_due_events(%s, %s)",
        (batch, _WORKER),
        prepare=True,
    ).fetchone()
    took_s = time.perf_counter() - began_s
    if row is not None and row[0] is not None:
        client.execute(
            "select orchestrator.finish_events(%s, %s, array_fill('delivered'::text, array[%s]))",
            (row[0], row[1], len(row[0])),
            prepare=True,
        )
    return took_s


def _ratios(few: Times, many: Times) -> dict[str, dict[str, float]]:
    """How many times as long a claim took with many destinations as with few."""
    return {
        batch: {each: round((many[batch][each] or 0) / (few[batch][each] or 1), 2) for each in ("p50", "p99")}
        for batch in few
    }
