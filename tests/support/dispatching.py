"""A dispatcher in the test's own process, and what dispatchers are judged by: the receiver and the database."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from orchestrator.dispatch.dispatcher import Dispatcher
from orchestrator.dispatch.http.deliveries import Sender
from orchestrator.dispatch.http.sender import HttpSender
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tracing import Tracer, tracing
from tests.support.laws import Arrival, violations
from tests.support.receiver import Received
from tests.support.sql_client import Client
from tests.support.waiting import eventually


class Running:
    """A dispatcher at work."""

    def __init__(
        self, settings: Settings, sender: Sender, metrics: Metrics | None = None, tracer: Tracer | None = None
    ) -> None:
        self.metrics = metrics or Metrics(settings)
        self._stop = asyncio.Event()
        self.task = asyncio.create_task(Dispatcher(settings, self.metrics, sender, tracer).run(self._stop))

    async def stop(self) -> None:
        self._stop.set()
        await self.task

    def value(self, name: str) -> float:
        """The sum of a series' values: ``value("events_delivered_total")``."""
        return sum(
            sample.value
            for family in self.metrics.registry.collect()
            for sample in family.samples
            if sample.name == f"orchestrator_{name}"
        )

    async def claims(self) -> None:
        """Waits until it has claimed, were it nothing."""
        await eventually(lambda: self.task.done() or self.value("claim_seconds_count") > 0)


@asynccontextmanager
async def dispatching(settings: Settings, sender: Sender | None = None) -> AsyncIterator[Running]:
    """A dispatcher that has claimed once already, and is stopped when the block ends."""
    metrics = Metrics(settings)
    async with HttpSender(settings) as http, tracing(settings, metrics, "dispatch") as tracer:
        running = Running(settings, sender or http, metrics, tracer)
        try:
            await running.claims()
            yield running
        finally:
            await running.stop()


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def finished(client: Client, event_ids: Iterable[str], timeout_s: float = 15.0) -> None:
    """Waits until none of the events is waiting or in flight any more."""
    ids = list(event_ids)

    def left() -> bool:
        count = client.value("select count(*) from orchestrator.timer where event_id = any (%s::uuid[])", ids)
        assert count == 0, f"{count} events are not finished"
        return True

    await eventually(left, timeout_s)


def statuses(client: Client, event_ids: Iterable[str]) -> Counter[str]:
    rows = client.column("select status from orchestrator.event_status where id = any (%s::uuid[])", list(event_ids))
    return Counter(rows)


def arrivals(requests: Iterable[Received]) -> Counter[str]:
    """How often each event has arrived, by its id."""
    return Counter(request.headers["webhook-id"] for request in requests)


def assert_laws(client: Client, requests: Iterable[Received], ids: Iterable[str]) -> None:
    """All events have ended, and what the database and the receiver tell breaks no law.

    Both read this machine's clock.
    """
    told = [
        Arrival(
            request.headers["webhook-id"],
            int(request.headers["orchestrator-attempt"]),
            datetime.fromtimestamp(request.arrived_at, UTC),
        )
        for request in requests
    ]
    assert violations(client.connection, acknowledged=ids, arrivals=told, finished=True) == []
