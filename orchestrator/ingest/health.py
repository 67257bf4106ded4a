"""The health of a consumer: which of its partitions are halted, and whether the others still move."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from orchestrator.ingest.partition import Partition
from orchestrator.ingest.source import Source
from orchestrator.metrics import Metrics

_REMIND_S = 60.0
_PAUSED_S = 5.0  # between two looks: this process did not run, or had no use for records

_log = logging.getLogger(__name__)


class HaltReports:
    """Reports the halted partitions of one consumer to the log and a metric.

    A halt is logged at once and then every minute. It is not logged again when the consumer reads its partitions from
    where the database stands once more.
    """

    def __init__(self, metrics: Metrics, topic: str) -> None:
        self._gauge = metrics.ingest_halted_partitions.labels(topic)
        self._topic = topic
        self._told: dict[int, tuple[str, float]] = {}
        self._shown = 0

    def update(self, partitions: Iterable[Partition]) -> None:
        """Brings log and metric up to date; `partitions` are all that are assigned."""
        halted = 0
        for partition in partitions:
            told, told_s = self._told.get(partition.number, ("", 0.0))
            if partition.halt_reason is not None:
                halted += 1
                if told != partition.halt_reason or time.monotonic() > told_s + _REMIND_S:
                    _log.error("%s", partition.halt_reason)
                    self._told[partition.number] = partition.halt_reason, time.monotonic()
            elif told and partition.unproved is None:
                del self._told[partition.number]
                about = {"topic": self._topic, "partition": partition.number, "offset": partition.next_offset}
                _log.warning("a halted partition is read on", extra=about)
        self._gauge.inc(halted - self._shown)  # consumers of a process share the series
        self._shown = halted


class StalledError(Exception):
    """The consumer does not move although nothing failed; it has to be rebuilt."""


class StallWatch:
    """Notices partitions that have stopped moving without an error.

    A partition moves when its next offset advances, or when a broker answers for it and it has nothing more to read.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._looked_s = 0.0
        self._seen: dict[int, tuple[int, int, float]] = {}

    def look(self, source: Source, partitions: Iterable[Partition]) -> None:
        """Call it about once a second while records are wanted. Raises StalledError."""
        now_s = time.monotonic()
        if now_s > self._looked_s + _PAUSED_S:
            self._seen = {}
        self._looked_s = now_s
        stalled = []
        for partition in partitions:
            polled_ms = source.polled_ms(partition.number)
            _, readable = source.ends(partition.number)
            last_polled_ms, last_offset, moved_s = self._seen.get(partition.number, (-1, -1, now_s))
            answered = polled_ms != last_polled_ms
            if partition.next_offset != last_offset or (answered and readable <= partition.next_offset):
                self._seen[partition.number] = polled_ms, partition.next_offset, now_s
            elif now_s > moved_s + self._stall_s:
                stalled.append(partition.number)
        if stalled:
            raise StalledError(f"partitions {stalled} have not moved for {self._stall_s:g} s; rebuilding the consumer")
