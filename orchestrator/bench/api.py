"""The API over HTTP: single events from 64 clients, then batches of 500, each answered when committed."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg

from orchestrator.bench.processes import compiled, product, rss_mib, wait_until
from orchestrator.bench.workload import PAYLOAD, new_run
from orchestrator.dev.operating_system import free_port
from orchestrator.errors import OrchestratorError

_CLIENTS = 64
_BATCH_CLIENTS = 4
_BATCH = 500


def run(database_url: str, events: int) -> dict[str, object]:
    """`events` single POSTs, then four times as many events in batches of 500; counts the events in the database."""
    port = free_port()
    environ = {"LOG_LEVEL": "WARNING", **os.environ}
    environ |= {"DATABASE_URL": database_url, "SERVER_PORT": str(port), "SERVER_HOST": "127.0.0.1"}
    with product(["orchestrator", "api"], environ) as process, compiled("load") as program:
        wait_until(lambda: is_ready(port), "starting the API", 30.0)
        singles = load(program, port, _CLIENTS, events, 1)
        batched = load(program, port, _BATCH_CLIENTS, max(1, 4 * events // _BATCH), _BATCH)
        memory = rss_mib(process)
    acknowledged = singles["accepted"] + batched["accepted"]
    with psycopg.connect(database_url) as connection:
        row = connection.execute("select count(*) from orchestrator.event where source = 'bench'").fetchone()
        kept = int(row[0]) if row else 0
    return {
        "seconds": round(singles["seconds"] + batched["seconds"], 3),
        "events_per_s": round(singles["accepted"] / singles["seconds"]),
        "batch_events_per_s": round(batched["accepted"] / batched["seconds"]),
        "answer_ms": {name: round(singles[name], 3) for name in ("p50", "p99", "max")},
        "batch_answer_ms": {name: round(batched[name], 3) for name in ("p50", "p99", "max")},
        "failed": singles["failed"] + batched["failed"],
        "lost": max(0, acknowledged - kept),
        "rss_mib": {"api": memory},
    }


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def load(
    program: Path, port: int, clients: int, requests: int, per_request: int, *, topic: str | None = None
) -> dict[str, float]:
    """Posts events: HTTP events due tomorrow, or events for the topic that are due when they are posted."""
    at = "now" if topic else (datetime.now(UTC) + timedelta(days=1)).isoformat()
    arguments = [program, port, clients, requests, per_request, at, PAYLOAD.decode(), new_run()]
    arguments += [topic] if topic else []
    done = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OrchestratorError(f"bench: the load ended early: {done.stderr.strip()}")
    seconds, succeeded, accepted, p50, p99, longest = (float(word) for word in done.stdout.split())
    failed = requests - succeeded
    return {"seconds": seconds, "failed": failed, "accepted": accepted, "p50": p50, "p99": p99, "max": longest}
