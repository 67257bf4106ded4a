"""The runtime's own loop of maintenance, for installations without pg_cron; safe in every replica at once."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from orchestrator.config import Settings
from orchestrator.database import Database
from orchestrator.errors import OrchestratorError

_EVERY_S = 60.0

_log = logging.getLogger(__name__)


async def maintain(settings: Settings, database: Database, stop: asyncio.Event) -> None:
    """Runs maintenance once a minute until `stop` is set.

    A failure is logged and tried again a minute later.
    """
    while not stop.is_set():
        try:
            done = await database.run_maintenance(days_ahead=settings.partition_days_ahead)
            _log.debug("maintenance done", extra={"did": done.decode()})
        except OrchestratorError as error:
            _log.error("maintenance failed; trying again in a minute", extra={"error": str(error)})
        with suppress(TimeoutError):
            async with asyncio.timeout(_EVERY_S):
                await stop.wait()
