"""The whole way: REST, Kafka, database, Kafka."""

from __future__ import annotations

import asyncio
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack

import psycopg

from orchestrator.bench.api import is_ready, load
from orchestrator.bench.delivery import dispatching, rates
from orchestrator.bench.kafka import PARTITIONS, arrivals, broker, create_target
from orchestrator.bench.processes import compiled, product, rss_mib, wait_until
from orchestrator.bench.workload import judged, new_run
from orchestrator.dev.operating_system import free_port
from orchestrator.settings import Settings

_CLIENTS = 4
_BATCH = 500
_DRAIN_S = 300.0


def run(database_url: str, events: int, ingesters: int, dispatchers: int) -> dict[str, object]:
    """Posts batches as fast as the API takes them; each event is due when it is posted.

    Timed from the first request to the last finish; lateness is measured at the arrival in the topic.
    """
    topic, port = f"bench.{new_run()}", free_port()
    requests = max(1, events // _BATCH)
    with broker(database_url) as environ, ExitStack() as running:
        settings = Settings.from_env(environ)
        asyncio.run(create_target(settings, topic))
        program = running.enter_context(compiled("load"))
        processes = {"dispatch": running.enter_context(dispatching(database_url, dispatchers, [], environ))}
        ports = [free_port() for _ in range(ingesters)]
        processes["ingest"] = [_started(running, "ingest", environ, "MANAGEMENT_SERVER_PORT", each) for each in ports]
        processes["api"] = [_started(running, "api", environ, "SERVER_PORT", port)]
        wait_until(lambda: is_ready(port), "starting the API", 30.0)
        wait_until(
            lambda: sum(_assigned(each, settings.topic_submission) for each in ports) == PARTITIONS,
            "dividing the partitions",
            60.0,
        )
        began_s = time.time()
        posted = load(program, port, _CLIENTS, requests, _BATCH, topic=topic)
        with psycopg.connect(database_url, autocommit=True) as watching:
            wait_until(lambda: _finished(watching) >= posted["accepted"], f"delivering {events} events", _DRAIN_S, 0.05)
            seconds = time.time() - began_s
            due = _due_times(watching)
        memory = {role: max(rss_mib(process) for process in each) for role, each in processes.items()}
        arrived = asyncio.run(arrivals(settings, topic))
    result = rates(int(posted["accepted"]), seconds) | judged(due, arrived)
    return result | {
        "submit_per_s": round(posted["accepted"] / posted["seconds"]),
        "failed": int(posted["failed"]),
        "lost": int(posted["accepted"]) - len({event_id for event_id, _ in arrived}),
        "answer_ms": {name: round(posted[name], 3) for name in ("p50", "p99", "max")},
        "rss_mib": memory,
    }


def _started(
    running: ExitStack, role: str, environ: Mapping[str, str], setting: str, port: int
) -> subprocess.Popen[bytes]:
    environ = {**environ, "SERVER_HOST": "127.0.0.1", setting: str(port)}
    return running.enter_context(product(["orchestrator", role], environ))


def _assigned(port: int, topic: str) -> int:
    """How many partitions of the topic an ingester has, by its metrics."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return 0
    return sum("_ingest_lag{" in line and f'topic="{topic}"' in line for line in lines)


def _due_times(connection: psycopg.Connection) -> dict[str, float]:
    rows = connection.execute("select id::text, extract(epoch from scheduled_at)::float8 from orchestrator.event")
    return {row[0]: row[1] for row in rows}


def _finished(connection: psycopg.Connection) -> int:
    row = connection.execute("select (orchestrator.statistics() #>> '{totals,delivered}')::bigint").fetchone()
    return int(row[0]) if row else 0
