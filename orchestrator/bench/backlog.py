"""Duration of a claim, by the number of live timers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta

import psycopg

from orchestrator.bench.claims import claim
from orchestrator.bench.flow import tell
from orchestrator.bench.processes import another_database
from orchestrator.bench.workload import PAYLOAD, lateness, new_run, submissions
from orchestrator.database import COPY_STAGED, staged
from orchestrator.errors import OrchestratorError
from orchestrator.events.encoding import encode_row

_DEPTHS = (100_000, 1_000_000, 10_000_000)
_BATCH = 100
_ROUNDS = 500
_DESTINATIONS = 50
_FIRST_AFTER = timedelta(hours=1)
_SPREAD = timedelta(days=28)
_FILLERS = 2
_FILLED_AT_ONCE = 100_000
_FLOORS_EVERY_S = 1.0


def run(database_url: str, events: int) -> dict[str, object]:
    """Milliseconds of claims of 100, with up to `events` live timers, by one client that finishes what it claims.

    Before each claim, as many events are submitted as it takes, so that the depth stays the same. Floors are raised
    once a second, as by a dispatcher. ``future``: only the events just submitted are due. ``overdue``: all events are
    due, as after a long outage; the client's clock is set four weeks ahead for that.

    Every depth has its own database. The depths take turns, so that a machine that is slow for a while is slow for
    all of them. The tables are filled by insert … select, with rows as submit_events() would make them.
    """
    depths = [depth for depth in _DEPTHS if depth <= events] or [events]
    first = datetime.now(UTC) + _FIRST_AFTER
    filled_s: dict[str, float] = {}
    with ExitStack() as databases:
        urls = {depth: databases.enter_context(another_database(database_url, f"backlog_{depth}")) for depth in depths}
        for depth, url in urls.items():
            began_s = time.perf_counter()
            _fill(url, depth, first)
            filled_s[str(depth)] = round(time.perf_counter() - began_s, 1)
            tell(f"backlog: {depth} events inserted after {filled_s[str(depth)]} s")
        future = _measured(urls, None)
        overdue = _measured(urls, first + _SPREAD)
    return {
        "batch": _BATCH,
        "claims": _ROUNDS,
        "filled_s": filled_s,
        "future": future,
        "overdue": overdue,
        "future_p99_ratio": _ratio(future),
        "overdue_p99_ratio": _ratio(overdue),
    }


def _ratio(times: dict[str, dict[str, float | None]]) -> float:
    """How many times as long a claim took at the largest depth as at the smallest."""
    ordered = list(times.values())
    least, most = ordered[0], ordered[-1]
    return round((most["p99"] or 0.0) / (least["p99"] or 1.0), 2)


def _measured(urls: dict[int, str], clock: datetime | None) -> dict[str, dict[str, float | None]]:
    taken: dict[int, list[float]] = {depth: [] for depth in urls}
    with ExitStack() as connections:
        clients = {depth: connections.enter_context(_Client.connected(url, clock)) for depth, url in urls.items()}
        for _ in range(_ROUNDS):
            for depth, client in clients.items():
                client.submit(_BATCH)
                taken[depth].append(claim(client.connection, _BATCH))
                client.raise_floors()
    return {str(depth): lateness(seconds) for depth, seconds in taken.items()}


class _Client:
    """A session, with its own clock if `now` is given."""

    def __init__(self, connection: psycopg.Connection, clock: datetime | None) -> None:
        self.connection = connection
        self._clock = clock
        self._run = new_run()
        self._rounds = 0
        self._raised_s = 0.0

    @classmethod
    @contextmanager
    def connected(cls, url: str, clock: datetime | None) -> Iterator[_Client]:
        with psycopg.connect(url, autocommit=True) as connection:
            if clock is not None:
                connection.execute("select set_config('orchestrator.now', %s, false)", (clock.isoformat(),))
            connection.execute("select orchestrator.open_staging()")
            yield cls(connection, clock)

    def submit(self, count: int) -> None:
        """Events that are due at once."""
        at = self._clock or datetime.now(UTC)
        made = submissions(count, _destination, lambda _: at, f"{self._run}-{self._rounds}")
        self._rounds += 1
        with self.connection.transaction(), self.connection.cursor() as cursor:
            with cursor.copy(COPY_STAGED) as copy:
                copy.write(staged(encode_row(submission, n) for n, submission in enumerate(made)))
            cursor.execute("select * from orchestrator.submit_staged()")
            if refused := cursor.fetchone():
                raise OrchestratorError(f"bench: a submission was not accepted: {refused}")

    def raise_floors(self) -> None:
        """Once a second, as dispatchers do."""
        if time.monotonic() > self._raised_s + _FLOORS_EVERY_S:
            self.connection.execute("select orchestrator.raise_floors()")
            self._raised_s = time.monotonic()


def _destination(n: int) -> str:
    return f"https://receiver-{n % _DESTINATIONS}.example.com/hooks"


def _fill(url: str, depth: int, first: datetime) -> None:
    """Events that are due at even intervals within four weeks."""
    values = {
        "run": new_run(),
        "first": first,
        "step": _SPREAD / depth,
        "destinations": _DESTINATIONS,
        "payload": PAYLOAD.decode(),
    }

    def fill(start: int) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(_FILL, values | {"start": start, "end": min(depth, start + _FILLED_AT_ONCE)})

    with ThreadPoolExecutor(_FILLERS) as fillers:
        list(fillers.map(fill, range(0, depth, _FILLED_AT_ONCE)))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("vacuum (analyze) orchestrator.timer")
        connection.execute("analyze orchestrator.event")
        connection.execute("select orchestrator.run_maintenance()")
        connection.execute("checkpoint")


_FILL = """
with made as materialized (
  select orchestrator.event_id('bench', %(run)s || '-' || n, at) as id, at, %(run)s || '-' || n as external_job_id
       , 'https://receiver-' || n %% %(destinations)s || '.example.com/hooks' as destination
  from (select n, %(first)s::timestamptz + n * %(step)s::interval as at
        from generate_series(%(start)s::integer, %(end)s::integer - 1) n) t
), kept as (
  insert into orchestrator.event
    (id, scheduled_at, created_at, max_retries, source, external_job_id, delivery_type, destination, payload)
  select m.id, m.at, orchestrator.now(), 3, 'bench', m.external_job_id, 'HTTP', m.destination, %(payload)s::json
  from made m
  order by m.id
), counted as (
  insert into orchestrator.statistic
    (minute, name, source, destination, source_label, destination_label, value)
  select date_trunc('minute', orchestrator.now()), 'accepted', hashtextextended('bench', 0), hashtextextended(n.name, 0)
       , 'bench', n.name, n.count
  from (select orchestrator.destination_name('HTTP', m.destination) as name, count(*) as count
        from made m group by 1) n
)
insert into orchestrator.timer
  (event_id, scheduled_at, due_at, lane, destination, priority, attempt, max_attempts, source)
select m.id, m.at, m.at, (h.hash & 63)::integer, h.hash, 0, 0, 4, hashtextextended('bench', 0)
from made m
cross join lateral (
  select hashtextextended(orchestrator.destination_name('HTTP', m.destination), 0) as hash offset 0) h
order by m.id
"""
