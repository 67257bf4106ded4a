"""The metrics that tell the state of the database. Every process that answers /metrics reads them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, LiteralString

from orchestrator.database import Database
from orchestrator.database.backups import backups
from orchestrator.database.destinations import Destinations, Standstills
from orchestrator.database.maintenance import condition
from orchestrator.database.vital_signs import held_destinations, outlook, vital_signs
from orchestrator.errors import DatabaseUnavailable, OrchestratorError
from orchestrator.metrics import Metrics
from orchestrator.tasks import within

CHECK_TIMEOUT_S = 2.0

_ALL_S = 4.0  # Prometheus gives up after 10 s
_HOLDERS: LiteralString = "select count(*) from orchestrator.lock_holders()"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Reading:
    """Something to ask the database, at most once in `every_s`. `show` sets gauges by the answer; None: unknown."""

    what: str
    every_s: float
    ask: Callable[[], Awaitable[Any]]
    show: Callable[[Any], None]
    asked_s: float = -math.inf

    @property
    def is_old(self) -> bool:
        return time.monotonic() - self.asked_s >= self.every_s


class DatabaseGauges:
    """Keeps the gauges at most a minute old; while the database does not answer they are NaN, or gone."""

    def __init__(self, database: Database, metrics: Metrics) -> None:
        self._metrics = metrics
        self._up = False
        self._lock = asyncio.Lock()
        self._first = Reading("pauses and breakers", 5.0, Destinations(database).standstills, self._show_standstills)
        self._others = [
            Reading("the state of the database", 15.0, lambda: vital_signs(database), metrics.set_vital_signs),
            Reading("maintenance", 15.0, lambda: condition(database), metrics.set_condition),
            Reading("backups", 60.0, lambda: backups(database), metrics.set_backups),
            Reading("lock holders", 15.0, lambda: database.value(_HOLDERS), self._show_holders),
            Reading("held destinations", 15.0, lambda: held_destinations(database), metrics.set_held_destinations),
            Reading("what falls due soon", 60.0, lambda: outlook(database), metrics.set_outlook),
        ]

    async def refresh(self) -> None:
        """Asks what is old, for seconds at most. If the first question has no answer, it asks no other."""
        async with self._lock:
            await self._refresh()

    async def _refresh(self) -> None:
        until_s = time.monotonic() + _ALL_S
        if self._first.is_old:
            self._up = await self._read(self._first, CHECK_TIMEOUT_S)
        for reading in self._others:
            left_s = until_s - time.monotonic()
            if not self._up:
                reading.show(None)
                reading.asked_s = -math.inf
            elif reading.is_old and left_s > 0:
                self._up = await self._read(reading, min(CHECK_TIMEOUT_S, left_s))
        self._metrics.database_up.set(self._up)

    async def _read(self, reading: Reading, timeout_s: float) -> bool:
        """Whether the database has answered, if only with an error."""
        reading.asked_s = time.monotonic()
        found, answered = None, True
        try:
            found = await within(timeout_s, reading.ask())
        except (TimeoutError, OrchestratorError) as error:
            # Other errors: this login may not ask this, or the schema is older than this program.
            answered = not isinstance(error, TimeoutError | DatabaseUnavailable)
            _log.debug("metrics: unknown: %s", reading.what, extra={"error": str(error)})
        reading.show(found)
        return answered

    def _show_standstills(self, found: Standstills | None) -> None:
        if found is None:
            self._metrics.set_standstills(math.nan, math.nan, math.nan)
        else:
            paused = found.paused_at is not None
            self._metrics.set_standstills(float(paused), found.destinations_paused, found.breakers_open)

    def _show_holders(self, found: int | None) -> None:
        self._metrics.lock_holders.set(math.nan if found is None else found)
