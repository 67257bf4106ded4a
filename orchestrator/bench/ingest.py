"""Real ingester processes bring submissions that are already in Kafka into the database."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import psycopg

from orchestrator.bench.kafka import PARTITIONS, Record, broker, fill
from orchestrator.bench.processes import product, rss_mib, wait_until
from orchestrator.bench.workload import PAYLOAD, new_run
from orchestrator.kafka.topics import create_topics
from orchestrator.settings import Settings

DESTINATIONS = 50
_INGEST_S = 600.0
_BAD = (b'{"source":"bench",', b'{"source":"","scheduled_at":"tomorrow","destination":"receiver","payload":1}')


def run(database_url: str, events: int, ingesters: int, bad_every: int, duplicate_every: int) -> dict[str, object]:
    """Timed from when the first ingester has connected to the database, before it has any partition.

    Every `bad_every`-th record is no valid submission, every `duplicate_every`-th repeats the one before; 0: none.
    """
    with broker(database_url) as environ, ExitStack() as running:
        settings = Settings.from_env(environ)
        topic = settings.topic_submission
        asyncio.run(create_topics(settings))
        made: Counter[str] = Counter()
        at = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0)
        shares = {n: range(n, events, PARTITIONS) for n in range(PARTITIONS)}
        records = {n: _records(share, at, bad_every, duplicate_every, made) for n, share in shares.items()}
        asyncio.run(fill(settings, topic, records))
        processes = [running.enter_context(product(["orchestrator", "ingest"], environ)) for _ in range(ingesters)]
        with psycopg.connect(database_url, autocommit=True) as watching:
            wait_until(lambda: _began_s(watching) is not None, "starting the ingesters", 60.0, 0.005)
            began_s = _began_s(watching) or time.time()
            wait_until(lambda: _taken(watching, topic) >= events, f"ingesting {events} events", _INGEST_S, 0.05)
            seconds = time.time() - began_s
            kept, timers, rejected = _counts(watching)
        memory = max(rss_mib(process) for process in processes)
    return {
        "seconds": round(seconds, 3),
        "events_per_s": round(events / seconds),
        "kept": kept,
        "rejected": rejected,
        "lost": max(0, made["good"] - min(kept, timers)) + max(0, made["bad"] - rejected),
        "duplicated": max(0, kept - made["good"]) + max(0, rejected - made["bad"]),
        "early": 0,
        "lateness_ms": None,
        "rss_mib": {"ingest": memory},
    }


def _records(
    numbers: range, at: datetime, bad_every: int, duplicate_every: int, made: Counter[str]
) -> Iterator[Record]:
    """A record for each number, about 450 bytes long; counts each kind in `made`."""
    run, bad = new_run(), itertools.cycle(_BAD)
    last: Record | None = None
    for place, number in enumerate(numbers, start=1):
        if bad_every and place % bad_every == 0:
            made["bad"] += 1
            yield b"bad", next(bad)
        elif duplicate_every and place % duplicate_every == 0 and last is not None:
            made["duplicate"] += 1
            yield last
        else:
            made["good"] += 1
            due = at + timedelta(milliseconds=number)
            last = f"{run}-{number}".encode(), _submission(f"{run}-{number}", due, number)
            yield last


def _submission(job: str, due: datetime, number: int) -> bytes:
    fields = (
        f'{{"source":"bench","external_job_id":"{job}","scheduled_at":"{due.isoformat()}","delivery_type":"HTTP",'
        f'"destination":"https://receiver-{number % DESTINATIONS}.example.com/hooks","payload":'
    )
    return b"%b%b}" % (fields.encode(), PAYLOAD)


def _began_s(connection: psycopg.Connection) -> float | None:
    row = connection.execute(
        "select extract(epoch from min(backend_start))::float8 from pg_stat_activity"
        " where datname = current_database() and application_name like 'orchestrator ingest%'"
    ).fetchone()
    return row[0] if row else None


def _taken(connection: psycopg.Connection, topic: str) -> int:
    row = connection.execute(
        "select coalesce(sum(next_offset), 0) from orchestrator.ingest_offset where topic = %s", (topic,)
    ).fetchone()
    return int(row[0]) if row else 0


def _counts(connection: psycopg.Connection) -> tuple[int, int, int]:
    """Events, timers and rejects."""
    row = connection.execute(
        "select (select count(*) from orchestrator.event), (select count(*) from orchestrator.timer),"
        " (select count(*) from orchestrator.reject)"
    ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1]), int(row[2])
