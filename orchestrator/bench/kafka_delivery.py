"""Deliveries to a Kafka topic by real dispatcher processes."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from orchestrator.bench.delivery import dispatching, drained, rates, submit
from orchestrator.bench.kafka import arrivals, broker, create_target
from orchestrator.bench.processes import rss_mib
from orchestrator.bench.workload import judged, new_run, spread, submissions
from orchestrator.settings import Settings


def run(database_url: str, events: int, dispatchers: int) -> dict[str, object]:
    """Drains a backlog that is due before the dispatchers start. Timed from the first arrival to the last finish.

    With OUTBOX_TOPICS=timestamp, the outbox publishes a message for each event meanwhile; `outbox_behind_s` says how
    much later the last message was.
    """
    topic = f"bench.{new_run()}"
    with broker(database_url) as environ:
        settings = Settings.from_env(environ)
        asyncio.run(create_target(settings, topic))
        due = spread(datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=2), 1.0, events)
        made = submissions(events, lambda n: topic, due, new_run(), "KAFKA")
        due_s = asyncio.run(submit(database_url, made))
        with dispatching(database_url, dispatchers, [], environ) as processes:
            finished_s = drained(database_url, None, events)
            published_s = drained(database_url, None, events, of="outbox")
            memory = max(rss_mib(process) for process in processes)
        arrived = asyncio.run(arrivals(settings, topic))
    result = rates(events, finished_s - arrived[0][1]) | judged(due_s, arrived)
    behind_s = round(published_s - finished_s, 3)
    return result | {"outbox_behind_s": behind_s, "lateness_ms": None, "rss_mib": {"dispatch": memory}}
