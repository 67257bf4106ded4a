"""What an event costs, step by step: bytes of WAL by relation and record, CPU of the server and of the client, buffers.

Each step has server processes of its own, whose CPU Linux counts and whose buffers PostgreSQL does. One client makes
all calls one after another, so that the WAL between two of its calls is that of one of them.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import psycopg
from psycopg import sql

from orchestrator.bench.lifecycle import BATCH, DESTINATIONS
from orchestrator.bench.workload import chunks, new_run, spread, submissions
from orchestrator.database import Database, Leases, connect
from orchestrator.dispatch.attempt import DELIVERED, Attempted, finished
from orchestrator.errors import OrchestratorError
from orchestrator.settings import Settings

STEPS = ("submit", "claim", "finish")
_ROUND = 25_000
_SUBMITTED = 5000
_FLUSH_S = 11.0  # an idle server process tells its counts after ten seconds
_LEAST_BYTES = 0.5  # an event; smaller lines are added up

T = TypeVar("T")

_TABLES = """
select oid::regclass::text from pg_class where relnamespace = 'orchestrator'::regnamespace and relkind = 'r'
"""
_WAL = """
select coalesce(pg_partition_root(b.relation), b.relation)::regclass::text
  , r.resource_manager || '/' || r.record_type, sum(r.end_lsn - r.start_lsn)::bigint
from pg_get_wal_records_info(%(first)s, %(last)s) r
left join (
  select distinct on (start_lsn) start_lsn, pg_filenode_relation(reltablespace, relfilenode) as relation
  from pg_get_wal_block_info(%(first)s, %(last)s, false)
  order by start_lsn, block_id
) b using (start_lsn)
group by 1, 2
"""


def run(database_url: str, events: int) -> dict[str, object]:
    """The costs of one event, in rounds after one that warms up, with the payload and the batches of `lifecycle`.

    Autovacuum is off; a vacuum of timer ends each round. CPU is the median of the rounds, and in brackets the least.
    """
    with psycopg.connect(database_url, autocommit=True) as watching:
        watching.execute("create extension if not exists pg_walinspect")
        for (table,) in watching.execute(_TABLES).fetchall():
            watching.execute(sql.SQL("alter table {} set (autovacuum_enabled = off)").format(sql.SQL(table)))
        meter = _Meter(watching)
        of_one = min(events, _ROUND)
        rounds = 1 + events // of_one
        asyncio.run(_lives(Settings.from_env({"DATABASE_URL": database_url}), meter, rounds, of_one))
        return meter.figures(rounds, of_one)


async def _lives(settings: Settings, meter: _Meter, rounds: int, events: int) -> None:
    made = submissions(
        rounds * events,
        lambda n: f"https://receiver-{n % DESTINATIONS}.example.com/hooks",
        spread(datetime.now(UTC) - timedelta(minutes=10), 300, rounds * events),
        new_run(),
    )
    async with AsyncExitStack() as open_:
        database = await open_.enter_async_context(Database(settings, role="submit"))
        claiming, finishing = [
            await open_.enter_async_context(await connect(settings, step)) for step in ("claim", "finish")
        ]
        [worker] = await (await claiming.execute("select orchestrator.register_worker('bench')")).fetchone() or [0]
        leases, attempted = Leases(claiming, finishing, worker), Attempted(DELIVERED, 200)
        for n in range(rounds):
            for batch in chunks(itertools.islice(made, events), _SUBMITTED):
                await meter.measured(n, "submit", database.submit(batch))
            while claimed := (await meter.measured(n, "claim", leases.claim(BATCH, lease_s=60, lookahead_s=0))).events:
                now_s = time.time()
                results = [finished(event, attempted, now_s, 0.0) for event in claimed]
                if odd := await meter.measured(n, "finish", leases.finish(results)):
                    raise OrchestratorError(f"bench: a result was refused: {odd[0]}")
            meter.vacuumed(n)
        await asyncio.sleep(_FLUSH_S)
        meter.count_buffers()


class _Meter:
    """What the calls of each step took, summed up by rounds."""

    def __init__(self, watching: psycopg.Connection) -> None:
        self._watching = watching
        self._server_ns: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self._client_ns: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self._wal: dict[str, list[tuple[str, str]]] = defaultdict(list)
        self._buffers: dict[str, int] = {}

    async def measured(self, round_: int, step: str, call: Awaitable[T]) -> T:
        processes = self._processes(step)
        wal, server_ns, client_ns = self._lsn(), _cpu_ns(processes), time.process_time_ns()
        result = await call
        self._client_ns[step][round_] += time.process_time_ns() - client_ns
        # A process that the call started has no time before.
        self._server_ns[step][round_] += _cpu_ns(self._processes(step)) - server_ns
        if round_ > 0:
            self._wal[step].append((wal, self._lsn()))
        return result

    def vacuumed(self, round_: int) -> None:
        """Vacuums timer, on the connection that watches."""
        process = [self._watching.info.backend_pid]
        wal, server_ns = self._lsn(), _cpu_ns(process)
        self._watching.execute("vacuum orchestrator.timer")
        self._server_ns["vacuum"][round_] = _cpu_ns(process) - server_ns
        self._wal["vacuum"].append((wal, self._lsn()))

    def count_buffers(self) -> None:
        for step in STEPS:
            for process in self._processes(step):
                row = self._watching.execute(
                    "select sum(hits + reads) from pg_stat_get_backend_io(%s) where object = 'relation'", (process,)
                ).fetchone()
                self._buffers[step] = self._buffers.get(step, 0) + int(row[0] if row and row[0] else 0)

    def figures(self, rounds: int, events: int) -> dict[str, object]:
        """What one event costs, if each round had that many; the first is left out, except for buffers and vacuum."""
        figures: dict[str, object] = {}
        for step in STEPS:
            figures[f"{step} CPU µs of the server"] = _times(self._server_ns[step], rounds, events)
            figures[f"{step} CPU µs of the client"] = _times(self._client_ns[step], rounds, events)
            figures[f"{step} buffers"] = round(self._buffers[step] / (rounds * events), 1)
        figures["vacuum CPU µs of the server"] = _times(self._server_ns["vacuum"], rounds, events)
        total = 0.0
        for step, ranges in self._wal.items():
            lines = self._records(ranges, (rounds if step == "vacuum" else rounds - 1) * events)
            total += sum(lines.values())
            figures[f"{step} WAL bytes"] = round(sum(lines.values()), 1)
            figures |= {f"{step} WAL bytes: {name}": round(size, 1) for name, size in lines.items()}
        return {"WAL bytes": round(total, 1)} | figures

    def _records(self, ranges: list[tuple[str, str]], events: int) -> dict[str, float]:
        """Bytes an event by relation and record, the greatest first."""
        found: dict[str, float] = defaultdict(float)
        for first, last in ranges:
            for relation, record, size in self._watching.execute(_WAL.encode(), {"first": first, "last": last}):
                kind = re.sub(r"\+INIT$|(?<=SPLIT)_[LR]$", "", record)
                found[f"{relation.removeprefix('orchestrator.')} {kind}" if relation else kind] += size / events
        least = {name: size for name, size in found.items() if size < _LEAST_BYTES}
        lines = {name: found[name] for name in sorted(found, key=lambda name: -found[name]) if name not in least}
        return lines | {"other": sum(least.values())}

    def _processes(self, step: str) -> list[int]:
        name = f"orchestrator {step}"
        return [
            row[0]
            for row in self._watching.execute(
                "select pid from pg_stat_activity where application_name = %s and datname = current_database()", (name,)
            )
        ]

    def _lsn(self) -> str:
        row = self._watching.execute("select pg_current_wal_insert_lsn()::text").fetchone()
        return row[0] if row else "0/0"


def _times(spent_ns: dict[int, int], rounds: int, events: int) -> str:
    each = [spent_ns[n] / 1000 / events for n in range(1, rounds)]
    return f"{statistics.median(each):.1f} ({min(each):.1f})"


def _cpu_ns(processes: list[int]) -> int:
    """CPU time of processes of this machine. Raises OrchestratorError where the server is on another one."""
    try:
        return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in processes)
    except OSError as error:
        raise OrchestratorError(f"bench: cost needs a server on this machine, under Linux: {error}") from error
