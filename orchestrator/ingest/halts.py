"""Tells operators which partitions are halted, for as long as they are."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from orchestrator.ingest.partition import Partition
from orchestrator.metrics import Metrics

_REMIND_S = 60.0

_log = logging.getLogger(__name__)


class Halts:
    """Of one consumer. A halt is logged at once and then every minute; placing anew does not repeat it."""

    def __init__(self, metrics: Metrics, topic: str) -> None:
        self._gauge = metrics.ingest_halted_partitions.labels(topic)
        self._topic = topic
        self._told: dict[int, tuple[str, float]] = {}
        self._shown = 0

    def tell(self, partitions: Iterable[Partition]) -> None:
        """Brings log and metric up to date; `partitions` are all that are assigned."""
        halted = 0
        for partition in partitions:
            told, told_s = self._told.get(partition.number, ("", 0.0))
            if partition.halted is not None:
                halted += 1
                if told != partition.halted or time.monotonic() > told_s + _REMIND_S:
                    _log.error("%s", partition.halted)
                    self._told[partition.number] = partition.halted, time.monotonic()
            elif told and partition.unproved is None:
                del self._told[partition.number]
                about = {"topic": self._topic, "partition": partition.number, "offset": partition.next_offset}
                _log.warning("a halted partition is read on", extra=about)
        self._gauge.inc(halted - self._shown)  # consumers of a process share the series
        self._shown = halted
