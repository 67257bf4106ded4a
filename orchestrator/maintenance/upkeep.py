"""Runs run_maintenance() every minute, and then the archive; every replica may do so at the same time."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from orchestrator.database.maintenance import Maintenance, MaintenanceProblem, Retention, Upkeep
from orchestrator.errors import Blocked, OrchestratorError
from orchestrator.maintenance.archive import archive
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings
from orchestrator.tasks import end, within

_EVERY_S = 60.0
_RUN_S = 900.0  # one run is bounded; a connection that does not answer must not end all maintenance
_AT_ONCE_S = 0.05
_ARCHIVE_AGAIN_S = 600.0  # after a failure: a disk that is full would be filled again each minute

_log = logging.getLogger(__name__)


async def prepare(settings: Settings) -> None:
    """Configures retention, and runs maintenance: after a long pause there is no partition for today.

    Raises DatabaseUnavailable, and OrchestratorError when this login may not maintain.
    """
    async with Maintenance.open(settings) as maintenance:
        await maintenance.configure(Retention.of(settings))
        await maintenance.run()


async def maintain_once(settings: Settings, retention: Retention) -> tuple[Upkeep, list[str]]:
    """Does all the maintenance that is due; returns what it did, with the archive's problems, and the files written.

    If another session holds retention up, that is one of the problems, and the rest is done. Raises as `prepare`.
    """
    files: list[str] = []
    refused: Blocked | None = None
    async with Maintenance.open(settings) as maintenance:
        try:
            await maintenance.configure(retention)
        except Blocked as error:
            refused = error
        told = await maintenance.run_on()
    if refused is not None:
        if told.skipped is not None:
            raise refused
        told.problems.insert(0, MaintenanceProblem("retention_configured", str(refused)))
    if told.skipped is None:
        archived = await archive(settings)
        files = archived.files
        told.problems += archived.problems
    return told, files


async def maintain(settings: Settings, metrics: Metrics, stop: asyncio.Event) -> None:
    """Runs maintenance once a minute until `stop` is set, and again at once while there is more work.

    A failure is logged and tried again. At the stop, work under way is given up, which is safe at any step.
    """
    minutes = asyncio.create_task(_Minutes(settings, metrics).run())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((minutes, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end(minutes, stopped)


class _Minutes:
    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._archive_at = 0.0

    async def run(self) -> None:
        while True:
            await self._once()
            await asyncio.sleep(_EVERY_S)

    async def _once(self) -> None:
        """Runs maintenance, then the archive; logs failures and raises none."""
        try:
            async with Maintenance.open(self._settings) as maintenance:
                while True:
                    told = await within(_RUN_S, maintenance.run())
                    _log.debug("maintenance done", extra=_fields(told))
                    self._warn(told.problems)
                    if not told.more or told.problems:
                        break
                    await asyncio.sleep(_AT_ONCE_S)
            await self._archive()
        except (OrchestratorError, TimeoutError) as error:
            why = str(error) or f"no answer within {_RUN_S:g} s"
            _log.error("maintenance failed; trying again in a minute", extra={"error": why})
        except Exception:
            _log.exception("maintenance failed; trying again in a minute")

    async def _archive(self) -> None:
        if time.monotonic() < self._archive_at:
            return
        told = await archive(self._settings)
        if told.problems:
            self._archive_at = time.monotonic() + _ARCHIVE_AGAIN_S
            self._warn(told.problems)

    def _warn(self, problems: list[MaintenanceProblem]) -> None:
        for step, problem in problems:
            self._metrics.maintenance_problems_total(step).inc()
            _log.warning("a step of maintenance failed", extra={"step": step, "problem": problem})


def _fields(told: Upkeep) -> dict[str, Any]:
    if told.skipped is not None:
        return {"skipped": told.skipped}
    return {"took_ms": told.took_ms, "more": told.more, "did": {name: n for name, n in told.did.items() if n}}
