"""Reads one topic into the database, each record exactly once, until it is cancelled.

The database's offset says where to read on. Whenever a partition may stand elsewhere than a consumer believes, the
consumer drops the records in its memory and reads again from the database's offset: after an assignment, when another
consumer has written the batch first, and when the log lacks an offset.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from aiokafka.errors import KafkaError

from orchestrator.backoff import backoff_s
from orchestrator.database.ingestion import OffsetsMovedError
from orchestrator.errors import KafkaUnavailable, SettingsError
from orchestrator.ingest.health import HaltReports, StalledError, StallWatch
from orchestrator.ingest.partition_reader import Batch, PartitionReader
from orchestrator.ingest.source import MisplacedError, Source, TooLargeError
from orchestrator.ingest.writer import Writer
from orchestrator.metrics import Metrics
from orchestrator.settings import Settings

_AGAIN_S = 0.1
_WELL_S = 60.0  # a failure after this long does not count as consecutive

_log = logging.getLogger(__name__)


class Consumer:
    """One member of the group with one connection to the database. Cancel `run` to end it; no record is lost."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        topic: str,
        group: str,
        new_batch: Callable[[], Batch],
        *,
        share: int = 1,
        stall_s: float = 30.0,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._topic = topic
        self._group = group
        self._new_batch = new_batch
        self._share = share
        self._stall_s = stall_s
        self._fetch_factor = 1
        self._writer = Writer(settings, metrics, topic)
        self._halt_reports = HaltReports(metrics, topic)

    async def run(self) -> None:
        """Consumes until cancelled; waits for Kafka and the database while they are away. Raises SettingsError."""
        failures = 0
        try:
            while True:
                began_s = time.monotonic()
                try:
                    await self._consume()
                except TooLargeError:
                    self._fetch_factor *= 4
                    _log.warning("a record is larger than a fetch; fetching more", extra={"topic": self._topic})
                    await asyncio.sleep(_AGAIN_S)
                except StalledError as stalled:
                    self._metrics.ingest_rebuilds_total.inc()
                    _log.error("%s", stalled, extra={"topic": self._topic})
                except SettingsError:
                    raise
                except Exception as error:
                    if not isinstance(error, KafkaUnavailable | KafkaError):
                        _log.exception("reading failed unexpectedly", extra={"topic": self._topic})
                    failures = 1 if time.monotonic() > began_s + _WELL_S else failures + 1
                    await self._back_off(failures, error)
        finally:
            self._halt_reports.update(())
            await self._writer.close()

    async def _consume(self) -> None:
        """Reads until the consumer has to be rebuilt."""
        opening = Source.open(
            self._settings, self._topic, self._group, share=self._share, fetch_factor=self._fetch_factor
        )
        async with opening as source:
            watch = StallWatch(self._stall_s)
            while True:
                reading = PartitionReader(
                    self._topic, source, self._writer, watch, self._halt_reports, self._metrics, self._new_batch
                )
                try:
                    await reading.run()
                except OffsetsMovedError as moved:
                    self._metrics.ingest_conflicts_total.inc()
                    _log.info(
                        "another consumer has moved the offsets",
                        extra={"topic": self._topic, "stand_at": moved.stand_at},
                    )
                    await asyncio.sleep(_AGAIN_S * random.uniform(0.5, 2.0))
                except MisplacedError as error:
                    _log.info(
                        "finding the place of each partition again", extra={"topic": self._topic, "error": str(error)}
                    )
                    await asyncio.sleep(_AGAIN_S)
                finally:
                    await reading.settle()

    async def _back_off(self, failures: int, error: Exception) -> None:
        wait_s = backoff_s(failures)
        about = {"topic": self._topic, "error": str(error) or type(error).__name__, "retry_in_s": round(wait_s, 3)}
        _log.warning("Kafka is not available; trying again", extra=about)
        await asyncio.sleep(wait_s)
