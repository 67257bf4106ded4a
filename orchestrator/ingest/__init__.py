"""Ingestion: Kafka's submissions and commands into the database, each exactly once."""

from __future__ import annotations

import asyncio

from orchestrator.ingest.commands import Commands
from orchestrator.ingest.consumer import Consumer
from orchestrator.ingest.submissions import Submissions
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tasks import retrieve
from orchestrator.tracing import Tracer

_BATCH_BYTES = 24 << 20  # of all consumers of a process together; each holds two batches
_LEAST_BATCH_BYTES = 256 << 10
_LARGEST_BATCH_BYTES = 4 << 20
_LAST_S = 1.0

__all__ = ["Consumer", "consumers", "ingest"]


async def ingest(settings: Settings, metrics: Metrics, stop: asyncio.Event, tracer: Tracer | None = None) -> None:
    """Runs KAFKA_CONSUMER_CONCURRENCY consumers of submissions and one of commands until `stop` is set.

    Then it ends within SHUTDOWN_TIMEOUT_SECONDS: batches under way are written, or the next consumer reads them again.
    """
    running = [asyncio.create_task(consumer.run()) for consumer in consumers(settings, metrics, tracer)]
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopping, *running):
            task.cancel()
        _, late = await asyncio.wait([stopping, *running], timeout=settings.shutdown_timeout_s)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_LAST_S)
    retrieve(*running)  # several may have failed; the first is raised
    for task in running:
        if task.done() and not task.cancelled():
            task.result()


def consumers(
    settings: Settings, metrics: Metrics, tracer: Tracer | None = None, *, stall_s: float = 30.0
) -> list[Consumer]:
    """All consumers of one process, the one of commands last. One that does not move for `stall_s` is rebuilt."""
    count = settings.kafka_concurrency
    batch_bytes = max(_LEAST_BATCH_BYTES, min(_LARGEST_BATCH_BYTES, _BATCH_BYTES // count // 2))

    def submissions() -> Submissions:
        return Submissions(settings, metrics, batch_bytes, tracer)

    return [
        *(
            Consumer(
                settings,
                metrics,
                settings.topic_submission,
                settings.kafka_group,
                submissions,
                share=count,
                stall_s=stall_s,
            )
            for _ in range(count)
        ),
        Consumer(
            settings,
            metrics,
            settings.topic_processing,
            f"{settings.kafka_group}.commands",
            lambda: Commands(metrics),
            share=count,
            stall_s=stall_s,
        ),
    ]
